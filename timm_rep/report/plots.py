"""Pictures of a training: its course over the time steps, the gradients of its branches, how alike they are.

They are drawn from plain rows, so of a loop of one's own too:

>>> from timm_rep.report.plots import draw_annealing
>>> history = [dict(epoch=epoch, time_step=epoch // 2, lr=0.1 / (1 + epoch % 2)) for epoch in range(4)]
>>> draw_annealing(history, 'my model').savefig('annealing.png')  # doctest: +SKIP

Needs matplotlib, of the extra ``demo``.
"""
import math
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import UserError
from ..core.walk import annealed_modules
from ..io.extras import require_extra

__all__ = [
    'BranchSimilarity', 'branch_similarities', 'draw_annealing', 'draw_branch_gradients', 'draw_branch_similarity',
]

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
# Panels of the picture of a run: label, height, and style of each column.
PANELS: Tuple[Tuple[str, float, Dict[str, Dict[str, Any]]], ...] = (
    ('accuracy (%)', 2.0, dict(
        eval_top1=dict(label='held-out top-1', color=VERMILLION),
        eval_top5=dict(label='held-out top-5', color=GREEN, linestyle='--'))),
    ('loss', 2.0, dict(
        train_loss=dict(label='training', color=BLUE, linestyle='--'),
        eval_loss=dict(label='held-out', color=VERMILLION))),
    ('learning rate', 1.1, dict(lr=dict(color=BLACK))),
    ('attach rate', 1.1, dict(attach_rate=dict(color=PURPLE))),
)

Rows = Sequence[Mapping[str, Any]]
Points = List[Tuple[int, float]]


@dataclass(frozen=True)
class BranchSimilarity:
    """How alike the branches of one kind of layer are.

    Attributes:
        kind: Class of the layers.
        branches: Names of the branches ``b`` of any of them.
        layers: Names of the layers.
        cosine: Cosine similarity between the branches' kernels ``(b, b)``, mean over the layers that have both; NaN
            where none has, or a kernel is zero in all of them.
    """

    kind: str
    branches: List[str]
    layers: List[str]
    cosine: Tensor


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
    found: Dict[str, Dict[str, Dict[Tuple[str, str], float]]] = {}  # by kind, layer and pair of branches
    for name, module in annealed_modules(model):
        flat = {branch: kernel.flatten().double() for branch, kernel in module.branch_kernels().items()}
        unit = {branch: F.normalize(kernel, dim=0) if kernel.any() else None for branch, kernel in flat.items()}
        if sum(kernel is not None for kernel in unit.values()) < 2:
            continue
        found.setdefault(type(module).__name__, {})[name] = {
            (a, b): math.nan if first is None or second is None else (first @ second).item()
            for a, first in unit.items() for b, second in unit.items()
        }
    if not found:
        raise UserError(f'{type(model).__name__} has no layer with two branches to compare')
    similarities = []
    for kind, layers in sorted(found.items(), key=lambda entry: -len(entry[1])):
        branches = list(dict.fromkeys(branch for cosines in layers.values() for branch, _ in cosines))
        cosine = torch.tensor(
            [[[cosines.get((a, b), math.nan) for b in branches] for a in branches] for cosines in layers.values()],
            dtype=torch.float64)
        similarities.append(BranchSimilarity(kind, branches, list(layers), cosine.nanmean(dim=0)))
    return similarities


class _TimeStep(NamedTuple):
    number: int  # from 0
    first: int  # epoch
    last: int  # epoch, as far as the run went


def _points(rows: Rows, column: str) -> Points:
    """Epochs in which a figure is noted, with the figure; train.py gives what is ours a prefix in summary.csv."""
    pairs = ((row['epoch'], row.get(column, row.get(f'train_{column}'))) for row in rows)
    return [
        (int(epoch), float(value)) for epoch, value in pairs
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]


def _time_steps(history: Rows) -> List[_TimeStep]:
    epochs_of: Dict[int, List[int]] = {}
    for epoch, number in _points(history, 'time_step'):
        epochs_of.setdefault(int(number), []).append(epoch)
    return [_TimeStep(number, min(epochs), max(epochs)) for number, epochs in sorted(epochs_of.items())]


def _new_figure(width: float, height: float, title: str) -> Any:
    require_extra('drawing', 'demo', ['matplotlib'])
    from matplotlib.figure import Figure

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


def _draw_bands(axes: Any, steps: List[_TimeStep], labels: bool) -> None:
    """Shade every other time step, and name them above the axes, the first being 1."""
    words = len(steps) <= LABELLED_STEPS
    if labels and not words:
        axes.text(0, 1.02, 'time step ', transform=axes.transAxes, ha='right', va='bottom', fontsize=11)
    for step, following in zip_longest(steps, steps[1:]):
        start, end = step.first - 0.5, (step.last + 0.5 if following is None else following.first - 0.5)
        if step.number % 2 == 0:
            axes.axvspan(start, end, color='0.93', zorder=0, linewidth=0)
        if labels:
            axes.text(
                (start + end) / 2, 1.02, f'time step {step.number + 1}' if words else str(step.number + 1),
                fontsize=11, transform=axes.get_xaxis_transform(), ha='center', va='bottom')


def _draw_curve(axes: Any, points: Points, **style: Any) -> None:
    marker = 'o' if len(points) <= MARKED_EPOCHS else None
    axes.plot(*zip(*points), marker=marker, markersize=4, linewidth=1.8, **style)


def draw_annealing(history: Rows, title: str = '', *, published: Optional[int] = None) -> Any:
    """Draw accuracy, loss, learning rate and attach rate over the epochs, the time steps as bands.

    Args:
        history: One row for each epoch, ascending, as in ``Annealer.history`` and in timm's summary.csv: ``epoch``,
            and of ``time_step``, ``attach_rate``, ``lr``, ``train_loss``, ``eval_loss``, ``eval_top1`` and
            ``eval_top5`` what there is. Only that is drawn.
        title: Title, such as the name of the model; the accuracy is added.
        published: Epoch of the weights that are published, for a line there.

    Returns:
        A matplotlib figure.

    Raises:
        UserError: If there is nothing to draw, or matplotlib is missing.
    """
    panels = []
    for label, height, styles in PANELS:
        curves = {column: points for column in styles if (points := _points(history, column))}
        if curves:
            panels.append((label, height, styles, curves))
    if not panels:
        columns = ', '.join(history[0]) if history else 'no row'
        raise UserError(f'none of accuracy, loss and learning rate is noted; there is {columns}')
    title = title or 'training run'
    top1 = _points(history, 'eval_top1')
    if top1:
        best = max(top1, key=lambda point: point[1])
        title += f': top-1 {top1[-1][1]:.2f}% at the end'
        title += ' (the best)' if best == top1[-1] else f', best {best[1]:.2f}% (epoch {best[0]})'

    heights = [height for _, height, _, _ in panels]
    figure = _new_figure(11, 1.3 + 1.45 * sum(heights), title)
    steps = _time_steps(history)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (label, _, styles, curves) in zip(rows, panels):
        _draw_bands(axes, steps, labels=axes is rows[0])
        for column, points in curves.items():
            _draw_curve(axes, points, **styles[column])
        if published is not None:
            axes.axvline(
                published, color='0.5', linestyle=':', linewidth=2, label='published' if axes is rows[0] else None)
        _finish_panel(axes, label, [value for points in curves.values() for _, value in points])
        if 'eval_top1' in curves:
            axes.plot(*best, marker='*', markersize=14, color=VERMILLION, zorder=3)
    _epoch_axis(rows[-1], [int(row['epoch']) for row in history])
    figure.align_ylabels(rows)
    return figure


def _finish_panel(axes: Any, label: str, values: List[float]) -> None:
    axes.set_ylabel(label)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=11, ncols=3)
    if label == 'loss' and 0 < WIDE_LOSS * min(values) < max(values):
        axes.set_yscale('log')
        _log_axis(axes.yaxis)
    elif label in ('learning rate', 'attach rate'):
        axes.set_ylim(0, 1.08 * max(values) or 1.0)
    _tidy(axes)


class _Gradients(NamedTuple):
    """Gradient magnitudes of origin and side branches ``(d, e)`` by depth and epoch; NaN where none was noted."""

    epochs: List[int]
    depths: List[int]
    origin: Tensor
    sides: Tensor  # mean over the side branches

    def branches(self) -> Tuple[Tuple[Tensor, str, str], ...]:
        return (self.sides, VERMILLION, 'side branches'), (self.origin, BLUE, 'origin branch')

    def ratio(self) -> Tensor:
        ratio = self.sides / self.origin
        return ratio.where(torch.isfinite(ratio) & (ratio > 0), math.nan)


def _gradients(rows: Rows) -> _Gradients:
    epochs, depths = (sorted({int(row[column]) for row in rows}) for column in ('epoch', 'depth'))
    shape = (2, len(depths), len(epochs))  # of the origin branch, of the side branches
    sums, counts = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for row in rows:
        place = (int(row['branch'] != ORIGIN), depths.index(int(row['depth'])), epochs.index(int(row['epoch'])))
        sums[place] += row['rms']
        counts[place] += 1
    return _Gradients(epochs, depths, *(sums / counts))


def _power_label(exponent: float) -> str:
    """``2 ** exponent`` as text, as a fraction below one."""
    return f'{2 ** exponent:g}' if exponent >= 0 else f'1/{2 ** -exponent:g}'


def _edges(numbers: List[int]) -> List[float]:
    """Borders of cells around whole numbers."""
    return [*(number - 0.5 for number in numbers), numbers[-1] + 0.5]


def draw_branch_gradients(rows: Rows, title: str = '', *, history: Rows = ()) -> Any:
    """Draw the gradient magnitude of origin and side branches by depth and epoch (RepAn, Fig. 1).

    On the left both over the epochs, and their ratio by depth and epoch as colours; beside that both over the depth, at
    the start and the end of the time steps.

    Args:
        rows: One row for each branch, layer and epoch, as in ``Annealer.branch_rows`` and in branch_gradients.csv:
            ``epoch``, ``depth`` (of the layer, from 0 at the input), ``layer``, ``branch`` (``'origin'``, or the name
            of a side branch) and ``rms``, the root mean square of the gradient's elements.
        title: Title, such as the name of the model.
        history: As in :func:`draw_annealing`, for the time steps.

    Returns:
        A matplotlib figure.

    Raises:
        UserError: If no layer has both an origin and a side branch, or matplotlib is missing.
    """
    gradients = _gradients(rows)
    ratio = gradients.ratio()
    if ratio.isnan().all():
        raise UserError('no layer has gradients of both an origin and a side branch')
    epochs = gradients.epochs
    steps = [step for step in _time_steps(history) if step.first in epochs and step.last in epochs]

    figure = _new_figure(13, 8.6, 'gradients of side and origin branches' + (f', {title}' if title else ''))
    grid = figure.add_gridspec(2, 2, width_ratios=(2.2, 1), height_ratios=(1, 1.7))
    over_epochs, note = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    middle, over_depth = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    _draw_bands(over_epochs, steps, labels=True)
    for values, colour, label in gradients.branches():
        _draw_curve(over_epochs, list(zip(epochs, values.nanmedian(dim=0).values.tolist())), color=colour, label=label)
    over_epochs.set(ylabel='gradient (RMS of elements),\nmedian of the layers', yscale='log')
    over_epochs.legend(frameon=False, fontsize=11)
    _log_axis(over_epochs.yaxis)
    _tidy(over_epochs)
    _epoch_axis(over_epochs, epochs)
    _draw_ratio(middle, gradients, steps)
    _draw_over_depth(over_depth, gradients, steps)
    over_depth.set_ylim(middle.get_ylim())

    share = (ratio > 1).sum().item() / (~ratio.isnan()).sum().item()
    note.axis('off')
    note.text(
        0, 1, f'Side branches have the larger gradient\nin {100 * share:.0f}% of all layers and epochs.', va='top',
        transform=note.transAxes, fontsize=12)
    note.legend(  # right above the curves
        *over_depth.get_legend_handles_labels(), loc='lower left', frameon=False, fontsize=11, borderaxespad=0)
    return figure


def _draw_ratio(axes: Any, gradients: _Gradients, steps: List[_TimeStep]) -> None:
    logs = gradients.ratio().log2()
    limit = min(max(round(logs[~logs.isnan()].abs().quantile(0.98).item()), 2), int(math.log2(MAX_RATIO)))
    axes.set_facecolor(MISSING)
    image = axes.pcolormesh(
        _edges(gradients.epochs), _edges(gradients.depths), logs.numpy(), cmap=DIVERGING, vmin=-limit, vmax=limit)
    for step in steps[1:]:
        axes.axvline(step.first - 0.5, color=BLACK, linewidth=1, linestyle=':')
    bar = axes.figure.colorbar(image, ax=axes, ticks=range(-limit, limit + 1), extend='both', pad=0.02, fraction=0.05)
    bar.ax.set_yticklabels([_power_label(exponent) for exponent in range(-limit, limit + 1)])
    bar.ax.tick_params(labelsize=11)
    bar.ax.set_title('side / origin', fontsize=11)  # beside the bar it would run into the next plot
    _tidy(axes)
    axes.grid(visible=False)
    _depth_axis(axes, 'depth (layers from the input)')
    _epoch_axis(axes, gradients.epochs)


def _draw_over_depth(axes: Any, gradients: _Gradients, steps: List[_TimeStep]) -> None:
    epochs, period = gradients.epochs, ' of a time step' if steps else ''
    steps = steps or [_TimeStep(0, epochs[0], epochs[-1])]
    for chosen, line, when in (
            ([step.first for step in steps], '-', f'first epoch{period}'),
            ([step.last for step in steps], ':', f'last epoch{period}'),
    ):
        columns = [epochs.index(epoch) for epoch in chosen]
        for values, colour, label in gradients.branches():
            axes.plot(
                values[:, columns].nanmean(dim=1), gradients.depths, color=colour, linestyle=line, linewidth=2,
                label=f'{label}, {when}')
    axes.set(xlabel='gradient (RMS of elements)', xscale='log')
    _log_axis(axes.xaxis)
    _depth_axis(axes, 'depth')
    _tidy(axes)


def _depth_axis(axes: Any, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylabel(label, fontsize=12)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def draw_branch_similarity(model: nn.Module, title: str = '') -> Any:
    """Draw one heat map of cosine similarities for each kind of layer (OREPA, Fig. 7).

    Args:
        model: Model with rep layers.
        title: Title, such as the name of the model.

    Returns:
        A matplotlib figure.

    Raises:
        UserError: If there is no layer with two branches to compare, or matplotlib is missing.
    """
    similarities = branch_similarities(model)
    sizes = [len(similarity.branches) for similarity in similarities]
    widths = [2.0 + 0.95 * size for size in sizes]
    title = '\n'.join(filter(None, ('cosine similarity of branch kernels', title)))
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
