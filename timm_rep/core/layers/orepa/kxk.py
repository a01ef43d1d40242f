"""OREPA block for a KxK convolution: six linear branches composed into one kernel."""
from typing import Any, Dict, Hashable, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.models import register_notrace_module
from torch import Tensor

from ... import kernels
from ...composition import compose_orepa, compose_orepa_plain, needs_plain_formula, spread_scale
from ...errors import UserError
from ...precision import full_float32, without_autocast
from ..annealed import OriginPart
from ..base import kaiming_uniform_
from .scaling import ScalingChoice, check_scaling

__all__ = ['BRANCHES', 'OrepaConv2d', 'ordered_branches']

# Initial scales of the branches (official code, blocks.py).
KXK_SCALE = dict(origin=0.25, average=0.25, prior=0.0, conv_1x1=1.0, separable=0.5, sequential=0.5)
BRANCHES = tuple(KXK_SCALE)
# Depthwise filters of the separable branch per input channel (official code).
SEPARABLE_EXPANSION = 8
# Convolutions with more groups than this get twice the inner channels in the 1x1-KxK branch (official code).
MAX_GROUPS_SINGLE_WIDTH = 4


def ordered_branches(branches: Any) -> Tuple[str, ...]:
    """Names of branches in the order that layers have them in.

    Args:
        branches: Names, in any order, the origin's among them.

    Raises:
        UserError: For other names, or none besides the origin's.
    """
    names = list(branches) if isinstance(branches, (list, tuple)) else [branches]
    found = tuple(name for name in BRANCHES if name in names)
    if len(found) != len(names) or len(found) < 2 or 'origin' not in found:
        raise UserError(
            f"branches must be 'origin' and at least one more of {', '.join(map(repr, BRANCHES[1:]))}, each once; "
            f'got {branches!r}')
    return found


def _compose_kxk(
        branches: Tensor,
        seq_1x1: Tensor,
        dw_conv: Tensor,
        scale: Tensor,
        attach_rate: Tensor,
        row_branch: Tensor,
        filters: Tensor,
        groups: int,
        channels_last: bool,
) -> Tensor:
    dtype = branches.dtype
    with without_autocast(branches):
        if dtype != filters.dtype:  # half-precision parameters
            branches, seq_1x1, dw_conv, scale = (p.to(filters.dtype) for p in (branches, seq_1x1, dw_conv, scale))
        gains = spread_scale(scale, attach_rate.to(filters.dtype), row_branch)
        if needs_plain_formula(branches, seq_1x1, dw_conv, gains):
            kernel = compose_orepa_plain(branches, gains, seq_1x1, dw_conv, filters, groups)
        else:
            kernel = compose_orepa(branches, gains, seq_1x1, dw_conv, filters, groups, channels_last)
        return kernel.to(dtype)


# A symbolic trace records these calls as they are.
torch.fx.wrap('_compose_kxk')


@register_notrace_module
class OrepaConv2d(ScalingChoice):
    """OREPA block for a KxK convolution, without the norm: six linear branches composed into one kernel.

    =============  ==========================================  =============  =====
    branch         parameters                                  kernel         scale
    =============  ==========================================  =============  =====
    origin         ``(o, i/g, kh, kw)``                        itself         0.25
    average        1x1 ``(o, i/g)``                            1 / (kh*kw)    0.25
    prior          1x1 ``(o, i/g)``                            cosine of o    0
    conv_1x1       1x1 ``(o, i/g)``                            centre tap     1
    separable      ``(o, e*i/g)`` on depthwise ``(e*i, 1)``    their product  0.5
    sequential     ``(o, t/g, kh, kw)`` on 1x1 ``(t, i/g)``    their product  0.5
    =============  ==========================================  =============  =====

    The parameters of one input-output pair lie together in ``branches`` (see :mod:`timm_rep.composition`);
    :meth:`branch_views` gives them by name. Kernels start kaiming-uniform; the inner 1x1 is identity plus a learnt
    residual that starts at zero. The block needs a batch norm behind it (OREPA Section 3.4).

    Source: OREPA Section 3; initial values from the official ``blocks.py``.

    Args:
        in_channels: As of :class:`torch.nn.Conv2d`, like all up to ``padding_mode``, which is only ``'zeros'``.
        kernel_size: Height and width, odd, not both one.
        groups: Number of groups ``g``; more than 4 double the inner channels ``t`` of the sequential branch.
        branch_1x1: Have the conv_1x1 branch; RepVGG, which has one of its own, does without.
        branches: Names of all branches, as in the table; None for all, but for what ``branch_1x1`` says.
        scaling: ``'vector'`` over output channels; one ``'scalar'`` for each branch; or ``'none'``, branches as they
            are (OREPA Table 3).
        negative_slope: ``a`` of the kaiming-uniform draw; 1 in OREPA-RepVGG.
        generator: Source of the initial draw.

    Raises:
        UserError: For unknown branches or scaling, an even or 1x1 kernel, a padding mode other than zeros, or channels
            that the groups do not divide.
    """

    seq_1x1: Tensor
    dw_conv: Tensor
    row_branch: Tensor
    filters: Tensor

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
            branch_1x1: bool = True,
            negative_slope: float = 0.0,
            branches: Optional[Sequence[str]] = None,
            scaling: str = 'vector',
            generator: Optional[torch.Generator] = None,
            device: Any = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device=device)
        if self.kernel_size == (1, 1):
            raise UserError('OrepaConv2d needs a kernel larger than 1x1; use OrepaPointwiseConv2d for 1x1')
        names = [name for name in BRANCHES if branch_1x1 or name != 'conv_1x1']
        self.branch_names: Tuple[str, ...] = ordered_branches(names if branches is None else branches)
        self.scaling = check_scaling(scaling)
        self.negative_slope = negative_slope
        in_per_group = in_channels // groups
        taps = self.kernel_size[0] * self.kernel_size[1]
        inner_ratio = 1 if groups <= MAX_GROUPS_SINGLE_WIDTH else 2
        entries = dict(origin=taps, separable=SEPARABLE_EXPANSION, sequential=inner_ratio * taps)
        self._entries: Dict[str, int] = {n: entries.get(n, 1) for n in self.branch_names}  # columns of `branches`

        dd: Dict[str, Any] = dict(device=device, dtype=dtype)
        self.branches = nn.Parameter(torch.empty(out_channels, in_per_group, sum(self._entries.values()), **dd))
        self._add_factor('seq_1x1', 'sequential', inner_ratio * in_channels, (in_per_group, 1, 1), dd)
        self._add_factor('dw_conv', 'separable', SEPARABLE_EXPANSION * in_channels, (1, *self.kernel_size), dd)
        self._add_scale(len(self.branch_names), self.scaling, dd)
        self._init_bias(bias, device, dtype)
        self.register_buffer('row_branch', torch.empty(
            2, len(self.branch_names), self.branches.shape[2], **dd), persistent=False)
        self.register_buffer('filters', torch.empty(out_channels, self.branches.shape[2], taps, **dd), persistent=False)
        self.init_non_persistent_buffers()
        self.reset_parameters(generator)

    def _add_factor(self, name: str, branch: str, channels: int, shape: Tuple[int, ...], dd: Dict[str, Any]) -> None:
        """Make a factor of a branch, an empty constant if there is no such branch."""
        if branch in self.branch_names:
            self.register_parameter(name, nn.Parameter(torch.empty(channels, *shape, **dd)))
        else:
            self.register_buffer(name, torch.empty(0, *shape, **dd), persistent=False)

    def _own_kwargs(self) -> Dict[str, Any]:
        return dict(
            super()._own_kwargs(),
            branches=self.branch_names,
            scaling=self.scaling,
            negative_slope=self.negative_slope,
        )

    def _parts(self, tensor: Tensor) -> Dict[str, Tensor]:
        """Views ``(o, i/g, entries)`` of a tensor with the shape of ``branches``, by the branches' names."""
        return dict(zip(self.branch_names, tensor.split(list(self._entries.values()), dim=2)))

    def branch_views(self) -> Dict[str, Tensor]:
        """The parts of ``branches`` by name, as views that share its memory.

        Returns:
            ``origin (o, i/g, kh, kw)``, ``average``, ``prior`` and ``conv_1x1 (o, i/g)``,
            ``separable (o, i/g, e)``, ``sequential (o, i/g, m, kh, kw)`` with ``t = m * i``; those that there are.
        """
        parts = self._parts(self.branches)
        views = {name: part.squeeze(2) for name, part in parts.items()}
        views['origin'] = parts['origin'].unflatten(2, self.kernel_size)
        if 'sequential' in parts:
            views['sequential'] = parts['sequential'].unflatten(2, (-1, *self.kernel_size))
        return views

    @torch.no_grad()
    def branch_kernels(self) -> Dict[str, Tensor]:
        """The kernel that each branch adds to the sum, with its scale and the attach rate.

        Returns:
            A kernel ``(o, i/g, kh, kw)`` for each branch; they add up to :meth:`compose_weight`.
        """
        dtype = self.filters.dtype
        branches, seq_1x1, dw_conv = (p.to(dtype) for p in (self.branches, self.seq_1x1, self.dw_conv))
        kernels_of: Dict[str, Tensor] = {}
        with without_autocast(branches), full_float32():
            gains = spread_scale(self._scales().to(dtype), self.attach_rate.to(dtype), self.row_branch)
            start = 0
            for name, entries in self._entries.items():
                only = torch.zeros_like(gains)
                only[:, start:start + entries] = gains[:, start:start + entries]
                start += entries
                kernels_of[name] = compose_orepa_plain(branches, only, seq_1x1, dw_conv, self.filters, self.groups)
        return kernels_of

    def branch_gradients(self) -> Dict[str, Tensor]:
        return {} if self.branches.grad is None else self._parts(self.branches.grad)

    def origin_parameters(self) -> List[OriginPart]:
        return [(self.branches, (..., slice(self._entries['origin']))), *self._scale_of_origin()]

    def init_non_persistent_buffers(self) -> None:
        """Compute the constants: which branch and spatial filter each entry has; float32 or float64."""
        device = self._device_of_constant(self.filters, self.branches)
        dtype = torch.float64 if self.branches.dtype == torch.float64 else torch.float32
        self._fill_constant_scale(device, dtype)
        for name, factor in dict(seq_1x1=self.seq_1x1, dw_conv=self.dw_conv).items():
            if name in self._buffers:
                setattr(self, name, torch.empty(factor.shape, device=device, dtype=dtype))
        if device.type == 'meta':
            self.row_branch = torch.empty_like(self.row_branch, dtype=dtype, device=device)
            self.filters = torch.empty_like(self.filters, dtype=dtype, device=device)
            return
        # On the CPU in float64, whatever default device or dtype is in force.
        dd: Dict[str, Any] = dict(device=torch.device('cpu'), dtype=torch.float64)
        height, width = self.kernel_size
        size = (height, width)
        taps = height * width
        fixed_filters = dict(
            average=kernels.average_kernel(size, **dd).expand(self.out_channels, -1, -1, -1),
            prior=kernels.frequency_prior(self.out_channels, size, **dd),
            conv_1x1=kernels.grouped_identity(self.out_channels, self.out_channels, size, **dd),
        )
        rows = [torch.eye(taps, **dd).expand(self.out_channels, taps, taps)]
        rows += [f.reshape(-1, 1, taps) for name, f in fixed_filters.items() if name in self.branch_names]
        rows += [rows[0].new_zeros(self.out_channels, self._entries.get('separable', 0), taps)]
        rows += [rows[0]] * (self._entries.get('sequential', 0) // taps)
        units = torch.eye(len(self._entries), **dd)
        one_hot = torch.cat([
            unit[:, None].expand(-1, entries) for unit, entries in zip(units, self._entries.values())], dim=1)
        origin = one_hot.clone()
        origin[1:] = 0
        self.row_branch = torch.stack([origin, one_hot - origin]).to(device=device, dtype=dtype)
        self.filters = torch.cat(rows, dim=1).to(device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw all branches afresh: kaiming-uniform kernels, the paper's scales.

        Args:
            generator: Source of the draw.
        """
        fan_in = self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]
        kaiming_uniform_(self.branch_views()['origin'], fan_in, self.negative_slope, generator)
        self._fill_scale(0, KXK_SCALE['origin'])
        self._reset_annealing()
        self.redraw_side_branches_(generator)
        self._reset_bias(generator)

    @torch.no_grad()
    def redraw_side_branches_(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw all branches but the origin afresh, kernels and scales.

        Args:
            generator: Source of the draw.
        """
        in_per_group = self.in_channels // self.groups
        taps = self.kernel_size[0] * self.kernel_size[1]
        views = self.branch_views()
        fan_in = dict(
            average=in_per_group,
            prior=in_per_group,
            conv_1x1=in_per_group,
            separable=in_per_group * SEPARABLE_EXPANSION,
            sequential=self.seq_1x1.shape[0] // self.groups * taps,
        )
        for row, name in enumerate(self.branch_names):
            if name != 'origin':
                kaiming_uniform_(views[name], fan_in[name], self.negative_slope, generator)
                self._fill_scale(row, KXK_SCALE[name])
        kaiming_uniform_(self.dw_conv, taps, self.negative_slope, generator)
        self.seq_1x1.zero_()

    @torch.no_grad()
    def clear_origin_(self) -> Tensor:
        origin = self.branch_views()['origin']
        origin.zero_()
        self._fill_scale(0, 1.0)
        return origin

    def _compose(self, channels_last: bool) -> Tensor:
        if torch.jit.is_scripting():
            scale = self._scales()
            gains = spread_scale(scale, self.attach_rate.to(scale.dtype), self.row_branch)
            return compose_orepa_plain(
                self.branches, gains, self.seq_1x1, self.dw_conv, self.filters, self.groups)
        return _compose_kxk(
            self.branches,
            self.seq_1x1,
            self.dw_conv,
            self._scales(),
            self.attach_rate,
            self.row_branch,
            self.filters,
            self.groups,
            channels_last,
        )

    def composed_like(self) -> Hashable:
        parameters = tuple((p.shape, p.dtype, p.device) for p in (self.branches, self.seq_1x1, self.dw_conv))
        return (type(self), self.branch_names, self.groups, *parameters)

    @classmethod
    def compose_side_by_side(cls, layers: Sequence[Any], channels_last: bool) -> Tensor:
        first, count = layers[0], len(layers)
        branches, seq_1x1, dw_conv, scale, rates = cls._side_by_side(layers, ('branches', 'seq_1x1', 'dw_conv'))
        filters = first.filters.repeat(count, 1, 1)
        return _compose_kxk(
            branches, seq_1x1, dw_conv, scale, rates, first.row_branch, filters, count * first.groups, channels_last)
