"""A Hub on loopback, a run to publish, images to measure with."""
import argparse
import shutil
import socket

import pytest
import timm
import torch
import yaml
from helpers import randomize_
from hub_publishing import ARCHITECTURE, CLASSES, REPO, RUN_ARGS, SUMMARY
from hub_server import WRITER, HubServer
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from torchvision.transforms.functional import to_pil_image

import timm_rep


@pytest.fixture(scope='session', autouse=True)
def _tiny_architecture():
    import tiny_architecture
    assert tiny_architecture.NAME == ARCHITECTURE


@pytest.fixture(autouse=True)
def _only_loopback(monkeypatch):
    connect = socket.socket.connect

    def checked(self, address):
        assert self.family == socket.AF_UNIX or address[0] in ('127.0.0.1', '::1'), f'left loopback: {address}'
        return connect(self, address)

    monkeypatch.setattr(socket.socket, 'connect', checked)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub, and a client that knows no other; the token is that of who may write."""
    with HubServer() as server:
        template = server.url + '/{repo_id}/resolve/{revision}/{filename}'
        monkeypatch.setattr(constants, 'ENDPOINT', server.url)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
        monkeypatch.setattr(file_download, 'HUGGINGFACE_CO_URL_TEMPLATE', template, raising=False)  # older client
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True, raising=False)
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
        monkeypatch.setenv('HF_TOKEN', WRITER)
        monkeypatch.setattr(_http.time, 'sleep', lambda seconds: None)  # between two tries
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture(scope='session')
def model():
    torch.manual_seed(0)
    model = randomize_(timm.create_model(ARCHITECTURE, num_classes=CLASSES)).eval()
    with torch.no_grad():
        model.fc.weight.div_(1e4)  # wide random norms make large features
    return model


@pytest.fixture(scope='session')
def run_folder(model, tmp_path_factory):
    """What train.py leaves, but for its summary, which takes its time to draw; the averaged weights are others."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    folder.mkdir()
    ema = {key: value * 0.9 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    content = dict(
        arch=ARCHITECTURE, args=argparse.Namespace(**RUN_ARGS), epoch=1, state_dict=model.state_dict(),
        state_dict_ema=ema)
    torch.save(content, folder / 'model_best.pth.tar')
    torch.save(dict(content, epoch=2, state_dict=ema), folder / 'last.pth.tar')
    (folder / 'args.yaml').write_text(yaml.safe_dump(RUN_ARGS))
    return folder


@pytest.fixture(scope='session')
def full_run(run_folder, tmp_path_factory):
    folder = shutil.copytree(run_folder, tmp_path_factory.mktemp('runs') / 'full_run')
    (folder / 'summary.csv').write_text(SUMMARY)
    return folder


@pytest.fixture
def images(tmp_path):
    for label in range(CLASSES):
        folder = tmp_path / 'images' / 'test' / f'class{label}'
        folder.mkdir(parents=True)
        for index in range(2):
            to_pil_image(torch.rand(3, 32, 32)).save(folder / f'{index}.png')
    return tmp_path / 'images'


@pytest.fixture(scope='session')
def first_export(run_folder, tmp_path_factory):
    return timm_rep.publish(run_folder, REPO, dry_run=True, out=tmp_path_factory.mktemp('exports') / 'export').folder


@pytest.fixture
def export(first_export, tmp_path):
    return shutil.copytree(first_export, tmp_path / 'export')
