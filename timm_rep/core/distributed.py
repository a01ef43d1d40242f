"""Data-parallel training that exchanges the gradients of kernels instead of those of their branches."""
import inspect
from functools import partial
from typing import Any, Callable, Dict, List, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .capture import linear_layers, tie
from .errors import UserError
from .layers import LinearRepLayer

__all__ = ['RepDistributedDataParallel']


class _Backwards:
    """The last backwards that came to kernels whose gradients are exchanged (True), and to others (False)."""

    def __init__(self) -> None:
        self._last: Dict[bool, int] = {}

    def note(self, exchanged: bool) -> None:
        """Note the one that is running; it cannot be of both kinds."""
        self._last[exchanged] = torch._C._current_graph_task_id()
        if self._last[exchanged] == self._last.get(not exchanged):
            raise UserError(
                'a layer was called outside of the forward of RepDistributedDataParallel, where gradients of kernels '
                'are not exchanged, and one backward goes through both; call it inside, or use DistributedDataParallel')


class _Exchange:
    """The gradients of one composition's kernels on their way to all processes.

    They go while the backward goes on, in one order, the last layer's first.

    Args:
        group: The processes.
        count: How many kernels there are.
        backwards: Is told of the backward.
    """

    def __init__(self, group: Any, count: int, backwards: _Backwards) -> None:
        self.group = group
        self.backwards = backwards
        self.next = count - 1
        self.waiting: Dict[int, Tensor] = {}
        self.works: List[Any] = []

    def begin(self, number: int, gradient: Tensor) -> Tensor:
        """Send the gradient of a kernel, once those of all later ones are under way.

        Returns:
            Where the mean of all processes will be, after :meth:`end`.
        """
        self.backwards.note(True)
        mean = self.waiting[number] = gradient.contiguous() / dist.get_world_size(self.group)
        while self.next in self.waiting:
            self._send(self.next)
            self.next -= 1
        return mean

    def _send(self, number: int) -> None:
        self.works.append(dist.all_reduce(self.waiting.pop(number), group=self.group, async_op=True))

    def end(self) -> None:
        """Send what waits, of a second backward, and wait for all."""
        for number in sorted(self.waiting, reverse=True):
            self._send(number)
        for work in self.works:
            work.wait()
        self.works.clear()


class _Begin(torch.autograd.Function):
    """A kernel as it is; its gradient is sent out."""

    @staticmethod
    def forward(ctx, kernel, exchange, number):
        ctx.exchange, ctx.number = exchange, number
        return kernel.view_as(kernel)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return ctx.exchange.begin(ctx.number, gradient), None, None


class _Alone(torch.autograd.Function):
    """A kernel as it is; its gradient is that of this process."""

    @staticmethod
    def forward(ctx, kernel, backwards):
        ctx.backwards = backwards
        return kernel.view_as(kernel)

    @staticmethod
    def backward(ctx, gradient):
        ctx.backwards.note(False)
        return gradient, None


class _End(torch.autograd.Function):
    """All kernels as they are; their gradients are those that have come back."""

    @staticmethod
    def forward(ctx, exchange, *kernels):
        ctx.exchange = exchange
        ctx.set_materialize_grads(False)
        return tuple(kernel.view_as(kernel) for kernel in kernels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        if any(gradient is None for gradient in gradients):  # before others are sent in the place of these
            raise UserError(
                'some layers had no part in the loss, or in this part of it (checkpointing with use_reentrant=True), '
                'so that processes might wait for each other; use DistributedDataParallel')
        ctx.exchange.end()
        return (None, *gradients)


class RepDistributedDataParallel(DistributedDataParallel):
    """DistributedDataParallel that exchanges one gradient for each composed kernel, not those of all its branches.

    ``model = timm_rep.RepDistributedDataParallel(model, device_ids=[rank])``

    The branches of a linear layer (OREPA) follow from its kernel's gradient, so each process works them out from the
    mean of that: a third of the bytes, and the same gradients up to rounding. All else is exchanged as ever. Processes
    stay equal as long as they compute alike, which takes devices of one kind, and all run the layers in the same order.
    What reads ``layer.weight`` outside of the forward (a penalty) has to be the same on all processes.

    Args:
        module: Model with linear rep layers.
        *args: As of :class:`torch.nn.parallel.DistributedDataParallel`.
        **kwargs: Likewise; hooks on the communication see what is not exchanged here.

    Raises:
        UserError: For a model without linear layers, ``find_unused_parameters``, and ``join()``. In a forward, for
            accumulation of gradients by ``no_sync()`` without :func:`timm_rep.micro_batch`; in a backward, for layers
            that had no part in the loss, or that were also called outside of the forward.
    """

    def __init__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        layers = linear_layers(module)
        if not layers:
            raise UserError(f'{type(module).__name__} has no layers whose kernels are composed without norms; use '
                            'DistributedDataParallel')
        given = inspect.signature(super().__init__).bind(module, *args, **kwargs).arguments
        if given.get('find_unused_parameters'):
            raise UserError('find_unused_parameters: all processes take all kernels; use DistributedDataParallel')
        of_layers = {id(p): p for layer in layers for p in layer.parameters() if p is not layer.bias}
        branches = set(of_layers)
        trained = [p for p in module.parameters() if p.requires_grad]
        if trained and all(id(p) in branches for p in trained):  # DistributedDataParallel wants one at least
            branches.remove(id(min(trained, key=torch.numel)))
        ignored = [name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in branches]
        own = vars(module)  # not those of a module that this one stands for (torch.compile)
        before = own.get(IGNORED)
        own[IGNORED] = [*getattr(module, IGNORED, ()), *ignored]
        try:
            super().__init__(module, *args, **kwargs)
        finally:
            del own[IGNORED]
            if before is not None:
                own[IGNORED] = before
        if given.get('init_sync', True):
            for parameter in module.parameters():
                if id(parameter) in branches:
                    dist.broadcast(parameter.detach(), dist.get_global_rank(self.process_group, 0), self.process_group)
        self._tie(layers)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._tie(linear_layers(self.module))

    def _tie(self, layers: Sequence[LinearRepLayer]) -> None:
        self._kernels = tie(layers)
        self._kernels.exchange = self._exchanged
        self._in_forward = False
        self._backwards = _Backwards()

    def join_hook(self, **kwargs: Any) -> Any:
        raise UserError('join(): processes with fewer batches exchange no gradients of kernels; give all the same '
                        'number, or use DistributedDataParallel')

    def _exchanged(self, kernels: Sequence[Tensor]) -> Dict[int, Callable[[], Tensor]]:
        trained = {n: kernel for n, kernel in enumerate(kernels) if kernel.requires_grad}
        if not trained:
            return {}
        if not self._in_forward:  # of the module by itself, which other processes may not be in
            return {n: partial(_Alone.apply, kernel, self._backwards) for n, kernel in trained.items()}
        exchange = _Exchange(self.process_group, len(trained), self._backwards)
        sent = _End.apply(exchange, *trained.values())
        # begun when the layer asks: autograd then sends the gradient when the backward has come to the layer
        return {n: partial(_Begin.apply, kernel, exchange, k) for k, (n, kernel) in enumerate(zip(trained, sent))}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layers = self._kernels.layers
        if torch.is_grad_enabled() and not self.require_backward_grad_sync and layers[0]._update is None:
            raise UserError('no_sync() leaves gradients of kernels that are not exchanged; accumulate them with '
                            'timm_rep.micro_batch(model, last=...), which does without it')
        self._in_forward = True
        self._kernels.begin()
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._kernels.end()
            self._in_forward = False


# Where DistributedDataParallel looks for names of what it leaves alone.
IGNORED = '_ddp_params_and_buffers_to_ignore'
