"""What does annealing add? From one trained start: a long descent, restarts, and RepAn with each part of its procedure.

A form of a seed is trained normally first, once: that is the start of all its arms, which go on from it for the same
epochs with the same images in the same order. Learning rates are chosen by arm, on images set aside.

    python experiments/cifar10_fast/anneal.py --data DIR --output experiments/results/cifar10_fast/anneal_NAME \
        --rates-from experiments/results/cifar10_fast/NAME

One file per run, written when it is done. The same command again does what is missing; several processes may share it.
`table_anneal.py` makes the table and the picture, `figures.py` shows gradients and likeness of the branches. With
`--teacher` all arms of a folder are trained by a wider network, too; the starts are not.
"""
import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from arms import DESCENT, RESTARTS, TRANSITIONS, arm_of, fits, rate_source
from common import (
    GRID_SEED,
    SETTINGS,
    add_arguments,
    best_rate,
    check_arguments,
    claim_folder,
    hidden_folder,
    read,
    save,
    share_out,
    write,
)
from data import padded, read_data, set_aside, train_batches
from network import NETWORKS, PLAIN, forms, whitening
from teacher import (
    Teacher,
    add_teacher_arguments,
    check_teacher_arguments,
    distillation_of,
    make_teacher,
    teacher_settings,
)
from training import Trainer, descend, rate_factor, result, seconds_used, tell

import timm_rep

FIRST_STEPS = 20
LOGGED_SEED = 0  # its runs note gradients and kernels of the branches
# Generators of the cycles, apart from those of the start and of other seeds.
ORDER_SEED, SAMPLE_SEED, DRAW_SEEDS = 1_000_000, 2_000_000, 1000


class Start(NamedTuple):
    """A form trained normally."""

    form: str
    lr: float
    seed: int
    grid: bool = False

    @property
    def name(self):
        return f"start-{'grid-' if self.grid else ''}{self.form}-seed{self.seed}"

    @property
    def file(self):
        return f".starts/{'grid-' if self.grid else ''}{self.form}-seed{self.seed}.pt"


class Run(NamedTuple):
    """What tells one run from another. Of the grid, it is measured on images set aside, else on the test images."""

    form: str
    arm: str
    lr: float
    seed: int
    grid: bool = False

    @property
    def name(self):
        return f"{'grid-' if self.grid else ''}{self.form}-{self.arm}-lr{self.lr:g}-seed{self.seed}"

    @property
    def file(self):
        return f'{self.name}.json'


# Training


def mean_loss(losses):
    """None if it is no number, as JSON has none either."""
    mean = statistics.fmean(losses)
    return round(mean, 5) if math.isfinite(mean) else None


def make_start(start, settings, stem, train_images, eval_images, args):
    """Train a start; what its files hold."""
    trainer = Trainer(start, settings, stem, train_images.pixels.device, args.execution)
    rows, fused, losses = descend(
        start.name, trainer, settings, settings['start_epochs'], padded(train_images), eval_images,
        torch.Generator().manual_seed(start.seed))
    content = result(start, trainer.model, fused, rows, settings, eval_images)
    content['last_loss'] = mean_loss(losses[-FIRST_STEPS:])
    write(args.output / f'{start.name}.json', content)
    hidden_folder(args.output, '.starts')
    kept = {key: content[key] for key in ('lr', 'top1', 'last_loss')}
    save(args.output / start.file, dict(kept=kept, model=trainer.model.state_dict()))


class Sample:
    """Batches of training images for a transition to measure on, the same each time they are asked for."""

    def __init__(self, images, batch_size, seed):
        self.images, self.batch_size, self.seed = images, batch_size, seed

    def __iter__(self):
        return train_batches(self.images, self.batch_size, torch.Generator().manual_seed(self.seed))


def annealer_of(run, trainer, settings, images):
    """The annealer of a run, and its first epoch: the trained start is time step 0, and a transition comes first.

    Without transitions it leaves the model alone, and does no more than note the branches.
    """
    arm, cycles, epochs = arm_of(run.arm), settings['cycles'], settings['epochs']
    log = dict(log_branches=run.form != PLAIN and not run.grid and run.seed == LOGGED_SEED)
    if not arm.anneals:
        schedule = timm_rep.AnnealingSchedule(1, cycles * epochs)
        return timm_rep.Annealer(trainer.model, trainer.optimizer, schedule, **log), 0
    schedule = timm_rep.AnnealingSchedule(cycles + 1, epochs, arm.warmup_epochs(epochs, settings['warmup_share']))
    return timm_rep.Annealer(
        trainer.model, trainer.optimizer, schedule, seed=DRAW_SEEDS * (run.seed + 1), freeze_origin=arm.frozen,
        batches=Sample(images, settings['batch_size'], SAMPLE_SEED + run.seed), **TRANSITIONS[arm.base], **log), epochs


def train_arm(run, start, settings, stem, train_images, eval_images, execution='eager', distillation=None):
    """Go on from a start; what the run's file holds."""
    device, images = train_images.pixels.device, padded(train_images)
    trainer = Trainer(run, settings, stem, device, execution, distillation)
    trainer.model.load_state_dict(start['model'])
    annealer, offset = annealer_of(run, trainer, settings, images)
    epochs, per_epoch = settings['cycles'] * settings['epochs'], len(images.targets) // settings['batch_size']
    steps = per_epoch * (epochs if arm_of(run.arm).descends_once else settings['epochs'])  # of one descent
    generator = torch.Generator().manual_seed(ORDER_SEED + run.seed)
    rows, fused = [], None
    for epoch in range(epochs):
        begins, used = epoch % settings['epochs'] == 0, seconds_used(device)
        position = annealer.begin_epoch(offset + epoch)
        if begins and run.arm == RESTARTS:
            timm_rep.reset_optimizer(trainer.optimizer)
        used = seconds_used(device) - used
        factors = [
            rate_factor(step % steps, steps, settings['warmup'])
            for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        row, losses, fused = trainer.epoch(
            train_batches(images, settings['batch_size'], generator), factors, eval_images)
        annealer.end_epoch()
        row = dict(
            epoch=epoch, attach_rate=position.attach_rate, first_lr=round(run.lr * factors[0], 6), **row,
            last_loss=mean_loss(losses[-FIRST_STEPS:]))
        if begins:
            row.update(
                transition_seconds=round(used, 2), first_loss=mean_loss(losses[:FIRST_STEPS]),
                first_losses=[mean_loss([loss]) for loss in losses[:FIRST_STEPS]])
        rows.append(row)
        tell(run.name, f'{epoch + 1}/{epochs}', row)
        if row['train_loss'] is None:
            break
    content = dict(result(run, trainer.model, fused, rows, settings, eval_images), start=start['kept'])
    if annealer.branch_rows:
        content.update(branch_gradients=gradients(annealer.branch_rows))
    return content


def gradients(branch_rows):
    """Root mean square of each branch's gradient, epoch by epoch."""
    found = {}
    for row in branch_rows:
        found.setdefault((row['depth'], row['branch']), []).append(float(f"{row['rms']:.4g}"))
    return [dict(depth=depth, branch=branch, rms=values) for (depth, branch), values in found.items()]


# What to do


def grid(args, form, arm):
    return [Run(form, arm, lr, GRID_SEED, grid=True) for lr in args.rates]


def block(args, form, arms, seeds):
    """Runs of some arms of a form, one seed after the other; and whether the rates of all are known."""
    if not args.grid_arms:
        return [Run(form, arm, *args.rates, seed) for seed in range(seeds) for arm in arms], True
    sources = {arm: rate_source(arm_of(arm), args.grid_arms) for arm in arms}
    grids = {source: grid(args, form, source) for source in sources.values()}
    rates = {source: best_rate([read(args.output / run.file) for run in runs]) for source, runs in grids.items()}
    runs = [run for of_rate in zip(*grids.values()) for run in of_rate]
    if None in rates.values():
        return runs, False
    return runs + [Run(form, arm, rates[sources[arm]], seed) for seed in range(seeds) for arm in arms], True


def needs(args, run):
    """What must be trained before a run, in order."""
    teachers = [Teacher(args.teacher, args.teacher_lr, args.teacher_epochs, run.grid)] if args.teacher else []
    return [*teachers, Start(run.form, args.start_rates[run.form], run.seed, run.grid)]


def plan(args):
    """All runs that can be told today, in order, what they need where it is missing; and whether these are all."""
    runs, all_told = [], True
    few = dict.fromkeys(args.few_arms)
    many = [arm for arm in dict.fromkeys(args.arms) if arm not in few]
    for names, seeds in ((many, args.seeds), (few, args.few_seeds)):
        for form in args.forms:
            more, told = block(args, form, [name for name in names if fits(form, arm_of(name))], seeds)
            runs, all_told = runs + more, all_told and told
    possible = {}
    for run in runs:
        if not (args.output / run.file).exists():
            missing = [need for need in needs(args, run) if not (args.output / need.file).exists()]
            possible.update((first.name, first) for first in missing or [run])
    return list(possible.values()), all_told and all(isinstance(run, Run) for run in possible.values())


def work(args, settings, train_images, test_images, stem):
    """Do all runs that are missing."""
    part, aside = set_aside(train_images, args.set_aside, args.batch_size)

    def do(run):
        images = (part, aside) if run.grid else (train_images, test_images)
        if not isinstance(run, Run):
            make = make_start if isinstance(run, Start) else make_teacher
            make(run, settings, stem, *images, args)
            return
        *teachers, start = (args.output / need.file for need in needs(args, run))
        distillation = distillation_of(*teachers, settings, stem, args.execution) if teachers else None
        start = torch.load(start, map_location=args.device)
        write(args.output / run.file, train_arm(run, start, settings, stem, *images, args.execution, distillation))

    share_out(args.output, lambda: plan(args), do)


# Arguments


def arm_name(text):
    try:
        return arm_of(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def form_rate(text):
    form, _, rate = text.partition('=')
    if form not in forms():
        raise argparse.ArgumentTypeError(f'there is no form {form!r}, of {", ".join(forms())}')
    return form, float(rate)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n', 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_arguments(parser, NETWORKS)
    parser.add_argument('--forms', nargs='+', choices=forms(), default=['rep', 'orepa', PLAIN], help='in this order')
    parser.add_argument(
        '--arms', nargs='+', type=arm_name, metavar='ARM', help='with all seeds',
        default=[DESCENT, RESTARTS, 'authors', 'measured', 'measured0'])
    parser.add_argument(
        '--few-arms', nargs='*', type=arm_name, metavar='ARM', help='last, with few seeds',
        default=['authors-frozen', 'measured-frozen', 'measured0-frozen', 'keep_gain', 'compensated'])
    parser.add_argument('--cycles', type=int, default=2)
    parser.add_argument('--epochs', type=int, default=4, help='of a cycle')
    parser.add_argument('--warmup-share', type=float, default=0.5, help='of a cycle, of the attach rate: whole epochs')
    parser.add_argument('--start-epochs', type=int, default=5)
    parser.add_argument(
        '--start-rates', nargs='+', type=form_rate, default=[], metavar='FORM=RATE', help='of the starts')
    parser.add_argument('--rates-from', type=Path, metavar='DIR', help="results of run.py: each form's best rate")
    parser.add_argument('--rates', type=float, nargs='+', default=[0.2, 0.4, 0.1, 0.8],
                        help='the grid of the arms')
    parser.add_argument(
        '--grid-arms', nargs='+', type=arm_name, metavar='ARM', help='with a grid of their own (default: all that '
        'are to be run, none if there is but one rate); others take the rate of the arm that they are a variant of')
    add_teacher_arguments(parser)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    check_teacher_arguments(parser, args)
    if args.grid_arms is None:
        args.grid_arms = [*args.arms, *args.few_arms] if len(args.rates) > 1 else []
    check_arms(parser, args)
    return args


def check_arms(parser, args):
    """Every arm has a learning rate, a warm-up that is possible, and no twin."""
    twins = {}
    for name in dict.fromkeys([*args.arms, *args.few_arms]):
        arm = arm_of(name)
        if args.grid_arms and rate_source(arm, args.grid_arms) is None:
            parser.error(f'nobody says the learning rate of {name}: give --grid-arms one of '
                         f'{", ".join(arm.rate_sources())}')
        epochs = arm.warmup_epochs(args.epochs, args.warmup_share)
        if not 0 <= epochs < args.epochs:
            parser.error(f'{name} would warm up for {epochs} of the {args.epochs} epochs of a cycle')
        twin = twins.setdefault((arm.base, arm.through, arm.frozen, epochs), name)
        if twin != name:
            parser.error(f'{twin} and {name} are the same: both warm up for {epochs} of {args.epochs} epochs')


def start_rates(args, settings):
    """The learning rate of each form's start, as given or from the results of `run.py`."""
    rates = dict(args.start_rates)
    for form in args.forms:
        if form not in rates and args.rates_from:
            found = [read(path) for path in sorted(args.rates_from.glob(f'grid-{form}-lr*.json'))]
            if found:
                rates[form] = best_rate(found)
                other = [key for key in ('network', 'data') if found[0]['settings'][key] != settings[key]]
                if other:
                    sys.exit(f'error: the runs in {args.rates_from} are of another {" and ".join(other)}')
        if form not in rates:
            sys.exit(f'error: nobody says the learning rate of the start of {form}: give --start-rates {form}=RATE, or '
                     '--rates-from a folder with its grid')
        for path in sorted(args.output.glob(f'start-*{form}-seed*.json')):
            found = json.loads(path.read_text())
            if found['form'] == form and found['lr'] != rates[form]:
                sys.exit(f'error: {path} is a start at learning rate {found["lr"]:g}, not {rates[form]:g}. '
                         'Take another --output')
    return rates


def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    train_images, test_images, description = read_data(args.data)
    names = (*SETTINGS, 'start_epochs', 'cycles', 'epochs', 'warmup_share')
    settings = dict({name: getattr(args, name) for name in names}, data=description, **teacher_settings(args))
    args.start_rates = start_rates(args, settings)
    claim_folder(args.output, settings)
    train_images, test_images = train_images.to(device), test_images.to(device)
    work(args, settings, train_images, test_images, whitening(train_images.pixels))


if __name__ == '__main__':
    main()
