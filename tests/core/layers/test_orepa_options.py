"""OREPA's own comparisons by option: each row of its Tables 2 and 3 as docs/methods.md has it, and bad options."""
import itertools
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import layer_types, tiny_repvgg, tiny_resnet
from torch.utils.flop_counter import FlopCounterMode

import timm_rep
from timm_rep import Orepa, OrepaConv2d, OrepaPointwiseConv2d, OrepaStemConv2d, UserError, expand, rep_layers
from timm_rep.core.methods import method_from_dict, method_of_layer

DOCS = Path(__file__).parents[3] / 'docs' / 'methods.md'
ALL = ('origin', 'average', 'prior', 'conv_1x1', 'separable', 'sequential')
ONLINE_DBB = ('origin', 'average', 'conv_1x1', 'sequential')
WITH_PRIOR = ('origin', 'average', 'prior', 'conv_1x1', 'sequential')
# Branches of a 3x3, scaling, stem, and 1x1 layers that each row shall have; None for no such rep layer.
ROWS = {
    'plain': (None, None, False, False),
    'DBB, offline': ('dbb', None, False, False),
    'DBB, online': (ONLINE_DBB, 'vector', False, False),
    '+ frequency prior': (WITH_PRIOR, 'vector', False, False),
    '+ separable': (ALL, 'vector', False, False),
    '+ deep stem': (ALL, 'vector', True, False),
    '+ Rep-1x1': (ALL, 'vector', True, True),
    'vector': (ALL, 'vector', True, False),
    'scalar': (ALL, 'scalar', True, False),
    'none': (ALL, 'none', True, False),
    'no post-addition norm': (ALL, 'vector', True, True),
}


def rows_of_the_docs():
    return dict(re.findall(r'^\| ([^|]*?) \| `((?:timm|timm_rep)\.[^`]*)` \|', DOCS.read_text(), re.M))


@pytest.fixture
def build(monkeypatch):
    """The line of a row, with small networks."""
    create_model = timm.create_model

    def small(name, **kwargs):
        return create_model(name, num_classes=5, layers=(1, 1, 1, 1), channels=(8, 8, 8, 16), **kwargs)

    monkeypatch.setattr(timm, 'create_model', small)
    torch.manual_seed(0)
    return lambda line: eval(line, dict(timm=timm, timm_rep=timm_rep, torch=torch, Orepa=Orepa))


def losses(model, steps=6):
    x = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    target = torch.arange(20) % 5
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1, momentum=0.9)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.skipif(not DOCS.is_file(), reason='the docs are in a checkout only')
def test_docs_have_every_row():
    assert list(rows_of_the_docs()) == list(ROWS)


@pytest.mark.skipif(not DOCS.is_file(), reason='the docs are in a checkout only')
@pytest.mark.parametrize('row', ROWS)
def test_row_of_the_papers_tables_trains(row, build):
    """But for the one without norms, which the paper says diverges."""
    model = build(rows_of_the_docs()[row])
    branches, scaling, stem, pointwise = ROWS[row]
    layers = dict(rep_layers(model))
    kinds = {type(layer) for layer in layers.values()}
    if branches is None or branches == 'dbb':
        assert kinds == (set() if branches is None else {timm_rep.DiverseBranchConv2d})
    else:
        block = next(layer for layer in layers.values() if isinstance(layer, OrepaConv2d))
        assert block.branch_names == branches
        assert block.scaling == scaling
        assert (OrepaStemConv2d in kinds, OrepaPointwiseConv2d in kinds) == (stem, pointwise)
        for layer in layers.values():
            assert getattr(layer, 'scaling', scaling) == scaling
    found = losses(model)
    diverges = not torch.tensor(found).isfinite().all()
    if row == 'no post-addition norm':
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert diverges
    else:
        assert not diverges
        assert found[-1] < found[0]


def flops(layer):
    with FlopCounterMode(display=False) as counter:
        layer.compose_weight().sum().backward()
    return counter.get_total_flops()


def test_composing_costs_less_with_every_branch_less():
    names = list(ALL)
    costs = []
    while len(names) > 1:
        layer = OrepaConv2d(16, 16, 3, branches=names)
        assert ('seq_1x1' in dict(layer.named_parameters())) == ('sequential' in names)
        assert ('dw_conv' in dict(layer.named_parameters())) == ('separable' in names)
        costs.append((flops(layer), sum(p.numel() for p in layer.parameters())))
        names.pop()
    for cost, (fewer_flops, fewer_parameters) in itertools.pairwise(costs):
        assert fewer_flops < cost[0]
        assert fewer_parameters < cost[1]


def test_options_by_policy_and_by_name():
    stock = tiny_resnet('bottleneck')
    taken = layer_types(expand(stock, Orepa(stem=False, pointwise=False)))
    assert set(taken) == {f'layer{n}.0.conv2' for n in (1, 2, 3, 4)}
    by_name = layer_types(expand(stock, Orepa(stem=False, pointwise=False), select=['conv1', 'layer1.0.conv1']))
    assert by_name == {'conv1': OrepaConv2d, 'layer1.0.conv1': OrepaPointwiseConv2d}
    repvgg = expand(tiny_repvgg(), Orepa(branches='origin,prior', scaling='none'))
    for _, layer in rep_layers(repvgg):
        assert layer.branch_names == ('origin', 'prior')
        assert layer.negative_slope == 1.0


@pytest.mark.parametrize('method', [
    Orepa(branches=('sequential', 'origin')),
    Orepa(branches='origin,prior', scaling='scalar', negative_slope=0.0),
    Orepa(scaling='none'),
    Orepa(stem=False, branches=['origin', 'average']),
])
def test_options_travel_and_are_told_of_layers_made_by_hand(method):
    assert method_from_dict(method.to_dict()) == method
    assert all(isinstance(value, (str, bool, float, type(None))) for value in method.to_dict().values())
    for _, layer in rep_layers(expand(tiny_resnet('bottleneck'), method)):
        assert method_of_layer(layer) == method
        del layer.method
        again = expand(nn.Sequential(nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, groups=layer.groups)),
            method_of_layer(layer), select='0')[0]
        if type(again) is type(layer):
            assert again._own_kwargs() == dict(layer._own_kwargs(), bias=True)
        assert type(layer.like(8)) is type(layer)
        assert layer.like(8).state_dict().keys() == layer.state_dict().keys()


def test_branches_are_one_text_in_the_layers_order():
    assert Orepa(branches=['separable', 'origin', 'average']).branches == 'origin,average,separable'
    assert Orepa(branches='separable,origin') == Orepa(branches=('origin', 'separable'))


@pytest.mark.parametrize(('make', 'message'), [
    (lambda: Orepa(branches='average,prior'), "'origin' and at least one more of 'average', .*; got \\['average', 'pr"),
    (lambda: Orepa(branches='origin'), "at least one more of .*; got \\['origin'\\]"),
    (lambda: Orepa(branches=('origin', 'fourier')), "each once; got \\('origin', 'fourier'\\)"),
    (lambda: Orepa(branches='origin,prior,prior'), 'each once; got'),
    (lambda: Orepa(branches=''), 'branches must be'),
    (lambda: Orepa(branches=3), 'branches must be .* got 3'),
    (lambda: Orepa(branches=('origin', ['prior'])), 'branches must be'),
    (lambda: Orepa(branches='origin,prior', branch_1x1=True), 'either branches, .* or branch_1x1'),
    (lambda: Orepa(scaling='matrix'), "scaling must be 'vector', 'scalar' or 'none', got 'matrix'"),
    (lambda: Orepa(scaling=None), "scaling must be .* got None"),
    (lambda: Orepa(scaling=['vector']), "scaling must be"),
    (lambda: Orepa(stem=1), 'stem must be True or False, got 1'),
    (lambda: Orepa(pointwise='no'), "pointwise must be True or False, got 'no'"),
    (lambda: OrepaConv2d(4, 4, 3, branches='origin,prior'), 'branches must be .* got .origin,prior'),
    (lambda: OrepaConv2d(4, 4, 3, scaling='rows'), "scaling must be .* got 'rows'"),
    (lambda: OrepaPointwiseConv2d(4, 4, scaling='rows'), "scaling must be .* got 'rows'"),
    (lambda: OrepaStemConv2d(3, 4, branches=['prior']), 'branches must be'),
    (lambda: method_from_dict(dict(method='orepa', branches=['origin', 'prior'])), 'plain values'),
    (lambda: method_from_dict(dict(method='orepa', branches='x' * 10)), 'branches must be'),
])
def test_bad_options_raise_one_clear_error(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_large_layer_made_by_hand_is_no_stem():
    layer = OrepaConv2d(3, 4, 7)
    assert not method_of_layer(layer).stem
    assert method_of_layer(OrepaConv2d(4, 4, 7, groups=2)).stem
