"""Branches with a norm in each, which fold together by the statistics that the norms keep."""
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from .. import kernels
from ..errors import UserError
from ..precision import full_float32, without_autocast
from .annealed import AnnealedModule, OriginPart, check_kernel
from .base import RepLayer, kaiming_uniform_
from .fixed import own_methods
from .norms import check_batch_norm, count_anew_, fold_batch_norm, is_frozen, kept_statistics

__all__ = ['NormedBranches']

# Redrawn kernels of side branches lie within this bound over sqrt(o) (RepAn).
REDRAW_BOUND = 0.1


class NormedBranches(AnnealedModule):
    """What is made of branches with a norm in each, of which all but the origin have an attach rate.

    Folding and restoring go by the kept (running) statistics, so they are exact in eval mode at every attach rate; in
    training mode batch statistics replace the kept ones.

    Subclasses have :meth:`_origin`, whose convolution may itself be a rep layer, and name and fold their side branches
    (:meth:`_side_convs`, :meth:`_side_norms`, :meth:`_fold_sides`).
    """

    def _origin(self) -> Tuple[Any, Any]:
        """The convolution of the origin branch, and its norm, which is not used if the convolution has norms itself."""
        raise NotImplementedError(f'{type(self).__name__} must define _origin')

    def _side_convs(self) -> Dict[str, nn.Conv2d]:
        """The convolutions of the side branches that end in the outputs, by branch."""
        raise NotImplementedError(f'{type(self).__name__} must define _side_convs')

    def _side_norms(self) -> Tuple[nn.BatchNorm2d, ...]:
        """The last norm of every side branch."""
        raise NotImplementedError(f'{type(self).__name__} must define _side_norms')

    def _inner_norms(self) -> Tuple[nn.BatchNorm2d, ...]:
        """Norms inside a side branch."""
        return ()

    def _fold_sides(self) -> Dict[str, Tuple[Tensor, Tensor]]:
        """Kernel and bias ``(o,)`` of every side branch by the kept statistics, without the attach rate.

        A kernel may be smaller than the layer's, around the same centre.
        """
        raise NotImplementedError(f'{type(self).__name__} must define _fold_sides')

    def _attached(self, out: Tensor, side: Tensor) -> Tensor:
        """Outputs of the origin branch with those of the side branches, at the attach rate."""
        return torch.addcmul(out, self.attach_rate.to(out.dtype), side)

    def _fold_origin(self) -> Tuple[Tensor, Tensor]:
        conv, norm = self._origin()
        return conv.compose_weight_bias() if isinstance(conv, NormedBranches) else fold_batch_norm(
            conv.weight, None, norm)

    def _origin_norm(self) -> nn.BatchNorm2d:
        """The norm whose kept statistics the origin has."""
        conv, norm = self._origin()
        found: nn.BatchNorm2d = conv._origin_norm() if isinstance(conv, NormedBranches) else norm
        return found

    def norms_to_measure(self) -> Tuple[nn.BatchNorm2d, Tuple[nn.BatchNorm2d, ...]]:
        """The norm of the origin, and those of the side branches, inner ones included."""
        conv, norm = self._origin()
        sides = (*self._side_norms(), *self._inner_norms())
        if isinstance(conv, NormedBranches):
            norm, inside = conv.norms_to_measure()
            sides = (*sides, *inside)
        return norm, sides

    def _check_branches(self) -> None:
        """Raise a UserError if a part of a branch was replaced by one that does not fold."""
        norm, sides = self.norms_to_measure()
        for part in (norm, *sides):
            check_batch_norm(part, alone=True)
        for name, part in self.named_modules():
            if part is not self and own_methods(part):
                raise UserError(
                    f'{name} of a {type(self).__name__} does not fold: {", ".join(own_methods(part))} was put on it')

    def check_parts(self) -> None:
        super().check_parts()
        self._check_branches()

    def origin_parameters(self) -> List[OriginPart]:
        conv, norm = self._origin()
        if isinstance(conv, NormedBranches):
            return conv.origin_parameters()
        parts = conv.origin_parameters() if isinstance(conv, RepLayer) else [(conv.weight, ...)]
        return parts if is_frozen(norm) else [*parts, (norm.weight, ...), (norm.bias, ...)]

    def _write_origin_(self, kernel: Tensor, bias: Tensor, gain: Tensor) -> None:
        """Let the origin compute this in eval mode; its norm keeps its statistics and gets this gain ``(o,)``."""
        conv, norm = self._origin()
        if isinstance(conv, NormedBranches):
            conv.restore_with_gain_(kernel, bias, gain)
            return
        kernel, gamma, beta = kernels.unfold_norm(kernel, bias, *kept_statistics(norm), norm.eps, gain)
        count_anew_(norm)
        if isinstance(conv, RepLayer):
            conv.restore_(kernel)
        else:
            conv.weight.copy_(kernel)
        norm.weight.copy_(gamma)
        norm.bias.copy_(beta)

    def _shift_origin_(self, kernel: Tensor, bias: Tensor) -> None:
        """Add to the kernel and bias that the origin computes."""
        conv, norm = self._origin()
        if isinstance(conv, NormedBranches):
            conv._shift_origin_(kernel, bias)
            return
        kernel = kernel * (torch.sqrt(kept_statistics(norm)[1] + norm.eps) / norm.weight).reshape(-1, 1, 1, 1)
        if isinstance(conv, RepLayer):
            conv.restore_(conv.compose_weight() + kernel)
        else:
            conv.weight.add_(kernel)
        norm.bias.add_(bias)

    def _pad(self, kernel: Tensor) -> Tensor:
        height, width = self.kernel_size  # type: ignore[misc]
        return kernels.pad_to_size(kernel, (height, width))

    def _side_kernel_bias(self) -> Tuple[Tensor, Tensor]:
        """Kernel ``(o, i/g, kh, kw)`` and bias ``(o,)`` of the sum of the side branches, without the attach rate."""
        sides = list(self._fold_sides().values())
        kernel = self._pad(kernels.merge_parallel([kernel for kernel, _ in sides]))
        bias = sides[0][1]
        for _, following in sides[1:]:
            bias = bias + following
        return kernel, bias

    def compose_weight_bias(self) -> Tuple[Tensor, Tensor]:
        """Kernel and bias by the kept statistics, at the attach rate in force, differentiably.

        Returns:
            Kernel ``(o, i/g, kh, kw)`` and bias ``(o,)``, in the parameters' dtype; composed in float32 at least.

        Raises:
            UserError: If a part of a branch was replaced by one that does not fold.
        """
        dtype = next(self.parameters()).dtype
        kernel, bias = self._fold()
        return kernel.to(dtype), bias.to(dtype)

    def _fold(self) -> Tuple[Tensor, Tensor]:
        self._check_branches()
        with without_autocast(next(self.parameters())), full_float32():
            kernel, bias = self._fold_origin()
            side_kernel, side_bias = self._side_kernel_bias()
            return kernel + self.attach_rate * side_kernel, bias + self.attach_rate * side_bias

    @torch.no_grad()
    def branch_kernels(self) -> Dict[str, Tensor]:
        """The kernel that each branch adds to the sum by the kept statistics, with the attach rate.

        Returns:
            A kernel ``(o, i/g, kh, kw)`` for each branch; they add up to that of :meth:`compose_weight_bias`.
        """
        with without_autocast(next(self.parameters())), full_float32():
            branches = self._origin_kernels()
            sides = self._fold_sides()
        return dict(branches, **{name: self.attach_rate * self._pad(kernel) for name, (kernel, _) in sides.items()})

    def _origin_kernels(self) -> Dict[str, Tensor]:
        """The origin's kernel; of a rep layer in its place those of its branches, whose sides get another name."""
        conv, norm = self._origin()
        if not isinstance(conv, RepLayer):
            return dict(origin=self._fold_origin()[0])
        branches = conv.branch_kernels()
        if not isinstance(conv, NormedBranches):
            branches = {name: fold_batch_norm(kernel, None, norm)[0] for name, kernel in branches.items()}
        return _told_apart(branches)

    def branch_gradients(self) -> Dict[str, Tensor]:
        conv, _ = self._origin()
        if isinstance(conv, RepLayer):
            gradients = _told_apart(conv.branch_gradients())
        else:
            gradients = {} if conv.weight.grad is None else dict(origin=conv.weight.grad)
        sides = {name: side.weight.grad for name, side in self._side_convs().items()}
        return dict(gradients, **{name: grad for name, grad in sides.items() if grad is not None})

    @torch.no_grad()
    def restore_(self, weight: Tensor, bias: Optional[Tensor] = None) -> None:
        """Make the module compute exactly this kernel and bias in eval mode, whatever the side branches hold.

        The origin branch takes ``K - attach_rate * (sum of the side branches)``. Its norm keeps its running statistics
        and gets gain one, so its kernel is that times their standard deviation; nothing is divided by a learnt weight.

        Args:
            weight: Kernel ``(o, i/g, kh, kw)``.
            bias: ``(o,)``, or None for zeros.

        Raises:
            UserError: For another shape. The module is then unchanged.
        """
        self.restore_with_gain_(weight, bias, torch.ones_like(self._origin_norm().weight))

    @torch.no_grad()
    def restore_with_gain_(self, weight: Tensor, bias: Optional[Tensor], gain: Tensor) -> None:
        """:meth:`restore_` with another gain of the origin's norm.

        Args:
            weight: Kernel ``(o, i/g, kh, kw)``.
            bias: ``(o,)``, or None for zeros.
            gain: ``(o,)``, nowhere zero.

        Raises:
            UserError: For another shape. The module is then unchanged.
        """
        self.check_parts()
        with without_autocast(next(self.parameters())), full_float32():
            side_kernel, side_bias = self._side_kernel_bias()
            check_kernel(self, side_kernel.shape, weight, bias)
            bias = torch.zeros_like(side_bias) if bias is None else bias.to(side_bias)
            weight = weight.to(side_kernel)
            self._write_origin_(weight - self.attach_rate * side_kernel, bias - self.attach_rate * side_bias, gain)
            kernel, composed_bias = self.compose_weight_bias()  # take up the rounding of the first pass
            self._shift_origin_(weight - kernel, bias - composed_bias)

    def _put_back_(self, weight: Tensor, bias: Optional[Tensor], keep_gain: bool) -> None:
        gain = self._origin_norm().weight
        usable = keep_gain & (gain.abs() >= torch.finfo(gain.dtype).tiny)
        self.restore_with_gain_(weight, bias, torch.where(usable, gain, 1.0))

    @torch.no_grad()
    def keep_statistics_(self, mean: Tensor, var: Tensor) -> None:
        """Let the origin's norm keep these statistics of its inputs, with the same outputs in eval mode.

        If they are those of a batch in training mode, the outputs stay the same there, too.

        Args:
            mean: ``(o,)``.
            var: ``(o,)``.
        """
        weight, bias = self._fold()
        norm = self._origin_norm()
        kept_mean, kept_var = kept_statistics(norm)
        gain = norm.weight * torch.sqrt((var + norm.eps) / (kept_var + norm.eps))
        kept_mean.copy_(mean)
        kept_var.copy_(var)
        self.restore_with_gain_(weight, bias, gain)

    @torch.no_grad()
    def redraw_side_branches_(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw the side branches afresh: kernels from U(-b, b) with ``b = 0.1 / sqrt(o)``, gains 1, biases 0 (RepAn).

        Their norms keep their statistics.

        Args:
            generator: Source of the draw.
        """
        for conv in self._side_convs().values():
            # with a = 0 the bound is sqrt(6 / fan)
            kaiming_uniform_(conv.weight, 6 * conv.out_channels / REDRAW_BOUND ** 2, generator=generator)
        for norm in (*self._side_norms(), *self._inner_norms()):
            norm.weight.fill_(1.0)
            norm.bias.zero_()
            count_anew_(norm)

    @torch.no_grad()
    def set_side_gain_(self, gain: float) -> None:
        for norm in self._side_norms():
            norm.weight.fill_(gain)

    def _refuse_training(self) -> None:
        norms = (self._origin_norm(), *self._side_norms(), *self._inner_norms())
        if any(norm.training and not is_frozen(norm) for norm in norms):
            raise UserError(
                f'cannot fuse {type(self).__name__} in training mode: its branches use batch statistics there, a '
                'fused convolution cannot. Call model.eval() first'
            )


def _told_apart(branches: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Tell the side branches of a layer in the origin's place from the module's own."""
    return {name if name == 'origin' else f'kxk_{name}': value for name, value in branches.items()}
