"""Table and picture of the runs of a folder: top-1 of each form, paired by seed with the plain network's.

    python experiments/cifar10_fast/table.py experiments/results/cifar10_fast/NAME

prints the table and writes `results.md` and `results.png` into the folder.
"""
import json
import math
import statistics
import sys
from pathlib import Path

# 97.5th percentiles of Student's t for 1, 2, ... degrees of freedom.
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
TITLES = dict(
    plain='plain', orepa='OREPA', orepa_unscaled='OREPA without scales', rep='REP', dbb='DBB', acb='ACB',
    doconv='DO-Conv', mobileone='MobileOne')


def t975(freedom):
    return T975[freedom - 1] if freedom <= len(T975) else 1.96 + 2.37 / freedom + 2.82 / freedom ** 2


def mean_and_error(values):
    """Mean, standard error, and half of the 95% interval; None and None of a single value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, None, None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, error, error * t975(len(values) - 1)


def drawn_error(values):
    """Mean, and what is drawn of the interval: nothing of two values, whose interval is wider than the picture."""
    mean, _, half = mean_and_error(values)
    return mean, half if len(values) > 2 else 0


def load(folder):
    """Settings, runs and timing (None if not measured) of a folder."""
    def read(path):
        return json.loads(path.read_text()) if path.exists() else None
    runs = [read(path) for path in sorted(folder.glob('*-seed*.json'))]
    return read(folder / 'settings.json'), runs, read(folder / 'timing.json')


def searches(runs):
    """Of every form, top-1 on the images set aside by learning rate."""
    found = {}
    for run in runs:
        if run['grid']:
            found.setdefault(run['form'], {})[run['lr']] = None if run['diverged'] else run['top1']
    order = list(TITLES)
    return {form: dict(sorted(found[form].items())) for form in sorted(
        found, key=lambda form: order.index(form) if form in order else len(order))}


def best_rate(rates):
    return max(rates, key=lambda lr: -1 if rates[lr] is None else rates[lr])


def groups(settings, runs):
    """(form, epochs) -> {seed: top-1}, of the runs at the form's best rate; equal epochs first."""
    found = searches(runs)
    result = {}
    for equal_time in (False, True):
        for form, rates in found.items():
            for run in runs:
                if run['form'] == form and not run['grid'] and run['lr'] == best_rate(rates) and (
                        (run['epochs'] != settings['epochs']) == equal_time):
                    result.setdefault((form, run['epochs']), {})[run['seed']] = run['top1']
    return result


def paired(values, plain):
    """Differences of the seeds that both have."""
    return [values[seed] - plain[seed] for seed in sorted(values) if seed in plain]


def row(settings, timing, form, epochs, values, plain, lr):
    ratio = timing['ratios'].get(form) if timing else None
    mean, _, _ = mean_and_error(list(values.values()))
    sigma = f'{statistics.stdev(values.values()):.2f}' if len(values) > 1 else ''
    cells = [TITLES.get(form, form), f'{epochs:g}', f'{lr:g}', str(len(values)), f'{mean:.2f}', sigma]
    differences = [] if form == 'plain' else paired(values, plain)
    if not differences:
        cells += ['', '', '']
    else:
        mean, error, half = mean_and_error(differences)
        known = [''] * 2 if half is None else [f'{error:.2f}', f'{mean - half:+.2f} to {mean + half:+.2f}']
        cells += [f'{mean:+.2f} ({len(differences)})', *known]
    cells += ['' if ratio is None else f'{ratio:.2f}',
              '' if ratio is None else f"{ratio * epochs / settings['epochs']:.2f}"]
    return '| ' + ' | '.join(cells) + ' |'


def head(*cells):
    return ['| ' + ' | '.join(cells) + ' |', '|---' + '|--:' * (len(cells) - 1) + '|']


def markdown(settings, runs, timing):
    found, data = searches(runs), settings['data']
    described = {f"{run['hardware']}; {' '.join(f'{k} {v}' for k, v in run['versions'].items())}." for run in runs}
    lines = [
        f"# CIFAR-10, network {settings['network']}: which form trains best?", '',
        f"{data['train']} training images, top-1 on {data['test']} test images after the last epoch, "
        f"{settings['epochs']} epochs, batch {settings['batch_size']}, Nesterov momentum {settings['momentum']}, "
        f"weight decay {settings['weight_decay']}, {'bfloat16 autocast' if settings['amp'] else 'float32'}.", '',
        *sorted(described), '', '## Comparison', '',
        'Differences are paired by seed (of so many seeds); the interval is of 95% (t). Times are relative to the '
        'plain network, of steps taken in turns.', '',
        *head('form', 'epochs', 'lr', 'seeds', 'top-1', 'sigma', 'minus plain', 'SE', '95%', 'time per epoch', 'time')]
    by_group = groups(settings, runs)
    plain = by_group.get(('plain', settings['epochs']), {})
    for (form, epochs), values in by_group.items():
        lines.append(row(settings, timing, form, epochs, values, plain, best_rate(found[form])))
    rates = sorted({lr for of_form in found.values() for lr in of_form})
    lines += ['', f"## Learning rates: top-1 on {settings['set_aside']} training images set aside, one seed", '',
              *head('form', *(f'{lr:g}' for lr in rates), 'best')]
    for form, of_form in found.items():
        best = best_rate(of_form)
        edge = ' (edge of the grid)' if best in (min(of_form), max(of_form)) else ''
        said = {lr: 'diverged' if top1 is None else f'{top1:.2f}' for lr, top1 in of_form.items()}
        cells = [TITLES.get(form, form), *(said.get(lr, '') for lr in rates), f'{best:g}{edge}']
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def draw(settings, runs, timing, path):
    """Two panels over the time of a run: top-1 of each seed, and the paired difference to plain with its interval."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    by_group = groups(settings, runs)
    plain = by_group.get(('plain', settings['epochs']), {})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    colours = {form: f'C{index}' for index, form in enumerate(searches(runs))}
    for (form, epochs), values in by_group.items():
        time = (timing['ratios'].get(form, 1) if timing else 1) * epochs / settings['epochs']
        equal_time = epochs != settings['epochs']
        x = time * 0.94 ** (list(colours).index(form) * equal_time)  # those of equal time side by side, left of plain
        style = dict(color=colours[form], marker='s' if equal_time else 'o')
        label = f'{TITLES.get(form, form)}, {epochs:g} epochs'
        mean, half = drawn_error(list(values.values()))
        left.scatter([x] * len(values), list(values.values()), s=12, alpha=0.5, linewidths=0, **style)
        left.errorbar([1.015 * x], [mean], [half], capsize=3, label=label, **style)
        if form != 'plain' and paired(values, plain):
            differences = paired(values, plain)
            mean, half = drawn_error(differences)
            right.scatter([x] * len(differences), differences, s=12, alpha=0.5, linewidths=0, **style)
            right.errorbar([1.015 * x], [mean], [half], capsize=3, label=label, **style)
    right.axhline(0, color=colours.get('plain', 'grey'), linewidth=1)
    left.set_ylabel('top-1 (%): seeds, mean, 95% interval')
    right.set_ylabel('difference to plain, paired by seed (points)')
    ticks = (1, 1.5, 2, 3, 4)
    for axes in (left, right):
        axes.set_xscale('log')
        axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel('training time (plain = 1; squares: equal time, drawn left of it)')
    figure.legend(*left.get_legend_handles_labels(), loc='outside lower center', ncol=4, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    (folder,) = map(Path, sys.argv[1:] if argv is None else argv)
    settings, runs, timing = load(folder)
    if not runs:
        sys.exit(f'error: {folder} holds no runs')
    table = markdown(settings, runs, timing)
    (folder / 'results.md').write_text(table)
    if groups(settings, runs):
        draw(settings, runs, timing, folder / 'results.png')
    print(table)


if __name__ == '__main__':
    main()
