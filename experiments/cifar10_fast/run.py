"""Which form trains best? Plain, OREPA, REP and DBB on CIFAR-10, at equal epochs and at equal time.

Every form has its own learning rate, the best of one grid on images set aside. Then, for every seed, all forms start
from the same function and see the same images in the same order.

    python experiments/cifar10_fast/run.py --data DIR --output experiments/results/cifar10_fast/NAME

DIR holds `train/CLASS/*` and `test/CLASS/*`. One file per run, written when it is done. The same command again does
what is missing; several processes may share it, with `--timing` first. `table.py` makes the table and the picture.
"""
import argparse
import contextlib
import fcntl
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from data import read_data, set_aside
from network import NETWORKS, PLAIN, forms, whitening
from training import Run, time_forms, train, versions

from timm_rep.report.cost import hardware_name

GRID_SEED = 1000  # not among the seeds of the comparison
SET_ASIDE = 5000
WAIT_SECONDS = 20


# Files


def write(path, content):
    """Write a file at once or not at all."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    temporary.write_text(json.dumps(content) + '\n')
    temporary.replace(path)


def read(path):
    return json.loads(path.read_text()) if path.exists() else None


@contextlib.contextmanager
def claimed(output, name):
    """Whether this process may do a run: nobody else is about it, and it is not done. A dead process claims nothing."""
    claims = output / '.claims'
    claims.mkdir(exist_ok=True)
    (claims / '.gitignore').write_text('*\n')
    with (claims / name).open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not (output / f'{name}.json').exists()
        # The lock goes with the file, by whatever way the process ends.


def claim_folder(output, settings):
    """Make the output folder, or check that it holds runs of the same settings."""
    output.mkdir(parents=True, exist_ok=True)
    found = read(output / 'settings.json')
    if found is None:
        write(output / 'settings.json', settings)
    elif found != settings:
        other = [f'{key} is {found.get(key)!r} there and {value!r} here'
                 for key, value in settings.items() if found.get(key) != value]
        sys.exit(f'error: {output} holds runs of other settings: {"; ".join(other)}. Take another --output')


# What to do


def grid(args, form):
    return [Run(form, lr, args.epochs, GRID_SEED, grid=True) for lr in args.rates]


def best_rate(output, runs):
    """The learning rate with the best accuracy on the images set aside, or None as long as runs are missing."""
    found = [read(output / f'{run.name}.json') for run in runs]
    return None if None in found else max(found, key=lambda run: (not run['diverged'], run['top1']))['lr']


def equal_time_epochs(output, form, epochs):
    """As many epochs as take the time of the plain network, or None if that is not known."""
    timing = read(output / 'timing.json')
    if timing is None or form == PLAIN or form not in timing['ratios']:
        return None
    return round(epochs / timing['ratios'][form], 2)


def final_runs(args, chosen, seeds, equal_time):
    """Runs of the comparison, one seed after the other, so that what an interrupted job leaves is paired."""
    rates = {form: best_rate(args.output, grid(args, form)) for form in chosen}
    epochs = {form: equal_time_epochs(args.output, form, args.epochs) if equal_time else args.epochs for form in chosen}
    return [
        Run(form, rates[form], epochs[form], seed)
        for seed in range(seeds) for form in chosen if rates[form] is not None and epochs[form] is not None
    ]


def plan(args):
    """All runs that can be told today, in order; and whether these are all."""
    many = [form for form in args.forms if form not in args.few]
    few = [form for form in args.forms if form in args.few]
    runs = []
    for chosen, seeds in ((many, args.seeds), (few, args.few_seeds)):
        searches = [run for of_rate in zip(*(grid(args, form) for form in chosen)) for run in of_rate]
        runs += searches
        if any(best_rate(args.output, grid(args, form)) is None for form in chosen):
            return runs, False
        runs += final_runs(args, chosen, seeds, False) + final_runs(args, chosen, seeds, True)
    return runs, True


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n', 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, metavar='DIR')
    parser.add_argument('--output', type=Path, required=True, metavar='DIR')
    parser.add_argument('--network', choices=list(NETWORKS), default='small')
    parser.add_argument('--forms', nargs='+', choices=forms(), default=[PLAIN, 'orepa', 'rep', 'dbb'])
    parser.add_argument('--seeds', type=int, default=12)
    parser.add_argument('--few', nargs='*', choices=forms(), default=['dbb'], help='forms that are slow: last,')
    parser.add_argument('--few-seeds', type=int, default=4, help='with so many seeds')
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--rates', type=float, nargs='+', default=[0.2, 0.4, 0.1, 0.8], help='the grid, of all forms')
    parser.add_argument('--batch-size', type=int, default=500)
    parser.add_argument('--momentum', type=float, default=0.9, help="Nesterov's")
    parser.add_argument('--weight-decay', type=float, default=5e-4, help='not of norms, scales and biases')
    parser.add_argument('--warmup', type=float, default=0.15, help='share of all steps')
    parser.add_argument('--amp', action=argparse.BooleanOptionalAction, default=True, help='bfloat16')
    parser.add_argument('--set-aside', type=int, default=SET_ASIDE, help='training images to choose the rate by')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--timing', type=int, metavar='ROUNDS', help='measure seconds a step of all forms, and end')
    args = parser.parse_args(argv)
    if not (args.data / 'train').is_dir() or not (args.data / 'test').is_dir():
        parser.error(f'{args.data} has no folders train and test')
    return args


def work(args, settings, train_images, test_images, stem):
    """Do all runs that are missing; wait for those that others are about."""
    part, aside = set_aside(train_images, args.set_aside)
    while True:
        runs, all_told = plan(args)
        missing = [run for run in runs if not (args.output / f'{run.name}.json').exists()]
        if not missing and all_told:
            return
        for run in missing:
            with claimed(args.output, run.name) as mine:
                if not mine:
                    continue
                images = (part, aside) if run.grid else (train_images, test_images)
                write(args.output / f'{run.name}.json', train(run, settings, stem, *images, args.compile))
                break  # and plan anew
        else:
            time.sleep(WAIT_SECONDS)


def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    train_images, test_images, description = read_data(args.data)
    names = ('network', 'epochs', 'batch_size', 'momentum', 'weight_decay', 'warmup', 'amp', 'set_aside')
    settings = dict({name: getattr(args, name) for name in names}, data=description)
    claim_folder(args.output, settings)
    train_images, test_images = train_images.to(device), test_images.to(device)
    stem = whitening(train_images.pixels)
    if args.timing:
        seconds = time_forms([PLAIN, *(form for form in args.forms if form != PLAIN)], settings, stem, train_images,
                             args.timing)
        ratios = {form: round(statistics.median(a / b for a, b in zip(times, seconds[PLAIN])), 4)
                  for form, times in seconds.items()}
        write(args.output / 'timing.json', dict(
            ratios=ratios, seconds={form: [round(value, 5) for value in times] for form, times in seconds.items()},
            batch_size=args.batch_size, hardware=hardware_name(device), versions=versions()))
        print(ratios)
    else:
        work(args, settings, train_images, test_images, stem)


if __name__ == '__main__':
    main()
