"""Which convolutions a method takes unasked, and what is said where it takes little or nothing."""
import collections
import dataclasses
import functools
import logging
import types
import weakref

import pytest
import timm
import torch
import torch.nn as nn
from helpers import MODEL_RTOL, TINY_MODELS, assert_near, randn, state_of, tiny_repvgg, tiny_resnet, tree

from timm_rep import Annealer, AnnealingSchedule, UserError, expand, expansion_of, fuse
from timm_rep.core.methods import Shares
from timm_rep.core.selection import Network


def kxk(inputs, outputs, **kwargs):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **kwargs)


def taken(model, method='orepa'):
    return list(expansion_of(expand(model, method)).methods)


# The choice of OREPA


@pytest.mark.parametrize('name', TINY_MODELS)
def test_networks_of_pairs_keep_the_choice_of_the_paper(name):
    model = TINY_MODELS[name]()
    model.extra = nn.ModuleList([kxk(4, 4), nn.Conv2d(4, 4, 1)])  # no norms behind them
    assert not {'extra.0', 'extra.1'} & set(taken(model))


@torch.no_grad()
def test_other_networks_give_all_kxk_with_a_centre_biased_or_not():
    torch.manual_seed(0)
    model = nn.Sequential(
        kxk(3, 8), nn.ReLU(), kxk(8, 8, bias=False), nn.Conv2d(8, 8, 4, stride=4),
        nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.Conv2d(8, 8, (1, 5), padding=(0, 2)), nn.Conv2d(8, 2, 1))
    model = model.double().eval()
    assert Network.of(model).shares.paired == 0.0
    assert taken(model) == ['0', '2', '4', '5']
    x = randn(2, 3, 12, 12)
    rep = expand(model)
    assert_near(rep(x), model(x), MODEL_RTOL[torch.float64])
    assert tree(fuse(rep)) == tree(model)
    assert_near(fuse(rep)(x), model(x), MODEL_RTOL[torch.float64])


@pytest.mark.parametrize(('width', 'with_pointwise'), [(20, False), (30, True)])
def test_1x1_are_taken_where_they_carry_a_fair_share(width, with_pointwise):
    model = nn.Sequential(kxk(8, 8), nn.Conv2d(8, width, 1), nn.ReLU(), nn.Conv2d(width, 1, 1))
    pointwise = 9 * width
    assert Network.of(model).shares == Shares(0.0, pointwise / (pointwise + 9 * 64))
    assert taken(model) == (['0', '1', '3'] if with_pointwise else ['0'])


@dataclasses.dataclass
class Parts:
    conv: nn.Module


class Slots:
    __slots__ = ('conv',)

    def __init__(self, conv):
        self.conv = conv


@pytest.mark.parametrize('hold', [
    lambda m: setattr(m, 'others', [m[0]]), lambda m: setattr(m, 'others', dict(first=(m[0], 1))),
    lambda m: setattr(m, 'run', m[0].forward), lambda m: setattr(m, 'run', functools.partial(print, m[0])),
    lambda m: setattr(m, 'run', functools.partial(m[0], x=1)),
    lambda m: setattr(m, 'others', collections.deque([m[0]])),
    lambda m: setattr(m, 'parts', types.SimpleNamespace(conv=m[0])), lambda m: setattr(m, 'parts', Parts(m[0])),
    lambda m: setattr(m, 'parts', [Slots(m[0])]), lambda m: setattr(m, 'run', weakref.ref(m[0])),
    lambda m: setattr(m, 'run', (lambda conv: lambda x: conv(x))(m[0])), lambda m: setattr(m, 'parts', {m[0]: 1}),
    lambda m: setattr(m, 'parts', collections.ChainMap(dict(conv=collections.UserList([m[0]]))))])
@pytest.mark.parametrize('method', ['orepa', 'dbb'])
def test_what_lies_in_another_attribute_too_is_left(hold, method):
    model = nn.Sequential(kxk(3, 4), nn.BatchNorm2d(4), kxk(4, 4), nn.BatchNorm2d(4))
    hold(model)
    assert taken(model, method) == ['2']
    with pytest.raises(UserError, match='a second place that is no registered module'):
        expand(model, method, select='0')


@pytest.mark.parametrize('method', ['orepa', 'dbb'])
def test_what_lies_in_another_attribute_too_is_not_fused(method):
    model = expand(nn.Sequential(kxk(3, 4), nn.BatchNorm2d(4), nn.ReLU()), method).eval()
    model.first = [model[0]]
    before = tree(model)
    with pytest.raises(UserError, match='0 cannot be fused: it has a second place'):
        fuse(model, inplace=True)
    assert tree(model) == before
    model.first = [model[2]]
    assert type(fuse(model)[0]) is nn.Conv2d


def twice(module, name):
    """Put a method on a module that gives twice what its class's gives."""
    setattr(module, name, types.MethodType(lambda self, *args: 2 * getattr(type(self), name)(self, *args), module))


@pytest.mark.parametrize('name', ['forward', '_conv_forward'])
@pytest.mark.parametrize('method', ['orepa', 'dbb'])
def test_what_has_a_method_of_its_own_is_left_and_does_not_fold(name, method):
    model = nn.Sequential(kxk(3, 4), nn.BatchNorm2d(4), kxk(4, 4), nn.BatchNorm2d(4))
    twice(model[0], name)
    assert taken(model, method) == ['2']
    model = expand(nn.Sequential(kxk(3, 4), nn.BatchNorm2d(4)), 'dbb').eval()
    twice(model[0].seq_kxk, name)
    with pytest.raises(UserError, match=f'seq_kxk of a DiverseBranchConv2d does not fold: {name} was put on it'):
        fuse(model)


def test_only_wrappers_of_accelerate_are_the_method_that_they_wrap():
    """It puts them on all modules with weights of a network that it spreads over devices."""
    model = expand(nn.Sequential(kxk(3, 4), nn.BatchNorm2d(4)), 'dbb').eval()
    for part in (model[0].conv_kxk, model[0].norm_kxk):
        part.forward = functools.update_wrapper(functools.partial(type(part).forward, part), part.forward)
    with pytest.raises(UserError, match='conv_kxk of a DiverseBranchConv2d does not fold: forward was put on it'):
        fuse(model)
    for part in (model[0].conv_kxk, model[0].norm_kxk):
        part._hf_hook = None
    assert type(fuse(model)[0]) is nn.Conv2d


@pytest.mark.parametrize('first', ['orepa', 'doconv'])
def test_blocks_around_layers_have_an_attach_rate_afterwards_too(first):
    model = tiny_repvgg().eval()
    once = expand(model, first)
    x = randn(2, 3, 32, 32, dtype=torch.float32)
    assert_near(expand(once, 'rep')(x), model(x), 1e-5)


@pytest.mark.parametrize('part', ['', 'conv_1x1', 'conv_1x1.conv', 'identity'])
def test_blocks_with_a_method_of_their_own_have_no_attach_rate(part):
    model = tiny_repvgg()
    block = model.get_submodule('stages.0.1')
    twice(block.get_submodule(part), 'forward')
    with pytest.raises(UserError, match=r'stages\.0\.1 cannot be given an attach rate: methods were put on it'):
        expand(model, 'rep')
    assert taken(model)


def test_annealers_that_a_network_holds_are_in_nobodys_way():
    model = expand(nn.Sequential(kxk(3, 4), nn.BatchNorm2d(4), nn.ReLU()), 'dbb').eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.annealer = Annealer(
        model, optimizer, AnnealingSchedule(2, 2, warmup_epochs=1), freeze_origin=True, log_branches=True)
    model.about = [model.annealer, optimizer]
    assert type(fuse(model)[0]) is nn.Conv2d


def test_norms_and_blocks_that_lie_in_another_attribute_stay():
    model = nn.Sequential(kxk(3, 4), nn.BatchNorm2d(4), kxk(4, 4), nn.BatchNorm2d(4))
    model.others = [model[1]]
    assert taken(model) == ['0', '2']
    assert taken(model, 'dbb') == ['2']
    blocks = timm.create_model('repvgg_a0', device='meta')
    blocks.others = [blocks.stages[0][1]]
    with pytest.raises(UserError, match=r'stages\.0\.1 cannot be given an attach rate'):
        expand(blocks, 'rep')


def test_the_classifier_stays():
    model = timm.create_model('resnetv2_50x1_bit', device='meta')
    names = taken(model)
    assert 'head.fc' not in names
    assert {'stages.0.blocks.0.conv1', 'stages.0.blocks.0.conv2'} <= set(names)


def test_large_kernels_that_would_become_a_wide_stack_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 7), nn.ReLU(), nn.Conv2d(8, 32, 3), nn.Conv2d(32, 4, 7))
    assert taken(model) == ['0', '2']
    assert taken(nn.Sequential(model[3], nn.BatchNorm2d(4))) == ['0']  # as it was: a norm is behind it


@pytest.mark.parametrize(('pairs', 'all_of_them'), [(3, False), (1, True)])
def test_half_of_the_kxk_parameters_make_a_network_of_pairs(pairs, all_of_them):
    layers = [kxk(8, 8) for _ in range(4)]
    model = nn.Sequential(*(nn.Sequential(c, nn.BatchNorm2d(8)) if n < pairs else c for n, c in enumerate(layers)))
    assert Network.of(model).shares.paired == pairs / 4
    assert len(taken(model)) == (4 if all_of_them else pairs)


def test_methods_with_norms_take_pairs_only():
    model = nn.Sequential(kxk(3, 8), nn.ReLU(), kxk(8, 8), nn.BatchNorm2d(8))
    assert taken(model, 'dbb') == ['2']


# What is said


def messages(caplog, model, *args, **kwargs):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger='timm_rep'):
        expand(model, *args, **kwargs)
    record, = caplog.records
    return record.levelname, record.getMessage()


def test_little_is_said_to_be_little(caplog):
    model = nn.Sequential(kxk(3, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 64, 4), nn.Conv2d(64, 64, 4))
    level, text = messages(caplog, model)
    assert level == 'WARNING'
    assert '1 of 3 convolutions' in text
    assert text.endswith('that is little, select= takes more; cannot be taken: 2 with a kernel without a centre: 2, 3')
    assert messages(caplog, model, select='0')[0] == 'INFO'
    assert messages(caplog, tiny_resnet()) == ('INFO', f'expanded ResNet: {expansion_of(expand(tiny_resnet()))}')


@pytest.mark.parametrize(('make', 'args', 'kwargs', 'message'), [
    (lambda: nn.Sequential(kxk(3, 4), nn.GroupNorm(2, 4)), ['dbb'], {}, 'need a BatchNorm2d, here are GroupNorm$'),
    (lambda: nn.Sequential(kxk(3, 4), nn.ReLU()), ['dbb'], {}, 'need a BatchNorm2d, here are none$'),
    (lambda: nn.Sequential(kxk(3, 4), nn.ReLU(), nn.BatchNorm2d(4)), ['dbb'], {}, 'none that it takes unasked'),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 7), nn.BatchNorm2d(4)), ['dbb'], {}, 'it takes by name: 0$'),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 4)), [], {}, 'left: 1 with a kernel without a centre'),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding_mode='reflect')), [], {}, "left: 1 with padding mode 'reflect'"),
    (tiny_resnet, [{'*': 'orepa', 'layer4.*': 'dbb'}], {}, r"'layer4\.\*' decides nothing: .* goes to '\*'"),
    (tiny_resnet, [{'layer1.*': 'orepa', 'layer9.*': 'dbb'}], {}, "no nn.Conv2d of ResNet matches 'layer9"),
    (tiny_resnet, [{'layer1.0.downsample.?': 'dbb', '*': 'orepa'}], {},
     r"'dbb' takes nothing of what the pattern 'layer1\.0\.down.*' decides: layer1\.0\.downsample\.0; none that"),
    (lambda: nn.Sequential(kxk(3, 4), nn.Conv2d(4, 4, 2)), [{'0': 'orepa', '*': 'orepa'}], {},
     "'orepa' takes nothing .* decides: 1; left: 1 with a kernel without a centre$"),
    (lambda: nn.Sequential(kxk(3, 4), nn.Conv2d(4, 4, 2), nn.Conv2d(4, 4, 1)), [{'0': 'orepa', '[2-9]': 'orepa'}], {},
     "decides: 2; its own choice leaves that, full names overrule it$"),
    (lambda: nn.Sequential(kxk(3, 4), nn.GroupNorm(2, 4)), [{'0': 'orepa', '*': 'dbb'}], {}, r"'\*' decides nothing"),
    (lambda: nn.Sequential(kxk(3, 4), kxk(4, 4), nn.GroupNorm(2, 4)), [{'0': 'orepa', '*': 'dbb'}], {},
     r"'dbb' takes nothing of what the pattern '\*' decides: 1; .* need a BatchNorm2d, here are GroupNorm"),
    (tiny_resnet, [{'layer1.0.downsample.0': 'dbb'}], {}, r'cannot expand layer1\.0\.downsample\.0.*1x1'),
    (tiny_resnet, [{'layer1.*': 'orepa'}], dict(select='conv1'), 'select goes with one method'),
])
def test_one_clear_error_and_the_model_is_unchanged(make, args, kwargs, message):
    model = make()
    before, modules = state_of(model), tree(model)
    with pytest.raises(UserError, match=message):
        expand(model, *args, **kwargs, inplace=True)
    assert tree(model) == modules
    assert state_of(model).keys() == before.keys()


def test_a_pattern_that_takes_the_blocks_themselves_takes_something():
    rep = expand(tiny_repvgg(), {'stages.0.*': 'rep', 'stages.1.*': 'orepa', '*': None})
    assert {name for name in expansion_of(rep).methods if name.startswith('stages.0')} == {'stages.0.0', 'stages.0.1'}


def test_what_it_takes_by_name_it_does():
    model = timm.create_model('densenet121', device='meta')
    with pytest.raises(UserError, match=r'it takes by name: features\.conv0$'):
        expand(model, 'dbb')
    assert list(expansion_of(expand(model, 'dbb', select='features.conv0')).methods) == ['features.conv0']


def test_patterns_may_overlap_as_long_as_each_decides_something():
    rep = expand(tiny_resnet(), {'layer4.0.conv1': 'dbb', 'layer4.*': 'orepa', '*.conv2': 'acb', '*': None})
    methods = {name: method.name for name, method in expansion_of(rep).methods.items()}
    assert methods == {
        'layer4.0.conv1': 'dbb', 'layer4.0.conv2': 'orepa', **{f'layer{n}.0.conv2': 'acb' for n in (1, 2, 3)}}
