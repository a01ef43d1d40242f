"""ExpandNets: a kernel beside a sequence of 1x1, KxK and 1x1 with more channels."""
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.models import register_notrace_module
from torch import Tensor

from .. import kernels
from ..errors import UserError
from ..methods import Method, Place, register_method
from ..precision import sheltered
from .base import LinearRepLayer, kaiming_uniform_
from .scaled import ScaledRepLayer

__all__ = ['ExpandNet', 'ExpandedConv2d']

EXPANSION = 4  # of the paper
MAX_EXPANSION = 64  # a file says how much


def check_expansion(expansion: Any) -> None:
    """Raise a UserError if this is no factor of channels."""
    if isinstance(expansion, bool) or not isinstance(expansion, int) or not 1 <= expansion <= MAX_EXPANSION:
        raise UserError(f'expansion must be an integer from 1 to {MAX_EXPANSION}, got {expansion!r}')


def expanded_kernel(
        origin: Tensor,
        seq_first: Tensor,
        seq_kxk: Tensor,
        seq_last: Tensor,
        scale: Tensor,
        attach_rate: Tensor,
        groups: int,
) -> Tensor:
    """An origin beside a sequence of 1x1, KxK and 1x1.

    Args:
        origin: ``(o, i/g, kh, kw)``.
        seq_first: ``(r*i, i/g, 1, 1)``.
        seq_kxk: ``(r*o, r*i/g, kh, kw)``.
        seq_last: ``(o, r*o/g, 1, 1)``.
        scale: Origin and sequence, ``(2, o)``.
        attach_rate: 0-dim, multiplies the sequence.
        groups: Number of groups ``g``.

    Returns:
        ``(o, i/g, kh, kw)``.
    """
    last = seq_last * (scale[1] * attach_rate).reshape(-1, 1, 1, 1)
    if origin.shape[0] < origin.shape[1] * groups:  # the smaller product first
        sequence = kernels.merge_sequential(seq_first, kernels.merge_sequential(seq_kxk, last, groups), groups)
    else:
        sequence = kernels.merge_sequential(kernels.merge_sequential(seq_first, seq_kxk, groups), last, groups)
    return origin * scale[0].reshape(-1, 1, 1, 1) + sequence


_expanded_kernel = sheltered(expanded_kernel)
# A symbolic trace records this call as it is.
torch.fx.wrap('_expanded_kernel')


@register_notrace_module
class ExpandedConv2d(ScaledRepLayer):
    """ExpandNets: a KxK convolution as a sequence of 1x1, KxK and 1x1 on ``expansion`` times the channels.

    Here the sequence stands beside an origin kernel, which the paper does not have: a product of factors that are what
    they are cannot be made to any given kernel, a sum can. Both start with scales of the same size.

    The KxK has ``expansion ** 2`` times the parameters of the convolution, and composing costs as much as convolving
    that many times ``i`` pixels: this is for small networks, as the paper's are.

    `ExpandNets: Linear Over-parameterization to Train Compact Convolutional Networks` - https://arxiv.org/abs/1811.10495

    Args:
        in_channels: As of :class:`torch.nn.Conv2d`, like all up to ``padding_mode``, which is only ``'zeros'``.
        kernel_size: Height and width, odd.
        expansion: Inner channels for each channel ``r``.
        generator: Source of the initial draw.

    Raises:
        UserError: For an expansion that is no integer from 1 to 64, an even kernel, a padding mode other than zeros, or
            channels that the groups do not divide.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Union[int, Tuple[int, int]],
            stride: Union[int, Tuple[int, int]] = 1,
            padding: Union[str, int, Tuple[int, int]] = 0,
            dilation: Union[int, Tuple[int, int]] = 1,
            groups: int = 1,
            bias: bool = True,
            padding_mode: str = 'zeros',
            expansion: int = EXPANSION,
            generator: Optional[torch.Generator] = None,
            device: Any = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device=device)
        check_expansion(expansion)
        self.expansion = expansion
        dd: Dict[str, Any] = dict(device=device, dtype=dtype)
        inner_in, inner_out = expansion * in_channels, expansion * out_channels
        self.seq_first = nn.Parameter(torch.empty(inner_in, in_channels // groups, 1, 1, **dd))
        self.seq_kxk = nn.Parameter(torch.empty(inner_out, inner_in // groups, *self.kernel_size, **dd))
        self.seq_last = nn.Parameter(torch.empty(out_channels, inner_out // groups, 1, 1, **dd))
        self._init_branches(('origin', 'sequence'), bias, generator, **dd)

    def _own_kwargs(self) -> Dict[str, Any]:
        return dict(super()._own_kwargs(), expansion=self.expansion)

    def _draw_sides(self, generator: Optional[torch.Generator]) -> None:
        for factor, slope in ((self.seq_first, 1.0), (self.seq_kxk, 0.0), (self.seq_last, 1.0)):
            kaiming_uniform_(factor, factor[0].numel(), slope, generator)

    def _side_gradients(self) -> Dict[str, Optional[Tensor]]:
        return dict(sequence=self.seq_kxk.grad)

    def _composed(self, scale: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return expanded_kernel(
                self.origin, self.seq_first, self.seq_kxk, self.seq_last, scale, self.attach_rate.to(scale.dtype),
                self.groups)
        return _expanded_kernel(
            self.origin, self.seq_first, self.seq_kxk, self.seq_last, scale, self.attach_rate, self.groups)


@register_method
@dataclass(frozen=True)
class ExpandNet(Method):
    """ExpandNets' 1x1-KxK-1x1 beside all KxK convolutions, with or without a norm behind them.

    Args:
        expansion: Inner channels for each channel.
    """

    name = 'expandnet'
    title = 'ExpandNet'
    summary = (
        'ExpandNets compose the kernel of each KxK convolution from a plain one and a sequence of 1x1, KxK and 1x1 on '
        'more channels (four times as many by default), each with a learnt scale.'
    )
    paper = 'arXiv:1811.10495'
    citation = """@inproceedings{guo2020expandnets,
  title={ExpandNets: Linear Over-parameterization to Train Compact Convolutional Networks},
  author={Guo, Shuxuan and Alvarez, Jose M. and Salzmann, Mathieu},
  booktitle={Advances in Neural Information Processing Systems},
  year={2020}
}"""
    layers = (ExpandedConv2d,)

    expansion: int = EXPANSION

    def __post_init__(self) -> None:
        check_expansion(self.expansion)

    @classmethod
    def of_layer(cls, layer: Any) -> 'ExpandNet':
        return cls(expansion=layer.expansion)

    def takes(self, place: Place) -> bool:
        return max(place.conv.kernel_size) > 1

    def layer_for(self, place: Place) -> Tuple[Type[LinearRepLayer], Dict[str, Any]]:
        return ExpandedConv2d, dict(expansion=self.expansion)
