"""Pictures of the folder of a run."""
import logging
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

from ..core.errors import UserError
from ..io.runs import complete_rows, read_run_args, read_summary, to_number
from ..io.weights import load_training_form
from .plots import draw_annealing, draw_branch_gradients, draw_branch_similarity

__all__ = ['plot_run', 'read_branch_gradients']

_logger = logging.getLogger(__name__)

SNAPSHOT = re.compile(r'time_step-(\d{1,9})\.safetensors')  # without those of averaged weights
SIGNATURE = b'timm_rep'  # in the metadata of our PNG files

PathLike = Union[str, Path]


def read_branch_gradients(path: PathLike) -> List[Dict[str, Any]]:
    """Read the gradient magnitudes that ``--log-branches`` writes to ``branch_gradients.csv``.

    Repeated epochs, cut-off and damaged lines are dropped as in :func:`timm_rep.io.runs.read_summary`.

    Args:
        path: The file, with the columns ``epoch``, ``depth``, ``layer``, ``branch`` and ``rms``.

    Returns:
        The rows, as :func:`timm_rep.report.plots.draw_branch_gradients` takes them.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    found: Dict[int, Dict[Tuple[str, str], Dict[str, Any]]] = {}  # by epoch, then depth and branch
    for cells in complete_rows(Path(path), ('epoch', 'depth')):
        if not {'layer', 'branch', 'rms'} <= cells.keys():
            continue  # below a damaged header
        epoch = int(cells['epoch'])
        for undone in [later for later in found if later > epoch]:
            del found[undone]
        found.setdefault(epoch, {})[cells['depth'], cells['branch']] = dict(
            cells, epoch=epoch, depth=int(cells['depth']), rms=to_number(cells['rms']))
    return [row for rows in found.values() for row in rows.values()]


def _newest_training_form(run_dir: Path) -> Path:
    """The newest weights of a run."""
    found = {int(match[1]): path for path in run_dir.glob('*') if (match := SNAPSHOT.fullmatch(path.name))}
    snapshots = [found[number] for number in sorted(found, reverse=True)]
    for path in (run_dir / 'last.pth.tar', *snapshots, run_dir / 'model_best.pth.tar'):
        if path.is_file():
            return path
    raise FileNotFoundError(f'no weights in training form in {run_dir}')


def _annealing(run_dir: Path, model: str) -> Any:
    return draw_annealing(read_summary(run_dir / 'summary.csv'), model)


def _branch_gradients(run_dir: Path, model: str) -> Any:
    summary = run_dir / 'summary.csv'
    history = read_summary(summary) if summary.is_file() else []
    return draw_branch_gradients(read_branch_gradients(run_dir / 'branch_gradients.csv'), model, history=history)


def _branch_similarity(run_dir: Path, model: str) -> Any:
    path = _newest_training_form(run_dir)
    return draw_branch_similarity(load_training_form(path), f'{model} {path.name}')


FIGURES: Dict[str, Callable[[Path, str], Any]] = {
    'annealing.png': _annealing,
    'branch_gradients.png': _branch_gradients,
    'branch_similarity.png': _branch_similarity,
}


def _check_replaceable(path: Path) -> None:
    """Refuse to overwrite a file that no earlier call of ours wrote."""
    if path.exists() and not (path.is_file() and SIGNATURE in path.read_bytes()[:1024]):
        raise FileExistsError(f'{path} exists already and is not a figure of timm_rep; nothing was written')


def plot_run(run_dir: PathLike, output: Optional[PathLike] = None) -> List[Path]:
    """Draw pictures of a training run, as far as its folder has the data.

    - ``annealing.png``: accuracy, loss, learning rate and attach rate over the epochs and time steps, from
      ``summary.csv``; of a run of timm's plain train.py too.
    - ``branch_gradients.png``: gradient magnitude of origin and side branches by depth and epoch (RepAn, Fig. 1), from
      ``branch_gradients.csv``.
    - ``branch_similarity.png``: mean cosine similarity between the branches' kernels (OREPA, Fig. 7), from the newest
      weights in training form.

    A figure without data is left out, and the log says why.

    Args:
        run_dir: Output folder of timm's train.py.
        output: Folder to write to, made if it does not exist; by default that of the run. Earlier figures of the same
            names are replaced, all else in it stays.

    Returns:
        The files it wrote.

    Raises:
        FileExistsError: If a file of one of these names is there that is no figure of ours. Nothing is written then.
        UserError: If there are data for none of the figures, or matplotlib, of the extra ``demo``, is missing.
    """
    run_dir = Path(run_dir)
    output = run_dir if output is None else Path(output)
    for name in FIGURES:
        _check_replaceable(output / name)
    model = str(read_run_args(run_dir / 'args.yaml').get('model') or 'training run')

    figures, reasons = {}, []
    for name, draw in FIGURES.items():
        try:
            figures[name] = draw(run_dir, model)
        except (OSError, UserError) as e:
            reasons.append(f'{name}: {" ".join(str(e).split())}')
    if not figures:
        raise UserError(f'nothing to draw of {run_dir}; ' + '; '.join(reasons))
    for reason in reasons:
        _logger.warning(f'left out {reason}')
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(output / name, metadata=dict(Software=SIGNATURE.decode()))
    return [output / name for name in figures]
