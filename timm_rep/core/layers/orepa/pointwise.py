"""OREPA's Rep-1x1: a 1x1 convolution composed from a 1x1 and a sequence of two."""
from typing import Any, Dict, Hashable, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.models import register_notrace_module
from torch import Tensor

from ... import kernels
from ...composition import compose_pointwise, compose_pointwise_plain, needs_plain_formula
from ...errors import UserError
from ...precision import without_autocast
from ..annealed import OriginPart
from ..base import kaiming_uniform_
from .scaling import ScalingChoice, check_scaling

__all__ = ['OrepaPointwiseConv2d']

POINTWISE_SCALE = dict(origin=1.0, sequential=0.5)


def _compose_1x1(
        conv_1x1: Tensor,
        seq_first: Tensor,
        seq_second: Tensor,
        scale: Tensor,
        attach_rate: Tensor,
        groups: int,
) -> Tensor:
    dtype = conv_1x1.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    with without_autocast(conv_1x1):
        if dtype != compute:  # half-precision parameters
            conv_1x1, seq_first, seq_second, scale = (p.to(compute) for p in (conv_1x1, seq_first, seq_second, scale))
        plain = needs_plain_formula(conv_1x1, seq_first, seq_second, scale, attach_rate)
        compose = compose_pointwise_plain if plain else compose_pointwise
        return compose(conv_1x1, seq_first, seq_second, scale, attach_rate.to(compute), groups).to(dtype)
torch.fx.wrap('_compose_1x1')


@register_notrace_module
class OrepaPointwiseConv2d(ScalingChoice):
    """OREPA's Rep-1x1 for 1x1 convolutions, without the norm: a 1x1 beside a sequence of two 1x1.

    The smaller side of the sequence is square and starts as the identity: the first factor if ``o > i``, else the
    second. Scales start at 1 for the origin and 0.5 for the sequence; kernels are kaiming-uniform with ``a = 1``.

    Source: OREPA, Rep-1x1; initial values from the official ``blocks.py``.

    Args:
        in_channels: As of :class:`torch.nn.Conv2d`, like all up to ``padding_mode``, which is only ``'zeros'``.
        kernel_size: Only 1, so that ``dilation`` has no effect.
        scaling: As of :class:`OrepaConv2d`.
        generator: Source of the initial draw.

    Raises:
        UserError: For an unknown scaling, another kernel size, a padding mode other than zeros, or channels that the
            groups do not divide.
    """

    branch_names = tuple(POINTWISE_SCALE)

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Union[int, Tuple[int, int]] = 1,
            stride: Union[int, Tuple[int, int]] = 1,
            padding: Union[str, int, Tuple[int, int]] = 0,
            dilation: Union[int, Tuple[int, int]] = 1,
            groups: int = 1,
            bias: bool = True,
            padding_mode: str = 'zeros',
            scaling: str = 'vector',
            generator: Optional[torch.Generator] = None,
            device: Any = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device=device)
        if self.kernel_size != (1, 1):
            raise UserError(f'OrepaPointwiseConv2d is a 1x1 convolution, got kernel_size {self.kernel_size}')
        in_per_group = in_channels // groups
        inner = min(in_channels, out_channels)
        dd: Dict[str, Any] = dict(device=device, dtype=dtype)
        self.conv_1x1 = nn.Parameter(torch.empty(out_channels, in_per_group, 1, 1, **dd))
        self.seq_first = nn.Parameter(torch.empty(inner, in_per_group, 1, 1, **dd))
        self.seq_second = nn.Parameter(torch.empty(out_channels, inner // groups, 1, 1, **dd))
        self.scaling = check_scaling(scaling)
        self._add_scale(len(self.branch_names), self.scaling, dd)
        self._init_bias(bias, device, dtype)
        self.reset_parameters(generator)

    def _own_kwargs(self) -> Dict[str, Any]:
        return dict(super()._own_kwargs(), scaling=self.scaling)

    def init_non_persistent_buffers(self) -> None:
        """Fill the scale where it is a constant."""
        if self.scaling == 'none':
            dtype = torch.float64 if self.conv_1x1.dtype == torch.float64 else torch.float32
            self._fill_constant_scale(self._device_of_constant(self.scale, self.conv_1x1), dtype)

    @torch.no_grad()
    def branch_kernels(self) -> Dict[str, Tensor]:
        """The kernel that each branch adds to the sum, with its scale and the attach rate.

        Returns:
            A kernel ``(o, i/g, 1, 1)`` for each branch; they add up to :meth:`compose_weight`.
        """
        origin = self.conv_1x1 * self.scale[0].to(self.conv_1x1.dtype).view(-1, 1, 1, 1)
        return dict(origin=origin, sequential=self.compose_weight() - origin)

    def branch_gradients(self) -> Dict[str, Tensor]:
        gradients = dict(origin=self.conv_1x1.grad, sequential=self.seq_second.grad)
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}

    def origin_parameters(self) -> List[OriginPart]:
        return [(self.conv_1x1, ...), *self._scale_of_origin()]

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw all branches afresh: kaiming-uniform kernels, one identity factor, the paper's scales.

        Args:
            generator: Source of the draw.
        """
        kaiming_uniform_(self.conv_1x1, self.in_channels // self.groups, 1.0, generator)
        self._fill_scale(0, POINTWISE_SCALE['origin'])
        self._reset_annealing()
        self.redraw_side_branches_(generator)
        self._reset_bias(generator)

    @torch.no_grad()
    def redraw_side_branches_(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw the sequence of two 1x1 afresh, kernels and scale.

        Args:
            generator: Source of the draw.
        """
        square, drawn = self.seq_second, self.seq_first
        if self.out_channels > self.in_channels:
            square, drawn = drawn, square
        identity = kernels.grouped_identity(square.shape[0], self.groups, device=square.device, dtype=square.dtype)
        square.copy_(identity)
        kaiming_uniform_(drawn, drawn.shape[1], 1.0, generator)
        self._fill_scale(1, POINTWISE_SCALE['sequential'])

    @torch.no_grad()
    def clear_origin_(self) -> Tensor:
        self.conv_1x1.zero_()
        self._fill_scale(0, 1.0)
        return self.conv_1x1

    def _compose(self, channels_last: bool) -> Tensor:
        if torch.jit.is_scripting():
            return compose_pointwise_plain(
                self.conv_1x1, self.seq_first, self.seq_second, self._scales(), self.attach_rate, self.groups)
        return _compose_1x1(
            self.conv_1x1, self.seq_first, self.seq_second, self._scales(), self.attach_rate, self.groups)

    def composed_like(self) -> Hashable:
        parameters = tuple((p.shape, p.dtype, p.device) for p in (self.conv_1x1, self.seq_first))
        return (type(self), self.groups, *parameters)

    @classmethod
    def compose_side_by_side(cls, layers: Sequence[Any], channels_last: bool) -> Tensor:
        names = ('conv_1x1', 'seq_first', 'seq_second')
        conv_1x1, seq_first, seq_second, scale, rates = cls._side_by_side(layers, names)
        return _compose_1x1(conv_1x1, seq_first, seq_second, scale, rates, len(layers) * layers[0].groups)
