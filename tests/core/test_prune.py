"""Branches of least importance are cut, and training goes on."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_near, assert_same_state, randn, randomize_, state_of, tiny_resnet, tree

import timm_rep
from timm_rep import RepNas, RepNasConv2d, UserError, expand, expansion_of, fuse, prune_branches, rep_layers


@pytest.fixture
def model():
    """Four layers whose side branches have importances from 1 to 12, without an order."""
    torch.manual_seed(0)
    net = nn.Sequential(*(
        part for n in range(4) for part in (nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())))
    net = randomize_(expand(net, 'repnas')).double()
    values = torch.randperm(12, generator=torch.Generator().manual_seed(0)).double() + 1
    for (_, layer), own in zip(rep_layers(net), values.split(3)):
        with torch.no_grad():
            layer.importance.copy_(own * torch.tensor([1, -1, 1]) / 10)
        layer.set_attach_rate_(0.5)
    return net


def branches(model):
    return [(name, branch) for name, layer in rep_layers(model) for branch in layer.branch_names[1:]]


@pytest.mark.parametrize(('keep', 'left'), [(1, 12), (0.75, 9), (0.7, 9), (0.5, 6), (0.1, 2), (0, 0)])
@pytest.mark.parametrize('training', [False, True])
def test_the_weakest_go_and_the_function_stays(model, keep, left, training):
    x = randn(3, 4, 7, 7)
    expected = copy.deepcopy(model).train(training)(x)
    ranks = {(name, b): v for name, layer in rep_layers(model) for b, v in layer.importances().items()}
    strongest = sorted(ranks, key=ranks.get)[12 - left:]
    origins = [layer.origin for _, layer in rep_layers(model)]
    assert prune_branches(model, keep) is model
    assert set(branches(model)) == set(strongest)
    assert {(name, b): v for name, layer in rep_layers(model) for b, v in layer.importances().items()} == {
        key: ranks[key] for key in strongest}
    assert all(layer.origin is origin for (_, layer), origin in zip(rep_layers(model), origins))
    assert_near(model.train(training)(x), expected, 1e-12)


def test_training_goes_on_and_files_know_what_was_cut(model, tmp_path):
    prune_branches(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    x = randn(6, 4, 7, 7)
    before = state_of(model)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x).mean([2, 3]), torch.arange(6) % 4).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    expected = model.eval()(x)
    timm_rep.save(model, tmp_path / 'pruned.safetensors')
    again = timm_rep.load(tmp_path / 'pruned.safetensors', into=fuse(model)).double().eval()
    assert branches(again) == branches(model)
    assert_near(again(x), expected, 1e-5)
    assert_near(fuse(model)(x), expected, 1e-12)
    assert_near(prune_branches(copy.deepcopy(model), 0)(x), expected, 1e-12)
    assert len(set(expansion_of(model).methods.values())) > 1
    timm_rep.begin_time_step(model, attach_rate=1.0)
    assert_near(model(x), expected, 1e-12)


def test_pruning_again_counts_what_is_left(model):
    prune_branches(prune_branches(model, 0.5), 0.5)
    assert len(branches(model)) == 3
    for _, layer in rep_layers(model):
        assert layer.method == RepNas(branches=layer.branch_names)


@pytest.mark.parametrize('keep', [-0.1, 1.1, 2, float('nan'), True, None, '0.5', [0.5]])
def test_a_share_that_is_none_leaves_the_model_as_it_was(model, keep):
    before, state = tree(model), state_of(model)
    with pytest.raises(UserError, match=r'keep must be a share of the side branches in \[0, 1\], got'):
        prune_branches(model, keep)
    assert tree(model) == before
    assert_same_state(state_of(model), state)


def test_a_model_in_a_wrapper_that_knows_its_parameters_is_refused(model, process_group):
    parallel = nn.parallel.DistributedDataParallel(model)
    before = state_of(model)
    for wrapped in (parallel, torch.compile(parallel, backend='eager')):
        with pytest.raises(UserError, match='prune the network inside DistributedDataParallel'):
            prune_branches(wrapped, 0.5)
    assert_same_state(state_of(model), before)


def test_what_has_no_importances_is_refused():
    for net in (tiny_resnet(), expand(tiny_resnet(), 'orepa')):
        with pytest.raises(UserError, match="no layers whose branches have an importance; expand it with 'repnas'"):
            prune_branches(net, 0.5)
    layer = RepNasConv2d(4, 4, 3)
    before = state_of(layer)
    with pytest.raises(UserError, match=r"must be some of \('average', 'conv_1x1', 'sequential'\), got \['origin'\]"):
        layer.cut_branches_(['origin'])
    assert_same_state(state_of(layer), before)


def test_a_time_step_of_a_layer_without_side_branches_keeps_its_kernel():
    layer = RepNasConv2d(3, 4, 3, branches='origin').double()
    kernel = layer.compose_weight().detach().clone()
    assert layer.compose_weight() is not layer.origin
    layer.begin_time_step_(torch.Generator().manual_seed(0))
    assert_near(layer.compose_weight(), kernel, 1e-12)
    layer.restore_(layer.origin)  # what is given may be a part of the layer
    assert_near(layer.compose_weight(), kernel, 1e-12)
