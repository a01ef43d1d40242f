"""Layers with a norm in every branch: folding, restoring, and the pair of convolution and norm they stand for."""
import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import LINEAR_RTOL, MODEL_RTOL, TINY_MODELS, assert_near, assert_same_state, randn, randomize_, state_of
from timm.layers import BatchNormAct2d, StdConv2d, freeze_batch_norm_2d, unfreeze_batch_norm_2d
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from timm_rep import (
    AsymmetricConv2d,
    DiverseBranchConv2d,
    NormedDilatedConv2d,
    NormedMobileOneConv2d,
    RepConv2d,
    UserError,
    expand,
    fuse,
    verify,
)
from timm_rep.core.layers.dbb import NormPad2d
from timm_rep.core.layers.normed import NormedRepLayer
from timm_rep.core.layers.norms import fold_batch_norm

LAYERS = dict(dbb=DiverseBranchConv2d, acb=AsymmetricConv2d, rep=RepConv2d)
GEOMETRIES = dict(
    kxk=(4, 6, 3, dict(padding=1)),
    square=(6, 6, 3, dict(padding=1)),
    strided=(4, 6, 3, dict(padding=1, stride=2)),
    dilated=(4, 6, 3, dict(padding=2, dilation=2)),
    unpadded=(4, 6, 3, {}),
    wide_padding=(4, 6, 3, dict(padding=3, stride=2)),
    uneven=(4, 6, (3, 5), dict(padding=(2, 1), stride=(2, 1), dilation=(1, 2))),
    uneven_square=(4, 4, (5, 3), dict(padding=(4, 1), dilation=(2, 1))),
    flat=(4, 6, (1, 3), dict(padding=(0, 1))),
    large=(3, 5, 7, dict(padding=3)),
    grouped=(4, 6, 3, dict(padding=1, groups=2)),
    grouped_square=(6, 6, 3, dict(padding=1, groups=2)),
    depthwise=(6, 6, 3, dict(padding=1, groups=6)),
    depthwise_large=(4, 4, 5, dict(padding=4, groups=4, stride=2, dilation=2)),
    multiplier=(3, 6, 3, dict(padding=1, groups=3)),
)
# To each kind of layer the geometries that it can be wrong in: where its branches are cropped, padded or left out.
CHOSEN = dict(
    dbb=('kxk', 'unpadded', 'wide_padding', 'uneven', 'flat', 'grouped', 'depthwise', 'depthwise_large', 'multiplier'),
    acb=('kxk', 'unpadded', 'wide_padding', 'uneven', 'large', 'grouped', 'depthwise_large'),
    rep=('kxk', 'square', 'wide_padding', 'uneven', 'uneven_square', 'flat', 'grouped_square', 'depthwise', 'unpadded'),
)
CASES = {f'{kind}-{name}': (cls, *GEOMETRIES[name]) for kind, cls in LAYERS.items() for name in CHOSEN[kind]}
CASES.update({
    'dilated-small': (NormedDilatedConv2d, 4, 6, 3, dict(padding=1, branches='3/1,1/1')),
    'dilated-reaching': (NormedDilatedConv2d, 4, 4, 7, dict(padding=3, groups=4)),
    'dilated-cropping': (NormedDilatedConv2d, 4, 6, (5, 7), dict(padding=(0, 2), stride=2, branches='1/1,3/2,3/1')),
    'dilated-spread': (NormedDilatedConv2d, 4, 8, 5, dict(padding=(1, 4), groups=4, dilation=2)),
    'mobileone-two': (NormedMobileOneConv2d, 6, 6, 3, dict(padding=1, copies=2)),
    'mobileone-one': (NormedMobileOneConv2d, 4, 6, (5, 3), dict(padding=(0, 2), copies=1, stride=2)),
    'mobileone-three': (NormedMobileOneConv2d, 4, 4, 5, dict(padding=4, groups=4, dilation=2, copies=3)),
})
# Every set of branches, for what does not depend on the geometry; of the slow tools' graphs one of each kind.
FORMS = (
    'dbb-uneven', 'dbb-depthwise', 'acb-uneven', 'rep-kxk', 'rep-uneven_square', 'dilated-cropping',
    'mobileone-one', 'mobileone-three')
KINDS = ('dbb-kxk', 'dbb-depthwise', 'acb-kxk', 'rep-square', 'dilated-reaching', 'mobileone-two')

forms = pytest.mark.parametrize('case', FORMS)
kinds = pytest.mark.parametrize('case', KINDS)
layers = pytest.mark.parametrize('cls', LAYERS.values(), ids=LAYERS)
# Every geometry in float64, every kind in float32; the ends of the range of the attach rate.
exact = pytest.mark.parametrize(('case', 'dtype', 'rate'), [
    *((case, torch.float64, 0.3) for case in CASES),
    *((case, torch.float32, 1.0) for case in KINDS),
    ('dbb-kxk', torch.float64, 0.0),
], ids=str)
exact_forms = pytest.mark.parametrize(('case', 'dtype', 'rate'), [
    *((case, torch.float64, 0.3) for case in FORMS),
    *((case, torch.float32, 1.0) for case in KINDS),
    ('dbb-kxk', torch.float64, 0.0),
], ids=str)


def fresh(case, **kwargs):
    cls, c_in, c_out, size, geometry = CASES[case]
    return cls(c_in, c_out, size, **geometry, **kwargs)


def split_case(case):
    """A case with the geometry of a convolution and the options of its layer apart."""
    *shape, kwargs = CASES[case]
    options = {key: value for key, value in kwargs.items() if key in ('branches', 'copies')}
    return *shape, {key: value for key, value in kwargs.items() if key not in options}, options


def make(case, rate=1.0, dtype=torch.float32):
    """A layer in eval mode with wide random values."""
    layer = randomize_(fresh(case, dtype=dtype, eps=1e-3, momentum=0.2)).eval()
    layer.set_attach_rate_(rate)
    return layer


def images(layer, batch=2):
    return randn(batch, layer.in_channels, 15, 16, seed=5, dtype=layer.conv_kxk.weight.dtype)


def plain_conv(layer, x, kernel, bias):
    return F.conv2d(x, kernel, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def branch_names(layer):
    if isinstance(layer, NormedDilatedConv2d):
        return ['origin', *layer._side_convs()]
    if isinstance(layer, NormedMobileOneConv2d):
        names = ['origin', *(f'copy_{n}' for n in range(1, layer.copies)), 'conv_1x1']
        return names if layer.norm_skip is None else [*names, 'skip']
    if isinstance(layer, AsymmetricConv2d):
        return ['origin', 'conv_1xk', 'conv_kx1']
    if isinstance(layer, RepConv2d):
        return ['origin', 'conv_1x1'] if layer.norm_identity is None else ['origin', 'conv_1x1', 'identity']
    return ['origin', 'sequential', 'average'] if layer.conv_1x1 is None else [
        'origin', 'sequential', 'average', 'conv_1x1']


def norms_of(layer):
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.BatchNorm2d)}


# The blocks of the papers, written out: every branch is a convolution without padding of the padded input.


def convolve(layer, padded, weight):
    return F.conv2d(padded, weight, None, layer.stride, 0, layer.dilation, layer.groups)


def cropped(padded, rows, columns):
    return padded[:, :, rows:padded.shape[2] - rows, columns:padded.shape[3] - columns]


def norm_then_pad(padded, x):
    """The authors' way: the border is written over zeros, by the statistics that the norm has moved just before."""
    norm = padded.norm
    outputs = norm(x)
    image = norm.bias.detach() - norm.running_mean * norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
    pad_h, pad_w = padded.padding
    outputs = F.pad(outputs, (pad_w, pad_w, pad_h, pad_h))
    inside = torch.zeros_like(outputs, dtype=torch.bool)
    inside[:, :, pad_h:outputs.shape[2] - pad_h, pad_w:outputs.shape[3] - pad_w] = True
    return torch.where(inside, outputs, image.reshape(1, -1, 1, 1))


def dbb_sides(layer, x, padded, centre):
    per_group = layer.in_channels // layer.groups
    inner = torch.zeros_like(layer.seq_1x1)
    for channel in range(inner.shape[0]):  # the input channel that this inner channel passes on
        inner[channel, channel % (inner.shape[0] // layer.groups) % per_group] = 1
    mixed = F.conv2d(x, inner + layer.seq_1x1, groups=layer.groups)
    side = layer.seq_norm(convolve(layer, norm_then_pad(layer.seq_inner_norm, mixed), layer.seq_kxk.weight))

    depthwise = layer.in_channels == layer.out_channels == layer.groups
    pooled = padded if depthwise else norm_then_pad(layer.avg_inner_norm, layer.avg_conv(x))
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    mean = torch.full((layer.out_channels, 1, *layer.kernel_size), 1 / taps, dtype=x.dtype)
    pooled = F.conv2d(pooled, mean, None, layer.stride, 0, layer.dilation, layer.out_channels)
    side = side + layer.avg_norm(pooled)
    if not depthwise:
        side = side + layer.norm_1x1(convolve(layer, cropped(padded, *centre), layer.conv_1x1.weight))
    return side


def acb_sides(layer, x, padded, centre):
    row = convolve(layer, cropped(padded, centre[0], 0), layer.conv_1xk.weight)
    column = convolve(layer, cropped(padded, 0, centre[1]), layer.conv_kx1.weight)
    return layer.norm_1xk(row) + layer.norm_kx1(column)


def rep_sides(layer, x, padded, centre):
    side = layer.norm_1x1(convolve(layer, cropped(padded, *centre), layer.conv_1x1.weight))
    main = convolve(layer, padded, layer.conv_kxk.weight)
    if layer.in_channels == layer.out_channels and main.shape == x.shape:
        side = side + layer.norm_identity(x)
    return side


def dilated_sides(layer, x, padded, centre):
    side = 0
    for (size, spread), conv, norm in zip(layer._sizes, layer.side_convs, layer.side_norms):
        cut = [c - size // 2 * spread * d for c, d in zip(centre, layer.dilation)]
        dilation = [spread * d for d in layer.dilation]
        side = side + norm(F.conv2d(
            cropped(padded, *cut), conv.weight, None, layer.stride, 0, dilation, layer.groups))
    return side


def mobileone_sides(layer, x, padded, centre):
    side = layer.norm_1x1(convolve(layer, cropped(padded, *centre), layer.conv_1x1.weight))
    for conv, norm in zip(layer.copy_convs, layer.copy_norms):
        side = side + norm(convolve(layer, padded, conv.weight))
    return side if layer.norm_skip is None else side + layer.norm_skip(x)


@pytest.mark.parametrize(('case', 'training'), [
    *((case, True) for case in CASES), *((case, False) for case in KINDS)])
def test_forward_is_the_block_of_the_paper(case, training):
    layer = make(case, 0.3, torch.float64).train(training)
    other = copy.deepcopy(layer)  # each keeps its own running statistics
    pad_h, pad_w = layer.padding
    centre = [dilation * (size // 2) for dilation, size in zip(layer.dilation, layer.kernel_size)]
    sides = dict(dbb=dbb_sides, acb=acb_sides, rep=rep_sides, dilated=dilated_sides, mobileone=mobileone_sides)[
        case.partition('-')[0]]
    for seed in range(3 if training else 1):  # what one batch does to the statistics, the next one meets
        x = randn(2, layer.in_channels, 15, 16, seed=seed)
        padded = F.pad(x, (pad_w, pad_w, pad_h, pad_h))
        expected = layer.norm_kxk(convolve(layer, padded, layer.conv_kxk.weight))
        expected = expected + layer.attach_rate * sides(layer, x, padded, centre)
        outputs = other(x)
        assert_near(outputs, expected, 1e-12)
        direction = randn(*outputs.shape, seed=6)
        gradients = torch.autograd.grad((outputs * direction).sum(), list(other.parameters()))
        exact = torch.autograd.grad((expected * direction).sum(), list(layer.parameters()))
        for actual, gradient in zip(gradients, exact):
            torch.testing.assert_close(actual, gradient, rtol=1e-12, atol=1e-12 * max(g.abs().max() for g in exact))
        for name, buffer in other.named_buffers():
            torch.testing.assert_close(buffer, layer.get_buffer(name), rtol=1e-12, atol=1e-12)


def test_identity_branch_where_the_shapes_allow_it():
    with_identity = []
    for name, (c_in, c_out, size, geometry) in GEOMETRIES.items():
        layer = RepConv2d(c_in, c_out, size, **geometry)
        same = plain_conv(layer, images(layer), layer.weight, None).shape == images(layer).shape
        assert (layer.norm_identity is not None) == same, name
        if same:
            with_identity.append(name)
    assert with_identity == ['square', 'uneven_square', 'grouped_square', 'depthwise']


def test_depthwise_block_has_twice_the_inner_channels():
    assert make('dbb-kxk').seq_1x1.shape == (4, 4, 1, 1)
    assert make('dbb-depthwise').seq_1x1.shape == (12, 1, 1, 1)


@pytest.mark.parametrize('padding', [(1, 1), (0, 2), (2, 0)])
def test_inside_its_border_a_padding_norm_is_its_norm_to_the_bit(padding):
    padded = NormPad2d(2, padding).bfloat16()
    torch.nn.init.normal_(padded.norm.weight)
    torch.nn.init.normal_(padded.norm.bias)
    x = torch.randn(3, 2, 5, 6, dtype=torch.bfloat16, requires_grad=True)
    expected, found = copy.deepcopy(padded.norm)(x), padded(x)
    pad_h, pad_w = padding
    assert torch.equal(found[:, :, pad_h:pad_h + 5, pad_w:pad_w + 6], expected)
    gradient = torch.randn_like(found)
    expected.backward(gradient[:, :, pad_h:pad_h + 5, pad_w:pad_w + 6].contiguous())
    expected, x.grad = x.grad, None
    found.backward(gradient)
    assert torch.equal(x.grad, expected)


# Fold


@exact
def test_fused_convolution_and_pair_have_the_outputs(case, dtype, rate):
    layer = make(case, rate, dtype)
    before = state_of(layer)
    expected = layer(images(layer))
    conv = layer.fuse()
    assert type(conv) is nn.Conv2d
    assert conv.weight.dtype == conv.bias.dtype == dtype
    assert_near(conv(images(layer)), expected, MODEL_RTOL[dtype])
    assert torch.equal(conv.weight, layer.weight)
    conv, norm = layer.fuse_conv_norm()
    assert (type(conv), type(norm), conv.bias) == (nn.Conv2d, nn.BatchNorm2d, None)
    assert not norm.training
    assert (norm.eps, norm.momentum) == (layer.norm_kxk.eps, layer.norm_kxk.momentum)
    assert_near(norm(conv(images(layer))), expected, MODEL_RTOL[dtype])
    assert_same_state(state_of(layer), before)


def test_folding_goes_by_the_attach_rate():
    """Proves that the tests above can fail: RepAn's published fold, as if the rate were one."""
    layer = make('acb-kxk', 0.3, torch.float64)
    attached = copy.deepcopy(layer)
    attached.set_attach_rate_(1.0)
    with pytest.raises(AssertionError, match='largest difference'):
        assert_near(attached.fuse()(images(layer)), layer(images(layer)), 1e-2)


@layers
def test_training_mode_refuses_to_fuse(cls):
    layer = randomize_(cls(4, 6, 3))
    before = state_of(layer)
    for fold in (layer.fuse, layer.fuse_conv_norm):
        with pytest.raises(ValueError, match=rf'{type(layer).__name__} in training mode.*model\.eval\(\)'):
            fold()
    assert_same_state(state_of(layer), before)


@layers
def test_fused_norm_keeps_the_mean_of_its_convolution(cls):
    layer = randomize_(cls(4, 6, 3, momentum=1.0, dtype=torch.float64))
    x = images(layer, batch=32)
    layer(x)  # the kept statistics become those of this batch
    conv, norm = layer.eval().fuse_conv_norm()
    assert_near(norm.running_mean, conv(x).mean((0, 2, 3)), 1e-3)
    assert norm.num_batches_tracked == 1
    assert (norm.running_var > 0).all()


@exact_forms
def test_branch_kernels_add_up_to_the_kernel(case, dtype, rate):
    layer = make(case, rate, dtype)
    branches = layer.branch_kernels()
    assert list(branches) == branch_names(layer)
    assert_near(sum(branches.values()), layer.compose_weight(), LINEAR_RTOL[dtype])
    layer.set_attach_rate_(1.0)
    attached = layer.branch_kernels()
    assert torch.equal(branches.pop('origin'), attached.pop('origin'))
    for name, kernel in branches.items():
        assert torch.equal(kernel, torch.tensor(rate) * attached[name]), name


# Restore, redraw


@exact_forms
def test_restored_layer_computes_exactly_the_kernel(case, dtype, rate):
    for bias in (randn(CASES[case][2], seed=2, dtype=dtype), None):
        layer = make(case, rate, dtype)
        kernel = randn(*layer.weight_shape, seed=1, dtype=dtype)
        before = state_of(layer)
        layer.restore_(kernel, bias)
        x = images(layer)
        assert_near(layer.weight, kernel, LINEAR_RTOL[dtype])
        assert_near(layer(x), plain_conv(layer, x, kernel, bias), MODEL_RTOL[dtype])
        changed = {name for name, tensor in state_of(layer).items() if not torch.equal(tensor, before[name])}
        assert changed == {'conv_kxk.weight', 'norm_kxk.weight', 'norm_kxk.bias'}


@kinds
def test_restoring_takes_up_its_own_rounding(case):
    """The gain of the origin's norm is one up to rounding, and its mean may be large."""
    layer = make(case, 0.0)
    layer.norm_kxk.running_mean.mul_(1000)
    kernel, bias = torch.ones(layer.weight_shape), torch.ones(layer.out_channels)
    layer.restore_(kernel, bias)
    folded_kernel, folded_bias = layer.compose_weight_bias()
    assert (folded_kernel - kernel).abs().max() < 1e-7  # one less than the next float
    assert (folded_bias - bias).abs().max() < 1e-6


@kinds
def test_restoring_into_a_dead_origin(case):
    """Nothing is divided by the weight of its norm."""
    layer = make(case, 0.3, torch.float64)
    nn.init.zeros_(layer.norm_kxk.weight)
    kernel = randn(*layer.weight_shape, seed=1)
    layer.restore_(kernel)
    assert_near(layer.weight, kernel, 1e-12)


@kinds
def test_restoring_what_does_not_fit_raises_and_changes_nothing(case):
    layer = make(case)
    before = state_of(layer)
    o, i, h, w = layer.weight_shape
    for shape in [(o, i, h, w + 2), (o, i + 1, h, w), (o, i, h * w)]:
        with pytest.raises(ValueError, match=r'takes a kernel of shape \(.*\), got \('):
            layer.restore_(torch.ones(shape))
    with pytest.raises(ValueError, match='bias must have shape'):
        layer.restore_(torch.ones(layer.weight_shape), torch.ones(o + 1))
    assert_same_state(state_of(layer), before)


@forms
@pytest.mark.parametrize(('dtype', 'with_norm'), [(torch.float64, True), (torch.float32, False)], ids=str)
def test_layer_from_a_convolution_has_its_function(case, dtype, with_norm):
    cls, c_in, c_out, size, geometry, options = split_case(case)
    conv = nn.Conv2d(c_in, c_out, size, **geometry, bias=not with_norm, dtype=dtype).eval()
    norm = randomize_(nn.BatchNorm2d(c_out, eps=1e-3, momentum=0.2, dtype=dtype)).eval() if with_norm else None
    layer = cls.from_conv(conv, torch.Generator().manual_seed(0), norm=norm, **options)
    again = cls.from_conv(conv, torch.Generator().manual_seed(0), norm=norm, **options)
    assert not layer.training
    assert (layer.attach_rate, layer.time_step) == (1, 0)
    x = images(layer)
    assert_near(layer(x), norm(conv(x)) if with_norm else conv(x), MODEL_RTOL[dtype])
    assert_same_state(state_of(layer), state_of(again))
    if with_norm:
        for name in ('weight', 'running_mean', 'running_var'):
            assert torch.equal(getattr(layer.norm_kxk, name), getattr(norm, name))
        assert {(own.eps, own.momentum) for own in norms_of(layer).values()} == {(1e-3, 0.2)}


@forms
def test_layer_for_a_convolution_is_fresh_and_starts_its_norms_like_the_one_behind_it(case):
    cls, c_in, c_out, size, geometry, options = split_case(case)
    conv = nn.Conv2d(c_in, c_out, size, **geometry, bias=False).eval()
    norm = randomize_(nn.BatchNorm2d(c_out)).eval()
    before = state_of(norm)
    layer = cls.from_conv(conv, torch.Generator().manual_seed(0), norm=norm, same_function=False, **options)
    expected = fresh(case, generator=torch.Generator().manual_seed(0))
    inner = [name for name in norms_of(layer) if 'inner' in name]
    assert len(inner) == dict(dbb=1 if layer.groups == c_in == c_out else 2).get(case.partition('-')[0], 0)
    for name, own in norms_of(layer).items():
        if name not in inner:
            assert torch.equal(own.weight, norm.weight), name
            assert torch.equal(own.bias, norm.bias), name
            assert not own.running_mean.any(), name
            own.reset_parameters()
    assert_same_state(state_of(layer), state_of(expected))
    assert_same_state(state_of(norm), before)


@forms
def test_redraw_is_deterministic_small_and_leaves_the_origin_alone(case):
    layer = make(case, 0.3)
    layer.time_step.fill_(2)
    other = copy.deepcopy(layer)
    before = state_of(layer)
    layer.redraw_side_branches_(torch.Generator().manual_seed(7))
    other.redraw_side_branches_(torch.Generator().manual_seed(7))
    assert_same_state(state_of(layer), state_of(other))
    limit = 0.1 / layer.out_channels ** 0.5
    for name, tensor in layer.state_dict().items():
        if name.startswith(('conv_kxk.', 'norm_kxk.', 'attach_rate', 'time_step')):
            assert torch.equal(tensor, before[name]), name
        elif tensor.ndim == 4 and name != 'seq_1x1':
            assert 0.5 * limit < tensor.abs().max() <= limit, name
        elif 'running' in name or name.endswith('num_batches_tracked'):
            assert torch.equal(tensor, before[name]), name  # norms keep their statistics
        elif name.endswith('.weight'):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            assert not tensor.any(), name
    other.redraw_side_branches_(torch.Generator().manual_seed(8))
    drawn = [name for name, tensor in other.state_dict().items() if not torch.equal(tensor, layer.state_dict()[name])]
    assert drawn == [name for name, tensor in layer.state_dict().items()
                     if tensor.ndim == 4 and name not in ('conv_kxk.weight', 'seq_1x1')]


@layers
def test_redraw_is_uniform(cls):
    layer = cls(32, 64, 3)
    layer.redraw_side_branches_()
    for name, tensor in layer.state_dict().items():
        if tensor.ndim == 4 and name not in ('conv_kxk.weight', 'seq_1x1'):
            assert tensor.abs().max() > 0.95 * 0.1 / 64 ** 0.5, name
            assert tensor.std().item() == pytest.approx(0.1 / 64 ** 0.5 / 3 ** 0.5, rel=0.1), name


@forms
def test_reset_parameters_draws_a_new_layer(case):
    layer = make(case, 0.3)
    layer.time_step.fill_(2)
    layer.reset_parameters(torch.Generator().manual_seed(3))
    expected = fresh(case, generator=torch.Generator().manual_seed(3))
    assert_same_state(state_of(layer), state_of(expected))
    assert (layer.attach_rate, layer.time_step) == (1, 0)


# Time steps


@forms
@pytest.mark.parametrize(('dtype', 'rate', 'compensate', 'training'), [
    (torch.float64, 0.0, False, True), (torch.float64, 0.4, True, False), (torch.float32, 1.0, True, True)], ids=str)
def test_time_step_keeps_the_eval_outputs(case, dtype, rate, compensate, training):
    layer = make(case, 0.3, dtype)
    expected = layer(images(layer))
    layer.train(training).begin_time_step_(torch.Generator().manual_seed(7), rate, compensate)
    assert layer.training == training
    assert layer.attach_rate == torch.tensor(rate)
    assert layer.time_step == 1
    assert_near(layer.eval()(images(layer)), expected, MODEL_RTOL[dtype])
    layer.set_attach_rate_(0.9)
    assert (layer(images(layer)) - expected).abs().max() > 1e-3  # there are side branches


@forms
def test_time_step_without_compensation_adds_the_fresh_branches(case):
    layer = make(case, 0.3, torch.float64)
    x = images(layer)
    before = layer(x)
    layer.begin_time_step_(torch.Generator().manual_seed(7), 0.4)
    branches = layer.branch_kernels()
    layer.set_attach_rate_(0.0)
    assert_near(layer(x), before, 1e-10)
    layer.set_attach_rate_(0.4)
    side = sum(kernel for name, kernel in branches.items() if name != 'origin')
    bias = 0.4 * layer._side_kernel_bias()[1]
    assert_near(layer(x) - before, plain_conv(layer, x, side, bias), 1e-6)


@kinds
def test_time_step_changes_the_function_in_training_mode(case):
    """Batch statistics take the place of the kept ones, which the origin's norm goes on with."""
    layer = make(case, 0.3, torch.float64).train()
    x = images(layer)
    expected = copy.deepcopy(layer)(x)
    layer.begin_time_step_(torch.Generator().manual_seed(7))
    with pytest.raises(AssertionError, match='largest difference'):
        assert_near(layer(x), expected, 1e-2)


@forms
def test_norms_of_the_stock_form_have_the_statistics_of_its_convolution(case):
    """Of branches that take much of each other away, on inputs without correlations."""
    layer = make(case, 0.7, torch.float64)
    side_kernel, side_bias = layer._side_kernel_bias()
    layer.restore_(randn(*layer.weight_shape, seed=3, dtype=torch.float64) * side_kernel.std(), side_bias)
    x = randn(8, layer.in_channels, 60, 60, seed=5, dtype=torch.float64)
    for norm in layer._norms():
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():  # a branch and its norm turned round are the same
        layer.conv_kxk.weight[::2] *= -1
        layer.norm_kxk.weight[::2] *= -1
    for _ in range(2):  # once for the border that an inner norm makes
        layer.train()(x)
    conv, norm = layer.eval().fuse_conv_norm()
    var, mean = torch.var_mean(conv(x), (0, 2, 3))
    assert_near(norm.running_mean, mean, 1e-2)
    assert (norm.running_var / var).log().abs().max() < 0.1
    independent = layer.norm_kxk.weight.square() + sum((0.7 * side.weight).square() for side in layer._side_norms())
    depend = (independent / layer(x).var((0, 2, 3))).log().abs()
    assert depend.max() > 0.25  # the branches of this test do


@kinds
@pytest.mark.parametrize('frozen', [False, True], ids=['live', 'frozen'])
@torch.no_grad()
def test_stock_form_is_as_before_if_nothing_was_trained(case, frozen):
    """However often a pair is expanded and fused."""
    cls, c_in, c_out, size, geometry, options = split_case(case)
    conv = nn.Conv2d(c_in, c_out, size, dtype=torch.float64, **geometry)
    norm = randomize_(nn.BatchNorm2d(c_out, dtype=torch.float64)).eval()
    norm.weight[:4] = torch.tensor([-1.5, 1e-5, -1e-20, 1e-40])
    norm.num_batches_tracked.fill_(3)
    x = randn(2, c_in, 15, 16, seed=5, dtype=torch.float64)
    kernel, expected, before = conv.weight.clone(), norm(conv(x)), state_of(norm)
    before['running_mean'] -= conv.bias  # the pair has a bias of zero then
    for seed in range(12):
        layer = cls.from_conv(conv, torch.Generator().manual_seed(seed), norm=norm, **options)
        assert_near(layer(x), expected, 1e-12)
        if frozen:
            layer = freeze_batch_norm_2d(layer)
        conv, stock = layer.fuse_conv_norm()
        for name in ('weight', 'running_mean', 'running_var'):
            assert torch.equal(getattr(stock, name), before[name])
        assert_near(stock.bias, before['bias'], 1e-12)
        for n in range(c_out):
            assert_near(conv.weight[n], kernel[n], 1e-12)
        norm.load_state_dict(stock.state_dict(), strict=False)


@kinds
@pytest.mark.parametrize('amplitude', [0.1, 30])
@torch.no_grad()
def test_kernels_keep_their_size_by_expanding_and_fusing(case, amplitude):
    """Where batches pass between, from inputs that are small or large."""
    cls, c_in, c_out, size, geometry, options = split_case(case)
    conv, norm = nn.Conv2d(c_in, c_out, size, bias=False, **geometry), nn.BatchNorm2d(c_out)
    before = conv.weight.norm()
    x = amplitude * randn(4, c_in, 15, 16, seed=5, dtype=torch.float32)
    for seed in range(6):
        layer = cls.from_conv(conv, torch.Generator().manual_seed(seed), norm=norm, **options)
        for _ in range(60):
            layer.train()(x)
        conv, norm = layer.eval().fuse_conv_norm()
        assert 0.2 < conv.weight.norm() / before < 3


@pytest.mark.parametrize('case', [*KINDS, 'rep-depthwise'])
def test_a_step_moves_the_stock_form_as_far_as_the_branches(case):
    """Of gradient descent in training mode, on a sum whose gradients by the outputs are the same for both."""
    layer = make(case, 0.7, torch.float64)
    x = 50 * randn(8, layer.in_channels, 15, 16, seed=5, dtype=torch.float64)
    with torch.no_grad():
        if case == 'rep-depthwise':
            layer.conv_1x1.weight *= 0.1  # of no effect behind a norm, nor are its steps
        for norm in layer._norms():
            norm.momentum = None
        for _ in range(3):
            layer.train()(x)
    layer.eval()
    conv, norm = layer.fuse_conv_norm()
    wanted = randn(layer.out_channels, *conv(x).shape[2:], seed=6, dtype=torch.float64)
    moved = []
    for form, parameters in (
            (nn.Sequential(conv, norm), [conv.weight]),
            (layer, [layer.conv_kxk.weight, *(conv.weight for conv in layer._side_convs().values())])):
        before = form.train()(x)
        gradients = torch.autograd.grad((before * wanted).sum(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                parameter.sub_(1e-6 * gradient)
            moved.append((form(x) - before).square().sum((0, 2, 3)).sqrt())
    assert 0.5 < (moved[0] / moved[1]).median() < 2


@kinds
@torch.no_grad()
def test_channels_without_variance_have_gains_and_kernels_of_usual_size(case):
    """Training goes on from them if the channels come alive."""
    cls, c_in, c_out, size, geometry, options = split_case(case)
    conv, norm = nn.Conv2d(c_in, c_out, size, bias=False, **geometry), nn.BatchNorm2d(c_out)
    layer = cls.from_conv(conv, norm=norm, **options).train()
    for _ in range(300):
        layer(torch.zeros(4, c_in, 15, 16))
    conv, norm = layer.eval().fuse_conv_norm()
    assert 0.5 < norm.weight.min()
    assert norm.weight.max() < 3
    # one after the other, two norms divide by next to nothing
    assert conv.weight.abs().max() < (1e3 if layer._inner_norms() else 2)


@kinds
@torch.no_grad()
def test_cumulative_averages_begin_anew_where_kernels_do(case):
    cls, c_in, c_out, size, geometry, options = split_case(case)
    norm = nn.BatchNorm2d(c_out, momentum=None, dtype=torch.float64)
    norm.num_batches_tracked.fill_(500)
    conv = nn.Conv2d(c_in, c_out, size, bias=False, dtype=torch.float64, **geometry)
    layer = cls.from_conv(conv, norm=norm, **options)
    x = randn(16, c_in, 30, 30, seed=5, dtype=torch.float64)
    for begin in (lambda: None, layer.begin_time_step_):
        begin()
        layer.set_attach_rate_(1.0)
        for _ in range(2):  # the second with the border that the first one leaves
            in_training = layer.train()(x)
        assert_near(layer.eval()(x), in_training, 1e-2)
        for own in layer._norms():
            own.num_batches_tracked.fill_(500)


@kinds
@pytest.mark.parametrize('frozen', [False, True], ids=['live', 'frozen'])
def test_stock_form_goes_on_in_training_mode(case, frozen):
    """Its outputs are as large as those in eval mode, however small the gains, also after a time of frozen norms."""
    layer = make(case, 0.7, torch.float64)
    for norm in layer._norms():
        norm.momentum = None
        with torch.no_grad():
            norm.weight[::2] *= 1e-4
    x = randn(8, layer.in_channels, 30, 30, seed=5, dtype=torch.float64)
    for _ in range(3):
        layer.train()(x)
    layer.eval()
    for own in layer._norms():
        own.num_batches_tracked.zero_()  # some averaged copies do not count
    conv, norm = (freeze_batch_norm_2d(layer) if frozen else layer).fuse_conv_norm()
    norm = unfreeze_batch_norm_2d(norm)
    std, expected = norm.train()(conv(x)).std((0, 2, 3)), norm.eval()(conv(x)).std((0, 2, 3))
    assert (std / expected).log().abs().max() < 0.1


@forms
def test_frozen_norms(case):
    live = make(case, 0.3, torch.float64)
    layer = freeze_batch_norm_2d(copy.deepcopy(live))
    assert not norms_of(layer)
    x = images(layer)
    expected = layer(x)
    conv, norm = layer.fuse_conv_norm()
    assert type(norm) is type(layer.norm_kxk)
    assert_near(norm(conv(x)), expected, 1e-10)
    layer.begin_time_step_(torch.Generator().manual_seed(7), 0.4, compensate=True)
    assert_near(layer.train()(x), expected, 1e-10)  # nothing else to go by in training mode
    live.begin_time_step_(torch.Generator().manual_seed(7), 0.4, compensate=True)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, live.state_dict()[name]), name
    other = layer.like(2 * layer.in_channels) if layer.groups == 1 else layer.like(layer.in_channels)
    assert type(other) is type(layer)
    assert other.norm_kxk.eps == layer.norm_kxk.eps


# Training


@forms
@pytest.mark.parametrize('rate', [0.3, 0.0])
def test_every_parameter_gets_a_gradient(case, rate):
    layer = make(case, rate).train()
    x = images(layer)
    assert layer.branch_gradients() == {}
    (layer(x) * randn(*layer(x).shape, seed=1, dtype=x.dtype)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name  # at rate zero too: DDP waits for all
        assert (parameter.grad.abs().sum() > 0) == (rate > 0 or name.startswith(('conv_kxk.', 'norm_kxk.'))), name


@forms
def test_branch_gradients_are_those_of_the_kernels(case):
    layer = make(case, 0.3).train()
    layer(images(layer)).pow(3).sum().backward()
    gradients = layer.branch_gradients()
    assert next(iter(gradients)) == 'origin'
    assert set(gradients) == {
        name for name in branch_names(layer)  # but for those that have no kernel to learn
        if name not in ('identity', 'skip') and not (name == 'average' and layer.avg_conv is None)
    }
    assert torch.equal(gradients['origin'], layer.conv_kxk.weight.grad)
    own = {id(parameter.grad) for name, parameter in layer.named_parameters() if name.endswith('.weight')}
    assert {id(gradient) for gradient in gradients.values()} <= own
    assert len({gradient.data_ptr() for gradient in gradients.values()}) == len(gradients)


# Gradient checkpointing


def trained_steps(layer, run):
    """Outputs and gradients of some training steps, and the statistics of the inner norms after them."""
    layer = copy.deepcopy(layer).train()
    for norm in norms_of(layer).values():
        norm.momentum = 0.5
    values = []
    for seed in range(3):
        x = randn(2, layer.in_channels, 9, 8, seed=seed).requires_grad_()
        outputs = run(layer, x)
        layer.zero_grad()
        outputs.pow(3).sum().backward()  # a reentrant checkpoint goes with nothing else
        values += [outputs, x.grad, *(p.grad for p in layer.parameters())]
    return values + [buffer for name, buffer in layer.named_buffers() if 'inner' in name]


def twice(layer, x, use_reentrant, other):
    outputs = checkpoint(layer, x, use_reentrant=use_reentrant)
    return outputs + checkpoint(layer, other, use_reentrant=use_reentrant)


reentrant = pytest.mark.parametrize('use_reentrant', [True, False])


@pytest.mark.parametrize('case', ['dbb-kxk', 'dbb-depthwise'])
@reentrant
def test_checkpointed_layer_is_the_layer(case, use_reentrant):
    def run(layer, x):
        return checkpoint(layer, x, use_reentrant=use_reentrant)

    layer = make(case, 0.3, torch.float64)
    for actual, expected in zip(trained_steps(layer, run), trained_steps(layer, lambda layer, x: layer(x))):
        assert torch.equal(actual, expected)


@reentrant
def test_checkpointing_that_loses_the_border_is_refused(use_reentrant):
    """Two passes before their backward: the same batch, whose statistics tell nothing, and another."""
    for seed in (0, 1):
        layer = make('dbb-kxk', 0.3, torch.float64).train()
        x, other = (randn(2, 4, 9, 8, seed=s).requires_grad_() for s in (0, seed))
        outputs = twice(layer, x, use_reentrant, other)
        with pytest.raises(ValueError, match=r'checkpointing of DBB .*set_grad_checkpointing\(False\)'):
            outputs.sum().backward()
        # kept statistics that do not move
        twice(layer.eval(), x, use_reentrant, other).sum().backward()
        twice(freeze_batch_norm_2d(layer).train(), x, use_reentrant, other).sum().backward()


def test_checkpointed_model_trains_as_without():
    expanded = randomize_(expand(TINY_MODELS['basic'](), 'dbb')).train()
    states = []
    for enable in (False, True):
        model = copy.deepcopy(expanded)
        model.set_grad_checkpointing(enable)
        for seed in range(2):
            model(randn(2, 3, 64, 64, seed=seed, dtype=torch.float32)).square().sum().backward()
        states.append([p.grad for p in model.parameters()])
    for without, checkpointed in zip(*states):
        assert torch.equal(checkpointed, without)


# Tools


@pytest.mark.parametrize(('case', 'tool'), [
    *((case, 'script') for case in KINDS),
    *(('dbb-kxk', tool) for tool in ('trace', 'fx', 'export', 'deepcopy', 'pickle')),
    *(('rep-square', tool) for tool in ('fx', 'export', 'pickle')),
])
def test_tools_keep_the_function(case, tool):
    if tool == 'export' and torch.__version__ < '2.7':
        pytest.skip('the exporter of torch 2.6 loses the statistics of a norm that is read twice')
    layer = make(case, 0.3)
    x = images(layer)
    converted = dict(
        script=lambda: torch.jit.script(layer),
        trace=lambda: torch.jit.trace(layer, x),
        fx=lambda: torch.fx.symbolic_trace(layer),
        export=lambda: torch.export.export(layer, (x,)).module(),
        deepcopy=lambda: copy.deepcopy(layer),
        pickle=lambda: pickle.loads(pickle.dumps(layer)),
    )[tool]()
    assert_near(converted(x), layer(x), 1e-6)
    for form in (layer, converted):  # the attach rate is no constant of the graph
        form.attach_rate.fill_(1.0)
    assert_near(converted(x), layer(x), 1e-6)


@kinds
def test_compiled_layer_keeps_outputs_and_gradients_at_every_attach_rate(case):
    torch._dynamo.reset()
    layer = make(case, dtype=torch.float64).train()
    other = copy.deepcopy(layer)  # each keeps its own running statistics
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = images(layer)
    for rate in (0.25, 0.5, 1.0):
        layer.set_attach_rate_(rate)
        other.set_attach_rate_(rate)
        actual, expected = compiled(x), other(x)
        assert_near(actual, expected, 1e-12)
        actual = torch.autograd.grad(actual.pow(3).sum(), list(layer.parameters()))
        expected = torch.autograd.grad(expected.pow(3).sum(), list(other.parameters()))
        for a, e in zip(actual, expected):
            assert_near(a, e, 1e-9)
    assert counter.frame_count == 1


@kinds
def test_autocast_runs_and_does_not_touch_folding(case):
    layer = make(case, 0.3)
    expected, branches = layer.fuse(), layer.branch_kernels()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        fused, under_autocast = layer.fuse(), layer.branch_kernels()
        output = layer(images(layer))
    assert_same_state(state_of(fused), state_of(expected))
    assert_same_state(under_autocast, branches)
    assert_near(output.float(), layer(images(layer)), 0.05)


@kinds
def test_layer_built_on_meta_becomes_a_new_layer(case):
    layer = fresh(case, device='meta')
    assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {'meta'}
    layer.to_empty(device='cpu')
    layer.reset_parameters(torch.Generator().manual_seed(3))
    expected = fresh(case, generator=torch.Generator().manual_seed(3))
    assert_same_state(state_of(layer), state_of(expected))
    assert torch.equal(layer.eval()(images(layer)), expected.eval()(images(layer)))


@kinds
def test_change_of_dtype(case):
    layer = make(case)
    x = images(layer)
    assert_near(copy.deepcopy(layer).double()(x.double()).float(), layer(x), 1e-5)
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.fuse().weight.dtype == torch.bfloat16
    half.begin_time_step_()
    assert {tensor.dtype for tensor in half.parameters()} == {torch.bfloat16}


# Bad input


@pytest.mark.parametrize(('args', 'kwargs', 'message'), [
    ((4, 4, 2), {}, r'odd kernel size .* got \(2, 2\)'),
    ((4, 4, (3, 4)), {}, r'odd kernel size .* got \(3, 4\)'),
    ((4, 4, 1), {}, 'larger than 1'),
    ((4, 4, 3), dict(padding='same'), "padding in pixels, got 'same'"),
    ((4, 4, 3), dict(padding_mode='reflect'), "padding_mode 'zeros', got 'reflect'"),
    ((4, 6, 3), dict(groups=4), 'out_channels=6, groups=4'),
    ((4, 4, 3), dict(stride=0), 'stride must be one or two integers of at least 1, got 0'),
])
def test_unsupported_case_raises(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        DiverseBranchConv2d(*args, **kwargs)


def test_asymmetric_layer_needs_two_sides():
    for size in ((1, 3), (3, 1)):
        with pytest.raises(ValueError, match=r'AsymmetricConv2d needs a kernel larger than 1 each way, got'):
            AsymmetricConv2d(4, 4, size)


@pytest.mark.parametrize(('norm', 'message'), [
    (dict(affine=False), 'weight and bias'),
    (dict(track_running_stats=False), 'running statistics'),
])
def test_norm_that_cannot_be_folded_raises(norm, message):
    with pytest.raises(ValueError, match=message):
        DiverseBranchConv2d.from_conv(nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4, **norm))


@pytest.mark.parametrize('cls', [*LAYERS.values(), NormedDilatedConv2d, NormedMobileOneConv2d])
def test_convolutions_of_branches_are_not_given_another_geometry(cls):
    """As those do who walk over all convolutions of a network; folding would not know."""
    layer = cls(4, 4, 5, padding=2)
    convs = [module for module in layer.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == sum(parameter.dim() == 4 for parameter in layer.parameters()) - (cls is DiverseBranchConv2d)
    for conv in convs:
        for name, value in dict(padding_mode='circular', dilation=(7, 7), stride=(2, 2)).items():
            with pytest.raises(UserError, match=f'{name} of a BranchConv2d cannot be changed'):
                setattr(conv, name, value)


class PlainBranch(NormedRepLayer):
    """A 1x1 beside the KxK, made as the tutorials make it."""

    def _add_side_branches(self, dd, norm_dd):
        self.conv_1x1 = nn.Conv2d(self.in_channels, self.out_channels, 1, bias=False, **dd)
        self.norm_1x1 = nn.BatchNorm2d(self.out_channels, **norm_dd)

    def _side_convs(self):
        return dict(conv_1x1=self.conv_1x1)

    def _side_norms(self):
        return (self.norm_1x1,)

    def _fold_sides(self):
        return dict(conv_1x1=fold_batch_norm(self.conv_1x1.weight, None, self.norm_1x1))

    def forward(self, x):
        return self._attached(self.norm_kxk(self.conv_kxk(x)), self.norm_1x1(self.conv_1x1(x)))


def test_branches_of_methods_of_ones_own_may_be_plain_convolutions():
    layer = randomize_(PlainBranch(4, 4, 3, padding=1)).eval()
    x = randn(2, 4, 8, 8, dtype=torch.float32)
    assert_near(layer.fuse()(x), layer(x), 1e-5)


@pytest.mark.parametrize('cls', LAYERS.values())
def test_norms_of_branches_that_do_more_do_not_fold(cls):
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    for norm in (BatchNormAct2d(4), Doubled(4)):
        layer = cls(4, 4, 3, padding=1).eval()
        layer.norm_kxk = norm.eval()
        with pytest.raises(UserError, match='a batch norm with gain, bias and running statistics is needed'):
            layer.fuse()


@pytest.mark.parametrize('cls', LAYERS.values())
def test_convolutions_of_branches_that_were_replaced_do_not_fold(cls):
    for change in (
            lambda conv: StdConv2d(4, 4, conv.kernel_size, padding=conv.padding),
            lambda conv: setattr(conv, 'bias', nn.Parameter(torch.ones(4))) or conv):
        layer = cls(4, 4, 3, padding=1).eval()
        name = [name for name, part in layer.named_children() if isinstance(part, nn.Conv2d)][-1]
        setattr(layer, name, change(getattr(layer, name)))
        before = state_of(layer)
        for fold in (layer.fuse, layer.begin_time_step_):
            with pytest.raises(UserError, match=r'was replaced by .*Conv2d.*, which does not fold'):
                fold()
        assert_same_state(state_of(layer), before)


@pytest.mark.parametrize(('layer', 'gain', 'dtype'), [
    *((layer, gain, torch.float32) for layer, gain in [('dbb', 1e-6), ('dbb', 0.0), ('acb', 1e-6), ('rep', 0.0)]),
    *((layer, 0.0, torch.float16) for layer in ('dbb', 'acb', 'rep'))])
def test_expanded_layer_behind_a_norm_of_any_gain(layer, gain, dtype):
    """timm starts the last norm of every residual branch at gain zero, and trains it from there."""
    rtol = {torch.float32: 1e-5, torch.float16: 5e-3}[dtype]
    stock = randomize_(TINY_MODELS['basic']()).eval()
    with torch.no_grad():
        stock.layer1[0].bn2.weight.mul_(gain)
        stock.layer1[0].bn2.bias.mul_(gain)
    model = expand(stock.to(dtype), layer)
    x = randn(2, 3, 64, 64, dtype=dtype)
    assert verify(model, stock, inputs=x).model.relative < rtol
    assert verify(model, fuse(model), inputs=x).model.relative < rtol


@pytest.mark.parametrize('layer', ['dbb', 'acb', 'rep'])
def test_outputs_are_hidden_where_only_detached_branches_have_a_gain(layer):
    pair = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)).eval()
    nn.init.zeros_(pair[1].weight)
    model = expand(pair, layer)
    for norm in model[0]._side_norms():
        nn.init.ones_(norm.weight)
    model[0].set_attach_rate_(0.0)
    verify(model, fuse(model), inputs=randn(2, 3, 8, 8, dtype=torch.float32))
