"""Rep layers in and out of models: same function, stock module tree, and nothing changed by an error."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from helpers import (
    DEPLOY_RTOL,
    MODEL_RTOL,
    TINY_MODELS,
    assert_near,
    assert_same_state,
    layer_types,
    randn,
    randomize_,
    state_of,
    tiny_repvgg,
    tiny_resnet,
    tree,
    with_compiled_parts,
)
from timm.models.byobnet import RepVggBlock
from timm.utils import reparameterize_model

import timm_rep
from timm_rep import (
    AsymmetricConv2d,
    DiverseBranchConv2d,
    OrepaConv2d,
    OrepaPointwiseConv2d,
    OrepaStemConv2d,
    RepConv2d,
    expand,
    fuse,
    rep_layers,
    set_attach_rate,
)
from timm_rep.core.expand import anneal_repvgg_blocks_
from timm_rep.core.layers import AnnealedRepVggBlock
from timm_rep.core.walk import annealed_modules, image_channels, image_shape

# Every method in every tiny model; one of each kind of module tree.
TINY = [(name, layer) for layer in ('orepa', 'dbb', 'acb', 'rep') for name in TINY_MODELS]
KINDS = [('bottleneck', 'orepa'), ('basic', 'dbb'), ('repvgg', 'acb'), ('repvgg', 'rep')]

kinds = pytest.mark.parametrize(('name', 'layer'), KINDS)


def stock_model(name, dtype=torch.float32):
    return randomize_(TINY_MODELS[name]()).to(dtype).eval()


def rep_model(name, layer, dtype=torch.float32, rate=0.3):
    """A tiny model in training form with wide random values, in eval mode."""
    model = randomize_(expand(TINY_MODELS[name](), layer)).to(dtype).eval()
    set_attach_rate(model, rate)
    return model


def images(dtype=torch.float32, batch=2, size=64):
    return randn(batch, 3, size, size, seed=5, dtype=dtype)


def annealed_types(model):
    return {name: type(module) for name, module in annealed_modules(model)}


# Fuse


@pytest.mark.parametrize(('name', 'layer', 'dtype', 'rate'), [
    *((*case, torch.float64, 0.3) for case in TINY),
    *((*case, torch.float32, 1.0) for case in KINDS),
    ('repvgg', 'rep', torch.float64, 0.0),
], ids=str)
@torch.no_grad()
def test_fusing_keeps_the_outputs(name, layer, dtype, rate):
    model = rep_model(name, layer, dtype, rate)
    before = state_of(model)
    fused = fuse(model)
    assert tree(fused) == tree(TINY_MODELS[name]())
    assert not any(module.training for module in fused.modules())
    expected = model(images(dtype))
    assert_near(fused(images(dtype)), expected, MODEL_RTOL[dtype])
    assert_same_state(state_of(model), before)
    assert_near(reparameterize_model(fused)(images(dtype)), expected, DEPLOY_RTOL[dtype])
    assert_near(reparameterize_model(model)(images(dtype)), expected, DEPLOY_RTOL[dtype])
    assert_same_state(state_of(fuse(fused)), state_of(fused))


@pytest.mark.parametrize(('name', 'layer'), [
    ('basic', 'orepa'), ('bottleneck', 'orepa'), ('repvgg', 'orepa'),
    ('repvgg', 'rep'),  # the rate goes into the gains of the blocks' own branches
])
def test_fusing_in_training_mode_keeps_outputs_and_mode(name, layer):
    model = rep_model(name, layer, torch.float64).train()
    fused = fuse(model)
    assert all(module.training for module in fused.modules())
    assert_near(fused(images(torch.float64)), model(images(torch.float64)), 1e-9)


@pytest.mark.parametrize('layer', ['dbb', 'acb', 'rep'])
def test_fusing_normed_layers_in_training_mode_raises_and_changes_nothing(layer):
    model = rep_model('basic', layer).train()
    before, modules = state_of(model), tree(model)
    with pytest.raises(ValueError, match=r'in training mode.*model\.eval\(\)'):
        fuse(model, inplace=True)
    assert_same_state(state_of(model), before)
    assert tree(model) == modules


@kinds
def test_fusing_in_place(name, layer):
    model = rep_model(name, layer)
    expected = fuse(model)
    assert fuse(model, inplace=True) is model
    assert_same_state(state_of(model), state_of(expected))


def test_fusing_a_layer_alone_is_refused():
    with pytest.raises(ValueError, match="use the layer's own fuse"):
        fuse(OrepaConv2d(3, 4, 3))


def test_fusing_our_own_networks_names_the_stock_form():
    fused = fuse(timm.create_model('orepa_resnet18_cifar', num_classes=3))
    assert not list(rep_layers(fused))
    assert fused.pretrained_cfg['architecture'] == 'orepa_resnet18_cifar'
    other = timm.create_model('orepa_resnet18_cifar', num_classes=3, inference_mode=True)
    other.load_state_dict(fused.state_dict(), strict=True)


# Expand


@pytest.mark.parametrize(('name', 'layer', 'dtype'), [
    *((*case, torch.float64) for case in TINY), *((*case, torch.float32) for case in KINDS)], ids=str)
@torch.no_grad()
def test_expanding_keeps_the_outputs_and_fusing_gives_the_model_back(name, layer, dtype):
    model = stock_model(name, dtype)
    before = state_of(model)
    expanded = expand(model, layer, generator=torch.Generator().manual_seed(0))
    again = expand(model, layer, generator=torch.Generator().manual_seed(0))
    assert type(expanded) is type(model)
    assert annealed_types(expanded)
    assert_same_state(state_of(expanded), state_of(again))
    expected = model(images(dtype))
    assert_near(expanded(images(dtype)), expected, MODEL_RTOL[dtype])
    fused = fuse(expanded)
    assert tree(fused) == tree(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert_near(fused(images(dtype)), expected, MODEL_RTOL[dtype])
    assert_same_state(state_of(model), before)
    assert not annealed_types(model)


@pytest.mark.parametrize(('name', 'layer'), [
    ('resnext50_32x4d', 'dbb'),
    ('repvgg_a0', 'rep'),
    ('regnetx_002', 'orepa'),
    ('efficientnet_lite0', 'orepa'),
    ('mobilenetv1_100', 'acb'),
])
@torch.no_grad()
def test_expanding_a_timm_model(name, layer):
    model = randomize_(timm.create_model(name)).eval()
    expanded = expand(model, layer)
    expected = model(images())
    assert annealed_types(expanded)
    assert_near(expanded(images()), expected, MODEL_RTOL[torch.float32])
    fused = fuse(expanded)
    assert tree(fused) == tree(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert fused.pretrained_cfg == model.pretrained_cfg
    assert_near(fused(images()), expected, MODEL_RTOL[torch.float32])


@pytest.mark.parametrize('make', [
    tiny_resnet,
    tiny_repvgg,
    lambda: timm.create_model('mobilenetv1_100'),
], ids=['resnet', 'repvgg', 'mobilenetv1_100'])
def test_expanding_keeps_the_outputs_in_training_mode_for_linear_layers(make):
    model = randomize_(make()).double().train()
    expanded = expand(model)
    assert all(module.training for module in expanded.modules())
    x = images(torch.float64, batch=4)
    assert_near(expanded(x), model(x), 1e-9)
    running = {name: tensor for name, tensor in expanded.state_dict().items() if 'running' in name}
    for name, tensor in running.items():
        assert_near(tensor, model.state_dict()[name], 1e-9)


@torch.no_grad()
def test_selecting_convolutions():
    model = stock_model('basic')
    assert set(layer_types(expand(model, select='layer2.*'))) == {
        'layer2.0.conv1', 'layer2.0.conv2', 'layer2.0.downsample.0'}
    assert set(layer_types(expand(model, select=['conv1', 'layer4.*.conv?']))) == {
        'conv1', 'layer4.0.conv1', 'layer4.0.conv2'}
    strided = expand(model, select=lambda name, conv: conv.stride == (2, 2) and name != 'conv1')
    assert set(layer_types(strided)) == {
        f'layer{n}.0.{name}' for n in (2, 3, 4) for name in ('conv1', 'downsample.0')}
    assert_near(strided(images()), model(images()), MODEL_RTOL[torch.float32])
    assert set(layer_types(expand(model, 'dbb', select='layer2.0.conv1'))) == {'layer2.0.conv1'}


@torch.no_grad()
def test_selected_convolutions_need_no_norm_behind_them():
    model = timm.create_model('convnext_atto').eval()
    expanded = expand(model, select='stages.[01].*.conv_dw')
    assert set(layer_types(expanded).values()) == {OrepaConv2d}
    assert_near(expanded(images()), model(images()), MODEL_RTOL[torch.float32])
    assert tree(fuse(expanded)) == tree(model)


def test_expanding_in_place():
    model = stock_model('basic')
    expected = expand(model, generator=torch.Generator().manual_seed(0))
    assert expand(model, generator=torch.Generator().manual_seed(0), inplace=True) is model
    assert_same_state(state_of(model), state_of(expected))


class Shared(nn.Module):
    """One convolution at two places, with one norm for both or one for each."""

    def __init__(self, own_norms):
        super().__init__()
        conv, norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.first = nn.Sequential(conv, norm)
        self.second = nn.Sequential(conv, nn.BatchNorm2d(4) if own_norms else norm)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize('own_norms', [True, False])
@torch.no_grad()
def test_shared_convolution_stays_shared(own_norms):
    model = randomize_(Shared(own_norms)).eval()
    x = randn(2, 4, 9, 9, dtype=torch.float32)
    expanded = expand(model)
    assert expanded.first[0] is expanded.second[0]
    assert len(list(rep_layers(expanded))) == 1
    assert_near(expanded(x), model(x), 1e-5)
    fused = fuse(expanded)
    assert fused.first[0] is fused.second[0]
    assert tree(fused) == tree(model)
    assert_near(fused(x), model(x), 1e-5)


@pytest.mark.parametrize('layer', ['dbb', 'acb', 'rep'])
@torch.no_grad()
def test_shared_convolution_with_a_norm_in_its_branches(layer):
    model = randomize_(Shared(own_norms=False)).eval()
    x = randn(2, 4, 9, 9, dtype=torch.float32)
    expanded = expand(model, layer)
    assert_near(expanded(x), model(x), 1e-5)
    fused = fuse(expanded)
    assert tree(fused) == tree(model)
    assert_near(fused(x), model(x), 1e-5)


class SharedBlock(nn.Module):
    """One RepVGG block at two places."""

    def __init__(self):
        super().__init__()
        self.first = self.second = RepVggBlock(4, 4)

    def forward(self, x):
        return self.second(self.first(x))


@torch.no_grad()
def test_shared_block_stays_shared():
    model = randomize_(SharedBlock()).eval()
    x = randn(2, 4, 9, 9, dtype=torch.float32)
    expanded = expand(model, 'rep')
    assert expanded.first is expanded.second
    assert annealed_types(expanded) == dict(first=AnnealedRepVggBlock)
    assert_near(expanded(x), model(x), 1e-5)
    set_attach_rate(expanded, 0.3)
    fused = fuse(expanded)
    assert fused.first is fused.second
    assert tree(fused) == tree(model)
    assert_near(fused(x), expanded(x), 1e-5)


def test_one_branched_layer_cannot_stand_for_two_norms():
    model = Shared(own_norms=True)
    modules = tree(model)
    with pytest.raises(ValueError, match='no convolution of Shared'):
        expand(model, 'dbb', inplace=True)
    with pytest.raises(ValueError, match='shared'):
        expand(model, 'dbb', inplace=True, select=lambda name, conv: True)
    assert tree(model) == modules


@pytest.mark.parametrize(('model', 'got'), [('resnet18', "'resnet18'"), (dict(), 'an object of dict')])
@pytest.mark.parametrize('name', ['expand', 'fuse', 'expansion_of', 'capture', 'verify', 'save', 'export_folder'])
def test_what_is_no_model_is_told_so(name, model, got, tmp_path):
    second = [tmp_path / 'x.safetensors'] * (name in ('verify', 'save', 'export_folder'))
    with pytest.raises(ValueError, match=f'a model .torch.nn.Module. is needed, got {got}; timm.create_model makes'):
        getattr(timm_rep, name)(model, *second)


@pytest.mark.parametrize(('make', 'kwargs', 'message'), [
    (tiny_resnet, dict(method='acnet'), "unknown method 'acnet'; allowed are 'orepa', 'dbb', 'acb', 'rep'"),
    (tiny_resnet, dict(select='layer9.*'), "no nn.Conv2d of ResNet matches 'layer9"),
    (tiny_resnet, dict(select=['layer1.*', 'fc']), "no nn.Conv2d of ResNet matches 'fc'"),
    (tiny_resnet, dict(select=lambda name, conv: False), "no convolution of ResNet to expand with 'orepa'; select="),
    (tiny_resnet, dict(method='dilated'), "to expand with 'dilated'; its own choice leaves them all, select= takes"),
    (tiny_resnet, dict(method='dbb', select='layer1.0.downsample.0'), r'cannot expand layer1\.0\.downsample\.0.*1x1'),
    (lambda: timm.create_model('convnext_atto'), dict(method='dbb'), 'need a BatchNorm2d, here are LayerNorm2d'),
    (lambda: timm.create_model('convnext_atto'), dict(select='stem.*'), r'cannot expand stem\.0: .*odd kernel size'),
    (lambda: timm.create_model('convnext_atto'), dict(method='dbb', select='stages.0.*.conv_dw'), 'has a LayerNorm2d'),
    (tiny_resnet, dict(method='rep', select='layer1.0.downsample.0'), r'cannot expand layer1\.0\.downsample\.0.*1x1'),
    (lambda: expand(tiny_repvgg(), 'rep'), dict(method='rep'), "no convolution of ByobNet to expand with 'rep'"),
    (lambda: expand(tiny_resnet(), 'acb'), dict(method='acb'), "no convolution of ResNet to expand with 'acb'"),
    (lambda: expand(tiny_resnet(), 'rep'), dict(select='*conv_kxk'), 'no nn.Conv2d of ResNet matches'),
    (lambda: reparameterize_model(tiny_repvgg().eval()), dict(method='rep'), 'no convolution of ByobNet to expand'),
    (lambda: nn.Conv2d(3, 4, 3), dict(select='*'), "layer's from_conv"),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), dict(method='dbb', select='0'), '0 has none'),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding_mode='reflect')), dict(select='0'), "got 'reflect'"),
    (lambda: nn.Sequential(nn.Linear(3, 4)), {}, 'no convolution of Sequential to expand'),
])
def test_impossible_expansion_raises_and_changes_nothing(make, kwargs, message):
    model = make()
    before, modules = state_of(model), tree(model)
    with pytest.raises(ValueError, match=message):
        expand(model, **kwargs, inplace=True)
    assert tree(model) == modules
    assert_same_state(state_of(model), before)


# The papers' swap policy


def test_policy_for_basic_blocks():
    types = layer_types(timm.create_model('orepa_resnet18', device='meta'))
    assert types.pop('conv1') is OrepaStemConv2d
    assert set(types) == {f'layer{n}.{b}.conv{c}' for n in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)}
    assert set(types.values()) == {OrepaConv2d}


def test_policy_for_bottlenecks():
    model = timm.create_model('orepa_resnet50', device='meta')
    types = layer_types(model)
    assert types.pop('conv1') is OrepaStemConv2d
    for name, cls in types.items():
        assert cls is (OrepaConv2d if name.endswith('conv2') else OrepaPointwiseConv2d), name
    assert {name for name in types if 'downsample' in name} == {f'layer{n}.0.downsample.0' for n in (1, 2, 3, 4)}
    assert not [name for name, module in model.named_modules() if type(module) is nn.Conv2d]


def test_policy_for_repvgg():
    model = timm.create_model('orepa_repvgg_a0', device='meta')
    layers = dict(rep_layers(model))
    assert set(layers) == {name for name, _ in model.named_modules() if name.endswith('conv_kxk.conv')}
    for layer in layers.values():
        assert type(layer) is OrepaConv2d
        assert layer.branch_names == ('origin', 'average', 'prior', 'separable', 'sequential')
        assert layer.negative_slope == 1.0
    plain = {name for name, module in model.named_modules() if type(module) is nn.Conv2d}
    assert plain == {name.replace('conv_kxk', 'conv_1x1') for name in layers}


def test_policy_for_dbb():
    types = layer_types(timm.create_model('dbb_resnet50', device='meta'))
    assert set(types.values()) == {DiverseBranchConv2d}
    assert len(types) == 16
    assert all(name.endswith('conv2') for name in types)
    assert len(layer_types(timm.create_model('dbb_resnet18', device='meta'))) == 16


@pytest.mark.parametrize(('layer', 'cls'), [
    ('acb', AsymmetricConv2d), ('rep', RepConv2d), ('dbb', DiverseBranchConv2d)])
def test_policy_for_layers_with_norms(layer, cls):
    types = annealed_types(expand(tiny_resnet('bottleneck'), layer))
    assert types == {f'layer{n}.0.conv2': cls for n in (1, 2, 3, 4)}
    types = annealed_types(expand(timm.create_model('mobilenetv1_100', device='meta'), layer))
    assert set(types) == {'conv_stem', *(name for name in types if name.endswith('.conv_dw'))}
    assert len(types) == 14
    assert set(types.values()) == {cls}


def test_policy_for_blocks_of_repvgg():
    blocks = {name for name, module in tiny_repvgg().named_modules() if isinstance(module, RepVggBlock)}
    expanded = expand(tiny_repvgg(), 'rep')
    assert annealed_types(expanded) == dict.fromkeys(blocks, AnnealedRepVggBlock)
    assert not list(rep_layers(expanded))
    for layer, cls in dict(dbb=DiverseBranchConv2d, acb=AsymmetricConv2d).items():
        expanded = expand(tiny_repvgg(), layer)
        assert annealed_types(expanded) == dict.fromkeys(blocks, AnnealedRepVggBlock)
        assert layer_types(expanded) == {f'{name}.conv_kxk.conv': cls for name in blocks}
    expanded = expand(tiny_repvgg(), 'orepa')
    assert annealed_types(expanded) == {f'{name}.conv_kxk.conv': OrepaConv2d for name in blocks}
    assert anneal_repvgg_blocks_(expanded) is expanded
    assert annealed_types(expanded) == dict.fromkeys(blocks, AnnealedRepVggBlock)
    assert layer_types(expanded) == {f'{name}.conv_kxk.conv': OrepaConv2d for name in blocks}


def test_small_image_stem_is_one_block():
    types = layer_types(timm.create_model('orepa_resnet18_cifar', device='meta'))
    assert types['conv1'] is OrepaConv2d


# Walking


def test_walker_yields_the_outermost_layers_once():
    model = rep_model('basic', 'orepa')
    names = [name for name, _ in rep_layers(model)]
    assert names[0] == 'conv1'
    assert not [name for name in names if 'stack' in name]
    assert [name for name, _ in rep_layers(model.conv1)] == ['']
    assert not list(rep_layers(tiny_resnet()))


def test_setting_the_attach_rate_reaches_every_layer():
    model = rep_model('basic', 'orepa')
    set_attach_rate(model, 0.25)
    assert {layer.attach_rate.item() for _, layer in rep_layers(model)} == {0.25}
    for rate in (2.0, -0.1, float('nan')):
        for some_model in (model, tiny_resnet()):
            with pytest.raises(ValueError, match=r'attach rate must lie in \[0, 1\], got'):
                set_attach_rate(some_model, rate)
    assert {layer.attach_rate.item() for _, layer in rep_layers(model)} == {0.25}
    other = copy.deepcopy(model)
    set_attach_rate(other, 1.0)
    other.load_state_dict(model.state_dict())
    assert {layer.attach_rate.item() for _, layer in timm_rep.rep_layers(other)} == {0.25}


def test_channels_of_images_are_not_those_that_space_was_folded_into():
    with torch.device('meta'):
        model = timm.create_model('tresnet_m')
        other = nn.Sequential(nn.ReLU(), nn.Conv2d(5, 4, 3))
    assert image_channels(model) == 3
    assert image_channels(expand(model, 'orepa')) == 3
    assert image_channels(other) == image_channels(with_compiled_parts(other)) == 5


def test_images_of_a_network_that_was_built_for_another_size():
    with torch.device('meta'):
        model = timm.create_model('visformer_tiny', img_size=64)
    if not hasattr(model, '_model_args'):
        pytest.skip('this timm does not keep the arguments of a model')
    assert image_shape(model) == image_shape(expand(model, 'orepa')) == (3, 64, 64)
    assert image_shape(nn.Sequential(nn.Conv2d(5, 4, 3))) is None
