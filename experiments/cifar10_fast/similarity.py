"""How alike are the branches of a layer at the end? Mean cosine between their kernels, by depth (OREPA, Fig. 7).

    python experiments/cifar10_fast/similarity.py experiments/results/cifar10_fast/NAME FORM ...

draws the runs of `run.py` at each form's best learning rate into `similarity.png` of that folder: mean, least and
largest of the seeds.
"""
import statistics
import sys
from pathlib import Path

from table import TITLES, best_rate, load, searches


def by_depth(runs, form):
    """Mean cosines of all seeds by depth, of the runs that noted them."""
    rate, found = best_rate(searches(runs)[form]), {}
    for run in runs:
        if run['form'] == form and run['lr'] == rate and not run['grid'] and not run['diverged']:
            for layer in run.get('branch_similarity', []):
                if layer['mean'] is not None:
                    found.setdefault(layer['depth'], []).append(layer['mean'])
    return found


def draw(runs, forms):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.4, 4.2), layout='constrained', dpi=110)
    axes = figure.subplots()
    for form in forms:
        found = by_depth(runs, form)
        means = [statistics.fmean(values) for values in found.values()]
        (line,) = axes.plot(list(found), means, marker='.', label=TITLES.get(form, form))
        least, largest = zip(*((min(values), max(values)) for values in found.values()))
        axes.fill_between(list(found), least, largest, color=line.get_color(), alpha=0.2)
    axes.axhline(0, color='grey', linewidth=1)
    axes.set(xlabel='depth (layers from the input)', ylabel='cosine similarity of branches, mean')
    axes.locator_params(axis='x', integer=True)
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
    return figure


def main(argv=None):
    folder, *forms = sys.argv[1:] if argv is None else argv
    _, runs, _ = load(Path(folder))
    missing = [form for form in forms if form not in searches(runs) or not by_depth(runs, form)]
    if missing or not forms:
        named = ', '.join(missing) or '(name some forms)'
        sys.exit(f'error: no run of {named} in {folder} noted how alike branches are')
    draw(runs, forms).savefig(Path(folder) / 'similarity.png')


if __name__ == '__main__':
    main()
