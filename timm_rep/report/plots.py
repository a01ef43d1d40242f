"""Pictures of a training run: its course over the time steps, the gradients of its branches, how alike they are.

Everything is read from the folder that timm's train.py writes to. Needs matplotlib, of the extra ``demo``.
"""
import importlib.util
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import UserError
from ..core.walk import annealed_modules
from ..io.runs import complete_rows, read_run_args, read_summary, to_number
from ..io.weights import load_training_form

__all__ = [
    'BranchGradients', 'BranchSimilarity', 'TimeStep', 'branch_similarities', 'draw_annealing',
    'draw_branch_gradients', 'draw_branch_similarity', 'plot_run', 'read_branch_gradients', 'time_steps',
]

_logger = logging.getLogger(__name__)

ORIGIN = 'origin'
# Okabe and Ito's colours, which colour-blind readers tell apart too.
BLUE, VERMILLION, GREEN, PURPLE, BLACK = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#000000'
# Red where the side branches are ahead, blue where the origin branch is; also for cosines above and below zero.
DIVERGING = 'RdBu_r'
MISSING = '0.85'
MARKED_EPOCHS = 40  # a line of more epochs has no markers
LABELLED_STEPS = 6  # more time steps than that are only numbered
WIDE_LOSS = 20.0  # a loss that spans more than this factor is drawn on a logarithmic axis
MAX_RATIO = 32.0  # of the colours for gradients
SIGNATURE = b'timm_rep'  # in the metadata of our PNG files

PathLike = Union[str, Path]


@dataclass(frozen=True)
class TimeStep:
    """A time step of a run, as far as the run went.

    Attributes:
        number: Counted from 0.
        first: Its first epoch.
        last: Its last epoch that was recorded.
    """

    number: int
    first: int
    last: int


@dataclass(frozen=True)
class BranchGradients:
    """Gradient magnitudes: root mean square of the elements of a branch kernel's gradient.

    Attributes:
        epochs: The epochs ``e``, ascending.
        depths: The layers ``d``, counted from 0 at the input, ascending.
        layers: Their names.
        origin: Magnitude of the origin branch ``(d, e)``; NaN where none was recorded.
        sides: Mean over the side branches ``(d, e)``; NaN where none was recorded.
    """

    epochs: List[int]
    depths: List[int]
    layers: List[str]
    origin: Tensor
    sides: Tensor


@dataclass(frozen=True)
class BranchSimilarity:
    """How alike the branches of one kind of layer are.

    Attributes:
        kind: Class of the layers.
        branches: Names of the branches ``b``.
        layers: Names of the layers that the mean is over.
        cosine: Cosine similarity between the branches' kernels ``(b, b)``, mean over the layers; NaN where a kernel is
            zero in all of them.
    """

    kind: str
    branches: List[str]
    layers: List[str]
    cosine: Tensor


def read_branch_gradients(path: PathLike) -> BranchGradients:
    """Read the gradient magnitudes that ``--log-branches`` writes to ``branch_gradients.csv``.

    Repeated epochs and cut-off lines are dropped as in :func:`timm_rep.runs.read_summary`.

    Args:
        path: The file, with the columns ``epoch``, ``depth``, ``layer``, ``branch`` and ``rms``.

    Returns:
        The magnitudes.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If it has other columns, or holds no complete epoch.
    """
    path = Path(path)
    wanted = {'epoch', 'depth', 'layer', 'branch', 'rms'}
    found: Dict[int, Dict[Tuple[int, str], float]] = {}  # by epoch, then depth and branch
    names: Dict[int, str] = {}
    for cells in complete_rows(path):
        if not wanted <= cells.keys() or not cells['depth'].isdigit():
            raise UserError(f'{path} must have the columns {", ".join(sorted(wanted))}, got {", ".join(cells)}')
        epoch, depth = int(cells['epoch']), int(cells['depth'])
        for undone in [later for later in found if later > epoch]:
            del found[undone]
        names[depth] = cells['layer']
        found.setdefault(epoch, {})[depth, cells['branch']] = to_number(cells['rms'])
    if not found:
        raise UserError(f'{path} holds no complete epoch')

    epochs, depths = sorted(found), sorted(names)
    origin = torch.full((len(depths), len(epochs)), math.nan, dtype=torch.float64)
    sides = origin.clone()
    for column, epoch in enumerate(epochs):
        by_depth: Dict[int, List[float]] = {}
        for (depth, branch), rms in found[epoch].items():
            if branch == ORIGIN:
                origin[depths.index(depth), column] = rms
            else:
                by_depth.setdefault(depth, []).append(rms)
        for depth, values in by_depth.items():
            sides[depths.index(depth), column] = sum(values) / len(values)
    return BranchGradients(epochs, depths, [names[depth] for depth in depths], origin, sides)


def time_steps(summary: List[Dict[str, float]]) -> List[TimeStep]:
    """The time steps of a run.

    Args:
        summary: As :func:`timm_rep.runs.read_summary` gives it.

    Returns:
        The time steps; empty for a run without.
    """
    epochs_of: Dict[int, List[int]] = {}
    for row in summary:
        number = row.get('train_time_step', math.nan)
        if math.isfinite(number):
            epochs_of.setdefault(int(number), []).append(int(row['epoch']))
    return [TimeStep(number, min(epochs), max(epochs)) for number, epochs in sorted(epochs_of.items())]


@torch.no_grad()
def branch_similarities(model: nn.Module) -> List[BranchSimilarity]:
    """Mean cosine similarity between the kernels of the branches (OREPA, Fig. 7).

    Args:
        model: Model with rep layers.

    Returns:
        One entry for each kind of layer, since branches have names of their own in each, the kind with most layers
        first. Layers that have only one branch with a kernel other than zero are left out.

    Raises:
        UserError: If there is no layer with two such branches.
    """
    layers: Dict[Tuple[str, ...], List[str]] = {}
    cosines: Dict[Tuple[str, ...], List[Tensor]] = {}
    for name, module in annealed_modules(model):
        kernels = module.branch_kernels()
        flat = torch.stack([kernel.flatten().double() for kernel in kernels.values()])
        present = flat.abs().amax(dim=1) > 0
        if present.sum() < 2:
            continue
        kind = (type(module).__name__, *kernels)
        unit = F.normalize(flat, dim=1)
        cosine = (unit @ unit.T).masked_fill(~(present[:, None] & present), math.nan)
        layers.setdefault(kind, []).append(name)
        cosines.setdefault(kind, []).append(cosine)
    if not layers:
        raise UserError(f'{type(model).__name__} has no layer with two branches to compare')
    found = [
        BranchSimilarity(kind[0], list(kind[1:]), names, torch.stack(cosines[kind]).nanmean(dim=0))
        for kind, names in layers.items()
    ]
    return sorted(found, key=lambda similarity: -len(similarity.layers))


def _new_figure(width: float, height: float, title: str) -> Any:
    from matplotlib.figure import Figure  # an extra

    figure = Figure(figsize=(width, height), layout='constrained', dpi=120)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)  # type: ignore[union-attr,call-arg]
    figure.suptitle(title, fontsize=15, fontweight='bold')
    return figure


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    axes.tick_params(labelsize=11)
    axes.xaxis.label.set_size(12)
    axes.yaxis.label.set_size(12)


def _log_axis(axis: Any) -> None:
    """Few short labels on a logarithmic axis, but never none."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    steps = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    if 0.01 <= value < 10000:
        return f'{value:g}'
    mantissa, exponent = f'{value:.1e}'.split('e')
    return f'{float(mantissa):g}e{int(exponent)}'


def _epoch_axis(axes: Any, epochs: List[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel='epoch', xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_bands(axes: Any, steps: List[TimeStep], labels: bool) -> None:
    """Shade every other time step, and name them above the axes."""
    words = len(steps) <= LABELLED_STEPS
    if labels and not words:
        axes.text(0, 1.02, 'time step ', transform=axes.transAxes, ha='right', va='bottom', fontsize=11)
    for step, following in zip(steps, [*steps[1:], None]):
        start, end = step.first - 0.5, (step.last + 0.5 if following is None else following.first - 0.5)
        if step.number % 2 == 0:
            axes.axvspan(start, end, color='0.93', zorder=0, linewidth=0)
        if labels:
            axes.text(
                (start + end) / 2, 1.02, f'time step {step.number}' if words else str(step.number), fontsize=11,
                transform=axes.get_xaxis_transform(), ha='center', va='bottom')


def _plot_column(axes: Any, summary: List[Dict[str, float]], column: str, **style: Any) -> None:
    points = [(row['epoch'], row[column]) for row in summary if math.isfinite(row.get(column, math.nan))]
    marker = 'o' if len(summary) <= MARKED_EPOCHS else None
    axes.plot(*zip(*points), marker=marker, markersize=4, linewidth=1.8, **style)


def draw_annealing(summary: List[Dict[str, float]], model: str = '', *, published: Optional[int] = None) -> Any:
    """Draw accuracy, loss, learning rate and attach rate over the epochs, the time steps as bands.

    Args:
        summary: As :func:`timm_rep.runs.read_summary` gives it. Only what it has is drawn.
        model: Name for the title.
        published: Epoch of the weights that are published, for a line there.

    Returns:
        A matplotlib figure.

    Raises:
        UserError: If it has none of them.
    """
    def noted(*columns: str) -> List[str]:
        return [name for name in columns if any(math.isfinite(row.get(name, math.nan)) for row in summary)]

    panels: List[Tuple[str, List[str], float]] = [
        ('accuracy (%)', noted('eval_top1', 'eval_top5'), 2.0),
        ('loss', noted('train_loss', 'eval_loss'), 2.0),
        ('learning rate', noted('lr'), 1.1),
        ('attach rate', noted('train_attach_rate'), 1.1),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        raise UserError(f'none of accuracy, loss and learning rate is noted; there is {", ".join(summary[0])}')
    styles = dict(
        eval_top1=dict(label='held-out top-1', color=VERMILLION),
        eval_top5=dict(label='held-out top-5', color=GREEN, linestyle='--'),
        train_loss=dict(label='training', color=BLUE, linestyle='--'),
        eval_loss=dict(label='held-out', color=VERMILLION),
        lr=dict(color=BLACK),
        train_attach_rate=dict(color=PURPLE),
    )
    title = model or 'training run'
    if noted('eval_top1'):
        measured = [row for row in summary if math.isfinite(row.get('eval_top1', math.nan))]
        best = max(measured, key=lambda row: row['eval_top1'])
        at_end = measured[-1]
        title += f': top-1 {at_end["eval_top1"]:.2f}% at the end'
        title += ' (the best)' if best is at_end else f', best {best["eval_top1"]:.2f}% (epoch {best["epoch"]:.0f})'

    heights = [height for _, _, height in panels]
    figure = _new_figure(11, 1.3 + 1.45 * sum(heights), title)
    steps, epochs = time_steps(summary), [int(row['epoch']) for row in summary]
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for position, (axes, (label, columns, _)) in enumerate(zip(rows, panels)):
        _draw_bands(axes, steps, labels=position == 0)
        for column in columns:
            _plot_column(axes, summary, column, **styles[column])
        axes.set_ylabel(label)
        if published is not None:
            axes.axvline(published, color='0.5', linestyle=':', linewidth=2, label=None if position else 'published')
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=11, ncols=3)
        values = [row[name] for row in summary for name in columns if math.isfinite(row.get(name, math.nan))]
        if label == 'loss' and 0 < WIDE_LOSS * min(values) < max(values):
            axes.set_yscale('log')
            _log_axis(axes.yaxis)
        elif label in ('learning rate', 'attach rate'):
            axes.set_ylim(0, 1.08 * max(values) or 1.0)
        _tidy(axes)
        if columns[0] == 'eval_top1':
            axes.plot(best['epoch'], best['eval_top1'], marker='*', markersize=14, color=VERMILLION, zorder=3)
    _epoch_axis(rows[-1], epochs)
    figure.align_ylabels(rows)
    return figure


def _power_label(exponent: float) -> str:
    """``2 ** exponent`` as text, as a fraction below one."""
    return f'{2 ** exponent:g}' if exponent >= 0 else f'1/{2 ** -exponent:g}'


def _edges(numbers: List[int]) -> List[float]:
    """Borders of cells around whole numbers."""
    return [*(number - 0.5 for number in numbers), numbers[-1] + 0.5]


def _column_mean(values: Tensor, epochs: List[int], chosen: List[int]) -> Tensor:
    return values[:, [epochs.index(epoch) for epoch in chosen]].nanmean(dim=1)


def draw_branch_gradients(gradients: BranchGradients, steps: Optional[List[TimeStep]] = None, model: str = '') -> Any:
    """Draw the gradient magnitude of origin and side branches by depth and epoch (RepAn, Fig. 1).

    In the middle their ratio as colours, above it both over the epochs, beside it both over the depth at the start and
    the end of the time steps.

    Args:
        gradients: The magnitudes.
        steps: Time steps of the run, if it has any.
        model: Name for the title.

    Returns:
        A matplotlib figure.

    Raises:
        UserError: If no layer has both an origin and a side branch.
    """
    from matplotlib.ticker import MaxNLocator

    ratio = gradients.sides / gradients.origin
    ratio[~(torch.isfinite(ratio) & (ratio > 0))] = math.nan
    if ratio.isnan().all():
        raise UserError('no layer has gradients of both an origin and a side branch')
    epochs, depths = gradients.epochs, gradients.depths
    steps = [step for step in steps or [] if step.first in epochs and step.last in epochs]
    period = ' of a time step' if steps else ''
    steps_or_run = steps or [TimeStep(0, epochs[0], epochs[-1])]
    share = (ratio > 1).sum().item() / (~ratio.isnan()).sum().item()

    title = 'gradients of side and origin branches' + (f', {model}' if model else '')
    figure = _new_figure(13, 8.6, title)
    grid = figure.add_gridspec(2, 3, width_ratios=(2.2, 0.06, 1), height_ratios=(1, 1.7))
    over_epochs, middle = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    colours, over_depth = figure.add_subplot(grid[1, 1]), figure.add_subplot(grid[1, 2])
    note = figure.add_subplot(grid[0, 2])

    branches = ((gradients.sides, VERMILLION, 'side branches'), (gradients.origin, BLUE, 'origin branch'))
    _draw_bands(over_epochs, steps, labels=True)
    for values, colour, label in branches:
        over_epochs.plot(
            epochs, values.nanmedian(dim=0).values, color=colour, label=label, linewidth=2,
            marker='o' if len(epochs) <= MARKED_EPOCHS else None, markersize=4)
    over_epochs.set(ylabel='gradient (RMS of elements),\nmedian of the layers', yscale='log')
    _log_axis(over_epochs.yaxis)
    _tidy(over_epochs)
    _epoch_axis(over_epochs, epochs)

    logs = ratio.log2()
    limit = min(max(round(logs[~logs.isnan()].abs().quantile(0.98).item()), 2), int(math.log2(MAX_RATIO)))
    middle.set_facecolor(MISSING)
    image = middle.pcolormesh(
        _edges(epochs), _edges(depths), logs.numpy(), cmap=DIVERGING, vmin=-limit, vmax=limit)
    for step in steps[1:]:
        middle.axvline(step.first - 0.5, color=BLACK, linewidth=1, linestyle=':')
    bar = figure.colorbar(image, cax=colours, ticks=range(-limit, limit + 1), extend='both')
    bar.ax.set_yticklabels([_power_label(exponent) for exponent in range(-limit, limit + 1)])
    bar.ax.tick_params(labelsize=11)
    bar.set_label('side / origin', fontsize=12)
    middle.set(ylabel='depth (layers from the input)')
    middle.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _tidy(middle)
    middle.grid(visible=False)
    _epoch_axis(middle, epochs)

    for chosen, line, when in (
            ([step.first for step in steps_or_run], '-', f'first epoch{period}'),
            ([step.last for step in steps_or_run], ':', f'last epoch{period}'),
    ):
        for values, colour, label in branches:
            over_depth.plot(
                _column_mean(values, epochs, chosen), depths, color=colour, linestyle=line, linewidth=2,
                label=f'{label}, {when}')
    over_depth.set(xlabel='gradient (RMS of elements)', xscale='log', ylim=middle.get_ylim())
    _log_axis(over_depth.xaxis)
    over_depth.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _tidy(over_depth)

    note.axis('off')
    note.legend(
        *over_depth.get_legend_handles_labels(), loc='upper left', frameon=False, fontsize=12, borderaxespad=0)
    note.text(
        0, 0.05, f'Side branches have the larger gradient\nin {100 * share:.0f}% of all layers and epochs.',
        transform=note.transAxes, fontsize=12)
    return figure


def draw_branch_similarity(similarities: List[BranchSimilarity], model: str = '', source: str = '') -> Any:
    """Draw one heat map of cosine similarities for each kind of layer (OREPA, Fig. 7).

    Args:
        similarities: As :func:`branch_similarities` gives them.
        model: Name for the title.
        source: Which weights they are of, for the title.

    Returns:
        A matplotlib figure.
    """
    title = '\n'.join(filter(None, ('cosine similarity of branch kernels', ', '.join(filter(None, (model, source))))))
    sizes = [len(similarity.branches) for similarity in similarities]
    widths = [2.0 + 0.95 * size for size in sizes]
    figure = _new_figure(max(sum(widths) + 1.2, 7.0), 2.8 + 0.8 * max(sizes), title)
    panels = figure.subplots(1, len(similarities), squeeze=False, width_ratios=widths)[0]
    for axes, similarity in zip(panels, similarities):
        axes.set_facecolor(MISSING)
        image = axes.imshow(similarity.cosine.numpy(), cmap=DIVERGING, vmin=-1, vmax=1)
        for row, values in enumerate(similarity.cosine.tolist()):
            for column, value in enumerate(values):
                axes.text(
                    column, row, '-' if math.isnan(value) else f'{value:.2f}'.replace('-0.00', '0.00'), ha='center',
                    va='center', fontsize=12, color='white' if abs(value) > 0.6 else BLACK)
        ticks = range(len(similarity.branches))
        axes.set_xticks(ticks, similarity.branches, rotation=35, ha='right', rotation_mode='anchor', fontsize=12)
        axes.set_yticks(ticks, similarity.branches, fontsize=12)
        axes.spines[:].set_visible(False)
        axes.set_anchor('N')
        count = len(similarity.layers)
        axes.set_title(f'{similarity.kind}\nmean of {count} layer{"s" if count > 1 else ""}', fontsize=12)
    bar = figure.colorbar(image, ax=panels, shrink=0.8)
    bar.set_label('cosine similarity', fontsize=12)
    return figure


def _numbered(folder: Path, pattern: str) -> List[Path]:
    """Files whose name has a number, the highest first."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := re.fullmatch(pattern, path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _newest_training_form(run_dir: Path) -> Tuple[nn.Module, str]:
    """The model of a run with its newest weights that can be read, and the name of their file."""
    snapshots = _numbered(run_dir, r'time_step-(\d+)\.safetensors')
    checkpoints = _numbered(run_dir, r'checkpoint-(\d+)\.pth\.tar')
    files = [run_dir / 'last.pth.tar', *snapshots, *checkpoints, run_dir / 'model_best.pth.tar']
    files = [path for path in files if path.is_file()]
    if not files:
        raise FileNotFoundError(f'no weights in training form in {run_dir}')
    reasons = []
    for path in files:  # a killed run may have left a file half written
        try:
            return load_training_form(path), path.name
        except (OSError, ValueError, RuntimeError) as e:
            reasons.append(str(e))
    raise UserError(reasons[0])


def _annealing(run_dir: Path, model: str) -> Any:
    return draw_annealing(read_summary(run_dir / 'summary.csv'), model)


def _branch_gradients(run_dir: Path, model: str) -> Any:
    gradients = read_branch_gradients(run_dir / 'branch_gradients.csv')
    summary = run_dir / 'summary.csv'
    return draw_branch_gradients(gradients, time_steps(read_summary(summary)) if summary.is_file() else [], model)


def _branch_similarity(run_dir: Path, model: str) -> Any:
    weights, source = _newest_training_form(run_dir)
    return draw_branch_similarity(branch_similarities(weights), model, source)


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
        ImportError: If matplotlib, of the extra ``demo``, is missing.
        FileNotFoundError: If there is no such run.
        FileExistsError: If a file of one of these names is there that is no figure of ours. Nothing is written then.
        UserError: If there are data for none of the figures.
    """
    if importlib.util.find_spec('matplotlib') is None:
        raise ImportError('figures also need matplotlib: pip install "timm_rep[demo]"')
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f'no run folder at {run_dir}')
    output = run_dir if output is None else Path(output)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f'output {output} is a file, not a folder')
    for name in FIGURES:
        _check_replaceable(output / name)
    model = str(read_run_args(run_dir / 'args.yaml').get('model') or '')

    figures, reasons = {}, []
    for name, draw in FIGURES.items():
        try:
            figures[name] = draw(run_dir, model)
        except (OSError, ValueError, RuntimeError) as e:
            _logger.debug('traceback of the reason', exc_info=True)
            reasons.append(f'{name}: {" ".join(str(e).split())}')
    if not figures:
        raise UserError(f'nothing to draw of {run_dir}; ' + '; '.join(reasons))
    for reason in reasons:
        _logger.warning(f'left out {reason}')
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(output / name, metadata=dict(Software=SIGNATURE.decode()))
    return [output / name for name in figures]
