"""pretrained=True with weights in training form or stock form gives what timm gives with the stock weights."""
import functools

import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
from helpers import LINEAR_RTOL, MODEL_RTOL, assert_near, assert_same_state, randn, randomize_, state_of

from timm_rep import UserError, expand, fuse, set_attach_rate
from timm_rep import save as save_file
from timm_rep.core.annealing import time_step
from timm_rep.core.walk import annealed_modules
from timm_rep.models.checkpoint_filter import checkpoint_filter_fn

# Architecture, and the kind of rep layer if it is not the default.
MODELS = [
    'orepa_resnet18', 'dbb_resnet18', 'repan_repvgg_a0', 'repan_repvgg_a0:orepa', 'repan_mobilenetv1_100:acb']
RTOL = MODEL_RTOL[torch.float32]

models = pytest.mark.parametrize('name', MODELS)
forms = pytest.mark.parametrize('form', ['training', 'stock'])


def save(state_dict, path):
    if path.suffix == '.safetensors':
        safetensors.torch.save_file({key: value.contiguous() for key, value in state_dict.items()}, path)
    else:
        torch.save(state_dict, path)


def create(name, **kwargs):
    name, _, rep_layer = name.partition(':')
    return timm.create_model(name, **dict(dict(rep_layer=rep_layer) if rep_layer else {}, **kwargs))


def load(name, file, **kwargs):
    return create(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **kwargs).eval()


def stock_name(name):
    return name.partition(':')[0].partition('_')[2]


def attach_rates(model):
    return {round(float(value), 6) for key, value in model.state_dict().items() if key.endswith('attach_rate')}


@functools.cache
def network(name):
    """The state dicts of one network in both forms."""
    model = randomize_(create(name)).eval()
    set_attach_rate(model, 0.3)
    for _, module in annealed_modules(model):
        module.time_step.fill_(2)
    return dict(training=model.state_dict(), stock=fuse(model).state_dict())


@pytest.fixture
def weights(tmp_path):
    """Writes the weights of one network in one form; a test deletes its files: together they are large."""
    def file(name, form, suffix):
        path = tmp_path / f'{name.replace(":", "-")}.{form}{suffix}'
        if not path.exists():
            save(network(name)[form], path)
        return path

    return file


@torch.no_grad()
def outputs(model, in_chans=3, classifier=True):
    x = randn(2, in_chans, 64, 64, seed=5, dtype=torch.float32)
    result = model(x) if classifier else model.forward_features(x)
    return result if isinstance(result, list) else [result]


def assert_same_outputs(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        assert_near(a, e, RTOL)


@models
@pytest.mark.parametrize(('form', 'suffix'), [('training', '.safetensors'), ('stock', '.pth')])
def test_both_forms_load(name, form, suffix, weights):
    file = weights(name, form, suffix)
    model = load(name, file)
    expected = load(stock_name(name), weights(name, 'stock', suffix))
    assert_same_outputs(outputs(model), outputs(expected))
    assert attach_rates(model) == {0.3 if form == 'training' else 1.0}
    assert time_step(model) == (2 if form == 'training' else 0)
    if form == 'training':
        assert_same_state(state_of(model), safetensors.torch.load_file(file))


@forms
@pytest.mark.parametrize(('name', 'kwargs'), [
    *((name, dict(num_classes=7, in_chans=5)) for name in MODELS),
    *((name, kwargs) for name in ('orepa_resnet18', 'repan_repvgg_a0:orepa')
      for kwargs in (dict(in_chans=1), dict(features_only=True))),
], ids=str)
def test_changed_models_load(name, form, kwargs, weights):
    suffix = '.pth' if form == 'training' else '.safetensors'
    torch.manual_seed(1)
    model = load(name, weights(name, form, suffix), **kwargs)
    assert attach_rates(model) == {0.3 if form == 'training' else 1.0}
    assert time_step(model) == (2 if form == 'training' else 0)
    expected = load(stock_name(name), weights(name, 'stock', suffix), **kwargs)
    in_chans = kwargs.get('in_chans', 3)
    classifier = kwargs.get('num_classes', 1000) != 7  # a new classifier is drawn afresh
    assert_same_outputs(outputs(model, in_chans, classifier), outputs(expected, in_chans, classifier))
    if not classifier:
        assert outputs(model, in_chans)[0].shape == (2, 7)
    fused = fuse(model).state_dict()
    for key, value in expected.state_dict().items():  # training goes on from those of the norms, the stem's, too
        if key.endswith(('running_mean', 'running_var')):
            assert_near(fused[key], value, 1e-4)


@models
def test_stock_form_of_our_model_loads_stock_weights(name, weights):
    file = weights(name, 'stock', '.safetensors')
    model = load(name, file, inference_mode=True)
    assert not list(annealed_modules(model))
    assert_same_state(state_of(model), safetensors.torch.load_file(file))
    assert_same_outputs(outputs(model), outputs(load(stock_name(name), file)))


def test_weights_of_another_architecture_raise(tmp_path):
    file = tmp_path / 'resnet34.safetensors'
    save(timm.create_model('resnet34').state_dict(), file)
    with pytest.raises(ValueError, match=r'neither the training form nor the stock form of orepa_resnet18; not exp'):
        load('orepa_resnet18', file)


@pytest.fixture(scope='module')
def small_model():
    return timm.create_model('orepa_repvgg_a0_cifar').eval()


def without(state_dict, *parts):
    return {key: value for key, value in state_dict.items() if not any(part in key for part in parts)}


def stock_form(model):
    return state_of(fuse(model))


@pytest.mark.parametrize('make', [state_of, stock_form])
@pytest.mark.parametrize(('change', 'message'), [
    (lambda s: without(s, 'stages.1.0.'), r'neither.*missing: stages\.1\.0\..* more$'),
    (lambda s: {**s, 'stages.9.weight': torch.ones(1)}, r'not expected: stages\.9\.weight$'),
    (lambda s: {}, 'neither.*missing'),
])
def test_weights_that_do_not_fit_raise_and_change_nothing(small_model, make, change, message):
    model = small_model
    before = state_of(model)
    broken = change(without(make(model), 'num_batches_tracked'))
    with pytest.raises(ValueError, match=message):
        checkpoint_filter_fn(broken, model)
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize('size', [(16, 3, 5, 5), (16, 4, 3, 3), (12, 3, 1, 1)], ids=str)
def test_kernel_of_another_shape_raises(small_model, size):
    state = stock_form(small_model)
    state['stem.conv_kxk.conv.weight'] = torch.ones(size)
    with pytest.raises(ValueError, match=r'kernel must have shape|for 3 image channels only'):
        checkpoint_filter_fn(state, small_model)


def test_mixture_of_both_forms_raises(small_model):
    mixed = {**state_of(small_model), **without(stock_form(small_model), 'stages')}
    with pytest.raises(ValueError, match=r'not expected: stem\.conv_kxk\.conv\.weight'):
        checkpoint_filter_fn(mixed, small_model)


@pytest.mark.parametrize('kind', ['rep', 'dbb', 'orepa'])
@torch.no_grad()
def test_annealed_blocks_load_stock_weights_with_all_branches_attached(kind):
    stock = randomize_(timm.create_model('repan_repvgg_a0_cifar', inference_mode=True)).eval()
    model = timm.create_model('repan_repvgg_a0_cifar', rep_layer=kind).eval()
    model.load_state_dict(checkpoint_filter_fn(state_of(stock), model))
    x = randn(2, 3, 32, 32, dtype=torch.float32)
    assert_near(model(x), stock(x), RTOL)
    assert attach_rates(model) == {1.0}
    own_branches = [key for key in stock.state_dict() if 'conv_1x1' in key or 'identity' in key]
    assert own_branches
    for key in own_branches:
        assert torch.equal(model.state_dict()[key], stock.state_dict()[key]), key


@pytest.mark.parametrize(('kind', 'other'), [('rep', 'dbb'), ('dbb', 'orepa')])
def test_weights_of_another_kind_of_layer_raise(kind, other):
    model = timm.create_model('repan_repvgg_a0_cifar', rep_layer=kind)
    before = state_of(model)
    state = state_of(timm.create_model('repan_repvgg_a0_cifar', rep_layer=other))
    with pytest.raises(ValueError, match=r'^the weights are neither the training form nor the stock form of repan'):
        checkpoint_filter_fn(state, model)
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize('kind', ['dbb', 'orepa'])
@torch.no_grad()
def test_annealed_blocks_get_a_rep_layer_on_top(kind):
    """Weights of annealed blocks are stock to the layer in the KxK branch."""
    source = randomize_(timm.create_model('repan_repvgg_a0_cifar')).eval()
    set_attach_rate(source, 0.3)
    model = timm.create_model('repan_repvgg_a0_cifar', rep_layer=kind).eval()
    model.load_state_dict(checkpoint_filter_fn(state_of(source), model))
    x = randn(2, 3, 32, 32, dtype=torch.float32)
    assert_near(model(x), source(x), RTOL)


def test_stock_form_refuses_weights_in_training_form():
    stock = timm.create_model('repan_repvgg_a0_cifar', inference_mode=True)
    state = state_of(timm.create_model('repan_repvgg_a0_cifar', rep_layer='dbb'))
    with pytest.raises(ValueError, match=r'in training form, but this repan_repvgg_a0_cifar is in stock form'):
        checkpoint_filter_fn(state, stock)


@pytest.mark.parametrize('method', ['orepa', 'dbb', 'acb', 'rep'])
def test_weights_of_a_layer_with_bias_load(method):
    """A stock model whose convolutions have a bias, expanded by hand: no pretrained_cfg to go by."""
    stock = randomize_(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))).eval()
    model = expand(stock, method)
    model[0].reset_parameters()
    model.load_state_dict(checkpoint_filter_fn(state_of(stock), model))
    x = randn(2, 3, 9, 9, dtype=torch.float32)
    assert_near(model(x), stock(x), 1e-6)


ROUND_TRIPS = [
    ('orepa_resnet18_cifar', {}),
    ('dbb_resnet18_cifar', {}),
    ('repan_repvgg_a0_cifar', {}),
    ('repan_resnet18_cifar', dict(rep_layer='acb')),
    ('repan_repvgg_a0_cifar', dict(rep_layer='orepa')),
    ('repan_repvgg_a0_cifar', dict(rep_layer='dbb')),
]


@pytest.mark.parametrize(('name', 'kwargs'), ROUND_TRIPS[:3])
@pytest.mark.parametrize('in_chans', [3, 1])
@pytest.mark.filterwarnings('ignore:.*copying from a non-meta parameter')
def test_weights_on_the_cpu_load_into_a_model_on_another_device(name, kwargs, in_chans):
    model = timm.create_model(name, **kwargs)
    other = timm.create_model(name, in_chans=in_chans, **kwargs).to('meta')
    for state in (state_of(model), state_of(fuse(model.eval()))):
        loaded = checkpoint_filter_fn(state, other)
        assert loaded.keys() == other.state_dict().keys()
        assert {key: value.shape for key, value in loaded.items()} == {
            key: value.shape for key, value in other.state_dict().items()}


@pytest.mark.parametrize(('name', 'kwargs'), ROUND_TRIPS)
def test_training_form_to_stock_form_and_back_twice(name, kwargs):
    model = randomize_(timm.create_model(name, **kwargs)).double().eval()
    set_attach_rate(model, 0.6)
    x = randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        for _ in range(2):
            stock = fuse(model)
            assert_near(stock(x), expected, MODEL_RTOL[torch.float64])
            model = timm.create_model(name, **kwargs).double().eval()
            model.load_state_dict(checkpoint_filter_fn(stock.state_dict(), model))
            assert_near(model(x), expected, MODEL_RTOL[torch.float64])
        again = fuse(model)
    assert again.state_dict().keys() == stock.state_dict().keys()
    if name.startswith('orepa_'):  # nothing but the kernels changes form
        for key, value in stock.state_dict().items():
            if value.ndim == 4:
                assert_near(again.state_dict()[key], value, LINEAR_RTOL[torch.float64])


@torch.no_grad()
@pytest.mark.parametrize('name', ['dbb_resnet18_cifar', 'repan_repvgg_a0_cifar'])
def test_kernels_behind_gains_of_zero_are_kept(name, tmp_path):
    stock = randomize_(timm.create_model(name, inference_mode=True)).eval()
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight[::3] = 0
    torch.save(stock.state_dict(), tmp_path / 'stock.pth')
    kwargs = dict(rep_layer='dbb') if name.startswith('repan') else {}
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'stock.pth')), **kwargs).eval()
    x = randn(1, 3, 32, 32, dtype=torch.float32)
    assert_near(model(x), stock(x), 1e-4)
    fused = fuse(model)
    for key in (key for key in stock.state_dict() if key.endswith(('conv1.weight', 'conv_kxk.conv.weight'))):
        assert (fused.get_parameter(key)[::3].abs().amax((1, 2, 3)) > 0).all(), key


def test_damaged_files_are_not_loaded(tmp_path):
    model = timm.create_model('orepa_repvgg_a0_cifar')
    files = [tmp_path / 'x.safetensors', tmp_path / 'x.pth']
    save_file(model, files[0])
    torch.save(model.state_dict(), files[1])
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(UserError, match=r'is not loaded: .*damaged'):
            timm.create_model('orepa_repvgg_a0_cifar', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))


@pytest.mark.parametrize('strict', [True, False])
def test_weights_with_branches_in_other_layers_are_not_all_called_stock(strict):
    said = 'weights of conv1 are in stock form.* else they are of a model with branches in other layers'
    with pytest.raises(RuntimeError, match=said):
        create('orepa_resnet18').load_state_dict(create('dbb_resnet18').state_dict(), strict=strict)


@pytest.mark.parametrize('name', ['dbb_resnet18', 'repan_repvgg_a0', 'repan_repvgg_a0:orepa'])
def test_checkpoint_path_takes_the_training_form_and_says_what_takes_the_other(name, tmp_path):
    """As ``--initial-checkpoint`` of timm's train.py."""
    paths = dict(training=tmp_path / 'training.safetensors', stock=tmp_path / 'stock.pth')
    for form, path in paths.items():
        save(network(name)[form], path)
    assert_same_state(create(name, checkpoint_path=str(paths['training'])).state_dict(), network(name)['training'])
    said = r'weights of \S+ are in stock form.* pretrained_cfg_overlay=dict\(file='
    with pytest.raises(RuntimeError, match=said) as error:
        create(name, checkpoint_path=str(paths['stock']))
    assert str(error.value).count('in stock form') == 1
    model = create(name)
    with pytest.raises(RuntimeError, match='in stock form'):  # what was drawn would stay
        model.load_state_dict(network(name)['stock'], strict=False)
    others = network('dbb_resnet18' if 'repvgg' in name else 'repan_repvgg_a0')['training']
    with pytest.raises(RuntimeError, match='Missing key') as error:
        model.load_state_dict(others)
    assert 'in stock form' not in str(error.value)
    model.load_state_dict({}, strict=False)
