"""The registered architectures, and timm's own checks that are limited to timm's module names."""
import math
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn as nn
from helpers import MODEL_RTOL, assert_near, assert_same_state, randn, randomize_, state_of, tree
from timm.models import FeatureInfo
from timm.models.byobnet import RepVggBlock

from timm_rep import (
    AsymmetricConv2d,
    DiverseBranchConv2d,
    OrepaConv2d,
    OrepaPointwiseConv2d,
    RepConv2d,
    UserError,
    fuse,
    rep_layers,
    set_attach_rate,
)
from timm_rep.core.layers import AnnealedRepVggBlock
from timm_rep.core.walk import annealed_modules
from timm_rep.models.names import stock_architecture

# without those that other tests register
NAMES = timm.list_models(['orepa_*', 'dbb_*', 'repan_*'], exclude_filters='*_test_*')
# One of each network, with linear layers, with normed ones, and with annealed blocks.
one_of_each_network = pytest.mark.parametrize('name', [
    'orepa_resnet18', 'repan_repvgg_a0_cifar', 'repan_mobilenetv1_100'])


def millions(model):
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def images(size=64, batch=2):
    return randn(batch, 3, size, size, seed=5, dtype=torch.float32)


def test_the_promised_names_are_registered():
    resnets = ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet18_cifar')
    repvggs = ('a0', 'a1', 'a2', 'b0', 'b1', 'b1g4', 'a0_cifar', 'a1_cifar', 'a2_cifar', 'b0_cifar')
    assert set(NAMES) >= {
        *(f'{layer}_{name}' for layer in ('orepa', 'dbb', 'repan') for name in resnets),
        *(f'{layer}_repvgg_{name}' for layer in ('orepa', 'repan') for name in repvggs),
        'repan_mobilenetv1_100',
        'orepa_wide_resnet18_2',
        'orepa_resnext50_32x4d',
    }


def shapes(model):
    return {key: value.shape for key, value in model.state_dict().items()}


@pytest.mark.parametrize('name', NAMES)
def test_stock_form_is_timms(name):
    """On the meta device: names and shapes only."""
    model = timm.create_model(name, device='meta', inference_mode=True)
    assert not list(annealed_modules(model))
    small = name.endswith('_cifar')
    size = 32 if small else 320 if name.endswith('_d2se') else 224
    assert model.pretrained_cfg['input_size'] == (3, size, size)
    assert model.num_classes == model.pretrained_cfg['num_classes'] == (10 if small else 1000)
    stock_name = name.partition('_')[2]
    if timm.is_model(stock_name):
        stock = timm.create_model(stock_name, device='meta')
        assert type(model) is type(stock)
        assert tree(model) == tree(stock)
        assert shapes(model) == shapes(stock)
        assert model.feature_info == stock.feature_info


@pytest.mark.parametrize('name', [
    'orepa_resnet50', 'dbb_resnet18', 'repan_resnet18', 'orepa_resnext50_32x4d', 'orepa_wide_resnet18_2',
    'orepa_resnet18_cifar', 'orepa_repvgg_a0', 'orepa_repvgg_d2se', 'repan_repvgg_b1g4', 'repan_repvgg_a0_cifar',
    'repan_mobilenetv1_100'])
def test_training_form_fuses_into_the_stock_form(name):
    """On the meta device: names and shapes only."""
    model = timm.create_model(name, device='meta').eval()
    stock = timm.create_model(name, device='meta', inference_mode=True)
    assert list(annealed_modules(model))
    assert model.pretrained_cfg['input_size'] == stock.pretrained_cfg['input_size']
    assert type(model) is type(stock)
    assert model.feature_info == stock.feature_info
    assert (millions(model) > millions(stock)) == bool(list(rep_layers(model)))  # else RepVGG's own branches
    fused = fuse(model)
    assert shapes(fused) == shapes(stock)
    assert tree(fused) == tree(stock)


@pytest.mark.parametrize(('name', 'expected'), [
    ('orepa_resnet18', 37.8), ('orepa_resnet50', 68.6), ('dbb_resnet18', 26.3), ('dbb_resnet50', 40.7)])
def test_parameter_count(name, expected):
    assert millions(timm.create_model(name, device='meta')) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize('name', [
    'orepa_resnet18', 'dbb_resnet18', 'repan_mobilenetv1_100', 'orepa_repvgg_a0_cifar', 'repan_repvgg_a0_cifar'])
def test_training_step_gives_every_parameter_a_gradient(name):
    model = randomize_(timm.create_model(name, num_classes=5)).train()
    model(images(32, batch=4)).square().sum().backward()
    missing = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    model.eval()
    with torch.no_grad():
        assert_near(fuse(model)(images(32)), model(images(32)), MODEL_RTOL[torch.float32])


@pytest.mark.parametrize('name', [
    'repan_mobilenetv1_100', 'orepa_repvgg_a0', 'repan_resnet18_cifar', 'orepa_wide_resnet18_2',
    'repan_repvgg_a0_cifar'])
def test_feature_maps_are_those_of_feature_info(name):
    model = timm.create_model(name, features_only=True, device='meta').eval()
    maps = model(torch.empty(2, 3, 64, 64, device='meta'))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [m.shape[2] for m in maps] == [64 // reduction for reduction in model.feature_info.reduction()]


@pytest.mark.parametrize(('name', 'kwargs'), [
    ('repan_mobilenetv1_100', {}),
    ('repan_mobilenetv1_100', dict(rep_layer='orepa', out_indices=(1, 3), in_chans=1, output_stride=16)),
    ('repan_mobilenetv1_100', dict(feature_location='expansion')),
    ('repan_mobilenetv1_100', dict(feature_cls='hook')),
    ('repan_repvgg_a0', dict(feature_cls='fx')),
    ('dbb_resnet18', dict(feature_cls='fx', out_indices=(-2, -1))),
])
@torch.no_grad()
def test_fused_feature_extractor_is_timms(name, kwargs):
    model = randomize_(timm.create_model(name, features_only=True, **kwargs)).double().eval()
    of_stock = {key: value for key, value in kwargs.items() if key != 'rep_layer'}
    stock = timm.create_model(stock_architecture(name), features_only=True, **of_stock).double().eval()
    fused = fuse(model).eval()  # a deep copy of a traced graph is in training mode
    assert type(fused) is type(stock)
    stock.load_state_dict(fused.state_dict())
    assert fused.feature_info.get_dicts() == stock.feature_info.get_dicts()
    assert [fused.pretrained_cfg.get(key) for key in ('architecture', 'num_classes', 'classifier')] == [
        stock.pretrained_cfg.get(key) for key in ('architecture', 'num_classes', 'classifier')]
    x = randn(1, kwargs.get('in_chans', 3), 32, 32)
    maps = [net(x) for net in (model, fused, stock)]
    assert len(maps[0]) == len(maps[2]) == len(kwargs.get('out_indices', range(5)))
    for of_model, *others in zip(*maps):
        for other in others:
            assert_near(other, of_model, MODEL_RTOL[torch.float64])


def test_small_image_shapes():
    resnet = timm.create_model('orepa_resnet18_cifar', device='meta')
    assert (resnet.conv1.kernel_size, resnet.conv1.stride) == ((3, 3), (1, 1))
    assert type(resnet.maxpool) is nn.Identity
    for variant, stem, widths in (
            ('a0', 12, [12, 24, 48, 160]),  # the first stage is no multiple of 8, as timm would have it
            ('a1', 16, [16, 32, 64, 160]), ('a2', 16, [24, 48, 96, 176]), ('b0', 16, [16, 32, 64, 160])):
        repvgg = timm.create_model(f'orepa_repvgg_{variant}_cifar', device='meta')
        stem_conv = repvgg.stem.conv_kxk.conv
        assert (stem_conv.out_channels, stem_conv.stride) == (stem, (1, 1))
        first = [stage[0].conv_kxk.conv for stage in repvgg.stages]
        assert [conv.stride[0] for conv in first] == [1, 2, 2, 1]
        assert [conv.out_channels for conv in first] == widths


def test_wide_resnet_doubles_all_widths():
    wide = timm.create_model('orepa_wide_resnet18_2', device='meta')
    plain = timm.create_model('orepa_resnet18', device='meta')
    assert (wide.conv1.kernel_size, wide.conv1.stride) == (plain.conv1.kernel_size, plain.conv1.stride)
    pairs = zip(wide.named_modules(), plain.named_modules())
    widths = [(key, a.num_features, b.num_features) for (key, a), (_, b) in pairs if isinstance(a, nn.BatchNorm2d)]
    assert all(a == 2 * b for _, a, b in widths)
    assert [key for key, _, _ in widths] == [key for key, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)]


def plain_modules(model):
    """Convolutions and classifier that are no parts of rep layers, by name."""
    layers = [key for key, _ in rep_layers(model)]
    return {
        key: module for key, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not any(key.startswith(f'{layer}.') for layer in layers)
    }


@pytest.mark.parametrize(('name', 'plain', 'kwargs'), [
    ('orepa_resnet18', 4, {}), ('orepa_repvgg_a0', 23, {}),
    ('repan_resnet18_cifar', 4, dict(rep_layer='orepa'))], ids=str)
def test_orepa_networks_start_as_the_official_ones(name, plain, kwargs):
    """All norms at gain one, and torch's own values where there are no OREPA layers: U(-b, b), b = 1 / sqrt(fan_in)."""
    model = timm.create_model(name, **kwargs)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        assert (norm.weight == 1).all()
        assert not norm.bias.any()
    modules = plain_modules(model)
    assert len(modules) == plain
    for key, module in modules.items():
        for values in (module.weight, module.bias):
            if values is not None:
                bound = module.weight[0].numel() ** -0.5
                assert values.abs().max() <= bound * (1 + 1e-6), key
                assert values.std().item() == pytest.approx(bound / 3 ** 0.5, rel=4 / values.numel() ** 0.5), key


@pytest.mark.parametrize(('name', 'kwargs'), [
    ('dbb_resnet18_cifar', {}), ('orepa_resnet18_cifar', dict(zero_init_last=True))], ids=str)
def test_residual_block_starts_as_its_shortcut(name, kwargs):
    """timm's choice, carried over to the branches; with OREPA layers only if it is asked for."""
    x = randn(1, 64, 8, 8, dtype=torch.float32)
    block = timm.create_model(name, **kwargs).layer1[0].eval()
    assert torch.equal(block(x), x.relu())
    block = timm.create_model(name, zero_init_last=False).layer1[0].eval()
    assert not torch.allclose(block(x), x.relu(), atol=0.1)


@pytest.mark.parametrize('name', ['orepa_resnet18_cifar', 'orepa_wide_resnet18_2'])
@torch.no_grad()
def test_norms_of_any_kind(name):
    model, x = timm.create_model(name, norm_layer='groupnorm', num_classes=3).eval(), randn(1, 3, 32, 32).float()
    assert_near(fuse(model)(x), model(x), 1e-5)
    with pytest.raises(UserError, match='GroupNorm'):
        timm.create_model('repan_resnet18_cifar', norm_layer='groupnorm')


def test_stock_form_starts_as_timms():
    states = []
    for name, kwargs in dict(orepa_resnet18=dict(inference_mode=True), resnet18={}).items():
        torch.manual_seed(0)
        states.append(state_of(timm.create_model(name, **kwargs)))
    assert_same_state(*states)


def test_repvgg_with_norms_in_its_branches_starts_them_at_one():
    for block in (m for m in timm.create_model('repan_repvgg_a0').modules() if isinstance(m, RepVggBlock)):
        for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
            assert (norm.weight == 1).all()
            assert not norm.bias.any()


@pytest.mark.parametrize(('name', 'kwargs'), [
    ('orepa_resnet18', dict(output_stride=16, in_chans=1, num_classes=0)),
    ('dbb_resnet18', dict(output_stride=16, global_pool='max', drop_path_rate=0.1)),
    ('repan_repvgg_a0', dict(output_stride=16, in_chans=1, num_classes=7)),
    ('repan_mobilenetv1_100', dict(output_stride=16, in_chans=1, drop_path_rate=0.1)),
], ids=str)
@torch.no_grad()
def test_timms_arguments_reach_the_model(name, kwargs):
    model = randomize_(timm.create_model(name, **kwargs)).eval()
    set_attach_rate(model, 0.5)
    x = images(64)[:, :kwargs.get('in_chans', 3)]
    stock = timm.create_model(name.partition('_')[2], **kwargs).eval()
    stock.load_state_dict(fuse(model).state_dict())
    assert_near(stock.forward_features(x), model.forward_features(x), MODEL_RTOL[torch.float32])
    assert_near(stock(x), model(x), MODEL_RTOL[torch.float32])


# The kinds of layers of the repan_* models


def own_modules(model):
    return {type(module) for _, module in annealed_modules(model)}


@pytest.mark.parametrize(('stock', 'rep_layer'), [
    ('resnet18_cifar', 'rep'), ('resnet50', 'orepa'), ('resnet50', 'acb'), ('mobilenetv1_100', 'orepa'),
    ('repvgg_a0_cifar', 'dbb'), ('repvgg_a0_cifar', 'rep'), ('repvgg_a0_cifar', 'orepa')])
def test_every_kind_of_layer(stock, rep_layer):
    """On the meta device: names and shapes only."""
    model = timm.create_model(f'repan_{stock}', rep_layer=rep_layer, device='meta').eval()
    convs = dict(
        dbb={DiverseBranchConv2d}, acb={AsymmetricConv2d}, rep={RepConv2d}, orepa={OrepaConv2d, OrepaPointwiseConv2d})
    found = own_modules(model)
    in_blocks = {type(layer) for _, layer in rep_layers(model)}
    if stock.startswith('repvgg'):
        assert found == {AnnealedRepVggBlock}
        assert in_blocks == (set() if rep_layer == 'rep' else convs[rep_layer] - {OrepaPointwiseConv2d})
    elif rep_layer == 'orepa':
        assert found <= {*convs['orepa'], type(model.conv1) if stock == 'resnet50' else OrepaConv2d}
        assert OrepaConv2d in found
    else:
        assert found == convs[rep_layer]
    plain = timm.create_model(f'repan_{stock}', device='meta', inference_mode=True)
    assert not own_modules(plain)
    fused = fuse(model)
    assert shapes(fused) == shapes(plain)


def test_kinds_that_are_taken_if_none_is_given():
    def same(name, rep_layer):
        model, other = (timm.create_model(name, device='meta', **kw) for kw in ({}, dict(rep_layer=rep_layer)))
        return model.state_dict().keys() == other.state_dict().keys()

    assert same('repan_resnet18', 'dbb')
    assert same('repan_repvgg_a0', 'rep')
    assert same('repan_mobilenetv1_100', 'dbb')
    assert not same('repan_resnet18', 'acb')


@pytest.mark.parametrize('inference_mode', [True, False])
def test_unknown_kind_of_layer_raises(inference_mode):
    with pytest.raises(ValueError, match="unknown method 'acnet'; allowed are 'orepa', 'dbb', 'acb', 'rep'"):
        timm.create_model('repan_repvgg_a0_cifar', rep_layer='acnet', inference_mode=inference_mode)


@pytest.mark.parametrize(('name', 'kwargs'), [
    ('orepa_repvgg_a0', {}),
    ('dbb_resnet18', {}),
    ('repan_repvgg_a0', dict(rep_layer='dbb')),
    ('repan_mobilenetv1_100', dict(rep_layer='rep')),
], ids=str)
@torch.no_grad()
def test_fused_model_is_timms(name, kwargs):
    model = randomize_(timm.create_model(name, num_classes=5, **kwargs)).eval()
    set_attach_rate(model, 0.3)
    before = state_of(model)
    fused = fuse(model)
    stock = name.partition('_')[2]
    expected = timm.create_model(stock, num_classes=5).eval()
    assert type(fused) is type(expected)
    assert tree(fused) == tree(expected)
    expected.load_state_dict(fused.state_dict(), strict=True)
    assert list(fused.state_dict()) == list(expected.state_dict())
    assert_same_state(state_of(model), before)
    assert_near(fused(images()), model(images()), MODEL_RTOL[torch.float32])
    assert torch.equal(expected(images()), fused(images()))
    assert model.pretrained_cfg['architecture'] == name
    assert fused.pretrained_cfg['architecture'] == stock
    assert fused.pretrained_cfg['first_conv'] == expected.pretrained_cfg['first_conv']
    assert 'rep_layer' not in getattr(fused, '_model_args', {})


@torch.no_grad()
def test_norms_with_activation_are_taken_in_and_given_back():
    """MobileNet's are timm's BatchNormAct2d: the activation stays where it was."""
    model = randomize_(timm.create_model('repan_mobilenetv1_100', rep_layer='dbb')).eval()
    stock = timm.create_model('mobilenetv1_100')
    pairs = [key for key, _ in rep_layers(model)]
    assert 'blocks.0.0.conv_dw' in pairs
    x = images()
    activated = model.bn1(model.conv_stem(x))
    assert not activated.lt(0).any()
    assert activated.eq(0).any()
    fused = fuse(model)
    norm = fused.bn1
    assert type(norm) is type(stock.bn1)
    assert (type(norm.act), type(norm.drop)) == (type(stock.bn1.act), type(stock.bn1.drop))
    assert (norm.eps, norm.momentum) == (stock.bn1.eps, stock.bn1.momentum)
    assert_near(norm(fused.conv_stem(x)), activated, MODEL_RTOL[torch.float32])


# Copies of timm's checks (tests/test_models.py), which it runs for its own modules only.


@one_of_each_network
def test_model_forward_intermediates(name):
    model = timm.create_model(name).eval()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    assert len(info.channels()) >= 3
    output, intermediates = model.forward_intermediates(images(96), output_fmt='NCHW')
    assert len(intermediates) == len(info.channels())
    for channels, reduction, feature in zip(info.channels(), info.reduction(), intermediates):
        assert feature.shape[:2] == (2, channels)
        assert all(size <= math.ceil(96 / reduction) + 1 for size in feature.shape[2:])
        assert not feature.isnan().any()
    torch.testing.assert_close(output, model.forward_features(images(96)), rtol=1e-5, atol=1e-8)
    model.set_grad_checkpointing()
    checkpointed, _ = model.forward_intermediates(images(96), output_fmt='NCHW')
    torch.testing.assert_close(output, checkpointed, rtol=1e-4, atol=1e-5)


class Host(nn.Module):
    """As transformers wraps a network: its configuration names what it is built of."""

    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.net = timm.create_model('repan_resnet18_cifar', rep_layer='orepa', num_classes=2)


@pytest.mark.parametrize(('config', 'expected'), [
    (dict(architecture='orepa_resnet18', model_args=dict(in_chans=3)), dict(
        architecture='resnet18', model_args=dict(in_chans=3))),
    (dict(architecture='repan_resnet18_cifar', model_args=dict(rep_layer='orepa')), dict(
        architecture='repan_resnet18_cifar', model_args=dict(inference_mode=True))),
    (dict(architecture='resnet18', model_args=dict(rep_layer='mine')), dict(
        architecture='resnet18', model_args=dict(rep_layer='mine'))),
    (dict(backbone_config=SimpleNamespace(backbone='dbb_resnet18')), dict(
        backbone_config=SimpleNamespace(backbone='resnet18'))),
], ids=str)
def test_the_configuration_of_a_module_around_it_names_the_stock_form(config, expected):
    assert vars(fuse(Host(**config).eval()).config) == expected
