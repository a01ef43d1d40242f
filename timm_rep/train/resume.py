"""Go on with a run as if it had never stopped: its newest whole checkpoint, and its files as they were then."""
import argparse
import csv
import itertools
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any, List, Mapping, Optional, Tuple

from ..core.annealing import AnnealingSchedule
from ..core.errors import UserError
from ..io.checkpoint import read_checkpoint
from ..io.output import written_whole
from ..io.plain_data import plain
from ..io.runs import DECIDED_LATER, MAY_CHANGE, args_in_effect, is_open, read_rows, read_summary
from .arguments import output_folder, output_root, without_time_steps
from .lock import processes

__all__ = ['drop_rows', 'epoch_of', 'find_run', 'go_back', 'newest_checkpoint', 'replay_plateau']

_logger = logging.getLogger('train')  # timm's

CHECKPOINT_OF_EPOCH = re.compile(r'checkpoint-(\d{1,9})\.pth\.tar')
CHECKPOINTS = ('last.pth.tar', 'checkpoint-*.pth.tar')
# Weights that a run leaves besides the checkpoints to go on from.
KEPT_WEIGHTS = ('model_best.pth.tar', 'time_step-*.safetensors')
RUN_FILES = ('args.yaml', 'summary.csv', '*.pth.tar', 'time_step-*.safetensors', 'branch_gradients.csv')
SHOWN_CANDIDATES = 5


def epoch_of(path: Path) -> Optional[int]:
    """Epoch of a checkpoint of timm's, or None if the file is not whole."""
    try:
        epoch = read_checkpoint(path).epoch
    except (OSError, UserError) as e:
        _logger.warning(f'Passed over: {e}')
        return None
    if epoch is None:
        _logger.warning(f'Passed over: {path} does not say its epoch')
    return epoch


def _reached(folder: Path) -> float:
    """The last epoch of a run by its summary.csv; infinity if that tells none."""
    summary = folder / 'summary.csv'
    rows = read_rows(summary).complete if summary.is_file() else []
    return int(rows[-1]['epoch']) if rows else math.inf


def _checkpoints(folder: Path) -> List[Path]:
    """Checkpoints that timm writes at the end of an epoch, by their names the latest first.

    The times of files do not tell: those of a copy are the times of its copying.
    """
    reached = _reached(folder)

    def order(path: Path) -> Tuple[bool, int]:
        number = CHECKPOINT_OF_EPOCH.fullmatch(path.name)
        epoch = int(number[1]) if number else -1
        return epoch <= reached, epoch

    paths = [folder / 'last.pth.tar', folder / 'tmp.pth.tar']  # tmp becomes last once it is written
    paths += sorted(folder.glob('checkpoint-*.pth.tar'), key=order, reverse=True)
    return [path for path in paths if path.is_file()]


def newest_checkpoint(folder: Path) -> Optional[Path]:
    """The newest whole checkpoint at the end of an epoch in a run's folder.

    A process that is killed while it writes leaves a checkpoint that is cut off, or none under its usual name. A run
    that went back to an earlier one leaves those of later epochs, which its summary.csv does not have: timm writes
    there first.

    Args:
        folder: Output folder of a run.

    Returns:
        Its path, or None. Recovery checkpoints, from within an epoch, do not count.
    """
    reached, left_over = _reached(folder), []
    for path in _checkpoints(folder):
        epoch = epoch_of(path)
        if epoch is not None and epoch <= reached:
            return path
        if epoch is not None:
            left_over.append(path)
    return next(iter(left_over), None)


def go_back(path: Path, epoch: int) -> None:
    """Let the checkpoint that a run goes back to be its last one, as if the run had just written it.

    Those of later epochs are of a training that is left. They stay until the run writes its own in their place, and
    would otherwise be taken for its own if it were killed before that.

    Args:
        path: The checkpoint, in the folder of the run.
        epoch: The epoch that the run goes on with.
    """
    summary, last = path.with_name('summary.csv'), path.with_name('last.pth.tar')
    rows = read_rows(summary).complete if summary.is_file() else []
    if rows and int(rows[-1]['epoch']) > epoch:
        _logger.warning(
            f'{path.parent} goes back to epoch {epoch}: its rows to epoch {rows[-1]["epoch"]} go, and the checkpoints '
            'of these epochs as new ones are written')
    if not (last.exists() and last.samefile(path)):
        with written_whole(last, replace=True, follow=False) as temporary:
            shutil.copyfile(path, temporary)


def _candidates(root: Path) -> str:
    """The runs in a folder that could be gone on with, in words, the latest first."""
    newest = [checkpoints[0] for folder in root.glob('*') if (checkpoints := _checkpoints(folder))]
    newest.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return f'{root} holds {", ".join(path.parent.name for path in newest[:SHOWN_CANDIDATES]) or "none"}'


def _find_automatically(args: argparse.Namespace, folder: Optional[Path]) -> str:
    """The checkpoint that ``--resume auto`` goes on from, '' if the run is new."""
    if folder is None:
        raise UserError(
            '--resume auto goes on with the run of one folder: name it with --experiment; '
            + _candidates(output_root(args)))
    found = newest_checkpoint(folder)
    if found is not None:
        return str(found)
    left = [path.name for pattern in (*CHECKPOINTS, *KEPT_WEIGHTS) for path in sorted(folder.glob(pattern))]
    if left:
        raise UserError(
            f'{folder} holds no whole checkpoint to go on from but {", ".join(left)}; to start a new run from weights '
            'take --initial-checkpoint and another --experiment. Nothing was changed'
        )
    return ''


def _take_decided(args: argparse.Namespace, there: Mapping[str, Any]) -> None:
    """Take from the run of a checkpoint what train.py had decided there and is left open here."""
    for name in DECIDED_LATER:
        if name in there and is_open(name, getattr(args, name, there[name])):
            setattr(args, name, there[name])


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> List[str]:
    """What shapes the training and is not as it was in the run of a checkpoint, in words."""
    there, here = args_in_effect(there), args_in_effect(here)
    found = [
        f'--{name.replace("_", "-")} {there[name]} (here {here[name]})'
        for name in sorted(there.keys() & here.keys() - MAY_CHANGE) if there[name] != here[name]
    ]
    if there.get('world_size', processes()) != processes():
        found.append(f'{there["world_size"]} processes (here {processes()})')
    return found


def _check_checkpoint(args: argparse.Namespace, schedule: AnnealingSchedule, folder: Optional[Path]) -> None:
    path = Path(args.resume)
    if not path.is_file():
        raise UserError(f'--resume takes a checkpoint file or auto, got {path}, which is none')
    checkpoint = read_checkpoint(path)
    if checkpoint.args:
        _take_decided(args, checkpoint.args)
        differences = _differences({**without_time_steps(), **checkpoint.args}, plain(vars(args)))
        if differences:
            raise UserError(
                f'{path} is of a run with {", ".join(differences)}; take the same to go on with it, or, to start a new '
                'run from its weights, --initial-checkpoint and another --experiment'
            )
    if checkpoint.epoch is None and args.start_epoch is None:
        raise UserError(
            f'{path} does not say its epoch, so there is nothing to go on with; to start a new run from its weights, '
            'take --initial-checkpoint and another --experiment')
    if args.sched == 'plateau' and not path.with_name('summary.csv').is_file():
        raise UserError(
            f'--sched plateau goes by the figures of all epochs, and there is no {path.with_name("summary.csv")} that '
            'holds those before; to start a new run from the weights, take --initial-checkpoint')
    if schedule.anneals:
        time_step = max((int(v) for k, v in checkpoint.state_dict.items() if k.endswith('.time_step')), default=0)
        following = 0 if checkpoint.epoch is None else checkpoint.epoch + 1
        start = following if args.start_epoch is None else args.start_epoch
        if start < schedule.total_epochs and schedule.position(start).time_step < time_step:
            raise UserError(
                f'{path} is in time step {time_step + 1}, epoch {start} lies before it; say where to go on with '
                '--start-epoch'
            )
    if folder is not None and path.resolve().parent == folder.resolve():
        _check_start_epoch(args, path, checkpoint.epoch)


def _check_start_epoch(args: argparse.Namespace, path: Path, epoch: Optional[int]) -> None:
    """Refuse to train epochs again, in the folder of their run, from weights that have had them."""
    if args.start_epoch is None or epoch is None or args.start_epoch > epoch:
        return
    before = path.with_name(f'checkpoint-{args.start_epoch - 1}.pth.tar')
    back = f'go back by --resume {before}, or ' if before.is_file() else ''
    raise UserError(
        f'{path} is of epoch {epoch}: --start-epoch {args.start_epoch} would write over what {path.parent} has of the '
        f'epochs before; {back}take another --experiment. Nothing was changed')


def find_run(args: argparse.Namespace, schedule: AnnealingSchedule) -> None:
    """Find the checkpoint to resume, and refuse a folder or a checkpoint of another run.

    Args:
        args: timm's arguments with the wrapper's; ``resume`` becomes the path of a checkpoint, or ''.
        schedule: The time steps.

    Raises:
        UserError: If the output folder or the checkpoint is of another run, or cannot be used.
    """
    folder = output_folder(args)
    target = (folder or output_root(args)).absolute()
    in_the_way = next(path for path in (target, *target.parents) if path.exists())
    if not in_the_way.is_dir():
        raise UserError(f'no folder can be made at {target}: {in_the_way} is a file')
    if args.resume == 'auto':
        args.resume = _find_automatically(args, folder)
        _logger.info(f'--resume auto: {args.resume or "nothing to resume, starting anew"}')
    elif folder is not None and (not args.resume or Path(args.resume).resolve().parent != folder.resolve()):
        if any(any(folder.glob(pattern)) for pattern in RUN_FILES):
            raise UserError(
                f'{folder} holds another run; go on with it by --resume auto, or take another --experiment. Nothing '
                'was written'
            )
    if args.resume:
        _check_checkpoint(args, schedule, folder)


def replay_plateau(scheduler: Any, args: argparse.Namespace, epoch: int) -> None:
    """Let a schedule that goes by the run's figures be where it was: timm keeps nothing of it.

    Args:
        scheduler: That of the learning rate; others follow from the epoch.
        args: timm's arguments with the wrapper's; ``resume`` is the checkpoint that is gone on from.
        epoch: The epoch to go on with.
    """
    if type(scheduler).__name__ != 'PlateauLRScheduler':  # later timm has none
        return
    column = f'eval_{args.eval_metric}' if args.val_split else 'train_loss'
    rows = read_summary(Path(args.resume).with_name('summary.csv'))
    figures = {int(row['epoch']): row[column] for row in rows if column in row}  # without those of --val-interval
    scheduler.restore_lr = None
    scheduler.update_groups(scheduler.warmup_lr_init if scheduler.warmup_t else scheduler.base_values)
    for done in range(epoch):
        scheduler.step(done + 1, figures.get(done))


def drop_rows(path: Path, epoch: float = math.inf) -> None:
    """Take out of a run's csv file what an interrupted run left: rows from an epoch on, second headers, cut-off rows.

    A file with damaged lines is kept beside the new one.

    Args:
        path: File whose first column is the epoch; it need not exist, and goes if no row is left.
        epoch: First epoch to drop; none by default.
    """
    if not path.is_file():
        return
    rows = read_rows(path)
    kept: List[List[str]] = []
    header: List[str] = []
    for row in rows.complete:
        if int(row['epoch']) < epoch:
            if list(row) != header:  # the first, or one of other columns
                header = list(row)
                kept.append(header)
            kept.append(list(row.values()))
    if rows.damaged:
        copies = (path.with_name(f'{path.name}.damaged-{number}') for number in itertools.count(1))
        beside = next(copy for copy in copies if not copy.exists())
        path.rename(beside)
        _logger.warning(f'{path} has {rows.damaged} damaged lines, which the new one has not; it is now {beside}')
    elif not kept:
        path.unlink()
    if kept:
        with written_whole(path, replace=True, follow=False) as temporary, temporary.open('w', newline='') as file:
            csv.writer(file).writerows(kept)
