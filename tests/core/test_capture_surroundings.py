"""Captured compositions where much else goes on: changes in the middle, hooks, ties, checkpoints, devices."""
import copy

import pytest
import torch
import torch.nn as nn
from graph_stand_in import GRAPHS, Net, assert_same_gradients, captured, images, loss_of, network
from helpers import assert_near, randn, randomize_
from torch.utils.checkpoint import checkpoint

import timm_rep
from timm_rep import UserError, capture
from timm_rep.core.capture import _GraphedComposition
from timm_rep.core.layers.together import compose_side_by_side


def test_changed_weights_between_forward_and_backward_are_refused(graphs):
    model = network()
    captured(model, graph=True)
    loss = loss_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    with pytest.raises(RuntimeError, match=r'changed between forward and backward|modified by an inplace operation'):
        loss.backward()


def test_gradients_are_nobody_elses_memory(graphs):
    model = network()
    captured(model, graph=True)
    loss_of(model).backward()
    kept = {name: p.grad for name, p in model.named_parameters()}
    values = {name: gradient.clone() for name, gradient in kept.items()}
    model.zero_grad()
    loss_of(model, seed=3).backward()
    for name, gradient in kept.items():
        assert torch.equal(gradient, values[name]), name


def test_attach_rate_changed_between_forward_and_backward_is_refused(graphs):
    model = network()
    captured(model, graph=True)
    loss = loss_of(model)
    timm_rep.set_attach_rate(model, 0.3)
    with pytest.raises(UserError, match='attach rates were changed between forward and backward'):
        loss.backward()


def test_kernels_that_stand_still_are_not_overwritten_unseen(graphs):
    model = network().requires_grad_(False)
    captured(model, graph=True)
    x = images().requires_grad_()
    output = model(x).square().mean()
    model(x)  # the same kernels
    timm_rep.set_attach_rate(model, 0.3)
    model(x)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        output.backward()


@GRAPHS
def test_hooks_of_parameters_run_once_and_tied_ones_count_once(graph, graphs):
    model = randomize_(timm_rep.expand(Net(None).double(), select='*'))
    layers = [layer for _, layer in timm_rep.rep_layers(model)]
    layers[1].seq_1x1 = layers[0].seq_1x1
    twin = copy.deepcopy(model)
    captured(model, graph)
    for form in (model, twin):
        list(timm_rep.rep_layers(form))[2][1].branches.register_hook(lambda gradient: gradient / 2)
        form(randn(2, 4, 6, 6)).square().mean().backward()
    assert_same_gradients(model, twin)
    assert graphs.captured == graph


@GRAPHS
def test_attach_rate_that_is_trained(graph, graphs):
    model = network()
    layer = list(timm_rep.rep_layers(model))[2][1].requires_grad_(False)
    layer.attach_rate.requires_grad_()
    twin = copy.deepcopy(model)
    captured(model, graph)
    rates = []
    for form in (model, twin):
        loss_of(form).backward()
        rates.append(list(timm_rep.rep_layers(form))[2][1].attach_rate.grad)
    assert_near(*rates, 1e-10)


def test_without_a_graph_where_none_can_be(graphs, monkeypatch):
    model = network()
    twin = copy.deepcopy(model)
    captured(model, graph=True)
    for form in (model, twin):
        values = {name: 1.1 * p for name, p in form.named_parameters()}
        torch.func.functional_call(form, values, (images(),)).square().mean().backward()
    assert_same_gradients(model, twin)
    monkeypatch.setattr(_GraphedComposition, 'device_type', 'cuda')  # and this model has moved to the CPU
    loss_of(model).backward()
    loss_of(twin).backward()
    assert_same_gradients(model, twin)
    assert not graphs.captured


def test_graphs_are_captured_on_the_device_of_the_layers(graphs, monkeypatch):
    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(torch.cuda, 'device', Device)
    model = network()
    captured(model, graph=True)
    loss_of(model).backward()
    assert entered == [torch.device('cpu')]


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, 'fp32_precision'), reason='torch before 2.9')
def test_newer_settings_of_precision(graphs):
    model = network().float()
    captured(model, graph=True)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ('tf32', 'ieee'):
            torch.backends.cuda.matmul.fp32_precision = precision
            model(images().float()).sum().backward()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert graphs.captured == 2


def step_between(model):
    loss = loss_of(model)
    with torch.no_grad():
        loss_of(model, 1)
    loss.backward()


def whole(model, use_reentrant):
    loss_of(model).backward()
    checkpoint(model, images().requires_grad_(), use_reentrant=use_reentrant).square().mean().backward()


def part(model, use_reentrant):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_of(model).backward()
    optimizer.step()  # what the forward composed is outdated
    features = model.maxpool(model.act1(model.bn1(model.conv1(images())))).detach().requires_grad_()
    checkpoint(model.layer1, features, use_reentrant=use_reentrant).square().mean().backward()


def without_call(model):
    loss_of(model).backward()
    model.forward_features(images()).square().mean().backward()


def fewer_layers(model):
    loss = loss_of(model)
    model.layer4 = nn.Sequential()
    model.fc = nn.Identity()
    (loss + loss_of(model, 1)).backward()


CHECKPOINTS = dict(
    no_grad_between=step_between,
    whole=lambda model: whole(model, use_reentrant=False),
    whole_reentrant=lambda model: whole(model, use_reentrant=True),
    part=lambda model: part(model, use_reentrant=False),
    part_reentrant=lambda model: part(model, use_reentrant=True),
    without_call=without_call,
    fewer_layers=fewer_layers,
)


@GRAPHS
@pytest.mark.parametrize('kind', CHECKPOINTS)
def test_checkpoints_in_all_ways(kind, graph, graphs):
    model = network()
    model.set_grad_checkpointing(not kind.startswith(('whole', 'part')))
    twin = copy.deepcopy(model)
    captured(model, graph)
    for form in (model, twin):
        CHECKPOINTS[kind](form)
    assert_same_gradients(model, twin)


def test_captured_twice_and_removed_once():
    model = network()
    first, second = (capture(model, graph=False) for _ in range(2))
    first.remove()
    first.remove()
    loss_of(model).backward()
    together = second._together
    assert together.compose is compose_side_by_side
    assert together._kernels
    second.remove()
    assert all(layer._together is None for _, layer in timm_rep.rep_layers(model))
    assert not together._kernels
