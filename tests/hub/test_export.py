import json
import os
import stat

import huggingface_hub
import pytest
import timm
import torch
from command_line import call
from helpers import (
    MODEL_RTOL,
    OLD_TIMM,
    assert_near,
    assert_same_state,
    own_warnings,
    randn,
    randomize_,
    with_compiled_parts,
)
from hub_publishing import fused_wrongly
from safetensors.torch import load_file

import timm_rep
from timm_rep import UserError
from timm_rep.core.expansion import methods_from_list
from timm_rep.core.verify import VerificationError

CLASSES = ['cat', 'dog', 'eel', 'fox', 'gnu']
DATA_CONFIG = dict(
    input_size=(3, 48, 48), interpolation='bilinear', mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.9,
    crop_mode='center')
# Metadata of timm's test_resnet, from which the models of these tests are made.
SOURCE_FIELDS = ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'origin_url', 'paper_name', 'notes',
                 'description', 'test_input_size', 'test_crop_pct', 'label_offset')


def training_form(layer='orepa', **kwargs):
    stock = timm.create_model('test_resnet', num_classes=len(CLASSES), **kwargs)
    return randomize_(timm_rep.expand(stock, layer), seed=1)


def config_of(folder):
    return json.loads((folder / 'config.json').read_text())


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('kind', ['orepa', 'dbb', 'stock'])
def test_timm_builds_it_from_the_folder(tmp_path, kind):
    model = timm_rep.fuse(training_form().eval()) if kind == 'stock' else training_form(kind)
    model.train().to(memory_format=torch.channels_last)
    folder = timm_rep.export_folder(
        model, tmp_path / 'model', label_names=CLASSES, data_config=DATA_CONFIG)
    assert model.training
    reloaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert type(reloaded) is timm.models.ResNet
    inputs = randn(2, 3, 48, 48, dtype=torch.float32)
    with torch.no_grad():
        assert_near(reloaded(inputs), model.eval()(inputs), MODEL_RTOL[torch.float32])
    assert json.dumps(timm.data.resolve_data_config(model=reloaded)) == json.dumps(DATA_CONFIG)
    assert reloaded.pretrained_cfg['label_names'] == CLASSES


@pytest.mark.skipif(OLD_TIMM, reason='this timm does not keep the arguments of a model')
def test_other_libraries_build_it_as_timm_does(tmp_path):
    """transformers gives the number of classes, or none, and the arguments beside it."""
    model = training_form(in_chans=1)
    model.reset_classifier(7, 'max')
    folder = timm_rep.export_folder(model, tmp_path / 'model')
    config = config_of(folder)
    assert config['num_classes'] == 7
    args = config.get('model_args', {})
    weights = load_file(folder / 'model.safetensors')
    theirs = timm.create_model(config['architecture'], num_classes=config['num_classes'], **args).eval()
    theirs.load_state_dict(weights)
    tensors = load_file(folder / 'test' / 'rand_tensors.safetensors')
    ours = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(theirs(tensors['input']), tensors['output'])
        assert torch.equal(ours(tensors['input']), tensors['output'])
    timm.create_model(config['architecture'], num_classes=0, **args)


def test_folders_that_say_the_classes_twice_are_loaded(tmp_path):
    folder = timm_rep.export_folder(training_form(), tmp_path / 'model')
    config = config_of(folder)
    config.setdefault('model_args', {})['num_classes'] = len(CLASSES)
    (folder / 'config.json').write_text(json.dumps(config))
    assert 'outputs agree' in str(timm_rep.check_export(folder))


@pytest.mark.parametrize('wrap', [
    torch.compile, torch.nn.DataParallel, timm.utils.ModelEmaV3,
    lambda model: torch.compile(torch.nn.DataParallel(model)), with_compiled_parts])
def test_what_is_around_a_model_is_left_out(wrap, tmp_path):
    import tiny_architecture
    model = randomize_(timm.create_model(tiny_architecture.NAME, num_classes=len(CLASSES))).eval()
    folder = timm_rep.export_folder(wrap(model), tmp_path / 'model', training_folder=tmp_path / 'training')
    assert_same_state(load_file(folder / 'model.safetensors'), timm_rep.fuse(model).state_dict())
    assert_same_state(load_file(tmp_path / 'training' / 'model.safetensors'), model.state_dict())


@pytest.mark.skipif(os.name == 'nt', reason='files have no such modes on Windows')
def test_all_files_may_be_read_as_the_user_has_it(tmp_path):
    before = os.umask(0o022)
    try:
        folder = timm_rep.export_folder(training_form(), tmp_path / 'export')
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.rglob('*') if file.is_file()} == {0o644}


def test_config_is_our_own(tmp_path):
    model = training_form()
    model.pretrained_cfg.update(dict.fromkeys(SOURCE_FIELDS, 'of other weights'), tag='other')
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cfg_before = dict(model.pretrained_cfg)
    folder = timm_rep.export_folder(model, tmp_path / 'new' / 'model', tag='orepa_test', license='mit')
    assert names_in(folder) == ['README.md', 'config.json', 'model.safetensors', 'test']
    assert names_in(tmp_path / 'new') == ['model']

    config = config_of(folder)
    assert config['architecture'] == 'test_resnet'
    cfg = config['pretrained_cfg']
    assert not set(SOURCE_FIELDS) & set(cfg)
    assert (cfg['tag'], cfg['license'], cfg['paper_ids']) == ('orepa_test', 'mit', ['arXiv:2204.00826'])
    assert 'of other weights' not in json.dumps(config)
    provenance = config['timm_rep']
    assert provenance['version'] == timm_rep.__version__
    assert provenance['training_architecture'] == 'test_resnet'
    assert methods_from_list(provenance['expansion']) == timm_rep.expansion_of(model).methods
    assert provenance['time_steps'] == 1
    assert 0 <= provenance['fused_difference']['outputs_relative'] <= MODEL_RTOL[torch.float32]

    assert model.pretrained_cfg == cfg_before
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_image_channels(tmp_path):
    import tiny_architecture
    model = randomize_(timm.create_model(tiny_architecture.NAME, num_classes=5, in_chans=1)).eval()
    folder = timm_rep.export_folder(model, tmp_path / 'model')
    reloaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert reloaded.conv1[0].in_channels == 1
    assert tuple(timm.data.resolve_data_config(model=reloaded)['input_size']) == (1, 32, 32)
    assert '--pretrained-path' not in (folder / 'README.md').read_text()  # the name alone is that of another network


def test_architecture_that_timm_lacks(tmp_path):
    model = randomize_(timm.create_model('orepa_repvgg_a0_cifar', num_classes=3)).eval()
    folder = timm_rep.export_folder(model, tmp_path / 'model')
    config = config_of(folder)
    assert config['architecture'] == 'orepa_repvgg_a0_cifar'
    assert config['model_args']['inference_mode'] is True
    card = (folder / 'README.md').read_text()
    assert 'timm has no `orepa_repvgg_a0_cifar`' in card
    assert 'import timm_rep' in card
    reloaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert not list(timm_rep.rep_layers(reloaded))
    inputs = randn(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        assert_near(reloaded(inputs), model(inputs), MODEL_RTOL[torch.float32])


def test_model_card(tmp_path):
    model = training_form()
    metrics = dict(top1=71.25, throughput=1234.0)
    card = huggingface_hub.ModelCard.load(
        timm_rep.export_folder(model, tmp_path / 'net', dataset='pets', metrics=metrics) / 'README.md')
    assert card.data.library_name == 'timm'
    assert card.data.eval_results[0].metric_value == 71.25
    assert '| Top-1 accuracy (%) | 71.25 |' in card.content
    assert '| throughput | 1234 |' in card.content
    assert "timm.create_model('hf-hub:ORGANISATION/net', pretrained=True)" in card.content
    assert "timm.create_model('local-dir:net', pretrained=True)" in card.content
    usage, training = card.content.split('## How to train it on')
    assert 'import timm_rep' not in usage
    assert 'import timm_rep' in training
    assert 'Online Convolutional Re-parameterization' in card.content

    # without a training form there is nothing to compare with
    stock = timm_rep.export_folder(timm_rep.fuse(model), tmp_path / 'stock')
    content = (stock / 'README.md').read_text()
    assert 'Accuracy: not measured.' in content
    assert 'Costs and differences: not measured.' in content
    assert config_of(stock)['timm_rep']['fused_difference'] is None


def test_existing_path_stays(tmp_path):
    model = training_form()
    full = tmp_path / 'full'
    full.mkdir()
    (full / 'mine').write_text('mine')
    for path, kind in ((full, 'a folder that is not empty'), (full / 'mine', 'a file')):
        with pytest.raises(FileExistsError, match=kind) as error:
            timm_rep.export_folder(model, path)
        assert str(path) in str(error.value)
    assert names_in(tmp_path) == ['full']
    assert (full / 'mine').read_text() == 'mine'

    empty = tmp_path / 'empty'
    empty.mkdir()
    assert timm_rep.export_folder(model, empty) == empty
    assert 'config.json' in names_in(empty)


def test_failure_leaves_nothing(tmp_path):
    model = training_form()
    with torch.no_grad():
        model.fc.weight[0, 0] = float('nan')
    with pytest.raises(VerificationError, match=r'fc\.weight'):
        timm_rep.export_folder(model, tmp_path / 'model')

    # Norms folded too: convolutions with bias, which timm's constructor does not build.
    deploy = timm.utils.reparameterize_model(timm_rep.fuse(timm.create_model('orepa_repvgg_a0_cifar').eval()))
    with pytest.raises(UserError, match='not what timm builds as orepa_repvgg_a0_cifar'):
        timm_rep.export_folder(deploy, tmp_path / 'model')
    assert names_in(tmp_path) == []


def test_another_activation_is_noticed(tmp_path):
    """Where a folder does not say which activation a model was built with, the network that timm builds is another."""
    model = timm.create_model('mobilenetv1_100', num_classes=2, act_layer='relu').eval()
    other = timm.create_model('mobilenetv1_100', num_classes=2).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    timm_rep.verify(model, other, inputs=x)  # no activation is above 6
    model._model_args = {}
    with pytest.raises(UserError, match='is not what timm builds as mobilenetv1_100'):
        timm_rep.export_folder(model, tmp_path / 'folder')
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments(tmp_path):
    other = training_form()
    other.pretrained_cfg['architecture'] = 'my_net'
    for model, kwargs, message in (
            (training_form(), dict(label_names=['cat']), 'the 5 classes of the model, got 1 names'),
            (training_form(), dict(data_config=dict(size=3)), "unexpected keyword argument 'size'"),
            (torch.nn.Sequential(), {}, 'a Sequential was not built by timm.create_model'),
            (other, {}, 'a ResNet was not built by timm.create_model'),
            (timm.create_model('orepa_resnet18_cifar', features_only=True), {}, 'puts out feature maps')):
        with pytest.raises(UserError, match=message):
            timm_rep.export_folder(model, tmp_path / 'model', **kwargs)
    assert names_in(tmp_path) == []


def test_what_is_fused_wrongly_is_not_exported(tmp_path, monkeypatch):
    fuse = timm_rep.hub.export.fuse
    monkeypatch.setattr(timm_rep.hub.export, 'fuse', lambda model: fused_wrongly(fuse, model))
    with pytest.raises(VerificationError, match=r'layer layer2\.0\.conv1 is off'):
        timm_rep.export_folder(training_form(), tmp_path / 'model')
    assert names_in(tmp_path) == []


@pytest.mark.skipif(OLD_TIMM, reason='this timm does not keep the arguments of a model')
def test_training_form_is_checked_as_well(tmp_path):
    import tiny_architecture
    model = randomize_(timm.create_model(tiny_architecture.NAME, num_classes=5, act_layer='silu'))
    folder = tmp_path / 'train'
    timm_rep.export_folder(model, tmp_path / 'model', training_folder=folder)
    assert config_of(folder)['model_args']['act_layer'] == 'silu'
    assert (folder / 'README.md').read_bytes() == (tmp_path / 'model' / 'README.md').read_bytes()


@pytest.mark.parametrize('model', [
    lambda: training_form(),
    lambda: timm.create_model('repan_resnet18_cifar', num_classes=5, rep_layer=timm_rep.Orepa(scaling='scalar')),
], ids=['expanded', 'options'])
def test_training_form_that_the_name_does_not_build(tmp_path, model):
    model = model()
    with pytest.raises(UserError, match='the training form cannot be exported: timm does not build its layers as'):
        timm_rep.export_folder(model, tmp_path / 'model', training_folder=tmp_path / 'train')
    timm_rep.save(model.eval(), tmp_path / 'saved.safetensors')
    output = call(
        'publish', tmp_path / 'saved.safetensors', '--repo', 'me/model', '--out', tmp_path / 'model', '--dry-run',
        '--include-training-form', code=2)
    assert output.endswith('; leave it out, or keep it with timm_rep.save\n')
    assert names_in(tmp_path) == ['saved.safetensors']


@pytest.mark.parametrize('nested', ['model', 'model/train', '.'])
def test_training_form_lies_beside_the_stock_form(tmp_path, nested):
    with pytest.raises(UserError, match='the training form needs a folder beside'):
        timm_rep.export_folder(training_form(), tmp_path / 'model', training_folder=tmp_path / nested)
    assert names_in(tmp_path) == []


def test_neither_form_stays_if_one_is_refused(tmp_path, monkeypatch):
    import tiny_architecture
    model = timm.create_model(tiny_architecture.NAME, num_classes=5)
    write = timm_rep.hub.export._write_model

    def write_stock_form(folder, model, own_fields, provenance, *args):
        if 'form' in provenance:
            raise UserError('no training form')
        write(folder, model, own_fields, provenance, *args)

    monkeypatch.setattr(timm_rep.hub.export, '_write_model', write_stock_form)
    with pytest.raises(UserError, match='no training form'):
        timm_rep.export_folder(model, tmp_path / 'model', training_folder=tmp_path / 'train')
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(('expand', 'line'), [
    (lambda stock: timm_rep.expand(stock, 'dbb'), "pretrained=True), 'dbb')"),
    (lambda stock: timm_rep.expand(stock, timm_rep.Orepa(branch_1x1=False)),
     'pretrained=True), timm_rep.Orepa(branch_1x1=False, negative_slope=None, branches=None, scaling='),
    (lambda stock: timm_rep.expand(stock, {'layer1.0.conv1': 'orepa', 'layer2.0.conv2': 'dbb'}),
     "pretrained=True), {\n    'layer1.0.conv1': 'orepa',\n    'layer2.0.conv2': 'dbb',\n})")])
def test_card_says_how_to_expand_as_the_model_was(tmp_path, expand, line):
    model = expand(timm.create_model('test_resnet', num_classes=5))
    card = (timm_rep.export_folder(model, tmp_path / 'model') / 'README.md').read_text()
    assert line in card
    assert '--pretrained-path' not in card  # which needs an architecture with rep layers
    model = eval(card.split('model = timm_rep.expand(')[1].split('pretrained=True), ')[1].split(')\n```')[0], dict(
        timm_rep=timm_rep))
    assert timm_rep.expansion_of(timm_rep.expand(timm.create_model('test_resnet'), model)).methods == (
        timm_rep.expansion_of(expand(timm.create_model('test_resnet'))).methods)


def test_annealed_model_names_its_time_steps(tmp_path):
    model = training_form('dbb')
    timm_rep.begin_time_step(model, torch.Generator().manual_seed(0))
    folder = timm_rep.export_folder(model, tmp_path / 'model')
    assert config_of(folder)['timm_rep']['time_steps'] == 2
    card = (folder / 'README.md').read_text()
    for text in ('`test_resnet`, in 2 time steps; ', 'RepAn trains in time steps', 'Enhanced Annealing'):
        assert text in card
    assert 'RepAn' not in (timm_rep.export_folder(training_form('dbb'), tmp_path / 'other') / 'README.md').read_text()


@pytest.mark.skipif(OLD_TIMM, reason='this timm does not keep the arguments of a model')
def test_arguments_that_cannot_be_written_down(tmp_path, caplog):
    """The card then says how to expand the stock form, and not how to build the training form by its name."""
    model = timm.create_model('repan_mobilenetv1_100', num_classes=5, rep_layer=timm_rep.ACB())
    kwargs = dict(data_config=dict(input_size=(3, 64, 64)), training_folder=tmp_path / 'train')
    timm_rep.export_folder(model, tmp_path / 'model', **kwargs)
    assert config_of(tmp_path / 'train')['model_args']['rep_layer'] == 'acb'
    assert not own_warnings(caplog)  # of what was tried for the card
    card = (tmp_path / 'model' / 'README.md').read_text()
    assert "pretrained=True), 'acb')" in card
    assert '--pretrained-path' not in card


@pytest.mark.skipif(OLD_TIMM, reason='this timm does not keep the arguments of a model')
def test_architecture_of_another_package(tmp_path, monkeypatch):
    """It is neither timm's, which needs no import, nor ours."""
    def their_net(pretrained=False, **kwargs):
        return timm.create_model('test_resnet', pretrained=pretrained, **kwargs)

    their_net.__module__ = 'their_package.models'
    monkeypatch.setitem(timm.models._registry._model_entrypoints, 'their_net', their_net)
    model = timm_rep.expand(timm.create_model('their_net', num_classes=5), 'orepa')
    model.pretrained_cfg['architecture'] = 'their_net'
    folder = timm_rep.export_folder(model, tmp_path / 'model')
    card = (folder / 'README.md').read_text()
    assert 'timm has no `their_net`: install their_package and import it first' in card
    assert 'import their_package  # registers' in card
    assert 'inference_mode' not in config_of(folder)['model_args']
    assert '--pretrained-path' not in card


def test_an_export_for_gray_images_says_how_to_prepare_them(tmp_path):
    model = timm.create_model('orepa_resnet18_cifar', in_chans=1, num_classes=3).eval()
    assert len(model.pretrained_cfg['mean']) == 3
    folder = timm_rep.export_folder(model, tmp_path / 'gray')
    cfg = json.loads((folder / 'config.json').read_text())['pretrained_cfg']
    assert (cfg['input_size'][0], len(cfg['mean']), len(cfg['std'])) == (1, 1, 1)
    assert cfg['mean'][0] == pytest.approx(sum(model.pretrained_cfg['mean']) / 3)
    assert "convert('L')" in (folder / 'README.md').read_text()
