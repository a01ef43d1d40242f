"""RefConv: a kernel that stays as it is, and a learnt convolution over it."""
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor

from ..errors import UserError
from ..methods import Method, Place, register_method
from ..precision import sheltered
from .base import LinearRepLayer
from .transformed import TransformedRepLayer

__all__ = ['RefConv', 'RefConv2d']

MAP_SIZE = 3  # of the paper
MAX_MAP_SIZE = 31  # a file says which


def check_map_size(size: Any) -> None:
    """Raise a UserError if this is no size of a convolution over kernels."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_MAP_SIZE or size % 2 == 0:
        raise UserError(f'map_size must be an odd integer from 1 to {MAX_MAP_SIZE}, got {size!r}')


def refocused_kernel(origin: Tensor, residual: Tensor, attach_rate: Tensor) -> Tensor:
    """RefConv's kernel: the origin, and a convolution over it.

    The slices of the kernel, one ``kh x kw`` image for each output and input channel, are the channels of that
    convolution. As in the paper's code it has as many groups as the kernel has slices for each group of the host: each
    slice is convolved alone, and those of a depthwise kernel all with each other.

    Args:
        origin: ``(o, i/g, kh, kw)``.
        residual: ``(o*i/g, g, m, m)``, ``m`` odd.
        attach_rate: 0-dim, multiplies the residual.

    Returns:
        ``(o, i/g, kh, kw)``.
    """
    slices = origin.reshape(1, residual.shape[0], origin.shape[2], origin.shape[3])
    mixed = F.conv2d(
        slices, residual * attach_rate, None, 1, residual.shape[2] // 2, 1, residual.shape[0] // residual.shape[1])
    return origin + mixed.reshape(origin.shape)


_refocused_kernel = sheltered(refocused_kernel)
# A symbolic trace records this call as it is.
torch.fx.wrap('_refocused_kernel')


@register_notrace_module
class RefConv2d(TransformedRepLayer):
    """RefConv: the kernel is the origin ``W``, which is saved but not trained, plus a learnt convolution over it.

    It is meant for pretrained networks: :func:`timm_rep.expand` freezes their kernels, and what is trained are the
    convolutions over them (*refocusing*). They start at zero, so that training starts from what was learnt. A time step
    folds them into the frozen kernel. For a training from scratch the frozen kernel is a random one.

    `RefConv: Re-parameterized Refocusing Convolution for Powerful ConvNets` - https://arxiv.org/abs/2310.10563

    Args:
        in_channels: As of :class:`torch.nn.Conv2d`, like all up to ``padding_mode``, which is only ``'zeros'``.
        kernel_size: Height and width, odd.
        groups: Number of groups ``g``. A convolution over depthwise kernels has ``9 * o * i`` parameters for their
            ``9 * o``.
        map_size: Height and width of the convolution over kernels, odd.
        generator: Source of the initial draw.

    Raises:
        UserError: For a map size or a kernel size that is not odd, a padding mode other than zeros, or channels that
            the groups do not divide.
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
            map_size: int = MAP_SIZE,
            generator: Optional[torch.Generator] = None,
            device: Any = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device=device)
        check_map_size(map_size)
        dd: Dict[str, Any] = dict(device=device, dtype=dtype)
        slices = out_channels * in_channels // groups
        residual = nn.Parameter(torch.empty(slices, groups, map_size, map_size, **dd))
        self._init_branches(torch.empty(self.weight_shape, **dd), residual, bias, generator, **dd)

    def _own_kwargs(self) -> Dict[str, Any]:
        return dict(super()._own_kwargs(), map_size=self.residual.shape[2])

    def _compose(self, channels_last: bool) -> Tensor:
        if torch.jit.is_scripting():
            return refocused_kernel(self.origin, self.residual, self.attach_rate.to(self.residual.dtype))
        kernel: Tensor = _refocused_kernel(self.origin, self.residual, self.attach_rate)
        return kernel.to(self.residual.dtype)  # which may differ while it is sharded with mixed precision


@register_method
@dataclass(frozen=True)
class RefConv(Method):
    """RefConv for all KxK convolutions, with or without a norm behind them; for pretrained networks.

    Args:
        map_size: Height and width of the convolutions over kernels.
    """

    name = 'refconv'
    title = 'RefConv'
    summary = (
        'RefConv keeps the kernel of each KxK convolution as it is and trains a convolution over it, whose result is '
        'added.'
    )
    paper = 'arXiv:2310.10563'
    citation = """@article{cai2025refconv,
  title={RefConv: Reparameterized Refocusing Convolution for Powerful ConvNets},
  author={Cai, Zhicheng and Ding, Xiaohan and Shen, Qiu and Cao, Xun},
  journal={IEEE Transactions on Neural Networks and Learning Systems},
  year={2025}
}"""
    layers = (RefConv2d,)

    map_size: int = MAP_SIZE

    def __post_init__(self) -> None:
        check_map_size(self.map_size)

    @classmethod
    def of_layer(cls, layer: Any) -> 'RefConv':
        return cls(map_size=layer.residual.shape[2])

    def takes(self, place: Place) -> bool:
        return max(place.conv.kernel_size) > 1

    def layer_for(self, place: Place) -> Tuple[Type[LinearRepLayer], Dict[str, Any]]:
        return RefConv2d, dict(map_size=self.map_size)
