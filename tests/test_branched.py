"""Layers with a norm in every branch: folding, restoring, and the pair of convolution and norm they stand for."""
import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import LINEAR_RTOL, MODEL_RTOL, assert_near, assert_same_state, randn, randomize_, state_of
from torch._dynamo.testing import CompileCounter

from timm_rep import DiverseBranchConv2d

CASES = dict(
    kxk=(4, 6, 3, dict(padding=1)),
    strided=(4, 6, 3, dict(padding=1, stride=2)),
    dilated=(4, 6, 3, dict(padding=2, dilation=2)),
    unpadded=(4, 6, 3, {}),
    wide_padding=(4, 6, 3, dict(padding=3, stride=2)),
    uneven=(4, 6, (3, 5), dict(padding=(2, 1), stride=(2, 1), dilation=(1, 2))),
    flat=(4, 6, (1, 3), dict(padding=(0, 1))),
    large=(3, 5, 7, dict(padding=3)),
    grouped=(4, 6, 3, dict(padding=1, groups=2)),
    depthwise=(6, 6, 3, dict(padding=1, groups=6)),
    depthwise_large=(4, 4, 5, dict(padding=4, groups=4, stride=2, dilation=2)),
    multiplier=(3, 6, 3, dict(padding=1, groups=3)),
)
KINDS = ('kxk', 'depthwise')

all_cases = pytest.mark.parametrize('case', CASES)
kinds = pytest.mark.parametrize('case', KINDS)
dtypes = pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
rates = pytest.mark.parametrize('rate', [0.0, 0.3, 1.0])


def fresh(case, **kwargs):
    c_in, c_out, size, geometry = CASES[case]
    return DiverseBranchConv2d(c_in, c_out, size, **geometry, **kwargs)


def make(case, rate=1.0, dtype=torch.float32):
    """A layer in eval mode with wide random values."""
    layer = randomize_(fresh(case, dtype=dtype)).eval()
    layer.set_attach_rate_(rate)
    return layer


def images(layer, batch=2):
    return randn(batch, layer.in_channels, 15, 16, seed=5, dtype=layer.seq_1x1.dtype)


def plain_conv(layer, x, kernel, bias):
    return F.conv2d(x, kernel, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


@all_cases
@dtypes
@rates
def test_fused_convolution_has_the_outputs(case, dtype, rate):
    layer = make(case, rate, dtype)
    before = state_of(layer)
    conv = layer.fuse()
    assert type(conv) is nn.Conv2d
    assert conv.weight.dtype == dtype
    assert_near(conv(images(layer)), layer(images(layer)), MODEL_RTOL[dtype])
    assert torch.equal(conv.weight, layer.weight)
    assert_same_state(state_of(layer), before)


@all_cases
@dtypes
@rates
def test_fused_pair_has_the_outputs(case, dtype, rate):
    layer = make(case, rate, dtype)
    conv, norm = layer.fuse_conv_norm()
    assert (type(conv), type(norm), conv.bias) == (nn.Conv2d, nn.BatchNorm2d, None)
    assert not norm.training
    assert (norm.eps, norm.momentum) == (layer.norm_kxk.eps, layer.norm_kxk.momentum)
    assert_near(norm(conv(images(layer))), layer(images(layer)), MODEL_RTOL[dtype])


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('case', ['unpadded', 'depthwise'])
@rates
def test_forward_is_the_block_of_the_paper(case, training, rate):
    """Written out without padding, where the border does not matter."""
    c_in, c_out, size, geometry = CASES[case]
    layer = DiverseBranchConv2d(c_in, c_out, size, groups=geometry.get('groups', 1), dtype=torch.float64)
    randomize_(layer).train(training)
    layer.set_attach_rate_(rate)
    other = copy.deepcopy(layer)
    x = images(layer)

    inner = torch.zeros_like(layer.seq_1x1)
    for channel in range(inner.shape[0]):  # one for each group: the input channel that this inner channel passes on
        inner[channel, 0 if case == 'depthwise' else channel] = 1
    mixed = F.conv2d(x, inner + layer.seq_1x1, groups=layer.groups)
    side = layer.seq_norm(layer.seq_kxk(layer.seq_inner_norm.norm(mixed)))
    pooled = x if case == 'depthwise' else layer.avg_inner_norm.norm(layer.avg_conv(x))
    side = side + layer.avg_norm(F.avg_pool2d(pooled, size, stride=1))
    if case != 'depthwise':
        side = side + layer.norm_1x1(layer.conv_1x1(x))[:, :, 1:-1, 1:-1] if not training else side + layer.norm_1x1(
            layer.conv_1x1(x[:, :, 1:-1, 1:-1]))
    expected = layer.norm_kxk(layer.conv_kxk(x)) + layer.attach_rate * side
    assert_near(other(x), expected, 1e-12)


@all_cases
def test_training_mode_refuses_to_fuse(case):
    layer = make(case).train()
    before = state_of(layer)
    for fuse in (layer.fuse, layer.fuse_conv_norm):
        with pytest.raises(RuntimeError, match=r'DiverseBranchConv2d in training mode.*model\.eval\(\)'):
            fuse()
    assert_same_state(state_of(layer), before)


def test_fused_norm_keeps_the_mean_of_its_convolution():
    layer = randomize_(DiverseBranchConv2d(4, 6, 3, momentum=1.0, dtype=torch.float64))
    x = images(layer, batch=32)
    layer(x)  # the kept statistics become those of this batch
    conv, norm = layer.eval().fuse_conv_norm()
    assert_near(norm.running_mean, conv(x).mean((0, 2, 3)), 1e-3)
    assert norm.num_batches_tracked == 1
    assert (norm.running_var > 0).all()


@all_cases
@dtypes
@rates
@pytest.mark.parametrize('bias', [True, False])
def test_restored_layer_computes_exactly_the_kernel(case, dtype, rate, bias):
    layer = make(case, rate, dtype)
    kernel = randn(*layer.weight_shape, seed=1, dtype=dtype)
    bias = randn(layer.out_channels, seed=2, dtype=dtype) if bias else None
    before = state_of(layer)
    layer.restore_(kernel, bias)
    x = images(layer)
    assert_near(layer.weight, kernel, LINEAR_RTOL[dtype])
    assert_near(layer(x), plain_conv(layer, x, kernel, bias), MODEL_RTOL[dtype])
    changed = {name for name, tensor in state_of(layer).items() if not torch.equal(tensor, before[name])}
    assert changed == {'conv_kxk.weight', 'norm_kxk.weight', 'norm_kxk.bias'}


@all_cases
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


@all_cases
@dtypes
@pytest.mark.parametrize('with_norm', [True, False])
def test_layer_from_a_convolution_has_its_function(case, dtype, with_norm):
    c_in, c_out, size, geometry = CASES[case]
    conv = nn.Conv2d(c_in, c_out, size, **geometry, bias=not with_norm, dtype=dtype).eval()
    norm = randomize_(nn.BatchNorm2d(c_out, eps=1e-3, momentum=0.2, dtype=dtype)).eval() if with_norm else None
    layer = DiverseBranchConv2d.from_conv(conv, torch.Generator().manual_seed(0), norm)
    again = DiverseBranchConv2d.from_conv(conv, torch.Generator().manual_seed(0), norm)
    assert not layer.training
    x = images(layer)
    assert_near(layer(x), norm(conv(x)) if with_norm else conv(x), MODEL_RTOL[dtype])
    assert_same_state(state_of(layer), state_of(again))
    if with_norm:
        assert torch.equal(layer.norm_kxk.running_mean, norm.running_mean)
        assert torch.equal(layer.norm_kxk.running_var, norm.running_var)
        assert (layer.norm_kxk.eps, layer.seq_norm.momentum) == (1e-3, 0.2)


@all_cases
def test_redraw_is_deterministic_small_and_leaves_the_origin_alone(case):
    layer = make(case, 0.3)
    other = copy.deepcopy(layer)
    before = state_of(layer)
    layer.redraw_side_branches_(torch.Generator().manual_seed(7))
    other.redraw_side_branches_(torch.Generator().manual_seed(7))
    assert_same_state(state_of(layer), state_of(other))
    limit = 0.1 / layer.out_channels ** 0.5
    for name, tensor in layer.state_dict().items():
        if name.startswith(('conv_kxk.', 'norm_kxk.', 'attach_rate')):
            assert torch.equal(tensor, before[name]), name
        elif tensor.ndim == 4 and name != 'seq_1x1':
            assert 0 < tensor.abs().max() <= limit, name
        elif name.endswith(('running_var', '.weight')):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            assert not tensor.any(), name


@all_cases
def test_every_parameter_gets_a_gradient(case):
    layer = make(case, 0.3).train()
    x = images(layer)
    (layer(x) * randn(*layer(x).shape, seed=1, dtype=x.dtype)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@kinds
@pytest.mark.parametrize('tool', ['script', 'trace', 'fx', 'export', 'deepcopy', 'pickle'])
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


@all_cases
def test_autocast_runs_and_does_not_touch_fusing(case):
    layer = make(case, 0.3)
    expected = layer.fuse()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        fused = layer.fuse()
        output = layer(images(layer))
    assert_same_state(state_of(fused), state_of(expected))
    assert_near(output.float(), layer(images(layer)), 0.05)


@all_cases
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


@pytest.mark.parametrize(('build', 'message'), [
    (lambda: DiverseBranchConv2d(4, 4, 2), r'odd kernel size .* got \(2, 2\)'),
    (lambda: DiverseBranchConv2d(4, 4, 1), 'larger than 1x1'),
    (lambda: DiverseBranchConv2d(4, 4, 3, padding='same'), "padding in pixels, got 'same'"),
    (lambda: DiverseBranchConv2d(4, 4, 3, padding_mode='reflect'), "padding_mode 'zeros', got 'reflect'"),
    (lambda: DiverseBranchConv2d(4, 6, 3, groups=4), 'out_channels=6, groups=4'),
])
def test_unsupported_case_raises(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(('norm', 'message'), [
    (dict(affine=False), 'weight and bias'),
    (dict(track_running_stats=False), 'running statistics'),
])
def test_norm_that_cannot_be_folded_raises(norm, message):
    with pytest.raises(ValueError, match=message):
        DiverseBranchConv2d.from_conv(nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4, **norm))
