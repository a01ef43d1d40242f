"""What happens around the epochs of timm's training."""
import argparse
import csv
import functools
import inspect
import logging
import math
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence

import torch
import torch.nn as nn
from timm.utils import is_primary, random_seed, unwrap_model

from ..core.annealer import Annealer
from ..core.annealing import AnnealingSchedule, Position, time_step
from ..core.branch_log import BranchLog
from ..core.capture import capture, linear_layers
from ..io.weights import load_training_form
from .accumulate import MicroBatches
from .arguments import output_folder
from .best import keep_resumed, take_best
from .lock import RunLock
from .resume import drop_rows, epoch_of, go_back, newest_checkpoint, replay_plateau
from .snapshots import save_snapshots

__all__ = ['AnnealedEpochs']

_logger = logging.getLogger('train')  # timm's

BRANCH_FILE = 'branch_gradients.csv'
ROW_FILES = ('summary.csv', BRANCH_FILE)
# The epochs' seeds must not meet those of other ranks, which timm counts up from the run's.
EPOCH_SEED_STRIDE = 10_007
MAX_SEED = 2 ** 32


def _restart_workers(loader: Any) -> None:
    """Let worker processes that timm keeps through all epochs start anew, from the seed that is set now."""
    loader = getattr(loader, 'loader', loader)  # inside timm's prefetcher
    if isinstance(loader, torch.utils.data.DataLoader) and loader.persistent_workers:
        loader._iterator = None


def _is_captured(args: argparse.Namespace, model: nn.Module, optimizer: Any) -> bool:
    """Whether the composition of a model becomes a CUDA graph: as asked for, else where that was measured to win."""
    if args.capture is not None:
        return bool(args.capture)
    return (
        next(model.parameters()).device.type == 'cuda'
        and torch.version.hip is None  # nobody has measured it there
        and not getattr(args, 'distributed', False)
        and getattr(args, 'torchcompile', None) is None
        and not getattr(optimizer, 'is_second_order', False)
        and bool(linear_layers(model))
    )


def _models(call: Dict[str, Any]) -> Dict[str, nn.Module]:
    """The models of an epoch, by what goes behind the name of their snapshots."""
    task = call.get('task')
    if task is None:  # before timm 1.0.23
        model, averaged = call['model'], call['model_ema']
    else:
        model = task.get_eval_model() if hasattr(task, 'get_eval_model') else call['model']
        averaged = task.get_eval_model(ema=True) if hasattr(task, 'has_ema') and task.has_ema() else None
    return {suffix: unwrap_model(form) for suffix, form in (('', model), ('-ema', averaged)) if form is not None}


def _owners_of_generators(call: Dict[str, Any]) -> Iterator[Any]:
    """What may draw from a generator of its own, which no checkpoint holds: AdaHessian, averages in bfloat16."""
    yield call['optimizer']
    yield getattr(call['optimizer'], '_base_optimizer', None)  # in Lookahead
    for owner in (call.get('task'), call.get('model_ema')):
        if isinstance(owner, nn.Module):
            yield from owner.modules()


class AnnealedEpochs:
    """Anneals around the epochs of timm's training, and keeps its files as if it had never been interrupted.

    Args:
        args: timm's arguments with the wrapper's.
        schedule: The time steps.
        lock: Holds the output folder, or will once timm has named it.
    """

    def __init__(self, args: argparse.Namespace, schedule: AnnealingSchedule, lock: Optional[RunLock] = None) -> None:
        self.args = args
        self.schedule = schedule
        self._lock = RunLock() if lock is None else lock
        self._folder = output_folder(args)
        self._forms: Dict[str, nn.Module] = {}  # once an epoch has begun
        self._annealer: Optional[Annealer] = None
        self._branches: Optional[BranchLog] = None
        self._epoch: Optional[int] = None

    def around(self, train_one_epoch: Callable[..., Any]) -> Callable[..., Any]:
        """Put time steps around an epoch.

        Args:
            train_one_epoch: timm's.

        Returns:
            A function that takes the same arguments, and gives what timm measured with its place in the schedule.
        """
        signature = inspect.signature(train_one_epoch)

        @functools.wraps(train_one_epoch)
        def annealed_epoch(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            epoch = bound.arguments['epoch']
            position = self._begin(epoch, bound.arguments)
            steps = getattr(self.args, 'grad_accum_steps', 1)
            if steps > 1 and not getattr(bound.arguments['optimizer'], 'is_second_order', False):
                bound.arguments['loader'] = MicroBatches(bound.arguments['loader'], self._forms[''], steps)
            metrics = train_one_epoch(*bound.args, **bound.kwargs)
            self._epoch = epoch
            if self._branches is not None and self._folder is not None:
                _append_rows(self._folder / BRANCH_FILE, self._branches.take_rows(epoch))
            if position is not None:  # timm writes it to summary.csv, and to wandb where it logs there
                metrics.update(time_step=position.time_step, attach_rate=position.attach_rate)
            return metrics

        return annealed_epoch

    def _begin(self, epoch: int, call: Dict[str, Any]) -> Optional[Position]:
        """Do what comes before an epoch; its place in the schedule, None if nothing is annealed."""
        args = self.args
        seed = (args.seed + EPOCH_SEED_STRIDE * epoch) % MAX_SEED
        self._seed(seed, call)
        mixup_off = getattr(args, 'mixup_off_epoch', 0)
        if mixup_off and epoch >= mixup_off and getattr(call['loader'], 'mixup_enabled', False):
            call['loader'].mixup_enabled = False  # as timm is about to, for what is measured before
        self._folder = None if call['output_dir'] is None else Path(call['output_dir'])
        if self._folder is not None:
            self._lock.take(self._folder)
            resumed = Path(args.resume or '')
            if not self._forms and resumed.is_file() and resumed.parent.samefile(self._folder):
                go_back(resumed, epoch)
        self._tidy(epoch)
        # timm's rounding of cycles may have an epoch more
        epoch = min(epoch, self.schedule.total_epochs - 1)
        if not self._forms:
            self._begin_run(epoch, call)
        if self._annealer is None:
            return None
        begun, position = time_step(self._forms['']), self.schedule.position(epoch)
        if begun < position.time_step and position.begins:
            self._end_time_step(begun, epoch)
        self._annealer.begin_epoch(epoch)
        self._seed(seed, call)  # what was measured leaves no trace
        if is_primary(self.args):
            drawn = ', side branches drawn afresh' if begun < position.time_step else ''
            _logger.info(
                f'Time step {position.time_step + 1} of {self.schedule.time_steps}{drawn}; attach rate '
                f'{position.attach_rate:.3g}'
            )
        return position

    def _seed(self, seed: int, call: Dict[str, Any]) -> None:
        """Let all that is random in an epoch follow from its seed: a resumed run goes on as if never stopped."""
        random_seed(seed, getattr(self.args, 'rank', 0))
        _restart_workers(call['loader'])
        for owner in _owners_of_generators(call):
            for name, value in getattr(owner, '__dict__', {}).items():
                if isinstance(value, torch.Generator):
                    value.manual_seed(seed)  # the same on all processes
                    if name == 'generator':
                        owner.seed = seed  # of the one that AdaHessian makes where the parameters are

    def _tidy(self, epoch: float = math.inf) -> None:
        """Take rows of an epoch and later ones out of the run's files, and what an interruption left."""
        if self._folder is not None:
            for name in ROW_FILES:
                drop_rows(self._folder / name, epoch)

    def _begin_run(self, epoch: int, call: Dict[str, Any]) -> None:
        """Do what comes before the first epoch that this process trains."""
        args = self.args
        self._forms = _models(call)
        model, *averaged = self._forms.values()
        saver: Any = call.get('saver')
        recall_best = getattr(saver, 'load_state_dict_from_checkpoint', None)  # from timm 1.0.31 on
        if args.resume and recall_best is not None and saver.best_metric is None:
            if Path(args.resume).parent.samefile(saver.checkpoint_dir):
                recall_best(Path(args.resume))
        if args.resume:
            replay_plateau(call.get('lr_scheduler'), args, epoch)
        if _is_captured(args, model, call['optimizer']):
            capture(model)
        if args.log_branches:
            self._branches = BranchLog(model, call['optimizer'])
        if not self.schedule.anneals:
            return
        trained = any(getattr(args, name, None) for name in ('pretrained', 'initial_checkpoint'))  # what it began with
        self._annealer = Annealer(
            model, call['optimizer'], self.schedule, averaged=averaged, seed=args.seed, compensate=args.compensate,
            restoration=args.restoration, side_gain=args.side_gain, batches=call['loader'],
            freeze_origin=args.freeze_origin, start_weights=trained)
        if not args.resume:
            self._annealer.start(epoch)
            return
        self._annealer.start_weights = False  # the run has folded them
        if args.start_from_best and self._folder is not None:
            keep_resumed(Path(args.resume))

    def _end_time_step(self, number: int, end: int) -> None:
        """Keep the weights of a time step, those of its best epoch if that is asked for; ``end`` is the one after."""
        if self.args.start_from_best:
            first = end - 1 - self.schedule.position(end - 1).epoch
            take_best(self._forms, self._folder, first, end, self.args.eval_metric)
        if self._folder is not None:
            save_snapshots(self._folder, number, self._forms, self.args)

    def finish(self) -> None:
        """Tidy the files, and keep the weights of the last time step if the training came to its end."""
        self._tidy()
        if self._folder is None or not self.schedule.anneals:
            return
        epoch = self._epoch
        if epoch is None:  # nothing was left to train: the run ended before, perhaps before it kept the weights
            last = newest_checkpoint(self._folder)
            if last is None:
                return
            epoch = epoch_of(last)
            self._forms = {'': load_training_form(last)}
            if getattr(self.args, 'model_ema', False):
                self._forms['-ema'] = load_training_form(last, use_ema=True)
        if epoch is not None and epoch >= self.schedule.total_epochs - 1:  # not interrupted by hand
            self._end_time_step(self.schedule.time_steps - 1, self.schedule.total_epochs)


def _append_rows(path: Path, rows: Sequence[Dict[str, Any]]) -> None:
    if not rows:
        return
    new = not path.exists()
    with path.open('a', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
