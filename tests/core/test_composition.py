"""Composed kernels against the formula, against branches on feature maps, and their explicit backward."""
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import LINEAR_RTOL, EmulatedTF32, assert_near, assert_same_state, randn, randomize_
from torch.utils._python_dispatch import TorchDispatchMode

from timm_rep.core.composition import (
    compose_orepa,
    compose_orepa_plain,
    compose_pointwise,
    compose_pointwise_plain,
    spread_scale,
)
from timm_rep.core.layers import (
    DilatedConv2d,
    DiverseBranchConv2d,
    DOConv2d,
    ExpandedConv2d,
    MobileOneConv2d,
    OrepaConv2d,
    OrepaPointwiseConv2d,
    OrepaStemConv2d,
    RefConv2d,
    RepNasConv2d,
)
from timm_rep.core.precision import full_float32

# input and output channels, kernel size, arguments; more than four groups double the inner channels
KXK = [
    (4, 6, 3, {}),
    (4, 6, 3, dict(branch_1x1=False)),
    (3, 4, (3, 5), {}),
    (3, 5, 7, {}),
    (3, 4, (1, 3), {}),
    (4, 8, 5, dict(groups=2)),
    (12, 12, 3, dict(groups=6)),
    (8, 16, 3, dict(groups=8)),
    (8, 8, 3, dict(groups=8)),
    (4, 6, 3, dict(branches=('origin', 'average'))),
    (6, 4, 3, dict(branches=('origin', 'separable', 'prior'))),
    (6, 6, 5, dict(branches=('origin', 'sequential'), groups=2)),
    (6, 6, 3, dict(branches=('origin', 'conv_1x1', 'sequential'), groups=6)),
    (6, 4, 3, dict(branches=('origin', 'separable'), groups=2)),
]
POINTWISE = [(4, 6, 1), (6, 4, 1), (5, 5, 1), (4, 8, 2), (12, 6, 6)]

kxk = pytest.mark.parametrize(('c_in', 'c_out', 'size', 'kwargs'), KXK, ids=str)
pointwise = pytest.mark.parametrize(('c_in', 'c_out', 'groups'), POINTWISE)


def kxk_layer(c_in, c_out, size, kwargs, rate=0.3, dtype=torch.float64):
    layer = randomize_(OrepaConv2d(c_in, c_out, size, bias=False, **kwargs, dtype=dtype))
    layer.set_attach_rate_(rate)
    return layer


def pointwise_layer(c_in, c_out, groups, rate=0.3):
    layer = randomize_(OrepaPointwiseConv2d(c_in, c_out, groups=groups, bias=False, dtype=torch.float64))
    layer.set_attach_rate_(rate)
    return layer


def parameters_of(layer):
    return [p.detach().clone().requires_grad_() for p in layer.parameters()]


def composed(layer, parameters, plain=False, **kwargs):
    """The layer's kernel from other values of its parameters, in their order."""
    if isinstance(layer, OrepaPointwiseConv2d):
        compose = compose_pointwise_plain if plain else compose_pointwise
        return compose(*parameters, layer.attach_rate.double(), layer.groups)
    named = dict(zip((name for name, _ in layer.named_parameters()), parameters))
    branches, seq_1x1, dw_conv, scale = (
        named.get(name, getattr(layer, name)) for name in ('branches', 'seq_1x1', 'dw_conv', 'scale'))
    gains = spread_scale(scale, layer.attach_rate.double(), layer.row_branch)
    compose = compose_orepa_plain if plain else compose_orepa
    return compose(branches, gains, seq_1x1, dw_conv, layer.filters, layer.groups, **kwargs)


def prior_filters(channels, height, width):
    """The table of FACTS: the first half of the channels varies along the height, the second along the width."""
    prior = torch.empty(channels, 1, height, width, dtype=torch.float64)
    for o in range(channels):
        for h in range(height):
            for w in range(width):
                first_half = o < channels / 2
                prior[o, 0, h, w] = (
                    math.cos(math.pi * (h + 0.5) * (o + 1) / height) if first_half
                    else math.cos(math.pi * (w + 0.5) * (o + 1 - channels / 2) / width)
                )
    return prior


def kxk_on_feature_maps(layer, x):
    """The block as the paper draws it: every branch a sequence of convolutions, scaled, then summed."""
    groups, size = layer.groups, layer.kernel_size
    padding = (size[0] // 2, size[1] // 2)
    c_in, c_out = layer.in_channels, layer.out_channels
    views = layer.branch_views()

    def conv_1x1(weight):
        return F.conv2d(x, weight.reshape(c_out, c_in // groups, 1, 1), groups=groups)

    def separable(weight):
        filtered = F.conv2d(x, layer.dw_conv, padding=padding, groups=c_in)
        return F.conv2d(filtered, weight.reshape(c_out, -1, 1, 1), groups=groups)

    def sequential(weight):
        # Inner channels of a group: all its inputs once, or twice; each starts as the identity.
        ratio = layer.seq_1x1.shape[0] // c_in
        by_group = x.unflatten(1, (groups, 1, -1)).expand(-1, -1, ratio, -1, -1, -1).flatten(1, 3)
        mixed = by_group + F.conv2d(x, layer.seq_1x1, groups=groups)
        return F.conv2d(mixed, weight.transpose(1, 2).flatten(1, 2), padding=padding, groups=groups)

    convs = dict(
        origin=lambda weight: F.conv2d(x, weight, padding=padding, groups=groups),
        average=lambda weight: F.avg_pool2d(conv_1x1(weight), size, stride=1, padding=padding),
        prior=lambda weight: F.conv2d(conv_1x1(weight), prior_filters(c_out, *size), padding=padding, groups=c_out),
        conv_1x1=conv_1x1,
        separable=separable,
        sequential=sequential,
    )
    branches = {name: convs[name](view) for name, view in views.items()}
    total = torch.zeros(())
    for scale, name in zip(layer.scale, layer.branch_names):
        rate = 1.0 if name == 'origin' else layer.attach_rate.double()
        total = total + branches.pop(name) * (rate * scale).reshape(1, -1, 1, 1)
    assert not branches, 'a branch without a scale'
    return total


@kxk
def test_kxk_equals_formula_and_branches_on_feature_maps(c_in, c_out, size, kwargs):
    layer = kxk_layer(c_in, c_out, size, kwargs)
    x = randn(2, c_in, 9, 8)
    kernel = composed(layer, parameters_of(layer))
    assert_near(kernel, composed(layer, parameters_of(layer), plain=True), 1e-12)
    assert_near(kernel, layer.compose_weight(), 1e-12)
    padding = (layer.kernel_size[0] // 2, layer.kernel_size[1] // 2)
    assert_near(F.conv2d(x, kernel, padding=padding, groups=layer.groups), kxk_on_feature_maps(layer, x), 1e-12)
    assert_near(sum(layer.branch_kernels().values()), kernel, 1e-12)


@pointwise
def test_pointwise_equals_formula_and_branches_on_feature_maps(c_in, c_out, groups):
    layer = pointwise_layer(c_in, c_out, groups)
    x = randn(2, c_in, 5, 4)
    kernel = composed(layer, parameters_of(layer))
    assert_near(kernel, composed(layer, parameters_of(layer), plain=True), 1e-12)
    sequential = F.conv2d(F.conv2d(x, layer.seq_first, groups=groups), layer.seq_second, groups=groups)
    expected = (
        F.conv2d(x, layer.conv_1x1, groups=groups) * layer.scale[0].reshape(1, -1, 1, 1)
        + sequential * (layer.attach_rate.double() * layer.scale[1]).reshape(1, -1, 1, 1)
    )
    assert_near(layer(x), expected, 1e-12)
    assert_near(sum(layer.branch_kernels().values()), kernel, 1e-12)


@kxk
def test_kxk_gradients_equal_autograd_of_the_formula_in_both_memory_formats(c_in, c_out, size, kwargs):
    layer = kxk_layer(c_in, c_out, size, kwargs)
    parameters = parameters_of(layer)
    plain = composed(layer, parameters, plain=True)
    grad = randn(*plain.shape, seed=1)
    expected = torch.autograd.grad(plain, parameters, grad)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        kernel = composed(layer, parameters, channels_last=memory_format is torch.channels_last)
        assert kernel.is_contiguous(memory_format=memory_format)
        assert_near(kernel, plain, 1e-12)
        actual = torch.autograd.grad(kernel, parameters, grad.contiguous(memory_format=memory_format))
        for a, e in zip(actual, expected):
            assert_near(a, e, 1e-12)


@pointwise
def test_pointwise_gradients_equal_autograd_of_the_formula(c_in, c_out, groups):
    layer = pointwise_layer(c_in, c_out, groups)
    parameters = parameters_of(layer)
    grad = randn(*layer.weight_shape, seed=1)
    actual = torch.autograd.grad(composed(layer, parameters), parameters, grad)
    expected = torch.autograd.grad(composed(layer, parameters, plain=True), parameters, grad)
    for a, e in zip(actual, expected):
        assert_near(a, e, 1e-12)


class Passes(TorchDispatchMode):
    """Counts the products and the sums that are computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.bmm.default, torch.ops.aten.sum.dim_IntList)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('frozen', ['seq_1x1', 'scale'])
def test_gradients_of_what_is_frozen_are_not_computed(frozen):
    layer = kxk_layer(6, 8, 3, {})
    grad = randn(*layer.weight_shape, seed=1)
    parameters = dict(layer.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(layer.compose_weight(), [*parameters.values()], grad)))
    with Passes() as whole:
        torch.autograd.grad(layer.compose_weight(), [*parameters.values()], grad)

    parameters.pop(frozen).requires_grad_(False)
    with Passes() as less:
        actual = torch.autograd.grad(layer.compose_weight(), [*parameters.values()], grad)
    assert less.count == whole.count - 1
    for name, gradient in zip(parameters, actual):
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize('layer', [
    kxk_layer(2, 2, 3, {}),
    kxk_layer(4, 4, (1, 3), dict(groups=2)),
    kxk_layer(5, 5, (3, 1), dict(groups=5)),
    pointwise_layer(2, 3, 1),
    pointwise_layer(4, 2, 2),
], ids=['kxk', 'grouped', 'depthwise', 'pointwise', 'grouped pointwise'])
def test_first_and_second_derivative(layer):
    parameters = parameters_of(layer)
    assert torch.autograd.gradcheck(lambda *values: composed(layer, values), parameters)
    assert torch.autograd.gradgradcheck(lambda *values: composed(layer, values), parameters)


LAYERS = dict(
    kxk=lambda **dd: OrepaConv2d(6, 8, 3, padding=1, **dd),
    grouped=lambda **dd: OrepaConv2d(12, 12, 3, padding=1, groups=6, **dd),
    pointwise=lambda **dd: OrepaPointwiseConv2d(6, 8, **dd),
    stem=lambda **dd: OrepaStemConv2d(3, 8, 7, padding=3, **dd),
    doconv=lambda **dd: DOConv2d(6, 8, 3, padding=1, **dd),
    expanded=lambda **dd: ExpandedConv2d(6, 8, 3, padding=1, **dd),
    refconv=lambda **dd: RefConv2d(6, 8, 3, padding=1, **dd),
    dilated=lambda **dd: DilatedConv2d(6, 6, 7, padding=3, groups=6, **dd),
    mobileone=lambda **dd: MobileOneConv2d(6, 6, 3, padding=1, **dd),
    repnas=lambda **dd: RepNasConv2d(6, 6, 3, padding=1, **dd),
)
layers = pytest.mark.parametrize('make', LAYERS.values(), ids=LAYERS)


@pytest.mark.parametrize(('make', 'dtype'), [
    *((make, torch.bfloat16) for make in LAYERS.values()), (LAYERS['kxk'], torch.float16)],
    ids=[*LAYERS, 'kxk-float16'])
def test_half_precision_parameters_are_composed_in_float32(make, dtype):
    half = randomize_(make()).to(dtype)
    full = make()
    full.load_state_dict(half.state_dict())
    assert half.compose_weight().dtype == dtype
    # One rounding at the end; a stem rounds the kernels of its blocks too.
    depth = 4 if isinstance(half, OrepaStemConv2d) else 1
    assert_near(half.compose_weight().float(), full.compose_weight(), depth * torch.finfo(dtype).eps)
    if depth == 1:
        assert torch.equal(half.compose_weight(), full.compose_weight().to(dtype))


@layers
def test_autocast_keeps_the_composition_in_float32(make):
    layer = randomize_(make())
    x = randn(2, layer.in_channels, 9, 9, dtype=torch.float32)
    outside, branches = layer.compose_weight(), layer.branch_kernels()
    grad = randn(*outside.shape, seed=1, dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside, inside_branches = layer.compose_weight(), layer.branch_kernels()
        assert layer(x).dtype == torch.bfloat16
    assert_same_state(inside_branches, branches)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    parameters = [p for p in layer.parameters() if p is not layer.bias]
    expected = torch.autograd.grad(outside, parameters, grad)
    for a, e in zip(torch.autograd.grad(inside, parameters, grad), expected):
        assert torch.equal(a, e)


@pytest.mark.parametrize('name', ['kxk', 'grouped', 'pointwise'])
def test_only_parameters_are_saved_for_backward(name):
    layer = LAYERS[name]()
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    extra = []

    def pack(tensor):
        if tensor.data_ptr() not in own:
            extra.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kernel = layer.compose_weight()
    assert kernel.requires_grad
    # The gains, a vector for each output channel, are all that is computed and kept.
    assert sum(extra) <= layer.out_channels * 64


def test_gains_are_scales_times_the_attach_rate_but_for_the_origin():
    layer = kxk_layer(4, 6, 3, {}, rate=0.5)
    gains = spread_scale(layer.scale, layer.attach_rate.double(), layer.row_branch)
    taps = 9
    lengths = dict(origin=taps, average=1, prior=1, conv_1x1=1, separable=8, sequential=taps)
    rows = [
        scale.unsqueeze(1).expand(-1, lengths[name]) * (1.0 if name == 'origin' else 0.5)
        for name, scale in zip(layer.branch_names, layer.scale)
    ]
    assert_near(gains, torch.cat(rows, dim=1), LINEAR_RTOL[torch.float64])


# Precision


def older_precision():
    return torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def newer_precision():
    backends = torch.backends
    holders = (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    return [holder.fp32_precision for holder in holders]


@pytest.fixture
def precision():
    """Leaves the process with the precision that it had."""
    before = older_precision()
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[2]


@pytest.mark.parametrize(('allowed', 'convolutions'), [('highest', True), ('high', False), ('medium', True)])
def test_full_float32_is_the_precision_inside_only(precision, allowed, convolutions):
    torch.set_float32_matmul_precision(allowed)
    torch.backends.cudnn.allow_tf32 = convolutions
    before = older_precision()
    with full_float32():
        assert older_precision() == ('highest', False, False)
        with full_float32():
            pass
        assert older_precision() == ('highest', False, False)
    assert older_precision() == before
    with pytest.raises(RuntimeError), full_float32():
        torch.ones(2) @ torch.ones(3)
    assert older_precision() == before


def test_full_float32_of_two_threads_ends_with_the_last_one(precision):
    torch.set_float32_matmul_precision('high')
    before = older_precision()
    first, second = full_float32(), full_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert older_precision() == ('highest', False, False)
    second.__exit__(None, None, None)
    assert older_precision() == before


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, 'fp32_precision'), reason='torch 2.9 and newer')
@pytest.mark.parametrize(('older', 'newer'), [('highest', 'tf32'), ('high', 'none'), ('high', 'ieee')])
def test_full_float32_goes_with_both_ways_to_set_it(precision, older, newer):
    """Torch refuses to tell the older setting once the newer one says something else."""
    torch.set_float32_matmul_precision(older)
    torch.backends.cuda.matmul.fp32_precision = newer
    torch.backends.cudnn.conv.fp32_precision = newer
    before = newer_precision()
    with full_float32():
        assert newer_precision() == ['ieee'] * 4
        assert older_precision() == ('highest', False, False)
    assert newer_precision() == before


FOLDED = dict(LAYERS, dbb=lambda **dd: DiverseBranchConv2d(6, 8, 3, padding=1, **dd))
folded = pytest.mark.parametrize('make', FOLDED.values(), ids=FOLDED)


@folded
def test_folding_runs_in_full_float32_where_tf32_is_allowed(make):
    layer = randomize_(make()).eval()
    layer.set_attach_rate_(0.5)
    expected, branches = layer.fuse(), layer.branch_kernels()
    with EmulatedTF32():
        actual, actual_branches = layer.fuse(), layer.branch_kernels()
        assert torch.backends.cuda.matmul.allow_tf32
    assert_same_state(actual.state_dict(), expected.state_dict())
    assert_same_state(actual_branches, branches)


@folded
def test_a_time_step_runs_in_full_float32_where_tf32_is_allowed(make):
    layer = randomize_(make()).eval()
    expected = layer.weight
    with EmulatedTF32():
        layer.begin_time_step_(torch.Generator().manual_seed(0), 0.5, compensate=True)
    assert_near(layer.weight, expected, 5e-6)


@pytest.mark.parametrize('name', [name for name in LAYERS if name not in ('refconv', 'mobileone')])  # have no product
def test_a_training_step_composes_as_the_user_allows(name):
    """Proves that the tests above can fail."""
    layer = randomize_(LAYERS[name]())
    x = randn(2, layer.in_channels, 9, 9, dtype=torch.float32)
    expected = layer(x)
    with EmulatedTF32(), pytest.raises(AssertionError, match='largest difference'):
        assert_near(layer(x), expected, 1e-5)


@pytest.mark.parametrize('name', ['kxk', 'stem', 'dbb'])
def test_a_compiled_graph_folds(name):
    torch._dynamo.reset()
    layer = randomize_(FOLDED[name]()).eval()
    kernel = torch.compile(layer.compose_weight, fullgraph=True, backend='eager')()
    assert_near(kernel, layer.compose_weight(), 1e-6)
