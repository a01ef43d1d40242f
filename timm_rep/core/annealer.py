"""One object that anneals a model around the epochs of any training loop."""
import logging
from typing import Any, Dict, Iterable, List, Optional, Union
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, finalize, ref

import torch
import torch.nn as nn

from .annealing import (
    AnnealingSchedule,
    Position,
    begin_time_step,
    check_rep_layers,
    check_restoration,
    set_attach_rate,
    set_time_step,
    time_step,
)
from .branch_log import BranchLog
from .errors import UserError
from .freeze import OriginFreeze
from .layers import AnnealedModule
from .measure import first_batches
from .optimizers import reset_optimizer
from .walk import unwrapped

__all__ = ['Annealer']

_logger = logging.getLogger(__name__)

# By optimizer and model: whose hooks are in force.
_IN_FORCE: 'WeakKeyDictionary[Any, WeakKeyDictionary[nn.Module, ReferenceType[Annealer]]]' = WeakKeyDictionary()


def _release(parts: Iterable[Union[OriginFreeze, BranchLog]]) -> None:
    """Take the hooks of an annealer off its optimizer, which takes up what they kept frozen."""
    for part in parts:
        if isinstance(part, OriginFreeze) and part.active:
            part.thaw()
            _logger.warning(
                'an annealer is gone that kept origin branches frozen: they are trained until another one freezes '
                'them. Keep it for the whole training')
        for handle in part.handles:
            handle.remove()


class Annealer:
    """Anneals a model in time steps: a call before each epoch of a training, and one after it.

    Which time steps have begun is saved with the model's weights, and the draw of side branches follows from the seed:
    a training that is resumed from a checkpoint, with weights and optimizer as they were at the end of an epoch, goes
    on as if it had never stopped.

    Keep it for the whole training: origin branches are frozen no longer than it lives, or until another annealer of the
    same model and optimizer begins an epoch.

    Args:
        model: Model with rep layers, also in wrappers (DDP, torch.compile); any model if the schedule has a single time
            step without warm-up, which leaves it alone.
        optimizer: Its optimizer, of torch or timm.
        schedule: The time steps.
        averaged: Averaged copies of the model (EMA): they take every step with it, with the same draw.
        seed: Of the side branches' draw, on every process.
        compensate: As in :func:`~timm_rep.core.annealing.begin_time_step`.
        restoration: As in :func:`~timm_rep.core.annealing.begin_time_step`.
        side_gain: As in :func:`~timm_rep.core.annealing.begin_time_step`.
        batches: For ``restoration='measured'``: what :func:`~timm_rep.core.annealing.begin_time_step` takes, such as
            the training loader.
        freeze_origin: While the attach rate is below one, the origin branches stand still, kernels, scales and the
            gains and biases of their norms: RepAn does it where it starts from a trained network, so the first time
            step does it with ``start_weights`` only.
        start_weights: The model holds weights to start from. Before epoch 0 they are folded, and the side branches
            drawn afresh, at the attach rate of that epoch and with the same outputs in eval mode. Otherwise weights are
            taken to be fresh, or those of a training that is resumed.
        log_branches: Note the gradient magnitude of every branch.

    Attributes:
        history: A dict for each epoch that has ended: ``epoch``, ``time_step``, both counted from 0, ``attach_rate``,
            ``lr`` with which the epoch began, and the figures that were given to :meth:`end_epoch`. The figures of
            ``timm_rep.report.plots`` are drawn from it. A training that is resumed may put back what it has saved.
        branch_rows: A dict for each epoch and branch, as :class:`~timm_rep.core.branch_log.BranchLog` gives it.

    Raises:
        UserError: If the model or an averaged copy has no rep layers, for anything but one optimizer, for an unknown
            restoration or gain, or if there are no batches to measure on.
    """

    def __init__(
            self,
            model: nn.Module,
            optimizer: Any,
            schedule: AnnealingSchedule,
            *,
            averaged: Iterable[nn.Module] = (),
            seed: int = 0,
            compensate: bool = False,
            restoration: str = 'authors',
            side_gain: float = 1.0,
            batches: Optional[Iterable[Any]] = None,
            freeze_origin: bool = False,
            start_weights: bool = False,
            log_branches: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.schedule = schedule
        self.seed = seed
        self.compensate = compensate
        self.restoration = restoration
        self.side_gain = side_gain
        self.batches = batches
        self.start_weights = start_weights
        self.history: List[Dict[str, Any]] = []
        self.branch_rows: List[Dict[str, Any]] = []
        if isinstance(averaged, nn.Module):
            raise UserError(f'averaged copies come in a list, got a {type(averaged).__name__}; averaged=[ema.module]')
        self._forms = [model, *averaged]
        self._begun: Optional[Dict[str, Any]] = None
        self._starts_trained = start_weights
        self._freeze: Optional[OriginFreeze] = None
        self._is_replaced = False
        check_restoration(restoration, side_gain)
        if not hasattr(optimizer, 'param_groups'):
            raise UserError(
                f'the annealer takes one optimizer of torch or timm, got a {type(optimizer).__name__}; where there are '
                'several, give it one, and where begin_epoch() returns a position that begins a time step, call '
                'timm_rep.reset_optimizer() with each of the others')
        if restoration == 'measured' and batches is None:
            raise UserError("restoration 'measured' needs batches of images, such as batches=train_loader")
        if schedule.anneals:
            for form in self._forms:
                check_rep_layers(form)
        self._branches = BranchLog(model, optimizer) if log_branches else None  # reads before gradients are dropped
        if schedule.anneals and freeze_origin:
            self._freeze = OriginFreeze(model, optimizer)
        self._hooked = [part for part in (self._freeze, self._branches) if part is not None]
        finalize(self, _release, WeakSet(self._hooked)).atexit = False  # the optimizer holds them by their hooks

    def _take_over(self) -> None:
        """Release the optimizer from another annealer of the model."""
        in_force = _IN_FORCE.setdefault(self.optimizer, WeakKeyDictionary())
        model = unwrapped(self._forms[0])
        former = in_force[model]() if model in in_force else None
        if former is not None and former is not self:
            if former._freeze is not None and self._freeze is not None:  # this one goes on with it
                self._freeze.active, former._freeze.active = former._freeze.active, False
            former._is_replaced = bool(former._hooked)
            _release(former._hooked)
        in_force[model] = ref(self)

    def _time_step(self) -> int:
        """The time step that the model and its averaged copies are in."""
        numbers = {time_step(form) for form in self._forms}
        if len(numbers) > 1:
            raise UserError(f'the model and its averaged copies are in different time steps: {sorted(numbers)}')
        return numbers.pop()

    def begin_epoch(self, epoch: int) -> Position:
        """Do what comes before an epoch: set the attach rate, and begin a time step if one is due.

        Where a time step begins every branch is folded, the side branches are drawn afresh, and the optimizer starts
        anew with the parameters and the learning rate that it has.

        Args:
            epoch: Epoch of the whole training, from 0.

        Returns:
            Its place in the schedule.

        Raises:
            UserError: If the training has no such epoch, the model is in a later time step than the epoch, its modules
                or averaged copies are in different ones, or another annealer took the place of this one.
        """
        position = self.schedule.position(epoch)
        if self._is_replaced:
            raise UserError(
                'another annealer of the same model and optimizer has begun an epoch since, and took the place of this '
                'one, whose origin branches are not frozen and whose gradients are not noted any more')
        if self.schedule.anneals:
            if epoch == 0 and self.start_weights:
                self.start(epoch)
            begun = self._time_step()
            if begun > position.time_step:
                raise UserError(
                    f'epoch {epoch} lies in time step {position.time_step + 1}, the model is in {begun + 1} already; '
                    'for weights to start from, say start_weights=True'
                )
            for number in range(begun + 1, position.time_step + 1):
                self._begin_time_step(number, position.attach_rate, self.compensate)
                reset_optimizer(self.optimizer)
            for form in self._forms:
                set_attach_rate(form, position.attach_rate)
        self._take_over()
        if self._freeze is not None:
            grows, was_frozen = position.time_step > 0 or self._starts_trained, self._freeze.active
            self._freeze.active = grows and position.attach_rate < 1
            ends = grows and position.epoch == self.schedule.warmup_epochs > 0
            if ends or (was_frozen and not self._freeze.active):
                self._freeze.thaw()
        self._begun = dict(
            epoch=epoch, time_step=position.time_step, attach_rate=position.attach_rate,
            lr=self.optimizer.param_groups[0]['lr'])
        return position

    def start(self, epoch: int) -> None:
        """Let a new training start with an epoch, whatever time step the weights come from.

        :meth:`begin_epoch` does it by itself where weights to start from meet epoch 0.

        Args:
            epoch: Its first epoch.

        Raises:
            UserError: If the training has no such epoch.
        """
        position = self.schedule.position(epoch)
        if self.start_weights:
            modules = [part for form in self._forms for part in form.modules() if isinstance(part, AnnealedModule)]
            numbers = [int(module.time_step) for module in modules]
            for form in self._forms:
                set_time_step(form, 0)
            try:
                self._begin_time_step(position.time_step, position.attach_rate, compensate=True)
            except Exception:
                for module, number in zip(modules, numbers):
                    module.set_time_step_(number)
                raise
            self.start_weights = False
        for form in self._forms:
            set_time_step(form, position.time_step)

    def _begin_time_step(self, number: int, attach_rate: float, compensate: bool) -> None:
        batches = first_batches(() if self.batches is None else self.batches) if self.restoration == 'measured' else []
        for form in self._forms:
            generator = torch.Generator().manual_seed(self.seed + number)  # the same for all copies and processes
            begin_time_step(
                form, generator, attach_rate=attach_rate, compensate=compensate, restoration=self.restoration,
                side_gain=self.side_gain, batches=batches)

    def end_epoch(self, **figures: Any) -> Dict[str, Any]:
        """Note an epoch that has ended in :attr:`history`, and the gradients of its branches.

        Args:
            **figures: What was measured, by the names of timm's summary.csv: ``train_loss``, ``eval_loss``,
                ``eval_top1`` ...

        Returns:
            The row of the epoch. It takes the place of rows of the same epoch and later ones.

        Raises:
            UserError: If no epoch has begun.
        """
        if self._begun is None:
            raise UserError('no epoch has begun: call begin_epoch before end_epoch')
        row, self._begun = dict(self._begun, **figures), None
        for rows in (self.history, self.branch_rows):
            rows[:] = [earlier for earlier in rows if earlier['epoch'] < row['epoch']]
        self.history.append(row)
        if self._branches is not None:
            self.branch_rows += self._branches.take_rows(row['epoch'])
        return row
