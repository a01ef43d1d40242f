"""Annealing through re-parameterization: the schedule of time steps, and the step from one to the next.

:class:`~timm_rep.core.annealer.Annealer` puts them together, for any training loop:

>>> import torch, timm, timm_rep
>>> model = timm.create_model('repan_resnet18_cifar', num_classes=2)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
>>> schedule = timm_rep.AnnealingSchedule(time_steps=2, epochs=2, warmup_epochs=1)
>>> annealer = timm_rep.Annealer(model, optimizer, schedule)
>>> for epoch in range(schedule.total_epochs):
...     position = annealer.begin_epoch(epoch)
...     loss = model(torch.randn(4, 3, 8, 8)).logsumexp(1).mean()  # an epoch of any kind
...     optimizer.zero_grad()
...     loss.backward()
...     optimizer.step()
...     row = annealer.end_epoch(train_loss=loss.item())  # of annealer.history
...     print(epoch, position.time_step, position.attach_rate)
0 0 0.5
1 0 1.0
2 1 0.5
3 1 1.0

Source: RepAn, `Enhanced Annealing through Re-parameterization` (CVPR 2024).
"""
import itertools
import math
import numbers
from dataclasses import dataclass
from typing import Any, Iterable, List, Optional

import torch
import torch.nn as nn
from torch import Tensor

from .errors import UserError
from .layers import AnnealedModule
from .layers.annealed import check_attach_rate
from .measure import check_measurable, first_batches, measure_statistics, normed_modules
from .micro_batch import check_no_update
from .sharded import check_whole, reshard, whole_parameters
from .walk import annealed_modules, check_generator, set_attach_rate

__all__ = [
    'RESTORATIONS', 'AnnealingSchedule', 'Position', 'attach_rate', 'begin_time_step', 'check_rep_layers',
    'check_restoration', 'set_attach_rate', 'set_time_step', 'time_step',
]

RESTORATIONS = ('authors', 'keep_gain', 'measured')


@dataclass(frozen=True)
class Position:
    """Where in the schedule an epoch lies.

    Attributes:
        time_step: Time step, from 0.
        epoch: Epoch within the time step, from 0.
        attach_rate: Rate of the side branches, in (0, 1].
        begins: Whether a time step begins with this epoch.
    """

    time_step: int
    epoch: int
    attach_rate: float
    begins: bool


@dataclass(frozen=True)
class AnnealingSchedule:
    """Time steps of a training: cycles that each warm up the attach rate and descend the learning rate once.

    The attach rate of an epoch ``e`` of a time step, from 0, with ``w`` epochs of warm-up is
    ``min((e + 1) / (w + 1), 1)``: RepAn, equation 5 of the supplement, which prints ``max``; its text and code need
    ``min``.

    Args:
        time_steps: Number of time steps.
        epochs: Epochs of a time step.
        warmup_epochs: Epochs at the start of each time step in which the attach rate is below one.
        epochs_mul: Each time step is so many times as long as the one before it (timm's ``lr_cycle_mul``).
        prefix_epochs: Epochs before the first cosine descent, part of the first time step (timm's ``warmup_prefix``).
        cooldown_epochs: Epochs after the last descent, part of the last time step (timm's ``cooldown_epochs``).

    Raises:
        UserError: For numbers of epochs that are not whole, less than one time step or epoch, a warm-up that is not
            shorter than a time step, a factor below one, or a time step without an epoch of its own.
    """

    time_steps: int
    epochs: int
    warmup_epochs: int = 0
    epochs_mul: float = 1.0
    prefix_epochs: int = 0
    cooldown_epochs: int = 0

    def __post_init__(self) -> None:
        for name in ('time_steps', 'epochs', 'warmup_epochs', 'prefix_epochs', 'cooldown_epochs'):
            if not isinstance(getattr(self, name), numbers.Integral):
                raise UserError(f'{name} must be a whole number, got {getattr(self, name)!r}')
        if self.time_steps < 1:
            raise UserError(f'time_steps must be at least 1, got {self.time_steps}')
        if self.epochs < 1:
            raise UserError(f'a time step needs at least 1 epoch, got {self.epochs}')
        if not 0 <= self.warmup_epochs < self.epochs:
            raise UserError(
                f'the attach rate must warm up in less than the {self.epochs} epochs of a time step (RepAn: in less '
                f'than half of them), got {self.warmup_epochs}'
            )
        if not 1 <= self.epochs_mul < math.inf:
            raise UserError(
                f'time steps cannot become shorter: epochs_mul must be a number of at least 1, got {self.epochs_mul}')
        if min(self.prefix_epochs, self.cooldown_epochs) < 0:
            raise UserError(
                f'prefix_epochs and cooldown_epochs must not be negative, got {self.prefix_epochs} and '
                f'{self.cooldown_epochs}'
            )
        starts = self._starts()
        if len(set(starts)) < len(starts):
            raise UserError(
                f'epochs_mul {self.epochs_mul} of time steps of {self.epochs} epochs leaves one without an epoch of '
                'its own; take more epochs'
            )

    def _cycle(self, epoch: int) -> int:
        """Cycle of timm's schedule, by its own expression: its rounding may put a restart off by an epoch."""
        if self.epochs_mul == 1:
            return epoch // self.epochs
        return math.floor(math.log(1 - epoch / self.epochs * (1 - self.epochs_mul), self.epochs_mul))

    def _starts(self) -> List[int]:
        """First epoch of every time step, and of the cooldown."""
        starts = [0]
        for step in range(1, self.time_steps):
            starts.append(next(epoch for epoch in itertools.count(starts[-1]) if self._cycle(epoch) >= step))
        if self.epochs_mul == 1:
            starts.append(self.epochs * self.time_steps)
        else:  # timm's expression again
            starts.append(math.floor(
                -self.epochs * (self.epochs_mul ** self.time_steps - 1) / (1 - self.epochs_mul)))
        return [0, *(self.prefix_epochs + start for start in starts[1:])]

    @property
    def anneals(self) -> bool:
        """Whether it asks for side branches at all: it has several time steps, or warms up the attach rate."""
        return self.time_steps > 1 or self.warmup_epochs > 0

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole training."""
        return self._starts()[-1] + self.cooldown_epochs

    def position(self, epoch: int) -> Position:
        """Where an epoch lies.

        Args:
            epoch: Epoch of the whole training, from 0.

        Returns:
            Its place.

        Raises:
            UserError: If the training has no such epoch.
        """
        if not 0 <= epoch < self.total_epochs:
            raise UserError(f'epoch must lie in 0 to {self.total_epochs - 1}, got {epoch}')
        starts = self._starts()[:-1]
        time_step = max(step for step, start in enumerate(starts) if start <= epoch)
        within = epoch - starts[time_step]
        rate = min((within + 1) / (self.warmup_epochs + 1), 1.0)
        return Position(time_step, within, rate, within == 0)


def check_rep_layers(model: nn.Module) -> None:
    """Raise a UserError if a model has nothing to anneal."""
    if not any(annealed_modules(model)):
        raise UserError(f'{type(model).__name__} has no rep layers, so no side branches to anneal')


def check_restoration(restoration: str, side_gain: float) -> None:
    """Raise a UserError if this is no way to restore, or no gain."""
    if restoration not in RESTORATIONS:
        raise UserError(f'restoration must be one of {", ".join(RESTORATIONS)}, got {restoration!r}')
    if not math.isfinite(side_gain):
        raise UserError(f'side_gain must be a finite number, got {side_gain}')


def _the_one(model: nn.Module, what: str) -> Any:
    check_rep_layers(model)
    buffers = [getattr(module, what) for _, module in annealed_modules(model)]
    steps = [torch.finfo(buffer.dtype).eps if buffer.is_floating_point() else 0 for buffer in buffers]
    _, value = min(zip(steps, (buffer.item() for buffer in buffers)))  # the one of most digits
    if any(abs(buffer.item() - value) > max(steps) for buffer in buffers):
        values = sorted({buffer.item() for buffer in buffers})
        raise UserError(f'the rep layers are in different {what.replace("_", " ")}s: {values}')
    return value


def attach_rate(model: nn.Module) -> float:
    """The attach rate that is in force in a model; :func:`set_attach_rate` sets it.

    Args:
        model: Model with rep layers.

    Returns:
        Factor of the side branches, in [0, 1].

    Raises:
        UserError: If the model has no rep layers, or they have different rates.
    """
    rate: float = _the_one(model, 'attach_rate')
    return rate


def time_step(model: nn.Module) -> int:
    """The time step that a model is in, as saved with its weights; :func:`set_time_step` sets it.

    Args:
        model: Model with rep layers.

    Returns:
        Number of time steps that have begun before it.

    Raises:
        UserError: If the model has no rep layers, or they are not in the same time step.
    """
    number: int = _the_one(model, 'time_step')
    return number


def set_time_step(model: nn.Module, number: int) -> None:
    """Say which time step a model is in, without changing anything else.

    Args:
        model: Model with rep layers.
        number: Number of time steps that have begun before it.
    """
    for module in model.modules():  # those inside a block or a stack, too
        if isinstance(module, AnnealedModule):
            module.set_time_step_(number)


def _share_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Take over the state of the first process: kept statistics may differ, and then so do folded kernels."""
    backends = torch.distributed.get_backend_config()  # such as 'cpu:gloo,cuda:nccl'
    for tensor in tensors:
        shared = tensor
        if tensor.device.type == 'cpu' and 'cpu:' not in backends:  # an averaged copy on the CPU
            shared = tensor.to(torch.accelerator.current_accelerator())
        torch.distributed.broadcast(shared, src=0)
        tensor.copy_(shared)


@torch.no_grad()
def begin_time_step(
        model: nn.Module,
        generator: Optional[torch.Generator] = None,
        *,
        attach_rate: float = 0.0,
        compensate: bool = False,
        restoration: str = 'authors',
        side_gain: float = 1.0,
        batches: Iterable[Any] = (),
) -> None:
    """Fold every layer's branches, draw its side branches afresh, put the folded kernel into its origin branch.

    Works in place, in training and eval mode: the same parameters, the same shapes, nothing to recompile. An
    :class:`~timm_rep.core.annealer.Annealer` calls it when it is due; who calls it by hand forgets the optimizer's
    state afterwards (:func:`timm_rep.reset_optimizer`), and does the same, with a generator of the same seed, on an
    averaged copy of the model (EMA). In a distributed training call it on every process: all end up with the first
    one's weights. Parameters that ``fully_shard`` (FSDP2) has spread are whole for the time that their layer takes.

    Outputs in eval mode stay the same at every attach rate for linear (OREPA) layers, also inside RepVGG blocks. For
    layers with norms in their branches, and the 1x1 and identity of RepVGG blocks, they stay the same at rate zero, and
    with ``compensate`` or ``side_gain=0`` at every rate.

    In training mode, where batch statistics take the place of the kept ones, the outputs of linear layers stay the
    same. Elsewhere it depends on ``restoration``, which says how the folded kernel ``K`` is split between the origin
    branch's convolution and its norm, of gain ``g`` and kept mean and variance, with ``std = sqrt(var + eps)``:

    - ``'authors'`` (RepAn): ``g = 1``, the convolution is ``K * std``. All norms keep their statistics.
    - ``'keep_gain'`` (RepAn, RepVGG for CIFAR): ``g`` is what was learnt, the convolution ``K * std / g``.
    - ``'measured'``: then the model runs on the batches in eval mode, the norms take the statistics that they meet
      there, and ``g`` and the bias change with them. With ``side_gain=0``, or ``compensate``, training goes on where it
      was, if the running statistics are those of the weights: they lag behind where the learning rate is large.

    Source: RepAn, Rep - expansion - restoration.

    Args:
        model: Model with rep layers, also in wrappers (DDP, torch.compile).
        generator: Source of the draw, on the CPU.
        attach_rate: Rate in force afterwards, in [0, 1].
        compensate: Take what the fresh side branches add off the origin branches that have norms, too.
        restoration: ``'authors'``, ``'keep_gain'`` or ``'measured'``.
        side_gain: Gain of the last norms of fresh side branches; linear layers have none. From zero they grow by their
            own gradient.
        batches: For ``'measured'``: batches of images, or of images and targets, such as a loader; the first four are
            taken.

    Raises:
        UserError: If the model has no rep layers, for a seed in place of a generator, a rate outside [0, 1], an unknown
            restoration or a gain that is not finite, if there are no batches to measure on, or the model does not run
            on them or is sharded, in the middle of an update of micro-batches, if values are computed (pruning) or
            norms of branches replaced. It is then unchanged.
    """
    time_step(model)  # raises unless it is the same everywhere
    check_generator(generator)
    check_attach_rate(attach_rate)
    check_restoration(restoration, side_gain)
    check_no_update(model)
    for _, module in annealed_modules(model):
        module.check_parts()
    measured = first_batches(batches) if restoration == 'measured' else []
    reshard(model)
    if measured:
        check_whole(model)
        check_measurable(model, measured)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if measured and distributed:  # an averaged copy may have begun with other weights on each
        _share_from_first_rank(
            tensor for tensor in (*model.parameters(), *model.buffers())
            if tensor.is_floating_point() and tensor.itemsize > 1)  # no backend takes all kinds
    for _, module in annealed_modules(model):
        with whole_parameters(module):
            module.begin_time_step_(
                generator, attach_rate, compensate and not measured, restoration == 'keep_gain', side_gain)
            if distributed:
                _share_from_first_rank(module.state_dict().values())
    if measured:
        _measure(model, measured, attach_rate, compensate)
        if distributed:
            for _, module in annealed_modules(model):
                _share_from_first_rank(module.state_dict().values())


def _measure(model: nn.Module, batches: List[Tensor], rate: float, compensate: bool) -> None:
    """Measure the norms' statistics after a time step has begun that was not compensated."""
    modules = list(normed_modules(model))
    for module in modules:
        module.set_exact_rate_(rate, False)
    measure_statistics(model, batches, sides=True)
    if compensate:
        for module in modules:
            folded = module.compose_weight_bias()
            module.set_exact_rate_(rate, True)
            module.restore_(*folded)
        measure_statistics(model, batches, sides=False)
    for module in modules:
        module.set_attach_rate_(rate)
