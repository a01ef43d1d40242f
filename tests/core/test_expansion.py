"""What was done to a model: counts and shares, against the convolutions of its stock form."""
import json
import logging

import pytest
import torch.nn as nn
from helpers import TINY_MODELS, tiny_repvgg, tiny_resnet

from timm_rep import expand, expansion_of, fuse, set_attach_rate
from timm_rep.core.expand import anneal_repvgg_blocks_
from timm_rep.core.expansion import methods_from_list
from timm_rep.core.layers import ACB, DBB, Orepa, OrepaConv2d, Rep


def sizes(model):
    """Kernel parameters of the plain convolutions of a model, by name."""
    return {name: module.weight.numel() for name, module in model.named_modules() if type(module) is nn.Conv2d}


def share(part, whole):
    return f'{100 * part / whole:.1f} %'


@pytest.mark.parametrize(('name', 'method', 'taken'), [
    ('basic', Orepa(), lambda conv: 'downsample' not in conv),
    ('basic', DBB(), lambda conv: '.conv' in conv),
    ('bottleneck', Orepa(), lambda conv: True),
    ('bottleneck', Rep(), lambda conv: '.conv2' in conv),
    ('repvgg', Orepa(), lambda conv: 'conv_kxk' in conv),
])
def test_counts_and_shares_are_those_of_the_stock_convolutions(name, method, taken):
    stock = TINY_MODELS[name]()
    all_sizes = sizes(stock)
    expected = {conv: size for conv, size in all_sizes.items() if taken(conv)}
    model = expand(stock, method)
    for rate in (1.0, 0.3):
        set_attach_rate(model, rate)
        expansion = expansion_of(model)
        assert expansion.methods == dict.fromkeys(expected, method)
        assert expansion.convs == {method.name: len(expected)}
        assert expansion.parameters == {method.name: sum(expected.values())}
        assert (expansion.all_convs, expansion.all_parameters) == (len(all_sizes), sum(all_sizes.values()))
    assert str(expansion) == (
        f'{len(expected)} of {len(all_sizes)} convolutions, '
        f'{share(sum(expected.values()), sum(all_sizes.values()))} of their parameters, are {method.name}')
    assert sizes(fuse(model.eval())) == all_sizes


def test_several_methods_are_told_apart():
    stock = tiny_resnet()
    all_sizes = sizes(stock)
    model = expand(stock, {'layer1.*': 'dbb', 'layer2.*': 'acb', 'layer3.0.conv1': Orepa(negative_slope=0.5)})
    expansion = expansion_of(model)
    conv3 = all_sizes['layer3.0.conv1']
    parts = {
        'dbb': sum(all_sizes[f'layer1.0.conv{n}'] for n in (1, 2)),
        'acb': sum(all_sizes[f'layer2.0.conv{n}'] for n in (1, 2)), 'orepa': conv3}
    whole = sum(all_sizes.values())
    assert expansion.convs == dict(dbb=2, acb=2, orepa=1)
    assert expansion.parameters == parts
    assert str(expansion) == (
        f'5 of {len(all_sizes)} convolutions, {share(sum(parts.values()), whole)} of their parameters '
        f'(dbb: 2, {share(parts["dbb"], whole)}; acb: 2, {share(parts["acb"], whole)}; '
        f'orepa: 1, {share(conv3, whole)})')
    data = json.loads(json.dumps(expansion.to_list()))
    assert data == [
        dict(method='dbb', layers=['layer1.0.conv1', 'layer1.0.conv2']),
        dict(method='acb', layers=['layer2.0.conv1', 'layer2.0.conv2']),
        dict(
            method='orepa', branch_1x1=None, negative_slope=0.5, branches=None, scaling='vector', stem=True,
            pointwise=True, layers=['layer3.0.conv1']),
    ]
    assert methods_from_list(data) == expansion.methods


@pytest.mark.parametrize(('method', 'in_branch'), [('rep', None), ('dbb', DBB()), ('acb', ACB()), ('orepa', Orepa())])
def test_blocks_of_repvgg_count_with_their_own_convolutions(method, in_branch):
    stock = tiny_repvgg()
    all_sizes = sizes(stock)
    blocks = {name.rpartition('.conv_kxk')[0] for name in all_sizes if 'conv_kxk' in name}
    model = anneal_repvgg_blocks_(expand(stock, method)) if method == 'orepa' else expand(stock, method)
    expansion = expansion_of(model)
    expected = dict.fromkeys(blocks, Rep())
    if in_branch is not None:
        expected.update({f'{block}.conv_kxk.conv': in_branch for block in blocks})
    assert expansion.methods == expected
    kxk = sum(size for name, size in all_sizes.items() if 'conv_kxk' in name)
    pointwise = sum(size for name, size in all_sizes.items() if 'conv_1x1' in name)
    if in_branch is None:
        assert expansion.convs == dict(rep=2 * len(blocks))
        assert expansion.parameters == dict(rep=kxk + pointwise)
    else:
        assert expansion.convs == {'rep': len(blocks), method: len(blocks)}
        assert expansion.parameters == {'rep': pointwise, method: kxk}
    assert (expansion.all_convs, expansion.all_parameters) == (len(all_sizes), kxk + pointwise)


class Shared(nn.Module):
    """One convolution at two places, beside one that is not expanded and is at two places too."""

    def __init__(self):
        super().__init__()
        conv, plain = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1)
        self.first = nn.Sequential(conv, nn.BatchNorm2d(4), plain)
        self.second = nn.Sequential(conv, nn.BatchNorm2d(4), plain)


def test_shared_convolutions_count_once():
    expansion = expansion_of(expand(Shared(), 'orepa'))
    assert list(expansion.methods.values()) == [Orepa()]
    assert expansion.convs == dict(orepa=1)
    assert expansion.parameters == dict(orepa=4 * 4 * 9)
    assert (expansion.all_convs, expansion.all_parameters) == (2, 4 * 4 * 9 + 4 * 4)


def test_models_without_rep_layers():
    expansion = expansion_of(tiny_resnet())
    assert (expansion.methods, expansion.convs, expansion.parameters, expansion.to_list()) == ({}, {}, {}, [])
    assert str(expansion).startswith(f'0 of {len(sizes(tiny_resnet()))} convolutions, 0.0 % of')
    assert str(expansion_of(nn.Linear(3, 4))).startswith('0 of 0 convolutions, 0.0 % of')


def test_layers_that_were_made_by_hand_are_known_by_their_class():
    model = nn.Sequential(OrepaConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1))
    expansion = expansion_of(model)
    assert expansion.methods == {'0': Orepa(branch_1x1=True, negative_slope=0.0)}
    assert (expansion.convs, expansion.all_convs) == (dict(orepa=1), 2)
    assert (expansion.parameters, expansion.all_parameters) == (dict(orepa=108), 128)


def test_expanding_says_what_it_did(caplog):
    with caplog.at_level(logging.INFO, logger='timm_rep'):
        model = expand(tiny_resnet(), 'dbb')
    assert [record.getMessage() for record in caplog.records] == [f'expanded ResNet: {expansion_of(model)}']
