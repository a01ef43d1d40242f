"""Weights that an overlay names bring the classes and input settings that are known of them."""
import argparse
import json

import pytest
import safetensors.torch
import timm
import torch
from helpers import OLD_TIMM, randomize_

from timm_rep import UserError, export_folder, fuse, load, save
from timm_rep.models import published

NAME = 'orepa_resnet18_cifar'


@pytest.fixture(scope='module')
def model():
    model = randomize_(timm.create_model(NAME, num_classes=7, in_chans=1)).eval()
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(1, 40, 40), mean=(0.1,))
    return model


def create(name=NAME, **overlay):
    kwargs = overlay.pop('kwargs', {})
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def assert_same_head(created, model, same=True):
    assert torch.equal(created.fc.weight, model.fc.weight) == same


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    return export_folder(model, tmp_path_factory.mktemp('export') / 'folder', label_names=list('abcdefg'))


@pytest.mark.skipif(OLD_TIMM, reason='this timm adapts weights for 3 image channels only')
def test_a_file_is_of_the_classes_of_the_config_beside_it(model, folder):
    created = create(file=folder / 'model.safetensors')
    assert_same_head(created, model)
    assert created.conv1.in_channels == 1
    assert created.pretrained_cfg['input_size'] == (1, 40, 40)
    assert created.pretrained_cfg['label_names'] == tuple('abcdefg')
    assert create(file=folder / 'model.safetensors', mean=(0.2,)).pretrained_cfg['mean'] == (0.2,)
    other = create(file=folder / 'model.safetensors', kwargs=dict(num_classes=3, in_chans=3))
    assert (other.num_classes, other.conv1.in_channels) == (3, 3)


@pytest.mark.parametrize(('name', 'write'), [
    ('x.safetensors', save),
    ('x.safetensors', lambda model, path: safetensors.torch.save_file(fuse(model).state_dict(), path)),
    ('x.pth', lambda model, path: torch.save(fuse(model).state_dict(), path)),
    ('x.pth', lambda model, path: torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)),
    ('last.pth.tar', lambda model, path: torch.save(
        dict(state_dict_ema=model.state_dict(), state_dict={}, args=argparse.Namespace()), path)),
], ids=['training form', 'stock form', 'pickled', 'pickled in the older way', 'checkpoint'])
def test_a_file_alone_tells_its_classes(name, write, model, tmp_path):
    write(model, tmp_path / name)
    overlay = dict(file=tmp_path / name, input_size=(1, 32, 32))
    assert_same_head(create(**overlay), model)
    assert create(kwargs=dict(num_classes=3), **overlay).num_classes == 3
    (tmp_path / 'config.json').write_text('{"model_type": "another library\'s"}')
    assert_same_head(create(**overlay), model)


@pytest.mark.skipif(OLD_TIMM, reason='this timm adapts weights for 3 image channels only')
def test_a_file_of_save_tells_its_input(model, tmp_path):
    save(model, tmp_path / 'x.safetensors')
    cfg = create(file=tmp_path / 'x.safetensors').pretrained_cfg
    assert (cfg['input_size'], cfg['mean']) == ((1, 40, 40), (0.1,))
    assert create(file=tmp_path / 'x.safetensors', mean=(0.2,)).pretrained_cfg['mean'] == (0.2,)


@pytest.mark.skipif(OLD_TIMM, reason='this timm adapts weights for 3 image channels only')
def test_what_a_file_says_itself_goes_before_the_config_beside_it(model, tmp_path):
    save(model, tmp_path / 'x.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(dict(mean=[0.3], label_names=list('abcdefg'))))
    cfg = create(file=tmp_path / 'x.safetensors').pretrained_cfg
    assert (cfg['mean'], cfg['label_names']) == ((0.1,), tuple('abcdefg'))
    assert load(tmp_path / 'x.safetensors').pretrained_cfg['mean'] == (0.1,)


@pytest.mark.skipif(OLD_TIMM, reason='this timm adapts weights for 3 image channels only')
@pytest.mark.parametrize(('args', 'expected'), [
    (dict(model='resnet18', input_size=[1, 48, 48], mean=[0.3]), ((1, 48, 48), (0.3,))),
    (dict(model=NAME, input_size=48, mean=[0.3]), None),
    (dict(input_size=[1, 48, 48], mean=[0.3]), None),
], ids=['of train.py', 'not as timm has them', 'of another program'])
def test_a_checkpoint_tells_the_input_of_its_run(args, expected, model, tmp_path):
    torch.save(dict(state_dict=model.state_dict(), args=argparse.Namespace(**args)), tmp_path / 'last.pth.tar')
    created = create(file=tmp_path / 'last.pth.tar', kwargs=dict(in_chans=1))
    assert_same_head(created, model)
    ours = timm.create_model(NAME).pretrained_cfg
    found = tuple(created.pretrained_cfg[key] for key in ('input_size', 'mean'))
    assert found == (expected or (ours['input_size'], ours['mean']))


@pytest.mark.parametrize('named', [
    lambda path: dict(pretrained_cfg_overlay=dict(file=path, num_classes=7)),
    lambda path: dict(pretrained_cfg=dict(file=path, num_classes=7)),
    lambda path: dict(model_name=f'local-dir:{path.parent}'),
], ids=['overlay', 'cfg', 'folder'])
def test_damaged_weights_are_refused_however_they_are_named(named, model, folder, tmp_path):
    config = json.loads((folder / 'config.json').read_text())  # here of the training form
    (tmp_path / 'config.json').write_text(json.dumps(dict(config, architecture=NAME, model_args={})))
    save(model, tmp_path / 'model.safetensors')
    args = dict(dict(model_name=NAME, pretrained=True, num_classes=7), **named(tmp_path / 'model.safetensors'))
    assert timm.create_model(**args, in_chans=1).num_classes == 7
    content = bytearray((tmp_path / 'model.safetensors').read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / 'model.safetensors').write_bytes(content)
    with pytest.raises(UserError, match=r'model\.safetensors is not loaded: it is damaged'):
        timm.create_model(**args, in_chans=1)


def test_a_repository_is_of_the_classes_of_its_config(model, folder, monkeypatch):
    asked = []

    def config(repo, cache_dir=None):
        asked.append(repo)
        config = json.loads((folder / 'config.json').read_text())
        return dict(config['pretrained_cfg'], num_classes=config['num_classes']), config['architecture'], {}

    weights = safetensors.torch.load_file(folder / 'model.safetensors')
    monkeypatch.setattr(published, 'load_model_config_from_hf', config)
    monkeypatch.setattr(timm.models._builder, 'load_state_dict_from_hf', lambda *args, **kwargs: dict(weights))
    assert_same_head(create(hf_hub_id='me/seven'), model)
    assert create(hf_hub_id='me/seven').pretrained_cfg['input_size'] == (1, 40, 40)
    assert set(asked) == {'me/seven'}


@pytest.mark.parametrize('encoding', ['utf-16', 'latin-1', 'utf-8'])
def test_a_config_that_cannot_be_read_hides_no_classes(encoding, model, tmp_path):
    (tmp_path / 'config.json').write_text('{"label_names": ["\xe4"]}', encoding)
    save(model, tmp_path / 'x.safetensors')
    created = create(file=tmp_path / 'x.safetensors', kwargs=dict(num_classes=7))
    assert_same_head(created, model)
    assert created.pretrained_cfg.get('label_names') == (('\xe4',) if encoding == 'utf-8' else None)


@pytest.mark.parametrize('settings', [
    dict(num_classes=3, input_size=224, mean=0.5, std='abc', crop_pct=True, interpolation=3, pool_size=None),
    dict(num_classes=10 ** 9, input_size=[], mean=[], std=['0.1'], crop_pct='1', crop_mode=[], label_names=5),
    dict(num_classes='7', input_size=[3, 10 ** 9, 10 ** 9], mean=[float('nan')]),
], ids=str)
@pytest.mark.parametrize('beside', [True, False])
def test_settings_that_timm_cannot_use_are_left_out(settings, beside, model, tmp_path):
    """Such as those of another library, by the same names; the classes are those of the file."""
    metadata = {} if beside else dict(pretrained_cfg=json.dumps(settings))
    if beside:
        (tmp_path / 'config.json').write_text(json.dumps(settings))
    safetensors.torch.save_file(fuse(model).state_dict(), tmp_path / 'x.safetensors', metadata)
    created = create(file=tmp_path / 'x.safetensors', kwargs=dict(in_chans=1))
    assert_same_head(created, model)
    ours = timm.create_model(NAME).pretrained_cfg
    kept = ('input_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation', 'pool_size')
    assert {key: created.pretrained_cfg.get(key) for key in kept} == {key: ours.get(key) for key in kept}


@pytest.mark.parametrize('content', ['', '[', '[]', '{"pretrained_cfg": 5}', '{"num_classes": null}'])
def test_what_says_nothing_of_the_weights_changes_nothing(content, tmp_path):
    model = timm.create_model(NAME)
    (tmp_path / 'config.json').write_text(content)
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    assert_same_head(create(file=tmp_path / 'x.pth'), model)
