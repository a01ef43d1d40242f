"""What happens around the epochs of timm's training."""
import argparse
import csv
import logging
from pathlib import Path
from typing import Any, Dict, MutableMapping, Optional

import torch
import torch.nn as nn
from timm.utils import is_primary, random_seed, unwrap_model

from ..core.annealer import Annealer
from ..core.annealing import AnnealingSchedule, Position, time_step
from ..core.branch_log import BranchLog
from ..io.weights import load_training_form
from .arguments import output_folder
from .resume import drop_rows, epoch_of, newest_checkpoint
from .snapshots import save_snapshots

__all__ = ['AnnealedEpochs']

_logger = logging.getLogger('train')  # timm's

# Arguments that give a model weights to start from.
START_ARGS = ('pretrained', 'initial_checkpoint', 'pretrained_path')
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


def _models(call: Dict[str, Any]) -> Dict[str, nn.Module]:
    """The models of an epoch, by what goes behind the name of their snapshots."""
    task = call.get('task')
    model, averaged = call['model'], call.get('model_ema')
    if task is not None:  # from timm 1.0.23 on
        model = task.get_eval_model() if hasattr(task, 'get_eval_model') else model
        averaged = task.get_eval_model(ema=True) if hasattr(task, 'has_ema') and task.has_ema() else averaged
    forms = {'': model} if averaged is None else {'': model, '-ema': averaged}
    return {suffix: unwrap_model(form) for suffix, form in forms.items()}


class AnnealedEpochs:
    """Anneals around the epochs of timm's training, and keeps its files as if it had never been interrupted.

    Args:
        args: timm's arguments with the wrapper's.
        schedule: The time steps.
    """

    def __init__(self, args: argparse.Namespace, schedule: AnnealingSchedule) -> None:
        self.args = args
        self.schedule = schedule
        self.total_epochs = schedule.total_epochs  # as timm counts them, which may be others without restarts
        self._folder: Optional[Path] = None
        self._forms: Dict[str, nn.Module] = {}  # once an epoch has begun
        self._annealer: Optional[Annealer] = None
        self._branches: Optional[BranchLog] = None
        self._epoch: Optional[int] = None

    def begin(self, call: Dict[str, Any]) -> Optional[Position]:
        """Do what comes before an epoch of timm's.

        Args:
            call: Arguments of ``train_one_epoch``, by name.

        Returns:
            The epoch's place in the schedule; None if nothing is annealed.
        """
        epoch, args = call['epoch'], self.args
        # All that is random follows from seed and epoch, so that a resumed run goes on as if never stopped.
        random_seed((args.seed + EPOCH_SEED_STRIDE * epoch) % MAX_SEED, getattr(args, 'rank', 0))
        _restart_workers(call.get('loader'))
        if call.get('output_dir') is not None:
            self._folder = Path(call['output_dir'])
            for name in ROW_FILES:
                drop_rows(self._folder / name, epoch)
        if not self._forms:
            self._begin_run(call)
        return None if self._annealer is None else self._anneal(self._annealer, epoch)

    def _begin_run(self, call: Dict[str, Any]) -> None:
        """Do what comes before the first epoch that this process trains."""
        args = self.args
        self._forms = forms = _models(call)
        if args.resume:
            self._recall_best(call.get('saver'))
        if args.log_branches:
            self._branches = BranchLog(forms[''], call['optimizer'])
        if not self.schedule.anneals:
            return
        model, *averaged = forms.values()
        given = not args.resume and any(getattr(args, name, None) for name in START_ARGS)
        self._annealer = Annealer(
            model, call['optimizer'], self.schedule, averaged=averaged, seed=args.seed, compensate=args.compensate,
            imply_statistics=args.imply_statistics, start_weights=given)
        if not args.resume:
            self._annealer.start(self._scheduled(call['epoch']))
        if given and is_primary(args):
            _logger.info('The weights to start from are folded, with fresh side branches and the same outputs')

    def _scheduled(self, epoch: int) -> int:
        return min(epoch, self.schedule.total_epochs - 1)

    def _anneal(self, annealer: Annealer, epoch: int) -> Position:
        begun, position = time_step(self._forms['']), self.schedule.position(self._scheduled(epoch))
        if begun < position.time_step and position.begins and self._folder is not None:
            save_snapshots(self._folder, begun, self._forms, self.args)
        annealer.begin_epoch(self._scheduled(epoch))
        if is_primary(self.args):
            drawn = ', side branches drawn afresh' if begun < position.time_step else ''
            _logger.info(
                f'Time step {position.time_step + 1} of {self.schedule.time_steps}{drawn}; attach rate '
                f'{position.attach_rate:.3g}'
            )
        return position

    def _recall_best(self, saver: Any) -> None:
        """Let timm's saver know which checkpoint of the run was the best, where it can tell."""
        recall = getattr(saver, 'load_state_dict_from_checkpoint', None)
        resumed = Path(self.args.resume)
        if recall is not None and saver.best_metric is None and resumed.parent.samefile(saver.checkpoint_dir):
            recall(resumed)

    def end(self, epoch: int, position: Optional[Position], metrics: MutableMapping[str, Any]) -> None:
        """Do what comes after an epoch of timm's.

        Args:
            epoch: The epoch.
            position: As :meth:`begin` gave it.
            metrics: What timm measured, which it writes to summary.csv, and to wandb where it logs there; changed in
                place.
        """
        self._epoch = epoch
        if self._branches is not None:
            rows = self._branches.take_rows(epoch)
            if rows and self._folder is not None:
                self._write_rows(self._folder / BRANCH_FILE, rows)
        if position is not None:
            metrics.update(time_step=position.time_step, attach_rate=position.attach_rate)

    @staticmethod
    def _write_rows(path: Path, rows: Any) -> None:
        new = not path.exists()
        with path.open('a', newline='') as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)

    def finish(self) -> None:
        """Tidy the files, and keep the weights of the last time step if the training came to its end."""
        folder = self._folder or output_folder(self.args)
        if folder is None:
            return
        for name in ROW_FILES:
            drop_rows(folder / name, self.total_epochs)
        if not self.schedule.anneals:
            return
        forms = self._forms
        if not forms:  # nothing was left to train: the run ended before, perhaps before it kept the weights
            last = newest_checkpoint(folder)
            if last is None or epoch_of(last) != self.total_epochs - 1:
                return
            forms = {'': load_training_form(last)}
            if getattr(self.args, 'model_ema', False):
                forms['-ema'] = load_training_form(last, use_ema=True)
        elif self._epoch != self.total_epochs - 1:  # interrupted by hand
            return
        save_snapshots(folder, self.schedule.time_steps - 1, forms, self.args)
