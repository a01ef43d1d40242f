"""Composing all kernels of a model in few launches: as one CUDA graph, or layers of one shape in one call."""
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from .errors import UserError
from .fuse import when_fused
from .graphs import CudaGraphs
from .layers import LinearRepLayer
from .layers.together import KernelsTogether, compose_each, compose_side_by_side, composed_of
from .precision import float32_products
from .sharded import check_whole
from .walk import rep_layers, unwrapped

__all__ = ['Captured', 'capture', 'linear_layers', 'tie']

MOST_GRAPHS = 2


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


def _versions(tensors: Sequence[Tensor]) -> List[int]:
    return [tensor._version for tensor in tensors]


class _Replay(torch.autograd.Function):
    """The results of graphs, with gradients that are copies: the graphs write their own at every replay."""

    @staticmethod
    def forward(ctx, graphs, buffers, *parameters):
        ctx.set_materialize_grads(False)
        ctx.graphs, ctx.tensors = graphs, (*parameters, *buffers)
        ctx.versions = _versions(ctx.tensors)
        graphs.forward()
        return tuple(result.detach() for result in graphs.results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *result_gradients):
        if ctx.versions != _versions(ctx.tensors):
            raise UserError(
                'weights or attach rates were changed between forward and backward, and a captured composition keeps '
                'none of those that the forward took; call backward before the step of the optimizer')
        pairs = list(zip(ctx.graphs.result_gradients, result_gradients))
        missing = [memory for memory, gradient in pairs if gradient is None]
        if missing:
            torch._foreach_zero_(missing)
        written = [memory for memory, gradient in pairs if gradient is not None]
        if written:
            torch._foreach_copy_(written, [gradient for gradient in result_gradients if gradient is not None])
        if ctx.graphs.is_spent:  # by the backward of another forward of the same weights
            ctx.graphs.forward()
        ctx.graphs.backward()
        there = [gradient for gradient in ctx.graphs.gradients if gradient is not None]
        copies = iter(torch._foreach_mul(there, 1.0) if there else ())
        return (None, None, *(None if gradient is None else next(copies) for gradient in ctx.graphs.gradients))


@contextmanager
def _in_place_of(parameters: Dict[int, Tensor], layers: Sequence[nn.Module]) -> Iterator[None]:
    """Put tensors in place of the parameters with these ids."""
    modules = {module for layer in layers for module in layer.modules()}
    places = [(m, name, p) for m in modules for name, p in m._parameters.items() if id(p) in parameters]
    for module, name, parameter in places:
        module._parameters[name] = parameters[id(parameter)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


@dataclass
class _Kept:
    """Graphs, and the versions of the tensors that their results are of."""

    graphs: CudaGraphs
    versions: Sequence[int] = ()


class _GraphedComposition:
    """The composition of all kernels as a CUDA graph, captured anew when that would be of other tensors or flags.

    Of the same tensors two graphs are kept: a discriminator is trained in one half of a step and stands still in the
    other.

    One call for each layer: in a graph their number costs little, and putting tensors side by side takes memory.
    Without a graph where none can be: off the GPU, and of tensors that are no parameters (functional_call).
    """

    device_type = 'cuda'

    def __init__(self) -> None:
        self._addresses: Any = None
        self._kept: Dict[Any, _Kept] = {}

    def __call__(self, layers: Sequence[Any], channels_last: bool) -> Sequence[Tensor]:
        parameters, buffers = composed_of(layers)
        if not self._can_be_graph(parameters, buffers):
            return compose_each(layers, channels_last)
        tensors = (*parameters, *buffers)
        addresses = [(tensor.data_ptr(), tensor.dtype) for tensor in tensors]
        if addresses != self._addresses:
            self._kept.clear()
            self._addresses = addresses
        flags = (tuple(parameter.requires_grad for parameter in parameters), channels_last, float32_products())
        kept = self._kept.get(flags)
        if kept is None:
            if len(self._kept) == MOST_GRAPHS:
                del self._kept[next(iter(self._kept))]
            kept = self._kept[flags] = _Kept(self._new_graphs(layers, channels_last, parameters))
        versions = _versions(tensors)
        if versions != kept.versions:
            # a backward that goes by the kernels that are about to be overwritten ends in torch's error
            torch.autograd.graph.increment_version(kept.graphs.results)
            kept.versions = versions
        kernels: Sequence[Tensor] = _Replay.apply(kept.graphs, buffers, *parameters)
        return kernels

    def _can_be_graph(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> bool:
        devices = {tensor.device for tensor in (*parameters, *buffers)}
        return (
            len(devices) == 1 and next(iter(devices)).type == self.device_type
            and all(isinstance(parameter, nn.Parameter) for parameter in parameters)
            and not any(buffer.requires_grad for buffer in buffers)
            and not torch.cuda.is_current_stream_capturing()  # into a graph of the whole step
        )

    def _new_graphs(self, layers: Sequence[Any], channels_last: bool, parameters: Sequence[Tensor]) -> CudaGraphs:
        # without the hooks of the parameters, which would run in the graph and once more behind it
        aliases = [p.detach().requires_grad_(p.requires_grad) for p in parameters]
        ids = [id(parameter) for parameter in parameters]

        def compose(*tensors: Tensor) -> Sequence[Tensor]:
            with _in_place_of(dict(zip(ids, tensors)), layers):
                return compose_each(layers, channels_last)

        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        device, no_autocast = torch.cuda.device(parameters[0].device), torch.autocast('cuda', enabled=False)
        # looking for NaN waits for the GPU, which no graph can
        with device, no_autocast, torch.autograd.set_detect_anomaly(False):
            return CudaGraphs(compose, aliases, memory_format)


class Captured:
    """What :func:`capture` has done to a model."""

    def __init__(self, model: nn.Module, together: KernelsTogether) -> None:
        self._model = model
        self._together = together
        self._handles = (
            model.register_forward_pre_hook(together.begin),
            model.register_forward_hook(together.end, always_call=True),
        )

    def remove(self) -> None:
        """Undo it: each layer composes its own kernel again."""
        for handle in self._handles:
            handle.remove()
        if any(getattr(hook, '__self__', None) is self._together for hook in self._model._forward_pre_hooks.values()):
            return  # captured twice
        self._together.compose = compose_each
        self._together.forget()
        for layer in self._together.layers:
            if layer._together is self._together and self._together.exchange is None:
                vars(layer).pop('_together', None)


@when_fused
def _untie(part: nn.Module) -> None:
    """Take the hooks of a captured model off its stock form."""
    for hooks in (part._forward_pre_hooks, part._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, '__self__', None), KernelsTogether)]:
            del hooks[key]
            part._forward_hooks_always_called.pop(key, None)


def capture(model: nn.Module, *, graph: bool = True) -> Captured:
    """Let all kernels of a model be composed at once, at the start of every forward with gradients, in few launches.

    On a GPU, which waits for its host otherwise: all calls are replayed as one CUDA graph, forward and backward. Values
    and gradients are the same. It concerns linear layers (OREPA).
    A layer that a forward does not run has gradients of zero then, not none: weight decay moves it. Freeze such a one.
    Changes of weights, attach rate, time step, dtype, device, or of what is trained are followed; where that moves a
    tensor, or is new, the graph is captured anew; off the GPU there is none. A graph has no second derivatives by
    weights, and the backward comes before the next change of weights or attach rate. Compiled layers, copies of the
    model (EMA) and its stock form do without; TorchScript wants it removed.

    >>> import timm, torch, timm_rep
    >>> model = timm.create_model('orepa_resnet18_cifar')
    >>> captured = timm_rep.capture(model, graph=False)  # on a GPU: timm_rep.capture(model)
    >>> model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    >>> captured.remove()

    Args:
        model: Model on a GPU, also in DistributedDataParallel.
        graph: Replay a CUDA graph. Without, layers of one shape are composed in one call, to the same values up to
            rounding: fewer launches on a GPU where no graph can be; a CPU does not like it.

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
    exchanging = {layer._together for layer in layers if layer._together is not None and layer._together.exchange}
    if any(together.layers != tuple(layers) for together in exchanging):
        raise UserError('RepDistributedDataParallel exchanges gradients of all kernels of the model in it; capture '
                        'that model as a whole')
    together = tie(layers)
    together.compose = _GraphedComposition() if graph else compose_side_by_side
    return Captured(model, together)
