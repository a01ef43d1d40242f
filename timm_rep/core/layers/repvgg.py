"""timm's RepVGG block with an attach rate."""
import copy
from typing import TYPE_CHECKING, Any, Dict, Optional, Tuple, Type, TypeVar

import torch
from timm.models.byobnet import RepVggBlock
from torch import Tensor

from .. import kernels
from ..errors import UserError
from ..precision import without_autocast
from .base import AnnealedModule, RepLayer
from .normed import NormedRepLayer, fold_batch_norm, kept_statistics, redraw_branch_

__all__ = ['AnnealedRepVggBlock']

BlockT = TypeVar('BlockT', bound=RepVggBlock)


def _of_class(cls: Type[BlockT], block: RepVggBlock) -> BlockT:
    """The same parts in a block of another class; the constructor of timm's would draw new ones."""
    new = cls.__new__(cls)
    new.__dict__.update({key: value.copy() if isinstance(value, dict) else value for key, value in vars(block).items()})
    return new


def _inner_names(branches: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Tell the side branches of the layer in the KxK branch from those of the block."""
    return {name if name == 'origin' else f'kxk_{name}': value for name, value in branches.items()}


class AnnealedRepVggBlock(RepVggBlock, AnnealedModule):
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
        self.__dict__.update(vars(_of_class(RepVggBlock, block)))
        self._init_annealing(self.conv_1x1.conv.weight.device)

    __jit_unused_properties__ = ['in_channels', 'kernel_size', 'dilation']

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
        rate = self.attach_rate.to(x.dtype)
        out = self.conv_kxk(x) + rate * self.conv_1x1(x)
        if self.identity is not None:
            out = self.drop_path(out)
            out = out + rate * self.identity(x)
        return self.act(self.attn(out))

    def set_attach_rate_(self, rate: float) -> None:
        super().set_attach_rate_(rate)
        if isinstance(self.conv_kxk.conv, RepLayer):
            self.conv_kxk.conv.set_attach_rate_(rate)

    def set_restoring_rate_(self, rate: float, compensate: bool) -> None:
        super().set_restoring_rate_(rate, compensate)
        if isinstance(self.conv_kxk.conv, RepLayer):
            self.conv_kxk.conv.set_restoring_rate_(rate, compensate)

    def _fold_kxk(self) -> Tuple[Tensor, Tensor]:
        conv = self.conv_kxk.conv
        if isinstance(conv, NormedRepLayer):  # has the norm in it
            return conv.compose_weight_bias()
        return fold_batch_norm(conv.weight, None, self.conv_kxk.bn)

    def _fold_sides(self) -> Dict[str, Tuple[Tensor, Tensor]]:
        weight = self.conv_1x1.conv.weight
        sides = dict(conv_1x1=fold_batch_norm(weight, None, self.conv_1x1.bn))
        if self.identity is not None:
            identity = kernels.grouped_identity(
                self.in_channels, self.conv_1x1.conv.groups, device=weight.device, dtype=weight.dtype)
            sides['identity'] = fold_batch_norm(identity, None, self.identity)
        return sides

    def _side_kernel_bias(self) -> Tuple[Tensor, Tensor]:
        sides = list(self._fold_sides().values())
        height, width = self.kernel_size
        kernel = kernels.pad_to_size(kernels.merge_parallel([kernel for kernel, _ in sides]), (height, width))
        return kernel, torch.stack([bias for _, bias in sides]).sum(0)

    def compose_weight_bias(self) -> Tuple[Tensor, Tensor]:
        """Kernel and bias of the block's one convolution, before attention and activation, by the kept statistics.

        Returns:
            Kernel ``(o, i/g, kh, kw)`` and bias ``(o,)``, in the parameters' dtype.
        """
        dtype = self.conv_1x1.conv.weight.dtype
        with without_autocast(self.conv_1x1.conv.weight):
            kernel, bias = self._fold_kxk()
            side_kernel, side_bias = self._side_kernel_bias()
            kernel, bias = kernel + self.attach_rate * side_kernel, bias + self.attach_rate * side_bias
        return kernel.to(dtype), bias.to(dtype)

    @torch.no_grad()
    def restore_(self, weight: Tensor, bias: Optional[Tensor] = None) -> None:
        """Make the block's one convolution exactly this in eval mode, whatever the side branches hold.

        The norm of the KxK branch keeps its running statistics.

        Args:
            weight: Kernel ``(o, i/g, kh, kw)``.
            bias: ``(o,)``, or None for zeros.

        Raises:
            UserError: For another shape. The block is then unchanged.
        """
        conv, norm = self.conv_kxk.conv, self.conv_kxk.bn
        side_kernel, side_bias = self._side_kernel_bias()
        if weight.shape != side_kernel.shape:
            raise UserError(f'the block takes a kernel of shape {tuple(side_kernel.shape)}, got {tuple(weight.shape)}')
        if bias is not None and bias.shape != side_bias.shape:
            raise UserError(f'bias must have shape {tuple(side_bias.shape)}, got {tuple(bias.shape)}')
        kernel = weight.to(side_kernel) - self.attach_rate * side_kernel
        bias = (0.0 if bias is None else bias.to(side_bias)) - self.attach_rate * side_bias
        if isinstance(conv, NormedRepLayer):
            conv.restore_(kernel, bias)
            return
        kernel, gamma, beta = kernels.unfold_norm(kernel, bias, *kept_statistics(norm), norm.eps)
        if isinstance(conv, RepLayer):
            conv.restore_(kernel)
        else:
            conv.weight.copy_(kernel)
        norm.weight.copy_(gamma)
        norm.bias.copy_(beta)

    @torch.no_grad()
    def imply_statistics_(self) -> None:
        conv = self.conv_kxk.conv
        bias = self.compose_weight_bias()[1]
        if isinstance(conv, NormedRepLayer):
            norm = conv.norm_kxk
            mean, var = conv._implied_statistics(bias)
        else:
            norm = self.conv_kxk.bn
            mean, var = norm.bias - bias, norm.weight.square()
        for side in (self.conv_1x1.bn, self.identity):
            if side is not None:
                mean = mean + self.attach_rate * side.bias
                var = var + (self.attach_rate * side.weight).square()
        running_mean, running_var = kept_statistics(norm)
        running_mean.copy_(mean)
        running_var.copy_(var)

    @torch.no_grad()
    def redraw_side_branches_(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw 1x1 and identity branch afresh, and the side branches of a rep layer in the KxK branch.

        Args:
            generator: Source of the draw.
        """
        conv = self.conv_1x1.conv
        norms = [self.conv_1x1.bn] + ([] if self.identity is None else [self.identity])
        redraw_branch_([conv.weight], norms, conv.out_channels, generator)
        if isinstance(self.conv_kxk.conv, RepLayer):
            self.conv_kxk.conv.redraw_side_branches_(generator)

    @torch.no_grad()
    def begin_time_step_(self, *args: Any, **kwargs: Any) -> None:
        super().begin_time_step_(*args, **kwargs)
        if isinstance(self.conv_kxk.conv, RepLayer):
            self.conv_kxk.conv.time_step.copy_(self.time_step)

    @torch.no_grad()
    def branch_kernels(self) -> Dict[str, Tensor]:
        """The kernel that each branch adds to the sum by the kept statistics, with the attach rate.

        Returns:
            A kernel ``(o, i/g, kh, kw)`` for each branch; they add up to that of :meth:`compose_weight_bias`.
        """
        conv = self.conv_kxk.conv
        branches = dict(origin=self._fold_kxk()[0])
        if isinstance(conv, RepLayer):
            gain = 1.0
            if not isinstance(conv, NormedRepLayer):
                norm = self.conv_kxk.bn
                gain = (norm.weight * torch.rsqrt(kept_statistics(norm)[1] + norm.eps)).reshape(-1, 1, 1, 1)
            branches = _inner_names({name: gain * kernel for name, kernel in conv.branch_kernels().items()})
        height, width = self.kernel_size
        sides = {name: self.attach_rate * kernels.pad_to_size(kernel, (height, width))
                 for name, (kernel, _) in self._fold_sides().items()}
        return dict(branches, **sides)

    def branch_gradients(self) -> Dict[str, Tensor]:
        conv = self.conv_kxk.conv
        if isinstance(conv, RepLayer):
            gradients = _inner_names(conv.branch_gradients())
        else:
            gradients = {} if conv.weight.grad is None else dict(origin=conv.weight.grad)
        side = self.conv_1x1.conv.weight.grad
        return gradients if side is None else dict(gradients, conv_1x1=side)

    def reparameterize(self) -> None:
        """Refused: timm's method knows no attach rate. Its ``reparameterize_model`` calls :meth:`fuse` instead."""
        raise UserError('AnnealedRepVggBlock cannot be re-parameterized in place; fuse() returns a block that is')

    @torch.no_grad()
    def stock_block(self) -> RepVggBlock:
        """A plain block of timm's with copies of the parts, the attach rate in the gains of its side branches.

        Returns:
            Three branches with live norms; a rep layer in the KxK branch is fused.

        Raises:
            UserError: In training mode, if the KxK branch holds a layer with norms in its branches.
        """
        block: Any = _of_class(RepVggBlock, copy.deepcopy(self))
        conv = self.conv_kxk.conv
        if isinstance(conv, NormedRepLayer):
            block.conv_kxk.conv, norm = conv.fuse_conv_norm()
            block.conv_kxk.bn = block.conv_kxk.bn.unfolded(norm)
        elif isinstance(conv, RepLayer):
            block.conv_kxk.conv = conv.fuse()
        for name in ('attach_rate', 'time_step'):
            del block._buffers[name]
        for norm in (block.conv_1x1.bn, block.identity):
            if norm is not None:
                norm.weight.mul_(self.attach_rate)
                norm.bias.mul_(self.attach_rate)
        return block

    def fuse(self) -> RepVggBlock:
        """A block of timm's in deploy form, its branches folded into one convolution, for ``reparameterize_model``.

        Returns:
            A new block.
        """
        if self.training:
            raise UserError(
                'cannot fuse AnnealedRepVggBlock in training mode: its branches use batch statistics there, a fused '
                'convolution cannot. Call model.eval() first'
            )
        block = self.stock_block()
        block.reparameterize()
        return block
