"""Kernels of all layers of a model, composed at once."""
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from ..composition import needs_plain_formula, prefers_channels_last
from ..errors import UserError

__all__ = ['KernelsTogether', 'compose_each', 'compose_side_by_side', 'composed_of']

# Layers and the memory format of their kernels to the kernels.
Composition = Callable[[Sequence[Any], bool], Sequence[Tensor]]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def compose_each(layers: Sequence[Any], channels_last: bool) -> List[Tensor]:
    """Kernels of layers, one call for each."""
    return [layer._compose(channels_last) for layer in layers]


def compose_side_by_side(layers: Sequence[Any], channels_last: bool) -> List[Tensor]:
    """Kernels of layers, one call for all that are composed alike: as many groups of one layer."""
    alike: Dict[Any, List[Any]] = {}
    for layer in layers:
        # a subclass may compose in another way than the class that it has the method from
        key = layer.composed_like() if 'compose_side_by_side' in vars(type(layer)) else None
        alike.setdefault(layer if key is None else key, []).append(layer)
    kernels: Dict[Any, Tensor] = {}
    for members in alike.values():
        if len(members) == 1:
            kernels[members[0]] = members[0]._compose(channels_last)
        else:
            composed = members[0].compose_side_by_side(members, channels_last)
            kernels.update(zip(members, composed.chunk(len(members))))
    return [kernels[layer] for layer in layers]


def composed_of(layers: Sequence[Any]) -> Tuple[List[Tensor], List[Tensor]]:
    """Parameters and buffers that layers compose their kernels of: no biases; a parameter in common once.

    It is asked for in every step, and faster than by the methods of a module.
    """
    parameters: Dict[int, Tensor] = {}
    buffers: List[Tensor] = []
    modules = list(layers)
    for module in modules:  # which grow
        modules += filter(None, module._modules.values())
        buffers += [buffer for buffer in module._buffers.values() if buffer is not None]
        parameters.update((id(p), p) for p in module._parameters.values() if p is not None)
    for layer in layers:
        parameters.pop(id(layer.bias), None)
    return list(parameters.values()), buffers


def _is_trained(layer: Any) -> bool:
    if any(p is not None and p.requires_grad for name, p in layer._parameters.items() if name != 'bias'):
        return True  # as nearly always
    parameters, buffers = composed_of([layer])
    return any(tensor.requires_grad for tensor in (*parameters, *buffers))


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _NotExchanged(torch.autograd.Function):
    """A kernel that a backward composes: as it is, but no gradient may come to it."""

    @staticmethod
    def forward(ctx, kernel):
        return kernel.view_as(kernel)

    @staticmethod
    def backward(ctx, gradient):
        raise UserError('gradients of kernels cannot be exchanged under checkpointing with use_reentrant=True')


class KernelsTogether:
    """Composes the kernels of a model's linear layers when the first of them asks for its own in a forward.

    Whoever makes one calls :meth:`begin` and :meth:`end` around every forward of the model. It is no part of what the
    model is: copies and pickles of the model do without.

    Args:
        layers: All linear layers of a model.

    Attributes:
        layers: The layers.
        compose: Composes the kernels of layers.
        exchange: If set: given the kernels, returns functions by number that make what the layer takes instead, of the
            same values, when it first asks for its own.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers: Tuple[Any, ...] = tuple(layers)
        self.compose: Composition = compose_each
        self.exchange: Optional[Callable[[Sequence[Tensor]], Dict[int, Callable[[], Tensor]]]] = None
        self._kernels: Dict[Any, Tensor] = {}
        self._to_take: Dict[Any, Callable[[], Tensor]] = {}  # of layers that have not asked yet
        self._given: Set[Any] = set()  # layers that one of these kernels was the last answer to
        self._in_forward = False

    def __reduce__(self) -> Any:
        return KernelsTogether, ((),)

    def begin(self, *_: Any) -> None:
        """Begin a forward of the model, unless a checkpoint computes all of it again."""
        if not _in_backward():
            self.forget()
            self._in_forward = True

    def forget(self) -> None:
        """Let go of the kernels."""
        self._kernels, self._to_take = {}, {}
        self._given = set()

    def end(self, *_: Any) -> None:
        """End it. The kernels stay, for what checkpointing computes again, until the next one begins."""
        if not _in_backward():
            self._in_forward = False

    def is_exchanging(self) -> bool:
        """Whether gradients of kernels that are asked for now are exchanged."""
        return self.exchange is not None and torch.is_grad_enabled() and (self._in_forward or _in_backward())

    @torch.compiler.disable
    def exchanged_kernel(self, layer: Any, x: Tensor) -> Tensor:
        """The kernel of a layer for an input, outside of compiled graphs, which would leave out the exchange."""
        update = layer._update
        kernel: Tensor = self.kernel(layer, prefers_channels_last(x)) if update is None else update.kernel(layer, x)
        return kernel

    def kernel(self, layer: Any, channels_last: bool) -> Tensor:
        """The kernel of a layer.

        Outside of a forward, without gradients, and for derivatives other than plain autograd's, it is composed alone.
        Checkpointing never sees what composing saves, so that it finds the same whichever way it computes again.

        Args:
            layer: One of the layers.
            channels_last: Memory format of the kernels, if they are not composed yet.
        """
        in_backward = torch._C._current_graph_task_id() != -1  # asked as it is, so that a compiler breaks here
        grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        plain = grad and not needs_plain_formula() and forward_ad._current_level < 0
        if not in_backward:
            (self._given.add if plain and self._in_forward else self._given.discard)(layer)
        if not plain:
            return layer._compose(channels_last)
        if layer in self._given:
            if not self._kernels:
                self._compose_all(channels_last)
            if layer in self._to_take:
                self._kernels[layer] = self._to_take.pop(layer)()
            if layer in self._kernels:  # no replica (DataParallel)
                return self._kernels[layer]
        with saved_tensors_hooks(_as_it_is, _as_it_is):
            kernel: Tensor = layer._compose(channels_last)
        if self.exchange is None:
            return kernel
        if in_backward:
            return _NotExchanged.apply(kernel)
        takes = self.exchange([kernel])
        return takes[0]() if takes else kernel

    def _compose_all(self, channels_last: bool) -> None:
        with saved_tensors_hooks(_as_it_is, _as_it_is):
            kernels = self.compose(self.layers, channels_last)
            # one call makes all of them part of the graph, if one of them is trained
            kernels = [k if _is_trained(layer) else k.detach() for layer, k in zip(self.layers, kernels)]
            if self.exchange is not None:
                self._to_take = {self.layers[n]: take for n, take in self.exchange(kernels).items()}
        self._kernels = dict(zip(self.layers, kernels))
