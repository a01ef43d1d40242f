"""Which form trains best? Plain, OREPA, REP and DBB on CIFAR-10, at equal epochs and at equal time.

Every form has its own learning rate, the best of one grid on images set aside. Then, for every seed, all forms start
from the same function and see the same images in the same order.

    python experiments/cifar10_fast/run.py --data DIR --output experiments/results/cifar10_fast/NAME

DIR holds `train/CLASS/*` and `test/CLASS/*`. One file per run, written when it is done. The same command again does
what is missing; several processes may share it, with `--timing` first. `table.py` makes the table and the picture.
"""
import argparse
import statistics

import torch
from common import (
    GRID_SEED,
    SETTINGS,
    add_arguments,
    best_rate,
    check_arguments,
    claim_folder,
    read,
    share_out,
    write,
)
from data import read_data, set_aside
from network import NETWORKS, PLAIN, forms, whitening
from training import Run, time_forms, train, versions

from timm_rep.report.cost import hardware_name


def grid(args, form):
    return [Run(form, lr, args.epochs, GRID_SEED, grid=True) for lr in args.rates]


def tuned_rate(args, form):
    """The best learning rate of a form, or None as long as runs of its grid are missing."""
    return best_rate([read(args.output / run.file) for run in grid(args, form)])


def equal_time_epochs(output, form, epochs):
    """As many epochs as take the time of the plain network, or None if that is not known."""
    timing = read(output / 'timing.json')
    if timing is None or form == PLAIN or form not in timing['ratios']:
        return None
    return round(epochs / timing['ratios'][form], 2)


def final_runs(args, chosen, seeds, equal_time):
    """Runs of the comparison, one seed after the other, so that what an interrupted job leaves is paired."""
    rates = {form: tuned_rate(args, form) for form in chosen}
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
        if any(tuned_rate(args, form) is None for form in chosen):
            return runs, False
        runs += final_runs(args, chosen, seeds, False) + final_runs(args, chosen, seeds, True)
    return runs, True


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n', 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_arguments(parser, NETWORKS)
    parser.add_argument('--forms', nargs='+', choices=forms(), default=[PLAIN, 'orepa', 'rep', 'dbb'])
    parser.add_argument('--few', nargs='*', choices=forms(), default=['dbb'], help='forms that are slow: last')
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--rates', type=float, nargs='+', default=[0.2, 0.4, 0.1, 0.8], help='the grid, of all forms')
    parser.add_argument('--timing', type=int, metavar='ROUNDS', help='measure seconds a step of all forms, and end')
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def work(args, settings, train_images, test_images, stem):
    """Do all runs that are missing."""
    part, aside = set_aside(train_images, args.set_aside, args.batch_size)

    def do(run):
        images = (part, aside) if run.grid else (train_images, test_images)
        write(args.output / run.file, train(run, settings, stem, *images, args.execution))

    share_out(args.output, lambda: plan(args), do)


def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    train_images, test_images, description = read_data(args.data)
    settings = dict({name: getattr(args, name) for name in (*SETTINGS, 'epochs')}, data=description)
    claim_folder(args.output, settings)
    train_images, test_images = train_images.to(device), test_images.to(device)
    stem = whitening(train_images.pixels)
    if args.timing:
        seconds = time_forms([PLAIN, *(form for form in args.forms if form != PLAIN)], settings, stem, train_images,
                             args.timing, args.execution)
        ratios = {form: round(statistics.median(a / b for a, b in zip(times, seconds[PLAIN])), 4)
                  for form, times in seconds.items()}
        write(args.output / 'timing.json', dict(
            ratios=ratios, seconds={form: [round(value, 5) for value in times] for form, times in seconds.items()},
            batch_size=args.batch_size, execution=args.execution, hardware=hardware_name(device), versions=versions()))
        print(ratios)
    else:
        work(args, settings, train_images, test_images, stem)


if __name__ == '__main__':
    main()
