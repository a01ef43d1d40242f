"""Kernels that are composed together: layers of one shape in one call, and all calls as one graph."""
import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn
from graph_stand_in import GRAPHS, Net, assert_same_gradients, captured, images, loss_of, network
from helpers import TINY_MODELS, assert_near, mixed_model, randn, randomize_
from timm.utils import ModelEmaV3
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import timm_rep
from timm_rep import UserError, capture, micro_batch
from timm_rep.core.layers import OrepaConv2d
from timm_rep.core.layers.together import KernelsTogether, compose_each, compose_side_by_side


class Operations(TorchDispatchMode):
    """Counts operations that launch something."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and not any(part in str(func) for part in ('detach', 'view', 'empty'))
        return func(*args, **(kwargs or {}))


# Layers of one shape in one call

CONVS = dict(
    kxk=lambda: nn.Conv2d(6, 8, 3),
    grouped=lambda: nn.Conv2d(12, 18, (3, 5), groups=6, bias=False),
    depthwise=lambda: nn.Conv2d(6, 6, 3, groups=6),
    pointwise=lambda: nn.Conv2d(6, 4, 1),
    grouped_pointwise=lambda: nn.Conv2d(6, 12, 1, groups=3),
    stem=lambda: nn.Conv2d(3, 4, 7),
)
OPTIONS = dict(
    vector={},
    scalar=dict(scaling='scalar'),
    none=dict(scaling='none'),
    three=dict(branches=['origin', 'prior', 'separable']),
)


@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('kind', CONVS)
def test_kernels_and_gradients_are_those_of_one_call_for_each(kind, channels_last, options):
    torch.manual_seed(0)
    block = nn.Sequential(*(CONVS[kind]().double() for _ in range(3)))
    layers = list(randomize_(timm_rep.expand(block, timm_rep.Orepa(**OPTIONS[options]), select='*')))
    for number, layer in enumerate(layers):
        layer.set_attach_rate_(1 - number / 4)
    expected = compose_each(layers, channels_last)
    kernels = compose_side_by_side(layers, channels_last)
    parameters = [p for layer in layers for p in layer.parameters() if p is not layer.bias]
    weights = [randn(*kernel.shape, seed=number) for number, kernel in enumerate(expected)]
    wanted = torch.autograd.grad(expected, parameters, weights)
    found = torch.autograd.grad(kernels, parameters, weights)
    for one, other in zip([*kernels, *found], [*expected, *wanted]):
        assert_near(one, other, 1e-12) if other.any() else torch.testing.assert_close(one, other)
    if kind != 'pointwise':
        assert [kernel.stride() for kernel in kernels] == [kernel.stride() for kernel in expected]


def test_layers_of_one_shape_take_one_call():
    layers = [OrepaConv2d(6, 8, 3) for _ in range(6)]
    with Operations() as one:
        compose_each(layers[:1], False)
    with Operations() as all_of_them:
        compose_side_by_side(layers, False)
    assert one.count < all_of_them.count < 3 * one.count


def test_what_composes_otherwise_composes_alone():
    class Doubled(OrepaConv2d):
        def _compose(self, channels_last):
            return 2 * super()._compose(channels_last)

    layers = [OrepaConv2d(4, 4, 3), Doubled(4, 4, 3), OrepaConv2d(4, 4, 3), Doubled(4, 4, 3), OrepaConv2d(4, 6, 3)]
    for one, other in zip(compose_side_by_side(layers, False), compose_each(layers, False)):
        assert_near(one, other, 1e-6)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_layers(dtype):
    layers = [OrepaConv2d(6, 8, 3, dtype=dtype) for _ in range(2)]
    for one, other in zip(compose_side_by_side(layers, False), compose_each(layers, False)):
        assert one.dtype == dtype
        assert_near(one, other, 1e-2)


# A model

@GRAPHS
@pytest.mark.parametrize('kind', [*TINY_MODELS, 'mixed'])
def test_a_step_of_a_model(kind, graph, graphs):
    model = mixed_model().double() if kind == 'mixed' else network(kind)
    twin = copy.deepcopy(model)
    captured(model, graph)
    for seed in range(2):
        ours, theirs = loss_of(model, seed), loss_of(twin, seed)
        assert_near(ours, theirs, 1e-10)
        ours.backward()
        theirs.backward()  # gradients add up
    assert_same_gradients(model, twin)
    assert graphs.captured == graph


@GRAPHS
def test_a_training(graph, graphs):
    model = network('repvgg')
    twin = copy.deepcopy(model)
    captured(model, graph)
    averages = [ModelEmaV3(form, decay=0.9) for form in (model, twin)]
    optimizers = [torch.optim.SGD(form.parameters(), 0.01, momentum=0.9, weight_decay=1e-3) for form in (model, twin)]
    for step in range(20):
        for form, optimizer, average in zip((model, twin), optimizers, averages):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            for part in range(2):
                loss_of(form, 2 * step + part).backward()
            optimizer.step()
            average.update(form)
            if step == 5:
                timm_rep.begin_time_step(form, torch.Generator().manual_seed(0), attach_rate=0.5)
            if step == 8:
                timm_rep.set_attach_rate(form, 1.0)
            if step == 11:
                form.load_state_dict(randomize_(copy.deepcopy(form), seed=1).state_dict())
            if step == 14:
                list(timm_rep.rep_layers(form))[1][1].requires_grad_(False)
    assert graphs.captured == 3 * graph  # loading makes constants anew; then for what is not trained any more
    for one, other in zip((model, averages[0].module), (twin, averages[1].module)):
        for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values()):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9, msg=name)
    assert_near(timm_rep.fuse(model.eval())(images()), twin.eval()(images()), 1e-9)


@GRAPHS
def test_moved_tensors_are_followed(graph, graphs):
    model = network()
    captured(model, graph)
    loss_of(model).backward()
    other = network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    model.load_state_dict({key: value.clone() for key, value in other.state_dict().items()}, assign=True)
    model.zero_grad()
    loss_of(model).backward()
    loss_of(other).backward()
    assert_same_gradients(model, other)
    assert graphs.captured == 2 * graph
    model.float()
    model(images().float()).sum().backward()
    assert graphs.captured == 3 * graph


@GRAPHS
def test_two_forwards_before_a_backward(graph, graphs):
    model = network()
    twin = copy.deepcopy(model)
    captured(model, graph)
    losses = [loss_of(model, 0), loss_of(model, 1)]
    for loss in losses:
        loss.backward()
    for seed in range(2):
        loss_of(twin, seed).backward()
    assert_same_gradients(model, twin)
    model.zero_grad()
    (loss_of(model, 0) + loss_of(model, 1)).backward()
    assert_same_gradients(model, twin)


@GRAPHS
@pytest.mark.parametrize('checkpointing', [None, False, True])
@pytest.mark.parametrize('shared', [False, True])
def test_checkpoints_and_micro_batches(checkpointing, shared, graph, graphs):
    model = randomize_(timm_rep.expand(Net(checkpointing).double(), select='*'))
    twin = copy.deepcopy(model)
    together = captured(model, graph)._together
    compose, composed = together.compose, []
    together.compose = lambda *args: composed.append(args) or compose(*args)
    for number in range(3):
        batch = randn(2, 4, 6, 6, seed=number)
        with micro_batch(model, last=number == 2) if shared else nullcontext():
            model(batch).square().mean().backward()
        twin(batch).square().mean().backward()
    assert_same_gradients(model, twin)
    assert len(composed) == (1 if shared else 3)


def test_without_gradients_and_outside_of_forwards_layers_compose_alone():
    model = network().eval()
    handle = capture(model, graph=False)
    composed = []
    handle._together.compose = lambda *args: composed.append(args) or compose_side_by_side(*args)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        model(images())
    with torch.inference_mode():
        model(images())
    torch.func.functional_call(model, dict(model.named_parameters()), (images(),))
    composed.clear()
    layer = next(layer for _, layer in timm_rep.rep_layers(model))
    layer.weight.sum().backward()
    layer(images()).sum().backward()
    assert not composed
    model.zero_grad()
    gradient = torch.func.grad(lambda p: torch.func.functional_call(model, p, (images(),)).square().mean())(
        dict(model.named_parameters()))
    assert not composed
    loss_of(expected).backward()
    loss_of(model).backward()
    assert len(composed) == 1
    assert_same_gradients(model, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-8, atol=1e-10)


@GRAPHS
def test_forward_mode(graph, graphs):
    model = network().eval()
    captured(model, graph)
    values = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: 1e-2 * randn(*p.shape, seed=number) for number, (name, p) in enumerate(values.items())}
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, tangents[name]).requires_grad_() for name, p in values.items()}
        found = forward_ad.unpack_dual(torch.func.functional_call(model, duals, (images(),))).tangent
    outputs = []
    for step in (1e-5, -1e-5):
        moved = {name: p + step * tangents[name] for name, p in values.items()}
        outputs.append(torch.func.functional_call(model, moved, (images(),)))
    assert_near(found, (outputs[0] - outputs[1]) / 2e-5, 1e-6)


@GRAPHS
def test_layers_that_stand_still(graph, graphs):
    model = network()
    layer = list(timm_rep.rep_layers(model))[2][1].requires_grad_(False)
    twin = copy.deepcopy(model)
    captured(model, graph)
    for number in range(2):
        with micro_batch(model, last=number == 1):
            loss_of(model, number).backward()
        loss_of(twin, number).backward()
    assert_same_gradients(model, twin)
    assert all(p.grad is None for p in layer.parameters())


def test_functional_parameters_are_used():
    model = network()
    capture(model, graph=False)
    parameters = {name: (1.1 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    other.load_state_dict(parameters, strict=False)
    ours = torch.func.functional_call(model, parameters, (images(),))
    assert_near(ours, other(images()), 1e-10)
    ours.square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    other.zero_grad()
    other(images()).square().mean().backward()
    for name, p in other.named_parameters():
        torch.testing.assert_close(parameters[name].grad, p.grad, rtol=1e-8, atol=1e-10)


@GRAPHS
def test_copies_pickles_and_stock_forms_do_without(graph, graphs):
    model = network()
    captured(model, graph)
    loss_of(model).backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer._together is None for _, layer in timm_rep.rep_layers(twin))
        twin.zero_grad()
        loss_of(twin).backward()
        assert_same_gradients(twin, model)
    assert graphs.captured == graph
    stock = timm_rep.fuse(model)
    assert not stock._forward_pre_hooks
    assert not stock._forward_hooks
    assert not stock._forward_hooks_always_called
    assert model._forward_pre_hooks


def test_remove():
    model = network()
    handle = capture(model, graph=False)
    loss_of(model).backward()
    handle.remove()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert all(layer._together is None for _, layer in timm_rep.rep_layers(model))
    again = capture(model, graph=False)
    handle.remove()  # of what is gone
    assert all(isinstance(layer._together, KernelsTogether) for _, layer in timm_rep.rep_layers(model))
    again.remove()
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False))
    layers = timm_rep.expand(layers, 'expandnet', select='*').eval()
    capture(layers, graph=False).remove()
    x = randn(1, 3, 8, 8, dtype=torch.float32)
    assert_near(torch.jit.script(layers)(x), layers(x), 1e-6)


def test_an_error_in_a_forward():
    model = network()
    capture(model, graph=False)
    with pytest.raises(RuntimeError):
        model(randn(2, 4, 32, 32))
    layer = next(layer for _, layer in timm_rep.rep_layers(model))
    layer(images()).sum().backward()
    layer(images()).sum().backward()  # by itself both times


def test_autocast(graphs):
    model = network().float()
    captured(model, graph=True)
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(images().float()).square().mean()
    loss.backward()
    assert graphs.captured == 1
    assert model.conv1.weight.dtype == torch.float32


def test_gradients_of_images_where_nothing_is_trained(graphs):
    model = network().requires_grad_(False).eval()
    captured(model, graph=True)
    x = images().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    (expected,) = torch.autograd.grad(timm_rep.fuse(model)(x).sum(), x)
    assert graphs.captured == 1
    assert_near(gradient, expected, 1e-9)


def test_a_model_that_is_trained_in_turns(graphs):
    model = network()
    twin = copy.deepcopy(model)
    captured(model, graph=True)
    for step in range(3):
        for form in (model, twin):
            for trained in (True, False):
                form.requires_grad_(trained)
                x = images(seed=step).requires_grad_()
                form(x).square().mean().backward()
    assert graphs.captured == 2
    assert_same_gradients(model, twin)


def test_where_nan_is_looked_for(graphs):
    model = network()
    twin = copy.deepcopy(model)
    captured(model, graph=True)
    with torch.autograd.set_detect_anomaly(True):
        loss_of(model).backward()
        assert torch.is_anomaly_enabled()
    loss_of(twin).backward()
    assert_same_gradients(model, twin)


def test_what_cannot_be_captured():
    with pytest.raises(UserError, match='cpu; graph=False'):
        capture(network())
    with pytest.raises(UserError, match='nothing to capture'):
        capture(timm_rep.expand(TINY_MODELS['basic'](), 'dbb'), graph=False)
    with pytest.raises(UserError, match="mode='reduce-overhead'"):
        capture(torch.compile(network()), graph=False)
    with pytest.raises(UserError, match='use DistributedDataParallel'):
        capture(nn.DataParallel(network()), graph=False)
