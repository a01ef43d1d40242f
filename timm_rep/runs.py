"""What a run of timm's train.py leaves beside its checkpoint, made fit to be shown to others."""
import csv
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple, Union

import yaml

__all__ = ['Run', 'complete_rows', 'plain_args', 'read_run', 'read_run_args', 'read_summary', 'to_number', 'write_run']

_logger = logging.getLogger(__name__)

# Arguments about the machine that a run was on and about what it was called there, not about what it trained.
LOCAL_ARGS = frozenset((
    'data', 'data_dir', 'output', 'experiment', 'resume', 'initial_checkpoint', 'pretrained_path', 'class_map',
    'local_rank', 'timm_scripts', 'log_wandb', 'wandb_project', 'wandb_resume_id', 'wandb_tags',
))
START_ARGS = ('initial_checkpoint', 'pretrained_path', 'resume')
UNSET: Tuple[Any, ...] = (None, '', False, 0, [])
SECRET_NAME = re.compile(r'(token|secret|password|passwd|credentials?|api_?key)s?$', re.IGNORECASE)
SECRET_VALUE = re.compile(r'\bhf_\w{8,}|://[^/\s]*@')
# By these two the arguments inside a checkpoint and the args.yaml beside it are told to be of one run.
PathLike = Union[str, Path]
IDENTITY_ARGS = ('model', 'experiment', 'dataset', 'epochs', 'batch_size', 'opt', 'sched', 'weight_decay', 'seed')
# What arguments must be that something is built from here, if they are given.
ARG_TYPES: Dict[str, Tuple[type, ...]] = dict(
    model=(str,), num_classes=(int,), in_chans=(int,), gp=(str,), bn_eps=(float, int), model_kwargs=(dict,),
    input_size=(list,), img_size=(int,), interpolation=(str,), mean=(list,), std=(list,), crop_pct=(float, int),
    dataset=(str,), val_split=(str,), time_steps=(int,))
# Figures of summary.csv by the name that they have on a model card.
SUMMARY_METRICS = dict(top1='eval_top1', top5='eval_top5')


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        args: Arguments of train.py, without those of the machine it ran on.
        left_out: Names of the arguments that are left out, of those that were given.
        start_files: Files that the weights started from, by the option that names them, without their folders.
        history: Figures of every epoch, from summary.csv; empty if there is none.
        epoch: Epoch of the checkpoint, counted from 0, if known.
        metrics: Figures of the checkpoint's weights that the run measured on its validation split: ``top1``, ``top5``
            in percent; only those that it did measure.
    """

    args: Dict[str, Any]
    left_out: Tuple[str, ...]
    start_files: Dict[str, str]
    history: Tuple[Dict[str, float], ...]
    epoch: Optional[int]
    metrics: Dict[str, float]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return next((kind(value) for kind in (bool, int, float, str) if isinstance(value, kind)), None)


def plain_args(args: Mapping[Any, Any], source: Path) -> Dict[str, Any]:
    """Arguments of a run as plain numbers, strings, lists and dicts; None for what is none of these.

    Args:
        args: What a file says.
        source: The file, for the error.

    Returns:
        The arguments. Those that are None are left out if something is built from them.

    Raises:
        ValueError: If something is built from an argument and it is of another type.
    """
    plain: Dict[str, Any] = _plain(args)
    for key, kinds in ARG_TYPES.items():
        if plain.get(key) is None:
            plain.pop(key, None)
            continue
        value = plain[key]
        numbers = not isinstance(value, list) or all(isinstance(part, (int, float)) for part in value)
        if not (isinstance(value, kinds) and numbers):
            wanted = 'list of numbers' if list in kinds else kinds[0].__name__
            raise ValueError(f'{source}: the argument {key} must be of type {wanted}, got {value!r}')
    return plain


def read_run_args(path: Path) -> Dict[str, Any]:
    """Arguments of the run that wrote a checkpoint, from the file that train.py puts beside it.

    Args:
        path: The checkpoint.

    Returns:
        The arguments; empty if there is no args.yaml.

    Raises:
        ValueError: If args.yaml is not a YAML file, or an argument is not what train.py takes.
    """
    args_path = path.parent / 'args.yaml'
    if not args_path.is_file():
        return {}
    try:
        args = yaml.safe_load(args_path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise ValueError(f'{args_path} is not a YAML file: {e}') from e
    return plain_args(args, args_path) if isinstance(args, dict) else {}


def _is_local(value: Any) -> bool:
    """Whether an argument holds a path of a machine, or something secret."""
    if isinstance(value, dict):
        return any(SECRET_NAME.search(str(key)) or _is_local(part) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return any(map(_is_local, value))
    if not isinstance(value, str):
        return not isinstance(value, (bool, int, float, type(None)))
    absolute = PurePosixPath(value).is_absolute() or bool(PureWindowsPath(value).drive) or value.startswith('~')
    return absolute or SECRET_VALUE.search(value) is not None


def complete_rows(path: Path) -> Iterator[Dict[str, str]]:
    """Rows of a csv file that a run appends to: a resume repeats the header, a kill leaves a line cut off.

    Args:
        path: File whose first column is the epoch.

    Yields:
        The complete rows, by column.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f'no {path.name} in {path.parent}')
    lines = path.read_text(errors='replace').splitlines(keepends=True)
    if lines and not lines[-1].endswith('\n'):
        del lines[-1]
    header: List[str] = []
    for cells in csv.reader(lines):
        if cells[:1] == ['epoch']:
            header = cells
        elif len(cells) == len(header) and cells[0].isdigit():
            yield dict(zip(header, cells))


def to_number(text: str) -> float:
    """The number that a text is, or NaN."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_summary(path: PathLike) -> List[Dict[str, float]]:
    """Read the figures that timm's train.py notes in ``summary.csv``.

    A resume from an earlier checkpoint repeats epochs; what was noted of them, and of the epochs after them, before
    that is dropped, as are lines that are cut off.

    Args:
        path: The file.

    Returns:
        One dict for each epoch, ascending: ``epoch``, and whatever else the run noted; NaN for what is no number.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no complete epoch.
    """
    path = Path(path)
    rows: List[Dict[str, float]] = []
    for cells in complete_rows(path):
        row = {name: to_number(text) for name, text in cells.items()}
        while rows and rows[-1]['epoch'] >= row['epoch']:
            rows.pop()
        rows.append(row)
    if not rows:
        raise ValueError(f'{path} holds no complete epoch')
    return rows


def _metrics(history: Tuple[Dict[str, float], ...], args: Dict[str, Any], epoch: Optional[int], use_ema: bool) -> Any:
    """The figures of one epoch, if they are of the weights in question.

    With ``--model-ema`` train.py notes the figures of the averaged weights, else those of the trained ones.
    """
    noted_ema = bool(args.get('model_ema')) and not args.get('model_ema_force_cpu')
    if history and noted_ema and not use_ema:
        _logger.warning('the run noted figures of its averaged weights, not of these; use_ema (--use-ema) takes those')
    row = next((row for row in reversed(history) if row.get('epoch') == epoch), None)
    if row is None or use_ema != noted_ema:
        return {}
    found = {name: row.get(column, math.nan) for name, column in SUMMARY_METRICS.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def read_run(
        checkpoint: Path,
        args: Dict[str, Any],
        epoch: Optional[int] = None,
        *,
        use_ema: bool = False,
) -> Optional[Run]:
    """Read what is beside a checkpoint, and leave out what is nobody else's business.

    Left out are the arguments that name folders, files and accounts (``data_dir``, ``output``, ``wandb_project`` ...),
    and any other whose value is an absolute path or looks secret.

    Args:
        checkpoint: Path of the checkpoint.
        args: Arguments that the checkpoint holds; empty if none.
        epoch: Epoch of the checkpoint, counted from 0, if known.
        use_ema: Whether the averaged weights were taken.

    Returns:
        The run, or None if neither the checkpoint nor a file beside it tells of one.

    Raises:
        ValueError: If args.yaml is of another run than the checkpoint, or a file is not what train.py writes.
    """
    beside = read_run_args(checkpoint)
    for key in IDENTITY_ARGS:
        if key in beside and key in args and beside[key] != args[key]:
            raise ValueError(
                f'{checkpoint.parent / "args.yaml"} is of another run than {checkpoint.name}: {key} is '
                f'{beside[key]!r} in the one and {args[key]!r} in the other'
            )
    args = beside or args
    summary = checkpoint.parent / 'summary.csv'
    history = tuple(read_summary(summary)) if summary.is_file() else ()
    if not args and not history:
        return None
    left_out = {key for key, value in args.items() if key in LOCAL_ARGS or SECRET_NAME.search(key) or _is_local(value)}
    return Run(
        {key: value for key, value in args.items() if key not in left_out},
        tuple(sorted(key for key in left_out if args[key] not in UNSET)),
        {f'--{key.replace("_", "-")}': Path(str(args[key])).name for key in START_ARGS if args.get(key)},
        history,
        epoch,
        _metrics(history, args, epoch, use_ema),
    )


def write_run(run: Run, folder: Union[str, Path]) -> None:
    """Write ``args.yaml`` and ``summary.csv``, each if there is something to write.

    Args:
        run: The run.
        folder: Existing folder.
    """
    folder = Path(folder)
    if run.args:
        note = f'# Left out, since about the machine it ran on: {", ".join(run.left_out)}\n' if run.left_out else ''
        (folder / 'args.yaml').write_text(note + yaml.safe_dump(run.args))
    if run.history:
        with (folder / 'summary.csv').open('w', newline='') as file:
            writer = csv.DictWriter(file, list(run.history[0]), lineterminator='\n')
            writer.writeheader()
            writer.writerows(dict(row, epoch=int(row['epoch'])) if 'epoch' in row else row for row in run.history)
