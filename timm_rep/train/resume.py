"""Go on with a run as if it had never stopped: its newest whole checkpoint, and its files as they were then."""
import argparse
import csv
import logging
import os
from pathlib import Path
from typing import Any, List, Mapping, Optional

import torch
import yaml

from ..core.annealing import AnnealingSchedule
from ..core.errors import UserError
from ..io.checkpoint import read_checkpoint
from ..io.runs import complete_rows
from .arguments import output_folder, output_root

__all__ = ['drop_rows', 'epoch_of', 'find_run', 'newest_checkpoint']

_logger = logging.getLogger('train')  # timm's

# A checkpoint can be resumed only by a run that agrees in these.
RUN_SETTINGS = (
    'model', 'time_steps', 'epochs', 'attach_warmup_epochs', 'compensate', 'imply_statistics', 'seed', 'sched',
    'lr_cycle_mul', 'lr_cycle_decay', 'warmup_prefix', 'cooldown_epochs')
# ... and in this, if the warm-up of the learning rate comes before the first time step's descent.
PREFIX_SETTING = 'warmup_epochs'
CHECKPOINT_SUFFIX = '.pth.tar'
# Weights that a run leaves besides the checkpoints to go on from.
KEPT_FILES = (f'model_best{CHECKPOINT_SUFFIX}', 'time_step-*.safetensors')
RUN_FILES = ('args.yaml', 'summary.csv', f'*{CHECKPOINT_SUFFIX}', 'time_step-*.safetensors', 'branch_gradients.csv')
SHOWN_CANDIDATES = 5


def epoch_of(path: Path) -> Optional[int]:
    """Epoch of a checkpoint of timm's, or None if the file is not whole."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            epoch: int = torch.load(path, map_location='cpu', weights_only=True, mmap=True)['epoch']
            return epoch
    except Exception as e:  # the unpickler raises all sorts of errors on arbitrary bytes
        _logger.warning(f'{path} is not a whole checkpoint: {e}')
        return None


def _checkpoints(folder: Path) -> List[Path]:
    """Checkpoints that timm writes at the end of an epoch, the latest written first."""
    older = folder.glob(f'checkpoint-*{CHECKPOINT_SUFFIX}')
    paths = [folder / f'{name}{CHECKPOINT_SUFFIX}' for name in ('last', 'tmp')]  # tmp becomes last once it is written
    paths += sorted(older, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return [path for path in paths if path.is_file()]


def newest_checkpoint(folder: Path) -> Optional[Path]:
    """The newest whole checkpoint at the end of an epoch in a run's folder.

    A process that is killed while it writes leaves a checkpoint that is cut off, or none under its usual name.

    Args:
        folder: Output folder of a run.

    Returns:
        Its path, or None. Recovery checkpoints, from within an epoch, do not count.
    """
    return next((path for path in _checkpoints(folder) if epoch_of(path) is not None), None)


def _candidates(root: Path) -> str:
    """The runs in a folder that could be gone on with, in words, the latest first."""
    found = [(checkpoints[0].stat().st_mtime_ns, checkpoints[0].parent.name)
             for folder in (root.iterdir() if root.is_dir() else ()) if (checkpoints := _checkpoints(folder))]
    names = [name for _, name in sorted(found, reverse=True)]
    if not names:
        return f'{root} holds none'
    more = ' ...' if len(names) > SHOWN_CANDIDATES else ''
    return f'{root} holds {", ".join(names[:SHOWN_CANDIDATES])}{more}'


def _check_same_settings(args: argparse.Namespace, settings: Mapping[str, Any], where: Path) -> None:
    if settings and 'time_steps' not in settings:  # a run without the wrapper
        settings = dict(settings, time_steps=1, attach_warmup_epochs=0)
    names = (*RUN_SETTINGS, PREFIX_SETTING) if getattr(args, 'warmup_prefix', False) else RUN_SETTINGS
    for name in names:
        there, here = settings.get(name), getattr(args, name, None)
        if name in settings and there != here:
            option = f'--{name.replace("_", "-")}'
            raise UserError(
                f'{where} is of a run with {option} {there}, this one has {option} {here}; to start a new run from its '
                'weights take --initial-checkpoint and another --experiment'
            )


def _read_args_file(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _find_automatically(args: argparse.Namespace, folder: Optional[Path]) -> str:
    """The checkpoint that ``--resume auto`` goes on from, '' if the run is new."""
    if folder is None:
        raise UserError(
            '--resume auto goes on with the run of one folder: name it with --experiment; '
            + _candidates(output_root(args)))
    found = newest_checkpoint(folder)
    if found is not None:
        return str(found)
    damaged = [path.name for path in _checkpoints(folder) if path.name != f'tmp{CHECKPOINT_SUFFIX}']
    if damaged:
        raise UserError(f'no checkpoint in {folder} is whole: {", ".join(damaged)}. Nothing was changed')
    kept = [path.name for pattern in KEPT_FILES for path in sorted(folder.glob(pattern))]
    if kept:
        raise UserError(
            f'{folder} holds the weights of a run ({", ".join(kept)}) but no checkpoint to go on from; to start a new '
            'run from them take --initial-checkpoint and another --experiment. Nothing was changed'
        )
    _check_same_settings(args, _read_args_file(folder / 'args.yaml'), folder)
    return ''


def _check_checkpoint(args: argparse.Namespace, schedule: AnnealingSchedule) -> None:
    path = Path(args.resume)
    if path.is_dir():
        raise UserError(f'--resume takes a checkpoint file or auto, got the folder {path}')
    try:
        checkpoint = read_checkpoint(path)
    except (OSError, UserError) as e:
        raise UserError(f'--resume: {e}') from None
    _check_same_settings(args, checkpoint.args, path)
    if not schedule.anneals:
        return
    if args.start_epoch is not None:
        start = args.start_epoch
    elif checkpoint.epoch is not None:
        start = checkpoint.epoch + 1
    else:
        raise UserError(f'{path} does not say of which epoch it is; say where to go on with --start-epoch')
    time_step = max((int(v) for k, v in checkpoint.state_dict.items() if k.endswith('.time_step')), default=0)
    if start < schedule.total_epochs and schedule.position(start).time_step < time_step:
        raise UserError(f'epoch {start} lies before time step {time_step + 1}, in which {path} is')


def find_run(args: argparse.Namespace, schedule: AnnealingSchedule) -> None:
    """Find the checkpoint to resume, and refuse a folder or a checkpoint of another run.

    Args:
        args: timm's arguments with the wrapper's; ``resume`` becomes the path of a checkpoint, or ''.
        schedule: The time steps.

    Raises:
        UserError: If the output folder or the checkpoint is of another run, or cannot be used.
    """
    folder = output_folder(args)
    target = folder or output_root(args)
    in_the_way = next(path for path in (target, *target.absolute().parents) if path.exists())
    if not in_the_way.is_dir():
        raise UserError(f'no folder can be made at {target}: {in_the_way} is a file')
    if args.resume == 'auto':
        args.resume = _find_automatically(args, folder)
        _logger.info(f'--resume auto: {args.resume or "nothing to resume, starting anew"}')
    elif folder is not None and any(any(folder.glob(pattern)) for pattern in RUN_FILES):
        if not args.resume or Path(args.resume).resolve().parent != folder.resolve():
            raise UserError(
                f'{folder} holds another run; go on with it by --resume auto, or take another --experiment. Nothing '
                'was written'
            )
    if args.resume:
        _check_checkpoint(args, schedule)


def drop_rows(path: Path, epoch: int) -> None:
    """Take out of a run's csv file what an interrupted run left: rows from an epoch on, second headers, cut-off rows.

    Args:
        path: File whose first column is the epoch; it need not exist, and goes if no row is left.
        epoch: First epoch to drop.
    """
    if not path.is_file():
        return
    kept: List[List[str]] = []
    header: List[str] = []
    for row in complete_rows(path):
        if int(row['epoch']) < epoch:
            if list(row) != header:  # the first, or one of other columns
                header = list(row)
                kept.append(header)
            kept.append(list(row.values()))
    if not kept:
        path.unlink()
        return
    temporary = path.with_suffix('.tmp')
    with temporary.open('w', newline='') as file:
        csv.writer(file).writerows(kept)
    if temporary.read_text().splitlines() == path.read_text(errors='replace').splitlines():
        temporary.unlink()
    else:
        os.replace(temporary, path)
