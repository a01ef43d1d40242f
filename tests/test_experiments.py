import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import timm_rep
from timm_rep.core.walk import annealed_modules

SCRIPT = Path(timm_rep.__file__).parents[1] / 'experiments' / 'cifar10' / 'run.py'
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason='the experiments are in a checkout only')
SETTINGS = ['--time-steps', '2', '--epochs', '2', '--attach-warmup-epochs', '1', '--batch-size', '4', '--device', 'cpu']


def load_script(path):
    spec = importlib.util.spec_from_file_location(f'cifar10_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def experiment():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield load_script(SCRIPT)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    random = np.random.default_rng(0)
    for split, count in (('train', 5), ('test', 2)):
        for name in ('cat', 'dog'):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = random.integers(256, size=(8, 8, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / split / name / f'{number}.png')
    return folder


@pytest.fixture(scope='module')
def output(experiment, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('results') / 'small'
    experiment.main(['--data', str(data), '--output', str(folder), *SETTINGS, '--seeds', '0', '--warmup-sweep', '0'])
    return folder


def load(path):
    return json.loads(path.read_text())


def test_methods_share_epochs_and_fused_architecture(experiment, output):
    runs = [load(path) for path in output.glob('*-seed0.json')]
    assert {run['method'] for run in runs} == set(experiment.METHODS)
    assert {len(run['epochs']) for run in runs} == {4}
    assert len({json.dumps(run['fused_shapes']) for run in runs}) == 1
    plain = experiment.build_plain('repvgg_a1', 2)
    assert {run['fused_parameters'] for run in runs} == {sum(p.numel() for p in experiment.fused(plain).parameters())}
    for run in runs:
        assert run['fused_difference'] < 1e-4
        assert run['final_top1'] == run['epochs'][-1]['eval_top1'] <= run['best_top1']
        method = experiment.METHODS[run['method']]
        rates = [row['attach_rate'] for row in run['epochs']]
        warm = [0.5, 1.0] if run['attach_warmup_epochs'] == 1 else [1.0, 1.0]
        assert rates == (2 * warm if method.annealed else [None] * 4)
        lrs = [row['lr'] for row in run['epochs']]
        assert lrs[0] == 0.1
        assert (lrs[2] == 0.1) == method.restarts
    # the sweep is of annealed methods only
    annealed = [name for name, method in experiment.METHODS.items() if method.annealed]
    assert {path.name for path in output.glob('*-warmup*.json')} == {
        f'{name}-warmup{n}-seed0.json' for name in annealed for n in (0, 1)}
    table = (output / 'results.md').read_text()
    assert all(f'| {method.label} |' in table for method in experiment.METHODS.values())
    assert '10 training and 4 test images of 2 classes, 4 epochs for every method' in table


@pytest.mark.parametrize('method', ['repan_rep_implied', 'rep'])
def test_annealed_methods_are_annealed(experiment, method):
    settings = dict(
        network='repvgg_a1', time_steps=2, epochs=2, lr=0.1, weight_decay=0.0, amp=False, channels_last=False,
        data=dict(classes=2))
    training = experiment.Training(method, 0, 1, settings, steps=1, device=torch.device('cpu'))
    images = sys.modules['images'].Images(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.arange(4) % 2)
    seen = []
    for epoch in range(4):
        row = training.epoch(epoch, [(torch.randn(4, 3, 8, 8), images.targets)], images)
        states = {(module.attach_rate.item(), int(module.time_step)) for _, module in annealed_modules(training.model)}
        seen.append((row['attach_rate'], states))
    if method == 'rep':
        assert seen == [(None, set())] * 4
    else:
        assert seen == [(rate, {(rate, step)}) for step in (0, 1) for rate in (0.5, 1.0)]
        assert training.annealer.imply_statistics


def test_finished_runs_are_not_run_again(experiment, data, output, capsys):
    before = {path: path.stat().st_mtime_ns for path in output.glob('*.json')}
    lost = output / 'plain-seed0.json'
    found = load(lost)
    lost.unlink()
    experiment.main(
        ['--data', str(data), '--output', str(output), *SETTINGS, '--methods', 'plain', 'orepa', '--seeds', '0', '1'])
    printed = capsys.readouterr().out
    assert 'orepa-seed0: done already' in printed
    assert 'plain-seed0: epoch 4/4' in printed
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path != lost)
    again = load(lost)
    assert [row['train_loss'] for row in again['epochs']] == [row['train_loss'] for row in found['epochs']]
    assert (output / 'orepa-seed1.json').exists()
    assert '±' in (output / 'results.md').read_text()  # two seeds


def test_results_of_other_settings_are_left_alone(experiment, data, output, tmp_path):
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    base = ['--data', str(data), '--output', str(output), '--methods', 'plain', *SETTINGS]
    for change, named in (
        (['--lr', '0.2'], r'lr is 0\.1 there and 0\.2 here'),
        (['--time-steps', '1'], 'time_steps is 2 there and 1 here'),
        (['--images', '8'], 'data is'),
    ):
        with pytest.raises(SystemExit, match=f'holds runs of other settings.*{named}'):
            experiment.main([*base, *change])
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    (tmp_path / 'mine').write_text('mine')
    with pytest.raises(SystemExit, match='holds something else'):
        experiment.main(['--data', str(data), '--output', str(tmp_path), *SETTINGS])
    assert [path.name for path in tmp_path.iterdir()] == ['mine']


@pytest.mark.parametrize(('change', 'named'), [
    (['--attach-warmup-epochs', '2'], 'must warm up in less than the 2 epochs'),
    (['--warmup-sweep', '0', '3'], 'must warm up in less than the 2 epochs'),
    (['--data', 'nowhere'], 'nowhere has no folder train'),
    (['--images', '7'], '7 images of train cannot be the same number of each of 2 classes'),
    (['--images', '12'], 'has 5 images, 6 are asked for'),
    (['--batch-size', '11'], 'do not fill a batch of 11'),
])
def test_what_cannot_work_is_refused(experiment, data, tmp_path, capsys, change, named):
    with pytest.raises(SystemExit) as exit_info:
        experiment.main(['--data', str(data), '--output', str(tmp_path / 'out'), *SETTINGS, *change])
    assert named in f'{exit_info.value} {capsys.readouterr().err}'
    assert not (tmp_path / 'out').exists()


def test_resnets_share_the_fused_architecture(experiment):
    forms = {(method.branches, method.annealed): name for name, method in experiment.METHODS.items()}
    assert len(forms) == 6
    shapes = set()
    for name in forms.values():
        model = experiment.fused(experiment.build_model('resnet18', name, 10).eval())
        shapes.add(json.dumps({key: list(tensor.shape) for key, tensor in model.state_dict().items()}))
    assert len(shapes) == 1


def test_measured_statistics_keep_the_function(experiment, monkeypatch):
    monkeypatch.setitem(sys.modules, 'run', experiment)
    transition = load_script(SCRIPT.with_name('transition.py'))
    model = experiment.build_model('repvgg_a1', 'repan_rep', 10)
    x, targets = torch.randn(8, 3, 8, 8), torch.arange(8)
    with torch.no_grad():
        model.train()(x)
    timm_rep.begin_time_step(model)
    kept, kept_training = transition.losses(model, 0.0, [(x, targets)])
    transition.measure_statistics_(model, x)
    measured, measured_training = transition.losses(model, 0.0, [(x, targets)])
    assert measured == pytest.approx(kept, rel=1e-4)
    assert measured_training == pytest.approx(kept, rel=1e-4)  # on the batch of the statistics
    assert abs(kept_training - kept) > 10 * abs(measured_training - kept)


def test_augmented_images_are_crops_and_mirror_images(experiment):
    pixels = torch.arange(36 * 3, dtype=torch.uint8).reshape(1, 6, 6, 3)
    source = sys.modules['images']
    padding = source.CROP_PADDING
    padded = torch.nn.functional.pad(pixels, (0, 0, padding, padding, padding, padding))
    allowed = {
        crop.numpy().tobytes()
        for top in range(2 * padding + 1) for left in range(2 * padding + 1)
        for image in [source.normalized(padded[:, top:top + 6, left:left + 6], False)]
        for crop in (image, image.flip(3).contiguous())
    }
    images = source.Images(padded.expand(40, -1, -1, -1), torch.arange(40))
    generator = torch.Generator().manual_seed(0)
    batches = list(source.train_batches(images, 12, generator, channels_last=False))
    assert [len(targets) for _, targets in batches] == [12, 12, 12]  # the rest is dropped
    assert len(set(torch.cat([targets for _, targets in batches]).tolist())) == 36
    crops = {image.numpy().tobytes() for x, _ in batches for image in x}
    assert crops <= allowed
    assert len(crops) > 10
