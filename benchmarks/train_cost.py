"""Cost of one SGD step (forward, loss, backward, update): plain, branched (DBB or RepVGG) and OREPA networks.

All forms of a network take turns, round by round, in one process (A B C A B C ...), so that a slow minute of the
machine hits all of them; ratios are formed from the same run. Beside the times stand the peak memory of a step, the
operations it dispatches, and Table 4 of the OREPA paper (arXiv 2204.00826).

    python benchmarks/train_cost.py --models resnet18 --batch 8 --out benchmarks/results/cpu_resnet18_b8

writes the raw data as .json and a table as .md. `--peer DIR` adds the authors' code from a local clone of theirs.
"""
import argparse
import contextlib
import datetime
import gc
import importlib
import importlib.util
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import types
from pathlib import Path

import timm
import torch
import torch.nn as nn
from timm.models.byobnet import RepVggBlock
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import timm_rep
from timm_rep.core.capture import linear_layers
from timm_rep.report.cost import TrainingStep, hardware_name, ratios, seconds_in_turns

MIB = 2 ** 20
DTYPES = dict(fp32=None, bf16=torch.bfloat16)
OPTIMIZERS = {'sgd': {}, 'sgd-foreach': dict(foreach=True), 'sgd-fused': dict(fused=True)}
# Other methods, by their names: the plain network expanded.
METHODS = tuple(name for name in timm_rep.methods.registered_methods() if name not in ('orepa', 'dbb', 'rep'))
FORMS = ('plain', 'branched', 'orepa', 'together', 'captured', 'compiled', *METHODS)
# Table 4 of the paper, 4 V100, batch of 64 per GPU: (seconds per batch, GB of GPU memory).
PAPER = {
    'resnet18': dict(plain=(0.086, 4.2), branched=(0.241, 7.5), orepa=(0.120, 5.2)),
    'resnet34': dict(plain=(0.116, 5.2), branched=(0.424, 11.1), orepa=(0.182, 6.7)),
    'resnet50': dict(plain=(0.204, 10.3), branched=(0.380, 13.7), orepa=(0.252, 11.2)),
    'resnet101': dict(plain=(0.382, 14.5), branched=(0.641, 19.7), orepa=(0.445, 16.1)),
    'repvgg_a0': dict(branched=(0.100, 3.8), orepa=(0.136, 4.2)),
    'repvgg_a1': dict(branched=(0.121, 4.8), orepa=(0.147, 5.5)),
    'repvgg_a2': dict(branched=(0.170, 5.8), orepa=(0.210, 7.4)),
}
NOTES = """\
- One step is zero_grad, forward, cross-entropy, backward, update. Times are medians of all rounds after the warm-up;
  "/ plain" is the ratio of the medians, with the smallest and the largest ratio within one round.
- An update of several micro-batches takes forward and backward of each before it; OREPA composes once for all of them,
  but where it says so, and so do other linear methods.
- Peak memory is what a step allocates above what is live before it (parameters, momentum, input): activations,
  temporaries and gradients. On a CPU the sizes that the allocator hands out, on a GPU `max_memory_allocated`, and what
  a captured graph reserves.
- Operations are the ATen operations that an eager step dispatches; "net" leaves out views and uninitialised
  allocations. Those of a compiled step are not counted.
- Composition counts what composing all kernels of linear layers dispatches, forward and backward.
- plain of a RepVGG is its deploy form with the norms kept, as it would be trained without branches: one 3x3
  convolution, norm and ReLU for each block. The paper has no such column; its ratios for RepVGG are to RepVGG.
- The paper: Table 4, 4 V100, batch of 64 per GPU; ratios to plain.
"""


def keep_one_branch_(model):
    """Make a RepVGG plain: every block keeps its 3x3 convolution and norm, and the activation."""
    for name, block in list(model.named_modules()):
        if isinstance(block, RepVggBlock):
            parent, _, child = name.rpartition('.')
            setattr(model.get_submodule(parent), child, nn.Sequential(block.conv_kxk, block.attn, block.act))
    return model


def authors_model(clone, name):
    """The authors' OREPA network from a clone of their repository: all that this script knows of it."""
    if importlib.util.find_spec('imp') is None:  # they import it without need; gone since Python 3.12
        sys.modules['imp'] = types.ModuleType('imp')
    family, _, variant = name.partition('net' if name.startswith('resnet') else '_')
    sys.path.insert(0, str(clone))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # their constructors print
            convnet_utils = importlib.import_module('convnet_utils')
            convnet_utils.switch_conv_bn_impl('OREPA' if family == 'res' else 'OREPA_VGG')
            return convnet_utils.build_model(f'ResNet-{variant}' if family == 'res' else f'RepVGG-{variant.upper()}')
    finally:
        sys.path.remove(str(clone))


def build_models(name, forms, peer, accum=1):
    """The networks to compare, by form."""
    residual = name.startswith('resnet')

    def plain():
        model = timm.create_model(name)
        return model if residual else keep_one_branch_(model)

    models = {'plain': plain()}
    if 'branched' in forms:
        models['branched'] = timm.create_model(f'dbb_{name}' if residual else name)
    if 'orepa' in forms:
        models['orepa'] = timm.create_model(f'orepa_{name}')
        if accum > 1:
            models['orepa_each'] = timm.create_model(f'orepa_{name}')
    for form in ('together', 'captured'):
        if form in forms:
            models[form] = timm.create_model(f'orepa_{name}')
    for method in METHODS:
        if method in forms:
            models[method] = timm_rep.expand(plain(), method)
    if peer:
        models['authors'] = authors_model(peer, name)
    if 'compiled' in forms:
        models['plain_compiled'] = torch.compile(plain())
        models['orepa_compiled'] = torch.compile(timm.create_model(f'orepa_{name}'))
    return models


def label(name, form):
    branched = 'DBB' if name.startswith('resnet') else 'RepVGG'
    return dict(
        plain='plain',
        branched=branched,
        orepa='OREPA, eager',
        orepa_each='OREPA, composed for each micro-batch',
        together='OREPA, one call for a shape',
        captured='OREPA, one graph',
        authors="authors' OREPA",
        plain_compiled='plain, compiled',
        orepa_compiled='OREPA, compiled',
    ).get(form) or timm_rep.methods.registered_methods()[form].title


class OperationCounter(TorchDispatchMode):
    """Counts ATen operations: all, and those that are neither views nor uninitialised allocations."""

    def __init__(self):
        super().__init__()
        self.all = self.net = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.all += 1
        if not func.is_view and not any(part in name for part in ('detach', '_unsafe_view', 'empty')):
            self.net += 1
        return func(*args, **(kwargs or {}))


def count_operations(step):
    with OperationCounter() as counter:
        step()
    return dict(all=counter.all, net=counter.net)


def count_composition(model):
    """What composing all kernels of a model dispatches, forward and backward; on a GPU kernels that are launched."""
    layers = linear_layers(model)
    if not layers:
        return None

    def compose():
        kernels = [layer._compose(False) for layer in layers] if layers[0]._together is None else (
            layers[0]._together.compose(layers, False))
        torch.autograd.grad(kernels, [p for layer in layers for p in layer.parameters()], [
            torch.ones_like(kernel) for kernel in kernels], allow_unused=True)

    counts = count_operations(compose)
    if next(model.parameters()).device.type == 'cuda':
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            compose()
            torch.cuda.synchronize()
        counts['launches'] = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())
    return counts


def peak_of_allocations(events):
    """Largest sum of the bytes that were allocated and not yet freed, from a trace's memory events in order."""
    live, total, peak = {}, 0, 0
    for event in events:
        address, size = event['args']['Addr'], event['args']['Bytes']
        if size > 0:
            live[address] = size
            total += size
            peak = max(peak, total)
        else:
            total -= live.pop(address, 0)  # what was live before does not count when it goes
    return peak


def peak_memory(step):
    """Bytes that a step has live at most, above what was live before it."""
    step.optimizer.zero_grad()
    gc.collect()
    if step.images.device.type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, 'trace.json')
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())['traceEvents']
    memory = [event for event in events if event['name'] == '[memory]']
    return peak_of_allocations(sorted(memory, key=lambda event: event['ts']))


def graph_bytes(handle):
    """What a captured composition keeps in the memory of its graph; the composition is not captured any more then."""
    sizes = []
    for _ in range(2):
        gc.collect()
        torch.cuda.empty_cache()
        sizes.append(torch.cuda.memory_reserved())
        handle.remove()
    return max(0, sizes[0] - sizes[1])


def ratio(times, base):
    return dict(zip(('of_medians', 'min', 'max'), ratios(times, base)))


def measure(name, args):
    """Times, memory and operations of all forms of one network."""
    torch.manual_seed(args.seed)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    x = torch.randn(args.batch, 3, args.size, args.size, device=args.device).to(memory_format=memory_format)
    target = torch.randint(1000, (args.batch,), device=args.device)
    steps = {
        form: TrainingStep(
            model.to(x.device).to(memory_format=memory_format), x, target, DTYPES[args.dtype],
            micro_batches=args.accum, composed_once=form in ('orepa', 'together', 'captured', *METHODS),
            **OPTIMIZERS[args.optimizer])
        for form, model in build_models(name, args.forms, args.peer, args.accum).items()
    }
    handles = {
        form: timm_rep.capture(steps[form].model, graph=form == 'captured')
        for form in ('together', 'captured') if form in steps}
    print(f'{name}: {args.rounds} rounds of {", ".join(steps)}', file=sys.stderr)
    seconds = dict(zip(steps, seconds_in_turns(
        list(steps.values()), rounds=args.rounds, warmup=args.warmup, repeats=args.steps)))
    forms = {}
    for form, step in steps.items():
        forms[form] = dict(
            label=label(name, form),
            parameters=sum(p.numel() for p in step.model.parameters()),
            operations=None if form.endswith('compiled') else count_operations(step),
            # a graph would be captured anew for that
            composition=None if form == 'captured' else count_composition(step.model),
            peak_bytes=peak_memory(step),
            seconds=seconds[form],
            median_seconds=statistics.median(seconds[form]),
            to_plain=ratio(seconds[form], seconds['plain']),
        )
        if form == 'captured':
            forms[form]['peak_bytes'] += graph_bytes(handles[form])
        forms[form]['memory_to_plain'] = forms[form]['peak_bytes'] / forms['plain']['peak_bytes']
        if 'plain_compiled' in seconds:
            forms[form]['to_plain_compiled'] = ratio(seconds[form], seconds['plain_compiled'])
    return dict(model=name, forms=forms)


def paper_cells(name, form):
    row = PAPER[name]
    if form not in row:
        return ['', '']
    base = row.get('plain', row['branched'])
    (seconds, memory), (base_seconds, base_memory) = row[form], base
    return [
        f'{seconds:.3f} s ({seconds / base_seconds:.2f})',
        f'{memory:.1f} GB ({memory / base_memory:.2f})',
    ]


def markdown(report):
    args, machine, versions = report['arguments'], report['machine'], report['versions']
    results = report['results']
    compiled = any('plain_compiled' in result['forms'] for result in results)
    header = ['network', 'form', 'ms', '/ plain', 'MiB', '/ plain', 'operations (net)', 'parameters']
    header += ['composition: operations (net)', 'paper: step', 'paper: memory']
    if compiled:
        header.insert(4, '/ plain compiled')
    lines = ['# Cost of one SGD step', '', ', '.join([
        machine['hardware'] + (f" of {machine['cores']} cores" if args['device'] == 'cpu' else ''),
        f"batch {args['batch']}" + (f" x {args['accum']} micro-batches" if args['accum'] > 1 else ''),
        f"{args['size']}x{args['size']}",
        args['dtype'] + (' autocast' if args['dtype'] != 'fp32' else ''),
        'channels-last' if args['channels_last'] else 'contiguous',
        args['optimizer'],
        f"{args['rounds']} rounds of {args['steps']} steps",
        ' '.join(f'{package} {version}' for package, version in versions.items()),
        report['date'][:10],
    ]) + '.', '']
    lines += ['| ' + ' | '.join(header) + ' |', '|---' * 2 + '|--:' * (len(header) - 2) + '|']
    for result in results:
        for form, row in result['forms'].items():
            cells = [
                result['model'],
                row['label'],
                f"{row['median_seconds'] * 1e3:.1f}",
                '{of_medians:.2f} ({min:.2f} to {max:.2f})'.format(**row['to_plain']),
                f"{row['peak_bytes'] / MIB:.0f}",
                f"{row['memory_to_plain']:.2f}",
                '{all} ({net})'.format(**row['operations']) if row['operations'] else '',
                f"{row['parameters'] / 1e6:.1f}M",
                '{all} ({net})'.format(**row['composition']) if row['composition'] else '',
                *paper_cells(result['model'], form),
            ]
            if compiled:
                against = row['to_plain_compiled'] if form.endswith('compiled') else None
                cells.insert(4, '{of_medians:.2f} ({min:.2f} to {max:.2f})'.format(**against) if against else '')
            lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join([*lines, '', NOTES])


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--models', nargs='+', choices=tuple(PAPER), default=['resnet18'], metavar='NAME', help=', '.join(PAPER))
    parser.add_argument(
        '--forms', nargs='+', choices=FORMS, default=['plain', 'branched', 'orepa'], metavar='FORM',
        help='plain (always there), branched (DBB; RepVGG for RepVGGs), orepa, together and captured (timm_rep.capture '
        'without and with a graph, which takes a GPU), compiled (plain and OREPA), '
        f'{", ".join(METHODS)}')
    parser.add_argument('--peer', type=Path, metavar='DIR', help="clone of the authors' repository, to measure as well")
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--accum', type=int, default=1, metavar='N', help='micro-batches of an update')
    parser.add_argument('--size', type=int, default=224, help='height and width of the images')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--dtype', choices=tuple(DTYPES), default='fp32', help='bf16 is autocast')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--optimizer', choices=tuple(OPTIMIZERS), default='sgd', help='sgd is the default of torch')
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--steps', type=int, default=1, help='steps in a row whose mean is one time; take 10 on a GPU')
    parser.add_argument('--warmup', type=int, default=2, help='steps of each form before the first round')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of torch on the CPU')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, metavar='FILE', help='write FILE.json and FILE.md, which must not exist')
    args = parser.parse_args(argv)
    if min(args.batch, args.accum, args.size, args.rounds, args.steps, args.warmup, args.threads) < 1:
        parser.error('--batch, --accum, --size, --rounds, --steps, --warmup and --threads must be at least 1')
    if args.peer and not (args.peer / 'convnet_utils.py').is_file():
        parser.error(f"--peer: {args.peer} is no clone of the authors' repository: it has no convnet_utils.py")
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no GPU')
    for file in output_files(args.out):
        if file.exists():
            parser.error(f'--out: {file} exists; name another file or remove it')
    return args


def output_files(out):
    # with_suffix() would cut a name with a dot in it
    return [out.with_name(out.name + suffix) for suffix in ('.json', '.md')] if out else []


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True  # as timm's train.py does
    results = []
    for name in args.models:
        results.append(measure(name, args))
        gc.collect()
        torch.compiler.reset()
    arguments = dict(vars(args), peer=bool(args.peer), out=args.out.name if args.out else None)
    report = dict(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        arguments=arguments,
        machine=dict(hardware=hardware_name(args.device), cores=os.cpu_count()),
        versions=dict(
            python=platform.python_version(),
            torch=torch.__version__,
            timm=timm.__version__,
            timm_rep=timm_rep.__version__,
        ),
        results=results,
    )
    table = markdown(report)
    print(table)
    for file, text in zip(output_files(args.out), (json.dumps(report, indent=1) + '\n', table)):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open('x') as stream:
            stream.write(text)


if __name__ == '__main__':
    main()
