"""Times are taken in turns and are of true training steps."""
import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn as nn
from command_line import call

import timm_rep.report.cost
from timm_rep import expand
from timm_rep.report.cost import TrainingStep, bench_models, measure_costs, seconds_in_turns

SMALL = 'orepa_repvgg_a0_cifar'


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the timed calls put forward."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(timm_rep.report.cost, 'timer', lambda: now.seconds)
    return now


def test_calls_take_turns(clock):
    called = []

    def call(name, seconds):
        def run():
            called.append(name)
            clock.seconds += next(seconds)
        return run

    calls = [call('a', itertools.count(1.0)), call('b', itertools.count(10.0))]
    times = seconds_in_turns(calls, rounds=3, warmup=2, repeats=2)
    assert ''.join(called) == 'aabb' + 'aabb' * 3
    assert times == [(3.5, 5.5, 7.5), (12.5, 14.5, 16.5)]


@pytest.mark.parametrize('autocast', [None, torch.bfloat16])
def test_step_is_that_of_a_training_loop(autocast):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=5).eval()
    other = timm.create_model('test_resnet', num_classes=5)
    other.load_state_dict(model.state_dict())
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    step = TrainingStep(model, images, targets, autocast)
    step()
    step()
    optimizer = torch.optim.SGD(other.train().parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast is not None):
            loss = torch.nn.functional.cross_entropy(other(images), targets)
        loss.backward()
        optimizer.step()
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(value, expected), name


def test_ratios_are_to_the_first_model(clock, monkeypatch):
    seconds = {True: iter([1, 1, 2, 4, 3]), False: iter([1, 1, 6, 4, 6])}

    def tick(step):
        clock.seconds += next(seconds[isinstance(step.model, timm.models.ResNet)])

    monkeypatch.setattr(TrainingStep, '__call__', tick)
    baseline, other = bench_models(['test_resnet', 'test_byobnet'], batch=1, rounds=3, img_size=32)['models']
    assert baseline['seconds'] == (2, 4, 3)
    assert [baseline[key] for key in ('median', 'ratio', 'smallest', 'largest')] == [3, 1, 1, 1]
    assert [other[key] for key in ('median', 'ratio', 'smallest', 'largest')] == [6, 2, 1, 3]


@pytest.mark.parametrize(('size', 'batch'), [(224, 8), (112, 32), (32, 128), (256, 8)])
def test_the_batch_fits_the_size_of_the_images(monkeypatch, size, batch):
    monkeypatch.setattr(TrainingStep, '__call__', lambda step: None)
    assert bench_models(['test_resnet'], rounds=1, img_size=size)['batch'] == batch


def test_models_of_different_numbers_of_classes_are_timed():
    assert len(bench_models(['test_resnet', 'orepa_repvgg_a0_cifar'], batch=64, rounds=1, img_size=32)['models']) == 2


def test_micro_batches_make_the_step_of_one_large_batch():
    images, targets = torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 2])
    model = expand(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()), select='0')
    kernels = []
    for options in (dict(micro_batches=1), dict(micro_batches=3), dict(micro_batches=3, composed_once=False)):
        twin = copy.deepcopy(model)
        TrainingStep(twin, images, targets, lr=1.0, **options)()
        kernels.append(twin[0].compose_weight().detach())
    for kernel in kernels[1:]:
        torch.testing.assert_close(kernel, kernels[0])
    assert not torch.allclose(kernels[0], model[0].compose_weight())


def test_bench():
    options = ['--rounds', '1', '--batch-size', '2', '--amp', '--channels-last', '--img-size', '16', '--steps', '2']
    content = json.loads(call('bench', SMALL, '--json', *options))
    assert [row['name'] for row in content['models']] == [f'{SMALL} (stock form)', SMALL]
    assert all(len(row['seconds']) == 1 and row['seconds'][0] > 0 for row in content['models'])
    stock, training = (row['parameters'] for row in content['models'])
    assert stock == sum(p.numel() for p in timm.create_model(SMALL, inference_mode=True).parameters()) < training
    assert (content['input_size'], content['dtype']) == ([3, 16, 16], 'bfloat16')

    lines = call('bench', SMALL, 'test_resnet', '--rounds', 1, '--batch-size', 2).splitlines()
    assert lines[0].startswith('A training step of 2 images of 3x32x32, float32, on ')
    assert [line.partition('  ')[0] for line in lines[1:]] == [f'{SMALL} (stock form)', SMALL, 'test_resnet']
    assert ['1.00 (1.00 to 1.00)' in line for line in lines[1:]] == [True, False, False]
    assert "unknown model 'resnet1'; `timm-rep list` shows" in call('bench', 'resnet1', code=2)
    assert 'test_resnet cannot be trained on a batch of 1 images of 3x32x32: Expected more than 1 value' in call(
        'bench', 'test_resnet', '--img-size', 32, '--batch-size', 1, code=2)
    for argument in ('num_classes=0', 'num_classes=-1', 'features_only=True'):
        assert 'test_resnet has no classifier' in call('bench', 'test_resnet', '--model-kwargs', argument, code=2)
    for device in ('abacus', 'meta'):
        assert f"device '{device}' cannot be used" in call('bench', SMALL, '--device', device, code=2)


def test_speed_is_measured_in_full_precision(monkeypatch):
    seen = []

    def images_per_second(forms, images):
        seen.append(torch.backends.cudnn.allow_tf32)
        assert images.dtype == torch.bfloat16
        return [1.0, 2.0]

    monkeypatch.setattr(timm_rep.report.cost, 'images_per_second', images_per_second)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    forms = [timm.create_model('test_resnet').eval().bfloat16() for _ in range(2)]
    costs = measure_costs(*forms, (3, 32, 32))
    assert (costs.images_per_second, costs.dtype) == ((1.0, 2.0), 'bfloat16')
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32
