"""Kernels that are composed once for an update of several micro-batches."""
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ..composition import needs_plain_formula, prefers_channels_last
from ..errors import UserError

__all__ = ['UpdateKernels']


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Shared:
    """The kernel of a layer in one update: as composed, and the leaf that micro-batches before the last see of it.

    The gradient of the leaf joins that of the kernel in the last micro-batch, whose backward is the first to go through
    the composition.
    """

    def __init__(self, layer: nn.Module, kernel: Tensor) -> None:
        self.parameters = tuple(layer.parameters())
        self.versions = [parameter._version for parameter in self.parameters]
        self.kernel = kernel
        self.leaf = kernel.detach().requires_grad_(kernel.requires_grad)
        self.is_joined = False
        if kernel.requires_grad:
            kernel.register_hook(self._join)

    def _join(self, gradient: Tensor) -> Tensor:
        earlier = self.leaf.grad
        if earlier is None or self.is_joined:
            return gradient
        if earlier.requires_grad:
            raise UserError('micro-batches that share a kernel have no second derivatives: got create_graph=True')
        self.is_joined = True
        return earlier.add_(gradient)

    def is_of(self, layer: nn.Module) -> bool:
        """Whether a layer has the parameters that the kernel was made of; torch.func puts others in their place."""
        return all(now is then for now, then in zip(layer.parameters(), self.parameters))

    def is_outdated(self) -> bool:
        """Whether those parameters were written to since."""
        return [parameter._version for parameter in self.parameters] != self.versions

    def owes_gradient(self) -> bool:
        """Whether the branches have not got the gradient of the leaf yet."""
        return self.leaf.grad is not None and not self.is_joined


class UpdateKernels:
    """Kernels of a model's linear layers in one update.

    Attributes:
        is_open: Whether a micro-batch is being computed, which is when the kernels are shared.
        is_last: Whether that is the last one of the update.
        is_broken: Whether a micro-batch ended in an error.
    """

    def __init__(self) -> None:
        self.is_open = self.is_last = self.is_broken = False
        self._shared: Dict[nn.Module, _Shared] = {}
        self._witness: Optional[nn.Parameter] = None
        self._noted: Tuple[Optional[Tensor], int] = (None, 0)

    def __len__(self) -> int:
        return len(self._shared)

    def kernel(self, layer: Any, x: Tensor) -> Tensor:
        """The kernel that a layer convolves an input with.

        Args:
            layer: A linear layer.
            x: Its input.

        Returns:
            ``(o, i/g, kh, kw)``: composed anew where nothing can be shared.
        """
        if not self.is_open or torch.is_inference_mode_enabled():
            return layer._compose(prefers_channels_last(x))
        shared = self._shared.get(layer)
        alone = shared is None and self.is_last
        if alone or needs_plain_formula(x) or not (shared is None or shared.is_of(layer)):
            return layer._compose(prefers_channels_last(x))
        if shared is None:
            # checkpointing would take what the composition saves (parameters) for a part of this micro-batch
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
                shared = self._shared[layer] = _Shared(layer, layer._compose(prefers_channels_last(x)))
        return shared.kernel if self.is_last else shared.leaf

    def forget(self, layer: nn.Module) -> None:
        """Forget the kernel of a layer that is about to be written to.

        Raises:
            UserError: If that would lose a gradient.
        """
        shared = self._shared.get(layer)
        if shared is not None and shared.owes_gradient():
            raise UserError(
                f'this {type(layer).__name__} is in the middle of an update; end it with its last micro-batch, or '
                'clear the gradients and begin it anew')
        self._shared.pop(layer, None)

    def is_outdated(self) -> bool:
        """Whether parameters were written to since their kernel was composed, as an optimizer's step does."""
        return any(shared.is_outdated() for shared in self._shared.values())

    def owing(self) -> List[nn.Module]:
        """Layers whose branches have not got the gradient of micro-batches before the last."""
        return [layer for layer, shared in self._shared.items() if shared.owes_gradient()]

    def pay(self) -> None:
        """Give the branches the gradients that the last micro-batch did not take along: it did not use these layers."""
        for shared in self._shared.values():
            if shared.owes_gradient():
                torch.autograd.backward(shared.kernel, torch.zeros_like(shared.kernel))

    # A parameter's gradient tells whether the gradients were cleared, which the leaves do not know of.

    def note_gradients(self) -> None:
        """Note what the gradients are when a micro-batch ends."""
        if self._witness is None:
            trained = [p for shared in self._shared.values() for p in shared.parameters if p.requires_grad]
            if not trained:
                return
            self._witness = min(trained, key=torch.numel)
        if self._witness.grad is None:
            self._witness.grad = torch.zeros_like(self._witness)
        self._noted = (self._witness.grad, self._witness.grad._version)

    def check_gradients(self) -> None:
        """Forget the leaves' gradients if the others were cleared since they were noted.

        Raises:
            UserError: If they were changed in another way, which the leaves' gradients have missed.
        """
        if self._witness is None:
            return
        gradient, version = self._noted
        if self._witness.grad is None:
            for shared in self._shared.values():
                shared.leaf.grad = None
        elif self._witness.grad is not gradient or gradient._version != version:
            raise UserError(
                'gradients were written to between the micro-batches of an update; they are whole after the last one '
                'only. To begin the update anew, clear them with zero_grad(set_to_none=True)')
