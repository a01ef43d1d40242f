"""Kernels that are composed once for an update of several micro-batches."""
import weakref
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..composition import needs_plain_formula, prefers_channels_last
from ..errors import UserError

__all__ = ['UpdateKernels']


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _accumulates(parameter: nn.Parameter) -> Optional[bool]:
    """Whether the backward that runs adds to a parameter's gradient; None if it only looks at gradients."""
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(parameter).node))
    except RuntimeError:  # torch.autograd.grad of that parameter
        return None


class _Shared:
    """The kernel of a layer in one update: as composed, and the leaf that micro-batches before the last see of it.

    The gradient of the leaf joins that of the kernel in the last micro-batch, whose backward is the first to go through
    the composition. The gradient of a parameter, the witness, tells whether gradients were cleared, which the leaf does
    not know of.
    """

    def __init__(self, layer: Any, channels_last: bool) -> None:
        self.parameters: Tuple[nn.Parameter, ...] = tuple(layer.parameters())
        self.trained = [p for p in self.parameters if p.requires_grad and p is not layer.bias]
        self._read = (*self.parameters, layer.attach_rate)
        self.versions = self._versions()
        # checkpointing would take what the composition saves (parameters) for a part of this micro-batch
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
            self.kernel = layer.new_kernel(channels_last)
        self.leaf = self.kernel.detach().requires_grad_(self.kernel.requires_grad)
        self.is_joined = False
        self._witness = min(self.trained, key=torch.numel) if self.trained else None
        self._placed: Optional[Tuple[Tensor, int]] = None
        if self._witness is not None and self._witness.grad is None:
            self._witness.grad = torch.zeros_like(self._witness)
            self._placed = self._witness.grad, self._witness.grad._version
        self.note_gradient()
        if self.kernel.requires_grad:
            this = weakref.ref(self)  # a kernel that holds what holds it would never be freed

            def join(gradient: Tensor) -> Tensor:
                shared = this()
                return gradient if shared is None else shared._join(gradient)

            self.kernel.register_hook(join)

    def _versions(self) -> List[int]:
        return [tensor._version for tensor in self._read]

    def _join(self, gradient: Tensor) -> Tensor:
        earlier = self.leaf.grad
        if earlier is None or self.is_joined:
            return gradient
        taken = [_accumulates(parameter) for parameter in self.trained]
        if not any(taken):  # somebody looks at gradients of this micro-batch
            return gradient
        if not all(taken):
            raise UserError('the last of several micro-batches takes no backward(inputs=...) of some parameters only')
        if earlier.requires_grad:
            raise UserError('micro-batches that share a kernel have no second derivatives: got create_graph=True')
        self.is_joined = True
        return earlier.add_(gradient)

    def is_of(self, layer: nn.Module) -> bool:
        """Whether a layer has the parameters that the kernel was made of; torch.func puts others in their place."""
        return all(now is then for now, then in zip(layer.parameters(), self.parameters))

    def is_outdated(self) -> bool:
        """Whether those parameters, or the attach rate, were written to since."""
        return self._versions() != self.versions

    def is_cleared(self) -> bool:
        """Whether the gradients were set to None since."""
        return self._witness is not None and self._witness.grad is None

    def owes_gradient(self) -> bool:
        """Whether the branches have not got the gradient of the leaf yet."""
        return self.leaf.grad is not None and not self.is_joined

    def note_gradient(self) -> None:
        """Note the gradient that there is."""
        gradient = None if self._witness is None else self._witness.grad
        self._noted = (gradient, 0 if gradient is None else gradient._version)

    def take_back(self) -> None:
        """Leave the witness without a gradient, as the optimizer wants it, if none has come."""
        if self._witness is None or self._placed is None:
            return
        gradient, version = self._placed
        if self._witness.grad is gradient and gradient._version == version:
            self._witness.grad = None

    def check_gradient(self, accumulated: bool) -> None:
        """Raise a UserError if the gradient is not what was noted, or what a backward has added to it."""
        gradient, version = self._noted
        if gradient is None or self._witness is None or self._witness.grad is None:
            return
        if self._witness.grad is gradient and gradient._version == version:
            return
        if not (accumulated and self._witness.grad.any()):
            raise UserError(
                'gradients were written to in the middle of an update; they are whole after its last micro-batch only. '
                'To begin it anew, clear them with zero_grad(set_to_none=True)')


# A layer, and which of its parameters are trained.
_Key = Tuple[nn.Module, Tuple[bool, ...]]


class UpdateKernels:
    """Kernels of a model's linear layers in one update. What belongs to gradients that were cleared is forgotten.

    Attributes:
        is_open: Whether a micro-batch is being computed, which is when the kernels are shared.
        is_last: Whether that is the last one of the update.
        is_broken: Whether a micro-batch ended in an error.
        is_used: Whether a kernel was asked for.
    """

    def __init__(self) -> None:
        self.is_open = self.is_last = self.is_broken = self.is_used = False
        self._shared: Dict[_Key, _Shared] = {}
        this = weakref.ref(self)

        def before_step(optimizer: Any, *_: Any) -> None:
            update = this()
            if update is not None:
                update._before_step(optimizer)

        weakref.finalize(self, register_optimizer_step_pre_hook(before_step).remove)

    def begin(self, last: bool) -> None:
        """Begin a micro-batch."""
        self.is_open, self.is_last, self.is_broken, self.is_used = True, last, True, False

    def kernel(self, layer: Any, x: Tensor) -> Tensor:
        """The kernel that a layer convolves an input with.

        Args:
            layer: A linear layer.
            x: Its input.

        Returns:
            ``(o, i/g, kh, kw)``: composed anew where nothing can be shared.

        Raises:
            UserError: If parameters or gradients were written to since it was composed.
        """
        channels_last = prefers_channels_last(x)
        self.is_used = True
        alone = layer._together is not None and not torch.is_grad_enabled()  # no backward goes through all kernels
        if not self.is_open or alone or torch.is_inference_mode_enabled() or needs_plain_formula(x):
            return layer.new_kernel(channels_last)
        key = (layer, tuple(parameter.requires_grad for parameter in layer.parameters()))
        shared = self._shared.get(key)
        if shared is not None and shared.is_cleared():
            shared = self._shared.pop(key) and None
        if shared is None and not self.is_last:
            shared = self._shared[key] = _Shared(layer, channels_last)
        if shared is None or shared.is_joined or not shared.is_of(layer):
            return layer.new_kernel(channels_last)
        shared.check_gradient(accumulated=True)
        self._check_weights(shared)
        return shared.kernel if self.is_last else shared.leaf

    def _check_weights(self, shared: _Shared) -> None:
        if shared.is_outdated() and not shared.is_joined:
            raise UserError(
                'the weights were changed in the middle of an update: the last micro-batch before a step of the '
                'optimizer needs last=True')

    def drop_cleared(self) -> None:
        """Forget what belongs to gradients that were cleared."""
        for key in [key for key, shared in self._shared.items() if shared.is_cleared()]:
            del self._shared[key]

    def is_empty(self) -> bool:
        """Whether no kernels are held, or none any more."""
        self.drop_cleared()
        return not self._shared

    def check(self) -> None:
        """Raise a UserError if parameters or gradients were written to since the last micro-batch."""
        self.drop_cleared()
        for shared in self._shared.values():
            shared.check_gradient(accumulated=False)
            self._check_weights(shared)

    def note_gradients(self) -> None:
        """Note what the gradients are when a micro-batch ends, after a backward."""
        self.drop_cleared()
        for shared in self._shared.values():
            shared.check_gradient(accumulated=True)
            shared.note_gradient()

    def owing(self) -> List[nn.Module]:
        """Layers whose branches have not got the gradient of micro-batches before the last."""
        self.drop_cleared()
        return [layer for (layer, _), shared in self._shared.items() if shared.owes_gradient()]

    def is_outdated(self) -> bool:
        """Whether parameters were written to since their kernel was composed."""
        return any(shared.is_outdated() for shared in self._shared.values())

    def pay(self) -> None:
        """Give the branches the gradients that the last micro-batch did not take along: it did not use these layers."""
        for shared in self._shared.values():
            if shared.owes_gradient():
                torch.autograd.backward(shared.kernel, torch.zeros_like(shared.kernel))

    def end(self) -> None:
        """End the update, once all gradients have arrived."""
        for shared in self._shared.values():
            shared.take_back()

    def forget(self, layer: nn.Module) -> None:
        """Forget the kernel of a layer that is about to be written to.

        Raises:
            UserError: If that would lose a gradient.
        """
        if layer in self.owing():
            raise UserError(
                f'this {type(layer).__name__} is in the middle of an update; end it with its last micro-batch, or '
                'clear the gradients and begin it anew')
        for key in [key for key in self._shared if key[0] is layer]:
            del self._shared[key]

    def _before_step(self, optimizer: Any) -> None:
        """Refuse a step that would go by a part of the gradients."""
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group['params']}
        self.drop_cleared()
        for shared in self._shared.values():
            if shared.owes_gradient() and any(id(parameter) in stepped for parameter in shared.trained):
                raise UserError(
                    'a step of the optimizer in the middle of an update: its last micro-batch needs last=True, and has '
                    'to use every layer that those before it used')
