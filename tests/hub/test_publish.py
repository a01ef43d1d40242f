"""What is published, from which run, and what is refused before anything is sent."""
import dataclasses
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from helpers import MODEL_RTOL, OLD_TIMM, assert_near, randn, randomize_
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
    fused_wrongly,
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
            '--data-dir IMAGES --initial-checkpoint start.pth', '| `lr` | 0.1 |', 'after epoch 1, counted from 0',
            'measured with the fused model on 12 images, of the split `test`, when it was published',
            "['label_names']", f'timm-rep verify hf-hub:{REPO}', '![Accuracy, loss'):
        assert text in card, text
    for row in ('Parameters (M)', 'GMACs of an image', 'Images per second', 'Top-1 accuracy (%) on 12 images'):
        assert re.search(rf'^\| {re.escape(row)}.*\| [\d.]+ \| [\d.]+ \|$', card, re.MULTILINE), row
    assert server.files(REPO)['training.png'].startswith(b'\x89PNG')


@pytest.mark.parametrize(('use_ema', 'noted_ema', 'measured'), [
    (False, False, True), (True, True, True), (True, False, False), (False, True, False)])
def test_figures_of_other_weights_are_not_taken(use_ema, noted_ema, measured, run_folder, tmp_path, caplog):
    """With --model-ema the summary is of the averaged weights, else of the trained ones."""
    folder = other_run(run_folder, tmp_path / 'run', summary=True, model_ema=noted_ema)
    config, card = exported(folder, tmp_path, use_ema=use_ema)
    assert config['timm_rep']['metrics'] == (dict(top1=41.5, top5=97.25) if measured else {})
    assert (f'with the {"averaged" if use_ema else "trained"} weights' in card) == measured
    assert ('| Top-1 accuracy (%) | 41.5 |' if measured else 'Accuracy: not measured.') in card
    assert ('use_ema (--use-ema)' in caplog.text) == (noted_ema and not use_ema)


@pytest.mark.parametrize(('complete', 'top5', 'metrics'), [
    (True, (3.0, 4.0), dict(top1=2.0, top5=4.0)), (True, None, dict(top1=2.0)),
    (False, None, dict(top1=41.5, top5=97.25))])  # the run's own
def test_accuracies_are_those_of_the_fused_model_on_all(full_run, monkeypatch, tmp_path, complete, top5, metrics):
    check = ImageCheck(9, complete, (1.0, 2.0), top5, 0.0, tuple('abcdef'), 'the split `test`')
    monkeypatch.setattr(publishing, 'compare_on_images', lambda *args, **kwargs: check)
    config, card = exported(full_run, tmp_path, data=tmp_path)
    assert config['timm_rep']['metrics'] == metrics
    assert '| Top-1 accuracy (%) on 9 images | 1.00 | 2.00 |' in card


@pytest.mark.parametrize(('args', 'kwargs', 'expected'), [
    (dict(val_split='val', class_map='names.txt'), {}, ('val', 'names.txt', '')),
    (dict(val_split=''), {}, ('validation', '', '')),
    (dict(dataset='torch/folder'), dict(dataset='Pets'), ('test', '', 'torch/folder')),  # which counts otherwise
    (dict(dataset='torch/cifar10'), dict(dataset='Pets'), ('test', '', '')),  # and these are of a folder
    ({}, dict(split='dev'), ('dev', '', ''))])
def test_images_are_read_as_the_run_read_them(run_folder, monkeypatch, tmp_path, args, kwargs, expected):
    seen = []

    def compare(*args, split, class_map, dataset, **kwargs):
        seen.append((split, class_map, dataset))
        raise ValueError('far enough')

    monkeypatch.setattr(publishing, 'compare_on_images', compare)
    with pytest.raises(ValueError, match='far enough'):
        exported(other_run(run_folder, tmp_path / 'run', **args), tmp_path, data=tmp_path, **kwargs)
    assert seen == [expected]


def test_images_need_a_name_of_their_own_if_the_run_has_one(run_folder, images, tmp_path):
    folder = other_run(run_folder, tmp_path / 'run', dataset='torch/cifar10')
    with pytest.raises(ValueError, match='trained on torch/cifar10; say with dataset'):
        exported(folder, tmp_path, data=images)
    config, card = exported(folder, tmp_path, data=images, dataset='Cute\nPets')
    assert config['timm_rep']['dataset'] == 'Cute Pets'
    assert '- **Data set:** Cute Pets\n' in card
    assert huggingface_hub.ModelCard(card).data.eval_results[0].dataset_name == 'Cute Pets'


def test_figures_of_another_network_are_not_taken(run_folder, tmp_path):
    folder = other_run(run_folder, tmp_path / 'run', summary=True)
    assert exported(folder, tmp_path, model_kwargs=dict(global_pool='max'))[0]['timm_rep']['metrics'] == {}
    shutil.rmtree(tmp_path / 'out')
    assert exported(folder, tmp_path, num_classes=CLASSES)[0]['timm_rep']['metrics'] == dict(top1=41.5, top5=97.25)
    (folder / 'summary.csv').write_text(SUMMARY.replace('41.5', '99.9'))
    assert 'top1 of epoch 1 is 99.9 in the one and 41.5' in call('publish', folder, '--repo', REPO, code=2)


def test_default_tag_has_the_letters_of_the_name(model):
    names = ('Pets-1k', '花', None)
    assert [publishing._default_tag(model, name) for name in names] == ['orepa_pets1k', 'orepa', 'orepa']


def test_weights_alone(server, model, tmp_path):
    """No run beside them: the card says so, and states no figure."""
    timm_rep.io.weights.save_weights(model, tmp_path / 'weights.safetensors')
    options = ['--model', ARCHITECTURE, '--num-classes', CLASSES]
    published = publish_json(tmp_path / 'weights.safetensors', '--repo', REPO, *options)
    assert not set(published['files']) & {'args.yaml', 'summary.csv', 'training.png'}
    card = card_of(server)
    assert 'Not stated: the model was exported without the arguments' in card
    assert 'Accuracy: not measured.' in card
    assert huggingface_hub.ModelCard(card).data.eval_results is None


def test_without_matplotlib_there_is_no_drawing(monkeypatch, full_run, tmp_path):
    monkeypatch.setattr(timm_rep.hub.export, 'has_packages', lambda packages: 'matplotlib' not in packages)
    _, card = exported(full_run, tmp_path)
    assert not (tmp_path / 'out' / 'training.png').exists()
    assert '![' not in card


def test_dry_run_sends_nothing(server, run_folder):
    output = call('publish', run_folder, '--repo', REPO, '--dry-run', '--include-training-form')
    assert server.requests == []
    assert 'nothing was sent' in output
    assert 'model.safetensors' in output
    assert f'"{ARCHITECTURE}.orepa"' in output
    assert {path.name for path in Path().iterdir()} >= {'test_resnet.orepa_pets', 'test_resnet.orepa_pets.train'}


@pytest.mark.skipif(OLD_TIMM, reason='this timm cannot export such a model')
def test_all_lines_of_python_on_the_cards_run(server, images, tmp_path, capsys):
    model = randomize_(timm.create_model(ARCHITECTURE, num_classes=CLASSES, act_layer='silu', global_pool='max')).eval()
    with torch.no_grad():
        model.fc.weight.div_(1e4)
    timm_rep.io.weights.save_weights(model, tmp_path / 'weights.safetensors')
    published = timm_rep.publish(
        tmp_path / 'weights.safetensors', REPO, architecture=ARCHITECTURE, num_classes=CLASSES, data=images,
        split='test', model_kwargs=dict(act_layer='silu', global_pool='max'), include_training_form=True)
    (images / 'test' / 'class0' / '0.png').rename('image.jpg')
    ran = []
    card = card_of(server)
    assert timm_rep.io.extras.install_command() in card
    for block in re.findall(r'```python\n(.*?)```', card, re.DOTALL):
        names = dict(timm=timm)
        exec(block, names)
        ran.append(names)
    usage, features, expanded, training_form = ran
    assert len(re.findall(r'^class\d \d+\.\d%$', capsys.readouterr().out, re.MULTILINE)) == 5
    assert len(features['backbone'].feature_info) == 5
    inputs = randn(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        for names in (usage, expanded, training_form):
            assert_near(names['model'].eval()(inputs), model(inputs), MODEL_RTOL[torch.float32])
    for names in (expanded, training_form):
        assert timm_rep.expansion_of(names['model']) == timm_rep.expansion_of(model)
    assert published.entry is None  # it has no place for the activation
    assert card_of(server, 'train') == card


def test_run_of_a_model_with_a_tag(run_folder, monkeypatch, tmp_path):
    cfg = timm.models._registry._model_pretrained_cfgs[ARCHITECTURE]
    monkeypatch.setitem(
        timm.models._registry._model_pretrained_cfgs, f'{ARCHITECTURE}.pets', dataclasses.replace(cfg, crop_pct=0.5))
    folder = other_run(
        run_folder, tmp_path / 'run', model=f'{ARCHITECTURE}.pets', img_size=48, input_size=None, mean=[0.1] * 3)
    config, _ = exported(folder, tmp_path)
    cfg = config['pretrained_cfg']
    assert (cfg['input_size'], cfg['mean'], cfg['crop_pct']) == ([3, 48, 48], [0.1] * 3, 0.5)
    call('fuse', folder, tmp_path / 'fused')
    assert json.loads((tmp_path / 'fused' / 'config.json').read_text())['pretrained_cfg']['input_size'] == [3, 48, 48]


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


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(repo='resnet18'), 'repo must be ORG/NAME'),
    (dict(repo='../x'), 'repo must be ORG/NAME'),
    (dict(repo='me/a--b'), "'me/a--b' can be no name of a repository"),
    (dict(repo='me/x.git'), 'can be no name of a repository'),
    (dict(tag='a b'), 'letters, digits and _'),
    (dict(tag='r160_in1k'), "tag 'r160_in1k' claims test_resnet.r160_in1k, a recipe of timm"),
    (dict(architecture='orepa_resnet18'), 'does not hold orepa_resnet18|says that it trained'),
    (dict(create_pr=True, revision='x'), 'besides it'),
    (dict(create_pr=True, include_training_form=True), 'include_training_form besides it'),
    (dict(revision='train', include_training_form=True), "revision 'train' is that of the training form"),
])
def test_bad_arguments(server, run_folder, kwargs, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        timm_rep.publish(run_folder, **dict(dict(repo=REPO), **kwargs))
    assert server.requests == []
    assert [path.name for path in Path().iterdir()] == []


def test_the_tag_of_the_weights_that_come_with_the_package_is_not_one_of_timms(tmp_path):
    """docs/publish.md publishes them by their name."""
    model = timm.create_model('orepa_repvgg_a0_cifar', num_classes=10)
    timm_rep.save(model, tmp_path / 'weights.safetensors')
    published = timm_rep.publish(
        tmp_path / 'weights.safetensors', REPO, tag='orepa_cifar10', dry_run=True, out=tmp_path / 'export')
    assert json.loads((published.folder / 'config.json').read_text())['pretrained_cfg']['tag'] == 'orepa_cifar10'


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


def test_what_does_not_verify_is_refused(server, run_folder, monkeypatch, tmp_path):
    content = torch.load(run_folder / 'model_best.pth.tar', weights_only=False)
    broken = dict(content, state_dict={key: value.clone() for key, value in content['state_dict'].items()})
    broken['state_dict']['fc.bias'][0] = float('nan')
    torch.save(broken, tmp_path / 'nan.pth')
    assert 'non-finite' in call('publish', tmp_path / 'nan.pth', '--repo', REPO, code=1)

    fuse = publishing.fuse
    monkeypatch.setattr(publishing, 'fuse', lambda model: fused_wrongly(fuse, model))
    result = CliRunner().invoke(main, ['publish', str(run_folder), '--repo', REPO, '--json'])
    assert result.exit_code == 1
    assert 'layer layer2.0.conv1 is off' in json.loads(result.output.splitlines()[0])['error']
    assert {path for _, path, _ in server.requests} == {'/api/whoami-v2'}  # is asked first
    assert not (tmp_path / 'test_resnet.orepa_pets').exists()


def test_without_published_weights_the_error_names_two_ways():
    assert all({'hf_hub_id', 'file'} & set(entry) for entry in published_weights().values())
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
