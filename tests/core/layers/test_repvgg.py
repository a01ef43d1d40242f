"""timm's RepVGG block with an attach rate: folding, restoring, and the stock block with the same function."""
import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import DEPLOY_RTOL, MODEL_RTOL, assert_near, assert_same_state, randn, randomize_, state_of, tree
from timm.layers import freeze_batch_norm_2d
from timm.models.byobnet import RepVggBlock
from timm.utils import reparameterize_model
from torch._dynamo.testing import CompileCounter

from timm_rep.core.expand import anneal_repvgg_blocks_, expand
from timm_rep.core.layers import AnnealedRepVggBlock, NormedRepLayer

# Arguments of timm's block and the layer in its KxK branch.
SHAPES = dict(
    identity=dict(in_chs=6, out_chs=6),
    widening=dict(in_chs=4, out_chs=6),
    strided=dict(in_chs=6, out_chs=6, stride=2),
    grouped=dict(in_chs=8, out_chs=8, group_size=2),
)
INNER = dict(identity=(None, 'orepa', 'dbb', 'acb'), widening=('orepa',), strided=(None,), grouped=('dbb',))
CASES = {f'{shape}-{inner}': (SHAPES[shape], inner) for shape in SHAPES for inner in INNER[shape]}
# A plain convolution, a linear and a normed layer in the KxK branch, for what does not depend on the shapes.
KINDS = ('identity-None', 'identity-orepa', 'identity-dbb')

all_cases = pytest.mark.parametrize('case', CASES)
kinds = pytest.mark.parametrize('case', KINDS)
# Every case in float64, every kind in float32; the ends of the range of the attach rate.
exact = pytest.mark.parametrize(('case', 'dtype', 'rate'), [
    *((case, torch.float64, 0.3) for case in CASES),
    *((case, torch.float32, 1.0) for case in KINDS),
    ('identity-dbb', torch.float64, 0.0),
], ids=str)


def stock(case):
    kwargs, inner = CASES[case]
    block = RepVggBlock(**kwargs)
    if inner == 'orepa':
        expand(nn.Sequential(block), inner, inplace=True)
    elif inner is not None:  # on its own, or the block would be annealed already
        block.conv_kxk = expand(block.conv_kxk, inner, select='conv')
    return block


def make(case, rate=1.0, dtype=torch.float32):
    """A block in eval mode with wide random values."""
    block = AnnealedRepVggBlock(randomize_(stock(case)).to(dtype)).eval()
    block.set_attach_rate_(rate)
    return block


def images(block):
    return randn(2, block.in_channels, 9, 10, seed=5, dtype=block.conv_1x1.conv.weight.dtype)


def before_activation(block, x):
    """The block with the identity in place of its activation, in which wrong values hide."""
    act, block.act = block.act, nn.Identity()
    try:
        return block(x)
    finally:
        block.act = act


def plain_conv(block, x, kernel, bias):
    conv = block.conv_1x1.conv
    return F.conv2d(x, kernel, bias, conv.stride, 1, 1, conv.groups)


# The block


@pytest.mark.parametrize(('case', 'training'), [
    *((case, True) for case in CASES), *((case, False) for case in KINDS)])
def test_at_rate_one_it_is_timms_block_to_the_last_bit(case, training):
    block = randomize_(stock(case)).train(training)
    other = copy.deepcopy(block)
    annealed = AnnealedRepVggBlock(block)
    assert annealed.training == training
    x = images(annealed)
    assert torch.equal(annealed(x), other(x))
    own = state_of(annealed)
    assert (own.pop('attach_rate'), own.pop('time_step')) == (1, 0)
    assert_same_state(own, state_of(other))  # the statistics, too


def test_drop_path_and_attention_stay_timms():
    block = randomize_(RepVggBlock(6, 6, drop_path_rate=0.5)).train()
    other, annealed = copy.deepcopy(block), AnnealedRepVggBlock(block)
    x = randn(16, 6, 5, 5, dtype=torch.float32)
    torch.manual_seed(1)
    expected = other(x)
    torch.manual_seed(1)
    assert torch.equal(annealed(x), expected)


@all_cases
def test_rate_multiplies_the_side_branches(case):
    block = make(case, 0.3, torch.float64).train()
    other = copy.deepcopy(block)
    x = images(block)
    expected = block.conv_kxk(x)  # a rep layer in it has the rate, too
    side = block.conv_1x1(x)
    if block.identity is not None:
        side = side + block.identity(x)
    expected = (expected + block.attach_rate * side).relu()
    assert_near(other(x), expected, 1e-12)


def test_rate_reaches_the_layer_in_the_kxk_branch():
    block = make('identity-dbb', 0.25)
    assert block.attach_rate == block.conv_kxk.conv.attach_rate == 0.25
    with pytest.raises(ValueError, match='attach rate must lie in'):
        block.set_attach_rate_(1.5)
    assert block.attach_rate == block.conv_kxk.conv.attach_rate == 0.25


def test_it_knows_its_geometry():
    block = make('widening-orepa')
    assert (block.in_channels, block.kernel_size, block.dilation) == (4, (3, 3), (1, 1))


# Fold


@exact
def test_stock_block_has_the_outputs(case, dtype, rate):
    block = make(case, rate, dtype)
    before = state_of(block)
    plain = block.stock_block()
    assert type(plain) is RepVggBlock
    reference = RepVggBlock(**CASES[case][0])
    assert list(plain.state_dict()) == list(reference.state_dict())
    assert tree(plain) == tree(reference)
    assert_near(before_activation(plain, images(block)), before_activation(block, images(block)), MODEL_RTOL[dtype])
    assert_same_state(state_of(block), before)
    own = {tensor.data_ptr() for tensor in block.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in plain.state_dict().values()}


@pytest.mark.parametrize('case', [case for case in CASES if case.endswith(('None', 'orepa'))])
def test_stock_block_has_the_outputs_in_training_mode(case):
    block = make(case, 0.3, torch.float64).train()
    plain = block.stock_block()
    assert all(module.training for module in plain.modules())
    x = images(block)
    assert_near(before_activation(plain, x), before_activation(block, x), 1e-10)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(buffer, block.get_buffer(name), rtol=1e-9, atol=1e-12)


@exact
def test_fused_block_is_timms_deploy_form(case, dtype, rate):
    block = make(case, rate, dtype)
    before = state_of(block)
    model = nn.Sequential(block)
    fused, reparameterized = block.fuse(), reparameterize_model(model)[0]
    expected = before_activation(block, images(block))
    for deploy in (fused, reparameterized):
        assert type(deploy) is RepVggBlock
        assert set(deploy.state_dict()) == {'reparam_conv.weight', 'reparam_conv.bias'}
        assert_near(before_activation(deploy, images(block)), expected, DEPLOY_RTOL[dtype])
    kernel, bias = block.compose_weight_bias()
    assert kernel.dtype == bias.dtype == dtype
    assert_near(plain_conv(block, images(block), kernel, bias), expected, MODEL_RTOL[dtype])
    assert_same_state(state_of(block), before)


@kinds
def test_training_mode_refuses_to_fuse(case):
    block = make(case, 0.3).train()
    before = state_of(block)
    with pytest.raises(ValueError, match=r'AnnealedRepVggBlock in training mode.*model\.eval\(\)'):
        block.fuse()
    if isinstance(block.conv_kxk.conv, NormedRepLayer):
        with pytest.raises(ValueError, match=r'in training mode.*model\.eval\(\)'):
            block.stock_block()
    assert_same_state(state_of(block), before)


def test_timms_own_fold_is_refused():
    """It knows no attach rate."""
    block = make('identity-None', 0.3)
    before = state_of(block)
    with pytest.raises(ValueError, match=r'in place; fuse\(\) returns'):
        block.reparameterize()
    assert_same_state(state_of(block), before)


@exact
def test_branch_kernels_add_up_to_the_kernel(case, dtype, rate):
    block = make(case, rate, dtype)
    branches = block.branch_kernels()
    inner = dict(
        orepa=['average', 'prior', 'separable', 'sequential'],
        dbb=['sequential', 'average', 'conv_1x1'],
        acb=['conv_1xk', 'conv_kx1'],
    )
    expected = ['origin', *(f'kxk_{name}' for name in inner.get(CASES[case][1], [])), 'conv_1x1']
    expected += [] if block.identity is None else ['identity']
    assert set(branches) == set(expected)
    assert next(iter(branches)) == 'origin'
    assert_near(sum(branches.values()), block.compose_weight_bias()[0], MODEL_RTOL[dtype])
    block.set_attach_rate_(0.0)
    assert_near(block.branch_kernels()['origin'], block.compose_weight_bias()[0], MODEL_RTOL[dtype])


# Restore, redraw, time steps


@exact
def test_restored_block_computes_exactly_the_kernel(case, dtype, rate):
    for with_bias in (True, False):
        block = make(case, rate, dtype)
        kernel = randn(*block.compose_weight_bias()[0].shape, seed=1, dtype=dtype)
        bias = randn(kernel.shape[0], seed=2, dtype=dtype) if with_bias else None
        before = state_of(block)
        block.restore_(kernel, bias)
        assert_near(block.compose_weight_bias()[0], kernel, MODEL_RTOL[dtype])
        x = images(block)
        assert_near(before_activation(block, x), plain_conv(block, x, kernel, bias), MODEL_RTOL[dtype])
        for name, tensor in state_of(block).items():
            if not name.startswith('conv_kxk.') or 'running' in name or 'attach_rate' in name:
                assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize('case', ['identity-None', 'identity-dbb'])
def test_restoring_takes_up_its_own_rounding(case):
    block = make(case, 0.3)
    kernel = randn(6, 6, 3, 3, seed=1, dtype=torch.float32)
    block.restore_(kernel)
    assert (block.compose_weight_bias()[0] == kernel).double().mean() > 0.85  # two thirds of them after one pass


@kinds
def test_restoring_what_does_not_fit_raises_and_changes_nothing(case):
    block = make(case, 0.3)
    before = state_of(block)
    o, i, h, w = block.compose_weight_bias()[0].shape
    for shape in [(o, i, h, w + 2), (o, i + 1, h, w), (o, i, h * w)]:
        with pytest.raises(ValueError, match=r'takes a kernel of shape \(.*\), got \('):
            block.restore_(torch.ones(shape))
    with pytest.raises(ValueError, match='bias must have shape'):
        block.restore_(torch.ones(o, i, h, w), torch.ones(o + 1))
    assert_same_state(state_of(block), before)


@all_cases
def test_redraw_is_deterministic_small_and_leaves_the_origin_alone(case):
    block = make(case, 0.3)
    other = copy.deepcopy(block)
    before, origin = state_of(block), block.branch_kernels()['origin']
    block.redraw_side_branches_(torch.Generator().manual_seed(7))
    other.redraw_side_branches_(torch.Generator().manual_seed(7))
    assert_same_state(state_of(block), state_of(other))
    assert torch.equal(block.branch_kernels()['origin'], origin)
    limit = 0.1 / block.conv_1x1.conv.out_channels ** 0.5
    assert 0.5 * limit < block.conv_1x1.conv.weight.abs().max() <= limit
    norms = [block.conv_1x1.bn] + ([] if block.identity is None else [block.identity])
    for norm in norms:
        for name, value in dict(weight=1, bias=0).items():
            assert (getattr(norm, name) == value).all(), name
    assert not any('running' in name for name, tensor in block.state_dict().items()
                   if not torch.equal(tensor, before[name]))
    changed = {name for name, tensor in block.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith('conv_kxk.conv.') for name in changed) == (CASES[case][1] is not None)
    assert not any(name.startswith('conv_kxk.bn.') for name in changed)


@pytest.mark.parametrize(('case', 'dtype', 'rate', 'compensate', 'training'), [
    *((case, torch.float64, 0.4, True, False) for case in CASES),
    *((case, torch.float64, 0.0, False, True) for case in KINDS),
    *((case, torch.float32, 1.0, True, True) for case in KINDS),
], ids=str)
def test_time_step_keeps_the_eval_outputs(case, dtype, rate, compensate, training):
    block = make(case, 0.3, dtype)
    expected = before_activation(block, images(block))
    block.train(training).begin_time_step_(torch.Generator().manual_seed(7), rate, compensate)
    assert block.training == training
    for name, tensor in block.state_dict().items():
        if name.endswith('attach_rate'):
            assert tensor == torch.tensor(rate, dtype=tensor.dtype), name
        if name.endswith('time_step'):
            assert tensor == 1, name
    assert_near(before_activation(block.eval(), images(block)), expected, MODEL_RTOL[dtype])
    block.set_attach_rate_(0.9)
    assert (before_activation(block, images(block)) - expected).abs().max() > 1e-3  # there are side branches


@pytest.mark.parametrize(('case', 'rate'), [('identity-orepa', 1 / 6), ('widening-orepa', 1.0)])
def test_linear_layer_in_the_block_is_held_at_every_attach_rate(case, rate):
    """What the time step adds to the outputs is the block's own 1x1 and identity, which have norms."""
    block = make(case, 0.3, torch.float64)
    expected = before_activation(block, images(block))
    block.begin_time_step_(torch.Generator().manual_seed(7), rate)
    block.attach_rate.zero_()
    assert_near(before_activation(block, images(block)), expected, 1e-10)
    block.conv_kxk.conv.set_attach_rate_(0.0)
    assert (before_activation(block, images(block)) - expected).abs().max() > 1e-3  # it has side branches


@kinds
def test_frozen_norms(case):
    block = freeze_batch_norm_2d(nn.Sequential(make(case, 0.3, torch.float64)))[0]
    x = images(block)
    expected = before_activation(block, x)
    plain = block.stock_block()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert_near(before_activation(plain, x), expected, 1e-10)
    block.begin_time_step_(torch.Generator().manual_seed(7), 0.4, compensate=True)
    assert_near(before_activation(block.train(), x), expected, 1e-10)


@kinds
def test_time_step_changes_the_function_in_training_mode(case):
    """Of a block with linear layers in it, too: its own 1x1 and identity have norms."""
    block = make(case, 0.3, torch.float64).train()
    x = images(block)
    expected = before_activation(copy.deepcopy(block), x)
    block.begin_time_step_(torch.Generator().manual_seed(7))
    with pytest.raises(AssertionError, match='largest difference'):
        assert_near(before_activation(block, x), expected, 1e-2)


# Training and tools


@all_cases
def test_every_parameter_gets_a_gradient(case):
    block = make(case, 0.3).train()
    x = images(block)
    assert block.branch_gradients() == {}
    (before_activation(block, x) * randn(*block(x).shape, seed=1, dtype=x.dtype)).sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    gradients = block.branch_gradients()
    assert next(iter(gradients)) == 'origin'
    assert torch.equal(gradients['conv_1x1'], block.conv_1x1.conv.weight.grad)
    expected = ['origin', 'conv_1x1']
    if CASES[case][1] is not None:
        expected += [f'kxk_{name}' for name in block.conv_kxk.conv.branch_gradients() if name != 'origin']
    else:
        assert torch.equal(gradients['origin'], block.conv_kxk.conv.weight.grad)
    assert set(gradients) == set(expected)


@kinds
@pytest.mark.parametrize('tool', ['script', 'trace', 'fx', 'export'])
def test_tools_keep_the_function(case, tool):
    if tool == 'export' and torch.__version__ < '2.7':
        pytest.skip('the exporter of torch 2.6 loses the statistics of a norm that is read twice')
    block = make(case, 0.3)
    x = images(block)
    converted = dict(
        script=lambda: torch.jit.script(block),
        trace=lambda: torch.jit.trace(block, x),
        fx=lambda: torch.fx.symbolic_trace(block),
        export=lambda: torch.export.export(block, (x,)).module(),
    )[tool]()
    assert_near(converted(x), block(x), 1e-6)
    for form in (block, converted):
        for name, buffer in form.named_buffers():
            if name.endswith('attach_rate'):
                buffer.fill_(1.0)
    assert_near(converted(x), block(x), 1e-6)


@kinds
def test_copies_are_independent(case):
    block = make(case, 0.3)
    before = state_of(block)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(other) is AnnealedRepVggBlock
        assert_same_state(state_of(other), before)
        assert torch.equal(other(images(block)), block(images(block)))
        other.begin_time_step_(attach_rate=0.5)
        assert_same_state(state_of(block), before)


@kinds
def test_compiled_block_keeps_the_outputs_at_every_attach_rate(case):
    torch._dynamo.reset()
    block = make(case, dtype=torch.float64)
    counter = CompileCounter()
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    x = images(block)
    for rate in (0.25, 0.5, 1.0):
        block.set_attach_rate_(rate)
        assert_near(compiled(x), block(x), 1e-12)
    assert counter.frame_count == 1


@kinds
def test_autocast_runs_and_does_not_touch_folding(case):
    block = make(case, 0.3)
    kernel, bias = block.compose_weight_bias()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        folded = block.compose_weight_bias()
        output = block(images(block))
    assert torch.equal(folded[0], kernel)
    assert torch.equal(folded[1], bias)
    assert_near(output.float(), block(images(block)), 0.05)


@kinds
def test_half_precision(case):
    block = make(case, 0.5).bfloat16()
    assert block(images(block)).dtype == torch.bfloat16
    assert block.compose_weight_bias()[0].dtype == torch.bfloat16
    block.begin_time_step_()
    assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}


@kinds
def test_block_on_meta(case):
    block = AnnealedRepVggBlock(stock(case).to('meta'))
    assert {tensor.device.type for tensor in (*block.parameters(), *block.buffers())} == {'meta'}
    block.set_attach_rate_(0.5)
    assert block(torch.empty(2, 6, 9, 9, device='meta')).shape == (2, 6, 9, 9)
    assert block.compose_weight_bias()[0].shape == (6, 6, 3, 3)


# Bad input


def test_block_alone_is_no_model():
    with pytest.raises(ValueError, match='a model around the block is needed'):
        anneal_repvgg_blocks_(RepVggBlock(4, 4))
    with pytest.raises(ValueError, match='a model around the'):
        expand(RepVggBlock(4, 4), 'rep')


def test_deploy_form_has_no_branches_to_anneal():
    block = RepVggBlock(4, 4).eval()
    block.reparameterize()
    before = state_of(block)
    with pytest.raises(ValueError, match='deploy form has no branches'):
        AnnealedRepVggBlock(block)
    assert_same_state(state_of(block), before)
