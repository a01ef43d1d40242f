"""Cost of composing kernels alone, per shape of OREPA layers: forward, backward, and the bound that products set.

The three matrix products of a 1x1-KxK sequence or a Rep-1x1, one forward and two backward, are most of the work. They
are timed by themselves too: in float32, which composing cannot go below, and in bfloat16 with the conversions, which
is what lower precision could save. Then the update of all parameters by torch's three implementations of SGD. All of
it takes turns, round by round, in CPU seconds of the process, so that other work on the machine disturbs little.

    python benchmarks/composition_cost.py --models resnet18 resnet50 --out benchmarks/results/cpu_composition
"""
import argparse
import collections
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import timm
import torch

import timm_rep
from timm_rep.report.cost import hardware_name

PARTS = ('forward', 'backward', 'products', 'products_bf16')
UPDATES = dict(loop=dict(foreach=False), foreach=dict(foreach=True), fused=dict(fused=True))
MIN_SECONDS = 4e-3  # of one time; what takes less is repeated
NOTES = """\
- Milliseconds of one layer, of all threads together unless it is wall time; medians of all rounds, quartiles in the
  .json. "Composition" is forward and backward of all layers of that shape.
- products: the three products of a layer, alone; bf16: of operands that are rounded before each, results added to
  float32. What it saves is an estimate, in parts of the composition.
- Update: SGD with momentum and weight decay.
"""


def shape_of(layer):
    return (type(layer).__name__, tuple(layer._compose(False).shape), getattr(layer, 'groups', 1))


def product_operands(layer):
    """Random factors of a layer's product and a gradient of its result, or None where there is no such product."""
    inner = getattr(layer, 'seq_1x1', getattr(layer, 'seq_first', None))
    if inner is None or inner.numel() == 0:
        return None
    out_channels, in_per_group, height, width = layer._compose(False).shape
    inner_per_group, rows = inner.shape[0] // layer.groups, out_channels // layer.groups * height * width
    return (
        torch.randn(layer.groups, rows, inner_per_group),
        torch.randn(layer.groups, inner_per_group, in_per_group),
        torch.randn(layer.groups, rows, in_per_group),
    )


def products(left, right, grad):
    torch.bmm(left, right)
    torch.bmm(grad, right.transpose(1, 2))
    torch.bmm(left.transpose(1, 2), grad)


def products_bf16(left, right, grad):
    def low(a, b):
        return torch.bmm(a.bfloat16(), b.bfloat16())

    grad + low(left, right)
    left + low(grad, right.transpose(1, 2))
    low(left.transpose(1, 2), grad).float()


def parts_of(layer, channels_last):
    """What is timed of a layer, by name."""
    parameters = [parameter for parameter in layer.parameters() if parameter is not layer.bias]
    kernel = layer._compose(channels_last)
    grad = torch.randn_like(kernel)
    parts = dict(
        forward=lambda: layer._compose(channels_last),
        backward=lambda: torch.autograd.grad(kernel, parameters, grad, retain_graph=True, allow_unused=True),
    )
    operands = product_operands(layer)
    if operands:
        parts.update(products=lambda: products(*operands), products_bf16=lambda: products_bf16(*operands))
    return parts


def updates_of(model):
    parameters = [torch.nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return {
        name: torch.optim.SGD(parameters, 1e-6, momentum=0.9, weight_decay=1e-4, **options).step
        for name, options in UPDATES.items()
    }


def times_in_turns(functions, rounds, clock):
    """Seconds of every function in every round; functions by name."""
    repeats = {}
    for name, function in functions.items():
        function()  # warm-up
        start = clock()
        function()
        repeats[name] = max(1, round(MIN_SECONDS / max(clock() - start, 1e-6)))
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            for _ in range(repeats[name]):
                function()
            seconds[name].append((clock() - start) / repeats[name])
    return seconds


def summary(seconds):
    low, median, high = statistics.quantiles(seconds, n=4)
    return dict(ms=median * 1e3, quartiles=[low * 1e3, high * 1e3])


def measure(name, args, clock):
    torch.manual_seed(0)
    model = timm.create_model(f'orepa_{name}')
    layers = [layer for _, layer in timm_rep.rep_layers(model) if isinstance(layer, timm_rep.layers.LinearRepLayer)]
    counts = collections.Counter(map(shape_of, layers))
    rows = []
    for shape, layer in {shape_of(layer): layer for layer in layers}.items():
        seconds = times_in_turns(parts_of(layer, args.channels_last), args.rounds, clock)
        rows.append(dict(layer=shape[0], kernel=shape[1], groups=shape[2], layers=counts[shape], **{
            part: summary(times) for part, times in seconds.items()}))
    updates = {form: times_in_turns(updates_of(net), args.rounds, clock) for form, net in (
        ('plain', timm.create_model(name)), ('orepa', model))}
    return dict(model=name, shapes=rows, updates={
        form: {kind: summary(times) for kind, times in seconds.items()} for form, seconds in updates.items()})


def total(rows, *parts):
    return sum(row['layers'] * row[part]['ms'] for row in rows for part in parts if part in row)


def cells_of(rows):
    """Columns behind the times of one layer, of rows that are added up."""
    whole, bound, low = (total(rows, *parts) for parts in (('forward', 'backward'), ('products',), ('products_bf16',)))
    return [f'{whole:.1f}', f'{bound / whole:.0%}' if bound else '', f'{(bound - low) / whole:.0%}' if bound else '']


def markdown(report):
    args = report['arguments']
    lines = ['# Cost of composing kernels', '', ', '.join([
        report['hardware'], 'channels-last' if args['channels_last'] else 'contiguous',
        'wall time' if args['wall'] else 'CPU time', f"{args['rounds']} rounds",
        *(f'{package} {version}' for package, version in report['versions'].items()), report['date'][:10],
    ]) + '.', '']
    header = ['network', 'layers', 'kernel', *(part.replace('_', ', ') for part in PARTS)]
    header += ['composition', 'products / composition', 'saved by bfloat16']
    lines += ['| ' + ' | '.join(header) + ' |', '|---' * 3 + '|--:' * (len(header) - 3) + '|']
    for result in report['results']:
        for row in result['shapes']:
            kernel = 'x'.join(map(str, row['kernel'])) + (f", {row['groups']} groups" if row['groups'] > 1 else '')
            times = [f"{row[part]['ms']:.2f}" if part in row else '' for part in PARTS]
            lines.append(f"| {' | '.join([result['model'], str(row['layers']), kernel, *times, *cells_of([row])])} |")
        times = [f"{total(result['shapes'], part):.1f}" for part in PARTS]
        count = str(sum(row['layers'] for row in result['shapes']))
        lines.append(f"| {' | '.join([result['model'], count, '**all**', *times, *cells_of(result['shapes'])])} |")
    header = [f'{form}, {kind}' for form in ('plain', 'OREPA') for kind in UPDATES]
    lines += ['', f"| update | {' | '.join(header)} |"]
    lines.append('|---' + '|--:' * 2 * len(UPDATES) + '|')
    for result in report['results']:
        times = [f"{result['updates'][form][kind]['ms']:.1f}" for form in ('plain', 'orepa') for kind in UPDATES]
        lines.append(f"| {' | '.join([result['model'], *times])} |")
    return '\n'.join([*lines, '', NOTES])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet18'], metavar='NAME', help='that orepa_NAME exists of')
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--wall', action='store_true', help='wall time, for several threads on a quiet machine')
    parser.add_argument('--out', type=Path, metavar='FILE', help='write FILE.json and FILE.md')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.wall else time.process_time
    report = dict(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        arguments=dict(vars(args), out=args.out and args.out.name),
        hardware=hardware_name('cpu'),
        versions=dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__),
        results=[measure(name, args, clock) for name in args.models],
    )
    print(markdown(report))
    if args.out:
        args.out.with_name(args.out.name + '.json').write_text(json.dumps(report, indent=1) + '\n')
        args.out.with_name(args.out.name + '.md').write_text(markdown(report))


if __name__ == '__main__':
    main()
