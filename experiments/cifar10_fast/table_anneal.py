"""Table and picture of the runs of `anneal.py`: each arm against restarts and one descent, paired by seed.

    python experiments/cifar10_fast/table_anneal.py experiments/results/cifar10_fast/anneal_NAME

prints the table and writes `results.md` and `results.png` into the folder.
"""
import statistics
import sys
from pathlib import Path

from arms import DESCENT, RESTARTS, arm_of, rate_source
from network import PLAIN
from table import TITLES, drawn_error, head, load, mean_and_error, paired

# What arms are compared with: form (None: their own), arm (None: their own with the warm-up of all arms), and its name.
REFERENCES = (
    (None, RESTARTS, 'restarts'), (None, DESCENT, 'one descent'), (PLAIN, DESCENT, "plain's descent"),
    (None, None, 'the usual warm-up'))
ORDER = [DESCENT, RESTARTS, 'authors', 'keep_gain', 'measured', 'measured0', 'compensated']


def title(form):
    return TITLES.get(form, form)


def sort_out(found):
    """The runs of arms, of starts, and of teachers."""
    kinds = [], [], []
    for run in found:
        kinds[0 if 'arm' in run else 2 if 'network' in run else 1].append(run)
    return kinds


def place(form, arm):
    """Where an arm stands in the table."""
    forms, parts = list(TITLES), arm_of(arm)
    return (forms.index(form) if form in forms else len(forms), ORDER.index(parts.base), parts.through, parts.frozen,
            float(parts.share or -1))


def searches(runs):
    """(form, arm) -> {learning rate: top-1 on the images set aside, None if it diverged}."""
    found = {}
    for run in runs:
        if run['grid']:
            found.setdefault((run['form'], run['arm']), {})[run['lr']] = None if run['diverged'] else run['top1']
    return {key: dict(sorted(found[key].items())) for key in sorted(found, key=lambda key: place(*key))}


def rates(runs):
    """(form, arm) -> the arm whose grid tells its learning rate, and that rate; its own only one without a grid."""
    found, chosen = searches(runs), {}
    for form, arm in {(run['form'], run['arm']) for run in runs}:
        source = rate_source(arm_of(arm), [other for of_form, other in found if of_form == form])
        if source is not None:
            grid = found[form, source]
            chosen[form, arm] = source, max(grid, key=lambda lr: -1 if grid[lr] is None else grid[lr])
            continue
        only = {run['lr'] for run in runs if (run['form'], run['arm']) == (form, arm)}
        if len(only) == 1:
            chosen[form, arm] = arm, *only
    return chosen


def groups(runs):
    """(form, arm) -> {seed: run}, of the runs at the arm's rate."""
    result = {}
    for form, arm in sorted(rates(runs), key=lambda key: place(*key)):
        _, lr = rates(runs)[form, arm]
        found = {run['seed']: run for run in runs
                 if (run['form'], run['arm'], run['lr'], run['grid']) == (form, arm, lr, False)}
        if found:
            result[form, arm] = dict(sorted(found.items()))
    return result


def top1(of_seed):
    return {seed: run['top1'] for seed, run in of_seed.items()}


def jumps(run):
    """How far the loss rises where each cycle begins: that of the first steps minus that of the last ones before."""
    before = [run['start']['last_loss'], *(row['last_loss'] for row in run['rows'])]
    return [row['first_loss'] - last for row, last in zip(run['rows'], before)
            if None not in (row.get('first_loss'), last)]


def against(by_group, key, reference):
    """Differences of an arm to another, paired by seed; none to itself."""
    form, arm, _ = reference
    other = (form or key[0], arm or arm_of(key[1])._replace(share=None).name)
    return [] if other == key or other not in by_group else paired(top1(by_group[key]), top1(by_group[other]))


def known_references(by_group):
    """Those that something can be compared with."""
    return [reference for reference in REFERENCES if any(against(by_group, key, reference) for key in by_group)]


def said(differences):
    """Mean, standard error, interval, number of pairs; bold if the interval is without zero."""
    if not differences:
        return ''
    mean, error, half = mean_and_error(differences)
    if half is None:
        return f'{mean:+.2f} (1)'
    text = f'{mean:+.2f} ± {error:.2f}, {mean - half:+.2f} to {mean + half:+.2f} ({len(differences)})'
    return f'**{text}**' if abs(mean) > half else text


def row(settings, by_group, key, chosen):
    form, arm = key
    runs = list(by_group[key].values())
    values = list(top1(by_group[key]).values())
    source, lr = chosen
    after = [run['rows'][settings['epochs'] - 1]['top1'] for run in runs if len(run['rows']) >= settings['epochs']]
    rises = [statistics.mean(found) for found in map(jumps, runs) if found]
    return [
        title(form), arm, f'{lr:g}' if source == arm else f'{lr:g} ({source})', str(len(runs)),
        f'{statistics.mean(after):.2f}' if after else '', f'{statistics.mean(values):.2f}',
        f'{statistics.stdev(values):.2f}' if len(values) > 1 else '',
        f'{statistics.mean(rises):+.2f}' if rises else '', str(sum(run['diverged'] for run in runs) or '')]


def joined(cells):
    return f"| {' | '.join(cells)} |"


def taught(settings, teachers):
    """What there is to say of the teacher: one line or none."""
    if 'teacher' not in settings:
        return []
    said = settings['teacher']
    reached = ''.join(f", top-1 {run['top1']:.2f}" for run in teachers if not run['grid'])
    return ['', (
        f"All arms are trained with a teacher: the plain network {said['network']}, {said['epochs']} epochs at a "
        f"learning rate of {said['lr']:g}{reached}. Their loss is {said['alpha']:g} T² KL + {1 - said['alpha']:g} CE "
        f"with T = {said['temperature']:g}; losses that are noted are CE. The starts have no teacher.")]


def introduction(settings, runs, teachers):
    data, cycles, epochs = settings['data'], settings['cycles'], settings['epochs']
    lines = {f"{run['hardware']}; {' '.join(f'{k} {v}' for k, v in run['versions'].items())}." for run in runs}
    return [
        f"# CIFAR-10, network {settings['network']}: what does annealing add?", '',
        f"{data['train']} training images, top-1 on {data['test']} test images after the last epoch. A start of "
        f"{settings['start_epochs']} epochs, then {cycles} cycles of {epochs} epochs; the attach rate warms up for "
        f"{settings['warmup_share']:g} of a cycle, in whole epochs. Batch {settings['batch_size']}, Nesterov momentum "
        f"{settings['momentum']}, weight decay {settings['weight_decay']}, "
        f"{'bfloat16 autocast' if settings['amp'] else 'float32'}.",
        *taught(settings, teachers), '', *sorted(lines)]


def starts_table(starts):
    lines = ['', '## Starts', '', *head('form', 'lr', 'seeds', 'top-1', 'sigma')]
    for form in sorted({start['form'] for start in starts}, key=lambda form: place(form, DESCENT)):
        found = [start for start in starts if start['form'] == form and not start['grid']]
        if found:
            values = [start['top1'] for start in found]
            sigma = f'{statistics.stdev(values):.2f}' if len(values) > 1 else ''
            cells = [title(form), f"{found[0]['lr']:g}", str(len(found)), f'{statistics.mean(values):.2f}', sigma]
            lines.append(joined(cells))
    return lines


def grid_table(settings, runs):
    found = searches(runs)
    if not found:
        return []
    columns = sorted({lr for grid in found.values() for lr in grid})
    lines = ['', f"## Learning rates: top-1 on {settings['set_aside']} training images set aside, one seed", '',
             *head('form', 'arm', *(f'{lr:g}' for lr in columns), 'best')]
    chosen = rates(runs)
    for (form, arm), grid in found.items():
        best = chosen[form, arm][1]
        edge = ' (edge of the grid)' if len(grid) > 1 and best in (min(grid), max(grid)) else ''
        values = {lr: 'diverged' if value is None else f'{value:.2f}' for lr, value in grid.items()}
        lines.append(joined([title(form), arm, *(values.get(lr, '') for lr in columns), f'{best:g}{edge}']))
    return lines


def markdown(settings, runs, starts, teachers=()):
    by_group, chosen = groups(runs), rates(runs)
    lines = introduction(settings, runs, teachers)
    lines += [
        '', '## Arms', '',
        'The jump is the training loss of the first steps of a cycle minus that of the last ones before it. A learning '
        'rate with a name behind it is that of another arm.', '',
        *head('form', 'arm', 'lr', 'seeds', 'after cycle 1', 'top-1', 'sigma', 'jump', 'diverged')]
    lines += [joined(row(settings, by_group, key, chosen[key])) for key in by_group]
    lines += [
        '', '## Differences', '',
        'Paired by seed: mean ± standard error, 95% interval (t), number of pairs. Bold: the interval is without zero.',
        '', *head('form', 'arm', *(f'minus {name}' for *_, name in known_references(by_group)))]
    for key in by_group:
        cells = [said(against(by_group, key, reference)) for reference in known_references(by_group)]
        lines.append(joined([title(key[0]), key[1], *cells]))
    return '\n'.join([*lines, *starts_table(starts), *grid_table(settings, runs)]) + '\n'


def draw_points(axes, y, differences, colour):
    mean, half = drawn_error(differences)
    axes.scatter(differences, [y] * len(differences), s=12, alpha=0.5, linewidths=0, color=colour)
    axes.errorbar([mean], [y + 0.22], xerr=[half], fmt='o', capsize=3, color=colour)


def draw_differences(axes, by_group, keys, reference, colours):
    """Points of the seeds, mean and interval of each arm, from the top downwards."""
    axes.axvline(0, color='grey', linewidth=1)
    for y, key in enumerate(keys):
        differences = against(by_group, key, reference)
        if differences:
            draw_points(axes, y, differences, colours[key[1]])
    axes.set_yticks(range(len(keys)), [arm for _, arm in keys])
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.grid(axis='x', alpha=0.3)


def draw(runs, path):
    """A row of panels for each form: differences in points of top-1 to each of the references."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    by_group = groups(runs)
    compared = [key for key in by_group if any(against(by_group, key, reference) for reference in REFERENCES)]
    forms = list(dict.fromkeys(form for form, _ in compared or by_group))
    arms = list(dict.fromkeys(arm for _, arm in sorted(by_group, key=lambda key: place(PLAIN, key[1]))))
    colours = {arm: f'C{index % 10}' for index, arm in enumerate(arms)}
    keys = {form: [key for key in by_group if key[0] == form] for form in forms}
    references = known_references(by_group) or REFERENCES[:1]
    figure, grid = plt.subplots(
        len(forms), len(references), squeeze=False, constrained_layout=True, sharex='col',
        figsize=(max(4 * len(references), 5), 0.8 + sum(0.5 + 0.36 * len(of_form) for of_form in keys.values())),
        height_ratios=[0.5 + 0.36 * len(of_form) for of_form in keys.values()])
    for form, panels in zip(forms, grid):
        for axes, reference in zip(panels, references):
            draw_differences(axes, by_group, keys[form], reference, colours)
            axes.set_title(f'{title(form)}: minus {reference[2]}', fontsize=10)
            axes.label_outer()
    for axes in grid[-1]:
        axes.set_xlabel('points of top-1: seeds, mean, 95% interval')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    (folder,) = map(Path, sys.argv[1:] if argv is None else argv)
    settings, found, _ = load(folder)
    runs, starts, teachers = sort_out(found)
    if not runs:
        sys.exit(f'error: {folder} holds no runs')
    table = markdown(settings, runs, starts, teachers)
    (folder / 'results.md').write_text(table)
    if groups(runs):
        draw(runs, folder / 'results.png')
    print(table)


if __name__ == '__main__':
    main()
