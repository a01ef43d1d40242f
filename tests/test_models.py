"""The registered architectures, and timm's own checks that are limited to timm's module names."""
import copy
import math

import pytest
import timm
import torch
import torch.nn as nn
from helpers import MODEL_RTOL, assert_near, randn, randomize_
from packaging.version import Version
from timm.models import FeatureInfo
from timm.models.byobnet import RepVggBlock

from timm_rep import fuse, rep_layers

NAMES = timm.list_models(['orepa_*', 'dbb_*'])
# One network of each module.
ONE_OF_EACH = ['orepa_resnet18', 'orepa_repvgg_a0', 'dbb_resnet18']
OWN_SHAPES = ['orepa_resnet18_cifar', 'orepa_wide_resnet18_2', 'orepa_repvgg_a0_cifar', 'dbb_resnet18_cifar']

one_of_each = pytest.mark.parametrize('name', ONE_OF_EACH)


def millions(model):
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def images(size=64, batch=2):
    return randn(batch, 3, size, size, seed=5, dtype=torch.float32)


def test_the_promised_names_are_registered():
    resnets = ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet18_cifar')
    repvggs = ('a0', 'a1', 'a2', 'b0', 'b1', 'b1g4', 'a0_cifar', 'a1_cifar', 'a2_cifar', 'b0_cifar')
    assert set(NAMES) >= {
        *(f'{layer}_{name}' for layer in ('orepa', 'dbb') for name in resnets),
        *(f'orepa_repvgg_{name}' for name in repvggs),
        'orepa_wide_resnet18_2',
        'orepa_resnext50_32x4d',
    }


@pytest.mark.parametrize('name', NAMES)
def test_training_form_fuses_into_the_stock_form(name):
    """On the meta device: names and shapes only."""
    model = timm.create_model(name, device='meta').eval()
    small = name.endswith('_cifar')
    size = 32 if small else 320 if name.endswith('_d2se') else 224
    assert model.pretrained_cfg['input_size'] == (3, size, size)
    assert model.num_classes == model.pretrained_cfg['num_classes'] == (10 if small else 1000)
    stock_name = name.partition('_')[2]
    if timm.is_model(stock_name):
        stock = timm.create_model(stock_name, device='meta')
    else:
        stock = timm.create_model(name, device='meta', inference_mode=True)
    assert list(rep_layers(model))
    assert not list(rep_layers(stock))
    assert type(model) is type(stock)
    assert model.feature_info == stock.feature_info
    assert millions(model) > millions(stock)
    fused = fuse(model)
    shapes = {key: value.shape for key, value in fused.state_dict().items()}
    assert shapes == {key: value.shape for key, value in stock.state_dict().items()}
    assert [(key, type(m)) for key, m in fused.named_modules()] == [(key, type(m)) for key, m in stock.named_modules()]


@pytest.mark.parametrize(('name', 'expected'), [
    ('orepa_resnet18', 37.8), ('orepa_resnet50', 68.6), ('dbb_resnet18', 26.3), ('dbb_resnet50', 40.7)])
def test_parameter_count(name, expected):
    assert millions(timm.create_model(name, device='meta')) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize('name', [*ONE_OF_EACH, 'orepa_resnet18_cifar', 'orepa_repvgg_a0_cifar'])
def test_training_step_gives_every_parameter_a_gradient(name):
    model = randomize_(timm.create_model(name, num_classes=5)).train()
    model(images(32, batch=4)).square().sum().backward()
    missing = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    model.eval()
    with torch.no_grad():
        assert_near(fuse(model)(images(32)), model(images(32)), MODEL_RTOL[torch.float32])


@pytest.mark.parametrize('name', [*ONE_OF_EACH, *OWN_SHAPES])
def test_feature_maps_are_those_of_feature_info(name):
    model = timm.create_model(name, features_only=True, device='meta').eval()
    maps = model(torch.empty(2, 3, 64, 64, device='meta'))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [m.shape[2] for m in maps] == [64 // reduction for reduction in model.feature_info.reduction()]


def test_small_image_shapes():
    resnet = timm.create_model('orepa_resnet18_cifar', device='meta')
    assert (resnet.conv1.kernel_size, resnet.conv1.stride) == ((3, 3), (1, 1))
    assert type(resnet.maxpool) is nn.Identity


@pytest.mark.parametrize(('variant', 'stem', 'widths'), [
    ('a0', 12, [16, 24, 48, 160]),  # timm rounds the widths of stages to multiples of 8: 12 becomes 16
    ('a1', 16, [16, 32, 64, 160]),
    ('a2', 16, [24, 48, 96, 176]),
    ('b0', 16, [16, 32, 64, 160]),
])
def test_small_image_repvgg_shapes(variant, stem, widths):
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


def test_norms_start_as_the_papers_do():
    for block in (m for m in timm.create_model('orepa_repvgg_a0').modules() if isinstance(m, RepVggBlock)):
        for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
            assert (norm.weight == 1).all()
            assert not norm.bias.any()
    # A residual block starts as its shortcut: timm's zero_init_last, carried over to the branches.
    block = timm.create_model('dbb_resnet18_cifar').layer1[0].eval()
    x = randn(1, 64, 8, 8, dtype=torch.float32)
    assert torch.equal(block(x), x.relu())
    block = timm.create_model('orepa_resnet18_cifar').layer1[0].eval()
    assert torch.equal(block(x), x.relu())


@one_of_each
@pytest.mark.parametrize('kwargs', [
    dict(output_stride=16), dict(in_chans=1, num_classes=0), dict(drop_path_rate=0.1, global_pool='max')], ids=str)
@torch.no_grad()
def test_timms_arguments_reach_the_model(name, kwargs):
    model = randomize_(timm.create_model(name, **kwargs)).eval()
    x = images(64)[:, :kwargs.get('in_chans', 3)]
    stock = timm.create_model(name.partition('_')[2], **kwargs).eval()
    stock.load_state_dict(fuse(model).state_dict())
    assert_near(stock.forward_features(x), model.forward_features(x), MODEL_RTOL[torch.float32])
    assert_near(stock(x), model(x), MODEL_RTOL[torch.float32])


# Copies of timm's checks (tests/test_models.py), which it runs for its own modules only.


@one_of_each
def test_model_forward_intermediates_features(name):
    model = timm.create_model(name, features_only=True, feature_cls='getter').eval()
    with torch.no_grad():
        maps = model(images(96))
    assert len(maps) == len(model.feature_info.channels())
    for channels, reduction, feature in zip(model.feature_info.channels(), model.feature_info.reduction(), maps):
        assert feature.shape[:2] == (2, channels)
        assert all(size <= math.ceil(96 / reduction) + 1 for size in feature.shape[2:])
        assert not feature.isnan().any()


@one_of_each
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


@pytest.mark.skipif(
    Version(timm.__version__) < Version('1.0.31'), reason='older timm keeps the pooling behind a pruned stem')
@one_of_each
def test_prune_intermediate_layers_contract(name):
    model = timm.create_model(name).eval()
    x = images(64)
    last = len(model.feature_info) - 1
    with torch.no_grad():
        taps = model.forward_intermediates(x, intermediates_only=True)
        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([last], prune_head=False)
        torch.testing.assert_close(pruned(x), model(x))
    for i in range(last + 1):
        with torch.no_grad():
            selected = model.forward_intermediates(x, indices=[i], stop_early=True, intermediates_only=True)
            torch.testing.assert_close(selected[0], taps[i])
            pruned = copy.deepcopy(model)
            take_indices = pruned.prune_intermediate_layers([i])
            selected = pruned.forward_intermediates(x, indices=take_indices, intermediates_only=True)
            torch.testing.assert_close(selected[0], taps[i])
            pruned = copy.deepcopy(model)
            take_indices = pruned.prune_intermediate_layers([i], prune_norm=True)
            if i < last:
                torch.testing.assert_close(pruned.forward_features(x), taps[i])
        pruned.train()
        selected = pruned.forward_intermediates(x, indices=take_indices, intermediates_only=True)
        sum(feature.sum() for feature in [*selected, pruned.forward_features(x)]).backward()
        unused = [key for key, parameter in pruned.named_parameters() if parameter.grad is None]
        assert not unused, f'pruned to {i}'
