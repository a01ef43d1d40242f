"""What is published, from which run, and what is refused before anything is sent."""
import argparse
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from helpers import MODEL_RTOL, assert_near, randn, randomize_
from hub_publishing import (
    ARCHITECTURE,
    CLASSES,
    REPO,
    RUN_ARGS,
    SECRET,
    STOCK,
    SUMMARY,
    call,
    card_of,
    exported,
    in_own_process,
    other_run,
    publish_json,
)
from hub_server import WRITER
from safetensors.torch import load_file, save_file

import timm_rep
from timm_rep.cli.main import main
from timm_rep.hub import publish as publishing
from timm_rep.models.published import published_weights, with_published
from timm_rep.report.images import ImageCheck

# It does not note what a model was built with, so that an export of another network than the default is refused.
OLD_TIMM = not hasattr(timm.create_model('test_resnet'), '_model_args')

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
            'timm-rep train --config args.yaml --data-dir IMAGES --initial-checkpoint start.pth', '| `lr` | 0.1 |',
            'after epoch 1, counted from 0', 'OREPA composes the kernel',
            'measured with the fused model on 12 images, of the split `test`, when it was published',
            f"timm.create_model('hf-hub:{REPO}', pretrained=True, features_only=True)",
            'num_classes=0', "['label_names']", f'timm-rep verify hf-hub:{REPO}', '![Accuracy, loss',
            'Measured on ', 'Online Convolutional Re-parameterization'):
        assert text in card, text
    for row in ('Parameters (M)', 'GMACs of an image', 'Images per second', 'Top-1 accuracy (%) on 12 images'):
        assert re.search(rf'^\| {re.escape(row)}.*\| [\d.]+ \| [\d.]+ \|$', card, re.MULTILINE), row
    assert server.files(REPO)['training.png'].startswith(b'\x89PNG')


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
    assert "has no split 'test'" in call('publish', *options, code=2)
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
    names = ('Pets-1k', '花', None)
    assert [publishing._default_tag(model, name) for name in names] == ['orepa_pets1k', 'orepa', 'orepa']


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
    monkeypatch.setattr(timm_rep.hub.export, 'has_packages', lambda packages: 'matplotlib' not in packages)
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


@pytest.mark.skipif(OLD_TIMM, reason='this timm cannot export such a model')
def test_all_lines_of_python_on_the_cards_run(server, images, tmp_path, caplog, capsys):
    model = randomize_(timm.create_model(ARCHITECTURE, num_classes=CLASSES, act_layer='silu', global_pool='max')).eval()
    with torch.no_grad():
        model.fc.weight.div_(1e4)
    timm_rep.io.weights.save_weights(model, tmp_path / 'weights.safetensors')
    published = timm_rep.publish(
        tmp_path / 'weights.safetensors', REPO, architecture=ARCHITECTURE, num_classes=CLASSES, data=images,
        split='test', model_kwargs=dict(act_layer='silu', global_pool='max'), include_training_form=True)
    (images / 'test' / 'class0' / '0.png').rename('image.jpg')
    ran = []
    for card in (card_of(server), card_of(server, 'train')):
        assert timm_rep.io.extras.install_command() in card
        for block in re.findall(r'```python\n(.*?)```', card, re.DOTALL):
            names = dict(timm=timm)
            exec(block, names)
            ran.append(names)
    usage, features, expanded, *training_forms = ran
    assert len(re.findall(r'^class\d \d+\.\d%$', capsys.readouterr().out, re.MULTILINE)) == 5
    assert len(features['backbone'].feature_info) == 5
    inputs = randn(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        for names in (usage, expanded, *training_forms):
            assert_near(names['model'].eval()(inputs), model(inputs), MODEL_RTOL[torch.float32])
    for names in (expanded, *training_forms):
        assert timm_rep.expansion_of(names['model']) == timm_rep.expansion_of(model)
    assert len(training_forms) == 2
    assert published.entry is None  # it has no place for the activation
    assert f'no entry for the registry: {ARCHITECTURE} alone does not build this network' in caplog.text
    assert '--gp max --model-kwargs act_layer=silu' in card_of(server)


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
        publishing._check_claims(timm_rep.io.checkpoint.read_checkpoint(folder), 'orepa_resnet18', REPO, 'x')


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
    assert 'holds no images' in call('publish', run_folder, '--repo', REPO, '--data', 'nowhere', code=2)
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
