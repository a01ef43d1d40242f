"""Weights that come with the package: found by their names, offline, in both forms."""
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from command_line import call
from helpers import assert_near
from timm.data import create_dataset, create_transform, resolve_data_config

import timm_rep
from timm_rep.core.walk import annealed_modules
from timm_rep.models.published import REGISTRY, published_weights

SHIPPED = {name: Path(entry['file']) for name, entry in published_weights().items() if 'file' in entry}
FOLDER = REGISTRY.with_name('weights')
IMAGES = os.environ.get('CIFAR10_IMAGES')  # a folder with test/CLASS/*

shipped = pytest.mark.parametrize('name', SHIPPED)


def test_there_is_an_entry_for_every_folder_and_they_are_small():
    assert sorted(SHIPPED) == sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
    files = [path for path in FOLDER.rglob('*') if path.is_file()]
    assert max(path.stat().st_size for path in files) < 2e6
    assert sum(path.stat().st_size for path in files) < 6e6
    for path in SHIPPED.values():
        assert {'README.md', 'args.yaml', 'config.json', 'summary.csv'} <= {file.name for file in path.parent.iterdir()}


@shipped
@torch.no_grad()
def test_they_load_offline_in_training_and_in_stock_form(name, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    architecture = name.partition('.')[0]
    example = safetensors.torch.load_file(SHIPPED[name].parent / 'test' / 'rand_tensors.safetensors')
    for model_name in (name, architecture):
        rep = timm.create_model(model_name, pretrained=True).eval()
        stock = timm.create_model(model_name, pretrained=True, inference_mode=True).eval()
        assert list(annealed_modules(rep))
        assert not list(annealed_modules(stock))
        for model in (rep, stock, timm_rep.fuse(rep)):
            assert_near(model(example['input']), example['output'], 1e-4)
        assert rep.pretrained_cfg['label_names'][0] == 'airplane'


@shipped
@torch.no_grad()
def test_they_are_adapted_to_other_classes_and_channels(name):
    model = timm.create_model(name, pretrained=True, num_classes=3, in_chans=1).eval()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    full = timm.create_model(name, pretrained=True).eval()
    gray = torch.randn(2, 1, 32, 32)
    # timm's rule for grey images
    assert_near(model.forward_features(gray), full.forward_features(gray.expand(-1, 3, -1, -1)), 1e-4)
    assert len(timm.create_model(name, pretrained=True, features_only=True).eval()(torch.randn(1, 3, 32, 32))) == 3


@shipped
def test_what_is_made_of_them_does_not_name_this_machine(name, tmp_path):
    model = timm.create_model(name, pretrained=True).eval()
    timm_rep.export_folder(model, tmp_path / 'folder')
    timm_rep.save(model, tmp_path / 'rep.safetensors')
    for path in (tmp_path / 'folder' / 'config.json', tmp_path / 'rep.safetensors'):
        assert str(REGISTRY.parent).encode() not in path.read_bytes()


@shipped
def test_they_are_what_their_card_says(name):
    folder = SHIPPED[name].parent
    call('verify', folder)
    config = json.loads((folder / 'config.json').read_text())
    entry = published_weights()[name]
    assert f"{config['timm_rep']['training_architecture']}.{config['pretrained_cfg']['tag']}" == name
    for key in ('input_size', 'mean', 'std', 'crop_pct', 'interpolation'):
        value = config['pretrained_cfg'][key]
        assert entry[key] == (tuple(value) if isinstance(value, list) else value), key


@pytest.mark.skipif(not IMAGES, reason='CIFAR10_IMAGES does not name a folder of CIFAR-10 (test/CLASS/*)')
@shipped
@torch.no_grad()
def test_they_classify_test_images_as_their_card_says(name):
    model = timm.create_model(name, pretrained=True, inference_mode=True).eval()
    dataset = create_dataset('', root=IMAGES, split='test')
    dataset.transform = create_transform(**resolve_data_config(model=model))
    images = torch.utils.data.Subset(dataset, range(0, len(dataset), len(dataset) // 500))
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in torch.utils.data.DataLoader(images, 100))
    card = (SHIPPED[name].parent / 'README.md').read_text()
    claimed = float(card.split('| Top-1 accuracy (%) |')[1].split('|')[0])
    assert abs(100 * right / len(images) - claimed) < 4  # three standard errors of 500 images
