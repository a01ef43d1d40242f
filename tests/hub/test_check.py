"""Whether a model is still what was published: hostile files are read safely, and nothing large is fetched."""
import json
import shutil

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner
from hub_publishing import ARCHITECTURE, CLASSES, REPO, cached_files, call, publish_json
from safetensors.torch import load_file, save_file

from timm_rep.cli.main import main
from timm_rep.io.weights import save_weights


def test_self_check_is_as_strict_as_any(export):
    assert json.loads(call('verify', export, '--json'))['ok']
    path = export / 'test' / 'rand_tensors.safetensors'
    tensors = load_file(path)
    save_file(dict(tensors, output=tensors['output'] * (1 + 1e-4)), path)
    assert 'does not compute what it was published with' in call('verify', export, code=1)


def test_self_check_of_an_export_takes_no_options_of_checkpoints(export):
    for option in (['--model', 'resnet18'], ['--use-ema'], ['--num-classes', 3], ['--model-kwargs', 'rep_layer=acb']):
        assert 'is an export' in call('verify', export, *option, code=2)


def test_self_check_does_not_follow_a_config_elsewhere(export):
    path = export / 'config.json'
    config = json.loads(path.read_text())
    for cfg in (
            dict(hf_hub_filename='../../secret'), dict(hf_hub_id='you/other'), dict(file='/etc/passwd'),
            dict(url='http://example.org/x.pth'), dict(source='hf-hub'), dict(state_dict=dict(x=1))):
        path.write_text(json.dumps(dict(config, pretrained_cfg=dict(config['pretrained_cfg'], **cfg))))
        assert f'names another source of weights ({next(iter(cfg))})' in call('verify', export, code=2)
    strange = '{"architecture": "../../x", "pretrained_cfg": {}}'
    for content in (strange, '[]', '{', '[' * 10 ** 5, ' ' * 2 ** 20 + '{}'):
        path.write_text(content)
        assert 'config.json' in call('verify', export, code=2)


@pytest.mark.parametrize('args', [
    dict(pretrained_cfg_overlay=dict(url='http://example.org/x.pth')), dict(checkpoint_path='secret.pth')], ids=str)
def test_self_check_does_not_follow_arguments_elsewhere(server, run_folder, export, model, tmp_path, args):
    """They are arguments of timm's factory: it would read or fetch what they name."""
    publish_json(run_folder, '--repo', REPO)
    path = export / 'config.json'
    content = json.dumps(dict(json.loads(path.read_text()), model_args=args))
    path.write_text(content)
    message = f'names another source of weights ({next(iter(args))})'
    assert message in call('verify', export, code=2)
    server.repos[REPO].commit('main').files['config.json'] = (content.encode(), False)
    assert message in call('verify', f'hf-hub:{REPO}', code=2)
    assert cached_files(tmp_path) == []
    save_weights(model, tmp_path / 'weights.pth')
    options = ['--model', ARCHITECTURE, '--num-classes', CLASSES]
    assert message in call('verify', tmp_path / 'weights.pth', export, *options, code=2)


@pytest.mark.parametrize(('change', 'message'), [
    (dict(model_args=[1, 2]), 'does not describe a timm model'),
    (dict(model_args=dict(nonsense=1)), "unexpected keyword argument 'nonsense'"),
    (dict(model_args={}, num_classes='x'), 'timm cannot rebuild the model from config.json'),
    (dict(pretrained_cfg=dict(unknown_field=1)), 'timm cannot rebuild the model from config.json'),
    (dict(model_args=dict(layers=[10 ** 9, 1, 1, 1])), 'layers has numbers above 10000'),
    (dict(pretrained_cfg=dict(input_size=[3, 10 ** 6, 10 ** 6])), 'input_size has numbers above 10000'),
    (dict(model_args={}, num_classes=7), 'timm cannot rebuild the model from config.json and model.safetensors'),
], ids=str)
def test_self_check_of_nonsense_is_one_line(export, change, message):
    path = export / 'config.json'
    config = json.loads(path.read_text())
    config.update({k: {**config['pretrained_cfg'], **v} if k == 'pretrained_cfg' else v for k, v in change.items()})
    path.write_text(json.dumps(config))
    assert message in call('verify', export, code=2)
    result = CliRunner().invoke(main, ['verify', str(export), '--json'])
    assert message in json.loads(result.output.splitlines()[0])['error']


def test_self_check_computes_no_more_than_an_export_writes(export):
    path = export / 'test/rand_tensors.safetensors'
    save_file(dict(input=torch.zeros(10_000, 3, 1, 1), output=torch.zeros(10_000, 5)), path)
    assert 'an export writes 2 images, these are 10000' in call('verify', export, code=2)


@pytest.mark.parametrize('repo', ['', 'a b/c', 'a/b/c'])
def test_a_name_that_is_none_of_a_repository(repo):
    call('verify', f'hf-hub:{repo}', code=2)


@pytest.mark.parametrize('dtype', [torch.bool, torch.int8, torch.float8_e4m3fn])
def test_weights_are_of_the_models_kind_of_numbers(export, dtype):
    path = export / 'model.safetensors'
    weights = {key: value.clone() for key, value in load_file(path).items()}
    save_file({**weights, 'fc.bias': weights['fc.bias'].to(dtype)}, path)
    assert f'fc.bias is {dtype}' in call('verify', export, code=2)


def test_self_check_takes_images_only(export):
    path = export / 'test' / 'rand_tensors.safetensors'
    tensors = {key: value.clone() for key, value in load_file(path).items()}  # the file is mapped, and written to
    image, output = tensors['input'], tensors['output']
    for changed in (
            dict(input=image.int()), dict(input=image.to(torch.uint8)), dict(input=image[:, :1].clone()),
            dict(input=image[:0].clone(), output=output[:0].clone()), dict(output=None)):
        save_file({key: value for key, value in {**tensors, **changed}.items() if value is not None}, path)
        assert 'does not hold an input of the model and its output' in call('verify', export, code=2)


@pytest.mark.parametrize('change', [
    dict(model_args={}, num_classes=10 ** 7), dict(model_args=dict(num_classes=10 ** 7))], ids=str)
def test_self_check_allocates_no_more_than_the_weights_say(export, change):
    """The classifier would take 4 GB."""
    path = export / 'config.json'
    path.write_text(json.dumps(dict(json.loads(path.read_text()), **change)))
    size = (export / 'model.safetensors').stat().st_size
    assert f'model.safetensors has {size} bytes, allowed are 1' in call('verify', export, code=2)


def test_self_check_checks_sizes_and_files(export, tmp_path):
    for name, message in (('model.safetensors', 'cannot rebuild'), ('test/rand_tensors.safetensors', 'does not hold')):
        copy = shutil.copytree(export, tmp_path / name.replace('/', '-'))
        (copy / name).write_bytes((export / name).read_bytes()[:-7])
        assert message in call('verify', copy, code=2)
        with (copy / name).open('wb') as file:
            file.truncate(2 ** 27)
        assert 'it is not read' in call('verify', copy, code=2)
        (copy / name).unlink()
        assert f'holds no {name}' in call('verify', copy, code=2)


def test_large_files_on_the_hub_are_not_fetched(server, run_folder, tmp_path):
    publish_json(run_folder, '--repo', REPO)
    files = server.repos[REPO].commit('main').files
    whole = dict(files)
    files['model.safetensors'] = (bytes(2 ** 26), True)
    assert 'model.safetensors has 67108864 bytes' in call('verify', f'hf-hub:{REPO}', code=2)
    files.update(whole)
    files['config.json'] = (bytes(2 ** 21), False)
    assert 'config.json has 2097152 bytes' in call('verify', f'hf-hub:{REPO}', code=2)
    assert server.count('GET', '/files/') == {}
    del files['config.json']
    files['pytorch_model.bin'] = (b'a pickle', True)
    assert 'holds no config.json' in call('verify', f'hf-hub:{REPO}', code=2)


@pytest.mark.parametrize(('call_before', 'sees_one_commit'), [('model_info', False), ('hf_hub_download', True)])
def test_a_commit_while_files_are_fetched(server, run_folder, monkeypatch, call_before, sees_one_commit):
    """All files are of one commit: the one whose sizes were looked at."""
    publish_json(run_folder, '--repo', REPO)
    repo = server.repos[REPO]
    fetch = getattr(huggingface_hub.HfApi, call_before)

    def commit_behind(self, *args, **kwargs):
        result = fetch(self, *args, **kwargs)
        if len(server.messages(REPO)) == 2:
            repo.add('main', 'damaged', {**repo.commit('main').files, 'model.safetensors': (b'another', True)})
        return result

    monkeypatch.setattr(huggingface_hub.HfApi, call_before, commit_behind)
    if sees_one_commit:
        assert 'outputs agree' in call('verify', f'hf-hub:{REPO}')
    else:
        assert 'was changed in between' in call('verify', f'hf-hub:{REPO}', code=3)
    assert server.messages(REPO)[0] == 'damaged'
