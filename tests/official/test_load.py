"""The whole way from an authors' file: what comes back, what is written, what is refused."""
import json
import re
import sys

import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner
from helpers import DEPLOY_RTOL, MODEL_RTOL, assert_near, assert_same_state, randn, randomize_, state_of

from timm_rep import UserError, fuse, load_official_checkpoint, rep_layers
from timm_rep.cli.main import main
from timm_rep.core.walk import annealed_modules
from timm_rep.official import load as official

NAME = 'orepa_repvgg_a0_cifar'
PARTS = {'conv_kxk': 'rbr_dense', 'conv_1x1': 'rbr_1x1', 'identity': 'rbr_identity', 'reparam_conv': 'rbr_reparam'}


def official_names(state_dict):
    """RepVGG's own names of the tensors of timm's RepVGG."""
    result = {}
    for key, value in state_dict.items():
        key = key.replace('head.fc.', 'linear.').replace('stem.', 'stage0.')
        if key.startswith('stages.'):
            _, stage, rest = key.split('.', 2)
            key = f'stage{int(stage) + 1}.{rest}'
        result['.'.join(PARTS.get(part, part) for part in key.split('.'))] = value
    return result


@pytest.fixture(scope='module')
def stock():
    return randomize_(timm.create_model(NAME, inference_mode=True, num_classes=3)).eval()


@pytest.fixture(scope='module')
def training_file(stock, tmp_path_factory):
    path = tmp_path_factory.mktemp('official') / 'RepVGG-train.pth.tar'
    weights = {f'module.{key}': value for key, value in official_names(stock.state_dict()).items()}
    torch.save(dict(epoch=119, arch='RepVGG-A0', state_dict=weights, best_acc1=torch.tensor(70.0)), path)
    return path


@torch.no_grad()
def test_batches_are_counted(stock, tmp_path):
    weights = official_names(stock.state_dict())
    counts = [key for key in weights if key.endswith('num_batches_tracked')]
    weights.update({key: torch.tensor(number) for number, key in enumerate(counts, start=3)})
    loaded = official_names(load_official_checkpoint(weights, NAME, inference_mode=True).state_dict())
    assert {key: loaded[key].item() for key in counts} == {key: weights[key].item() for key in counts}
    uncounted = {key: value for key, value in weights.items() if key not in counts}
    old = load_official_checkpoint(uncounted, NAME, inference_mode=True).state_dict()
    assert {value.item() for key, value in old.items() if key.endswith('num_batches_tracked')} == {0}
    with pytest.raises(UserError, match=rf'{counts[0]} has shape \(2,\)'):
        load_official_checkpoint({**weights, counts[0]: torch.tensor([1, 2])}, NAME, inference_mode=True)


@pytest.fixture(scope='module')
def deploy_file(stock, tmp_path_factory):
    path = tmp_path_factory.mktemp('official') / 'RepVGG-deploy.pth'
    torch.save(official_names(timm.utils.reparameterize_model(stock).state_dict()), path)
    return path


@torch.no_grad()
def assert_same_outputs(model, stock, rtol=MODEL_RTOL[torch.float32]):
    x = randn(2, 3, 32, 32, dtype=torch.float32)
    assert_near(model(x), stock(x), rtol)


def test_file_in_training_form(stock, training_file):
    for rate in (1.0, 0.25):
        model = load_official_checkpoint(training_file, NAME, attach_rate=rate)
        assert not model.training
        assert model.num_classes == 3
        assert {layer.attach_rate.item() for _, layer in rep_layers(model)} == {rate}
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert_same_outputs(model, stock)
    with pytest.raises(UserError, match='attach rate'):
        load_official_checkpoint(training_file, NAME, attach_rate=1.5)


def test_file_in_deploy_form(stock, deploy_file):
    model = load_official_checkpoint(deploy_file, NAME)
    assert not list(rep_layers(model))
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert_same_outputs(model, stock, DEPLOY_RTOL[torch.float32])


def test_state_dict_and_wrappers(stock, training_file, tmp_path):
    weights = official_names(stock.state_dict())
    assert_same_outputs(load_official_checkpoint(weights, NAME), stock)
    double = {key: value.double() if value.is_floating_point() else value for key, value in weights.items()}
    assert next(load_official_checkpoint(double, NAME).parameters()).dtype == torch.float64
    wrapped = tmp_path / 'model_epoch_0100.pyth'
    torch.save(dict(epoch=99, model_state=weights), wrapped)
    assert_same_outputs(load_official_checkpoint(wrapped, NAME), stock)
    alone = tmp_path / 'weights.safetensors'
    safetensors.torch.save_file(weights, alone)
    assert_same_outputs(load_official_checkpoint(alone, NAME), stock)


def test_two_imports_are_the_same(training_file, deploy_file):
    for file in (training_file, deploy_file):
        seed = torch.get_rng_state()
        first = state_of(load_official_checkpoint(file, NAME))
        assert torch.equal(torch.get_rng_state(), seed)
        torch.rand(1)
        assert_same_state(state_of(load_official_checkpoint(file, NAME)), first)


@pytest.mark.parametrize('layer', ['rep', 'acb', 'orepa'])
@torch.no_grad()
def test_annealed_repvgg(layer, stock, training_file, deploy_file):
    name = NAME.replace('orepa', 'repan')
    model = load_official_checkpoint(training_file, name, rep_layer=layer)
    assert any(annealed_modules(model))
    assert_same_outputs(model, stock)
    model = load_official_checkpoint(deploy_file, name, rep_layer=layer)
    assert not any(annealed_modules(model))
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert_same_outputs(model, stock, DEPLOY_RTOL[torch.float32])


class Payload:
    """What a pickle from a stranger may hold: unpickling calls a function."""

    def __reduce__(self):
        return sys.setrecursionlimit, (1234,)


def test_a_hostile_file_is_refused_and_not_run(tmp_path):
    path = tmp_path / 'evil.pth'
    torch.save(dict(state_dict=Payload()), path)
    limit = sys.getrecursionlimit()
    with pytest.raises(UserError, match='setrecursionlimit'):
        load_official_checkpoint(path, NAME)
    assert sys.getrecursionlimit() == limit


def test_bad_arguments_raise(stock, training_file):
    with pytest.raises(UserError, match="unknown model 'orepa_nothing'"):
        load_official_checkpoint(training_file, 'orepa_nothing')
    for wrong in ({'epoch': 1}, {1: torch.ones(1)}):
        with pytest.raises(UserError, match='a state dict holds tensors only'):
            load_official_checkpoint(wrong, NAME)
    scalar = {**official_names(stock.state_dict()), 'linear.weight': torch.tensor(1.0)}
    with pytest.raises(UserError, match=r'linear.weight has shape \(\)'):
        load_official_checkpoint({**scalar, 'linear.bias': torch.zeros(10)}, NAME)
    with pytest.raises(UserError, match=r'missing: .*not expected: '):  # timm's own names
        load_official_checkpoint(stock.state_dict(), NAME)


# The command.


def call(*args, code=0):
    result = CliRunner().invoke(main, ['import-official', *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    if code:
        assert result.output.startswith('Error: ')
        assert result.output.count('\n') == 1
    return result.output


def test_import_writes_weights_to_train_on(stock, training_file, tmp_path):
    out = tmp_path / 'new' / 'weights.safetensors'
    printed = call(training_file, '--model', NAME, '--out', out)
    assert f'{out}: {NAME} in training form, 3 classes; training form and stock form: outputs agree' in printed
    model = timm.create_model(NAME, num_classes=3, checkpoint_path=str(out)).eval()
    assert_same_outputs(model, stock)
    before = out.read_bytes()
    assert 'exists already' in call(training_file, '--model', NAME, '--out', out, code=2)
    assert out.read_bytes() == before


def test_import_of_a_deploy_file_writes_stock_weights(stock, deploy_file, tmp_path):
    out = tmp_path / 'weights.pth'
    printed = json.loads(call(deploy_file, '--model', NAME, '--out', out, '--json'))
    assert printed == dict(output=str(out), architecture=NAME, form='stock', num_classes=3, model_kwargs={}, fused=None)
    model = timm.create_model(NAME, num_classes=3, inference_mode=True, checkpoint_path=str(out)).eval()
    assert_same_outputs(model, stock, DEPLOY_RTOL[torch.float32])


def test_import_writes_a_hub_folder_in_stock_form(stock, training_file, tmp_path):
    out = tmp_path / 'hub'
    printed = json.loads(call(training_file, '--model', NAME, '--out', out, '--license', 'mit', '--json'))
    assert printed['form'] == 'stock'
    assert printed['fused']['model']['relative'] <= printed['fused']['rtol']
    config = json.loads((out / 'config.json').read_text())
    assert config['pretrained_cfg']['license'] == 'mit'
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    assert not list(rep_layers(model))
    assert_same_outputs(model, stock)


@pytest.mark.parametrize('out', ['weights.pth', 'hub'])
def test_import_writes_no_values_that_are_not_finite(out, deploy_file, tmp_path):
    weights = torch.load(deploy_file)
    weights['linear.bias'][0] = float('inf')
    torch.save(weights, tmp_path / 'broken.pth')
    message = call(tmp_path / 'broken.pth', '--model', NAME, '--out', tmp_path / out, code=1)
    assert 'values that are not finite' in message
    assert [path.name for path in tmp_path.iterdir()] == ['broken.pth']


def test_import_writes_no_variance_that_cannot_be(stock, tmp_path):
    """A stock model has no fused form to be compared with."""
    weights = official_names(stock.state_dict())
    weights['stage0.rbr_dense.bn.running_var'] = torch.full_like(weights['stage0.rbr_dense.bn.running_var'], -1.0)
    torch.save(weights, tmp_path / 'broken.pth')
    out = tmp_path / 'weights.pth'
    options = ['--model', NAME, '--model-kwargs', 'inference_mode=True', '--out', out]
    message = call(tmp_path / 'broken.pth', *options, code=1)
    assert 'stem.conv_kxk.bn.running_var has ' in message
    assert not out.exists()


def test_import_checks_the_fused_model(training_file, tmp_path, monkeypatch):
    def wrong(model):
        fused = fuse(model)
        with torch.no_grad():
            fused.stem.conv_kxk.conv.weight.mul_(1.01)
        return fused

    monkeypatch.setattr(official, 'fuse', wrong)
    assert 'layer stem.conv_kxk.conv is off' in call(
        training_file, '--model', NAME, '--out', tmp_path / 'weights.pth', code=1)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope='module')
def mobilenet():
    return randomize_(timm.create_model('mobilenetv1_100', num_classes=3, act_layer='relu')).eval()


@pytest.fixture(scope='module')
def mobilenet_file(mobilenet, tmp_path_factory):
    """RepAn's names of the tensors of a MobileNet of plain blocks."""
    parts = {'conv_dw': 'depthwise.conv', 'bn1': 'depthwise.bn', 'conv_pw': 'pointwise.conv', 'bn2': 'pointwise.bn'}
    positions = {
        name: f'stem.{position}'
        for position, name in enumerate(name for name, _ in mobilenet.named_modules() if name.count('.') == 2)}
    weights = {}
    for key, value in mobilenet.state_dict().items():
        block, part, kind = key.rsplit('.', 2) if key.startswith('blocks') else ('', *key.split('.'))
        own = dict(conv_stem='conv1.conv', bn1='conv1.bn', classifier='linear')
        weights[f'{positions[block]}.{parts[part]}.{kind}' if block else f'{own[part]}.{kind}'] = value
    path = tmp_path_factory.mktemp('official') / 'model_epoch_0001.pyth'
    torch.save(dict(epoch=0, model_state=weights), path)
    return path


def test_import_takes_arguments_of_the_model(mobilenet, mobilenet_file, tmp_path):
    options = ['--model', 'repan_mobilenetv1_100', '--model-kwargs', 'rep_layer=acb']
    out = tmp_path / 'weights.safetensors'
    assert "build repan_mobilenetv1_100 with act_layer='relu'" in call(mobilenet_file, *options, '--out', out, code=2)
    options += ['--model-kwargs', 'act_layer=relu', '--attach-rate', 0.5]
    printed = call(mobilenet_file, *options, '--out', out)
    assert 'training form, 3 classes, built with rep_layer=acb act_layer=relu; training' in printed
    model = timm.create_model(
        'repan_mobilenetv1_100', num_classes=3, rep_layer='acb', act_layer='relu', checkpoint_path=str(out)).eval()
    assert {layer.attach_rate.item() for _, layer in rep_layers(model)} == {0.5}
    assert_same_outputs(model, mobilenet)

    folder = tmp_path / 'hub'
    if not hasattr(mobilenet, '_model_args'):  # an older timm, whose folders do not hold arguments
        assert 'is not what timm builds as mobilenetv1_100' in call(mobilenet_file, *options, '--out', folder, code=2)
        return
    printed = json.loads(call(mobilenet_file, *options, '--out', folder, '--json'))
    assert printed['architecture'] == 'mobilenetv1_100'
    assert printed['model_kwargs'] == dict(act_layer='relu')
    assert_same_outputs(timm.create_model(f'local-dir:{folder}', pretrained=True).eval(), mobilenet)


@pytest.mark.parametrize(('option', 'message'), [
    ('rep_layer=none', "unknown method 'none'"),
    ('nonsense=1', 'repan_mobilenetv1_100 cannot be built with .*nonsense=1'),
    ('num_classes=0', 'was built without'),
    ('num_classes=4', 'linear.weight has shape'),
])
def test_bad_arguments_of_the_model_are_one_line(option, message, mobilenet_file, tmp_path):
    out = tmp_path / 'out.pth'
    options = ['--model', 'repan_mobilenetv1_100', '--model-kwargs', 'act_layer=relu', '--model-kwargs', option]
    result = CliRunner().invoke(main, ['import-official', str(mobilenet_file), *options, '--out', str(out)])
    assert result.exit_code == 2, result.exception
    assert re.search(message, result.output)
    assert result.output.splitlines()[-1].startswith('Error: ')
    assert not out.exists()


def test_import_errors_are_one_line_and_write_nothing(training_file, tmp_path):
    out = tmp_path / 'out'
    assert 'no checkpoint file at' in call(tmp_path / 'missing.pth', '--model', NAME, '--out', out, code=2)
    assert 'does not hold official weights of orepa_resnet18_cifar; missing' in call(
        training_file, '--model', 'orepa_resnet18_cifar', '--out', out, code=2)
    assert 'must end in .safetensors or .pth' in call(
        training_file, '--model', NAME, '--out', tmp_path / 'out.onnx', code=2)
    assert list(tmp_path.iterdir()) == []
