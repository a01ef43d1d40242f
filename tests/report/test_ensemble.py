import copy
import json
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from command_line import call
from helpers import assert_near
from PIL import Image
from torch.optim.swa_utils import update_bn

from timm_rep.io.weights import load, save_weights
from timm_rep.report.ensemble import average_outputs, evaluate_snapshots, find_snapshots

NAME = 'repan_repvgg_a0_cifar'
CLASSES = ('cat', 'dog', 'frog')
SIZE = 24
MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)
ARGS = f"""
model: {NAME}
model_kwargs: {{rep_layer: orepa}}
num_classes: {len(CLASSES)}
input_size: [3, {SIZE}, {SIZE}]
mean: {list(MEAN)}
std: {list(STD)}
crop_pct: 1.0
batch_size: 4
workers: 0
val_split: test
train_split: train
"""


def pixels(seed):
    return torch.randint(0, 256, (SIZE, SIZE, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def normalised(images):
    images = torch.stack(images).permute(0, 3, 1, 2) / 255
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def stock_model(seed):
    torch.manual_seed(seed)
    model = timm.create_model(NAME, rep_layer='orepa', num_classes=len(CLASSES), inference_mode=True)
    inputs = normalised([pixels(seed) for seed in range(15)])
    update_bn([inputs], model)
    with torch.no_grad():  # outputs of mean 0 and deviation 1, so that classes differ from image to image
        outputs = model.eval()(inputs)
        model.head.fc.bias.sub_(outputs.mean(dim=0))
        for parameter in model.head.fc.parameters():
            parameter.div_(outputs.std(dim=0).view(-1, *[1] * (parameter.ndim - 1)))
    return model


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Five images of each class to evaluate on, four to train on."""
    folder = tmp_path_factory.mktemp('images')
    for offset, split, count in ((0, 'test', 5), (100, 'train', 4)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                seed = offset + label * count + number
                Image.fromarray(pixels(seed).numpy()).save(folder / split / name / f'{number}.png')
    return folder


@pytest.fixture(scope='module')
def models():
    return [stock_model(seed) for seed in range(3)]


@pytest.fixture(scope='module')
def run(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp('run')
    (folder / 'args.yaml').write_text(ARGS)
    for number, model in enumerate(models, 1):
        save_weights(model, folder / f'time_step-{number}-stock.safetensors')
    for number, model in enumerate(models[1:], 1):
        save_weights(model, folder / f'time_step-{number}-ema-stock.safetensors')
    (folder / 'time_step-4.safetensors').touch()  # in training form: not taken
    return folder


def ensemble(run_dir, data_dir, *args, **kwargs):
    return call('ensemble', run_dir, '--data-dir', data_dir, '--device', 'cpu', *args, **kwargs)


def assert_score(score, log_probabilities, targets):
    right = log_probabilities.topk(1).indices == targets[:, None]
    assert score.top1 == pytest.approx(100 * right.float().mean().item(), abs=1e-3)
    assert score.top5 == pytest.approx(100)  # of three classes
    assert score.loss == pytest.approx(F.nll_loss(log_probabilities, targets).item(), rel=1e-4)


def test_scores_are_those_of_a_computation_by_hand(run, images, models, tmp_path):
    out = tmp_path / 'new' / 'average.safetensors'
    result = evaluate_snapshots(run, images, device='cpu', output=out)
    inputs = normalised([pixels(seed) for seed in range(15)])
    targets = torch.arange(15) // 5
    with torch.no_grad():
        probabilities = [model(inputs).softmax(dim=1) for model in models]
    assert [score.name for score in result.snapshots] == ['time step 1', 'time step 2', 'time step 3']
    for score, expected in zip(result.snapshots, probabilities):
        assert_score(score, expected.log(), targets)
    assert_score(result.outputs, (sum(probabilities) / 3).log(), targets)
    assert (result.images, result.bn_images) == (15, 12)

    # weights: the mean; norms: statistics of the training images, by hand for the first one
    average = load(out)
    for key, value in average.state_dict().items():
        if 'running' not in key and value.is_floating_point():
            assert_near(value, sum(model.state_dict()[key] for model in models) / 3, 1e-6)
    train_inputs = normalised([pixels(100 + seed) for seed in range(12)])
    with torch.no_grad():
        features = average.stem.conv_kxk.conv(train_inputs)
        assert_near(average.stem.conv_kxk.bn.running_mean, features.mean(dim=(0, 2, 3)), 1e-4)
        assert_score(result.weights, average(inputs).log_softmax(dim=1), targets)


def test_average_of_outputs_is_that_of_probabilities():
    logits = [torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)) * 50 for seed in range(3)]
    expected = sum(output.double().softmax(dim=1) for output in logits) / 3
    assert_near(average_outputs(logits).double().exp(), expected, 1e-5)
    assert torch.isfinite(average_outputs([output * 1e4 for output in logits])).all()


def test_command(run, images):
    options = [run, images, '--bn-images', 9]
    lines = ensemble(*options).splitlines()
    assert lines[0] == 'on 15 images: top-1 (%), top-5 (%), loss'
    assert [line[:20].strip() for line in lines[1:]] == [
        'time step 1', 'time step 2', 'time step 3', 'average of outputs', 'average of weights']
    assert all(float(value) >= 0 for line in lines[1:] for value in line[20:].split())
    printed = json.loads(ensemble(*options, '--json'))
    ema = json.loads(ensemble(*options, '--json', '--use-ema', '--batch-size', 16, '--val-split', 'train'))
    assert (printed['images'], printed['bn_images']) == (15, 8)  # whole batches of four
    assert (ema['images'], ema['bn_images']) == (12, 9)
    assert [len(result['snapshots']) for result in (printed, ema)] == [3, 2]
    assert printed['weights'].keys() == {'name', 'top1', 'top5', 'loss'}


def test_snapshots_are_found_in_order(tmp_path):
    for number in (10, 9, 2):
        (tmp_path / f'time_step-{number}-stock.safetensors').touch()
    assert [number for number, _ in find_snapshots(tmp_path)] == [2, 9, 10]
    with pytest.raises(FileNotFoundError, match='has no snapshots of time steps, time_step-N-ema-stock'):
        find_snapshots(tmp_path, use_ema=True)


def test_bad_input(run, images, tmp_path, caplog):
    missing = tmp_path / 'missing'
    assert 'No such file or directory' in ensemble(missing, images, code=2)
    assert f'there is no folder of images {missing}' in ensemble(run, missing, code=2)
    for dataset in ('', 'folder', 'imagenet', 'torch/folder'):  # folders, all of them
        (run / 'args.yaml').write_text(f'{ARGS}\ndataset: {dataset!r}')
        assert f"{images} has no split 'val'" in ensemble(run, images, '--val-split', 'val', code=2)
        assert 'on 15 images' in ensemble(run, images)
    # without splits, the images to evaluate on would be those to train on
    assert "has no split 'test'" in ensemble(run, images / 'test', code=2)
    for split in ('test', 'train'):
        for name in 'abcd':
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(pixels(0).numpy()).save(tmp_path / split / name / '0.png')
    assert 'holds images of 4 classes, the model knows 3' in ensemble(run, tmp_path, code=2)
    shutil.rmtree(tmp_path / 'train/d')
    shutil.rmtree(tmp_path / 'test/d')
    shutil.rmtree(tmp_path / 'test/a')  # b would be class 0
    assert "the split 'test' has other classes than 'train': 'b' is class 0 of it, and class 1 there" in ensemble(
        run, tmp_path, code=2)
    shutil.rmtree(tmp_path / 'train/a')
    ensemble(run, tmp_path)
    assert f'{tmp_path} holds images of 2 classes, the model knows 3: they are taken for its first ones' in caplog.text

    out = tmp_path / 'average.pth'
    out.write_text('mine')
    assert 'exists already; nothing was written' in ensemble(run, images, '--out', out, code=2)
    assert out.read_text() == 'mine'


def test_snapshots_of_half_precision_are_evaluated_in_full(run, images, models, tmp_path):
    (tmp_path / 'args.yaml').write_text(ARGS)
    for number, model in enumerate(models[:2], 1):
        save_weights(copy.deepcopy(model).bfloat16(), tmp_path / f'time_step-{number}-stock.safetensors')
    result = evaluate_snapshots(tmp_path, images, device='cpu', output=tmp_path / 'average.safetensors')
    assert len(result.snapshots) == 2
    assert next(load(tmp_path / 'average.safetensors').parameters()).dtype == torch.float32
