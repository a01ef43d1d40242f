import argparse
import json
import sys

import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner
from command_line import call
from helpers import assert_near, randomize_
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

import timm_rep
from timm_rep.cli.main import main
from timm_rep.core.walk import annealed_modules
from timm_rep.hub import forms
from timm_rep.io.checkpoint import read_checkpoint
from timm_rep.io.weights import save_weights

NAME = 'orepa_repvgg_a0_cifar'


@pytest.fixture(scope='module')
def model():
    return randomize_(timm.create_model(NAME, num_classes=3)).eval()


@pytest.fixture(scope='module')
def checkpoint(model, tmp_path_factory):
    """A checkpoint as timm's train.py writes it; the averaged weights are others."""
    path = tmp_path_factory.mktemp('run') / 'last.pth.tar'
    args = argparse.Namespace(
        model=NAME, num_classes=3, in_chans=None, gp=None, bn_eps=None, model_kwargs={}, img_size=24, input_size=None,
        mean=[0.5, 0.5, 0.5], std=None, crop_pct=None, interpolation='')
    ema = {key: value * 0.5 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    torch.save(dict(arch=NAME, args=args, epoch=1, state_dict=model.state_dict(), state_dict_ema=ema), path)
    return path


@pytest.fixture
def stock_file(model, tmp_path):
    path = tmp_path / 'stock.pth'
    save_weights(timm_rep.fuse(model), path)
    return path


def assert_same_outputs(model, other, shape):
    x = torch.randn(2, *shape)
    with torch.no_grad():
        assert_near(model(x), other(x), 1e-5)


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_fuse_writes_the_stock_state_dict(suffix, model, checkpoint, tmp_path):
    out = tmp_path / 'new' / f'fused{suffix}'
    assert 'outputs agree' in call('fuse', checkpoint, out)
    weights = safetensors.torch.load_file(out) if suffix == '.safetensors' else torch.load(out, weights_only=True)
    stock = timm.create_model(NAME, num_classes=3, inference_mode=True).eval()
    stock.load_state_dict(weights)
    assert_same_outputs(stock, model, (3, 32, 32))


def test_fuse_writes_a_hub_folder(model, checkpoint, tmp_path):
    out = tmp_path / 'hub'
    call('fuse', checkpoint, out)
    config = json.loads((out / 'config.json').read_text())
    assert config['num_classes'] == 3
    assert config['pretrained_cfg']['input_size'] == [3, 24, 24]  # as the run was told
    assert config['pretrained_cfg']['mean'] == [0.5, 0.5, 0.5]
    assert_same_outputs(timm.create_model(f'local-dir:{out}', pretrained=True).eval(), model, (3, 24, 24))
    assert 'outputs agree' in call('verify', checkpoint, out)

    other = timm_rep.export_folder(timm.create_model('test_resnet'), tmp_path / 'other')
    stock = timm_rep.models.names.stock_architecture(NAME)
    message = f'is an export of test_resnet, not of {stock}, the stock form of {NAME}'
    assert message in call('verify', checkpoint, other, code=2)


def test_fuse_takes_the_averaged_weights(checkpoint, tmp_path):
    call('fuse', checkpoint, tmp_path / 'ema.pth', '--use-ema')
    call('fuse', checkpoint, tmp_path / 'raw.pth')
    heads = [torch.load(tmp_path / name, weights_only=True)['head.fc.weight'] for name in ('ema.pth', 'raw.pth')]
    assert torch.equal(heads[0], heads[1] * 0.5)
    plain = tmp_path / 'plain.pth'
    torch.save(dict(state_dict=read_checkpoint(checkpoint).state_dict, arch=NAME), plain)
    assert 'no EMA weights' in call('fuse', plain, tmp_path / 'x.pth', '--use-ema', code=2)


def test_model_and_its_arguments_from_args_yaml_or_options(tmp_path):
    weights = tmp_path / 'weights.pth'
    name = 'repan_resnet18_cifar'
    save_weights(randomize_(timm.create_model(name, rep_layer='acb', num_classes=3)).eval(), weights)
    assert 'does not say which model' in call('verify', weights, code=2)
    options = ['--model', name, '--model-kwargs', 'rep_layer=acb', '--model-kwargs', 'drop_rate=0.1']
    assert 'outputs agree' in call('verify', weights, *options)
    assert 'fc.weight' in call('verify', weights, *options, '--num-classes', 4, code=2)
    message = call('verify', weights, *options, '--model-kwargs', 'nonsense=1', code=2)
    assert 'repan_resnet18_cifar cannot be built with ' in message
    (tmp_path / 'args.yaml').write_text(f'model: {name}\nnum_classes: 3\nmodel_kwargs: {{rep_layer: acb}}\n')
    assert 'outputs agree' in call('verify', weights)


def test_compiled_and_distributed_prefixes_are_removed(model, tmp_path):
    path = tmp_path / 'compiled.pth'
    torch.save({f'_orig_mod.module.{key}': value for key, value in model.state_dict().items()}, path)
    assert read_checkpoint(path).state_dict.keys() == model.state_dict().keys()


def test_fuse_refuses_an_existing_output_and_other_suffixes(checkpoint, tmp_path):
    out = tmp_path / 'fused.pth'
    out.write_text('mine')
    assert 'exists already' in call('fuse', checkpoint, out, code=2)
    assert out.read_text() == 'mine'
    assert '.safetensors or .pth' in call('fuse', checkpoint, tmp_path / 'fused.pt', code=2)
    for suffix, option in (('.onnx', '--onnx'), ('.pt2', '--torch-export')):
        out = tmp_path / f'fused{suffix}'
        assert f'write it with {option} {out}' in call('fuse', checkpoint, out, code=2)
    assert 'exists already' in call('fuse', checkpoint, tmp_path, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ['fused.pth']


def test_bad_checkpoints_are_one_line_and_write_nothing(checkpoint, stock_file, tmp_path):
    out = tmp_path / 'out' / 'fused.pth'
    assert 'no checkpoint file at' in call('fuse', tmp_path / 'missing.pth', out, code=2)
    (tmp_path / 'garbage.pth').write_bytes(b'not a checkpoint')
    assert 'is not a' in call('fuse', tmp_path / 'garbage.pth', out, '--model', NAME, code=2)
    torch.save(dict(epoch=1), tmp_path / 'other.pth')
    assert 'holds no weights; its keys are epoch' in call('fuse', tmp_path / 'other.pth', out, code=2)
    assert 'unknown model' in call('fuse', checkpoint, out, '--model', 'orepa_nothing', code=2)
    assert 'has no rep layers' in call('fuse', checkpoint, out, '--model', 'resnet18', code=2)
    assert 'in training form; missing' in call(
        'fuse', stock_file, out, '--model', NAME, '--num-classes', 3, code=2)
    assert not out.parent.exists()


class Payload:
    """What a pickle from a stranger may hold: unpickling calls a function."""

    def __reduce__(self):
        return sys.setrecursionlimit, (1234,)


def test_pickles_with_other_objects_are_not_run(tmp_path):
    path = tmp_path / 'evil.pth'
    torch.save(dict(state_dict=Payload()), path)
    limit = sys.getrecursionlimit()
    assert 'setrecursionlimit' in call('fuse', path, tmp_path / 'fused.pth', code=2)
    assert sys.getrecursionlimit() == limit


def test_verify_reports_and_finds_a_mismatch(checkpoint, stock_file, tmp_path):
    assert 'outputs agree' in call('verify', checkpoint)
    report = json.loads(call('verify', checkpoint, stock_file, '--json'))
    assert report['ok']
    assert report['model']['relative'] <= report['rtol']
    assert len(report['layers']) == len(list(timm_rep.rep_layers(timm.create_model(NAME))))

    weights = torch.load(stock_file, weights_only=True)
    weights['stages.1.0.conv_kxk.conv.weight'] *= 1.01
    wrong = tmp_path / 'wrong.safetensors'
    safetensors.torch.save_file(weights, wrong)
    assert 'layer stages.1.0.conv_kxk.conv is off' in call('verify', checkpoint, wrong, code=1)
    result = CliRunner().invoke(main, ['verify', str(checkpoint), str(wrong), '--json'])
    assert result.exit_code == 1
    report = json.loads(result.output.splitlines()[0])
    assert not report['ok']
    assert 'stages.1.0' in report['error']

    assert 'does not hold orepa_repvgg_a0_cifar in stock form' in call('verify', checkpoint, checkpoint, code=2)


@pytest.mark.parametrize(('layer', 'stock_name', 'name', 'kwargs'), [
    ('orepa', NAME, NAME, {}),
    ('acb', 'dbb_resnet18_cifar', 'repan_resnet18_cifar', dict(rep_layer='acb')),
])
def test_expand_keeps_the_outputs(layer, stock_name, name, kwargs, tmp_path):
    stock = randomize_(timm.create_model(stock_name, inference_mode=True, num_classes=4, in_chans=1)).eval()
    source, out = tmp_path / 'stock.pth', tmp_path / 'training.safetensors'
    save_weights(stock, source)
    options = ['--model', stock_name, '--method', layer]  # the weights tell classes and channels
    assert 'outputs agree' in call('expand', source, out, *options)
    expanded = timm.create_model(name, num_classes=4, in_chans=1, checkpoint_path=str(out), **kwargs).eval()
    assert list(annealed_modules(expanded))
    assert_same_outputs(expanded, stock, (1, 32, 32))
    before = out.read_bytes()
    assert 'exists already' in call('expand', source, out, *options, code=2)
    assert out.read_bytes() == before


@pytest.mark.parametrize('kind', ['file', 'run', 'timm model', 'folder'])
def test_expand_keeps_the_input_settings(kind, tmp_path, monkeypatch):
    stock = timm.create_model('resnet18', num_classes=4).eval()
    settings = dict(input_size=(3, 64, 64), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=0.9)
    source, out = tmp_path / 'stock.safetensors', tmp_path / 'training.safetensors'
    if kind == 'file':
        stock.pretrained_cfg = {**stock.pretrained_cfg, **settings}
        timm_rep.save(stock, source)
    elif kind == 'folder':
        stock.pretrained_cfg = {**stock.pretrained_cfg, **settings}
        source = timm_rep.export_folder(stock, tmp_path / 'folder') / 'model.safetensors'
    elif kind == 'run':
        source = tmp_path / 'last.pth.tar'
        args = argparse.Namespace(model='resnet18', num_classes=4, **settings)
        torch.save(dict(state_dict=stock.state_dict(), args=args), source)
    else:
        stock.pretrained_cfg = {**stock.pretrained_cfg, **settings}
        create_model = forms.create_model
        monkeypatch.setattr(
            forms, 'create_model', lambda name, **kwargs: create_model(name, **kwargs) if 'rep' in name else stock)
        source = 'resnet18'
    options = {'timm model': ['--num-classes', 4], 'folder': ['--model', 'resnet18']}
    call('expand', source, out, *options.get(kind, []))
    cfg = timm_rep.load(out).pretrained_cfg
    assert {key: cfg[key] for key in settings} == settings
    assert cfg['architecture'] == 'orepa_resnet18'


def test_fuse_keeps_the_input_settings_of_a_folder(model, tmp_path):
    settings = dict(input_size=(3, 40, 40), mean=(0.5, 0.5, 0.5), crop_pct=0.9)
    weights = tmp_path / 'model.safetensors'
    safetensors.torch.save_file(model.state_dict(), weights)
    (tmp_path / 'config.json').write_text(json.dumps(dict(architecture=NAME, pretrained_cfg=settings)))
    call('fuse', weights, tmp_path / 'fused', '--model', NAME)
    cfg = json.loads((tmp_path / 'fused/config.json').read_text())['pretrained_cfg']
    assert {key: tuple(cfg[key]) if isinstance(cfg[key], list) else cfg[key] for key in settings} == settings


def test_expand_bad_input(checkpoint, stock_file, tmp_path):
    out = tmp_path / 'out.pth'
    assert 'neither a file nor a model' in call('expand', 'resnet999', out, code=2)
    other = call('expand', 'vgg16', out, code=2)
    assert "layer 'orepa' stands for the stock models mobilenetv1_100, rep" in other
    assert "timm_rep.expand(model, 'orepa') takes any CNN" in ' '.join(other.split())
    assert 'does not say which model' in call('expand', stock_file, out, code=2)
    assert 'in stock form' in call('expand', checkpoint, out, code=2)
    assert 'must end in .safetensors or .pth' in call('expand', stock_file, tmp_path / 'folder', code=2)
    assert not out.exists()


@pytest.mark.parametrize('offline', [False, True])
def test_expand_tells_the_hub_from_wrong_input(offline, tmp_path, monkeypatch):
    """Weights are to come from an address where nobody listens."""
    template = 'http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(file_download, 'HUGGINGFACE_CO_URL_TEMPLATE', template, raising=False)  # older client
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', offline)
    monkeypatch.setattr(_http.time, 'sleep', lambda seconds: None)  # between two tries
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    out = tmp_path / 'out.pth'
    assert 'resnet18 is not in the cache, and cannot be fetched' in call('expand', 'resnet18', out, code=3)
    assert 'no pretrained weights of orepa_resnet18' in call('expand', 'orepa_resnet18', out, code=2)
    assert not out.exists()
