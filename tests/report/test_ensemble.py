import inspect
import json

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from helpers import assert_near, randomize_, state_of, tiny_resnet
from PIL import Image
from torch.optim.swa_utils import update_bn

import timm_rep
from timm_rep.cli.main import main
from timm_rep.io.weights import load_stock_form, save_weights
from timm_rep.report.ensemble import average_outputs, average_weights, evaluate_snapshots, find_snapshots

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


def call(*args, code=0):
    # older click puts both outputs into one unless told not to
    separate = dict(mix_stderr=False) if 'mix_stderr' in inspect.signature(CliRunner).parameters else {}
    result = CliRunner(**separate).invoke(main, ['ensemble', *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    if code:
        assert result.stderr.startswith('Error: ')
        assert result.stderr.count('\n') == 1
        return result.stderr
    return result.stdout


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
    average = result.model
    for key, value in average.state_dict().items():
        if 'running' not in key and value.is_floating_point():
            assert_near(value, sum(model.state_dict()[key] for model in models) / 3, 1e-6)
    train_inputs = normalised([pixels(100 + seed) for seed in range(12)])
    with torch.no_grad():
        features = average.stem.conv_kxk.conv(train_inputs)
        assert_near(average.stem.conv_kxk.bn.running_mean, features.mean(dim=(0, 2, 3)), 1e-4)
        assert not average.training
        assert_score(result.weights, average(inputs).log_softmax(dim=1), targets)

    stock = timm.create_model(NAME, num_classes=len(CLASSES), inference_mode=True).eval()
    stock.load_state_dict(safetensors.torch.load_file(out))
    with torch.no_grad():
        assert torch.equal(stock(inputs), average(inputs))


def test_average_of_outputs_is_that_of_probabilities():
    logits = [torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)) * 50 for seed in range(3)]
    expected = sum(output.double().softmax(dim=1) for output in logits) / 3
    assert_near(average_outputs(logits).double().exp(), expected, 1e-5)
    assert torch.isfinite(average_outputs([output * 1e4 for output in logits])).all()


def test_average_of_weights():
    models = [randomize_(tiny_resnet(), seed) for seed in range(3)]
    models[2].bn1.num_batches_tracked.fill_(7)
    before = [state_of(model) for model in models]
    average = average_weights(models)
    for model, state in zip(models, before):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert average.bn1.num_batches_tracked == 7
    expected = torch.stack([model.layer1[0].conv1.weight.double() for model in models]).mean(dim=0).float()
    assert torch.equal(average.layer1[0].conv1.weight, expected)
    assert torch.equal(average_weights(models[:1]).fc.weight, models[0].fc.weight)
    with pytest.raises(ValueError, match=r'models 0 and 1 are of different architectures: they differ in layer1\.0'):
        average_weights([tiny_resnet(), tiny_resnet('bottleneck')])
    with pytest.raises(ValueError, match='at least one'):
        average_weights([])


def test_snapshots_in_training_and_stock_form_agree(tmp_path):
    """What the wrapper writes at the end of a time step: load_stock_form builds the function of the training form."""
    (tmp_path / 'args.yaml').write_text(ARGS)
    model = randomize_(timm.create_model(NAME, rep_layer='orepa', num_classes=3)).eval()
    save_weights(timm_rep.fuse(model), tmp_path / 'time_step-1-stock.safetensors')
    stock = load_stock_form(tmp_path / 'time_step-1-stock.safetensors')
    assert stock.pretrained_cfg['input_size'] == (3, SIZE, SIZE)
    assert tuple(stock.pretrained_cfg['std']) == STD
    x = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert_near(stock(x), model(x), 1e-5)

    # a network of timm's own, trained with restarts
    save_weights(timm.create_model('test_resnet', num_classes=2), tmp_path / 'time_step-2-stock.safetensors')
    (tmp_path / 'args.yaml').write_text('model: test_resnet\nnum_classes: 2\n')
    assert load_stock_form(tmp_path / 'time_step-2-stock.safetensors').num_classes == 2


def test_command_prints_a_table(run, images):
    lines = call(run, '--data-dir', images, '--device', 'cpu', '--bn-images', 9).splitlines()
    assert [line[:20].strip() for line in lines] == [
        'on 15 images', 'time step 1', 'time step 2', 'time step 3', 'average of outputs', 'average of weights']
    assert 'Example' in call('--help')
    assert lines[0].split()[-5:] == ['top-1', '(%)', 'top-5', '(%)', 'loss']
    assert all(float(value) >= 0 for line in lines[1:] for value in line[20:].split())


def test_command_prints_json_and_takes_averaged_weights(run, images):
    options = ['--data-dir', images, '--device', 'cpu', '--bn-images', 9, '--json']
    printed = json.loads(call(run, *options))
    ema = json.loads(call(run, *options, '--use-ema', '--batch-size', 16, '--val-split', 'train'))
    assert (printed['images'], printed['bn_images']) == (15, 8)  # whole batches of four
    assert (ema['images'], ema['bn_images']) == (12, 9)
    assert [len(result['snapshots']) for result in (printed, ema)] == [3, 2]
    assert printed['weights'].keys() == {'name', 'top1', 'top5', 'loss'}


def test_snapshots_are_found_in_order(tmp_path):
    for number in (10, 9, 2):
        (tmp_path / f'time_step-{number}-stock.safetensors').touch()
    assert [number for number, _ in find_snapshots(tmp_path)] == [2, 9, 10]
    with pytest.raises(FileNotFoundError, match='no averaged weights'):
        find_snapshots(tmp_path, use_ema=True)


def test_bad_input(run, images, tmp_path):
    data = ['--data-dir', images, '--device', 'cpu']
    assert 'no run folder at' in call(tmp_path / 'missing', *data, code=2)
    assert 'has no snapshots of time steps, time_step-N-stock' in call(tmp_path, *data, code=2)
    (tmp_path / 'args.yaml').write_text(ARGS)
    save_weights(stock_model(0), tmp_path / 'time_step-1-stock.safetensors')
    assert 'has one snapshot, time_step-1-stock.safetensors; it takes two' in call(tmp_path, *data, code=2)
    save_weights(timm.create_model('test_resnet'), tmp_path / 'time_step-2-stock.safetensors')
    assert 'models 0 and 1 are of different architectures' in call(tmp_path, *data, code=2)
    for path in tmp_path.glob('time_step-*'):  # weights alone
        safetensors.torch.save_file(safetensors.torch.load_file(path), path)
    (tmp_path / 'args.yaml').unlink()
    assert 'does not say which model it is of' in call(tmp_path, *data, code=2)
    (tmp_path / 'args.yaml').write_text('model: nothing')
    assert "unknown model 'nothing'" in call(tmp_path, *data, code=2)

    assert f'no images at {tmp_path / "missing"}' in call(run, '--data-dir', tmp_path / 'missing', code=2)
    assert f"{images} has no split 'val' but test, train" in call(run, *data, '--val-split', 'val', code=2)
    assert "no split 'training2'" in call(run, *data, '--train-split', 'training2', code=2)
    # without splits, the images to evaluate on would be those to train on
    assert "has no split 'test' but cat, dog, frog" in call(run, '--data-dir', images / 'test', code=2)
    assert "device 'abacus' cannot be used" in call(run, *data[:2], '--device', 'abacus', code=2)
    assert 'bn_images must be at least 2, got 1' in call(run, *data, '--bn-images', 1, code=2)
    assert 'batch_size must be at least 1, got 0' in call(run, *data, '--batch-size', 0, code=2)

    more = tmp_path / 'more'
    for split in ('test', 'train'):
        for name in 'abcd':
            (more / split / name).mkdir(parents=True)
            Image.fromarray(pixels(0).numpy()).save(more / split / name / '0.png')
    assert 'holds images of 4 classes, the model knows 3' in call(run, '--data-dir', more, code=2)


def test_an_existing_output_stays(run, images, tmp_path):
    out = tmp_path / 'average.pth'
    out.write_text('mine')
    options = ['--data-dir', images, '--device', 'cpu', '--out']
    assert 'exists already; nothing was written' in call(run, *options, out, code=2)
    assert out.read_text() == 'mine'
    assert 'must end in .safetensors or .pth' in call(run, *options, tmp_path / 'average', code=2)
    assert [path.name for path in tmp_path.iterdir()] == ['average.pth']
