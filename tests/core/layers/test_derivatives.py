"""Derivatives other than one plain backward, which has a formula of its own: they are those of a plain convolution."""
import random

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_near, randn, randomize_, tiny_repvgg, tiny_resnet
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

from timm_rep import (
    AsymmetricConv2d,
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
    expand,
)

LAYERS = dict(
    kxk=lambda: OrepaConv2d(2, 2, 3, padding=1, dtype=torch.float64),
    grouped=lambda: OrepaConv2d(6, 6, (1, 3), groups=6, bias=False, dtype=torch.float64),
    pointwise=lambda: OrepaPointwiseConv2d(4, 2, groups=2, dtype=torch.float64),
    stem=lambda: OrepaStemConv2d(1, 2, 5, padding=2, bias=False, dtype=torch.float64),
    dbb=lambda: DiverseBranchConv2d(2, 2, 3, padding=1, dtype=torch.float64),
    acb=lambda: AsymmetricConv2d(2, 2, 3, padding=1, dtype=torch.float64),
)
METHODS = dict(
    doconv=lambda: DOConv2d(2, 2, 3, padding=1, dtype=torch.float64),
    doconv_grouped=lambda: DOConv2d(4, 2, (1, 3), groups=2, dtype=torch.float64),
    expanded=lambda: ExpandedConv2d(2, 2, 3, padding=1, expansion=2, dtype=torch.float64),
    refconv=lambda: RefConv2d(2, 2, 3, padding=1, dtype=torch.float64),
    refconv_depthwise=lambda: RefConv2d(3, 3, 3, groups=3, padding=1, dtype=torch.float64),
    dilated=lambda: DilatedConv2d(2, 2, 5, groups=2, padding=2, dtype=torch.float64),
    mobileone=lambda: MobileOneConv2d(2, 2, 3, padding=1, copies=2, dtype=torch.float64),
    repnas=lambda: RepNasConv2d(2, 2, 3, padding=1, dtype=torch.float64),
)
LAYERS.update(METHODS)
linear = pytest.mark.parametrize('name', ['kxk', 'grouped', 'pointwise', 'stem', *METHODS])


def make(name):
    layer = randomize_(LAYERS[name]()).eval()
    layer.set_attach_rate_(0.3)
    return layer, randn(2, layer.in_channels, 4, 4, seed=5)


def with_frozen_parts(layer):
    """Names and values of all parameters and the attach rate, and three choices of those that are trained."""
    values = {name: p.detach().clone() for name, p in layer.named_parameters() if name != 'bias'}
    values.update((n, b.double()) for n, b in layer.named_buffers() if n.endswith('attach_rate'))
    draw = random.Random(0)
    yield values, list(values)
    for _ in range(2):
        yield values, sorted(draw.sample(list(values), draw.randint(1, len(values) - 1)))


@linear
def test_all_derivatives_with_any_part_frozen(name):
    """Backward, forward mode, batched, and the backward of the backward, of the kernel by numbers."""
    layer, x = make(name)
    for values, trained in with_frozen_parts(layer):
        inputs = [values[key].clone().requires_grad_() for key in trained]

        def outputs(*changed, values=values, trained=trained):
            return functional_call(layer, {**values, **dict(zip(trained, changed))}, (x[:1, :, :1, :3],))

        modes = dict(check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
        assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True, **modes), trained
        assert torch.autograd.gradgradcheck(
            outputs, inputs, fast_mode=True, check_batched_grad=True, check_fwd_over_rev=True), trained


@linear
def test_second_derivative_where_only_some_parameters_are_trained(name):
    """The graph of a backward holds no parameter that is frozen."""
    layer, x = make(name)
    for _, trained in with_frozen_parts(layer):
        for key, parameter in layer.named_parameters():
            parameter.requires_grad_(key in trained)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        if parameters:
            first = torch.autograd.grad(layer(x).pow(3).sum(), parameters, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
            assert all(g.abs().sum() > 0 for g in second), trained


MODELS = dict(
    orepa=lambda: expand(tiny_resnet('bottleneck'), 'orepa'),
    orepa_repvgg=lambda: expand(tiny_repvgg(), 'orepa'),
    dbb=lambda: expand(tiny_resnet(), 'dbb'),
    rep=lambda: expand(tiny_repvgg(), 'rep'),
)


@pytest.fixture(scope='module', params=MODELS)
def model(request):
    return randomize_(MODELS[request.param]()).double().eval()


@pytest.fixture
def x():
    return randn(2, 3, 32, 32)


def of_parameters(model, *names):
    """Values of the parameters, a random direction, and the loss as a function of the values and an image."""
    values = {n: p.detach() for n, p in model.named_parameters() if not names or n.endswith(names)}
    directions = {n: randn(*p.shape, seed=1) for n, p in values.items()}
    return values, directions, lambda changed, x: functional_call(model, changed, (x,)).sin().sum()


def assert_same_gradients(actual, expected):
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-8 * expected[key].abs().max().item())


def gradients(model, x):
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(model(x).sin().sum(), list(parameters.values()))))


def test_transforms_by_the_image(model, x):
    def loss(x):
        return model(x).sin().sum()

    leaf = x.clone().requires_grad_()
    expected, = torch.autograd.grad(loss(leaf), leaf)
    direction = randn(*x.shape, seed=1)
    along = (expected * direction).sum()
    assert_near(grad(loss)(x), expected, 1e-8)
    assert_near(vmap(lambda image: model(image[None])[0])(x), model(x), 1e-12)
    assert_near(jvp(loss, (x,), (direction,))[1], along, 1e-8)
    last, = torch.autograd.grad(model(leaf)[0, 4], leaf)
    assert_near(jacrev(lambda x: model(x)[0])(x)[4], last, 1e-8)
    with forward_ad.dual_level():
        assert_near(forward_ad.unpack_dual(loss(forward_ad.make_dual(x, direction))).tangent, along, 1e-8)


def test_gradients_for_each_image(model, x):
    """Of all parameters, and of the classifier alone, when nothing about the layers before it is transformed."""
    expected = [gradients(model, image[None]) for image in x]
    expected = {key: torch.stack([e[key] for e in expected]) for key in expected[0]}
    for names in ((), ('fc.weight', 'fc.bias')):
        values, _, loss = of_parameters(model, *names)
        actual = vmap(grad(lambda changed, image: loss(changed, image[None])), in_dims=(None, 0))(values, x)  # noqa: B023
        assert_same_gradients(actual, expected)


def test_forward_mode_by_the_parameters(model, x):
    values, directions, loss = of_parameters(model)
    expected = sum((g * directions[key]).sum() for key, g in gradients(model, x).items())
    assert_near(jvp(lambda changed: loss(changed, x), (values,), (directions,))[1], expected, 1e-8)
    with forward_ad.dual_level():
        duals = {key: forward_ad.make_dual(value, directions[key]) for key, value in values.items()}
        assert_near(forward_ad.unpack_dual(loss(duals, x)).tangent, expected, 1e-8)


def test_a_batch_of_models(model, x):
    values, _, _ = of_parameters(model)
    two = {key: torch.stack([value, 0.9 * value]) for key, value in values.items()}
    outputs = vmap(lambda values: functional_call(model, values, (x,)))(two)
    for n in range(2):
        assert_near(outputs[n], functional_call(model, {key: value[n] for key, value in two.items()}, (x,)), 1e-12)


def test_hessian_times_a_direction_both_ways(model, x):
    values, directions, loss = of_parameters(model)
    expected = jvp(grad(lambda changed: loss(changed, x)), (values,), (directions,))[1]
    first = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()), create_graph=True)
    along = sum((g * d).sum() for g, d in zip(first, directions.values()))
    second = torch.autograd.grad(along, list(model.parameters()), materialize_grads=True)
    assert_same_gradients(dict(zip(expected, second)), expected)


def test_batched_gradients(model, x):
    parameters = dict(model.named_parameters())
    outputs = model(x)[0]
    units = torch.eye(len(outputs), dtype=outputs.dtype)
    batched = torch.autograd.grad(
        outputs, list(parameters.values()), units, is_grads_batched=True, retain_graph=True)
    single = torch.autograd.grad(outputs[3], list(parameters.values()))
    assert_same_gradients({key: g[3] for key, g in zip(parameters, batched)}, dict(zip(parameters, single)))


def test_compiled_transforms():
    torch._dynamo.reset()
    model = randomize_(nn.Sequential(OrepaPointwiseConv2d(3, 2), OrepaConv2d(2, 2, 3))).double().eval()
    x = randn(1, 3, 5, 5)

    def both(x):
        return vmap(lambda image: model(image[None])[0])(x), grad(lambda x: model(x).sin().sum())(x)

    for actual, expected in zip(torch.compile(both, backend='aot_eager', fullgraph=True)(x), both(x)):
        assert_near(actual, expected, 1e-12)


def test_a_plain_backward_takes_the_explicit_formula(monkeypatch):
    """Proves that the others are about something: in training it is the plain formula that does not run."""
    layer, x = make('kxk')

    def refuse(*args):
        raise AssertionError('the plain formula has run')

    monkeypatch.setattr('timm_rep.core.layers.orepa.kxk.compose_orepa_plain', refuse)
    monkeypatch.setattr('timm_rep.core.composition.compose_orepa_plain', refuse)
    layer(x).sum().backward()
    assert layer.branches.grad.abs().sum() > 0
    with pytest.raises(AssertionError, match='plain formula'):
        grad(lambda x: F.relu(layer(x)).sum())(x)
