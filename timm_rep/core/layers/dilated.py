"""UniRepLKNet's dilated branches beside a large kernel, with scales in place of norms."""
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.models import register_notrace_module
from torch import Tensor

from ..errors import UserError
from ..methods import Method, Place, register_method
from ..precision import sheltered
from .base import LinearRepLayer, kaiming_uniform_
from .scaled import ScaledRepLayer

__all__ = ['Dilated', 'DilatedConv2d']

# Size and dilation of the branches beside a kernel of this size (official code); larger ones have those of the last.
BRANCHES = {
    5: '3/1,3/2',
    7: '5/1,3/2,3/3',
    9: '5/1,5/2,3/3,3/4',
    11: '5/1,5/2,3/3,3/4,3/5',
    13: '5/1,7/2,3/3,3/4,3/5',
    15: '5/1,7/2,3/3,3/5,3/7',
    17: '5/1,9/2,3/4,3/5,3/7',
}
# Depthwise kernels from this size on are taken unasked.
LARGE_KERNEL_SIZE = 7
MAX_BRANCHES = 64  # a file says how many


def parse_branches(branches: Any) -> List[Tuple[int, int]]:
    """Sizes and dilations, from text like ``'5/1,3/2'``.

    Raises:
        UserError: If it is not such text, or a size is even.
    """
    parts = branches.split(',') if isinstance(branches, str) else []
    found = [tuple(part.split('/')) for part in parts]
    if not 0 < len(found) <= MAX_BRANCHES or not all(
            len(pair) == 2 and all(n.isascii() and n.isdigit() and 1 <= len(n) <= 3 and int(n) > 0 for n in pair)
            and int(pair[0]) % 2 for pair in found):
        raise UserError(
            f"branches must be odd sizes with dilations, such as '5/1,3/2,3/3', or None for the paper's; "
            f"got {branches!r}")
    return [(int(size), int(dilation)) for size, dilation in found]


def branches_for(kernel_size: Tuple[int, int]) -> str:
    """The paper's branches beside a kernel of this size.

    Raises:
        UserError: If it is smaller than 5x5.
    """
    fitting = [size for size in BRANCHES if size <= min(kernel_size)]
    if not fitting:
        raise UserError(f'dilated branches need a kernel of at least 5x5, got {kernel_size}')
    return BRANCHES[fitting[-1]]


def dilated_kernel(
        origin: Tensor,
        taps: Tensor,
        scale: Tensor,
        attach_rate: Tensor,
        row_branch: Tensor,
        positions: Tensor,
) -> Tensor:
    """A kernel with dilated ones beside it, all centred (UniRepLKNet, dilated reparam block).

    Args:
        origin: ``(o, i/g, kh, kw)``.
        taps: Those of all dilated kernels, side by side, ``(o, i/g, l)``.
        scale: Origin and dilated kernels, ``(n + 1, o)``.
        attach_rate: 0-dim, multiplies the dilated kernels.
        row_branch: Constant ``(n, l)``, one where tap ``l`` belongs to branch ``n``.
        positions: Constant ``(l, kh*kw)``, one where tap ``l`` lies in the kernel.

    Returns:
        ``(o, i/g, kh, kw)``.
    """
    gains = torch.matmul((scale[1:] * attach_rate).t(), row_branch)
    sides = torch.matmul(taps * gains.unsqueeze(1), positions)
    return origin * scale[0].reshape(-1, 1, 1, 1) + sides.reshape(origin.shape)


_dilated_kernel = sheltered(dilated_kernel)
# A symbolic trace records this call as it is.
torch.fx.wrap('_dilated_kernel')


@register_notrace_module
class DilatedConv2d(ScaledRepLayer):
    """UniRepLKNet's dilated reparam block without norms: a large kernel and smaller dilated ones, all with scales.

    `UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and Image
    Recognition` - https://arxiv.org/abs/2311.15599

    The paper has a batch norm in each branch; here every branch ends in a scale, so that a step composes one kernel.

    Args:
        in_channels: As of :class:`torch.nn.Conv2d`, like all up to ``padding_mode``, which is only ``'zeros'``.
        kernel_size: Height and width, odd, at least 5 unless the branches are given.
        branches: Size and dilation of each branch, such as ``'5/1,3/2,3/3'``; None for the paper's at the kernel's
            size, for kernels above 17x17 those of that.
        generator: Source of the initial draw.

    Raises:
        UserError: For branches that are none or larger than the kernel, an even or small kernel, a padding mode other
            than zeros, or channels that the groups do not divide.
    """

    row_branch: Tensor
    positions: Tensor

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
            branches: Optional[str] = None,
            generator: Optional[torch.Generator] = None,
            device: Any = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device=device)
        self._branches = branches_for(self.kernel_size) if branches is None else branches
        self._sizes = parse_branches(self._branches)
        for size, spread in self._sizes:
            if (size - 1) * spread + 1 > min(self.kernel_size):
                raise UserError(f'a branch of {size}/{spread} does not fit into a kernel of {self.kernel_size}')
        dd: Dict[str, Any] = dict(device=device, dtype=dtype)
        entries = sum(size ** 2 for size, _ in self._sizes)
        self.taps = nn.Parameter(torch.empty(out_channels, in_channels // groups, entries, **dd))
        self.register_buffer('row_branch', torch.empty(len(self._sizes), entries, **dd), persistent=False)
        self.register_buffer(
            'positions', torch.empty(entries, self.kernel_size[0] * self.kernel_size[1], **dd), persistent=False)
        names = [f'dilated_{size}_{spread}' for size, spread in self._sizes]
        names = [f'{name}_{names[:n].count(name) + 1}' if name in names[:n] else name for n, name in enumerate(names)]
        self._init_branches(('origin', *names), bias, generator, **dd)

    def _own_kwargs(self) -> Dict[str, Any]:
        return dict(super()._own_kwargs(), branches=self._branches)

    def init_non_persistent_buffers(self) -> None:
        """Fill the constants: of which branch each tap is, and where it lies in the kernel; float32 or float64."""
        device = self._device_of_constant(self.positions, self.taps)
        dtype = torch.float64 if self.taps.dtype == torch.float64 else torch.float32
        dd: Dict[str, Any] = dict(device=device if device.type == 'meta' else torch.device('cpu'), dtype=dtype)
        row_branch = torch.zeros(self.row_branch.shape, **dd)
        positions = torch.zeros(len(self.taps[0, 0]), *self.kernel_size, **dd)
        start = 0
        for row, (size, spread) in enumerate(self._sizes):
            row_branch[row, start:start + size ** 2] = 1
            first = [extent // 2 - size // 2 * spread for extent in self.kernel_size]
            for tap in range(size ** 2):
                h, w = first[0] + tap // size * spread, first[1] + tap % size * spread
                positions[start + tap, h, w] = 1
            start += size ** 2
        self.row_branch = row_branch.to(device)
        self.positions = positions.flatten(1).to(device)

    def _parts(self, tensor: Tensor) -> Dict[str, Tensor]:
        parts = tensor.split([size ** 2 for size, _ in self._sizes], dim=2)
        return {
            name: part.unflatten(2, (size, size))
            for name, part, (size, _) in zip(self.branch_names[1:], parts, self._sizes)}

    def branch_views(self) -> Dict[str, Tensor]:
        """The kernels of the branches by name, ``(o, i/g, h, w)`` without their dilation, as views."""
        return dict(origin=self.origin, **self._parts(self.taps))

    def _draw_sides(self, generator: Optional[torch.Generator]) -> None:
        for part in self._parts(self.taps).values():
            kaiming_uniform_(part, part[0].numel(), generator=generator)

    def _side_gradients(self) -> Dict[str, Optional[Tensor]]:
        return {} if self.taps.grad is None else {**self._parts(self.taps.grad)}

    def _composed(self, scale: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return dilated_kernel(
                self.origin, self.taps, scale, self.attach_rate.to(scale.dtype), self.row_branch, self.positions)
        return _dilated_kernel(self.origin, self.taps, scale, self.attach_rate, self.row_branch, self.positions)


@register_method
@dataclass(frozen=True)
class Dilated(Method):
    """Dilated branches beside depthwise kernels of 7x7 and larger, with or without a norm behind them.

    Args:
        branches: Size and dilation of each branch, such as ``'5/1,3/2,3/3'``; None for the paper's at each kernel's
            size.
    """

    name = 'dilated'
    title = 'Dilated branches'
    summary = (
        'Dilated branches (UniRepLKNet, here with scales in place of batch norms) compose each large depthwise kernel '
        'from itself and smaller dilated ones at every training step.'
    )
    paper = 'arXiv:2311.15599'
    citation = """@inproceedings{ding2024unireplknet,
  title={UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and Image
    Recognition},
  author={Ding, Xiaohan and Zhang, Yiyuan and Ge, Yixiao and Zhao, Sijie and Song, Lin and Yue, Xiangyu and Shan, Ying},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2024}
}"""
    layers = (DilatedConv2d,)

    branches: Optional[str] = None

    def __post_init__(self) -> None:
        if self.branches is not None:
            parse_branches(self.branches)

    @classmethod
    def of_layer(cls, layer: Any) -> 'Dilated':
        return cls(branches=layer._own_kwargs()['branches'])

    def takes(self, place: Place) -> bool:
        conv = place.conv
        return conv.groups == conv.in_channels > 1 and min(conv.kernel_size) >= LARGE_KERNEL_SIZE

    def layer_for(self, place: Place) -> Tuple[Type[LinearRepLayer], Dict[str, Any]]:
        return DilatedConv2d, dict(branches=self.branches)
