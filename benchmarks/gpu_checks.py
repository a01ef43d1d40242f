"""What may differ on a GPU: devices, mixed precision, TF32, memory formats, compiled and captured steps, averages.

    python benchmarks/gpu_checks.py --device cuda --out DIR

prints a line for each check, writes DIR/checks.json and DIR/checks.md, and ends with 1 if one has failed. It needs no
pytest. With `--device cpu` it tries itself.
"""
import argparse
import copy
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3

import timm_rep
from timm_rep.report.cost import hardware_name

SIZE, CLASSES = 32, 10
NETWORK = os.environ.get('CHECKED_NETWORK', 'resnet50')
CHECKS = []


class Skip(Exception):
    """This cannot be checked here."""


def check(function):
    CHECKS.append(function)
    return function


def made(method='orepa', device='cpu'):
    """A network with norms that are not fresh."""
    torch.manual_seed(0)
    model = timm_rep.expand(timm.create_model(NETWORK, num_classes=CLASSES), method)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
    return model.to(device)


def batch(device, count=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return images.to(device), (torch.arange(count) % CLASSES).to(device)


def step(model, optimizer, images, targets, forward=None):
    optimizer.zero_grad()
    loss = F.cross_entropy((model if forward is None else forward)(images), targets)
    loss.backward()
    optimizer.step()
    return loss.item()


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)


def near(actual, expected, rtol):
    largest = expected.abs().max().item()
    difference = (actual.to(expected) - expected).abs().max().item()
    assert difference <= rtol * largest, f'largest difference {difference:.2e} of {largest:.2e}, allowed {rtol:.0e}'
    return difference / largest


@check
def everything_is_on_the_device(device):
    for method in ('orepa', 'dbb'):
        model = made(method, device)
        step(model, sgd(model), *batch(device))
        tensors = [*model.parameters(), *model.buffers(), *timm_rep.fuse(model.eval()).state_dict().values()]
        assert {tensor.device.type for tensor in tensors} == {torch.device(device).type}


@check
def the_function_is_that_of_the_cpu(device):
    model = made().double().eval()
    images = batch('cpu')[0].double()
    near(copy.deepcopy(model).to(device)(images.to(device)).cpu(), model(images), 1e-10)


def rounding(layer, kernel):
    """How far the kernels of a layer are from those in float64: fused, and restored."""
    exact = copy.deepcopy(layer).double().compose_weight().detach()
    fused = layer.fuse().weight.detach()
    layer.restore_(kernel.to(fused))
    return [
        ((actual - expected).abs().max() / expected.abs().max()).item()
        for actual, expected in ((fused, exact), (layer.weight.detach(), kernel.to(exact)))]


@check
def fuse_and_restore_are_exact_where_tf32_is_allowed(device):
    worst = 0.0
    model = made(device=device).eval()
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        for _, layer in timm_rep.rep_layers(model):
            kernel = torch.randn(layer.weight_shape)
            # which float32 has on the CPU as well, most of all in the stem
            twin = copy.deepcopy(layer).cpu()
            for error, expected in zip(rounding(layer, kernel), rounding(twin, kernel)):
                assert error <= 2e-6 + 2 * expected, f'{error:.1e}, {expected:.1e} on the CPU'
                worst = max(worst, error)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    return f'largest difference {worst:.1e}'


@check
def mixed_precision_composes_in_float32(device):
    for dtype in (torch.bfloat16, torch.float16):
        model = made(device=device)
        images, targets = batch(device)
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler(torch.device(device).type)
        seen = []
        layer = next(layer for _, layer in timm_rep.rep_layers(model))
        compose = layer._compose

        def noted(channels_last, compose=compose, seen=seen):
            seen.append(compose(channels_last))
            return seen[-1]

        layer._compose = noted
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast(torch.device(device).type, dtype):
                loss = F.cross_entropy(model(images), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert loss.isfinite()
        assert seen[0].dtype == torch.float32


@check
def channels_last_changes_nothing(device):
    model = made(device=device).double().eval()
    images = batch(device)[0].double()
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    near(twin(images.to(memory_format=torch.channels_last)), model(images), 1e-10)
    fused = timm_rep.fuse(twin)
    near(fused(images.to(memory_format=torch.channels_last)), model(images), 1e-10)


@check
def a_captured_step_replays_what_eager_steps_do(device):
    if torch.device(device).type != 'cuda':
        raise Skip('CUDA graphs need a GPU')
    model = made(device=device).double()
    twin = copy.deepcopy(model)
    images, targets = batch(device)
    images = images.double()
    optimizer, other = sgd(model), torch.optim.SGD(twin.parameters(), 0.01, momentum=0.9)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step_without_sync(twin, other, images, targets)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    other.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step_without_sync(twin, other, images, targets, clear=False)
    for _ in range(2):
        graph.replay()
    for _ in range(5):
        step(model, optimizer, images, targets)
    near(twin(images), model(images), 1e-6)


def step_without_sync(model, optimizer, images, targets, clear=True):
    if clear:
        optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(model(images), targets).backward()
    optimizer.step()


@check
def averages_have_the_rate_of_their_model(device):
    model = made(device=device)
    average = ModelEmaV3(model, decay=0.9)
    optimizer = sgd(model)
    for rate in (0.5, 1.0):
        timm_rep.set_attach_rate(model, rate)
        step(model, optimizer, *batch(device))
        average.update(model)
        assert {float(layer.attach_rate) for _, layer in timm_rep.rep_layers(average.module)} == {rate}
    timm_rep.verify(average.module.eval(), timm_rep.fuse(average.module), inputs=batch(device)[0], rtol=1e-4)


@check
def time_steps_draw_what_the_cpu_draws(device):
    images = batch('cpu', 16)[0].double()
    for method in ('orepa', 'dbb'):
        model = made(method).double()
        twin = copy.deepcopy(model).to(device)
        for form, where in ((model, 'cpu'), (twin, device)):
            timm_rep.begin_time_step(
                form, torch.Generator().manual_seed(3), attach_rate=0.5, restoration='measured', side_gain=0.0,
                batches=[images.to(where)])
        for one, other in zip(twin.state_dict().values(), model.state_dict().values()):
            if other.is_floating_point() and other.any():
                near(one.cpu(), other, 1e-9)


@check
def micro_batches_share_kernels(device):
    model = made(device=device).double()
    twin = copy.deepcopy(model)
    images = batch(device)[0].double().split(4)
    for form, shared in ((model, True), (twin, False)):
        for number, part in enumerate(images, 1):
            if shared:
                with timm_rep.micro_batch(form, last=number == len(images)):
                    form(part).square().mean().backward()
            else:
                form(part).square().mean().backward()
    largest = max(p.grad.abs().max().item() for p in twin.parameters())
    for one, other in zip(model.parameters(), twin.parameters()):
        assert (one.grad - other.grad).abs().max().item() <= 1e-9 * largest


def loss_of(model, images):
    return model(images).square().mean()


@check
def kernels_composed_together_train_alike(device):
    graph = torch.device(device).type == 'cuda'
    model = made(device=device).double()
    twin = copy.deepcopy(model)
    handle = timm_rep.capture(model, graph=graph)
    images, targets = batch(device)
    images = images.double()
    optimizers = [torch.optim.SGD(form.parameters(), 0.001, momentum=0.9) for form in (model, twin)]
    for number in range(8):
        for form, optimizer in zip((model, twin), optimizers):
            optimizer.zero_grad(set_to_none=number % 2 == 0)
            losses = [functools.partial(loss_of, form, part) for part in images.split(4)]
            if number == 3:  # both forwards before the backward
                sum(loss() for loss in losses).backward()
            else:
                for loss in losses:  # gradients add up
                    loss().backward()
            optimizer.step()
            if number == 2:
                timm_rep.begin_time_step(form, torch.Generator().manual_seed(0), attach_rate=0.5)
            if number == 4:
                timm_rep.set_attach_rate(form, 1.0)
            if number == 5:
                form.load_state_dict({key: value.clone() for key, value in form.state_dict().items()}, assign=True)
                optimizer.param_groups[0]['params'] = list(form.parameters())
            if number == 6:
                next(layer for _, layer in timm_rep.rep_layers(form)).requires_grad_(False)
    for one, other in zip(model.parameters(), twin.parameters()):
        if other.abs().max() > 1e-6:
            near(one, other, 1e-6)
    handle.remove()
    for dtype in (torch.bfloat16, torch.float16):
        model = made(device=device)
        timm_rep.capture(model, graph=graph)
        optimizer = sgd(model)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast(torch.device(device).type, dtype):
                loss = F.cross_entropy(model(images.float()), targets)
            loss.backward()
            optimizer.step()
        assert loss.isfinite()
    return 'with a CUDA graph' if graph else 'without a graph: no GPU'


@check
def the_experiments_replay_their_eager_steps(device):
    if torch.device(device).type != 'cuda':
        raise Skip('CUDA graphs need a GPU')
    sys.path.insert(0, str(Path(__file__).parents[1] / 'experiments' / 'cifar10_fast'))
    import anneal
    from data import Images
    from network import build, whitening
    from teacher import Distillation
    from training import Run, train

    generator = torch.Generator().manual_seed(0)
    images = Images(
        torch.randint(256, (320, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator).to(device),
        torch.randint(CLASSES, (320,), generator=generator).to(device))
    settings = dict(
        network='small', batch_size=32, momentum=0.9, weight_decay=5e-4, warmup=0.15, amp=False, cycles=2, epochs=2,
        warmup_share=0.5, data=dict(classes=CLASSES))
    stem, worst = whitening(images.pixels), 0.0

    def trained(execution):
        for form in ('plain', 'orepa', 'rep', 'dbb'):
            yield train(Run(form, 0.01, 2, 1), settings, stem, images, images, execution)
        taught = Distillation(build('medium', 'plain', 2, stem, CLASSES).to(device).eval(), 0.5, 4.0)
        for form, arm, distillation in (
                ('rep', 'measured0', None), ('dbb', 'authors-frozen', None), ('orepa', 'authors-frozen', taught)):
            start = dict(kept={}, model=build('small', form, 1, stem, CLASSES).state_dict())
            yield anneal.train_arm(
                anneal.Run(form, arm, 0.01, 1), start, settings, stem, images, images, execution, distillation)

    for eager, graphed in zip(trained('eager'), trained('graphed')):
        for one, other in zip(eager['rows'], graphed['rows']):
            worst = max(worst, abs(one['train_loss'] - other['train_loss']))
    assert worst < 1e-3, f'losses of epochs are {worst:.2e} apart'
    return f'losses of epochs are {worst:.1e} apart'


@check
def the_wrapper_trains(device):
    if not os.environ.get('TIMM_SCRIPTS'):
        raise Skip("TIMM_SCRIPTS names no folder of timm's scripts")
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        for split in ('train', 'validation'):
            for label in ('a', 'b'):
                place = Path(folder, 'images', split, label)
                place.mkdir(parents=True)
                for number in range(4):
                    Image.new('RGB', (SIZE, SIZE), (60 * number, 100, 50)).save(place / f'{number}.png')
        command = f"""{sys.executable} -m timm_rep.train --model repan_repvgg_a0_cifar --data-dir {folder}/images
            --num-classes 2 --img-size {SIZE} --mean 0 0 0 --std 1 1 1 --time-steps 2 --epochs 1 --warmup-epochs 0
            -b 4 -j 1 --device {device} --model-ema --amp --amp-dtype bfloat16 --channels-last
            --output {folder}/out --experiment run""".split()
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        assert Path(folder, 'out/run/time_step-2-stock.safetensors').exists()


@check
def compiled_steps_are_those_of_eager_ones(device):
    model = made(device=device).double()
    twin = copy.deepcopy(model)
    images, targets = batch(device)
    backend = 'inductor' if torch.device(device).type == 'cuda' else 'eager'
    compiled = torch.compile(twin, backend=backend)
    ours, theirs = sgd(model), sgd(twin)
    for number in range(3):
        if number == 1:
            for form in (model, twin):
                timm_rep.begin_time_step(form, torch.Generator().manual_seed(0), attach_rate=0.5)
        step(model, ours, images.double(), targets)
        step(twin, theirs, images.double(), targets, forward=compiled)
    for one, other in zip(twin.parameters(), model.parameters()):
        if other.abs().max() > 1e-6:
            near(one, other, 1e-6)


def run(device, names=()):
    rows = []
    for function in CHECKS:
        if names and function.__name__ not in names:
            continue
        start, name = time.perf_counter(), function.__name__.replace('_', ' ')
        torch.manual_seed(0)
        try:
            outcome, note = 'ok', function(device) or ''
        except Skip as e:
            outcome, note = 'skipped', str(e)
        except Exception as e:
            traceback.print_exc()
            outcome, note = 'FAILED', f'{type(e).__name__}: {e}'[:300]
        row = dict(check=name, outcome=outcome, note=note, seconds=round(time.perf_counter() - start, 1))
        rows.append(row)
        print(f'{outcome:8} {row["seconds"]:6.1f} s  {name}  {note}', flush=True)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR')
    parser.add_argument(
        '--checks', nargs='+', default=[], choices=[check.__name__ for check in CHECKS], metavar='NAME',
        help='these alone: %(choices)s')
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = run(args.device, args.checks)
    versions = dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__)
    report = dict(hardware=hardware_name(args.device), versions=versions, checks=rows)
    (args.out / 'checks.json').write_text(json.dumps(report, indent=1) + '\n')
    lines = [f'Checks on {report["hardware"]}, {versions}', '', '| check | outcome | note |', '|---|---|---|']
    lines += [f'| {row["check"]} | {row["outcome"]} | {row["note"]} |' for row in rows]
    (args.out / 'checks.md').write_text('\n'.join(lines) + '\n')
    return int(any(row['outcome'] == 'FAILED' for row in rows))


if __name__ == '__main__':
    sys.exit(main())
