"""UniRepLKNet's dilated branches beside a large kernel, with scales in place of norms."""
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor

from ..errors import UserError
from ..methods import Method, Place, register_method
from ..precision import sheltered
from .base import RepLayer, kaiming_uniform_
from .fixed import BranchConv2d
from .normed import NormedRepLayer, is_foldable_pair
from .norms import fold_batch_norm
from .scaled import ScaledRepLayer

__all__ = ['Dilated', 'DilatedConv2d', 'NormedDilatedConv2d']

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


def branches_for(kernel_size: Tuple[int, int], branches: Optional[str]) -> str:
    """The branches beside a kernel of this size, which are the paper's unless they are given.

    Raises:
        UserError: If they are no branches or do not fit, or the kernel is smaller than 5x5 and none are given.
    """
    if branches is None:
        fitting = [size for size in BRANCHES if size <= min(kernel_size)]
        if not fitting:
            raise UserError(f'dilated branches need a kernel of at least 5x5, got {kernel_size}')
        branches = BRANCHES[fitting[-1]]
    for size, spread in parse_branches(branches):
        if (size - 1) * spread + 1 > min(kernel_size):
            raise UserError(f'a branch of {size}/{spread} does not fit into a kernel of {kernel_size}')
    return branches


def names_of(sizes: List[Tuple[int, int]]) -> List[str]:
    """Names of branches by size and dilation, each its own."""
    names = [f'dilated_{size}_{spread}' for size, spread in sizes]
    return [f'{name}_{names[:n].count(name) + 1}' if name in names[:n] else name for n, name in enumerate(names)]


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

    The paper has a batch norm in each branch (:class:`NormedDilatedConv2d`); here every branch ends in a scale, so that
    a step composes one kernel.

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
        self._branches = branches_for(self.kernel_size, branches)
        self._sizes = parse_branches(self._branches)
        dd: Dict[str, Any] = dict(device=device, dtype=dtype)
        entries = sum(size ** 2 for size, _ in self._sizes)
        self.taps = nn.Parameter(torch.empty(out_channels, in_channels // groups, entries, **dd))
        self.register_buffer('row_branch', torch.empty(len(self._sizes), entries, **dd), persistent=False)
        self.register_buffer(
            'positions', torch.empty(entries, self.kernel_size[0] * self.kernel_size[1], **dd), persistent=False)
        self._init_branches(('origin', *names_of(self._sizes)), bias, generator, **dd)

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


@register_notrace_module
class NormedDilatedConv2d(NormedRepLayer):
    """UniRepLKNet's dilated reparam block with the paper's batch norm in each branch.

    Arguments and errors are those of :class:`NormedRepLayer`, and ``branches`` of :class:`DilatedConv2d`.
    """

    def __init__(self, *args: Any, branches: Optional[str] = None, **kwargs: Any) -> None:
        self._branches = branches  # for what the constructor calls
        super().__init__(*args, **kwargs)

    def _own_kwargs(self) -> Dict[str, Any]:
        return dict(super()._own_kwargs(), branches=self._branches)

    def _add_side_branches(self, dd: Dict[str, Any], norm_dd: Dict[str, Any]) -> None:
        self._branches = branches_for(self.kernel_size, self._branches)
        self._sizes = parse_branches(self._branches)
        off_h, off_w = self._centre_offset()
        crops: List[nn.Module] = []
        convs: List[nn.Module] = []
        for size, spread in self._sizes:
            reach = [size // 2 * spread * dilation for dilation in self.dilation]
            pad_h, pad_w = off_h + reach[0], off_w + reach[1]
            cut_h, cut_w = min(pad_h, 0), min(pad_w, 0)
            crops.append(nn.ZeroPad2d((cut_w, cut_w, cut_h, cut_h)) if cut_h or cut_w else nn.Identity())
            own: Dict[str, Any] = dict(
                kernel_size=size,
                padding=(max(pad_h, 0), max(pad_w, 0)),
                dilation=(spread * self.dilation[0], spread * self.dilation[1]),
            )
            convs.append(BranchConv2d(**dict(self._geometry(), **own), bias=False, **dd))
        self.crops, self.side_convs = nn.ModuleList(crops), nn.ModuleList(convs)
        self.side_norms = nn.ModuleList([nn.BatchNorm2d(self.out_channels, **norm_dd) for _ in convs])

    def _side_convs(self) -> Dict[str, Any]:
        return dict(zip(names_of(self._sizes), self.side_convs))

    def _side_norms(self) -> Tuple[Any, ...]:
        return tuple(self.side_norms)

    def _fold_sides(self) -> Dict[str, Tuple[Tensor, Tensor]]:
        sides = {}
        for (name, conv), norm, (size, spread) in zip(self._side_convs().items(), self._side_norms(), self._sizes):
            taps = conv.weight.reshape(-1, 1, size, size)
            spaced = F.conv_transpose2d(taps, taps.new_ones(1, 1, 1, 1), None, spread)
            sides[name] = fold_batch_norm(spaced.reshape(*conv.weight.shape[:2], *spaced.shape[2:]), None, norm)
        return sides

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm_kxk(self.conv_kxk(x))
        side = torch.zeros_like(out)
        for cut, conv, norm in zip(self.crops, self.side_convs, self.side_norms):
            side = side + norm(conv(cut(x)))
        return self._attached(out, side)


@register_method
@dataclass(frozen=True)
class Dilated(Method):
    """Dilated branches beside depthwise kernels of 7x7 and larger, with or without a norm behind them.

    Args:
        branches: Size and dilation of each branch, such as ``'5/1,3/2,3/3'``; None for the paper's at each kernel's
            size.
        normed: Have the paper's batch norm in each branch in place of scales, where one is behind the convolution.
    """

    name = 'dilated'
    title = 'Dilated branches'
    summary = (
        'Dilated branches (UniRepLKNet, by default with scales in place of batch norms) compose each large depthwise '
        'kernel from itself and smaller dilated ones at every training step.'
    )
    paper = 'arXiv:2311.15599'
    citation = """@inproceedings{ding2024unireplknet,
  title={UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and Image
    Recognition},
  author={Ding, Xiaohan and Zhang, Yiyuan and Ge, Yixiao and Zhao, Sijie and Song, Lin and Yue, Xiangyu and Shan, Ying},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2024}
}"""
    layers = (DilatedConv2d, NormedDilatedConv2d)

    branches: Optional[str] = None
    normed: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.normed, bool):
            raise UserError(f'normed must be True or False, got {self.normed!r}')
        if self.branches is not None:
            parse_branches(self.branches)

    @property
    def takes_norm(self) -> bool:  # type: ignore[override]
        return self.normed

    @classmethod
    def of_layer(cls, layer: Any) -> 'Dilated':
        return cls(branches=layer._own_kwargs()['branches'], normed=isinstance(layer, NormedDilatedConv2d))

    def takes(self, place: Place) -> bool:
        conv = place.conv
        if self.normed and not is_foldable_pair(place):
            return False
        return conv.groups == conv.in_channels > 1 and min(conv.kernel_size) >= LARGE_KERNEL_SIZE

    def layer_for(self, place: Place) -> Tuple[Type[RepLayer], Dict[str, Any]]:
        return NormedDilatedConv2d if self.normed else DilatedConv2d, dict(branches=self.branches)
