"""Training methods compared on CIFAR-10 at equal epochs: plain, OREPA, DBB, RepVGG's branches, cosine restarts, RepAn.

All methods of a network fold into the same stock network. They see the same images in the same order with the same
augmentation (for one seed), the same total number of epochs, learning rate and weight decay. Every epoch the FUSED
network is evaluated; reported are its last and its best accuracy.

    python experiments/cifar10/run.py --data DIR --output experiments/results/cifar10/NAME

DIR holds `train/CLASS/*` and `test/CLASS/*`, images of one size. Of every run (method and seed) a file RUN.json with
all epochs is written as soon as it ends, beside settings.json and the table results.md. The same command again does
what is missing; several at once may share an output folder if their seeds or methods differ.
"""
import argparse
import contextlib
import copy
import datetime
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from images import normalized, read_data, train_batches
from timm.models.byobnet import RepVggBlock
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

import timm_rep
from timm_rep.core.expand import expand_fresh_
from timm_rep.models.stock import reset_repvgg_norms_
from timm_rep.report.cost import processor_name

NETWORKS = dict(repvgg_a1='repvgg_a1_cifar', resnet18='resnet18_cifar')
EVAL_BATCH_SIZE = 1000


class Method(NamedTuple):
    """What a method is: branches while training, restarts or none, annealed or not, and with which statistics."""

    label: str
    branches: str
    restarts: bool = False
    annealed: bool = False
    imply_statistics: bool = False


METHODS = dict(
    plain=Method('plain', 'plain'),
    orepa=Method('OREPA', 'orepa'),
    dbb=Method('DBB', 'dbb'),
    sgdr=Method('plain + restarts (SGDR)', 'plain', restarts=True),
    repan_rep=Method('RepAn (REP)', 'rep', restarts=True, annealed=True),
    repan_orepa=Method('RepAn (OREPA)', 'orepa', restarts=True, annealed=True),
    repan_rep_implied=Method('RepAn (REP), implied statistics', 'rep', True, True, True),
    repan_orepa_implied=Method('RepAn (OREPA), implied statistics', 'orepa', True, True, True),
    rep=Method('REP (RepVGG branches)', 'rep'),
    rep_sgdr=Method('REP + restarts', 'rep', restarts=True),
    orepa_sgdr=Method('OREPA + restarts', 'orepa', restarts=True),
)


# Networks


class PlainBlock(RepVggBlock):
    """RepVGG's block with its KxK convolution and norm only: what all its branches fold into, trained as such."""

    def __init__(self, block):
        nn.Module.__init__(self)
        self.groups, self.conv_kxk, self.drop_path = block.groups, block.conv_kxk, block.drop_path
        self.conv_1x1 = self.identity = self.reparam_conv = None
        self.attn, self.act = block.attn, block.act

    def forward(self, x):
        if self.reparam_conv is not None:
            return super().forward(x)
        return self.act(self.attn(self.conv_kxk(x)))


def build_stock(network, num_classes):
    """The stock network; a RepVGG with its three branches, their norms starting at one as in our training forms."""
    model = timm.create_model(f'repan_{NETWORKS[network]}', num_classes=num_classes, inference_mode=True)
    return reset_repvgg_norms_(model)


def build_plain(network, num_classes):
    """The network without side branches: a ResNet as it is, of a RepVGG the chain of its 3x3 convolutions."""
    model = build_stock(network, num_classes)
    for name, block in [(name, block) for name, block in model.named_modules() if isinstance(block, RepVggBlock)]:
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, PlainBlock(block))
    return model


def build_model(network, method, num_classes):
    """A new network in the form that a method trains."""
    branches, architecture = METHODS[method].branches, NETWORKS[network]
    if branches == 'plain':
        return build_plain(network, num_classes)
    if METHODS[method].annealed:
        return timm.create_model(f'repan_{architecture}', rep_layer=branches, num_classes=num_classes)
    if branches == 'orepa':
        return timm.create_model(f'orepa_{architecture}', num_classes=num_classes)
    if branches == 'rep' and network.startswith('repvgg'):
        return build_stock(network, num_classes)
    return expand_fresh_(build_plain(network, num_classes), branches)


def fused(model):
    """The network that is left for inference, as a new one: every RepVGG block a single convolution."""
    model = copy.deepcopy(model).eval()
    return timm.utils.reparameterize_model(timm_rep.fuse(model, inplace=True), inplace=True)


# Training


@torch.inference_mode()
def evaluate(model, images, channels_last):
    """Loss, top-1 accuracy in percent and outputs on all images, in float32."""
    model.eval()
    output = torch.cat([model(normalized(part, channels_last)) for part in images.pixels.split(EVAL_BATCH_SIZE)])
    top1 = 100 * (output.argmax(1) == images.targets).sum().item() / len(output)
    return F.cross_entropy(output, images.targets).item(), top1, output


class Training:
    """What one run trains: the model, its optimizer, the restarts of the learning rate, and the time steps."""

    def __init__(self, method, seed, attach_warmup_epochs, settings, steps, device):
        self.channels_last = settings['channels_last']
        self.model = build_model(settings['network'], method, settings['data']['classes']).to(device)
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)
        time_steps, epochs = settings['time_steps'], settings['epochs']
        if METHODS[method].restarts:
            self.schedule = timm_rep.AnnealingSchedule(time_steps, epochs, attach_warmup_epochs or 0)
        else:
            self.schedule = timm_rep.AnnealingSchedule(1, time_steps * epochs)
        self.steps = steps
        self.optimizer = create_optimizer_v2(
            self.model, opt='sgd', lr=settings['lr'], momentum=0.9, weight_decay=settings['weight_decay'])
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, num_epochs=self.schedule.epochs, cycle_limit=self.schedule.time_steps, cycle_decay=1.0,
            step_on_epochs=False, updates_per_epoch=steps)
        self.annealer = None
        if METHODS[method].annealed:
            self.annealer = timm_rep.Annealer(
                self.model, self.optimizer, self.schedule, seed=seed,
                imply_statistics=METHODS[method].imply_statistics)
        self.autocast = torch.autocast(device.type, torch.bfloat16) if settings['amp'] else contextlib.nullcontext()

    def epoch(self, epoch, batches, test_images):
        """Train an epoch, and evaluate the fused network; the epoch's figures."""
        start = time.perf_counter()
        position = self.annealer.begin_epoch(epoch) if self.annealer else self.schedule.position(epoch)
        if position.begins:
            timm_rep.reset_optimizer(self.optimizer)  # a restart is a fresh optimizer for every method
        lr = self.optimizer.param_groups[0]['lr']
        self.model.train()
        total = torch.zeros((), device=test_images.targets.device)
        for step, (images, targets) in enumerate(batches, start=1):
            with self.autocast:
                loss = F.cross_entropy(self.model(images), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step_update(epoch * self.steps + step)
            total += loss.detach()
        train_loss = total.item() / self.steps  # waits for the device
        seconds = time.perf_counter() - start
        eval_loss, top1, _ = evaluate(fused(self.model), test_images, self.channels_last)
        return dict(
            epoch=epoch, time_step=position.time_step, attach_rate=position.attach_rate if self.annealer else None,
            lr=lr, train_loss=train_loss, eval_loss=eval_loss, eval_top1=top1, seconds=seconds)


def train(method, seed, attach_warmup_epochs, settings, train_images, test_images, device):
    """One run: a row of each epoch, and what is left at the end."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    batch_size, channels_last = settings['batch_size'], settings['channels_last']
    training = Training(
        method, seed, attach_warmup_epochs, settings, len(train_images.targets) // batch_size, device)
    rows = []
    for epoch in range(training.schedule.total_epochs):
        batches = train_batches(train_images, batch_size, generator, channels_last)
        rows.append(training.epoch(epoch, batches, test_images))
        print(
            f'{run_name(method, seed, attach_warmup_epochs)}: epoch {epoch + 1}/{training.schedule.total_epochs}: '
            'train loss {train_loss:.3f}, fused top-1 {eval_top1:.2f}%, {seconds:.1f} s'.format(**rows[-1]), flush=True)

    model, final = training.model, fused(training.model)
    _, training_form_top1, output = evaluate(model, test_images, channels_last)
    _, _, fused_output = evaluate(final, test_images, channels_last)
    return dict(
        method=method,
        seed=seed,
        attach_warmup_epochs=attach_warmup_epochs,
        final_top1=rows[-1]['eval_top1'],
        best_top1=max(row['eval_top1'] for row in rows),
        training_form_top1=training_form_top1,
        fused_difference=((fused_output - output).abs().max() / output.abs().max()).item(),
        diverged=not all(math.isfinite(row['train_loss']) for row in rows),
        train_parameters=sum(p.numel() for p in model.parameters()),
        fused_parameters=sum(p.numel() for p in final.parameters()),
        fused_shapes=[list(tensor.shape) for tensor in final.state_dict().values()],
        machine=machine(device),
        versions=versions(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        epochs=rows,
    )


# Results


def run_name(method, seed, attach_warmup_epochs):
    """Name of a run's file; the warm-up is part of it where there is one to choose."""
    warmup = '' if attach_warmup_epochs is None else f'-warmup{attach_warmup_epochs}'
    return f'{method}{warmup}-seed{seed}'


def machine(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f'{threads} {"core" if threads == 1 else "cores"} of an {processor_name()} CPU'


def versions():
    return dict(
        python=platform.python_version(), torch=torch.__version__, timm=timm.__version__,
        timm_rep=timm_rep.__version__)


def write(path, text):
    """Write a file at once or not at all."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    temporary.write_text(text)
    temporary.replace(path)


def claim_folder(output, settings):
    """Make the output folder, or check that it holds runs of the same settings."""
    path = output / 'settings.json'
    # Seen at once, without what another process is about to write: several may start in one folder.
    there = {found.name for found in output.iterdir() if found.suffix != '.tmp'} if output.exists() else set()
    if path.name in there:
        found = json.loads(path.read_text())
        other = [
            f'{key} is {found.get(key)!r} there and {settings.get(key)!r} here'
            for key in {**found, **settings} if found.get(key) != settings.get(key)
        ]
        if other:
            raise ValueError(f'{output} holds runs of other settings: {"; ".join(other)}. Take another --output')
    elif there:
        raise ValueError(f'{output} holds something else: it has no settings.json. Take another --output')
    else:
        output.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(settings, indent=1) + '\n')


def spread(values, digits=2):
    """Mean, sample standard deviation, and range."""
    if len(values) == 1:
        return f'{values[0]:.{digits}f}'
    return (
        f'{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} '
        f'({min(values):.{digits}f} to {max(values):.{digits}f})'
    )


def row_cells(runs, plain):
    seeds = [run['seed'] for run in runs]
    final = [run['final_top1'] for run in runs]
    steps = []
    if METHODS[runs[0]['method']].restarts:
        last = {row['time_step']: index for index, row in enumerate(runs[0]['epochs'])}
        steps = [statistics.mean(run['epochs'][index]['eval_top1'] for run in runs) for index in last.values()]
    difference = ''
    if runs[0]['method'] != 'plain' and plain and sorted(run['seed'] for run in plain) == sorted(seeds):
        difference = f'{statistics.mean(final) - statistics.mean(run["final_top1"] for run in plain):+.2f}'
    seconds = statistics.median(row['seconds'] for run in runs for row in run['epochs'])
    return [
        str(len(runs)) + (' (diverged)' if any(run['diverged'] for run in runs) else ''),
        spread(final),
        spread([run['best_top1'] for run in runs]),
        difference,
        ', '.join(f'{value:.1f}' for value in steps),
        f'{seconds:.1f}',
        f"{runs[0]['train_parameters'] / 1e6:.2f}M",
    ]


def markdown(settings, runs):
    """The table over all runs of a folder."""
    groups = {}
    for run in sorted(runs, key=lambda run: (list(METHODS).index(run['method']), run['attach_warmup_epochs'] or 0)):
        groups.setdefault((run['method'], run['attach_warmup_epochs']), []).append(run)
    plain = groups.get(('plain', None), [])
    data, total = settings['data'], settings['time_steps'] * settings['epochs']
    described = ', '.join([
        NETWORKS[settings['network']],
        f"{data['train']} training and {data['test']} test images of {data['classes']} classes",
        f"{total} epochs for every method (with restarts {settings['time_steps']} time steps of {settings['epochs']})",
        f"batch {settings['batch_size']}",
        f"learning rate {settings['lr']}",
        f"weight decay {settings['weight_decay']}",
        'bfloat16 autocast' if settings['amp'] else 'float32',
    ])
    lines = ['# CIFAR-10: training methods at equal epochs', '', described + '.', '']
    lines += sorted({
        f"{run['machine']}; {' '.join(f'{name} {version}' for name, version in run['versions'].items())}."
        for run in runs
    })
    header = [
        'method', 'attach warm-up', 'seeds', 'final top-1', 'best top-1', 'final - plain',
        'top-1 at the end of each time step', 's/epoch', 'params']
    lines += ['', '| ' + ' | '.join(header) + ' |', '|---' + '|--:' * (len(header) - 1) + '|']
    for (method, warmup), group in groups.items():
        cells = [METHODS[method].label, '' if warmup is None else str(warmup), *row_cells(group, plain)]
        lines.append('| ' + ' | '.join(cells) + ' |')
    worst = max(run['fused_difference'] for run in runs)
    lines += ['', f"""\
Top-1 in percent, of the fused network on the test images: mean ± sample standard deviation (smallest to largest) over
seeds. "Final" is after the last epoch, "best" the best epoch of each run (chosen on the test images, so too high by
nature). "Attach warm-up" are the epochs of a time step in which the side branches' rate is below one. "s/epoch" is the
median time of a training epoch. "Params" are those of the training form; all fused networks have {
    runs[0]['fused_parameters'] / 1e6:.2f}M. The
fused networks' outputs differ from their training forms' by at most {worst:.0e} of the largest output.
"""]
    return '\n'.join(lines)


def load_runs(output):
    runs = [json.loads(path.read_text()) for path in sorted(output.glob('*-seed*.json'))]
    return [run for run in runs if run['method'] in METHODS]


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, metavar='DIR', help='image folder')
    parser.add_argument('--output', type=Path, required=True, metavar='DIR', help='folder of the results')
    parser.add_argument('--network', choices=tuple(NETWORKS), default='repvgg_a1')
    parser.add_argument(
        '--methods', nargs='+', choices=tuple(METHODS), default=tuple(METHODS), metavar='METHOD',
        help=f'all by default: {", ".join(METHODS)}')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], metavar='SEED')
    parser.add_argument('--time-steps', type=int, default=5)
    parser.add_argument('--epochs', type=int, default=30, help='epochs of a time step')
    parser.add_argument('--attach-warmup-epochs', type=int, default=5, help='of each time step of the RepAn methods')
    parser.add_argument(
        '--warmup-sweep', nargs='+', type=int, default=[], metavar='EPOCHS',
        help='run the RepAn methods with these attach warm-ups, too')
    parser.add_argument('--images', type=int, help='training images, the same number of every class; all by default')
    parser.add_argument('--test-images', type=int, help='test images, the same number of every class; all by default')
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--lr', type=float, default=0.1)
    parser.add_argument('--weight-decay', type=float, default=5e-4)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--amp', action='store_true', help='train under autocast in bfloat16')
    parser.add_argument('--channels-last', action='store_true')
    args = parser.parse_args(argv)
    for split in ('train', 'test'):
        if not (args.data / split).is_dir():
            parser.error(f'--data: {args.data} has no folder {split}')
    try:
        for warmup in (args.attach_warmup_epochs, *args.warmup_sweep):
            timm_rep.AnnealingSchedule(args.time_steps, args.epochs, warmup)
    except ValueError as e:
        parser.error(str(e))
    return args


def main(argv=None):
    args = parse_args(argv)
    device = torch.device(args.device)
    try:
        train_images, test_images, data = read_data(args.data, args.images, args.test_images)
        if len(train_images.targets) < args.batch_size:
            raise ValueError(f'{len(train_images.targets)} training images do not fill a batch of {args.batch_size}')
        names = (
            'network', 'time_steps', 'epochs', 'batch_size', 'lr', 'weight_decay', 'device', 'amp', 'channels_last')
        settings = dict({name: getattr(args, name) for name in names}, data=data)
        claim_folder(args.output, settings)
    except ValueError as e:
        sys.exit(f'error: {e}')
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32; --amp is the faster choice
    train_images, test_images = train_images.to(device), test_images.to(device)

    # One seed after the other, so that what an interrupted job leaves is complete for the first seeds.
    todo = [
        (method, seed, warmup)
        for seed in args.seeds
        for method in args.methods
        for warmup in (dict.fromkeys([args.attach_warmup_epochs, *args.warmup_sweep])
                       if METHODS[method].annealed else [None])
    ]
    for method, seed, warmup in todo:
        path = args.output / f'{run_name(method, seed, warmup)}.json'
        if path.exists():
            print(f'{path.stem}: done already')
        else:
            run = train(method, seed, warmup, settings, train_images, test_images, device)
            write(path, json.dumps(run) + '\n')
        write(args.output / 'results.md', markdown(settings, load_runs(args.output)))
    print(markdown(settings, load_runs(args.output)))


if __name__ == '__main__':
    main()
