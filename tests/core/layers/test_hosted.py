"""Rep layers in the place of convolutions that pad their input or standardise their kernel themselves."""
import copy
import io

import pytest
import timm
import torch
import torch.nn as nn
from helpers import LINEAR_RTOL, MODEL_RTOL, assert_near, assert_same_state, randn, randomize_, state_of, tree
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.utils import ModelEmaV3, reparameterize_model

import timm_rep
from timm_rep import UserError, expand, expansion_of, fuse, rep_layers
from timm_rep.core.layers.hosted import HOSTS, StandardizedConv2d

STANDARDIZED = [cls for cls, host in HOSTS.items() if host is StandardizedConv2d]
every_host = pytest.mark.parametrize('cls', list(HOSTS), ids=lambda cls: cls.__name__)


def conv(cls, inputs, outputs, size=3, stride=2, **kwargs):
    padding = {} if cls is Conv2dSame else dict(padding='same' if cls.__name__.endswith('Same') else size // 2)
    layer = cls(inputs, outputs, size, stride=stride, **padding, **kwargs).double()
    if hasattr(layer, 'gain'):
        nn.init.uniform_(layer.gain, 0.5, 2.0, generator=torch.Generator().manual_seed(3))
    return layer


def stock_net(cls, **kwargs):
    torch.manual_seed(0)
    return randomize_(nn.Sequential(
        conv(cls, 3, 8, size=7, **kwargs), nn.BatchNorm2d(8), nn.ReLU(),
        conv(cls, 8, 8, groups=8, **kwargs), nn.BatchNorm2d(8), conv(cls, 8, 6, size=1, stride=1, **kwargs),
        nn.BatchNorm2d(6)).double()).eval()


def images(size=29):
    return randn(2, 3, size, size + 3)


@every_host
@pytest.mark.parametrize('bias', [True, False])
@torch.no_grad()
def test_expanding_and_fusing_keep_the_function_the_class_and_the_keys(cls, bias):
    stock = stock_net(cls, bias=bias)
    expected = stock(images())
    rep = expand(stock, 'orepa')
    assert expansion_of(rep).convs == dict(orepa=3)
    assert_near(rep(images()), expected, MODEL_RTOL[torch.float64])
    assert_near(rep.train()(images()), copy.deepcopy(stock).train()(images()), MODEL_RTOL[torch.float64])
    fused = fuse(rep.eval())
    assert tree(fused) == tree(stock)
    assert list(fused.state_dict()) == list(stock.state_dict())
    for name, module in stock.named_modules():
        assert vars(fused.get_submodule(name)).keys() == vars(module).keys()
    stock.load_state_dict(fused.state_dict())
    for form in (fused, stock, reparameterize_model(rep)):
        assert_near(form(images()), rep(images()), MODEL_RTOL[torch.float64])
    timm_rep.verify(rep, fused, inputs=images())


@pytest.mark.parametrize('cls', STANDARDIZED, ids=lambda cls: cls.__name__)
@torch.no_grad()
def test_the_rule_acts_on_what_the_branches_compose(cls):
    stock = stock_net(cls)
    rep = expand(stock, 'orepa')
    for _, layer in rep_layers(rep):
        if hasattr(layer, 'scale'):
            layer.scale.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    assert (rep(images()) - stock(images())).abs().max() > 1e-3
    plain = copy.deepcopy(stock)
    for name in ('0', '3', '5'):
        plain.get_submodule(name).weight.copy_(rep.get_submodule(name).weight)
    assert_near(rep(images()), plain(images()), MODEL_RTOL[torch.float64])


@every_host
def test_gradients_reach_all_branches_and_the_gain(cls):
    rep = expand(stock_net(cls), 'orepa').train()
    rep(images()).square().sum().backward()
    for name, parameter in rep.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    if hasattr(cls(3, 4, 3), 'gain'):
        assert rep[0].gain.grad.abs().max() > 0


@every_host
@torch.no_grad()
def test_a_time_step_is_exact(cls):
    rep = expand(stock_net(cls), 'orepa')
    timm_rep.set_attach_rate(rep, 0.4)
    before, raw = rep(images()), rep[0].weight.clone()
    timm_rep.begin_time_step(rep, generator=torch.Generator().manual_seed(1))
    assert {int(layer.time_step) for _, layer in rep_layers(rep)} == {1}
    assert_near(rep(images()), before, MODEL_RTOL[torch.float64])
    assert_near(rep[0].weight.as_subclass(torch.Tensor), raw, LINEAR_RTOL[torch.float64])


@pytest.mark.parametrize('method', ['dbb', 'acb', 'rep'])
@torch.no_grad()
def test_layers_with_norms_in_padding_convolutions(method):
    torch.manual_seed(0)
    stock = randomize_(nn.Sequential(
        conv(Conv2dSame, 3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(Conv2dSame, 8, 8, size=5, groups=8),
        nn.BatchNorm2d(8)).double()).eval()
    rep = expand(stock, method)
    assert expansion_of(rep).convs == {method: 2}
    assert_near(rep(images()), stock(images()), MODEL_RTOL[torch.float64])
    timm_rep.set_attach_rate(rep, 0.6)
    before = rep(images())
    fused = fuse(randomize_(rep))
    assert tree(fused) == tree(stock)
    assert_near(fused(images()), rep(images()), MODEL_RTOL[torch.float64])
    assert (rep(images()) - before).abs().max() > 1e-3


@pytest.mark.parametrize('cls', STANDARDIZED, ids=lambda cls: cls.__name__)
def test_layers_with_norms_leave_standardising_convolutions_alone(cls):
    model = nn.Sequential(conv(cls, 3, 8), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).double()
    assert list(expansion_of(expand(model, 'dbb')).methods) == ['2']
    with pytest.raises(UserError, match=f'0: a {cls.__name__} standardises its kernel'):
        expand(model, 'dbb', select='0')


@every_host
@torch.no_grad()
def test_copies_pickles_scripts_and_compiles(cls):
    rep = expand(stock_net(cls), 'orepa')
    expected = rep(images())
    file = io.BytesIO()
    torch.save(rep, file)
    file.seek(0)
    forms = [copy.deepcopy(rep), torch.load(file, weights_only=False), torch.jit.script(rep)]
    if cls in (Conv2dSame, ScaledStdConv2dSame):
        forms.append(torch.compile(rep, backend='eager', fullgraph=True))
    for form in forms:
        assert_near(form(images()), expected, LINEAR_RTOL[torch.float64])
    ema = ModelEmaV3(rep, decay=0.5)
    ema.update(rep)
    assert_near(ema.module(images()), expected, MODEL_RTOL[torch.float64])


@every_host
@torch.no_grad()
def test_the_layer_inside_is_called_with_its_hooks(cls):
    rep = expand(stock_net(cls), 'orepa')
    expected, called = rep(images()), []
    for name, layer in rep_layers(rep):
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    assert torch.equal(rep(images()), expected)
    assert called == ['0.layer', '3.layer', '5.layer']


@every_host
@torch.no_grad()
def test_files_say_what_was_expanded(cls, tmp_path):
    rep = expand(stock_net(cls), 'orepa')
    assert list(expansion_of(rep).methods) == ['0', '3', '5']
    timm_rep.save(rep, tmp_path / 'net.safetensors')
    again = timm_rep.load(tmp_path / 'net.safetensors', into=stock_net(cls)).eval()
    assert_same_state(state_of(again), state_of(rep))
    assert torch.equal(again(images()), rep(images()))


@every_host
def test_weights_in_stock_form_are_refused_as_those_of_other_layers(cls):
    stock = stock_net(cls)
    rep = expand(stock, select='*')
    before = state_of(rep)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r'The weights of 0 are in stock form') as error:
            rep.load_state_dict(stock.state_dict(), strict=strict)
        assert str(error.value).count('in stock form') == 1
    rep.load_state_dict(before)
    rep.load_state_dict({}, strict=False)


def test_flags_hooks_and_attributes_move_along():
    model = stock_net(ScaledStdConv2dSame)
    model[0].gain.requires_grad_(False)
    model[3].weight.requires_grad_(False)
    seen = []
    handle = model[0].register_forward_hook(lambda module, args, out: seen.append(out))
    stock = copy.deepcopy(model)
    rep = expand(model, 'orepa', inplace=True)
    assert (rep[0].out_channels, rep[0].stride, rep[0].groups) == (8, (2, 2), 1)
    assert torch.equal(rep[0].bias, stock[0].bias)
    rep(images())
    assert len(seen) == 1
    fused = fuse(rep, inplace=True)
    fused(images())
    assert len(seen) == 2
    assert {n: p.requires_grad for n, p in fused.named_parameters()} == {
        n: p.requires_grad for n, p in stock.named_parameters()}
    handle.remove()
    fused(images())
    assert len(seen) == 2


def test_another_class_is_left_and_named(caplog):
    class OddConv2d(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(OddConv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    with caplog.at_level('INFO', logger='timm_rep'):
        rep = expand(model, 'orepa')
    assert list(expansion_of(rep).methods) == ['2']
    assert '1 with a OddConv2d, whose rule is not known: 0' in caplog.text
    with pytest.raises(UserError, match=r"matches '0' that a layer can stand for: 0 \(a OddConv2d"):
        expand(model, 'orepa', select='0')
    with pytest.raises(UserError, match='left: 1 with a OddConv2d'):
        expand(nn.Sequential(OddConv2d(3, 8, 3)), 'orepa')


@pytest.mark.parametrize('name', ['test_nfnet', 'tf_mobilenetv3_small_075'])
@torch.no_grad()
def test_timms_networks(name):
    model = randomize_(timm.create_model(name)).double().eval()
    x = randn(1, 3, 64, 64)
    rep = expand(model, 'orepa')
    assert_near(rep(x), model(x), MODEL_RTOL[torch.float64])
    assert tree(fuse(rep)) == tree(model)


def test_classes_of_timm_are_all_known():
    assert set(HOSTS) == {Conv2dSame, StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame}
