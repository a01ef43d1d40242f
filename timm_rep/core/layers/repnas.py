"""RepNAS: DBB's branches with a learnt importance each, of which the weak ones are cut; here linear."""
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Type, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor

from .. import kernels
from ..errors import UserError
from ..methods import Method, Place, register_method
from ..precision import full_float32, sheltered
from .annealed import OriginPart
from .base import LinearRepLayer, kaiming_uniform_

__all__ = ['RepNas', 'RepNasConv2d']

BRANCHES = ('origin', 'average', 'conv_1x1', 'sequential')
# Of every side branch at first.
IMPORTANCE = 0.5


def ordered_branches(branches: Any) -> Tuple[str, ...]:
    """Names of branches, in any order or as one text with commas, in the order that layers have them in.

    Raises:
        UserError: For other names, or if the origin is missing.
    """
    given = branches.split(',') if isinstance(branches, str) else branches
    names = list(given) if isinstance(given, (list, tuple)) else [given]
    found = tuple(name for name in BRANCHES if name in names)
    if len(found) != len(names) or 'origin' not in found:
        raise UserError(
            f"branches must be 'origin' and any of {', '.join(map(repr, BRANCHES[1:]))}, each once; got {branches!r}")
    return found


def unit_kernel(kernel: Tensor) -> Tensor:
    """A kernel ``(o, i/g, kh, kw)`` with the expected norm of a kaiming-uniform one for every output: root of two."""
    return kernel * torch.rsqrt(kernel.square().sum([1, 2, 3], keepdim=True) / 2 + 1e-12)


def weighed_kernel(
        origin: Tensor,
        importance: Tensor,
        attach_rate: Tensor,
        groups: int,
        average: Optional[Tensor],
        conv_1x1: Optional[Tensor],
        seq_1x1: Optional[Tensor],
        seq_kxk: Optional[Tensor],
) -> Tensor:
    """A kernel and those of DBB's branches, all of unit norm, times their importances.

    Args:
        origin: ``(o, i/g, kh, kw)``.
        importance: Of the side branches that there are, in this order, ``(n,)``.
        attach_rate: 0-dim, multiplies all but the origin.
        groups: Number of groups ``g``.
        average: 1x1 before an average pooling, ``(o, i/g, 1, 1)``.
        conv_1x1: ``(o, i/g, 1, 1)``.
        seq_1x1: Learnt residual of the 1x1 of the 1x1-KxK, ``(i, i/g, 1, 1)``; the identity is added to it.
        seq_kxk: ``(o, i/g, kh, kw)``.

    Returns:
        ``(o, i/g, kh, kw)``.
    """
    kernel = origin.clone()  # without side branches it would be the parameter itself
    gains = importance * attach_rate
    row = 0
    if average is not None:
        kernel = kernel + gains[row] * unit_kernel(average.expand_as(origin))
        row += 1
    if conv_1x1 is not None:
        pad_h, pad_w = origin.shape[2] // 2, origin.shape[3] // 2
        kernel = kernel + gains[row] * F.pad(unit_kernel(conv_1x1), [pad_w, pad_w, pad_h, pad_h])
        row += 1
    if seq_1x1 is not None and seq_kxk is not None:
        sequence = seq_kxk + kernels.merge_sequential(seq_1x1, seq_kxk, groups)
        kernel = kernel + gains[row] * unit_kernel(sequence)
    return kernel


_weighed_kernel = sheltered(weighed_kernel)
# A symbolic trace records this call as it is.
torch.fx.wrap('_weighed_kernel')


@register_notrace_module
class RepNasConv2d(LinearRepLayer):
    """RepNAS's block, linear: DBB's branches beside a kernel, each of unit norm times a learnt importance.

    In the paper a batch norm in each branch makes the branches comparable; here the norm of their kernels does, so that
    a step composes one kernel, and :meth:`cut_branches_` keeps the function exactly.

    `RepNAS: Searching for Efficient Re-parameterizing Blocks` - https://arxiv.org/abs/2109.03508

    Args:
        in_channels: As of :class:`torch.nn.Conv2d`, like all up to ``padding_mode``, which is only ``'zeros'``.
        kernel_size: Height and width, odd, not both one.
        branches: ``'origin'`` and any of ``'average'``, ``'conv_1x1'`` and ``'sequential'`` (1x1-KxK).
        generator: Source of the initial draw.

    Raises:
        UserError: For unknown branches, an even or 1x1 kernel, a padding mode other than zeros, or channels that the
            groups do not divide.
    """

    average: Optional[nn.Parameter]
    conv_1x1: Optional[nn.Parameter]
    seq_1x1: Optional[nn.Parameter]
    seq_kxk: Optional[nn.Parameter]
    importance: Tensor

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
            branches: Sequence[str] = BRANCHES,
            generator: Optional[torch.Generator] = None,
            device: Any = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device=device)
        if self.kernel_size == (1, 1):
            raise UserError('RepNasConv2d needs a kernel larger than 1x1')
        self.branch_names: Tuple[str, ...] = ordered_branches(branches)
        dd: Dict[str, Any] = dict(device=device, dtype=dtype)
        out_in = self.weight_shape[:2]
        shapes = dict(
            average=(*out_in, 1, 1),
            conv_1x1=(*out_in, 1, 1),
            seq_1x1=(in_channels, out_in[1], 1, 1),
            seq_kxk=self.weight_shape,
        )
        self.origin = nn.Parameter(torch.empty(self.weight_shape, **dd))
        for name, shape in shapes.items():
            there = (name if name in BRANCHES else 'sequential') in self.branch_names
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **dd)) if there else None)
        self._set_importance(torch.empty(len(self.branch_names) - 1, **dd))
        self._init_bias(bias, device, dtype)
        self.reset_parameters(generator)

    def _set_importance(self, values: Tensor) -> None:
        """In one dimension: timm decays no vectors. Without side branches there is none that is trained."""
        self._parameters.pop('importance', None)
        if len(values):
            self.register_parameter('importance', nn.Parameter(values))
        else:
            self.register_buffer('importance', values, persistent=False)

    def init_non_persistent_buffers(self) -> None:
        if 'importance' in self._buffers:
            device = self._device_of_constant(self.importance, self.origin)
            self.importance = torch.empty(0, device=device, dtype=self.origin.dtype)

    def _own_kwargs(self) -> Dict[str, Any]:
        return dict(super()._own_kwargs(), branches=self.branch_names)

    def importances(self) -> Dict[str, float]:
        """Size of the importance of each side branch, by name."""
        return dict(zip(self.branch_names[1:], self.importance.detach().abs().tolist()))

    @torch.no_grad()
    def cut_branches_(self, names: Iterable[str]) -> None:
        """Take side branches out; what they add at the attach rate in force goes into the origin.

        The parameters that stay are the same ones, but for the importances.

        Args:
            names: Names of side branches.

        Raises:
            UserError: For a name that is none of them.
        """
        cut = set(names)
        if not cut <= set(self.branch_names[1:]):
            raise UserError(f'side branches to cut must be some of {self.branch_names[1:]}, got {sorted(cut)}')
        if not cut:
            return
        self._before_writing()
        kernel, trained = self.compose_weight(), self.importance.requires_grad
        stay = [name not in cut for name in self.branch_names[1:]]
        values = self.importance[torch.tensor(stay, device=self.importance.device)].clone()
        self.branch_names = tuple(name for name in self.branch_names if name not in cut)
        for name in ('average', 'conv_1x1', 'seq_1x1', 'seq_kxk'):
            if (name if name in BRANCHES else 'sequential') in cut:
                setattr(self, name, None)
        self._set_importance(values)
        self.importance.requires_grad_(trained and len(values) > 0)
        for _ in range(2):  # the second pass takes up the rounding of the first
            self.origin.add_(kernel - self.compose_weight())

    @torch.no_grad()
    def branch_kernels(self) -> Dict[str, Tensor]:
        """The kernel that each branch adds to the sum, with its importance and the attach rate.

        Returns:
            A kernel ``(o, i/g, kh, kw)`` for each branch; they add up to :meth:`compose_weight`.
        """
        found = dict(origin=self.origin.clone())
        with full_float32():
            for row, name in enumerate(self.branch_names[1:]):
                only = torch.zeros_like(self.importance)
                only[row] = self.importance[row]
                found[name] = self._composed(torch.zeros_like(self.origin), only)
        return found

    def branch_gradients(self) -> Dict[str, Tensor]:
        named = {name: getattr(self, 'seq_kxk' if name == 'sequential' else name) for name in self.branch_names}
        return {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}

    def origin_parameters(self) -> List[OriginPart]:
        return [(self.origin, ...)]

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw all branches afresh: kaiming-uniform kernels, all side branches of the same importance.

        Args:
            generator: Source of the draw.
        """
        kaiming_uniform_(self.origin, self.origin[0].numel(), generator=generator)
        self._reset_annealing()
        self.redraw_side_branches_(generator)
        self._reset_bias(generator)

    @torch.no_grad()
    def redraw_side_branches_(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw all branches but the origin afresh, kernels and importances.

        Args:
            generator: Source of the draw.
        """
        for kernel in (self.average, self.conv_1x1, self.seq_kxk):
            if kernel is not None:
                kaiming_uniform_(kernel, kernel[0].numel(), generator=generator)
        if self.seq_1x1 is not None:
            self.seq_1x1.zero_()
        self.importance.fill_(IMPORTANCE)

    @torch.no_grad()
    def clear_origin_(self) -> Tensor:
        return self.origin.zero_()

    def _composed(self, origin: Tensor, importance: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return weighed_kernel(
                origin, importance, self.attach_rate.to(origin.dtype), self.groups, self.average, self.conv_1x1,
                self.seq_1x1, self.seq_kxk)
        return _weighed_kernel(
            origin, importance, self.attach_rate, self.groups, self.average, self.conv_1x1, self.seq_1x1, self.seq_kxk)

    def _compose(self, channels_last: bool) -> Tensor:
        return self._composed(self.origin, self.importance)


@register_method
@dataclass(frozen=True)
class RepNas(Method):
    """RepNAS's weighed branches for all KxK convolutions, with or without a norm behind them.

    :func:`timm_rep.prune_branches` cuts those of least importance.

    Args:
        branches: Names of the branches, ``'origin'`` and others of :class:`RepNasConv2d`; kept as one text with commas
            between them, which may be given as well. None for all.
    """

    name = 'repnas'
    title = 'RepNAS'
    summary = (
        "RepNAS composes the kernel of each KxK convolution from a plain one and DBB's branches, each with a learnt "
        'importance, by which branches are cut while training.'
    )
    paper = 'arXiv:2109.03508'
    citation = """@article{zhang2021repnas,
  title={RepNAS: Searching for Efficient Re-parameterizing Blocks},
  author={Zhang, Mingyang and Yu, Xinyi and Rong, Jingtao and Ou, Linlin and Gao, Feng},
  journal={arXiv preprint arXiv:2109.03508},
  year={2021}
}"""
    layers = (RepNasConv2d,)

    branches: Union[str, Sequence[str], None] = None

    def __post_init__(self) -> None:
        names = BRANCHES if self.branches is None else ordered_branches(self.branches)
        object.__setattr__(self, 'branches', None if names == BRANCHES else ','.join(names))

    @classmethod
    def of_layer(cls, layer: Any) -> 'RepNas':
        return cls(branches=layer.branch_names)

    def takes(self, place: Place) -> bool:
        return max(place.conv.kernel_size) > 1

    def layer_for(self, place: Place) -> Tuple[Type[LinearRepLayer], Dict[str, Any]]:
        return RepNasConv2d, dict(branches=BRANCHES if self.branches is None else ordered_branches(self.branches))
