"""Rep layers in the place of convolutions whose class pads the input or standardises the kernel itself."""
import copy
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Type

import torch
import torch.nn as nn
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame, pad_same
from timm.models import register_notrace_module
from torch import Tensor

from ..errors import UserError
from .annealed import refuse_stock_form
from .base import GEOMETRY, LinearRepLayer
from .fixed import FixedGeometry

__all__ = ['HOSTS', 'HostedConv2d', 'StandardizedConv2d', 'hosted']

PLAIN = nn.Conv2d(1, 1, 1, device='meta')


@register_notrace_module
class HostedConv2d(FixedGeometry):
    """A rep layer in the place of a convolution that pads its input as TensorFlow does (timm's ``Conv2dSame``).

    The layer, ``layer``, stands for the convolution without the rule; the rule is applied around it. So annealing knows
    the layer as any other one, and the stock form is a convolution of the class that was here.

    Args:
        conv: The convolution, of a class in :data:`HOSTS`; it stays as it is.
        layer: A rep layer with its geometry.
    """

    __constants__ = [*GEOMETRY, 'same_pad']
    __jit_unused_properties__ = ['weight', 'bias']
    __jit_ignored_attributes__ = ['stock_class', 'stock_settings']

    if TYPE_CHECKING:  # not for TorchScript, which takes class annotations for attributes
        kernel_size: Any
        stride: Any
        padding: Any
        dilation: Any
        groups: Any
        out_channels: Any
        gain: Any

    def __init__(self, conv: nn.Conv2d, layer: Any) -> None:
        super().__init__()
        for name in GEOMETRY:
            setattr(self, name, getattr(conv, name))
        self.same_pad = bool(getattr(conv, 'same_pad', isinstance(conv, Conv2dSame)))
        self.stock_class = type(conv)
        self.stock_settings: Dict[str, Any] = {
            name: value for name, value in vars(conv).items() if name[0] != '_' and name not in vars(PLAIN)}
        self.layer = layer
        self.train(conv.training)

    @property
    def weight(self) -> Tensor:
        """The layer's kernel, before the rule, as that of the convolution is."""
        weight: Tensor = self.layer.weight
        return weight

    @property
    def bias(self) -> Optional[Tensor]:
        bias: Optional[Tensor] = self.layer.bias
        return bias

    def _load_from_state_dict(  # torch's
            self,
            state_dict: Mapping[str, Tensor],
            prefix: str,
            local_metadata: Any,
            strict: bool,
            missing_keys: List[str],
            unexpected_keys: List[str],
            error_msgs: List[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if f'{prefix}weight' in state_dict and f'{prefix}layer.attach_rate' not in state_dict:
            refuse_stock_form(prefix, error_msgs)

    def _padded(self, x: Tensor) -> Tensor:
        return pad_same(x, self.kernel_size, self.stride, self.dilation) if self.same_pad else x

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self._padded(x))
        return out

    @torch.no_grad()
    def stock_conv(self, conv: nn.Conv2d) -> nn.Conv2d:
        """A convolution of the class that was here.

        Args:
            conv: What the layer's stock form is; its parameters become those of the new one.

        Returns:
            A new convolution with the rule.
        """
        stock: nn.Conv2d = self.stock_class.__new__(self.stock_class)
        vars(stock).update(vars(conv))
        vars(stock).update(self.stock_settings)
        for name, parameter in self.named_parameters(recurse=False):
            stock.register_parameter(name, copy.deepcopy(parameter))
        return stock

    def fuse(self) -> nn.Conv2d:
        """A new convolution with the layer's function and the rule; the layer itself stays as it is.

        It is what timm's ``reparameterize_model`` calls.
        """
        return self.stock_conv(self.layer.fuse())


@register_notrace_module
class StandardizedConv2d(HostedConv2d):
    """A rep layer in the place of a convolution that standardises its kernel (``StdConv2d``, ``ScaledStdConv2d``).

    The branches are composed first, then the kernel is standardised, and padded for where the class does that, too.

    Source: timm's ``std_conv.py``, whose operations these are.

    Args:
        conv: The convolution; it stays as it is.
        layer: A linear rep layer with its geometry.

    Raises:
        UserError: For a layer with norms in its branches, which has no kernel to standardise.
    """

    def __init__(self, conv: nn.Conv2d, layer: Any) -> None:
        if not isinstance(layer, LinearRepLayer):
            raise UserError(
                f'a {type(conv).__name__} standardises its kernel, which a {type(layer).__name__}, with norms in its '
                'branches, does not have'
            )
        super().__init__(conv, layer)
        gain: Any = getattr(conv, 'gain', None)
        self.scale = float(getattr(conv, 'scale', 1.0))
        layer.standardize_eps = float(conv.eps)  # type: ignore[arg-type]
        self.register_parameter(
            'gain', None if gain is None else nn.Parameter(gain.detach().clone(), gain.requires_grad))

    def forward(self, x: Tensor) -> Tensor:
        gain = None if self.gain is None else (self.gain * self.scale).view(-1)
        out: Tensor = self.layer(self._padded(x), gain)
        return out


# What stands around a rep layer in the place of a convolution, by the convolution's class.
HOSTS: Dict[type, Type[HostedConv2d]] = {
    Conv2dSame: HostedConv2d,
    StdConv2d: StandardizedConv2d,
    StdConv2dSame: StandardizedConv2d,
    ScaledStdConv2d: StandardizedConv2d,
    ScaledStdConv2dSame: StandardizedConv2d,
}


def hosted(conv: nn.Conv2d, layer: nn.Module) -> nn.Module:
    """What takes the place of a convolution: the layer, with the rule of its class around it if it has one.

    Args:
        conv: A plain convolution, or one of a class in :data:`HOSTS`.
        layer: The rep layer that stands for it.
    """
    return HOSTS[type(conv)](conv, layer) if type(conv) in HOSTS else layer
