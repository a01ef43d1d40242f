"""OREPA's linear deep stem: a large kernel squeezed from a stack of 3x3 blocks."""
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.models import register_notrace_module
from torch import Tensor

from ... import kernels
from ...errors import UserError
from ...precision import without_autocast
from ..annealed import OriginPart
from ..base import LinearRepLayer
from .kxk import OrepaConv2d

__all__ = ['OrepaStemConv2d']


def _squeeze_stack(stack: List[Tensor], offset: Tensor) -> Tensor:
    dtype = offset.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    kernel = stack[0].to(compute)
    for following in stack[1:]:
        kernel = kernels.merge_sequential(kernel, following.to(compute))
    return (kernel + offset.to(compute)).to(dtype)


def _squeeze_stack_eager(stack: List[Tensor], offset: Tensor) -> Tensor:
    with without_autocast(offset):
        return _squeeze_stack(stack, offset)
torch.fx.wrap('_squeeze_stack_eager')


@register_notrace_module
class OrepaStemConv2d(LinearRepLayer):
    """OREPA's linear deep stem: a large kernel squeezed from a stack of 3x3 OREPA blocks, ``i -> o -> ... -> o``.

    The squeezed kernel is exactly the stack's: outputs agree wherever no border padding is touched (the stack would
    pad between its layers, the squeezed kernel pads once). The official code composes by cross-correlation, without
    the flip; :func:`timm_rep.load_official_checkpoint` accounts for it.

    A stack cannot represent every kernel, so restoring an arbitrary one needs a part beside it: ``kernel_offset``, a
    constant that is zero unless :meth:`restore_` was called; it is rounded to 6e-8 of the largest value of the stack's
    kernel in float32, which may be far larger than the restored one. Attach rate and time steps are those of the blocks
    of the stack: each has an origin and side branches of its own, and folds into itself.

    Source: OREPA, linear deep stem.

    Args:
        in_channels: As of :class:`torch.nn.Conv2d`, like all up to ``padding_mode``, which is only ``'zeros'``.
        out_channels: Output channels ``o``, also the stack's inner width.
        kernel_size: Odd and square, at least 5; 7 needs a stack of three.
        groups: Only 1.
        branches: Those of the 3x3 blocks, as of :class:`OrepaConv2d`; None for all.
        scaling: Of the 3x3 blocks, as of :class:`OrepaConv2d`.
        generator: Source of the initial draw.

    Raises:
        UserError: For a kernel that is not square, odd and at least 5x5, groups, or a padding mode other than zeros.
    """

    kernel_offset: Tensor

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Union[int, Tuple[int, int]] = 7,
            stride: Union[int, Tuple[int, int]] = 1,
            padding: Union[str, int, Tuple[int, int]] = 0,
            dilation: Union[int, Tuple[int, int]] = 1,
            groups: int = 1,
            bias: bool = True,
            padding_mode: str = 'zeros',
            branches: Optional[Sequence[str]] = None,
            scaling: str = 'vector',
            generator: Optional[torch.Generator] = None,
            device: Any = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device=device)
        height, width = self.kernel_size
        if height != width or height < 5:
            raise UserError(f'OrepaStemConv2d needs a square kernel of at least 5x5, got {self.kernel_size}')
        if groups != 1:
            raise UserError(f'OrepaStemConv2d supports groups=1, got {groups}')
        dd: Dict[str, Any] = dict(device=device, dtype=dtype)
        depth = (height - 1) // 2
        block: Dict[str, Any] = dict(bias=False, branches=branches, scaling=scaling, generator=generator, **dd)
        self.stack = nn.ModuleList([
            OrepaConv2d(in_channels if n == 0 else out_channels, out_channels, 3, **block) for n in range(depth)])
        self.register_buffer('kernel_offset', torch.zeros(self.weight_shape, **dd))
        self._init_bias(bias, device, dtype)
        self._reset_bias(generator)

    def _own_kwargs(self) -> Dict[str, Any]:
        first = next(self._blocks())
        return dict(super()._own_kwargs(), branches=first.branch_names, scaling=first.scaling)

    def _blocks(self) -> Iterator[OrepaConv2d]:
        for block in self.stack:
            assert isinstance(block, OrepaConv2d)
            yield block

    def set_attach_rate_(self, rate: float) -> None:
        """Set the factor of the side branches of all blocks.

        Args:
            rate: In [0, 1].

        Raises:
            UserError: For a rate outside [0, 1].
        """
        super().set_attach_rate_(rate)
        for block in self._blocks():
            block.set_attach_rate_(rate)

    @torch.no_grad()
    def begin_time_step_(
            self,
            generator: Optional[torch.Generator] = None,
            attach_rate: float = 0.0,
            compensate: bool = False,
            keep_gain: bool = False,
            side_gain: float = 1.0,
    ) -> None:
        self._before_writing()
        for block in self._blocks():
            block.begin_time_step_(generator, attach_rate)
        super().set_attach_rate_(attach_rate)
        self.set_time_step_(int(self.time_step) + 1)

    @torch.no_grad()
    def branch_kernels(self) -> Dict[str, Tensor]:
        """The kernels that the stack and the offset add to the sum.

        Returns:
            Kernels ``(o, i, kh, kw)`` that add up to :meth:`compose_weight`.
        """
        return dict(stack=self.compose_weight() - self.kernel_offset, offset=self.kernel_offset.clone())

    def branch_gradients(self) -> Dict[str, Tensor]:
        """Of the first block of the stack, which sees the image."""
        return next(self._blocks()).branch_gradients()

    def origin_parameters(self) -> List[OriginPart]:
        return [part for block in self._blocks() for part in block.origin_parameters()]

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw the whole stack afresh and clear the offset.

        Args:
            generator: Source of the draw.
        """
        for block in self._blocks():
            block.reset_parameters(generator)
        self.kernel_offset.zero_()
        self._reset_annealing()
        self._reset_bias(generator)

    @torch.no_grad()
    def redraw_side_branches_(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw the side branches of all blocks afresh.

        Args:
            generator: Source of the draw.
        """
        for block in self._blocks():
            block.redraw_side_branches_(generator)

    @torch.no_grad()
    def clear_origin_(self) -> Tensor:
        return self.kernel_offset.zero_()

    def _compose(self, channels_last: bool) -> Tensor:
        composed: List[Tensor] = []
        for layer in self.stack:
            composed.append(layer._compose(False))  # type: ignore[operator]
        if torch.jit.is_scripting():
            return _squeeze_stack(composed, self.kernel_offset)
        return _squeeze_stack_eager(composed, self.kernel_offset)
