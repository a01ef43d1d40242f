"""Pictures of a training: its course over the time steps, the gradients of its branches, how alike they are.

They are drawn from plain rows, so of a loop of one's own too:

>>> from timm_rep.report.plots import draw_annealing
>>> history = [dict(epoch=epoch, time_step=epoch // 2, lr=0.1 / (1 + epoch % 2)) for epoch in range(4)]
>>> draw_annealing(history, 'my model').savefig('annealing.png')  # doctest: +SKIP

Needs matplotlib, of the extra ``demo``.
"""
import math
from dataclasses import dataclass
from itertools import chain
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ..core.errors import UserError
from ..core.walk import annealed_modules
from ..io.extras import require_extra

__all__ = [
    'BranchSimilarity', 'branch_similarities', 'draw_annealing', 'draw_branch_gradients', 'draw_branch_similarity',
]

MAX_CELLS, MAX_BANDS = 10 ** 6, 200  # of a picture
ORIGIN = 'origin'
# Okabe and Ito's colours, which colour-blind readers tell apart too.
BLUE, VERMILLION, GREEN, PURPLE, BLACK = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#000000'
# Red where the side branches are ahead, blue where the origin branch is; also for cosines above and below zero.
DIVERGING = 'RdBu_r'
MISSING = '0.85'
RATIOS = {1 / 16: '1/16', 1 / 4: '1/4', 1: '1', 4: '4', 16: '16'}  # of the colours for gradients
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
    found: Dict[str, Dict[str, Dict[str, Tensor]]] = {}  # directions of kernels by kind, layer and branch
    for name, module in annealed_modules(model):
        kernels = {branch: kernel.flatten().double() for branch, kernel in module.branch_kernels().items()}
        if sum(bool(kernel.any()) for kernel in kernels.values()) > 1:
            directions = {branch: kernel / kernel.norm() for branch, kernel in kernels.items()}  # of zeros NaN
            found.setdefault(type(module).__name__, {})[name] = directions
    if not found:
        raise UserError(f'{type(model).__name__} has no layer with two branches to compare')
    similarities = []
    for kind, layers in sorted(found.items(), key=lambda entry: -len(entry[1])):
        branches = list(dict.fromkeys(chain.from_iterable(layers.values())))
        cosine = torch.tensor([
            [[_cosine(directions, a, b) for b in branches] for a in branches] for directions in layers.values()
        ], dtype=torch.float64)
        similarities.append(BranchSimilarity(kind, branches, list(layers), cosine.nanmean(dim=0)))
    return similarities


def _cosine(directions: Mapping[str, Tensor], a: str, b: str) -> float:
    return (directions[a] @ directions[b]).item() if {a, b} <= directions.keys() else math.nan


def _points(rows: Rows, column: str) -> Points:
    """Epochs in which a figure is noted, with the figure; train.py gives what is ours a prefix in summary.csv."""
    pairs = ((row['epoch'], row.get(column, row.get(f'train_{column}'))) for row in rows)
    return [
        (int(epoch), float(value)) for epoch, value in pairs
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]


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


def _epoch_axis(axes: Any, epochs: List[int]) -> None:
    axes.set(xlabel='epoch', xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
    axes.locator_params(axis='x', integer=True, min_n_ticks=1)


def _draw_bands(axes: Any, history: Rows, labels: bool) -> None:
    """Shade every other time step, and number them above the axes, from 1."""
    epochs_of: Dict[int, List[int]] = {}
    for epoch, number in _points(history, 'time_step'):
        epochs_of.setdefault(int(number), []).append(epoch)
    if len(epochs_of) > MAX_BANDS:
        return  # nobody could tell them apart
    for number, epochs in epochs_of.items():
        start, end = min(epochs) - 0.5, max(epochs) + 0.5
        if number % 2 == 0:
            axes.axvspan(start, end, color='0.93', zorder=0, linewidth=0)
        if labels:
            axes.text(
                (start + end) / 2, 1.02, str(number + 1), transform=axes.get_xaxis_transform(), ha='center',
                va='bottom', fontsize=11)
    if labels and epochs_of:
        axes.text(0, 1.02, 'time step ', transform=axes.transAxes, ha='right', va='bottom', fontsize=11)


def _draw_curve(axes: Any, points: Points, **style: Any) -> None:
    axes.plot(*zip(*points), marker='.', linewidth=1.8, **style)


def draw_annealing(history: Rows, title: str = 'training run', *, published: Optional[int] = None) -> Any:
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
    top1 = _points(history, 'eval_top1')
    if top1:
        best = max(top1, key=lambda point: point[1])
        title += f': top-1 {top1[-1][1]:.2f}% at the end, best {best[1]:.2f}% (epoch {best[0]})'

    heights = [height for _, height, _, _ in panels]
    figure = _new_figure(11, 1.3 + 1.45 * sum(heights), title)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (label, _, styles, curves) in zip(rows, panels):
        _draw_bands(axes, history, labels=axes is rows[0])
        for column, points in curves.items():
            _draw_curve(axes, points, **styles[column])
        if published is not None:
            axes.axvline(
                published, color='0.5', linestyle=':', linewidth=2, label='published' if axes is rows[0] else None)
        axes.set_ylabel(label)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=11, ncols=3)
        if label.endswith('rate'):
            axes.set_ylim(bottom=0)
        _tidy(axes)
        if 'eval_top1' in curves:
            axes.plot(*best, marker='*', markersize=14, color=VERMILLION, zorder=3)
    _epoch_axis(rows[-1], [int(row['epoch']) for row in history])
    figure.align_ylabels(rows)
    return figure


def _gradients(rows: Rows) -> Tuple[List[int], List[int], Tensor, Tensor]:
    """Epochs, depths, and gradients ``(d, e)`` of the origin and the mean side branch; NaN where none was noted."""
    epochs, depths = (sorted({int(row[column]) for row in rows}) for column in ('epoch', 'depth'))
    if len(epochs) * len(depths) > MAX_CELLS:
        raise UserError(f'{len(epochs)} epochs of {len(depths)} layers are too many for a picture')
    sums, counts = torch.zeros(2, 2, len(depths), len(epochs), dtype=torch.float64)
    for row in rows:
        place = (int(row['branch'] != ORIGIN), depths.index(int(row['depth'])), epochs.index(int(row['epoch'])))
        sums[place] += row['rms']
        counts[place] += 1
    origin, sides = sums / counts
    return epochs, depths, origin, sides


def _edges(numbers: List[int]) -> List[float]:
    """Borders of cells around whole numbers."""
    return [*(number - 0.5 for number in numbers), numbers[-1] + 0.5]


def draw_branch_gradients(rows: Rows, title: str = '', *, history: Rows = ()) -> Any:
    """Draw the gradient magnitude of origin and side branches by depth and epoch (RepAn, Fig. 1).

    Above both over the epochs, below their ratio by depth and epoch as colours.

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
    from matplotlib.colors import LogNorm

    epochs, depths, origin, sides = _gradients(rows)
    ratio = sides / origin
    if ratio.isnan().all():
        raise UserError('no layer has gradients of both an origin and a side branch')
    share = (ratio > 1).sum().item() / (~ratio.isnan()).sum().item()
    figure = _new_figure(11, 9, '\n'.join(filter(None, (
        f'gradients: side branches ahead in {100 * share:.0f}% of all layers and epochs', title))))
    curves, colours = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.7))
    _draw_bands(curves, history, labels=True)
    for values, colour, label in ((sides, VERMILLION, 'side branches'), (origin, BLUE, 'origin branch')):
        _draw_curve(curves, list(zip(epochs, values.nanmedian(dim=0).values.tolist())), color=colour, label=label)
    curves.set(ylabel='gradient (RMS of elements),\nmedian of the layers', yscale='log')
    curves.legend(frameon=False, fontsize=11)
    _tidy(curves)

    colours.set_facecolor(MISSING)
    image = colours.pcolormesh(
        _edges(epochs), _edges(depths), ratio.numpy(), cmap=DIVERGING, norm=LogNorm(min(RATIOS), max(RATIOS)))
    bar = figure.colorbar(image, ax=colours, extend='both', pad=0.02, fraction=0.05, label='side / origin')
    bar.set_ticks(list(RATIOS), labels=list(RATIOS.values()), minor=False)
    bar.minorticks_off()
    colours.set_ylabel('depth (layers from the input)')
    colours.locator_params(axis='y', integer=True, min_n_ticks=1)
    _tidy(colours)
    colours.grid(visible=False)
    _epoch_axis(colours, epochs)
    return figure


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
        axes.set_title(f'{similarity.kind}\nlayers: {len(similarity.layers)}', fontsize=12)
    figure.colorbar(image, ax=panels, shrink=0.8, label='cosine similarity')
    return figure
