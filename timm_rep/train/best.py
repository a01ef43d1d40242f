"""The best epoch of a time step, for the next one to start from."""
import argparse
import math
import shutil
from pathlib import Path
from typing import List, Mapping, Optional

import torch
import torch.nn as nn

from ..core.annealing import AnnealingSchedule
from ..core.errors import UserError
from ..io.checkpoint import read_checkpoint
from ..io.output import written_whole
from ..io.runs import read_summary
from .arguments import output_folder

__all__ = ['check_best', 'keep_resumed', 'take_best']

TEST_ONLY = ('cifar', 'mnist')  # data sets of torchvision whose one other split is the test set


def check_best(args: argparse.Namespace, schedule: AnnealingSchedule) -> None:
    """Refuse to choose an epoch where none can be chosen, or only by the test set.

    Args:
        args: timm's arguments with the wrapper's.
        schedule: The time steps.

    Raises:
        UserError: If that is so.
    """
    if not args.start_from_best:
        return
    split, dataset = args.val_split, args.dataset or ''  # which a config file may leave empty
    if not split or 'test' in split or (dataset.startswith('torch/') and any(name in dataset for name in TEST_ONLY)):
        raise UserError(
            f'--start-from-best chooses by images that are neither trained on nor the test set, and --val-split '
            f"{split or '(none)'} of {dataset or 'the folder'} are not such; hold some of the training's back, as in "
            "--train-split 'train[:45000]' --val-split 'train[45000:]' (tfds/, hfds/), or in a folder of their own")
    if args.checkpoint_hist < schedule.total_epochs:
        raise UserError(
            f'--start-from-best needs the checkpoints of all {schedule.total_epochs} epochs: --checkpoint-hist '
            f'{schedule.total_epochs}, got {args.checkpoint_hist}')
    folder = output_folder(args)
    if args.resume and (folder is None or Path(args.resume).resolve().parent != folder.resolve()):
        raise UserError(f'--start-from-best goes on in the folder of its run, {Path(args.resume).parent}, only')


def _checkpoint(folder: Path, epoch: int) -> Path:
    return folder / f'checkpoint-{epoch}.pth.tar'


def keep_resumed(path: Path) -> None:
    """Make up for a checkpoint that a run did not come to keep: it was killed when it had written ``last`` only.

    Args:
        path: The checkpoint that is gone on from, in the folder of the run.
    """
    epoch = read_checkpoint(path).epoch
    kept = None if epoch is None else _checkpoint(path.parent, epoch)
    if kept is not None and kept != path:
        with written_whole(kept, replace=True, follow=False) as temporary:
            shutil.copyfile(path, temporary)


def _best_checkpoint(folder: Path, first: int, end: int, metric: str) -> Optional[str]:
    figures = {int(row['epoch']): row.get(f'eval_{metric}', math.nan) for row in read_summary(folder / 'summary.csv')}
    sign = -1 if metric == 'loss' else 1  # as timm has it
    known = [epoch for epoch in range(first, end) if math.isfinite(figures.get(epoch, math.nan))]
    return str(_checkpoint(folder, max(known, key=lambda epoch: sign * figures[epoch]))) if known else None


def take_best(forms: Mapping[str, nn.Module], folder: Optional[Path], first: int, end: int, metric: str) -> None:
    """Put the weights of the best of some epochs into the models, on every process of a distributed training.

    Args:
        forms: Models in training form by what goes behind the name of their weights: '' and '-ema'.
        folder: Output folder of the run; None on processes that do not write.
        first: First epoch to choose from.
        end: The epoch after the last.
        metric: Figure to choose by; the first of equals is taken.

    Raises:
        OSError: If there is no such checkpoint.
    """
    chosen: List[Optional[str]] = [None if folder is None else _best_checkpoint(folder, first, end, metric)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(chosen)
    if chosen[0] is not None:
        for suffix, form in forms.items():
            form.load_state_dict(read_checkpoint(chosen[0], use_ema=bool(suffix)).state_dict)
