"""The schedule, and the step from one time step to the next, on models and all that wraps them."""
import copy
import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from helpers import (
    MODEL_RTOL,
    assert_near,
    assert_same_state,
    mixed_model,
    randn,
    randomize_,
    state_of,
    tiny_repvgg,
    tiny_resnet,
)
from timm.layers import BatchNormAct2d
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.utils import parametrize, prune, weight_norm

import timm_rep
from timm_rep import AnnealingSchedule, UserError, begin_time_step, expand, fuse, set_attach_rate
from timm_rep.core.annealing import time_step
from timm_rep.core.expand import anneal_repvgg_blocks_
from timm_rep.core.walk import annealed_modules

TESTS = Path(__file__).parents[1]


LINEAR = dict(
    orepa=lambda: expand(tiny_resnet(), 'orepa'),
    bottleneck=lambda: expand(tiny_resnet('bottleneck'), 'orepa'),
    repvgg_convs=lambda: expand(tiny_repvgg(), 'orepa'),  # the blocks' own branches stay as they are
)
NORMED = dict(
    dbb=lambda: expand(tiny_resnet(), 'dbb'),
    acb=lambda: expand(tiny_resnet('bottleneck'), 'acb'),
    rep=lambda: expand(tiny_resnet(), 'rep'),
    repvgg=lambda: expand(tiny_repvgg(), 'rep'),
    repvgg_orepa=lambda: anneal_repvgg_blocks_(expand(tiny_repvgg(), 'orepa')),
    repvgg_dbb=lambda: anneal_repvgg_blocks_(expand(tiny_repvgg(), 'dbb')),
    mixed=mixed_model,
)
MODELS = dict(LINEAR, **NORMED)

linear = pytest.mark.parametrize('name', LINEAR)
normed = pytest.mark.parametrize('name', NORMED)
kinds = pytest.mark.parametrize('name', ['orepa', 'repvgg_dbb', 'mixed'])
dtypes = pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)


def make(name, dtype=torch.float64, rate=0.3):
    """A model in eval mode with wide random values."""
    model = randomize_(MODELS[name]()).to(dtype).eval()
    set_attach_rate(model, rate)
    return model


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def images(dtype=torch.float64, batch=2, size=32, seed=5):
    return randn(batch, 3, size, size, seed=seed, dtype=dtype)


def largest_difference(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# Schedule


def columns(schedule):
    """Time steps, epochs, rates, and the epochs at which a time step begins and ends."""
    positions = [schedule.position(epoch) for epoch in range(schedule.total_epochs)]
    begins = [epoch for epoch, p in enumerate(positions) if p.begins]
    return (
        [p.time_step for p in positions],
        [p.epoch for p in positions],
        pytest.approx([p.attach_rate for p in positions]),
        begins,
        [*(epoch - 1 for epoch in begins[1:]), len(positions) - 1],
    )


@pytest.mark.parametrize(('kwargs', 'time_steps', 'epochs', 'rates', 'begins', 'ends'), [
    (dict(time_steps=1, epochs=1), [0], [0], [1], [0], [0]),
    # equation 5 prints max(...), which would never be below one and grow without end
    (dict(time_steps=1, epochs=3, warmup_epochs=2), [0, 0, 0], [0, 1, 2], [1 / 3, 2 / 3, 1], [0], [2]),
    (dict(time_steps=3, epochs=1), [0, 1, 2], [0, 0, 0], [1, 1, 1], [0, 1, 2], [0, 1, 2]),
    (dict(time_steps=2, epochs=3, warmup_epochs=1), [0, 0, 0, 1, 1, 1], [0, 1, 2] * 2, [0.5, 1, 1] * 2, [0, 3], [2, 5]),
    (dict(time_steps=2, epochs=2, epochs_mul=2, warmup_epochs=1),
     [0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 2, 3], [0.5, 1, 0.5, 1, 1, 1], [0, 2], [1, 5]),
    (dict(time_steps=2, epochs=3, epochs_mul=1.5),  # 3 and 4.5 epochs, of which the last is half
     [0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 0, 1, 2, 3], [1] * 7, [0, 3], [2, 6]),
    (dict(time_steps=2, epochs=2, warmup_epochs=1, prefix_epochs=1, cooldown_epochs=2),
     [0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 0, 1, 2, 3], [0.5, 1, 1, 0.5, 1, 1, 1], [0, 3], [2, 6]),
], ids=str)
def test_positions(kwargs, time_steps, epochs, rates, begins, ends):
    schedule = AnnealingSchedule(**kwargs)
    assert columns(schedule) == (time_steps, epochs, rates, begins, ends)
    assert schedule.total_epochs == len(time_steps)


@pytest.mark.parametrize(('time_steps', 'epochs', 'mul'), [
    (1, 7, 1.0),
    (5, 30, 1.0),
    (3, 5, 3.0),
    (4, 10, 1.5),
    (3, 5, 1.4),  # 12 epochs, where timm's logarithm rounds down and restarts with the 13th
    (4, 25, 1.2),
    (2, 30, 1.7),  # 81 epochs, of which timm's sum loses one
])
def test_time_steps_begin_where_timm_restarts_the_learning_rate(time_steps, epochs, mul):
    for (warmup, prefix), cooldown in itertools.product([(0, False), (2, False), (2, True)], [0, 3]):
        check_restarts(time_steps, epochs, mul, warmup, prefix, cooldown)


def check_restarts(time_steps, epochs, mul, warmup, prefix, cooldown):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, total = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=epochs, warmup_epochs=warmup, warmup_prefix=prefix, warmup_lr=1e-5, min_lr=0.0,
        cooldown_epochs=cooldown, cycle_mul=mul, cycle_decay=0.9, cycle_limit=time_steps)
    schedule = AnnealingSchedule(
        time_steps, epochs, epochs_mul=mul, prefix_epochs=warmup if prefix else 0, cooldown_epochs=cooldown)
    assert schedule.total_epochs == total

    rates = []
    for epoch in range(total):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]['lr'])
    restarts = [epoch for epoch in range(1, total) if epoch > warmup and rates[epoch] > rates[epoch - 1]]
    assert len(restarts) == time_steps - 1
    _, _, _, begins, ends = columns(schedule)
    assert begins == [0, *restarts]
    assert ends == [*(epoch - 1 for epoch in restarts), total - 1]


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(time_steps=0, epochs=3), 'time_steps must be at least 1, got 0'),
    (dict(time_steps=1, epochs=0), 'needs at least 1 epoch, got 0'),
    (dict(time_steps=1, epochs=3, warmup_epochs=3), 'less than the 3 epochs of a time step .*, got 3'),
    (dict(time_steps=4, epochs=1, epochs_mul=1.1), 'leaves one without an epoch of its own'),
    (dict(time_steps=1, epochs=3, prefix_epochs=-1), 'must not be negative, got -1 and 0'),
])
def test_impossible_schedule_raises(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AnnealingSchedule(**kwargs)


@pytest.mark.parametrize('epoch', [-1, 6])
def test_epoch_outside_the_training_raises(epoch):
    with pytest.raises(ValueError, match=f'epoch must lie in 0 to 5, got {epoch}'):
        AnnealingSchedule(2, 3).position(epoch)


# From one time step to the next


@normed
@dtypes
@torch.no_grad()
def test_eval_outputs_stay_at_rate_zero(name, dtype):
    model = make(name, dtype)
    expected = model(images(dtype))
    training = dtype == torch.float64
    begin_time_step(model.train(training), seeded())
    assert all(module.training == training for module in model.modules())
    assert_near(model.eval()(images(dtype)), expected, 2 * MODEL_RTOL[dtype])
    set_attach_rate(model, 0.5)
    assert largest_difference(model(images(dtype)), expected) > 1e-2  # there are side branches


@linear
@pytest.mark.parametrize(('dtype', 'rate', 'training'), [
    (torch.float64, 0.0, False), (torch.float64, 0.4, True), (torch.float32, 1.0, True), (torch.float32, 1.0, False),
], ids=str)
def test_outputs_of_linear_layers_stay_at_every_rate_and_in_both_modes(name, dtype, rate, training):
    model = make(name, dtype).train(training)
    other = copy.deepcopy(model)
    begin_time_step(model, seeded(), attach_rate=rate)
    x = images(dtype, batch=4, size=64)
    assert_near(model(x), other(x), 1e-9 if dtype == torch.float64 else 1e-3 if training else 2e-5)
    for _, module in annealed_modules(model):
        assert module.attach_rate == torch.tensor(rate, dtype=module.attach_rate.dtype)


@normed
@pytest.mark.parametrize(('dtype', 'rate'), [(torch.float64, 0.4), (torch.float32, 1.0)], ids=str)
@torch.no_grad()
def test_eval_outputs_stay_at_every_rate_with_compensation(name, dtype, rate):
    model = make(name, dtype)
    expected, other = model(images(dtype)), copy.deepcopy(model)
    begin_time_step(model, seeded(), attach_rate=rate, compensate=True)
    assert_near(model(images(dtype)), expected, 2 * MODEL_RTOL[dtype])
    begin_time_step(other, seeded(), attach_rate=rate)
    assert largest_difference(other(images(dtype)), expected) > 1e-2


@kinds
def test_tensors_stay_and_those_without_branches_keep_their_values(name):
    model = make(name)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before, places = state_of(model), {key: value.data_ptr() for key, value in tensors.items()}
    inside = tuple(f'{key}.' for key, _ in annealed_modules(model))
    for expected in (1, 2):
        begin_time_step(model, attach_rate=0.5)
        assert time_step(model) == expected
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(value is tensors[key] and value.data_ptr() == places[key] for key, value in after.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    outside = [key for key in before if not key.startswith(inside)]
    assert outside
    for key in outside:
        assert torch.equal(model.state_dict()[key], before[key]), key
    # number and rate are saved, in stacks and blocks, too
    state = model.state_dict()
    assert {int(value) for key, value in state.items() if key.endswith('time_step')} == {2}
    assert {float(value) for key, value in state.items() if key.endswith('attach_rate')} == {0.5}


@kinds
def test_draw_is_deterministic(name):
    model = make(name)
    others = [copy.deepcopy(model) for _ in range(2)]
    torch.manual_seed(1)
    begin_time_step(model, seeded())
    torch.manual_seed(2)
    begin_time_step(others[0], seeded())
    begin_time_step(others[1], seeded(8))
    assert_same_state(state_of(others[0]), state_of(model))
    drawn = [key for key, p in model.named_parameters() if not torch.equal(p, others[1].get_parameter(key))]
    assert drawn


def test_what_cannot_be_annealed_raises_and_stays():
    mixed = make('dbb')
    mixed.layer2[0].conv1.time_step.fill_(3)
    for model, rate, message in (
            (mixed, 0.0, r'in different time steps: \[0, 3\]'),
            (fuse(make('repvgg')), 0.0, 'has no rep layers, so no side branches to anneal'),
            (make('repvgg_dbb'), 1.5, r'attach rate must lie in \[0, 1\], got'),
            (make('repvgg_dbb'), float('nan'), r'attach rate must lie in \[0, 1\], got'),
    ):
        before = state_of(model)
        with pytest.raises(ValueError, match=message):
            begin_time_step(model, attach_rate=rate)
        assert_same_state(state_of(model), before)
    with pytest.raises(ValueError, match=r'in different time steps: \[0, 3\]'):
        time_step(mixed)


# In a training


def train_step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def test_wrapped_models():
    model = make('mixed')
    begin_time_step(nn.DataParallel(model))
    assert time_step(model) == time_step(nn.DataParallel(model)) == 1


def test_nothing_recompiles():
    torch._dynamo.reset()
    model = make('mixed').train()
    other = copy.deepcopy(model)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = images()
    for seed in range(3):
        if seed > 0:
            begin_time_step(compiled, seeded(seed))
            begin_time_step(other, seeded(seed))
        for epoch in range(3):
            for form in (compiled, other):
                set_attach_rate(form, (epoch + 1) / 3)
            actual, expected = compiled(x), other(x)
            assert_near(actual, expected, 1e-10)
            actual.pow(3).mean().backward()
            expected.pow(3).mean().backward()
    assert time_step(compiled) == time_step(other) == 2
    for parameter, expected in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-7, atol=1e-10)
    assert sum(parameter.grad.abs().sum() for parameter in model.parameters()) > 1
    assert counter.frame_count == 1


# Distributed

WORKER = """
import datetime, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from helpers import state_of
from test_annealing import MODELS, drawn, images, seeded, train_step
from timm_rep import begin_time_step, set_attach_rate

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group(
    'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
states = {}
for name in ('mixed', 'orepa'):
    for seed in (7, None):
        torch.manual_seed(0)
        model = MODELS[name]().train()
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01, momentum=0.9)
        torch.manual_seed(100 + rank)
        set_attach_rate(wrapped, 0.5)
        train_step(wrapped, optimizer, images(torch.float32, seed=rank))
        before = state_of(model)
        begin_time_step(wrapped, None if seed is None else seeded(seed))
        optimizer.state.clear()
        begun = state_of(model)
        set_attach_rate(wrapped, 0.5)
        train_step(wrapped, optimizer, images(torch.float32, seed=10 + rank))
        states[f'{name}-{seed}'] = before, begun, state_of(model)
averaged = drawn(rank)
begin_time_step(averaged, seeded(7), restoration='measured', batches=[images(torch.float32, seed=rank)])
states['averaged'] = averaged.network.state_dict()
torch.save(states, f'{folder}/{rank}.pt')
dist.barrier()
dist.destroy_process_group()
"""


class WithMore(nn.Module):
    """Has a state that is no tensor, and a buffer of a kind that few processes exchange."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.register_buffer('kinds', torch.zeros(2, dtype=torch.uint16))

    def get_extra_state(self):
        return dict(kind='more')

    def set_extra_state(self, state):
        pass

    def forward(self, x):
        return self.network(x)


def drawn(seed):
    torch.manual_seed(seed)
    return WithMore(randomize_(MODELS['rep'](), seed).float().eval())


def test_all_processes_begin_a_time_step_with_the_same_weights(tmp_path):
    path = os.pathsep.join([*map(str, (Path(timm_rep.__file__).parents[1], TESTS, TESTS / 'core')), *sys.path])
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', WORKER, str(rank), str(tmp_path)], env=dict(os.environ, PYTHONPATH=path),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    ranks = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(2)]
    averaged, other_averaged = (rank.pop('averaged') for rank in ranks)  # of networks that began with other weights
    assert_same_state(other_averaged, averaged)
    alone = drawn(0)
    begin_time_step(
        alone, seeded(7), restoration='measured', batches=[images(torch.float32, seed=seed) for seed in range(2)])
    for key, value in alone.network.state_dict().items():
        torch.testing.assert_close(averaged[key], value, rtol=1e-4, atol=1e-5)
    for case in ranks[0]:
        (before, begun, trained), (other_before, other_begun, other_trained) = (rank[case] for rank in ranks)
        statistics = {key for key in before if 'running' in key}
        weights = before.keys() - statistics
        assert all(torch.equal(before[key], other_before[key]) for key in weights)
        assert not any(torch.equal(before[key], other_before[key]) for key in statistics)  # what folding goes by
        inside = tuple(f'{key}.' for key, _ in annealed_modules(MODELS[case.partition('-')[0]]()))
        for key in begun:
            if key.startswith(inside) or key not in statistics:
                assert torch.equal(begun[key], other_begun[key]), key
        assert {int(value) for key, value in begun.items() if key.endswith('time_step')} == {1}
        assert any(not torch.equal(begun[key], before[key]) for key in weights)
        assert any(not torch.equal(trained[key], begun[key]) for key in weights)
        assert all(torch.equal(trained[key], other_trained[key]) for key in weights)


@pytest.fixture
def default_process_group(tmp_path):
    """A group of one process whose backends were left to torch, as `init_process_group()` does."""
    dist.init_process_group(init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@torch.no_grad()
def test_backends_may_be_left_to_torch(default_process_group):
    model = make('mixed').eval()
    expected = model(images())
    begin_time_step(model, seeded())
    assert time_step(model) == 1
    assert_near(model(images()), expected, MODEL_RTOL[torch.float64])


@pytest.mark.filterwarnings('ignore:Casting complex values to real')
def test_averaged_copy_on_the_cpu_is_shared_through_the_accelerator(default_process_group, monkeypatch):
    """Where processes exchange tensors of GPUs only. Here another dtype stands for another device."""
    def broadcast(tensor, src):
        assert tensor.is_complex()
        tensor.mul_(2)  # what the first process holds

    monkeypatch.setattr(dist, 'get_backend_config', lambda: 'cuda:nccl')
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.complex128)
    monkeypatch.setattr(dist, 'broadcast', broadcast)
    model = make('repvgg')
    begin_time_step(model, seeded())
    assert time_step(model) == 2


# What becomes of training mode

def outputs_in_both_modes(model, x):
    """In eval mode, and with the norms in the branches in training mode."""
    found = [copy.deepcopy(model).eval()(x)]
    model = copy.deepcopy(model).eval()
    for _, module in annealed_modules(model):
        module.train()
    return [*found, model(x)]


def begun(model, **options):
    model = copy.deepcopy(model)
    begin_time_step(model, seeded(), **options)
    return model


def origin_norms(model):
    modules = [module for _, module in annealed_modules(model) if hasattr(module, 'norms_to_measure')]
    return [module.norms_to_measure()[0] for module in modules]


@normed
@torch.no_grad()
def test_authors_restoration_gives_the_origin_gain_one_and_keeps_all_statistics(name):
    model = make(name)
    after = begun(model)
    in_eval, in_training = (
        largest_difference(*pair) for pair in zip(*(outputs_in_both_modes(m, images()) for m in (after, model))))
    assert in_eval < MODEL_RTOL[torch.float64] < 1e-2 < in_training
    assert all((norm.weight == 1).all() for norm in origin_norms(after))
    before = model.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.state_dict().items() if 'running' in key)


@normed
@torch.no_grad()
def test_kept_gains_stay_but_where_they_are_zero(name):
    model = make(name)
    for norm in origin_norms(model):
        norm.weight[:2] = torch.tensor([0.0, 5e-324])
    after = begun(model, restoration='keep_gain')
    assert_near(after(images()), model(images()), MODEL_RTOL[torch.float64])
    for norm, before in zip(origin_norms(after), origin_norms(model)):
        assert (norm.weight[:2] == 1).all()
        assert torch.equal(norm.weight[2:], before.weight[2:])


@pytest.mark.parametrize(('name', 'options'), [
    *((name, dict(side_gain=0.0, attach_rate=1.0)) for name in NORMED),
    *((name, dict()) for name in ('rep', 'repvgg_dbb', 'mixed')),
    # not DBB, whose border is made of running statistics with the variance of a sample
    *((name, dict(compensate=True, attach_rate=0.7)) for name in ('acb', 'rep', 'repvgg', 'repvgg_orepa')),
], ids=str)
@torch.no_grad()
def test_measured_statistics_let_training_go_on_where_it_was(name, options):
    model, x = make(name), images(batch=8)
    next(model.children()).train()  # modes are put back
    after = begun(model, restoration='measured', batches=[(x, torch.zeros(8))], **options)
    assert [module.training for module in after.modules()] == [module.training for module in model.modules()]
    for norm, before in zip(after.modules(), model.modules()):
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.momentum == before.momentum
            assert norm.num_batches_tracked == before.num_batches_tracked
            assert not norm._forward_pre_hooks
    in_eval, in_training = outputs_in_both_modes(after, x)
    expected = model.eval()(x)
    assert_near(in_eval, expected, MODEL_RTOL[torch.float64])
    assert_near(in_training, expected, 1e-9)
    assert largest_difference(outputs_in_both_modes(begun(model, **options), x)[1], expected) > 0.1


@torch.no_grad()
def test_statistics_are_averaged_over_the_first_four_batches():
    model = make('repvgg')
    batches = [images(seed=seed, batch=4) for seed in range(5)]
    seen = []
    hook = origin_norms(model)[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].mean((0, 2, 3))))
    begin_time_step(model, seeded(), restoration='measured', batches=iter(batches))
    hook.remove()
    assert len(seen) == 8  # a trial of them all comes first
    assert_near(origin_norms(model)[0].running_mean, torch.stack(seen[4:]).mean(0), 1e-12)


@torch.no_grad()
def test_measured_statistics_count_where_nothing_was_trained():
    """They are not those of the stock norm any more."""
    model = expand(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).double().eval(), 'rep')
    x = randn(16, 3, 20, 20, seed=2, dtype=torch.float64)
    begin_time_step(model, seeded(), restoration='measured', batches=[x])
    conv, norm = fuse(model)
    var, mean = torch.var_mean(conv(x), (0, 2, 3))
    assert_near(norm.running_mean, mean, 1e-9)
    assert (norm.running_var / var).log().abs().max() < 0.05


@torch.no_grad()
def test_what_the_network_does_not_run_keeps_its_statistics():
    model = make('rep')
    model.idle = expand(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), 'rep').double()
    randomize_(model.idle)
    before = state_of(model.idle)
    after = begun(model, restoration='measured', batches=[images()])
    assert all(torch.equal(value, before[key]) for key, value in after.idle.state_dict().items() if 'running' in key)
    assert all(value.isfinite().all() for value in after.state_dict().values())


@torch.no_grad()
def test_linear_layers_do_not_depend_on_the_restoration():
    model = make('orepa')
    options = dict(restoration='measured', side_gain=0.0, batches=[images()])
    assert_same_state(begun(model).state_dict(), begun(model, **options).state_dict())


@pytest.mark.parametrize(('options', 'message'), [
    (dict(restoration='implied'), "restoration must be one of authors, keep_gain, measured, got 'implied'"),
    (dict(side_gain=float('nan')), 'side_gain must be a finite number, got nan'),
    (dict(restoration='measured'), "restoration 'measured' needs batches of images"),
    (dict(restoration='measured', batches=[dict(image=1)]), 'batches must hold tensors of images'),
    (dict(restoration='measured', batches=[torch.zeros(0, 3, 8, 8)]), 'images of finite values, got'),
    (dict(restoration='measured', batches=[torch.full((1, 3, 8, 8), torch.nan)]), 'images of finite values, got'),
], ids=str)
def test_refuses_what_it_cannot_restore_by(options, message):
    model = make('repvgg')
    before = state_of(model)
    with pytest.raises(UserError, match=message):
        begin_time_step(model, seeded(), **options)
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize(('forward', 'batch', 'cause'), [
    (None, torch.zeros(2, 4, 8, 8), RuntimeError),
    (lambda model, x, task: model(x), torch.zeros(2, 3, 8, 8), TypeError),
    (lambda model, x: model(x).logits, torch.zeros(2, 3, 8, 8), AttributeError),
    (None, torch.zeros(1, 3, 1, 1), ValueError),  # no statistics of a single value
], ids=['channels', 'arguments', 'outputs', 'one_value'])
def test_batches_that_the_model_cannot_run_change_nothing(forward, batch, cause, monkeypatch):
    model = make('dbb')
    if forward is not None:
        own = model.forward
        monkeypatch.setattr(model, 'forward', functools.partial(forward, own), raising=False)
    before, modes = state_of(model), [module.training for module in model.modules()]
    for batches in ([batch], [images(), batch]):
        with pytest.raises(UserError, match=r'runs the model on batches .* Nothing was changed') as refused:
            begin_time_step(model, seeded(), restoration='measured', batches=batches)
        assert isinstance(refused.value.__cause__, cause)
        assert_same_state(model.state_dict(), before)
        assert [module.training for module in model.modules()] == modes
        assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize('kind', ['dbb', 'acb', 'rep'])
@torch.no_grad()
def test_norms_that_count_no_batches(kind):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, padding=1, bias=False), BatchNormAct2d(4)).double().eval()
    randomize_(model)
    keys = model.state_dict().keys() - {'1.num_batches_tracked', '3.num_batches_tracked'}
    for norm in (model[1], model[3]):
        norm.num_batches_tracked = None
    expanded = expand(model, kind)
    assert not any('num_batches' in key for key in expanded.state_dict())
    begin_time_step(expanded, seeded(), restoration='measured', side_gain=0.0, batches=[images(), images(seed=1)])
    fused = fuse(expanded)
    assert fused.state_dict().keys() == keys
    assert_near(fused(images()), model(images()), MODEL_RTOL[torch.float64])


@pytest.mark.parametrize('name', ['orepa', 'repvgg_dbb', 'mixed'])
@pytest.mark.parametrize('compute', [
    lambda part, name: parametrize.register_parametrization(part, name, nn.Softsign()),
    lambda part, name: prune.l1_unstructured(part, name, 0.5),
    weight_norm,
], ids=['parametrization', 'pruning', 'weight norm'])
@pytest.mark.filterwarnings('ignore:.*weight_norm')
def test_computed_values_cannot_be_written(compute, name):
    """Writes would go to what is computed, and be lost with the next forward."""
    model = randomize_(MODELS[name]()).double().eval()
    _, module = list(annealed_modules(model))[-1]
    full, _ = max(module.named_parameters(), key=lambda named: named[1].numel())
    part, _, own = full.rpartition('.')
    compute(module.get_submodule(part), own)
    expected, before = model(images()), state_of(model)
    for write in (lambda: begin_time_step(model, seeded()), lambda: module.restore_(module.compose_weight_bias()[0])):
        with pytest.raises(UserError, match='cannot be written: a parametrization, or pruning, computes them'):
            write()
        assert_same_state(state_of(model), before)
        assert torch.equal(model(images()), expected)


@pytest.mark.parametrize('name', ['repvgg_dbb', 'mixed'])
@pytest.mark.parametrize('other', [
    lambda channels: nn.GroupNorm(1, channels), lambda channels: nn.BatchNorm2d(channels, affine=False),
    lambda channels: nn.BatchNorm2d(channels, track_running_stats=False), lambda channels: nn.Identity()],
    ids=['group', 'no gain', 'no statistics', 'identity'])
def test_norms_of_branches_that_were_replaced_are_refused_before_anything_is_changed(other, name):
    model = randomize_(MODELS[name]()).double().eval()
    _, module = list(annealed_modules(model))[-1]
    path = [path for path, part in module.named_modules() if isinstance(part, nn.BatchNorm2d)][-1]
    module.set_submodule(path, other(module.get_submodule(path).num_features).double())
    before = state_of(model)
    for write in (lambda: begin_time_step(model, seeded()), lambda: timm_rep.fuse(model)):
        with pytest.raises(UserError, match='a batch norm with gain, bias and running statistics is needed, got'):
            write()
        assert_same_state(state_of(model), before)


# The optimizer


class Sharpened(torch.optim.Optimizer):
    """Steps by another optimizer, as those of SAM do."""

    def __init__(self, parameters, **kwargs):
        super().__init__(parameters, kwargs)
        self.base_optimizer = torch.optim.Adam(self.param_groups, **kwargs)

    def step(self):
        self.base_optimizer.step()


class Several(torch.optim.Optimizer):
    """Steps by one optimizer for each parameter, as a pair of Muon and AdamW does."""

    def __init__(self, parameters, **kwargs):
        super().__init__(parameters, kwargs)
        first, *others = self.param_groups[0]['params']
        self.first = torch.optim.Adam([first], **kwargs)
        self.others = [torch.optim.SGD([other], momentum=0.9, **kwargs) for other in others]

    def step(self):
        for optimizer in (self.first, *self.others):
            optimizer.step()


HOLDING = dict(
    sharpened=Sharpened,
    several=Several,
    sharded=lambda parameters, **kwargs: ZeroRedundancyOptimizer(parameters, torch.optim.Adam, **kwargs),
    averaged=lambda parameters, **kwargs: PostLocalSGDOptimizer(
        torch.optim.Adam(parameters, **kwargs), PeriodicModelAverager(period=1, warmup_steps=0)),
)


@pytest.mark.parametrize('name', [
    'sgd', 'adamw', 'lamb', 'adan', 'lookahead_momentum', 'lookahead_lamb', 'adahessian', *HOLDING])
def test_reset_optimizer_steps_like_a_new_one(name, request):
    """After a reset the next updates are those of an optimizer that was never used."""
    def make(model):
        if name in HOLDING:
            return HOLDING[name](model.parameters(), lr=0.01)
        return create_optimizer_v2(model, opt=name, lr=0.01)

    if name in HOLDING:
        request.getfixturevalue('process_group')

    def step(model, optimizer, seed):
        optimizer.zero_grad()
        model(randn(4, 6, seed=seed)).pow(2).sum().backward(create_graph=name == 'adahessian')
        optimizer.step()

    used = nn.Linear(6, 3, dtype=torch.float64)
    used_optimizer = make(used)
    for seed in range(5):
        step(used, used_optimizer, seed)
    new = copy.deepcopy(used)
    new_optimizer = make(new)
    timm_rep.reset_optimizer(used_optimizer)
    for seed in range(8):
        step(used, used_optimizer, seed)
        step(new, new_optimizer, seed)
        assert_same_state(used.state_dict(), new.state_dict())


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@pytest.mark.parametrize('kinds', [{'*.conv_kxk.conv': 'orepa'}, {'*.conv_kxk.conv': 'dbb', '*': 'rep'}])
def test_a_rate_is_a_number_of_the_models_kind_expanded_before_or_after(kinds, dtype):
    for form in (expand(tiny_repvgg().to(dtype), kinds), expand(tiny_repvgg(), kinds).to(dtype)):
        set_attach_rate(form, 1 / 3)
        rates = {tensor for name, tensor in form.state_dict().items() if name.endswith('attach_rate')}
        assert {(rate.dtype, rate.item()) for rate in rates} == {(dtype, torch.tensor(1 / 3, dtype=dtype).item())}


def test_the_rate_of_a_partly_half_precise_model():
    model = tiny_repvgg()
    model.stages[1].bfloat16()
    rep = expand(model, {'*.conv_kxk.conv': 'orepa'})
    set_attach_rate(rep, 1 / 3)
    assert timm_rep.attach_rate(rep) == torch.tensor(1 / 3).item()
