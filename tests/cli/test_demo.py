import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import timm_rep
from timm_rep.cli import demo
from timm_rep.core.annealing import time_step_of
from timm_rep.core.walk import annealed_modules

EXAMPLE = Path(demo.__file__).parents[2] / 'examples' / 'own_loop.py'


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits')
    demo._write_digits(folder, seed=0, images=80)
    return folder


def test_demo_runs(tmp_path, capsys):
    taken = tmp_path / 'demo_output'
    taken.mkdir()
    (taken / 'mine').write_text('mine')
    result = demo.run_demo(taken, epochs=1, images=80)
    assert result.output == tmp_path / 'demo_output-2'
    assert [path.name for path in taken.iterdir()] == ['mine']

    assert sorted(path.name for path in result.output.iterdir()) == ['demo.png', 'images', 'resnet18.orepa_digits']
    assert (result.output / 'demo.png').read_bytes().startswith(b'\x89PNG')
    assert 0 <= result.top1 <= 100
    assert len(result.time_steps) == 2
    assert result.time_steps[-1] == pytest.approx(result.top1)
    assert result.parameters[1] < result.parameters[0]
    assert result.difference < 1e-5
    printed = capsys.readouterr().out
    assert 'held-out top-1' in printed
    assert 'in 2 time steps of 1 epochs' in printed
    assert 'timm.models.resnet' in printed


def test_digits_are_split_by_class(digits):
    splits = {split: list((digits / split).glob('*/*.png')) for split in ('train', 'test')}
    assert {split: len(files) for split, files in splits.items()} == dict(train=60, test=20)
    assert all({path.parent.name for path in files} == set('0123456789') for files in splits.values())
    assert not {path.name for path in splits['train']} & {path.name for path in splits['test']}


def test_fresh_folder(tmp_path):
    assert demo._fresh_folder(tmp_path / 'out') == tmp_path / 'out'
    assert demo._fresh_folder(tmp_path / 'out') == tmp_path / 'out'  # still empty
    for number in (2, 3):
        (demo._fresh_folder(tmp_path / 'out') / 'file').touch()
        assert demo._fresh_folder(tmp_path / 'out') == tmp_path / f'out-{number}'


def test_missing_packages_are_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name, *args: None if name == 'sklearn' else find_spec(name, *args))
    with pytest.raises(ImportError, match=r'needs scikit-learn: pip install "timm_rep\[demo\]"'):
        demo.run_demo(tmp_path / 'out')
    assert not list(tmp_path.iterdir())


def test_a_folder_that_stock_timm_does_not_load_is_named(tmp_path, digits):
    with pytest.raises(RuntimeError, match='stock timm does not load'):
        demo._reload(tmp_path, digits)


@pytest.mark.skipif(not EXAMPLE.exists(), reason='the examples are in a checkout only')
def test_own_loop_is_a_script(tmp_path, digits):
    done = subprocess.run(
        [
            sys.executable, str(EXAMPLE), str(digits), '--model', 'orepa_repvgg_a0_cifar', '--epochs', '1',
            '--time-steps', '2', '--workers', '0', '--output', str(tmp_path / 'model'),
        ],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'training form: top-1' in done.stdout
    assert (tmp_path / 'model' / 'model.safetensors').exists()


class TinyNet(nn.Sequential):
    """A convolution with a norm, and a classifier of ten digits."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(4, 10))


def train_tiny(model, digits, **kwargs):
    own_loop = demo._load_own_loop()
    train_set, test_set, _ = own_loop.create_datasets(digits)
    device = torch.device('cpu')
    data_config = dict(input_size=(3, 8, 8))
    loaders = own_loop.create_loaders(train_set, test_set, data_config, 30, device)
    return own_loop.train(model, *loaders, device, **kwargs)


def test_own_loop_anneals_in_time_steps(digits, monkeypatch):
    model = timm_rep.expand(TinyNet().eval(), 'dbb')
    parameters = dict(model.named_parameters())
    begun, lrs, rates = [], [], set()
    begin_time_step, step = timm_rep.begin_time_step, torch.optim.SGD.step
    monkeypatch.setattr(timm_rep, 'begin_time_step', lambda *a, **k: begun.append(len(lrs)) or begin_time_step(*a, **k))

    def recording_step(optimizer, *args, **kwargs):
        (rate,) = {module.attach_rate.item() for _, module in annealed_modules(model)}
        rates.add((len(lrs) // 2, rate))
        # momentum of the last time step is gone where the next one begins
        lrs.append((round(optimizer.param_groups[0]['lr'], 6), bool(optimizer.state)))
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, 'step', recording_step)
    history = train_tiny(model, digits, epochs=3, time_steps=2, attach_warmup_epochs=1, lr=0.1)
    assert [row['time_step'] for row in history] == [0, 0, 0, 1, 1, 1]
    assert [row['attach_rate'] for row in history] == [0.5, 1.0, 1.0, 0.5, 1.0, 1.0]
    assert begun == [6]  # two updates an epoch
    assert rates == {(epoch, row['attach_rate']) for epoch, row in enumerate(history)}
    assert lrs[:6] == [(lr, had_state if n else False) for n, (lr, had_state) in enumerate(lrs[6:])]
    assert lrs[0] == lrs[6] == (0.1, False)
    assert time_step_of(model) == 1
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_own_loop_trains_plain_models(digits):
    history = train_tiny(TinyNet(), digits, epochs=2)
    assert [(row['time_step'], row['attach_rate']) for row in history] == [(0, 1.0), (0, 1.0)]


@pytest.mark.parametrize('kwargs', [dict(time_steps=2), dict(attach_warmup_epochs=1)])
def test_own_loop_anneals_models_with_rep_layers_only(digits, kwargs):
    model = TinyNet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='TinyNet has no rep layers, so no side branches to anneal'):
        train_tiny(model, digits, epochs=2, **kwargs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(('args', 'message'), [
    (['nowhere'], 'nowhere must hold the folders train and'),
    (['DIGITS', '--model', 'resnet19'], 'timm knows no resnet19'),
    (['DIGITS', '--epochs', '1', '--attach-warmup-epochs', '1'], 'must warm up in less than the 1 epochs'),
])
def test_own_loop_says_what_is_wrong(digits, monkeypatch, capsys, args, message):
    own_loop = demo._load_own_loop()
    monkeypatch.setattr(sys, 'argv', ['own_loop.py', *(str(digits) if arg == 'DIGITS' else arg for arg in args)])
    with pytest.raises(SystemExit) as exit_info:
        own_loop.main()
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_own_loop_needs_an_image_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='must hold the folders train and val or validation or test'):
        demo._load_own_loop().create_datasets(tmp_path)
