"""Publishing and loading, against a Hub on loopback: real HTTP, the real client, and faults."""
import argparse
import dataclasses
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from helpers import MODEL_RTOL, assert_near, randn, randomize_
from hub_server import READER, WRITER, HubServer
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image

import timm_rep
from timm_rep.cli.main import main
from timm_rep.hub import publish as publishing
from timm_rep.hub.card import OWN_TEXT_BEGIN, OWN_TEXT_END, lost_text
from timm_rep.io.hub_errors import reason
from timm_rep.models.published import published_weights, with_published
from timm_rep.report.images import ImageCheck

ARCHITECTURE, STOCK = 'orepa_test_resnet', 'test_resnet'
REPO = 'me/test_resnet.orepa_pets'
CLASSES = 6
SECRET = 'hf_' + 'S3cret' * 5

# It does not note what a model was built with, so that an export of another network than the default is refused.
OLD_TIMM = not hasattr(timm.create_model('test_resnet'), '_model_args')
OLD_CLIENT = Version(huggingface_hub.__version__) < Version('1.0')

RUN_ARGS = dict(
    model=ARCHITECTURE, num_classes=CLASSES, in_chans=None, epochs=3, batch_size=4, opt='sgd', lr=0.1, sched='cosine',
    weight_decay=1e-4, seed=42, model_ema=False, val_split='test', dataset='', data_dir='/home/someone/images',
    data=None, output='/home/someone/output', experiment='secret project', initial_checkpoint='/home/someone/start.pth',
    class_map='', wandb_project='mine', opt_kwargs={}, model_kwargs={}, kd_token_distill_type='soft',
    hub_token=SECRET, note=f'push with {SECRET}', input_size=[3, 32, 32], mean=[0.5, 0.5, 0.5], interpolation='bicubic')
SUMMARY = """epoch,train_loss,eval_loss,eval_top1,eval_top5,lr
0,1.9,1.8,20.0,90.0,0.1
1,1.7,1.6,41.5,97.25,0.05
2,1.6,1.7,40.0,96.0,0.01
"""

# A process that has stock timm only.
STOCK_LOAD = """
import json, sys
sys.modules['timm_rep'] = None  # its import fails
import timm, torch
from safetensors.torch import load_file, save_file
repo, folder = sys.argv[1:]
inputs = load_file(f'{folder}/inputs.safetensors')['inputs']
def outputs(x, **kwargs):
    model = timm.create_model(f'hf-hub:{repo}', pretrained=True, **kwargs).eval()
    with torch.no_grad():
        return model, model(x)
model, logits = outputs(inputs)
found = dict(logits=logits)
found['more_classes'] = outputs(inputs, num_classes=9)[1]
found['gray'] = outputs(inputs[:, :1], in_chans=1)[1]
found.update({f'features{i}': f for i, f in enumerate(outputs(inputs, features_only=True)[1])})
found['embedding'] = outputs(inputs, num_classes=0)[1]
save_file({key: value.contiguous() for key, value in found.items()}, f'{folder}/outputs.safetensors')
assert not [name for name in sys.modules if name.startswith('timm_rep.')]
print(json.dumps(dict(type=type(model).__module__, mean=model.pretrained_cfg['mean'], tag=model.pretrained_cfg['tag'])))
"""


@pytest.fixture(scope='module', autouse=True)
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


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = randomize_(timm.create_model(ARCHITECTURE, num_classes=CLASSES)).eval()
    with torch.no_grad():
        model.fc.weight.div_(1e4)  # wide random norms make large features
    return model


@pytest.fixture(scope='module')
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


@pytest.fixture(scope='module')
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


def call(*args, code=0):
    """Run a command; what it printed, and of a failure the one line of its error."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    if code:
        errors = [line for line in result.output.splitlines() if line.startswith('Error: ')]
        assert len(errors) == 1, result.output
        return errors[0]
    return result.output


def publish_json(*args):
    output = call('publish', *args, '--json')
    return json.loads(output[output.index('{\n'):])


def in_own_process(code, *args, **env):
    """Run code with nothing of this package; the environment names the Hub."""
    env = dict(os.environ, HF_HUB_CACHE=constants.HF_HUB_CACHE, HF_ENDPOINT=constants.ENDPOINT,
               HF_HUB_DISABLE_XET='1', OMP_NUM_THREADS='1', **env)
    env.pop('PYTHONPATH', None)
    done = subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def card_of(server, revision='main'):
    return server.files(REPO, revision)['README.md'].decode()


def cached_files(tmp_path):
    return [path for path in (tmp_path / 'cache').rglob('*') if path.is_file() and path.suffix == '.safetensors']


def put_card(card, revision='main'):
    api = huggingface_hub.HfApi()
    api.create_repo(REPO, exist_ok=True)
    api.upload_file(path_or_fileobj=card.encode(), path_in_repo='README.md', repo_id=REPO, revision=revision)


def assert_not_published(server, error, folder=Path('test_resnet.orepa_pets')):
    """Nothing of it can be seen on the Hub; the folder is there and complete."""
    assert set(server.files(REPO)) == {'.gitattributes'} if REPO in server.repos else True
    assert 'Nothing of it is published' in error
    assert str(folder.resolve()) in error
    assert 'outputs agree' in str(timm_rep.check_export(folder))


# Publish and load.


def test_stock_timm_loads_what_is_published(server, run_folder, model, tmp_path):
    published = publish_json(run_folder, '--repo', REPO, '--tag', 'orepa_pets')
    assert published['commit'].endswith(server.repos[REPO].branches['main'])
    assert published['verification']['model']['relative'] <= 1e-5
    assert len(published['verification']['layers']) == len(list(timm_rep.rep_layers(model)))

    inputs = randn(2, 3, 32, 32, dtype=torch.float32)
    save_file(dict(inputs=inputs), tmp_path / 'inputs.safetensors')
    seen = in_own_process(STOCK_LOAD, REPO, tmp_path)
    assert seen == dict(type='timm.models.resnet', mean=[0.5, 0.5, 0.5], tag='orepa_pets')
    outputs = load_file(tmp_path / 'outputs.safetensors')
    fused = timm_rep.fuse(model)
    with torch.no_grad():
        assert_near(outputs['logits'], model(inputs), MODEL_RTOL[torch.float32])
        features = fused.forward_intermediates(inputs, intermediates_only=True)
        for index, feature in enumerate(features):
            assert_near(outputs[f'features{index}'], feature, MODEL_RTOL[torch.float32])
        assert_near(outputs['embedding'], fused.forward_head(features[-1], pre_logits=True), MODEL_RTOL[torch.float32])
    assert outputs['more_classes'].shape == (2, 9)

    # the same from the cache alone
    (tmp_path / 'outputs.safetensors').unlink()
    before = len(server.requests)
    in_own_process(STOCK_LOAD, REPO, tmp_path, HF_HUB_OFFLINE='1')
    assert torch.equal(load_file(tmp_path / 'outputs.safetensors')['logits'], outputs['logits'])
    assert len(server.requests) == before


def test_training_form_takes_published_weights(server, run_folder, model):
    timm_rep.publish(run_folder, REPO)

    def load(**kwargs):
        overlay = dict(hf_hub_id=REPO, num_classes=CLASSES)
        return timm.create_model(ARCHITECTURE, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()

    inputs = randn(2, 3, 32, 32, dtype=torch.float32)
    loaded = load(num_classes=CLASSES)
    assert len(list(timm_rep.rep_layers(loaded))) == len(list(timm_rep.rep_layers(model)))
    with torch.no_grad():
        assert_near(loaded(inputs), model(inputs), MODEL_RTOL[torch.float32])
        assert load(num_classes=9)(inputs).shape == (2, 9)
        stock = timm.create_model(f'hf-hub:{REPO}', pretrained=True, in_chans=1).eval()
        gray = load(num_classes=CLASSES, in_chans=1)
        assert list(timm_rep.rep_layers(gray))
        assert_near(gray(inputs[:, :1]), stock(inputs[:, :1]), MODEL_RTOL[torch.float32])
        expected = timm.create_model(f'hf-hub:{REPO}', pretrained=True, features_only=True).eval()(inputs)
        for feature, same in zip(load(features_only=True)(inputs), expected):
            assert_near(feature, same, MODEL_RTOL[torch.float32])


def test_training_form_has_a_revision_of_its_own(server, run_folder, model):
    published = publish_json(run_folder, '--repo', REPO, '--include-training-form')
    assert Path(published['training_folder']).name == 'test_resnet.orepa_pets.train'
    config = json.loads(server.files(REPO, 'train')['config.json'])
    assert config['architecture'] == ARCHITECTURE
    assert json.loads(server.files(REPO)['config.json'])['architecture'] == STOCK
    loaded = timm.create_model(f'hf-hub:{REPO}@train', pretrained=True).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert 'outputs agree' in call('verify', f'hf-hub:{REPO}@train')


def test_folder_and_commit(server, full_run, run_folder):
    published = publish_json(full_run, '--repo', REPO, '--license', 'mit', '--dataset', 'Pets')
    folder = Path(published['folder'])
    assert folder.name == 'test_resnet.orepa_pets'
    expected = {'README.md', 'args.yaml', 'config.json', 'model.safetensors', 'summary.csv',
                'test/rand_tensors.safetensors', 'training.png'}
    assert set(published['files']) == expected
    on_hub = server.files(REPO)
    assert set(on_hub) == {'.gitattributes', *expected}
    assert all(on_hub[name] == (folder / name).read_bytes() for name in expected)
    assert server.messages(REPO) == [f'test_resnet.orepa_pets, fused by timm_rep {timm_rep.__version__}',
                                     'initial commit']
    cfg = json.loads(on_hub['config.json'])['pretrained_cfg']
    assert (cfg['tag'], cfg['license'], cfg['interpolation']) == ('orepa_pets', 'mit', 'bicubic')
    assert published['registry_entry'] == {f'{ARCHITECTURE}.orepa_pets': dict(
        hf_hub_id=REPO, num_classes=CLASSES, license='mit', input_size=[3, 32, 32], interpolation='bicubic',
        mean=[0.5, 0.5, 0.5], std=[0.229, 0.224, 0.225], crop_pct=0.875, crop_mode='center')}
    # a second folder does not overwrite the first
    assert Path(publish_json(run_folder, '--repo', REPO)['folder']).name == 'test_resnet.orepa_pets-2'


def test_nothing_of_the_machine_and_no_token_leaves(server, run_folder):
    published = publish_json(run_folder, '--repo', REPO)
    args = yaml.safe_load(server.files(REPO)['args.yaml'])
    private = {'data_dir', 'output', 'experiment', 'initial_checkpoint', 'hub_token', 'note', 'wandb_project'}
    assert not set(args) & private
    kept = ('model', 'epochs', 'batch_size', 'lr', 'mean', 'opt_kwargs', 'kd_token_distill_type')
    assert {key: args[key] for key in kept} == {key: RUN_ARGS[key] for key in kept}
    for content in (*server.files(REPO).values(), json.dumps(published).encode()):
        for private in (SECRET, WRITER, '/home/someone', 'secret project', str(run_folder)):
            assert private.encode() not in content


def test_model_card(server, full_run, images):
    publish_json(full_run, '--repo', REPO, '--dataset', 'Pets', '--data', images)
    card = card_of(server)
    data = huggingface_hub.ModelCard(card).data
    results = {result.metric_args['k']: result for result in data.eval_results}
    assert (data.license, data.library_name, results[1].dataset_name) == ('unknown', 'timm', 'Pets')
    config = json.loads(server.files(REPO)['config.json'])
    top1 = config['timm_rep']['metrics']['top1']
    assert results[1].metric_value == pytest.approx(top1, abs=1e-4)
    assert config['label_names'] == [f'class{label}' for label in range(CLASSES)]
    for text in (
            'timm-rep run train --config args.yaml --data-dir IMAGES --initial-checkpoint start.pth', '| `lr` | 0.1 |',
            'after epoch 1, counted from 0', 'OREPA composes the kernel',
            'measured with the fused model on 12 images, of the split `test`, when it was published',
            f"timm.create_model('hf-hub:{REPO}', pretrained=True, features_only=True)",
            f"hf_hub_id='{REPO}'", 'num_classes=0', f'timm-rep verify hf-hub:{REPO}', '![Accuracy, loss',
            'Measured on ', 'Online Convolutional Re-parameterization', 'Enhanced Annealing'):
        assert text in card, text
    for row in ('Parameters (M)', 'GMACs of an image', 'Images per second', 'Top-1 accuracy (%) on 12 images'):
        assert re.search(rf'^\| {re.escape(row)}.*\| [\d.]+ \| [\d.]+ \|$', card, re.MULTILINE), row
    assert server.files(REPO)['training.png'].startswith(b'\x89PNG')
    documented = (Path(__file__).parents[2] / 'MODEL_CARD.md').read_text().splitlines()
    headings = [line for line in card.splitlines() if line.startswith('## ') or line == OWN_TEXT_BEGIN]
    assert [line for line in documented if line in headings] == headings


@pytest.mark.parametrize(('use_ema', 'noted_ema', 'measured'), [
    (False, False, True), (True, True, True), (True, False, False), (False, True, False)])
def test_figures_of_other_weights_are_not_taken(use_ema, noted_ema, measured, full_run, tmp_path, caplog):
    """With --model-ema the summary is of the averaged weights, else of the trained ones."""
    folder = shutil.copytree(full_run, tmp_path / 'run')
    for path in ('args.yaml', 'model_best.pth.tar'):
        (folder / path).unlink()
    (folder / 'args.yaml').write_text(yaml.safe_dump(dict(RUN_ARGS, model_ema=noted_ema)))
    content = torch.load(full_run / 'model_best.pth.tar', weights_only=False)
    torch.save(dict(content, args=argparse.Namespace(**dict(RUN_ARGS, model_ema=noted_ema))), folder / 'last.pth.tar')
    published = timm_rep.publish(folder, REPO, use_ema=use_ema, dry_run=True, out=tmp_path / 'out')
    config = json.loads((published.folder / 'config.json').read_text())
    assert config['timm_rep']['metrics'] == (dict(top1=41.5, top5=97.25) if measured else {})
    weights = f'with the {"averaged" if use_ema else "trained"} weights'
    assert (weights in (published.folder / 'README.md').read_text()) == measured
    row = '| Top-1 accuracy (%) | 41.5 |' if measured else '| Top-1 accuracy (%) | not measured |'
    assert row in (published.folder / 'README.md').read_text()
    assert ('use_ema (--use-ema)' in caplog.text) == (noted_ema and not use_ema)


def test_accuracy_on_a_part_of_the_images_is_not_the_models(full_run, images, tmp_path):
    published = timm_rep.publish(
        full_run, REPO, data=images, max_images=5, dry_run=True, out=tmp_path / 'out')
    assert (published.images.images, published.images.complete) == (5, False)
    metrics = json.loads((published.folder / 'config.json').read_text())['timm_rep']['metrics']
    assert metrics == dict(top1=41.5, top5=97.25)  # the run's own


def exported(run_folder, tmp_path, **kwargs):
    """Publish without sending; config.json's provenance, and the card."""
    folder = timm_rep.publish(run_folder, REPO, dry_run=True, out=tmp_path / 'out', **kwargs).folder
    return json.loads((folder / 'config.json').read_text()), (folder / 'README.md').read_text()


def other_run(run_folder, folder, summary=False, **args):
    """A run of the same weights with other arguments."""
    content = torch.load(run_folder / 'model_best.pth.tar', weights_only=False)
    folder.mkdir()
    args = dict(RUN_ARGS, **args)
    torch.save(dict(content, args=argparse.Namespace(**args), metric=41.5), folder / 'model_best.pth.tar')
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    if summary:
        (folder / 'summary.csv').write_text(SUMMARY)
    return folder


@pytest.mark.parametrize(('top5', 'metrics'), [((3.0, 4.0), dict(top1=2.0, top5=4.0)), (None, dict(top1=2.0))])
def test_accuracies_are_those_of_the_fused_model(full_run, monkeypatch, tmp_path, top5, metrics):
    check = ImageCheck(9, True, (1.0, 2.0), top5, 0.0, tuple('abcdef'), 'the split `test`')
    monkeypatch.setattr(publishing, 'compare_on_images', lambda *args, **kwargs: check)
    config, card = exported(full_run, tmp_path, data=tmp_path)
    assert config['timm_rep']['metrics'] == metrics
    assert '| Top-1 accuracy (%) on 9 images | 1.00 | 2.00 |' in card


@pytest.mark.parametrize(('args', 'kwargs', 'expected'), [
    ({}, {}, ('test', '')),
    (dict(val_split='val', class_map='names.txt'), {}, ('val', 'names.txt')),
    (dict(val_split=''), {}, ('validation', '')),
    ({}, dict(split='dev'), ('dev', ''))])
def test_images_are_read_as_the_run_read_them(run_folder, monkeypatch, tmp_path, args, kwargs, expected):
    seen = []

    def compare(*args, split, class_map, **kwargs):
        seen.append((split, class_map))
        raise ValueError('far enough')

    monkeypatch.setattr(publishing, 'compare_on_images', compare)
    with pytest.raises(ValueError, match='far enough'):
        exported(other_run(run_folder, tmp_path / 'run', **args), tmp_path, data=tmp_path, **kwargs)
    assert seen == [expected]


def test_images_of_no_known_split_are_refused(run_folder, images, tmp_path):
    (images / 'test').rename(images / 'train')
    options = [run_folder, '--repo', REPO, '--data', images, '--dry-run', '--out', tmp_path / 'out']
    assert "has no split 'test' but train" in call('publish', *options, code=2)
    assert 'of the split `train`' in call('publish', *options, '--split', 'train') + (
        tmp_path / 'out' / 'README.md').read_text()


def test_images_need_a_name_of_their_own_if_the_run_has_one(run_folder, images, tmp_path):
    folder = other_run(run_folder, tmp_path / 'run', dataset='torch/cifar10')
    with pytest.raises(ValueError, match='trained on torch/cifar10; say with dataset'):
        exported(folder, tmp_path, data=images)
    config, card = exported(folder, tmp_path, data=images, dataset='Cute\nPets')
    assert config['timm_rep']['dataset'] == 'Cute Pets'
    assert '- **Data set:** Cute Pets\n' in card
    assert huggingface_hub.ModelCard(card).data.eval_results[0].dataset_name == 'Cute Pets'


def test_figures_of_another_network_are_not_taken(run_folder, tmp_path, caplog):
    folder = other_run(run_folder, tmp_path / 'run', summary=True)
    config, _ = exported(folder, tmp_path, model_kwargs=dict(global_pool='max'))
    assert config['timm_rep']['metrics'] == {}
    assert 'it trained another model (global_pool)' in caplog.text
    shutil.rmtree(tmp_path / 'out')
    assert exported(folder, tmp_path, num_classes=CLASSES)[0]['timm_rep']['metrics'] == dict(top1=41.5, top5=97.25)
    (folder / 'summary.csv').write_text(SUMMARY.replace('41.5', '99.9'))
    assert 'top1 of epoch 1 is 99.9 in the one and 41.5' in call('publish', folder, '--repo', REPO, code=2)


def test_default_tag_has_the_letters_of_the_name(model):
    names = ('Café-1k', '花', None)
    assert [publishing._default_tag(model, name) for name in names] == ['orepa_cafe1k', 'orepa', 'orepa']


def test_five_answers_of_five_classes_are_no_figure(tmp_path):
    run = timm_rep.io.runs.Run({}, (), {}, 1, (), 1, dict(top1=50.0, top5=100.0))
    assert publishing._figures(run, None, False, 5)[0] == dict(top1=50.0)
    assert publishing._figures(run, None, False, 6)[0] == dict(top1=50.0, top5=100.0)


def test_weights_alone(server, model, tmp_path):
    """No run beside them: the card says so, and states no figure."""
    timm_rep.io.weights.save_weights(model, tmp_path / 'weights.safetensors')
    options = ['--model', ARCHITECTURE, '--num-classes', CLASSES]
    published = publish_json(tmp_path / 'weights.safetensors', '--repo', REPO, *options)
    assert not set(published['files']) & {'args.yaml', 'summary.csv', 'training.png'}
    card = card_of(server)
    assert 'Not stated: the model was exported without the arguments' in card
    assert '| Top-1 accuracy (%) | not measured |' in card
    assert 'eval_results' not in card
    assert huggingface_hub.ModelCard(card).data.eval_results is None


def test_without_matplotlib_there_is_no_drawing(monkeypatch, full_run, tmp_path, caplog):
    find_spec = timm_rep.hub.export.importlib.util.find_spec
    monkeypatch.setattr(
        timm_rep.hub.export.importlib.util, 'find_spec', lambda name: None if name == 'matplotlib' else find_spec(name))
    published = timm_rep.publish(full_run, REPO, dry_run=True, out=tmp_path / 'out')
    assert 'training.png' not in published.files
    assert '![' not in (published.folder / 'README.md').read_text()
    assert 'matplotlib is missing' in caplog.text


def test_dry_run_sends_nothing(server, run_folder):
    output = call('publish', run_folder, '--repo', REPO, '--dry-run', '--include-training-form')
    assert server.requests == []
    assert 'nothing was sent' in output
    assert 'model.safetensors' in output
    assert f'"{ARCHITECTURE}.orepa"' in output
    assert {path.name for path in Path().iterdir()} >= {'test_resnet.orepa_pets', 'test_resnet.orepa_pets.train'}


# Again.


def test_publishing_again_keeps_the_owners_text_and_removes_what_is_stale(server, full_run, model, tmp_path):
    timm_rep.publish(full_run, REPO)
    card = card_of(server)
    api = huggingface_hub.HfApi()
    own = f'\n\n## Notes\n\nMine: {OWN_TEXT_BEGIN[:5]}\n\n'
    edited = card.replace(f'{OWN_TEXT_BEGIN}\n\n', f'{OWN_TEXT_BEGIN}{own}')
    for name, content in (('README.md', edited.encode()), ('notes.txt', b'mine')):
        api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=REPO)
    timm_rep.io.weights.save_weights(model, tmp_path / 'weights.safetensors')
    published = timm_rep.publish(
        tmp_path / 'weights.safetensors', REPO, architecture=ARCHITECTURE, num_classes=CLASSES, dataset='Pets')
    files = server.files(REPO)
    assert own in card_of(server)
    assert own in (published.folder / 'README.md').read_text()
    assert '**Data set:** Pets' in card_of(server)
    assert files['notes.txt'] == b'mine'
    assert not set(files) & {'args.yaml', 'summary.csv', 'training.png'}
    assert len(server.messages(REPO)) == 5


def test_a_card_of_other_making_is_not_lost(server, run_folder):
    api = huggingface_hub.HfApi()
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b'---\nlicense: mit\n---\n# Mine\n', path_in_repo='README.md', repo_id=REPO)
    error = call('publish', run_folder, '--repo', REPO, code=3)
    assert "this would be lost: '# Mine'" in error
    assert 'failed' not in error
    assert card_of(server).endswith('# Mine\n')
    call('publish', run_folder, '--repo', REPO, '--replace-card')
    assert '# test_resnet.orepa_pets' in card_of(server)
    assert 'Mine' not in card_of(server)


@pytest.mark.parametrize(('mark', 'broken'), [(OWN_TEXT_END, ''), (OWN_TEXT_BEGIN, OWN_TEXT_BEGIN * 2)])
def test_broken_marks(server, run_folder, mark, broken):
    timm_rep.publish(run_folder, REPO)
    put_card(card_of(server).replace(mark, broken).replace(OWN_TEXT_BEGIN, f'{OWN_TEXT_BEGIN}\nMine', 1))
    assert "this would be lost: 'Mine'" in call('publish', run_folder, '--repo', REPO, code=3)
    call('publish', run_folder, '--repo', REPO, '--replace-card')
    assert 'Mine' not in card_of(server)
    assert (card_of(server).count(OWN_TEXT_BEGIN), card_of(server).count(OWN_TEXT_END)) == (1, 1)


def test_text_outside_of_the_marks_is_not_lost(server, full_run):
    timm_rep.publish(full_run, REPO, dataset='Pets')
    published = timm_rep.publish(full_run, REPO, dataset='Cats')  # what was generated is replaced
    generated, new = card_of(server), (published.folder / 'README.md').read_text().replace('Cats', 'Dogs')
    assert lost_text(generated, new) is None
    for old, by_hand, lost in (
            ('\n## Citation', '\n## Limits\n\nNone.\n\n## Citation', '## Limits'),
            ('| Top-1 accuracy (%) | 41.5 |', '| Top-1 accuracy (%) | high |', '| Top-1 accuracy (%) | high |'),
            ('| Top-1 accuracy (%) | 41.5 |', '| Top-1 accuracy (%) | 99.5 |', '| Top-1 accuracy (%) | 99.5 |'),
            ('license: unknown', 'license: mit', 'license: "mit"')):
        assert lost_text(generated.replace(old, by_hand), generated) == lost
        assert lost_text(generated.replace(old, by_hand), new) is not None
    edited = generated.replace(OWN_TEXT_BEGIN, f'{OWN_TEXT_BEGIN}\nMine').replace('\n## Citation', '\n## Limits')
    put_card(edited)
    error = call('publish', full_run, '--repo', REPO, '--dataset', 'Cats', code=3)
    assert "this would be lost: '## Limits'" in error
    assert card_of(server) == edited
    call('publish', full_run, '--repo', REPO, '--replace-card')
    assert 'Mine' in card_of(server)
    assert '## Limits' not in card_of(server)


def test_license_chosen_on_the_hub_is_not_lost(server, run_folder):
    put_card('---\nlicense: mit\n---\n')
    assert 'this would be lost: \'license: "mit"\'' in call('publish', run_folder, '--repo', REPO, code=3)
    call('publish', run_folder, '--repo', REPO, '--license', 'mit')


def test_metadata_of_the_owner_are_kept(server, full_run, run_folder):
    timm_rep.publish(full_run, REPO, dataset='Pets')
    # in another order, as an editor may leave it
    metadata, text = re.fullmatch(r'---\n(.*?)\n---\n(.*)', card_of(server), re.DOTALL).groups()
    data = yaml.safe_load(metadata)
    data['tags'].append('mine')
    own = dict(base_model='timm/test_resnet.r160_in1k', datasets=['me/pets'], extra_gated_prompt='Do you agree? \u00e9')
    edited = yaml.safe_dump({**own, **data}, sort_keys=True)
    put_card(f'---\n{edited}---\n{text}')
    call('publish', run_folder, '--repo', REPO, '--license', 'mit')
    kept = yaml.safe_load(card_of(server).split('---\n')[1])
    assert {key: kept[key] for key in own} == own
    assert (kept['license'], kept['tags']) == ('mit', data['tags'])
    assert 'model-index' not in kept  # there are no figures of these weights


def test_card_of_the_training_form(server, run_folder):
    api = huggingface_hub.HfApi()
    api.create_repo(REPO)
    api.create_branch(REPO, branch='train')
    put_card('# Mine\n', 'train')
    options = [run_folder, '--repo', REPO, '--include-training-form']
    error = call('publish', *options, code=3)
    assert f"the model card of {REPO}@train was written or changed by hand, and this would be lost: '# Mine'" in error
    assert_not_published(server, error)
    assert card_of(server, 'train') == '# Mine\n'
    call('publish', *options, '--replace-card')
    for revision in ('main', 'train'):
        put_card(card_of(server, revision).replace(OWN_TEXT_BEGIN, f'{OWN_TEXT_BEGIN}\nOn {revision}'), revision)
    call('publish', *options)
    assert re.findall('On (main|train)\n', card_of(server)) == ['main']
    assert re.findall('On (main|train)\n', card_of(server, 'train')) == ['train']


def test_new_revision_train_does_not_take_over_the_main_card(server, run_folder):
    put_card('# Mine\n')
    call('publish', run_folder, '--repo', REPO, '--replace-card')
    put_card(card_of(server).replace(OWN_TEXT_BEGIN, f'{OWN_TEXT_BEGIN}\nMine'))
    call('publish', run_folder, '--repo', REPO, '--include-training-form')
    assert 'Mine' in card_of(server)
    assert 'Mine' not in card_of(server, 'train')
    assert f'The weights of `{REPO}` before they were fused' in card_of(server, 'train')


def test_private(server, run_folder, monkeypatch):
    publish_json(run_folder, '--repo', REPO, '--private')
    assert server.repos[REPO].private
    monkeypatch.setenv('HF_TOKEN', READER)
    assert 'Error' in call('verify', f'hf-hub:{REPO}', code=3)
    monkeypatch.setenv('HF_TOKEN', WRITER)
    assert 'outputs agree' in call('verify', f'hf-hub:{REPO}')
    publish_json(run_folder, '--repo', REPO, '--private')


def test_private_does_not_write_to_a_public_repository(server, run_folder):
    huggingface_hub.HfApi().create_repo(REPO)
    assert 'exists and is public' in call('publish', run_folder, '--repo', REPO, '--private', code=3)
    assert set(server.files(REPO)) == {'.gitattributes'}


def test_another_revision_is_named_everywhere(server, run_folder, model):
    published = publish_json(run_folder, '--repo', REPO, '--revision', 'candidate')
    there = f'{REPO}@candidate'
    card = card_of(server, 'candidate')
    assert re.findall(rf'{REPO}(?!@candidate)', card) == []
    assert card.count(f'hf-hub:{there}') == 4
    assert '\n# test_resnet.orepa_pets\n' in card
    assert published['registry_entry'][f'{ARCHITECTURE}.orepa']['hf_hub_id'] == there
    output = call('publish', run_folder, '--repo', REPO, '--revision', 'candidate', '--include-training-form')
    assert f"Load it with timm.create_model('hf-hub:{there}', pretrained=True)" in output
    assert f"hf-hub:{REPO}@train'" in card_of(server, 'train')
    assert f'on the card of `{there}`' in card_of(server, 'train')
    overlay = dict(hf_hub_id=there, num_classes=CLASSES)
    loaded = [
        timm.create_model(f'hf-hub:{there}', pretrained=True),
        timm.create_model(ARCHITECTURE, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=CLASSES)]
    inputs = randn(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        for same in loaded:
            assert_near(same.eval()(inputs), model(inputs), MODEL_RTOL[torch.float32])


def test_pull_request_is_loaded_once_it_is_merged(server, run_folder):
    assert 'in one pull request.' in call('publish', run_folder, '--repo', REPO, '--create-pr', '--dry-run')
    output = call('publish', run_folder, '--repo', REPO, '--create-pr')
    load = f"timm.create_model('hf-hub:{REPO}', pretrained=True)"
    assert f'/discussions/1\nOnce it is merged, load it with {load}\n' in output
    assert 'pretrained.json' not in output
    assert publish_json(run_folder, '--repo', REPO, '--create-pr')['registry_entry'] is None


def test_pull_request_branch_and_tag(server, run_folder):
    published = publish_json(run_folder, '--repo', REPO, '--create-pr')
    assert published['pull_request'].endswith('/discussions/1')
    assert set(server.files(REPO)) == {'.gitattributes'}
    assert 'model.safetensors' in server.files(REPO, 'refs/pr/1')
    publish_json(run_folder, '--repo', REPO, '--revision', 'candidate', '--git-tag', 'v1')
    assert set(server.files(REPO)) == {'.gitattributes'}
    assert server.repos[REPO].tags == dict(v1=server.repos[REPO].branches['candidate'])
    assert 'outputs agree' in call('verify', f'hf-hub:{REPO}@v1')
    assert 'has the tag v1 already' in call('publish', run_folder, '--repo', REPO, '--git-tag', 'v1', code=3)


# Faults.


@pytest.mark.parametrize('token', ['', 'hf_wrongwrong'])
def test_nothing_is_done_for_who_is_not_logged_in(server, run_folder, monkeypatch, token):
    monkeypatch.setenv('HF_TOKEN', token)
    error = call('publish', run_folder, '--repo', REPO, code=3)
    assert 'not logged in' in error
    assert 'Nothing was done; a dry run (--dry-run) writes the folder without' in error
    assert not token or token not in error
    assert REPO not in server.repos
    assert not Path(REPO.partition('/')[2]).exists()


def test_no_right_to_write(server, run_folder, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', READER)
    error = call('publish', run_folder, '--repo', REPO, code=3)
    assert 'the token may not do that' in error
    assert READER not in error
    assert_not_published(server, error)
    assert REPO not in server.repos


def test_the_token_that_is_given_is_used(server, run_folder, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', READER)
    assert timm_rep.publish(run_folder, REPO, token=WRITER).commit is not None


@pytest.mark.parametrize(('secret', 'token'), [
    (SECRET, None), ('plain-environment', None), ('plain-given', 'plain-given')])
def test_reason_names_no_token(monkeypatch, secret, token):
    monkeypatch.setenv('HF_TOKEN', 'plain-environment')
    assert reason(RuntimeError(f'refused\n{secret}'), token) == 'RuntimeError: refused ***'


def test_json_is_all_of_the_output(server, run_folder, images, capsys):
    main(['publish', str(run_folder), '--repo', REPO, '--data', str(images), '--json'], standalone_mode=False)
    captured = capsys.readouterr()
    assert json.loads(captured.out)['images']['images'] == 2 * CLASSES
    assert 'images:' in captured.err


def test_the_token_is_left_out_of_errors(server, run_folder):
    server.fail('GET', 'whoami', status=400)
    with pytest.raises(timm_rep.PublishError) as error:
        timm_rep.publish(run_folder, f'me/test_resnet.{WRITER}', token=WRITER)
    assert WRITER not in str(error.value).replace(f'test_resnet.{WRITER}', '')
    assert error.value.__cause__ is None


@pytest.mark.parametrize('status', [409, 412])
def test_changed_by_somebody_else(server, run_folder, status):
    server.fail('POST', '/commit/main', status=status)
    error = call('publish', run_folder, '--repo', REPO, code=3)
    assert 'changed by somebody else' in error
    assert_not_published(server, error)
    publish_json(run_folder, '--repo', REPO)
    assert 'model.safetensors' in server.files(REPO)


def test_commit_of_somebody_else_in_between_is_not_overwritten(server, run_folder, monkeypatch):
    send = publishing.HfApi.create_commit

    def create_commit(self, *args, **kwargs):
        repo = server.repos[REPO]
        repo.add('main', 'of somebody else', repo.commit('main').files)
        return send(self, *args, **kwargs)

    monkeypatch.setattr(publishing.HfApi, 'create_commit', create_commit)
    assert 'changed by somebody else' in call('publish', run_folder, '--repo', REPO, code=3)
    assert server.messages(REPO) == ['of somebody else', 'initial commit']


@pytest.mark.parametrize(('method', 'path'), [
    ('PUT', '/upload/'), ('POST', '/objects/batch'), ('POST', '/preupload/'), ('POST', '/verify/')])
def test_a_server_error_is_tried_again(server, run_folder, method, path):
    times = 1 if OLD_CLIENT and method == 'POST' else 2  # an older client tries again only what it puts
    server.fail(method, path, status=503, times=times)
    if times == 1:
        error = call('publish', run_folder, '--repo', REPO, '--out', 'out', code=3)
        assert_not_published(server, error, Path('out'))
    publish_json(run_folder, '--repo', REPO)
    assert server.count(method, path)[503] == times
    assert 'model.safetensors' in server.files(REPO)


@pytest.mark.parametrize(('method', 'path'), [('PUT', '/upload/'), ('POST', '/commit/'), ('POST', '/repos/create')])
def test_a_server_error_that_stays_publishes_nothing(server, run_folder, method, path):
    server.fail(method, path, status=500, times=50)
    error = call('publish', run_folder, '--repo', REPO, code=3)
    assert '500' in error
    assert_not_published(server, error)
    server.faults.clear()
    publish_json(run_folder, '--repo', REPO)
    assert len(server.messages(REPO)) == 2


def test_failure_behind_the_training_form_says_what_is_there(server, run_folder):
    server.fail('POST', '/commit/main', status=500)
    error = call('publish', run_folder, '--repo', REPO, '--include-training-form', code=3)
    assert f'On the Hub: the training form in {REPO}@train' in error
    assert set(server.files(REPO)) == {'.gitattributes'}


@pytest.mark.parametrize('name', ['README.md', 'model.safetensors'])
@pytest.mark.parametrize('damage', [None, lambda content: content[:-1], lambda content: content[:-1] + b'!'])
def test_a_file_that_arrives_damaged_is_noticed(server, run_folder, monkeypatch, name, damage):
    send = publishing.HfApi.create_commit

    def create_commit(self, *args, **kwargs):
        commit = send(self, *args, **kwargs)
        files = server.repos[REPO].commit('main').files
        content, large = files.pop(name)
        if damage:
            files[name] = damage(content), large
        return commit

    monkeypatch.setattr(publishing.HfApi, 'create_commit', create_commit)
    error = call('publish', run_folder, '--repo', REPO, '--git-tag', 'v1', code=3)
    assert error.startswith(f'Error: {name} in {server.url}/{REPO}/commit/')
    assert error.endswith(' is not what was sent; publish again')
    assert server.repos[REPO].tags == {}


def test_failure_behind_the_commit_says_that_it_is_there(server, run_folder):
    server.fail('POST', '/paths-info/', status=500, times=50)
    error = call('publish', run_folder, '--repo', REPO, '--git-tag', 'v1', code=3)
    assert f'On the Hub: {server.url}/{REPO}/commit/{server.repos[REPO].branches["main"]}; the folder' in error
    assert ', before tagging it v1, failed' in error
    assert 'model.safetensors' in server.files(REPO)


def test_tag_of_somebody_else_in_between(server, run_folder):
    server.fail('POST', '/tag/', status=409)
    error = call('publish', run_folder, '--repo', REPO, '--git-tag', 'v1', code=3)
    commit = f'{server.url}/{REPO}/commit/{server.repos[REPO].branches["main"]}'
    assert f'tagging {commit} v1 failed: it was changed by somebody else in between' in error
    assert f'On the Hub: {commit};' in error
    assert 'again' not in error


@pytest.fixture
def impatient(server, monkeypatch):
    """The client waits for no answer longer than this."""
    session, seconds = _http.get_session(), 0.5
    if OLD_CLIENT:
        monkeypatch.setattr(session, 'request', functools.partial(session.request, timeout=seconds))
    else:
        monkeypatch.setattr(session, 'timeout', seconds)


@pytest.mark.parametrize('fault', [dict(cut_after=0), dict(late=1)])
@pytest.mark.usefixtures('impatient')
def test_answer_to_a_commit_is_lost(server, run_folder, fault):
    server.fail('POST', '/commit/main', **fault)
    published = publish_json(run_folder, '--repo', REPO, '--git-tag', 'v1')
    assert published['commit'] == f'{server.url}/{REPO}/commit/{server.repos[REPO].branches["main"]}'
    assert len(server.messages(REPO)) == 2
    assert server.repos[REPO].tags == dict(v1=server.repos[REPO].branches['main'])


@pytest.mark.parametrize(('option', 'faults', 'page'), [
    ('--json', dict(commit=dict(delay=1)), 'commits/main'),
    ('--json', dict(commit=dict(status=504)), 'commits/main'),
    ('--json', {'commit': dict(cut_after=0), 'paths-info': dict(status=500, times=50)}, 'commits/main'),
    ('--json', {'commit': dict(status=500), 'paths-info': dict(status=500, times=50)}, 'commits/main'),
    ('--create-pr', dict(commit=dict(cut_after=0)), 'discussions'),
    ('--create-pr', dict(commit=dict(status=500)), 'discussions'),
])
@pytest.mark.usefixtures('impatient')
def test_commit_of_which_nothing_is_known(server, run_folder, option, faults, page):
    for path, fault in faults.items():
        server.fail('POST', f'/{path}/', **fault)
    error = call('publish', run_folder, '--repo', REPO, option, code=3)
    assert f'On the Hub: perhaps test_resnet.orepa_pets, look at {server.url}/{REPO}/{page}; the folder' in error


def test_refused_pull_request(server, run_folder):
    server.fail('POST', '/commit/main', status=409)
    assert_not_published(server, call('publish', run_folder, '--repo', REPO, '--create-pr', code=3))


def test_download_that_takes_too_long(server, run_folder, model, tmp_path, monkeypatch):
    publish_json(run_folder, '--repo', REPO)
    monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 0.2)
    server.fail('GET', '/files/', times=50, delay=0.6)
    assert 'timed out' in call('verify', f'hf-hub:{REPO}', code=3)
    assert cached_files(tmp_path) == []
    server.faults.clear()
    assert 'outputs agree' in call('verify', f'hf-hub:{REPO}')


def test_slow_server(server, run_folder):
    for method, path in (('POST', '/commit/'), ('PUT', '/upload/'), ('HEAD', '/resolve/'), ('GET', '/files/')):
        server.fail(method, path, delay=0.3)
    publish_json(run_folder, '--repo', REPO)
    assert 'outputs agree' in call('verify', f'hf-hub:{REPO}')


def test_server_that_is_gone(server, run_folder):
    for real in server.servers:
        real.shutdown()
        real.server_close()
    assert 'Nothing was done' in call('publish', run_folder, '--repo', REPO, code=3)
    assert not Path(REPO.partition('/')[2]).exists()
    assert 'cannot be fetched' in call('verify', f'hf-hub:{REPO}', code=3)


def test_interrupted_download(server, run_folder, model, tmp_path):
    publish_json(run_folder, '--repo', REPO)
    server.fail('GET', '/files/', times=50, cut_after=1000)
    for load in (lambda: timm.create_model(f'hf-hub:{REPO}', pretrained=True),
                 lambda: timm_rep.check_export(f'hf-hub:{REPO}')):
        with pytest.raises(Exception, match=r'(?s).*'):
            load()
        assert cached_files(tmp_path) == []
    server.faults.clear()
    before = sum(server.count('GET', '/files/').values())
    server.fail('GET', '/files/', cut_after=1000)  # once: it is tried again
    if OLD_CLIENT:  # not by itself
        with pytest.raises(OSError, match='IncompleteRead'):
            timm.create_model(f'hf-hub:{REPO}', pretrained=True)
        assert cached_files(tmp_path) == []
    loaded = timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
    inputs = randn(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        assert_near(loaded(inputs), model(inputs), MODEL_RTOL[torch.float32])
    assert sum(server.count('GET', '/files/').values()) == before + 2


def test_offline_from_the_cache(server, run_folder, monkeypatch):
    publish_json(run_folder, '--repo', REPO)
    call('verify', f'hf-hub:{REPO}')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    getattr(_http, 'reset_sessions', lambda: None)()  # an older client looks only when it makes one
    before = len(server.requests)
    assert 'outputs agree' in call('verify', f'hf-hub:{REPO}')
    assert 'is not in the cache' in call('verify', 'hf-hub:me/other', code=3)
    assert len(server.requests) == before
    monkeypatch.undo()
    getattr(_http, 'reset_sessions', lambda: None)()


# Models with arguments of their own, and those that came from somewhere.


def python_of(card, heading):
    return card.split(f'## {heading}')[1].split('```python\n')[1].split('```')[0]


@pytest.mark.skipif(OLD_TIMM, reason='this timm cannot export such a model')
def test_the_cards_own_lines_build_the_same_network(server, tmp_path, caplog):
    model = randomize_(timm.create_model(ARCHITECTURE, num_classes=CLASSES, act_layer='silu', global_pool='max')).eval()
    with torch.no_grad():
        model.fc.weight.div_(1e4)
    timm_rep.io.weights.save_weights(model, tmp_path / 'weights.safetensors')
    published = timm_rep.publish(
        tmp_path / 'weights.safetensors', REPO, architecture=ARCHITECTURE, num_classes=CLASSES,
        model_kwargs=dict(act_layer='silu', global_pool='max'))
    names = {}
    exec(python_of(card_of(server), 'How to train it on'), names)
    inputs = randn(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        assert_near(names['model'].eval()(inputs), model(inputs), MODEL_RTOL[torch.float32])
    assert list(timm_rep.rep_layers(names['model']))
    assert published.entry is None  # it has no place for the activation
    assert 'no entry for the registry: the model is off' in caplog.text
    assert '--gp max --model-kwargs act_layer=silu' in card_of(server)


def test_entry_of_arguments_that_change_nothing(run_folder, tmp_path):
    kwargs = dict(model_kwargs=dict(act_layer='relu'), dry_run=True, out=tmp_path / 'out')
    assert list(timm_rep.publish(run_folder, REPO, **kwargs).entry) == [f'{ARCHITECTURE}.orepa']


def test_taken_names_of_our_own_registry(run_folder, monkeypatch, tmp_path):
    entry = {f'{ARCHITECTURE}.orepa_pets': dict(hf_hub_id='org/test_resnet.orepa_pets')}
    monkeypatch.setattr(publishing, 'published_weights', lambda: entry)
    with pytest.raises(ValueError, match=r'claims test_resnet\.orepa_pets, a recipe of org/test_resnet\.orepa_pets'):
        exported(run_folder, tmp_path)
    entry[f'{ARCHITECTURE}.orepa_pets']['hf_hub_id'] = REPO  # the same again
    exported(run_folder, tmp_path)


@pytest.mark.parametrize('named', [True, False])
def test_run_of_a_model_with_a_tag(run_folder, monkeypatch, tmp_path, named):
    cfg = timm.models._registry._model_pretrained_cfgs[ARCHITECTURE]
    monkeypatch.setitem(
        timm.models._registry._model_pretrained_cfgs, f'{ARCHITECTURE}.pets', dataclasses.replace(cfg, crop_pct=0.5))
    folder = other_run(
        run_folder, tmp_path / 'run', model=f'{ARCHITECTURE}.pets', img_size=48, input_size=None, mean=[0.1] * 3)
    config, _ = exported(folder, tmp_path, **(dict(architecture=ARCHITECTURE) if named else {}))
    cfg = config['pretrained_cfg']
    assert (cfg['input_size'], cfg['mean'], cfg['crop_pct']) == ([3, 48, 48], [0.1] * 3, 0.5)
    call('fuse', folder, tmp_path / 'fused')
    assert json.loads((tmp_path / 'fused' / 'config.json').read_text())['pretrained_cfg']['input_size'] == [3, 48, 48]
    with pytest.raises(ValueError, match=f'says that it trained {ARCHITECTURE}, not orepa_resnet18'):
        publishing._check_recipe(timm_rep.io.checkpoint.read_checkpoint(folder), 'orepa_resnet18', REPO, 'x')


def test_run_of_a_model_from_the_hub(server, run_folder, tmp_path):
    timm_rep.publish(run_folder, REPO, include_training_form=True)
    args = dict(model=f'hf-hub:{REPO}@train', img_size=48, input_size=None, mean=[0.1] * 3)
    folder = other_run(run_folder, tmp_path / 'again', **args)
    config, _ = exported(folder, tmp_path)
    cfg = config['pretrained_cfg']
    assert (config['architecture'], cfg['input_size'], cfg['mean']) == (STOCK, [3, 48, 48], [0.1] * 3)
    shutil.rmtree(tmp_path / 'out')
    del server.repos[REPO]
    shutil.rmtree(tmp_path / 'cache')
    assert 'name its architecture' in call('publish', folder, '--repo', REPO, '--dry-run', code=3)
    config, _ = exported(folder, tmp_path, architecture=ARCHITECTURE)
    assert config['pretrained_cfg']['input_size'] == [3, 48, 48]


# What is refused.


@pytest.mark.parametrize('metadata', [
    'license: [', '- license', 'model-index: []', 'model-index: [{name: x, results: []}]',
    'model-index: [{name: x, results: [{task: {type: t}, dataset: {type: d}, metrics: [{type: m, value: 1}]}]}]',
    'model-index: [{name: x, results: [{task: {type: t}, dataset: {type: d, name: D}, metrics: [{type: m}]}]}]'])
def test_the_server_checks_metadata_as_the_hub_does(server, metadata):
    with pytest.raises(ValueError, match=r'Invalid metadata in README\.md'):
        put_card(f'---\n{metadata}\n---\n')


@pytest.mark.parametrize('existing', ['out', 'out.train'])
def test_existing_folder_is_refused_before_anything_is_done(run_folder, tmp_path, monkeypatch, existing):
    (tmp_path / existing / 'mine').mkdir(parents=True)
    monkeypatch.setattr(publishing, 'fuse', None)
    options = ['--repo', REPO, '--out', tmp_path / 'out', '--include-training-form', '--dry-run']
    assert f'{existing} is a folder that is not empty' in call('publish', run_folder, *options, code=2)
    assert [path.name for path in tmp_path.iterdir()] == [existing]


def test_a_folder_is_free_if_that_of_the_training_form_is(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'test_resnet.orepa_pets.train').mkdir()
    published = timm_rep.publish(run_folder, REPO, include_training_form=True, dry_run=True)
    assert published.folder.name == 'test_resnet.orepa_pets-2'


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(repo='resnet18'), 'repo must be ORG/NAME'),
    (dict(repo='../x'), 'repo must be ORG/NAME'),
    (dict(repo='a/b/c'), 'repo must be ORG/NAME'),
    (dict(tag='a b'), 'letters, digits and _'),
    (dict(tag='r160_in1k'), "tag 'r160_in1k' claims test_resnet.r160_in1k, a recipe of timm"),
    (dict(tag='R160_in1k'), 'a recipe of timm'),
    (dict(repo='me/test_resnet.r160_in1k'), "name 'test_resnet.r160_in1k' claims"),
    (dict(repo='me/test_resnet.R160_in1k'), 'a recipe of timm'),
    (dict(repo='me/test_resnet-r160_in1k'), 'a recipe of timm'),
    (dict(repo='me/test_resnet.r160_in1k.v2'), 'a recipe of timm'),
    (dict(repo='me/ResNet50.a1_in1k'), 'says resnet50, but the model is'),
    (dict(repo='me/resnet50.orepa'), 'says resnet50, but the model is'),
    (dict(architecture='orepa_resnet18'), 'does not hold orepa_resnet18|says that it trained'),
    (dict(create_pr=True, revision='x'), 'besides it'),
    (dict(revision='a@b'), 'revision must be letters'),
    (dict(create_pr=True, include_training_form=True), 'include_training_form besides it'),
    (dict(revision='train', include_training_form=True), "revision 'train' is that of the training form"),
])
def test_bad_arguments(server, run_folder, kwargs, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        timm_rep.publish(run_folder, **dict(dict(repo=REPO), **kwargs))
    assert server.requests == []
    assert [path.name for path in Path().iterdir()] == []


def test_metadata_of_another_run_is_refused(server, run_folder, model, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / 'mixed')
    (folder / 'args.yaml').write_text(yaml.safe_dump(dict(RUN_ARGS, seed=7)))
    assert 'is of another run' in call('publish', folder, '--repo', REPO, code=2)
    (folder / 'args.yaml').write_text(yaml.safe_dump(dict(RUN_ARGS, model='orepa_resnet50')))
    timm_rep.io.weights.save_weights(model, folder / 'weights.safetensors')
    options = ['--model', ARCHITECTURE, '--num-classes', CLASSES]
    error = call('publish', folder / 'weights.safetensors', '--repo', REPO, *options, code=2)
    assert 'says that it trained orepa_resnet50' in error
    assert server.requests == []


def test_only_numbers_of_a_summary_are_published(run_folder, model, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / 'noted')
    (folder / 'args.yaml').unlink()
    (folder / 'summary.csv').write_text('epoch,eval_top1,note\n0,10.0,<script>\nepoch,eval_top1,note\n0,12.5,1\n1,2')
    timm_rep.io.weights.save_weights(model, folder / 'weights.safetensors')
    options = ['--model', ARCHITECTURE, '--num-classes', CLASSES, '--dry-run', '--out', tmp_path / 'export']
    call('publish', folder / 'weights.safetensors', '--repo', REPO, *options)
    # a resumed run repeats header and epochs, a killed one leaves a line cut off
    assert (tmp_path / 'export' / 'summary.csv').read_text().split() == ['epoch,eval_top1,note', '0,12.5,1.0']


def test_what_does_not_verify_is_refused(server, run_folder, monkeypatch, tmp_path):
    content = torch.load(run_folder / 'model_best.pth.tar', weights_only=False)
    broken = dict(content, state_dict={key: value.clone() for key, value in content['state_dict'].items()})
    broken['state_dict']['fc.bias'][0] = float('nan')
    torch.save(broken, tmp_path / 'nan.pth')
    assert 'non-finite' in call('publish', tmp_path / 'nan.pth', '--repo', REPO, code=1)

    fuse = publishing.fuse

    def wrong(model):
        fused = fuse(model)
        with torch.no_grad():
            fused.layer2[0].conv1.weight[0] *= 1.01
        return fused

    monkeypatch.setattr(publishing, 'fuse', wrong)
    result = CliRunner().invoke(main, ['publish', str(run_folder), '--repo', REPO, '--json'])
    assert result.exit_code == 1
    assert 'layer layer2.0.conv1 is off' in json.loads(result.output.splitlines()[0])['error']
    assert {path for _, path, _ in server.requests} == {'/api/whoami-v2'}  # is asked first
    assert not (tmp_path / 'test_resnet.orepa_pets').exists()


def test_images_of_other_classes_are_refused(server, run_folder, images):
    shutil.rmtree(images / 'test' / 'class0')
    assert 'of 5 classes, the model knows 6' in call('publish', run_folder, '--repo', REPO, '--data', images, code=2)
    with pytest.raises(ValueError, match='max_images must be at least 1'):
        timm_rep.publish(run_folder, REPO, data=images, max_images=0)
    assert 'no folder of images' in call('publish', run_folder, '--repo', REPO, '--data', 'nowhere', code=2)
    assert {path for _, path, _ in server.requests} == {'/api/whoami-v2'}  # is asked first


class Payload:
    def __reduce__(self):
        return os.getenv, ('HOME',)


def test_pickles_need_to_be_allowed(run_folder, tmp_path):
    content = torch.load(run_folder / 'model_best.pth.tar', weights_only=False)
    torch.save(dict(content, extra=Payload()), tmp_path / 'last.pth.tar')
    options = [tmp_path, '--repo', REPO, '--dry-run', '--out', tmp_path / 'out']
    assert '--allow-pickle' in call('publish', *options, code=2)
    call('publish', *options, '--allow-pickle')


# The self-check of what is published.


@pytest.fixture
def export(run_folder, tmp_path):
    return timm_rep.publish(run_folder, REPO, dry_run=True, out=tmp_path / 'export').folder


def test_self_check_finds_a_change(export):
    report = json.loads(call('verify', export, '--json'))
    assert report['ok']
    weights = load_file(export / 'model.safetensors')
    weights['fc.bias'][0] += 1e-2 * weights['fc.weight'].abs().max() + 1
    save_file(weights, export / 'model.safetensors')
    assert 'does not compute what it was published with' in call('verify', export, code=1)


def test_self_check_is_as_strict_as_any(export):
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
    dict(pretrained=True),
    dict(pretrained_cfg_overlay=dict(url='http://example.org/x.pth')),
    dict(checkpoint_path='secret.pth'),
    dict(cache_dir='elsewhere'),
    dict(pretrained_strict=False),
    dict(device='cpu'),
], ids=str)
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
    timm_rep.io.weights.save_weights(model, tmp_path / 'weights.pth')
    options = ['--model', ARCHITECTURE, '--num-classes', CLASSES]
    assert message in call('verify', tmp_path / 'weights.pth', export, *options, code=2)


@pytest.mark.parametrize(('change', 'message'), [
    (dict(model_args=[1, 2]), 'model_args must be arguments by name, got list'),
    (dict(model_args=5), 'model_args must be arguments by name, got int'),
    (dict(model_args=dict(nonsense=1)), "unexpected keyword argument 'nonsense'"),
    (dict(model_args=dict(layers='x')), 'timm cannot rebuild the model from config.json'),
    (dict(model_args={}, num_classes='x'), 'timm cannot rebuild the model from config.json'),
    (dict(model_args={}, num_classes=6.5), 'timm cannot rebuild the model from config.json'),
    (dict(pretrained_cfg=dict(unknown_field=1)), 'timm cannot rebuild the model from config.json'),
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


@pytest.mark.parametrize(('name', 'change'), [
    ('input', lambda x: x.int()), ('input', lambda x: x.to(torch.uint8)), ('input', lambda x: x[0].clone()),
    ('input', lambda x: x[:0].clone()), ('output', lambda x: x[:0].clone()), ('output', lambda x: x.int())])
def test_self_check_takes_images_only(export, name, change):
    path = export / 'test' / 'rand_tensors.safetensors'
    tensors = {key: value.clone() for key, value in load_file(path).items()}  # the file is mapped, and written to
    save_file(dict(tensors, **{name: change(tensors[name])}), path)
    assert 'must hold an input (b, c, h, w) and an output of real numbers' in call('verify', export, code=2)
    save_file(dict(tensors, input=tensors['input'][:, :1].clone()), path)
    assert 'the model cannot take the input' in call('verify', export, code=2)


@pytest.mark.parametrize('change', [
    dict(model_args={}, num_classes=10 ** 7), dict(model_args=dict(num_classes=10 ** 7))], ids=str)
def test_self_check_allocates_no_more_than_the_weights_say(export, change):
    """The classifier would take 4 GB."""
    path = export / 'config.json'
    path.write_text(json.dumps(dict(json.loads(path.read_text()), **change)))
    size = (export / 'model.safetensors').stat().st_size
    assert f'model.safetensors has {size} bytes, allowed are 1' in call('verify', export, code=2)


def test_self_check_checks_sizes_and_files(export, tmp_path):
    for name, message in (('model.safetensors', 'cannot rebuild'), ('test/rand_tensors.safetensors', 'damaged')):
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


def test_a_file_of_unknown_size_is_not_fetched(server, run_folder, monkeypatch):
    publish_json(run_folder, '--repo', REPO)
    model_info = huggingface_hub.HfApi.model_info

    def without_size(self, *args, **kwargs):
        info = model_info(self, *args, **kwargs)
        for file in info.siblings:
            file.size = None if file.rfilename == 'model.safetensors' else file.size
        return info

    monkeypatch.setattr(huggingface_hub.HfApi, 'model_info', without_size)
    assert 'model.safetensors has None bytes' in call('verify', f'hf-hub:{REPO}', code=2)


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


# The registry of published weights.


def test_without_published_weights_the_error_names_two_ways():
    assert published_weights() == {} or all('hf_hub_id' in entry for entry in published_weights().values())
    name = next(name for name in timm.list_models('orepa_*') if not timm.models.is_model_pretrained(name))
    with pytest.raises(ValueError, match=rf'(?s)no weights of {name}.*import-official FILE --model {name}.*train it'):
        timm.create_model(name, pretrained=True)
    assert timm.create_model('orepa_resnet18_cifar', pretrained=False) is not None


def test_entry_of_the_registry_makes_pretrained_resolve(server, run_folder, model, tmp_path):
    import tiny_architecture
    entry = publish_json(run_folder, '--repo', REPO)['registry_entry']
    (tmp_path / 'pretrained.json').write_text(json.dumps(entry))
    cfgs = with_published({ARCHITECTURE: {}, 'orepa_resnet18': {}}, published_weights(tmp_path / 'pretrained.json'))
    assert list(cfgs) == [ARCHITECTURE, 'orepa_resnet18', f'{ARCHITECTURE}.orepa']
    cfg = dict(tiny_architecture.default_cfgs[ARCHITECTURE].default.to_dict(), **cfgs[f'{ARCHITECTURE}.orepa'])
    loaded = timm.create_model(ARCHITECTURE, pretrained=True, pretrained_cfg=cfg, num_classes=CLASSES).eval()
    inputs = randn(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        assert_near(loaded(inputs), model(inputs), MODEL_RTOL[torch.float32])
