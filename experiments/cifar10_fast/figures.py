"""Why? Gradients of side and origin branches (RepAn, Fig. 1), and how alike branches are at the end (OREPA, Fig. 7).

    python experiments/cifar10_fast/figures.py experiments/results/cifar10_fast/anneal_NAME [ARM ...]

draws them from the runs of seed 0 of `anneal.py`, into the folder: `gradients.png` and `similarity.png` of all forms
and arms, and `gradients-FORM-ARM.png` by depth and epoch, of the arms that are named (restarts, authors and measured0).
"""
import math
import statistics
import sys
from pathlib import Path

from anneal import LOGGED_SEED
from arms import DESCENT, RESTARTS, arm_of
from table import load
from table_anneal import ORDER, groups, sort_out, title

from timm_rep.report.plots import ORIGIN, draw_branch_gradients

DETAILED = (RESTARTS, 'authors', 'measured0')


def logged(runs):
    """(form, arm) -> the run whose branches were noted."""
    found = {key: of_seed.get(LOGGED_SEED, {}) for key, of_seed in groups(runs).items()}
    return {key: run for key, run in found.items() if 'branch_gradients' in run and not run['diverged']}


def gradient_rows(run):
    """A row for each branch, layer and epoch, as `Annealer.branch_rows` has them."""
    return [dict(epoch=epoch, depth=row['depth'], branch=row['branch'], rms=rms)
            for row in run['branch_gradients'] for epoch, rms in enumerate(row['rms'])]


def history(run, settings):
    """Cycles as time steps."""
    return [dict(epoch=row['epoch'], time_step=0 if run['arm'] == DESCENT else row['epoch'] // settings['epochs'])
            for row in run['rows']]


def ratios(run):
    """Gradient of the mean side branch over that of the origin, the median of the layers: a number for each epoch."""
    cells = {}
    for row in gradient_rows(run):
        cells.setdefault((row['epoch'], row['depth']), {}).setdefault(row['branch'] == ORIGIN, []).append(row['rms'])
    found = {}
    for (epoch, _), cell in cells.items():
        if len(cell) == 2 and cell[True][0]:
            found.setdefault(epoch, []).append(statistics.mean(cell[False]) / cell[True][0])
    return {epoch: statistics.median(values) for epoch, values in sorted(found.items())}


def means(run):
    """Mean cosine between the branches of each layer; NaN where only one branch has a kernel."""
    return {row['depth']: math.nan if row['mean'] is None else row['mean'] for row in run['branch_similarity']}


def style(arm):
    """Of a line: the colour says the base, broken lines a frozen origin, dots another warm-up, both one descent."""
    parts = arm_of(arm)
    lines = ':' if parts.share else '--' if parts.frozen else '-.' if parts.through else '-'
    return dict(color=f'C{ORDER.index(parts.base)}', linestyle=lines, marker='.', label=arm)


def draw_lines(found, values, level, *, log=False, **labels):
    """A panel for each form, a line for each arm.

    Args:
        found: Runs by form and arm.
        values: Gives the points of a run.
        level: Where to draw a line that says: neither.
        log: Whether the values are ratios.
        **labels: Of the axes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    forms = list(dict.fromkeys(form for form, _ in found))
    figure = Figure(figsize=(1.5 + 5 * len(forms), 4.6), layout='constrained', dpi=110)
    panels = figure.subplots(1, len(forms), squeeze=False, sharey=True)[0]
    for form, axes in zip(forms, panels):
        axes.axhline(level, color='grey', linewidth=1)
        for (of_form, arm), run in found.items():
            if of_form == form:
                points = values(run)
                axes.plot(list(points), list(points.values()), **style(arm))
        axes.set(title=title(form), **labels)
        axes.locator_params(axis='x', integer=True)
        if log:
            axes.set_yscale('log', base=2)
            axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
        axes.label_outer()
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=5, fontsize=8, frameon=False)
    return figure


def main(argv=None):
    folder, *arms = sys.argv[1:] if argv is None else argv
    folder = Path(folder)
    settings, found, _ = load(folder)
    found = logged(sort_out(found)[0])
    if not found:
        sys.exit(f'error: {folder} holds no run of seed {LOGGED_SEED}, at a rate that is chosen, with gradients')
    unknown = [arm for arm in arms if arm not in {arm for _, arm in found}]
    if unknown:
        sys.exit(f"error: there is no run of {', '.join(unknown)}; there are "
                 f"{', '.join(dict.fromkeys(arm for _, arm in found))}")
    draw_lines(
        found, ratios, 1, log=True, xlabel='epoch', ylabel='gradient (RMS): side / origin,\nmedian of the layers',
    ).savefig(folder / 'gradients.png')
    draw_lines(
        found, means, 0, xlabel='depth (layers from the input)', ylabel='cosine similarity of branches, mean',
    ).savefig(folder / 'similarity.png')
    for (form, arm), run in found.items():
        if arm in (arms or DETAILED):
            figure = draw_branch_gradients(
                gradient_rows(run), f"{title(form)}, {arm}", history=history(run, settings))
            figure.savefig(folder / f'gradients-{form}-{arm}.png')


if __name__ == '__main__':
    main()
