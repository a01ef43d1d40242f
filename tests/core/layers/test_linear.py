"""The contract of the linear rep layers, and the tools that must work on them."""
import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import LINEAR_RTOL, assert_near, assert_same_state, randn, randomize_, state_of
from timm.utils import ModelEmaV3
from torch._dynamo.testing import CompileCounterWithBackend

from timm_rep import (
    DilatedConv2d,
    DOConv2d,
    ExpandedConv2d,
    MobileOneConv2d,
    OrepaConv2d,
    OrepaPointwiseConv2d,
    OrepaStemConv2d,
    RefConv2d,
    RepNasConv2d,
)
from timm_rep.core import kernels
from timm_rep.core.layers import LinearRepLayer
from timm_rep.core.layers.transformed import TransformedRepLayer

CASES = dict(
    kxk=(OrepaConv2d, 6, 8, 3, dict(padding=1)),
    no_1x1=(OrepaConv2d, 6, 8, 3, dict(padding=1, branch_1x1=False, negative_slope=1.0, bias=False)),
    strided=(OrepaConv2d, 4, 6, 5, dict(stride=2, padding=3)),
    spread=(OrepaConv2d, 4, 6, 3, dict(dilation=2, padding=(2, 1), stride=(1, 2))),
    oblong=(OrepaConv2d, 4, 6, (1, 7), dict(padding='same')),
    valid=(OrepaConv2d, 4, 6, 7, dict(padding='valid')),
    grouped=(OrepaConv2d, 12, 6, 3, dict(groups=6, bias=False)),
    depthwise=(OrepaConv2d, 8, 8, 5, dict(groups=8, padding='same', dilation=2)),
    wider=(OrepaPointwiseConv2d, 6, 9, 1, {}),
    narrower=(OrepaPointwiseConv2d, 9, 6, 1, dict(stride=2, bias=False)),
    grouped_1x1=(OrepaPointwiseConv2d, 6, 9, 1, dict(groups=3, padding=1)),
    stem=(OrepaStemConv2d, 3, 8, 7, dict(stride=2, padding=3, bias=False)),
    stem_5x5=(OrepaStemConv2d, 2, 4, 5, dict(padding='same', dilation=2)),
    online_dbb=(OrepaConv2d, 6, 8, 3, dict(padding=1, branches=('sequential', 'origin', 'average', 'conv_1x1'))),
    two_branches=(OrepaConv2d, 8, 8, 3, dict(branches=('origin', 'average'), scaling='scalar', groups=8)),
    unscaled=(OrepaConv2d, 6, 4, 3, dict(branches=('origin', 'separable'), scaling='none', stride=2, bias=False)),
    unscaled_1x1=(OrepaPointwiseConv2d, 6, 9, 1, dict(scaling='none')),
    scalar_1x1=(OrepaPointwiseConv2d, 6, 4, 1, dict(scaling='scalar', groups=2)),
    scalar_stem=(OrepaStemConv2d, 3, 8, 5, dict(padding=2, scaling='scalar', branches=('origin', 'sequential'))),
    doconv=(DOConv2d, 6, 8, 3, dict(padding=1)),
    doconv_grouped=(DOConv2d, 12, 6, (1, 5), dict(groups=3, bias=False, stride=2)),
    doconv_depthwise=(DOConv2d, 8, 8, 7, dict(groups=8, padding='same', dilation=2)),
    doconv_1x1=(DOConv2d, 4, 6, 1, {}),
    expanded=(ExpandedConv2d, 6, 4, 3, dict(padding=1, expansion=2)),
    expanded_wider=(ExpandedConv2d, 4, 6, 5, dict(stride=2, padding=3, bias=False)),
    expanded_depthwise=(ExpandedConv2d, 8, 8, 7, dict(groups=8, padding='same', dilation=2, expansion=3)),
    expanded_1x1=(ExpandedConv2d, 4, 6, 1, dict(groups=2)),
    refconv=(RefConv2d, 6, 8, 3, dict(padding=1)),
    refconv_grouped=(RefConv2d, 8, 6, (3, 5), dict(groups=2, bias=False, stride=2)),
    refconv_depthwise=(RefConv2d, 6, 6, 7, dict(groups=6, padding='same', dilation=2, map_size=5)),
    refconv_1x1=(RefConv2d, 4, 6, 1, dict(map_size=1)),
    dilated=(DilatedConv2d, 8, 8, 7, dict(groups=8, padding=3)),
    dilated_13=(DilatedConv2d, 4, 8, 13, dict(groups=4, padding='same', bias=False)),
    dilated_31=(DilatedConv2d, 2, 2, 31, dict(groups=2, padding=15)),
    dilated_own=(DilatedConv2d, 4, 6, (5, 7), dict(branches='3/1,3/2,3/2', stride=2, dilation=2, padding=2)),
    mobileone=(MobileOneConv2d, 6, 6, 3, dict(padding=1)),
    mobileone_single=(MobileOneConv2d, 4, 6, 5, dict(copies=1, stride=2, bias=False)),
    mobileone_depthwise=(MobileOneConv2d, 8, 8, 7, dict(groups=8, padding='same', dilation=2, copies=2)),
    mobileone_1x1=(MobileOneConv2d, 6, 6, 1, dict(groups=3)),
    repnas=(RepNasConv2d, 6, 8, 3, dict(padding=1)),
    repnas_depthwise=(RepNasConv2d, 8, 8, 7, dict(groups=8, padding='same', dilation=2)),
    repnas_cut=(RepNasConv2d, 8, 6, (3, 5), dict(groups=2, stride=2, bias=False, branches=('origin', 'conv_1x1'))),
)
GEOMETRY = (
    'in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation', 'groups', 'padding_mode')
# Every form that the parameters can take, for what does not depend on the geometry; one of each kind for slow tools.
METHODS = ('doconv', 'expanded', 'refconv', 'dilated', 'mobileone', 'repnas')  # one layer of each of the other methods
ABLATIONS = ('online_dbb', 'two_branches', 'unscaled', 'unscaled_1x1', 'scalar_1x1', 'scalar_stem')
FORMS = (
    'kxk', 'no_1x1', 'grouped', 'wider', 'narrower', 'stem', *ABLATIONS, *METHODS, 'mobileone_single', 'mobileone_1x1',
    'repnas_cut')
KINDS = ('kxk', 'depthwise', 'wider', 'stem', *METHODS)
# Arguments beyond a convolution's.
OWN = ('branch_1x1', 'negative_slope', 'scaling', 'expansion', 'map_size', 'branches', 'copies')

forms = pytest.mark.parametrize('case', FORMS)
kinds = pytest.mark.parametrize('case', KINDS)
# Every geometry in float64, every kind in float32; the ends of the range of the attach rate.
exact = pytest.mark.parametrize(('case', 'dtype', 'rate'), [
    *((case, torch.float64, 0.3) for case in CASES),
    *((case, torch.float32, 1.0) for case in KINDS),
    ('kxk', torch.float64, 0.0),
], ids=str)


def fresh(case, **dd) -> LinearRepLayer:
    cls, c_in, c_out, size, kwargs = CASES[case]
    return cls(c_in, c_out, size, **kwargs, **dd)


def make(case, rate=1.0, dtype=torch.float32, **dd):
    """A layer with wide random values."""
    layer = randomize_(fresh(case, dtype=dtype, **dd))
    layer.set_attach_rate_(rate)
    return layer


def images(layer, size=15):
    return randn(2, layer.in_channels, size, size, seed=5, dtype=next(layer.parameters()).dtype)


# Initial values


def bound(fan_in, slope=0.0):
    return (6 / ((1 + slope ** 2) * fan_in)) ** 0.5


def assert_uniform(tensor, limit):
    assert tensor.abs().max() <= limit
    assert tensor.abs().max() > 0.95 * limit
    assert tensor.std().item() == pytest.approx(limit / 3 ** 0.5, rel=0.1)


@pytest.mark.parametrize(('groups', 'slope', 'branch_1x1'), [(1, 0.0, True), (8, 0.0, True), (1, 1.0, False)])
def test_kxk_starts_with_the_papers_values(groups, slope, branch_1x1):
    layer = OrepaConv2d(64, 32, 3, groups=groups, branch_1x1=branch_1x1, negative_slope=slope)
    scales = dict(zip(layer.branch_names, layer.scale))
    expected = dict(origin=0.25, average=0.25, prior=0.0, conv_1x1=1.0, separable=0.5, sequential=0.5)
    if not branch_1x1:
        expected.pop('conv_1x1')
    assert list(scales) == list(expected)
    for name, value in expected.items():
        assert torch.equal(scales[name], torch.full([32], value)), name
    per_group = 64 // groups
    inner = 2 * per_group if groups > 4 else per_group
    views = layer.branch_views()
    fan_in = dict(
        origin=9 * per_group, average=per_group, prior=per_group, conv_1x1=per_group, separable=8 * per_group,
        sequential=9 * inner,
    )
    assert views['sequential'].numel() == 32 * inner * 9
    for name, view in views.items():
        assert_uniform(view, bound(fan_in[name], slope))
    assert layer.dw_conv.shape == (8 * 64, 1, 3, 3)
    assert_uniform(layer.dw_conv, bound(9, slope))
    assert layer.seq_1x1.shape == (64 * inner // per_group, per_group, 1, 1)
    assert not layer.seq_1x1.any()
    assert_uniform(OrepaConv2d(4, 400, 3, bias=True).bias, 1 / 36 ** 0.5)
    assert layer.attach_rate == 1


@pytest.mark.parametrize(('c_in', 'c_out', 'groups'), [(32, 64, 1), (64, 32, 1), (48, 48, 1), (32, 64, 2)])
def test_pointwise_starts_with_the_papers_values(c_in, c_out, groups):
    layer = OrepaPointwiseConv2d(c_in, c_out, groups=groups)
    assert torch.equal(layer.scale, torch.tensor([[1.0], [0.5]]).expand(2, c_out))
    assert_uniform(layer.conv_1x1, bound(c_in // groups, 1.0))
    square, drawn = (layer.seq_first, layer.seq_second) if c_out > c_in else (layer.seq_second, layer.seq_first)
    assert torch.equal(square[:, :, 0, 0], torch.eye(square.shape[1]).repeat(groups, 1))
    assert_uniform(drawn, bound(drawn.shape[1], 1.0))


def test_stem_is_a_stack_of_3x3_blocks():
    layer = OrepaStemConv2d(3, 16, 7)
    assert [(block.in_channels, block.out_channels, block.kernel_size) for block in layer.stack] == [
        (3, 16, (3, 3)), (16, 16, (3, 3)), (16, 16, (3, 3))]
    assert all(block.bias is None for block in layer.stack)
    assert not layer.kernel_offset.any()


@forms
def test_reset_parameters_draws_a_new_layer(case):
    expected = fresh(case, generator=torch.Generator().manual_seed(3))
    layer = make(case, rate=0.3)
    layer.reset_parameters(torch.Generator().manual_seed(3))
    assert_same_state(state_of(layer), state_of(expected))


# Fuse, restore, redraw


@exact
def test_fused_convolution_has_the_outputs(case, dtype, rate):
    layer = make(case, rate, dtype)
    before = state_of(layer)
    conv = layer.train(False).fuse()
    assert type(conv) is nn.Conv2d
    for name in GEOMETRY:
        assert getattr(conv, name) == getattr(layer, name), name
    assert (conv.bias is None) == (layer.bias is None)
    assert conv.weight.dtype == dtype
    assert conv.weight.requires_grad
    assert not conv.training
    assert_near(conv(images(layer)), layer(images(layer)), LINEAR_RTOL[dtype])
    assert_same_state(state_of(layer), before)
    if conv.bias is not None:
        assert conv.bias.data_ptr() != layer.bias.data_ptr()


@exact
def test_restored_layer_computes_exactly_the_kernel(case, dtype, rate):
    layer = make(case, rate, dtype)
    kernel = randn(*layer.weight_shape, seed=1, dtype=dtype)
    bias = None if layer.bias is None else randn(layer.out_channels, seed=2, dtype=dtype)
    side = {name: tensor for name, tensor in layer.branch_kernels().items() if name not in ('origin', 'offset')}
    layer.restore_(kernel, bias)
    assert_near(layer.weight, kernel, LINEAR_RTOL[dtype])
    x = images(layer)
    expected = F.conv2d(x, kernel, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    assert_near(layer(x), expected, LINEAR_RTOL[dtype])
    if isinstance(layer, TransformedRepLayer):
        assert torch.equal(layer.weight, kernel)
        assert not layer.residual.any()
    else:
        for name, branch in side.items():
            torch.testing.assert_close(layer.branch_kernels()[name], branch, rtol=1e-4, atol=1e-4)
    if layer.bias is not None:
        layer.restore_(kernel)
        assert not layer.bias.any()


def test_restoring_takes_up_its_own_rounding():
    layer = randomize_(OrepaConv2d(32, 32, 3))
    kernel = randn(*layer.weight_shape, seed=1, dtype=torch.float32)
    layer.restore_(kernel)
    assert (layer.weight == kernel).double().mean() > 0.65  # half of them after one pass


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('case', ['kxk', 'depthwise', 'wider', 'stem_5x5', 'expanded', 'dilated', 'mobileone'])
def test_restoring_is_exact_to_one_rounding_of_the_side_branches(case, dtype):
    """However large they are: here some hundred times the kernel."""
    layer = fresh(case, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith('scale'):
                parameter.mul_(8)
    layer = layer.to(dtype)
    kernel = randn(*layer.weight_shape, seed=1, dtype=dtype) / 100
    layer.restore_(kernel)
    branches = layer.branch_kernels()
    branches.pop('offset' if 'stem' in case else 'origin')
    largest = sum(branch.double() for branch in branches.values()).abs().max()
    assert largest > 50 * kernel.abs().max()
    assert (layer.weight.double() - kernel).abs().max() <= torch.finfo(dtype).eps * largest


@forms
def test_restoring_what_does_not_fit_raises_and_changes_nothing(case):
    layer = make(case)
    before = state_of(layer)
    o, i, h, w = layer.weight_shape
    for shape in [(o, i, h, w + 2), (o, i + 1, h, w), (o + 1, i, h, w), (o, i, h * w), (1, 1, 1, 1)]:
        if shape != (o, i, h, w):
            with pytest.raises(ValueError, match=r'takes a kernel of shape \(.*\), got \('):
                layer.restore_(torch.ones(shape))
    with pytest.raises(ValueError, match='bias must have shape'):
        layer.restore_(torch.ones(layer.weight_shape), torch.ones(o + 1))
    if layer.bias is None:
        with pytest.raises(ValueError, match='bias=False'):
            layer.restore_(torch.ones(layer.weight_shape), torch.ones(o))
    assert_same_state(state_of(layer), before)


@forms
def test_redraw_is_deterministic_and_leaves_the_origin_alone(case):
    layer = make(case, 0.3)
    other = copy.deepcopy(layer)
    before = layer.branch_kernels()
    origin = 'offset' if isinstance(layer, OrepaStemConv2d) else 'origin'  # the part that restoring writes to
    bias = None if layer.bias is None else layer.bias.clone()
    layer.redraw_side_branches_(torch.Generator().manual_seed(7))
    other.redraw_side_branches_(torch.Generator().manual_seed(7))
    assert_same_state(state_of(layer), state_of(other))
    after = layer.branch_kernels()
    assert torch.equal(after[origin], before[origin])
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert changed == [name for name in before if name != origin]
    assert bias is None or torch.equal(layer.bias, bias)
    layer.redraw_side_branches_(torch.Generator().manual_seed(8))
    assert torch.equal(layer.weight, other.weight) == isinstance(layer, TransformedRepLayer)
    layer.set_attach_rate_(0.0)
    other.set_attach_rate_(0.0)
    assert_near(layer.weight, other.weight, 1e-6)


@pytest.mark.parametrize(('case', 'dtype'), [
    *((case, torch.float64) for case in CASES), *((case, torch.float32) for case in KINDS)], ids=str)
def test_layer_from_a_convolution_has_its_function(case, dtype):
    cls, c_in, c_out, size, kwargs = CASES[case]
    own = {key: value for key, value in kwargs.items() if key in OWN}
    conv_kwargs = {key: value for key, value in kwargs.items() if key not in own}
    conv = nn.Conv2d(c_in, c_out, size, **conv_kwargs, dtype=dtype).eval()
    before = state_of(conv)
    layer = cls.from_conv(conv, torch.Generator().manual_seed(0), **own)
    again = cls.from_conv(conv, torch.Generator().manual_seed(0), **own)
    assert isinstance(layer, cls)
    assert not layer.training
    assert layer.attach_rate == 1
    x = images(layer)
    assert_near(layer(x), conv(x), LINEAR_RTOL[dtype])
    assert_same_state(state_of(conv), before)
    assert_same_state(state_of(layer), state_of(again))


def test_attach_rate_outside_its_range_raises():
    layer = make('kxk', 0.5)
    for rate in (-0.1, 1.1, float('nan')):
        with pytest.raises(ValueError, match=r'attach rate must lie in \[0, 1\], got'):
            layer.set_attach_rate_(rate)
    assert layer.attach_rate == 0.5


def with_side_branches_times(layer, rate):
    branches = layer.branch_kernels()
    return branches.pop('origin') + rate * sum(branches.values())


@forms
def test_attach_rate_multiplies_the_side_branches_and_is_saved(case):
    layer = make(case, dtype=torch.float64)
    if isinstance(layer, OrepaStemConv2d):
        expected = with_side_branches_times(layer.stack[0], 0.25)
        for block in layer.stack[1:]:
            expected = kernels.merge_sequential(expected, with_side_branches_times(block, 0.25))
        expected = expected + layer.kernel_offset
    else:
        expected = with_side_branches_times(layer, 0.25)
    layer.set_attach_rate_(0.25)
    assert_near(layer.weight, expected, 1e-12)
    assert {name for name, tensor in layer.state_dict().items() if torch.equal(tensor, torch.tensor(0.25))} == {
        name for name in layer.state_dict() if name.endswith('attach_rate')}
    other = fresh(case, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize(('case', 'dtype'), [
    *((case, torch.float64) for case in FORMS), ('kxk', torch.float32)], ids=str)
def test_branch_kernels_add_up_to_the_kernel(case, dtype):
    layer = make(case, 0.3, dtype)
    if isinstance(layer, OrepaStemConv2d):
        layer.kernel_offset.normal_()
    branches = layer.branch_kernels()
    names = dict(OrepaStemConv2d=('stack', 'offset')).get(type(layer).__name__) or layer.branch_names
    assert tuple(branches) == tuple(names)
    assert_near(sum(branches.values()), layer.weight, LINEAR_RTOL[dtype])


@pytest.mark.parametrize(('case', 'dtype', 'rate', 'compensate', 'training'), [
    *((case, torch.float64, 0.4, False, True) for case in FORMS),
    *((case, torch.float32, 0.4, True, False) for case in KINDS),
    ('kxk', torch.float64, 0.0, False, True),
    ('stem', torch.float64, 1.0, True, True),
], ids=str)
def test_time_step_keeps_the_function_at_every_rate_and_in_both_modes(case, dtype, rate, compensate, training):
    layer = make(case, 0.3, dtype).train(training)
    expected = layer.weight
    bias = None if layer.bias is None else layer.bias.clone()
    before = state_of(layer)
    layer.begin_time_step_(torch.Generator().manual_seed(7), rate, compensate)
    assert_near(layer.weight, expected, 5 * LINEAR_RTOL[dtype])  # a stem folds three blocks
    assert bias is None or torch.equal(layer.bias, bias)
    assert layer.training == training
    assert layer.time_step == 1
    assert all(
        value == torch.tensor(rate) for name, value in layer.state_dict().items() if name.endswith('attach_rate'))
    assert not any(torch.equal(tensor, before[name]) for name, tensor in layer.named_parameters()
                   if name.endswith(('branches', 'dw_conv', 'conv_1x1')))
    if isinstance(layer, TransformedRepLayer):  # without chance
        assert not layer.residual.any()
        randomize_(layer)
    layer.set_attach_rate_(0.7)
    assert (layer.weight - expected).abs().max() > 1e-2  # there are side branches


@forms
def test_every_parameter_gets_a_gradient(case):
    layer = make(case, 0.3)
    assert layer.branch_gradients() == {}
    layer(images(layer)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    first = layer.stack[0] if isinstance(layer, OrepaStemConv2d) else layer
    gradients = layer.branch_gradients()
    without = dict(MobileOneConv2d='skip', RefConv2d='origin').get(type(first).__name__)  # no kernel that is trained
    assert tuple(gradients) == tuple(name for name in first.branch_names if name != without)
    if isinstance(first, OrepaConv2d):
        assert torch.equal(gradients['origin'], first.branches.grad[:, :, :first.kernel_size[0] * first.kernel_size[1]])
    elif without != 'origin':
        own = first.conv_1x1 if isinstance(first, OrepaPointwiseConv2d) else first.origin
        assert torch.equal(gradients['origin'], own.grad)


# The stem


def stack_on_feature_maps(layer, x):
    for block in layer.stack:
        x = F.conv2d(x, block.weight, padding=1)
    return x


@pytest.mark.parametrize(('size', 'stride'), [(7, 2), (5, 1), (9, 2)])
def test_stem_equals_its_stack_away_from_the_border(size, stride):
    layer = OrepaStemConv2d(3, 4, size, stride=stride, padding=size // 2, bias=False, dtype=torch.float64)
    randomize_(layer).kernel_offset.zero_()
    x = randn(1, 3, 32, 32)
    expected = stack_on_feature_maps(layer, x)
    actual = layer(x)
    inner = slice(size // 2, 32 - size // 2)  # outputs whose window lies in the image
    at_stride = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    at_stride[:, :, inner, inner] = True
    mask = at_stride[0, 0, ::stride, ::stride]
    assert mask.any()
    assert_near(actual[..., mask], expected[..., ::stride, ::stride][..., mask], 1e-12)
    assert not torch.allclose(actual[..., ~mask], expected[..., ::stride, ::stride][..., ~mask])


def test_stem_does_not_compose_by_cross_correlation():
    layer = randomize_(OrepaStemConv2d(3, 4, 7, bias=False, dtype=torch.float64))
    layer.kernel_offset.zero_()
    kernel = layer.stack[0].weight
    for block in layer.stack[1:]:  # the published code: without the flip of the later kernel
        kernel = F.conv2d(kernel.transpose(0, 1), block.weight, padding=2).transpose(0, 1)
    with pytest.raises(AssertionError, match='largest difference'):
        assert_near(layer.weight, kernel, 1e-3)


# Tools


def test_looks_like_a_convolution_but_is_none():
    layer = make('kxk')
    assert not isinstance(layer, nn.Conv2d)
    assert torch.equal(layer.weight, layer.compose_weight())
    assert layer.weight.shape == layer.weight_shape
    assert repr(make('spread')) == (
        'OrepaConv2d(4, 6, kernel_size=(3, 3), stride=(1, 2), padding=(2, 1), dilation=(2, 2))')


@pytest.mark.parametrize(('case', 'tool'), [
    *((case, 'script') for case in FORMS),
    *((case, tool) for case in ('kxk', 'wider', 'stem', *METHODS) for tool in ('trace', 'fx')),
])
def test_graph_tools_keep_the_function(case, tool):
    layer = make(case, 0.3).eval()
    x = images(layer)
    if tool == 'script':
        converted = torch.jit.script(layer)
    else:
        converted = torch.jit.trace(layer, x) if tool == 'trace' else torch.fx.symbolic_trace(layer)
    assert_near(converted(x), layer(x), 1e-6)
    converted(x).sum().backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())
    for form in (layer, converted):  # the attach rate is no constant of the graph
        for name, buffer in form.named_buffers():
            if name.endswith('attach_rate'):
                buffer.fill_(1.0)
    assert_near(converted(x), layer(x), 1e-6)


@pytest.mark.parametrize('case', ['kxk', 'wider', 'stem', *METHODS])
def test_exported_layer_keeps_the_function(case):
    layer = make(case, 0.3).eval()
    x = images(layer)
    assert_near(torch.export.export(layer, (x,)).module()(x), layer(x), 1e-6)


@pytest.mark.parametrize('case', ['kxk', 'wider', 'stem', *METHODS])
def test_compiled_layer_keeps_outputs_and_gradients_at_every_attach_rate(case):
    torch._dynamo.reset()
    layer = make(case, 0.3)
    x = images(layer)
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    parameters = list(layer.parameters())
    for rate in (0.3, 0.0, 1.0):
        layer.set_attach_rate_(rate)
        actual, expected = compiled(x), layer(x)
        assert_near(actual, expected, 1e-6)
        if rate > 0:  # at rate zero the side branches have none
            actual = torch.autograd.grad(actual.square().sum(), parameters)
            expected = torch.autograd.grad(expected.square().sum(), parameters)
            for a, e in zip(actual, expected):
                assert_near(a, e, 1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize(('case', 'copied'), [
    ('kxk', 'pickle'), ('wider', 'pickle'), ('stem', 'pickle'), ('stem', 'deepcopy'), ('kxk', 'deepcopy')])
def test_copies_are_equal_and_independent(case, copied):
    layer = make(case, 0.3)
    other = copy.deepcopy(layer) if copied == 'deepcopy' else pickle.loads(pickle.dumps(layer))
    assert type(other) is type(layer)
    assert_same_state(state_of(other), state_of(layer))
    assert torch.equal(other(images(layer)), layer(images(layer)))
    before = layer.weight.detach()
    other.redraw_side_branches_()
    other.set_attach_rate_(1.0)
    assert torch.equal(layer.weight, before)
    assert not torch.equal(other.weight, before)


@pytest.mark.parametrize('case', ['kxk', 'stem'])
def test_ema_averages_the_factors_and_keeps_the_attach_rate(case):
    layer = make(case, 0.5)
    ema = ModelEmaV3(layer, decay=0.75)
    start = state_of(layer)
    layer.redraw_side_branches_()
    layer.time_step.fill_(2)
    ema.update(layer)
    expected = fresh(case)
    expected.load_state_dict({
        k: torch.lerp(start[k], v, 0.25) if v.is_floating_point() else v for k, v in layer.state_dict().items()})
    assert ema.module.time_step == 2
    assert ema.module.attach_rate == 0.5
    assert_near(ema.module(images(layer)), expected(images(layer)), 1e-5)
    assert_near(ema.module.fuse()(images(layer)), expected(images(layer)), 1e-5)


@kinds
def test_functional_call_and_functorch_gradients(case):
    layer = make(case, 0.3, torch.float64)
    x = images(layer)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values):
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    actual = torch.func.grad(loss)(parameters)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert_near(actual[name], parameter.grad, 1e-12)


@forms
def test_layer_built_on_meta_becomes_a_new_layer(case):
    layer = fresh(case, device='meta')
    assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {'meta'}
    assert layer(torch.empty(2, layer.in_channels, 15, 15, device='meta')).shape[1] == layer.out_channels
    layer.to_empty(device='cpu')
    layer.reset_parameters(torch.Generator().manual_seed(3))
    expected = fresh(case, generator=torch.Generator().manual_seed(3))
    assert_same_state(state_of(layer), state_of(expected))
    assert torch.equal(layer.weight, expected.weight)


@kinds
def test_default_device_and_dtype_are_obeyed(case):
    with torch.device('meta'):
        assert fresh(case).attach_rate.is_meta
    assert fresh(case, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


@forms
def test_change_of_dtype_keeps_the_constants_exact(case):
    layer = make(case)
    constants = {name: tensor.clone() for name, tensor in layer.named_buffers() if name not in layer.state_dict()}
    wide = copy.deepcopy(layer).double()
    assert wide.weight.dtype == torch.float64
    assert_near(wide.weight.float(), layer.weight, 1e-6)
    narrow = copy.deepcopy(layer).bfloat16()
    assert narrow.weight.dtype == torch.bfloat16
    assert narrow(images(layer).bfloat16()).dtype == torch.bfloat16
    for back in (wide.float(), narrow.float(), copy.deepcopy(layer).half().double().float()):
        for name, tensor in back.named_buffers():
            if name in constants:
                assert torch.equal(tensor, constants[name]), name
    exact = make(case, dtype=torch.float64)
    through_half = copy.deepcopy(exact).bfloat16().double()
    through_half.load_state_dict(exact.state_dict())
    assert torch.equal(through_half.weight, exact.weight)


@kinds
def test_channels_last_input(case):
    layer = make(case)
    x = images(layer)
    actual = layer(x.to(memory_format=torch.channels_last))
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_near(actual, layer(x), 1e-6)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_kernel_is_composed_in_the_format_of_the_input(memory_format, monkeypatch):
    layer, kernels_seen, conv2d = make('kxk'), [], F.conv2d
    monkeypatch.setattr(F, 'conv2d', lambda x, weight, *args: kernels_seen.append(weight) or conv2d(x, weight, *args))
    layer(images(layer).to(memory_format=memory_format))
    assert [kernel.is_contiguous(memory_format=memory_format) for kernel in kernels_seen] == [True]


# Bad input


@pytest.mark.parametrize(('build', 'message'), [
    (lambda: OrepaConv2d(4, 4, 2), r'odd kernel size .* got \(2, 2\)'),
    (lambda: OrepaConv2d(4, 4, (3, 4)), r'odd kernel size .* got \(3, 4\)'),
    (lambda: OrepaConv2d(4, 4, 1), 'larger than 1x1; use OrepaPointwiseConv2d'),
    (lambda: OrepaConv2d(4, 4, 3, padding_mode='reflect'), "padding_mode 'zeros', got 'reflect'"),
    (lambda: OrepaConv2d(4, 6, 3, groups=4), 'out_channels=6, groups=4'),
    (lambda: OrepaConv2d(6, 4, 3, groups=4), 'in_channels=6, out_channels=4, groups=4'),
    (lambda: OrepaConv2d(4, 4, 3, groups=0), 'positive multiples of groups'),
    (lambda: OrepaConv2d(0, 4, 3), 'positive multiples of groups'),
    (lambda: OrepaConv2d(4, 4, 3, stride=0), 'stride must be one or two integers of at least 1, got 0'),
    (lambda: OrepaConv2d(4, 4, 3, padding=-1), 'padding must be one or two integers of at least 0, got -1'),
    (lambda: OrepaConv2d(4, 4, 3, padding='full'), "'same', 'valid' or integers, got 'full'"),
    (lambda: OrepaConv2d(4, 4, 3, padding='same', stride=2), "'same' needs stride 1"),
    (lambda: OrepaConv2d(4, 4, (3, 3, 3)), 'kernel_size must be one or two integers'),
    (lambda: OrepaPointwiseConv2d(4, 4, 3), r'1x1 convolution, got kernel_size \(3, 3\)'),
    (lambda: OrepaPointwiseConv2d(4, 4, padding_mode='circular'), "padding_mode 'zeros', got 'circular'"),
    (lambda: OrepaStemConv2d(3, 4, 3), r'square kernel of at least 5x5, got \(3, 3\)'),
    (lambda: OrepaStemConv2d(3, 4, (7, 5)), r'square kernel of at least 5x5, got \(7, 5\)'),
    (lambda: OrepaStemConv2d(4, 4, 7, groups=2), 'groups=1, got 2'),
    (lambda: OrepaConv2d.from_conv(nn.Conv2d(4, 4, 2)), 'odd kernel size'),
    (lambda: OrepaPointwiseConv2d.from_conv(nn.Conv2d(4, 4, 3)), '1x1 convolution'),
])
def test_unsupported_case_raises(build, message):
    with pytest.raises(ValueError, match=message):
        build()
