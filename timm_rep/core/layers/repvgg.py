"""timm's RepVGG block with an attach rate."""
import copy
from typing import TYPE_CHECKING, Any, Dict, Optional, Tuple, Type, TypeVar

import torch
import torch.nn as nn
from timm.models import register_notrace_module
from timm.models.byobnet import RepVggBlock
from torch import Tensor

from .. import kernels
from ..errors import UserError
from .base import RepLayer, is_trainable
from .branches import NormedBranches
from .norms import check_batch_norm, fold_batch_norm, plain_batch_norm

__all__ = ['AnnealedRepVggBlock']

BlockT = TypeVar('BlockT', bound=RepVggBlock)


def _of_class(cls: Type[BlockT], block: RepVggBlock) -> BlockT:
    """The same parts in a block of another class, with the methods of that; the constructor would draw new parts."""
    new = cls.__new__(cls)
    state: Any = nn.Module.__getstate__(block)  # without what was compiled of it
    parts = {key: value for key, value in state.items() if not callable(getattr(cls, key, None))}
    new.__dict__.update({key: value.copy() if isinstance(value, dict) else value for key, value in parts.items()})
    return new


@register_notrace_module
class AnnealedRepVggBlock(RepVggBlock, NormedBranches):
    """timm's RepVGG block with ``kxk + attach_rate * (1x1 + identity)`` for ``kxk + 1x1 + identity``.

    At attach rate one it is timm's block to the last bit, with the same keys but for ``attach_rate`` and ``time_step``.
    The convolution of the KxK branch may be a rep layer: its side branches are then annealed with the block's, and a
    folded kernel goes into its origin branch.

    Folding and restoring go by the kept statistics, as in :class:`timm_rep.layers.NormedRepLayer`: in eval mode they
    are exact at every attach rate, in training mode batch statistics replace the kept ones.

    `RepVGG: Making VGG-style ConvNets Great Again` - https://arxiv.org/abs/2101.03697

    Args:
        block: timm's block, not yet re-parameterized; its parts become this block's.

    Raises:
        UserError: If the block is in deploy form already.
    """

    if TYPE_CHECKING:
        conv_kxk: Any
        conv_1x1: Any
        identity: Any

    def __init__(self, block: RepVggBlock) -> None:
        if block.reparam_conv is not None:
            raise UserError('a RepVGG block in deploy form has no branches to anneal')
        kxk: Any = block.conv_kxk
        allowed = set(kxk.conv.modules())
        if any(isinstance(part, RepLayer) for part in block.modules() if part not in allowed):
            raise UserError('only the KxK convolution of an annealed RepVGG block can be a rep layer')
        self.__dict__.update(vars(_of_class(RepVggBlock, block)))
        self._init_annealing(self.conv_1x1.conv.weight.device, self.conv_1x1.conv.weight.dtype)

    __jit_unused_properties__ = [
        *NormedBranches.__jit_unused_properties__, 'in_channels', 'kernel_size', 'dilation']

    @property
    def in_channels(self) -> int:
        return self.conv_kxk.conv.in_channels

    @property
    def kernel_size(self) -> Tuple[int, int]:
        return self.conv_kxk.conv.kernel_size

    @property
    def dilation(self) -> Tuple[int, int]:
        return self.conv_kxk.conv.dilation

    def forward(self, x: Tensor) -> Tensor:
        out = self._attached(self.conv_kxk(x), self.conv_1x1(x))
        if self.identity is not None:
            out = self._attached(self.drop_path(out), self.identity(x))
        return self.act(self.attn(out))

    def set_attach_rate_(self, rate: float) -> None:
        super().set_attach_rate_(rate)
        if isinstance(self.conv_kxk.conv, RepLayer):
            self.conv_kxk.conv.set_attach_rate_(rate)

    def set_exact_rate_(self, rate: float, compensate: bool) -> None:
        super().set_exact_rate_(rate, compensate)
        if isinstance(self.conv_kxk.conv, RepLayer):
            self.conv_kxk.conv.set_exact_rate_(rate, compensate)

    def _origin(self) -> Tuple[Any, Any]:
        return self.conv_kxk.conv, self.conv_kxk.bn

    def _side_convs(self) -> Dict[str, Any]:
        return dict(conv_1x1=self.conv_1x1.conv)

    def _side_norms(self) -> Tuple[nn.BatchNorm2d, ...]:
        return (self.conv_1x1.bn,) if self.identity is None else (self.conv_1x1.bn, self.identity)

    def _fold_sides(self) -> Dict[str, Tuple[Tensor, Tensor]]:
        weight = self.conv_1x1.conv.weight
        sides = dict(conv_1x1=fold_batch_norm(weight, None, self.conv_1x1.bn))
        if self.identity is not None:
            identity = kernels.grouped_identity(
                self.in_channels, self.conv_1x1.conv.groups, device=weight.device, dtype=weight.dtype)
            sides['identity'] = fold_batch_norm(identity, None, self.identity)
        return sides

    @torch.no_grad()
    def redraw_side_branches_(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw 1x1 and identity branch afresh, and the side branches of a rep layer in the KxK branch.

        Args:
            generator: Source of the draw.
        """
        super().redraw_side_branches_(generator)
        if isinstance(self.conv_kxk.conv, RepLayer):
            self.conv_kxk.conv.redraw_side_branches_(generator)

    @torch.no_grad()
    def set_side_gain_(self, gain: float) -> None:
        super().set_side_gain_(gain)
        if isinstance(self.conv_kxk.conv, RepLayer):
            self.conv_kxk.conv.set_side_gain_(gain)

    @torch.no_grad()
    def begin_time_step_(self, *args: Any, **kwargs: Any) -> None:
        super().begin_time_step_(*args, **kwargs)
        if isinstance(self.conv_kxk.conv, RepLayer):
            self.conv_kxk.conv.set_time_step_(int(self.time_step))

    def reparameterize(self) -> None:
        """Refused: timm's method knows no attach rate. Its ``reparameterize_model`` calls :meth:`fuse` instead."""
        raise UserError('AnnealedRepVggBlock cannot be re-parameterized in place; fuse() returns a block that is')

    @torch.no_grad()
    def stock_block(self) -> RepVggBlock:
        """A plain block of timm's with copies of the parts, the attach rate in the gains of its side branches.

        Returns:
            Three branches with live norms; a rep layer in the KxK branch is fused.

        Raises:
            UserError: In training mode, if the KxK branch holds a layer with norms in its branches; for a side branch
                whose norm was replaced.
        """
        block: Any = _of_class(RepVggBlock, copy.deepcopy(self))
        conv = self.conv_kxk.conv
        if isinstance(conv, RepLayer):
            block.conv_kxk.conv, norm = conv.stock_form(self.conv_kxk.bn)
            if norm is not None:
                block.conv_kxk.bn = norm
        for name in ('attach_rate', 'time_step'):
            del block._buffers[name]
        for name in ('method', '_copies', '_known'):
            vars(block).pop(name, None)
        for norm in (block.conv_1x1.bn, block.identity):
            if norm is not None:
                check_batch_norm(norm)
                norm.weight.mul_(self.attach_rate)
                norm.bias.mul_(self.attach_rate)
        return block

    def stock_form(self, behind: Optional[nn.Module]) -> Tuple[nn.Module, Optional[nn.Module]]:
        return self.stock_block(), None

    def fuse(self) -> RepVggBlock:
        """A block of timm's in deploy form, its branches folded into one convolution, for ``reparameterize_model``.

        Returns:
            A new block.

        Raises:
            UserError: In training mode.
        """
        self._refuse_training()
        block = self.stock_block()
        biases = [p for name, p in block.named_parameters() if name.endswith('bias')]
        kernels_and_gains = [p for name, p in block.named_parameters() if not name.endswith('bias')]
        trainable, bias_trainable = is_trainable(kernels_and_gains), is_trainable(biases)
        if block.identity is not None:
            block.identity = plain_batch_norm(block.identity)
        block.reparameterize()
        conv: Any = block.reparam_conv
        conv.weight.requires_grad_(trainable)
        conv.bias.requires_grad_(bias_trainable)
        return block
