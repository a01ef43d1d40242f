"""examples/own_loop.py: a loop of one's own, annealed, resumed, and refused before anything is trained."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from helpers import assert_same_state
from PIL import Image

import timm_rep
from timm_rep.core import annealer as annealer_module

EXAMPLE = Path(timm_rep.__file__).parents[1] / 'examples' / 'own_loop.py'
pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason='the examples are in a checkout only')
MODEL = 'repan_resnet18_cifar'
DEVICE = torch.device('cpu')


@pytest.fixture(scope='module')
def own_loop():
    spec = importlib.util.spec_from_file_location('own_loop', EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Two classes of 30 training and 5 held-out images."""
    folder = tmp_path_factory.mktemp('images')
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', 30), ('test', 5)):
        for label in 'ab':
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / label / f'{index}.png')
    return folder


class TinyNet(nn.Sequential):
    """A convolution with a norm, and a classifier of two classes."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(4, 2))


def expanded():
    torch.manual_seed(0)
    return timm_rep.expand(TinyNet().eval(), 'dbb', generator=torch.Generator().manual_seed(0))


def train(own_loop, images, model, checkpoint=None, resume=False, **kwargs):
    train_set, eval_set, _ = own_loop.create_datasets(images)
    loaders = own_loop.create_loaders(train_set, eval_set, dict(input_size=(3, 8, 8)), 30, DEVICE)
    annealer = own_loop.create_annealer(model, **kwargs)
    if resume:
        own_loop.load(checkpoint, model, annealer)
    return own_loop.train(model, annealer, *loaders, DEVICE, checkpoint=checkpoint)


def test_script_trains_and_goes_on(images, tmp_path, monkeypatch, capsys, own_loop):
    command = [
        str(images), '--model', MODEL, '--img-size', '8', '--epochs', '1', '--time-steps', '2', '--workers', '0',
        '--output', str(tmp_path / 'new' / 'model')]
    done = subprocess.run([sys.executable, str(EXAMPLE), *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'training form: top-1' in done.stdout
    assert {path.name for path in (tmp_path / 'new').iterdir()} == {'model', 'model.pth'}
    assert (tmp_path / 'new/model/model.safetensors').exists()
    # interrupted when all epochs were trained, but nothing was exported yet
    (tmp_path / 'new/model').rename(tmp_path / 'first')
    monkeypatch.setattr(sys, 'argv', ['own_loop.py', *command, '--resume'])
    own_loop.main()
    capsys.readouterr()
    weights = [folder / 'model.safetensors' for folder in (tmp_path / 'first', tmp_path / 'new/model')]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_loop_anneals_in_time_steps(own_loop, images, monkeypatch):
    model = expanded()
    begun, lrs = [], []
    begin_time_step, step = annealer_module.begin_time_step, torch.optim.SGD.step
    monkeypatch.setattr(
        annealer_module, 'begin_time_step', lambda *a, **k: begun.append(len(lrs)) or begin_time_step(*a, **k))
    monkeypatch.setattr(
        torch.optim.SGD, 'step',
        lambda self, *args: lrs.append(round(self.param_groups[0]['lr'], 6)) or step(self, *args))
    history = train(own_loop, images, model, epochs=3, time_steps=2, attach_warmup_epochs=1, lr=0.1)
    assert [row['time_step'] for row in history] == [0, 0, 0, 1, 1, 1]
    assert [row['attach_rate'] for row in history] == [0.5, 1.0, 1.0, 0.5, 1.0, 1.0]
    assert all({'train_loss', 'eval_loss', 'eval_top1', 'lr'} <= set(row) for row in history)
    assert begun == [6]  # two updates an epoch
    assert lrs[:6] == lrs[6:]
    assert lrs[0] == 0.1


@pytest.mark.parametrize('epoch', [0, 1])
def test_resumed_loop_ends_like_one_that_was_not_interrupted(own_loop, images, tmp_path, monkeypatch, epoch):
    settings = dict(epochs=2, time_steps=2, attach_warmup_epochs=1)
    whole, interrupted, resumed = expanded(), expanded(), expanded()
    history = train(own_loop, images, whole, **settings)
    save = own_loop.save

    def save_and_die(checkpoint, model, annealer):
        save(checkpoint, model, annealer)
        if len(annealer.history) == epoch + 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(own_loop, 'save', save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(own_loop, images, interrupted, tmp_path / 'model.pth', **settings)
    assert [path.name for path in tmp_path.iterdir()] == ['model.pth']
    assert train(own_loop, images, resumed, tmp_path / 'model.pth', resume=True, **settings) == history
    assert_same_state(resumed.state_dict(), whole.state_dict())


def test_loop_trains_plain_models(own_loop, images):
    history = train(own_loop, images, TinyNet(), epochs=2)
    assert [(row['time_step'], row['attach_rate']) for row in history] == [(0, 1.0), (0, 1.0)]


@pytest.mark.parametrize(('args', 'message'), [
    (['nowhere'], 'nowhere must hold the folders train and val or validation or test'),
    (['IMAGES', '--model', 'resnet19'], 'timm knows no resnet19'),
    (['IMAGES', '--epochs', '1', '--attach-warmup-epochs', '1'], 'must warm up in less than the 1 epochs'),
    (['IMAGES', '--model', 'test_resnet', '--time-steps', '2'], 'ResNet has no rep layers'),
    (['IMAGES', '--output', 'taken'], 'taken exists already'),
    (['IMAGES', '--output', 'kept'], 'kept.pth exists already'),
    (['IMAGES', '--output', 'new', '--resume'], 'no checkpoint at new.pth'),
    (['IMAGES', '--resume'], 'name OUTPUT with --output'),
])
def test_what_cannot_work_is_refused_before_anything_is_done(
        own_loop, images, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'kept.pth').touch()
    monkeypatch.setattr(own_loop, 'train', lambda *args, **kwargs: pytest.fail('it trains'))
    monkeypatch.setattr(sys, 'argv', ['own_loop.py', *(str(images) if arg == 'IMAGES' else arg for arg in args)])
    with pytest.raises(SystemExit) as exit_info:
        own_loop.main()
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['kept.pth', 'taken']
