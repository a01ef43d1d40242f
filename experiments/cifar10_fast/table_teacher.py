"""Is the gain the teacher's or annealing's? Two folders of `anneal.py`, with a teacher and without, paired by seed.

    python experiments/cifar10_fast/table_teacher.py experiments/results/cifar10_fast/anneal_NAME_teacher \
        experiments/results/cifar10_fast/anneal_NAME

prints the table and writes `teacher.md` and `teacher.png` into the first one.
"""
import statistics
import sys
from pathlib import Path

from arms import DESCENT, RESTARTS
from network import PLAIN
from table import head, load, paired
from table_anneal import REFERENCES, against, draw_points, groups, joined, said, sort_out, taught, title, top1

ASKED = [reference for reference in REFERENCES if reference[:2] in ((None, RESTARTS), (PLAIN, DESCENT))]


def load_both(folder, other):
    """Of the folder with a teacher, settings and teachers, and the groups of each; ends if they do not belong together.
    """
    (settings, runs, _), (without, other_runs, _) = load(folder), load(other)
    for path, found, wanted in ((folder, settings, True), (other, without, False)):
        if found is None:
            sys.exit(f'error: {path} holds no runs')
        if ('teacher' in found) != wanted:
            sys.exit(f"error: the runs in {path} have {'no' if wanted else 'a'} teacher; give the folder with one "
                     'first, then that without')
    differing = [key for key in {**settings, **without} if key != 'teacher' and settings.get(key) != without.get(key)]
    if differing:
        sys.exit(f'error: the runs in {folder} and {other} differ in {" and ".join(differing)}')
    (runs, starts, teachers), (other_runs, other_starts, _) = sort_out(runs), sort_out(other_runs)
    starts, other_starts = ({run['form']: run['lr'] for run in found} for found in (starts, other_starts))
    for form in starts:
        if starts[form] != other_starts.get(form, starts[form]):
            sys.exit(f'error: the starts of {form} are at learning rate {starts[form]:g} in {folder} and '
                     f'{other_starts[form]:g} in {other}')
    return settings, teachers, groups(runs), groups(other_runs)


def effects(with_teacher, without):
    """(form, arm) -> {seed: what the teacher adds}, of the arms and seeds that both folders have."""
    found = {}
    for key in with_teacher:
        a, b = top1(with_teacher[key]), top1(without.get(key, {}))
        both = {seed: a[seed] - b[seed] for seed in a if seed in b}
        if both:
            found[key] = both
    return found


def markdown(settings, teachers, with_teacher, without):
    added = effects(with_teacher, without)
    lines = [
        f"# CIFAR-10, network {settings['network']}: is the gain the teacher's or annealing's?",
        *taught(settings, teachers), '',
        'Paired by seed: mean ± standard error, 95% interval (t), number of pairs. Bold: the interval is without zero. '
        'Each arm is at the learning rate that the table of its folder gives.', '',
        '## What the teacher adds', '', 'Top-1 of the seeds that both have. Last: what it adds to the arm, minus what '
        'it adds to the restarts of the same form; that is how far annealing gains more with a teacher, or less.', '',
        *head('form', 'arm', 'without', 'with', 'with minus without', 'that, minus that of restarts')]
    for key, effect in added.items():
        form, arm = key
        means = (f'{statistics.mean(group[key][seed]["top1"] for seed in effect):.2f}'
                 for group in (without, with_teacher))
        more = [] if arm == RESTARTS else paired(effect, added.get((form, RESTARTS), {}))
        lines.append(joined([title(form), arm, *means, said(list(effect.values())), said(more)]))
    kinds = (('without', without), ('with', with_teacher))
    lines += [
        '', '## What the arm adds', '', 'Both without a teacher, or both with it.', '',
        *head('form', 'arm', *(f'minus {name}, {kind}' for *_, name in ASKED for kind, _ in kinds))]
    for key in added:
        cells = (said(against(group, key, reference)) for reference in ASKED for _, group in kinds)
        lines.append(joined([title(key[0]), key[1], *cells]))
    return '\n'.join(lines) + '\n'


def draw(with_teacher, without, path):
    """A panel for each form: every arm without and with a teacher, minus the plain network's descent without one."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    reference = top1(without[PLAIN, DESCENT])
    keys = {}
    for key in effects(with_teacher, without):
        keys.setdefault(key[0], []).append(key)
    heights = [0.5 + 0.6 * len(of_form) for of_form in keys.values()]
    figure, grid = plt.subplots(
        len(keys), 1, squeeze=False, constrained_layout=True, sharex=True, figsize=(8, 0.8 + sum(heights)),
        height_ratios=heights)
    for (form, of_form), axes in zip(keys.items(), grid[:, 0]):
        axes.axvline(0, color='grey', linewidth=1)
        for y, (key, group, colour) in enumerate(
                (key, *kind) for key in of_form for kind in ((without, 'C0'), (with_teacher, 'C1'))):
            draw_points(axes, y, paired(top1(group[key]), reference), colour)
        axes.set_yticks(
            range(2 * len(of_form)), [text for _, arm in of_form for text in (arm, f'{arm} + teacher')])
        axes.set_ylim(2 * len(of_form) - 0.5, -0.5)
        axes.grid(axis='x', alpha=0.3)
        axes.set_title(f"{title(form)}: minus plain's descent without a teacher", fontsize=10)
    axes.set_xlabel('points of top-1: seeds, mean, 95% interval')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    folder, other = map(Path, sys.argv[1:] if argv is None else argv)
    settings, teachers, with_teacher, without = load_both(folder, other)
    if not effects(with_teacher, without):
        sys.exit(f'error: {folder} and {other} have no arm and seed in common')
    table = markdown(settings, teachers, with_teacher, without)
    (folder / 'teacher.md').write_text(table)
    if (PLAIN, DESCENT) in without:
        draw(with_teacher, without, folder / 'teacher.png')
    print(table)


if __name__ == '__main__':
    main()
