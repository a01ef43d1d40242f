"""Linear layers at random geometries and options: fused, restored, expanded, annealed and differentiated."""
import random

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_near, randn, randomize_

from timm_rep import (
    DilatedConv2d,
    DOConv2d,
    ExpandedConv2d,
    ExpandNet,
    MobileOne,
    MobileOneConv2d,
    Orepa,
    OrepaConv2d,
    OrepaPointwiseConv2d,
    RefConv,
    RefConv2d,
    RepNas,
    RepNasConv2d,
    expand,
)
from timm_rep.core.layers.orepa.kxk import BRANCHES

SIZES = (1, 3, 5, 7)


def some(draw, names):
    """The origin's name and some others, in any order."""
    others = [name for name in names if name != 'origin']
    return [*draw.sample(others, draw.randint(1, len(others))), 'origin']


# Class, sizes of its kernels, and a draw of its options.
LAYERS = dict(
    orepa=(OrepaConv2d, (3, 5, 7), lambda draw: dict(
        branches=some(draw, BRANCHES), scaling=draw.choice(['vector', 'scalar', 'none']))),
    orepa_1x1=(OrepaPointwiseConv2d, (1,), lambda draw: dict(scaling=draw.choice(['vector', 'scalar', 'none']))),
    doconv=(DOConv2d, SIZES, lambda draw: {}),
    expandnet=(ExpandedConv2d, SIZES, lambda draw: dict(expansion=draw.randint(1, 3))),
    refconv=(RefConv2d, SIZES, lambda draw: dict(map_size=draw.choice([1, 3, 5]))),
    dilated=(DilatedConv2d, (5, 7, 9, 13, 31), lambda draw: draw.choice([{}, dict(branches='3/2,1/1,3/1')])),
    mobileone=(MobileOneConv2d, SIZES, lambda draw: dict(copies=draw.randint(2, 4))),
    repnas=(RepNasConv2d, (3, 5, 7), lambda draw: dict(
        branches=some(draw, ('origin', 'average', 'conv_1x1', 'sequential')))),
)
CASES = 12


def draw_geometry(draw, sizes):
    groups = draw.choice([1, 1, 2, 3, 6])
    size = (draw.choice(sizes), draw.choice(sizes))
    c_in = 6 if groups == 6 else groups * draw.randint(1, 3)
    c_out = draw.choice([c_in, groups * draw.randint(1, 4)])
    stride, dilation = draw.choice([1, 2, (1, 3)]), draw.choice([1, 1, 2, (2, 1)])
    padding = draw.choice([size[0] // 2, (0, 2), 0, 'valid', 'same'])
    return (c_in, c_out, size), dict(
        stride=1 if padding == 'same' else stride, dilation=dilation, padding=padding, groups=groups,
        bias=draw.random() < 0.5)


@pytest.mark.parametrize('name', LAYERS)
def test_layer_is_a_convolution_whatever_its_geometry(name):
    layer_cls, sizes, options = LAYERS[name]
    for seed in range(CASES):
        draw = random.Random(seed)
        geometry, kwargs = draw_geometry(draw, sizes)
        layer = randomize_(layer_cls(*geometry, **kwargs, **options(draw), dtype=torch.float64), seed)
        layer.set_attach_rate_(draw.choice([0.0, 0.4, 1.0]))
        said = f'seed {seed}: {layer} {layer._own_kwargs()}'
        extent = [d * (k - 1) + 4 for d, k in zip(layer.dilation, layer.kernel_size)]
        x = randn(2, layer.in_channels, *extent, seed=seed)
        try:
            check(layer, x, seed)
        except Exception as e:
            raise AssertionError(said) from e


def check(layer, x, seed):
    expected = layer(x)
    assert_near(layer.fuse()(x), expected, 1e-11)
    assert_near(sum(layer.branch_kernels().values()), layer.weight, 1e-11)
    layer.begin_time_step_(torch.Generator().manual_seed(seed), 0.7)
    assert_near(layer(x), expected, 1e-11)
    kernel = randn(*layer.weight_shape, seed=seed + 1)
    layer.restore_(kernel, layer.bias)
    assert_near(layer.weight, kernel, 1e-11)
    randomize_(layer, seed + 2)
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())
    conv = nn.Conv2d(**layer._geometry(), bias=layer.bias is not None, dtype=torch.float64)
    own = {key: value for key, value in layer._own_kwargs().items() if key != 'bias'}
    made = type(layer).from_conv(conv, torch.Generator().manual_seed(seed), **own)
    assert_near(made(x), conv(x), 1e-11)


@pytest.mark.parametrize('method', [
    Orepa(branches='origin,average,prior', scaling='scalar'), 'doconv', ExpandNet(expansion=2), RefConv(map_size=5),
    MobileOne(copies=2), RepNas(branches='origin,sequential')], ids=str)
def test_expanded_networks_train_like_their_stock_form(method):
    """The first step of both gives the same outputs in training mode, and all parameters gradients."""
    for seed in range(3):
        torch.manual_seed(seed)
        draw = random.Random(seed)
        groups = draw.choice([1, 2, 4])
        net = nn.Sequential(
            nn.Conv2d(3, 4, draw.choice([3, 5]), 2, 1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 8, draw.choice([3, 5]), padding=2, dilation=2, groups=groups, bias=False), nn.BatchNorm2d(8),
        ).double()
        x = randn(3, 3, 17, 19, seed=seed)
        model = expand(net, method)
        assert_near(model(x), net(x), 1e-10)
        F.mse_loss(model(x), torch.zeros_like(model(x)) + 1).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
