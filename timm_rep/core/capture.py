"""Composing all kernels of a model in few launches: layers of one shape in one call, all calls in one CUDA graph."""
from itertools import chain
from typing import Any, List, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from .errors import UserError
from .fuse import when_fused
from .layers import LinearRepLayer
from .layers.together import Composition, KernelsTogether, compose_each, compose_side_by_side
from .sharded import check_whole
from .walk import rep_layers, unwrapped

__all__ = ['Captured', 'capture', 'linear_layers', 'tie']


def linear_layers(model: nn.Module) -> List[LinearRepLayer]:
    """The linear layers of a model, in its order."""
    return [layer for _, layer in rep_layers(model) if isinstance(layer, LinearRepLayer)]


def tie(layers: Sequence[LinearRepLayer]) -> KernelsTogether:
    """Let layers ask one :class:`KernelsTogether` for their kernels: the one that they have, or a new one."""
    together = layers[0]._together
    if together is None or together.layers != tuple(layers):
        together = KernelsTogether(layers)
    for layer in layers:
        layer._together = together
    return together


class _OwnGradients(torch.autograd.Function):
    """Parameters as they are, whose gradients are copies: a graph writes its own at every replay."""

    @staticmethod
    def forward(ctx, *parameters):
        ctx.parameters = parameters
        ctx.versions = [parameter._version for parameter in parameters]
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        if ctx.versions != [parameter._version for parameter in ctx.parameters]:
            raise UserError(
                'weights were changed between forward and backward, and a captured composition keeps none of those '
                'that the forward took; call backward before the step of the optimizer')
        there = [gradient for gradient in gradients if gradient is not None]
        copies = iter(torch._foreach_mul(there, 1.0) if there else ())
        return tuple(None if gradient is None else next(copies) for gradient in gradients)


class _GraphedComposition:
    """A composition as a CUDA graph, captured anew when the graph would be of other tensors or flags."""

    def __init__(self, compose: Composition) -> None:
        self._compose = compose
        self._graph: Any = None
        self._captured: Any = None

    def __call__(self, layers: Sequence[Any], channels_last: bool) -> Sequence[Tensor]:
        if torch.cuda.is_current_stream_capturing():  # into a graph of the whole step
            return self._compose(layers, channels_last)
        parameters: List[Tensor] = [p for layer in layers for p in layer.parameters() if p is not layer.bias]
        tensors = chain(parameters, *(layer.buffers() for layer in layers))
        of_now = (
            [(tensor.data_ptr(), tensor.dtype, tensor.requires_grad) for tensor in tensors],
            channels_last,
            torch.get_float32_matmul_precision(),
        )
        if of_now != self._captured:
            self._graph = self._captured = None  # its memory is free for the next one
            with torch.autocast('cuda', enabled=False):
                self._graph = torch.cuda.make_graphed_callables(
                    lambda *_: tuple(self._compose(layers, channels_last)), tuple(parameters), allow_unused_input=True)
            self._captured = of_now
        kernels: Sequence[Tensor] = self._graph(*_OwnGradients.apply(*parameters))
        return kernels


class Captured:
    """What :func:`capture` has done to a model."""

    def __init__(self, model: nn.Module, together: KernelsTogether) -> None:
        self._together = together
        self._handles = (
            model.register_forward_pre_hook(together.begin),
            model.register_forward_hook(together.end, always_call=True),
        )

    def remove(self) -> None:
        """Undo it: each layer composes its own kernel again."""
        for handle in self._handles:
            handle.remove()
        self._together.compose = compose_each
        for layer in self._together.layers:
            if layer._together is self._together and self._together.exchange is None:
                layer._together = None


@when_fused
def _untie(part: nn.Module) -> None:
    """Take the hooks of a captured model off its stock form."""
    for hooks in (part._forward_pre_hooks, part._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, '__self__', None), KernelsTogether)]:
            del hooks[key]
            part._forward_hooks_always_called.pop(key, None)


def capture(model: nn.Module, *, graph: bool = True) -> Captured:
    """Let all kernels of a model be composed at once, at the start of every forward with gradients, in few launches.

    Layers of one shape are composed in one call, and all calls replayed as one CUDA graph, forward and backward: for a
    GPU that waits for its host. Values and gradients are the same up to rounding. It concerns linear layers (OREPA).
    Changes of weights, attach rate, time step, dtype, device, or of what is trained are followed; where that moves a
    tensor, the graph is captured anew. Compiled layers, copies of the model (EMA) and its stock form do without;
    TorchScript wants it removed.

    >>> import timm, torch, timm_rep
    >>> model = timm.create_model('orepa_resnet18_cifar')
    >>> captured = timm_rep.capture(model, graph=False)  # on a GPU: timm_rep.capture(model)
    >>> model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    >>> captured.remove()

    Args:
        model: Model on a GPU, also in DistributedDataParallel.
        graph: Replay a CUDA graph. Without, only layers of one shape are put together, which a CPU does not like.

    Returns:
        A handle whose ``remove()`` undoes it.

    Raises:
        UserError: For a model without linear layers, one that is compiled or sharded, for DataParallel, and with
            ``graph`` for one that is not on one GPU.
    """
    if hasattr(model, '_orig_mod'):
        raise UserError('a compiled model composes its kernels in its own graph; capture the model itself, or compile '
                        "it with mode='reduce-overhead'")
    if isinstance(model, nn.DataParallel):
        raise UserError('DataParallel copies the layers at every forward; use DistributedDataParallel')
    model = unwrapped(model)
    check_whole(model)
    layers = linear_layers(model)
    if not layers:
        raise UserError(f'{type(model).__name__} has no layers whose kernels are composed without norms, such as those '
                        'of orepa; there is nothing to capture')
    devices = {parameter.device for layer in layers for parameter in layer.parameters()}
    if graph and (len(devices) > 1 or next(iter(devices)).type != 'cuda'):
        raise UserError('a CUDA graph is of kernels on one GPU, and the layers are on '
                        f'{", ".join(sorted(map(str, devices)))}; graph=False puts layers of one shape together only')
    together = tie(layers)
    together.compose = _GraphedComposition(compose_side_by_side) if graph else compose_side_by_side
    return Captured(model, together)
