"""DO-Conv: a kernel behind a depthwise one, which is the identity and a learnt residual."""
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.models import register_notrace_module
from torch import Tensor

from ..methods import Method, Place, register_method
from ..precision import sheltered
from .transformed import TransformedRepLayer

__all__ = ['DOConv', 'DOConv2d']


def over_parameterized(origin: Tensor, residual: Tensor, attach_rate: Tensor, groups: int) -> Tensor:
    """DO-Conv's kernel: every output of an input channel sees its taps mixed in the same way.

    Args:
        origin: ``(o, i/g, kh, kw)``.
        residual: What is learnt beside the identity, ``(i, k, k)`` in one dimension: for every input channel the weight
            of each tap of the origin in each tap of the kernel.
        attach_rate: 0-dim, multiplies the residual.
        groups: Number of groups ``g``.

    Returns:
        ``(o, i/g, kh, kw)``.
    """
    out_channels, in_per_group, height, width = origin.shape
    taps = height * width
    rows = origin.reshape(groups, out_channels // groups, in_per_group, taps)
    mixers = residual.reshape(groups, in_per_group, taps, taps) * attach_rate
    mixed = torch.matmul(rows.transpose(1, 2), mixers.transpose(2, 3)).transpose(1, 2)
    return origin + mixed.reshape(origin.shape)


_over_parameterized = sheltered(over_parameterized)
# A symbolic trace records this call as it is.
torch.fx.wrap('_over_parameterized')


@register_notrace_module
class DOConv2d(TransformedRepLayer):
    """DO-Conv: the kernel is the origin ``W`` behind a depthwise kernel ``I + R`` of as many filters as it has taps.

    The residual ``R`` starts at zero. It is kept in one dimension, so that timm, which decays no vectors, leaves it out
    of the weight decay: that would draw it to the plain convolution.

    `DO-Conv: Depthwise Over-parameterized Convolutional Layer` - https://arxiv.org/abs/2006.12030

    Args:
        in_channels: As of :class:`torch.nn.Conv2d`, like all up to ``padding_mode``, which is only ``'zeros'``.
        kernel_size: Height and width, odd.
        generator: Source of the initial draw.

    Raises:
        UserError: For an even kernel, a padding mode other than zeros, or channels that the groups do not divide.
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
            generator: Optional[torch.Generator] = None,
            device: Any = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device=device)
        dd: Dict[str, Any] = dict(device=device, dtype=dtype)
        taps = self.kernel_size[0] * self.kernel_size[1]
        origin = nn.Parameter(torch.empty(self.weight_shape, **dd))
        self._init_branches(origin, nn.Parameter(torch.empty(in_channels * taps ** 2, **dd)), bias, generator, **dd)

    def _compose(self, channels_last: bool) -> Tensor:
        if torch.jit.is_scripting():
            return over_parameterized(
                self.origin, self.residual, self.attach_rate.to(self.residual.dtype), self.groups)
        return _over_parameterized(self.origin, self.residual, self.attach_rate, self.groups)


@register_method
@dataclass(frozen=True)
class DOConv(Method):
    """DO-Conv for all KxK convolutions, with or without a norm behind them."""

    name = 'doconv'
    title = 'DO-Conv'
    summary = (
        'DO-Conv composes the kernel of each KxK convolution from a kernel and a learnt mixing of its taps for every '
        'input channel, which starts as the identity.'
    )
    paper = 'arXiv:2006.12030'
    citation = """@article{cao2022doconv,
  title={DO-Conv: Depthwise Over-Parameterized Convolutional Layer},
  author={Cao, Jinming and Li, Yangyan and Sun, Mingchao and Chen, Ying and Lischinski, Dani and Cohen-Or, Daniel and
    Chen, Baoquan and Tu, Changhe},
  journal={IEEE Transactions on Image Processing},
  year={2022}
}"""
    layers = (DOConv2d,)

    def takes(self, place: Place) -> bool:
        return max(place.conv.kernel_size) > 1
