"""What a run of timm's train.py leaves beside its checkpoint, made fit to be shown to others."""
import csv
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple
from urllib.parse import urlsplit

import yaml

from ..core.errors import UserError
from .output import PathLike
from .plain_data import plain, read_yaml

__all__ = [
    'DECIDED_LATER', 'MAY_CHANGE', 'START_ARGS', 'Run', 'args_in_effect', 'complete_rows', 'is_open', 'read_rows',
    'read_run', 'read_run_args', 'read_summary', 'to_number', 'write_run',
]

_logger = logging.getLogger(__name__)

# Arguments of timm's train.py whose words say what was trained and how. Other words are not published: they say where
# and by whom, or may be anything. Numbers are, under any name.
WORD_ARGS = frozenset("""
    aa amp_dtype clip_mode dataset device device_modules dist_bn eval_metric fuser gp input_img_mode input_key
    interpolation kd_distill_type kd_loss_type kd_model_name kd_token_distill_type lr_base_scale mixup_mode model
    model_dtype model_kwargs naflex_loss_scale opt opt_kwargs remode restoration sched target_key torchcompile
    torchcompile_mode train_crop_mode train_interpolation train_size_schedule train_split val_split
    variable_batch_loss_scale worker_seeding
""".split())
# What train.py adds to its arguments for itself, once it runs.
DERIVED_ARGS = frozenset(('distributed', 'local_rank', 'prefetcher', 'rank', 'world_size'))
START_ARGS = ('initial_checkpoint', 'pretrained_path')  # files of weights to start from
FOLDER = 'local-dir:'
SECRET_NAME = re.compile(r'token|secret|passw|credential|auth|key', re.IGNORECASE)
# A path of a machine, an address, or what access keys begin with, anywhere in a text.
PRIVATE_VALUE = re.compile(
    r'(?<!\w)[/\\~]|local-dir:|(?:hf_|gh[opsur]_|github_pat_|glpat-|xox[abp]-|(?<![a-z])sk-|AKIA|AIza)\w{8}',
    re.IGNORECASE)
# Arguments that may be others when a run goes on: they do not shape the training. The last line changes rounding only.
MAY_CHANGE = frozenset("""
    checkpoint_hist data data_dir dataset_download dataset_trust_remote_code experiment local_rank log_branches
    log_interval log_wandb no_resume_opt output pin_mem recovery_interval resume save_images start_epoch
    synchronize_step validation_batch_size wandb_project wandb_resume_id wandb_tags
    capture channels_last device device_modules fuser torchcompile torchcompile_mode
""".split())
# May differ between the arguments inside a checkpoint and those in the args.yaml beside it: train.py allows any when it
# resumes.
MAY_DIFFER = MAY_CHANGE | {'workers'}
# What train.py decides itself, once it runs, where it is left open.
DECIDED_LATER = ('lr', 'lr_base_scale', 'num_classes')
WHOLE_NUMBER = re.compile('[0-9]{1,9}')
WHY_LEFT_OUT = "since about the machine it ran on, or not train.py's own"
DEFAULT_EVAL_METRIC = 'top1'
# Figures of summary.csv by the name that they have on a model card.
SUMMARY_METRICS = dict(top1='eval_top1', top5='eval_top5')


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        args: Arguments of train.py that say what was trained and how.
        left_out: Names of the arguments that are left out, of those that were given.
        start_files: Files that the weights started from, by the option that names them, without their folders.
        processes: On how many processes it ran at once, each with batches of its own.
        history: Figures of every epoch, from summary.csv; empty if there is none.
        epoch: Epoch of the checkpoint, counted from 0, if known.
        metrics: Figures of the checkpoint's weights that the run measured on its validation split: ``top1``, ``top5``
            in percent; only those that it did measure.
        teacher: Name of the model that it learnt from, if any; a folder without where it is.
    """

    args: Dict[str, Any]
    left_out: Tuple[str, ...]
    start_files: Dict[str, str]
    processes: int
    history: Tuple[Dict[str, float], ...]
    epoch: Optional[int]
    metrics: Dict[str, float]
    teacher: Optional[str] = None


def read_run_args(path: Path) -> Dict[str, Any]:
    """Arguments of the run that wrote a checkpoint, from the file that train.py puts beside it.

    Args:
        path: The checkpoint.

    Returns:
        The arguments; empty if there is no args.yaml.

    Raises:
        UserError: If args.yaml is not a YAML file of plain data, or too large.
    """
    args_path = path.parent / 'args.yaml'
    if not args_path.is_file():
        return {}
    args = read_yaml(args_path)
    return plain(args) if isinstance(args, dict) else {}


def is_open(name: str, value: Any) -> bool:
    """Whether the value of an argument leaves the choice to train.py."""
    return value is None or value == '' or (name == 'lr' and value == 0)


def args_in_effect(args: Mapping[str, Any]) -> Dict[str, Any]:
    """Arguments of train.py as it goes by them, whatever it was told, without those that then do nothing.

    Args:
        args: The arguments by name, as it was told or as it keeps them in its checkpoints.

    Returns:
        Those that do something.
    """
    found = dict(args)
    if isinstance(found.get('grad_accum_steps'), int):
        found['grad_accum_steps'] = max(1, found['grad_accum_steps'])
    if found.get('sync_bn'):
        found.pop('dist_bn', None)
    if found.get('lr_cycle_limit') == 1:
        found.pop('lr_cycle_decay', None)
    return found


def _is_shared(name: str, value: Any) -> bool:
    """Whether an argument is for others to know, as far as its name and the kind of its value tell."""
    if name in WORD_ARGS:
        return True
    numbers = value if isinstance(value, (list, tuple)) and value else [value]
    known = all(isinstance(number, (bool, int, float)) for number in numbers)
    return known and name not in DERIVED_ARGS and not SECRET_NAME.search(name)


def _is_private(value: Any) -> bool:
    """Whether a value holds a path of a machine, an address or something secret, or is no plain value."""
    if isinstance(value, dict):
        return bool(_without_private(value)[1])
    if isinstance(value, (list, tuple)):
        return any(map(_is_private, value))
    if not isinstance(value, str):
        return not isinstance(value, (bool, int, float, type(None)))
    return PRIVATE_VALUE.search(value) is not None


def _without_private(args: Mapping[Any, Any], inside: str = '') -> Tuple[Dict[Any, Any], List[str]]:
    """Arguments without what is private in them, and the names of that; ``inside`` names the one they are a part of."""
    kept: Dict[Any, Any] = {}
    left_out: List[str] = []
    for key, value in args.items():
        if _is_private(str(key)):
            left_out.append(f'{inside}...')
        elif isinstance(value, dict):
            kept[key], names = _without_private(value, f'{inside}{key}.')
            left_out += names
        elif _is_private(value) or (inside and SECRET_NAME.search(str(key))):
            left_out.append(f'{inside}{key}')
        else:
            kept[key] = value
    return kept, left_out


def _file_name(path: str) -> str:
    """The last part of a path of any system, or of an address."""
    name = PureWindowsPath(urlsplit(path).path if '://' in path else path).name
    return 'FILE' if _is_private(name) else name


def _teacher(name: str) -> str:
    path = name.removeprefix(FOLDER)
    return FOLDER * (path != name) + _file_name(path.rstrip('/\\')) if _is_private(name) else name


def _cells(line: str) -> List[str]:
    """Cells of one line of a csv file; none of a damaged one. A stray quote must not swallow the lines below it."""
    line = line.rstrip('\r\n')
    if not line.isprintable() or '\ufffd' in line:  # which stands for bytes that are no text
        return []
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error:
        return []


@dataclass(frozen=True)
class Rows:
    """Rows of a csv file that a run appends to.

    Attributes:
        complete: The complete rows, by column.
        damaged: Number of lines that are none, and no header. A last line that a kill has cut off does not count.
    """

    complete: List[Dict[str, str]]
    damaged: int


def read_rows(path: Path, whole: Sequence[str] = ('epoch',)) -> Rows:
    """Read a csv file that a run appends to: a resume repeats the header, a kill leaves a line cut off.

    Args:
        path: File whose first column is the epoch.
        whole: Columns of whole numbers, without which a line is no row.

    Returns:
        Its rows.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f'no {path.name} in {path.parent}')
    lines = path.read_text('utf-8-sig', errors='replace').splitlines(keepends=True)
    if lines and not lines[-1].endswith('\n'):
        del lines[-1]
    header: List[str] = []
    complete: List[Dict[str, str]] = []
    damaged = 0
    for line in lines:
        cells = _cells(line)
        row = dict(zip(header, cells))
        if cells[:1] == ['epoch']:
            header = cells
        elif len(cells) == len(header) and all(WHOLE_NUMBER.fullmatch(row.get(name, '')) for name in whole):
            complete.append(row)
        else:
            damaged += 1
    return Rows(complete, damaged)


def complete_rows(path: Path, whole: Sequence[str] = ('epoch',)) -> List[Dict[str, str]]:
    """The complete rows that :func:`read_rows` finds, with a warning if there are damaged ones."""
    rows = read_rows(path, whole)
    if rows.damaged:
        _logger.warning('%s: damaged lines left out: %d', path, rows.damaged)
    return rows.complete


def to_number(text: str) -> float:
    """The number that a text is, or NaN."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_summary(path: PathLike) -> List[Dict[str, float]]:
    """Read the figures that timm's train.py notes in ``summary.csv``.

    A resume from an earlier checkpoint repeats epochs; what was noted of them, and of the epochs after them, before
    that is dropped, as are lines that are cut off or damaged.

    Args:
        path: The file.

    Returns:
        One dict for each epoch, ascending: ``epoch``, and whatever else the run noted; NaN for what is no number.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If it holds no complete epoch.
    """
    path = Path(path)
    rows: List[Dict[str, float]] = []
    for cells in complete_rows(path):
        row = {name: to_number(text) for name, text in cells.items()}
        while rows and rows[-1]['epoch'] >= row['epoch']:
            rows.pop()
        rows.append(row)
    if not rows:
        raise UserError(f'{path} holds no complete epoch')
    return rows


def _check_args_beside(path: Path, beside: Mapping[str, Any], args: Mapping[str, Any]) -> None:
    """Raise a UserError if args.yaml is of another run than the checkpoint beside it."""
    beside, args = args_in_effect(beside), args_in_effect(args)
    for key in sorted((beside.keys() & args.keys()) - MAY_DIFFER):
        one, other = plain(beside[key]), plain(args[key])
        if one != other and not is_open(key, one) and (_is_shared(key, one) or _is_shared(key, other)):
            raise UserError(
                f'{path.parent / "args.yaml"} is of another run than {path.name}: {key} is {one!r} in the one and '
                f'{other!r} in the other'
            )


def _check_metric(path: Path, row: Mapping[str, float], epoch: Any, name: str, metric: Optional[float]) -> None:
    """Raise a UserError if summary.csv notes another figure than the checkpoint, which holds one of its own."""
    noted = row.get(f'eval_{name}', row.get(f'train_{name}'))  # without validation, train.py goes by the training's
    if metric is None or noted is None or math.isclose(noted, metric, rel_tol=1e-4):
        return
    if math.isfinite(noted) or math.isfinite(metric):
        raise UserError(
            f'{path.parent / "summary.csv"} is of another run than {path.name}: {name} of epoch {epoch} is {noted:g} '
            f'in the one and {metric:g} in the other'
        )


def _metrics(row: Optional[Mapping[str, float]], args: Mapping[str, Any], use_ema: bool) -> Dict[str, float]:
    """The figures of one epoch, if they are of the weights in question.

    With ``--model-ema`` train.py notes the figures of the averaged weights, else those of the trained ones.
    """
    noted_ema = bool(args.get('model_ema')) and not args.get('model_ema_force_cpu')
    if row is not None and noted_ema and not use_ema:
        _logger.warning('the run noted figures of its averaged weights, not of these; use_ema (--use-ema) takes those')
    if row is None or use_ema != noted_ema:
        return {}
    if (args.get('tta') or 0) > 1:
        _logger.warning('the figures of the run are not taken: --tta %s made them of neighbouring images', args['tta'])
        return {}
    found = {name: row.get(column, math.nan) for name, column in SUMMARY_METRICS.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def read_run(
        checkpoint: Path,
        args: Dict[str, Any],
        epoch: Optional[int] = None,
        *,
        metric: Optional[float] = None,
        use_ema: bool = False,
) -> Optional[Run]:
    """Read what is beside a checkpoint, and leave out what is nobody else's business.

    Of the arguments numbers are kept, and words only of those in ``WORD_ARGS``; and no path, address or secret.

    Args:
        checkpoint: Path of the checkpoint.
        args: Arguments that the checkpoint holds; empty if none.
        epoch: Epoch of the checkpoint, counted from 0, if known.
        metric: Figure that the checkpoint holds, to compare with the summary's.
        use_ema: Whether the averaged weights were taken.

    Returns:
        The run, or None if neither the checkpoint nor a file beside it tells of one.

    Raises:
        UserError: If args.yaml or summary.csv is of another run than the checkpoint, or a file is not what train.py
            writes.
    """
    beside = read_run_args(checkpoint)
    _check_args_beside(checkpoint, beside, args)
    processes = args.get('world_size')
    args = beside or args
    summary = checkpoint.parent / 'summary.csv'
    history = tuple(read_summary(summary)) if summary.is_file() else ()
    if not args and not history:
        return None
    row = next((row for row in history if row['epoch'] == epoch), None)
    if row is not None:
        _check_metric(checkpoint, row, epoch, args.get('eval_metric') or DEFAULT_EVAL_METRIC, metric)
    told = {key: value for key, value in args.items() if _is_shared(str(key), value)}
    shared, left_out = _without_private(told)
    left_out += [str(key) for key in args.keys() - told.keys() - DERIVED_ARGS if args[key]]
    return Run(
        shared,
        tuple(sorted(left_out)),
        {f'--{key.replace("_", "-")}': _file_name(str(args[key])) for key in START_ARGS
         if args.get(key) and (key != 'pretrained_path' or args.get('pretrained'))},
        processes if isinstance(processes, int) else 1,
        history,
        epoch,
        _metrics(row, args, use_ema),
        _teacher(str(args['kd_model_name'])) if args.get('kd_model_name') else None,
    )


def write_run(run: Run, folder: PathLike) -> None:
    """Write ``args.yaml`` and ``summary.csv``, each if there is something to write.

    Args:
        run: The run.
        folder: Existing folder.
    """
    folder = Path(folder)
    if run.args:
        note = f'# Left out, {WHY_LEFT_OUT}: {", ".join(run.left_out)}\n' if run.left_out else ''
        (folder / 'args.yaml').write_text(note + yaml.safe_dump(run.args))
    if run.history:
        with (folder / 'summary.csv').open('w', newline='') as file:
            columns = dict.fromkeys(name for row in run.history for name in row)  # a resume may add some
            writer = csv.DictWriter(file, list(columns), lineterminator='\n')
            writer.writeheader()
            writer.writerows(dict(row, epoch=int(row['epoch'])) for row in run.history)
