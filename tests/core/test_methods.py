"""A method is one file: two that are registered here alone, and what knows them then."""
import copy
import json
from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn as nn
from click.testing import CliRunner
from helpers import (
    MODEL_RTOL,
    assert_near,
    assert_same_state,
    layer_types,
    randn,
    randomize_,
    state_of,
    tiny_repvgg,
    tiny_resnet,
    tree,
)
from torch import Tensor

import timm_rep
from timm_rep import UserError, expand, fuse, rep_layers, set_attach_rate, verify
from timm_rep.cli.main import main
from timm_rep.core import methods
from timm_rep.core.annealing import begin_time_step
from timm_rep.core.expand import expand_as_
from timm_rep.core.expansion import expansion_of, methods_from_list
from timm_rep.core.layers import DBB, LinearRepLayer, NormedRepLayer, Orepa
from timm_rep.core.layers.base import kaiming_uniform_
from timm_rep.core.layers.normed import NormedMethod
from timm_rep.core.methods import (
    Method,
    as_method,
    method_from_dict,
    method_of_layer,
    register_method,
    registered_methods,
)
from timm_rep.core.walk import annealed_modules


class ToyConv2d(LinearRepLayer):
    """A kernel and a share of another one."""

    def __init__(self, *geometry, bias=True, share=0.5, generator=None, device=None, dtype=None, **more_geometry):
        super().__init__(*geometry, **more_geometry, device=device)
        self.share = share
        self.kernel = nn.Parameter(torch.empty(self.weight_shape, device=device, dtype=dtype))
        self.side_kernel = nn.Parameter(torch.empty(self.weight_shape, device=device, dtype=dtype))
        self._init_bias(bias, device, dtype)
        self.reset_parameters(generator)

    def _own_kwargs(self):
        return dict(super()._own_kwargs(), share=self.share)

    def _compose(self, channels_last: bool) -> Tensor:
        return self.kernel + self.attach_rate.to(self.kernel.dtype) * self.share * self.side_kernel

    def reset_parameters(self, generator=None):
        self._reset_annealing()
        kaiming_uniform_(self.kernel, self.kernel[0].numel(), generator=generator)
        self.redraw_side_branches_(generator)
        self._reset_bias(generator)

    def redraw_side_branches_(self, generator=None):
        kaiming_uniform_(self.side_kernel, self.kernel[0].numel(), generator=generator)

    @torch.no_grad()
    def clear_origin_(self):
        return self.kernel.zero_()

    @torch.no_grad()
    def branch_kernels(self):
        return dict(origin=self.kernel.clone(), side=self.compose_weight() - self.kernel)

    def branch_gradients(self):
        found = dict(origin=self.kernel.grad, side=self.side_kernel.grad)
        return {name: gradient for name, gradient in found.items() if gradient is not None}


@dataclass(frozen=True)
class Toy(Method):
    name, title, summary = 'toy', 'Toy layers', 'A kernel and a share of another one.'
    layers = (ToyConv2d,)
    share: float = 0.5

    def layer_for(self, place):
        return ToyConv2d, dict(share=self.share)


class NormedToyConv2d(NormedRepLayer):
    """A KxK and another one, each with a norm."""

    def _add_side_branches(self, dd, norm_dd):
        self.conv_side = nn.Conv2d(**self._geometry(), bias=False, **dd)
        self.norm_side = nn.BatchNorm2d(self.out_channels, **norm_dd)

    def _side_convs(self):
        return dict(side=self.conv_side)

    def _side_norms(self):
        return (self.norm_side,)

    def _fold_sides(self):
        norm = self.norm_side
        gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        return dict(side=(gain.reshape(-1, 1, 1, 1) * self.conv_side.weight, norm.bias - gain * norm.running_mean))

    def forward(self, x):
        return self.norm_kxk(self.conv_kxk(x)) + self.attach_rate.to(x.dtype) * self.norm_side(self.conv_side(x))


@dataclass(frozen=True)
class NormedToy(NormedMethod):
    name, title, summary = 'normed_toy', 'Normed toy layers', 'Two kernels, each with a norm.'
    layers = (NormedToyConv2d,)


TOYS = dict(toy=Toy, normed_toy=NormedToy)
both = pytest.mark.parametrize('name', TOYS)


@pytest.fixture(autouse=True)
def _registered():
    before = registered_methods()
    for method_cls in TOYS.values():
        register_method(method_cls)
    yield
    for name in TOYS:
        del methods._METHODS[name]
    assert registered_methods() == before


def images(dtype=torch.float64, size=64):
    return randn(2, 3, size, size, seed=5, dtype=dtype)


def stock_model(make=tiny_resnet, dtype=torch.float64):
    return randomize_(make()).to(dtype).eval()


# What a method is


@both
def test_registered_method_is_known_by_its_name(name):
    method_cls = TOYS[name]
    assert list(registered_methods())[-2:] == list(TOYS)
    assert registered_methods()[name] is method_cls
    assert as_method(name) == method_cls()
    assert as_method(method_cls()) == method_cls()
    layer = method_cls.layers[0](4, 6, 3)
    assert method_of_layer(layer) == method_cls()  # made by hand
    assert method_of_layer(nn.Conv2d(4, 6, 3)) is None


def test_options_are_plain_data_and_come_back():
    data = json.loads(json.dumps(Toy(share=0.25).to_dict()))
    assert data == dict(method='toy', share=0.25)
    assert method_from_dict(data) == Toy(share=0.25)
    assert method_from_dict(dict(method='toy')) == Toy()


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: as_method('acnet'), "method 'acnet'; allowed are 'orepa', 'dbb', 'acb', 'rep', .*, 'toy', 'normed_toy'"),
    (lambda: as_method(Toy), "unknown method <class .*Toy'>; allowed are .*, or an object, Toy\\(\\)"),
    (lambda: as_method(None), 'unknown method None'),
    (lambda: as_method(['toy']), r"unknown method \['toy'\]"),
    (lambda: method_from_dict(dict(share=0.5)), "unknown method ''"),
    (lambda: method_from_dict(dict(method='acnet')), "unknown method 'acnet'"),
    (lambda: method_from_dict(dict(method='toy', size=3)), r"toy has the options \['share'\], got \['size'\]"),
    (lambda: method_from_dict(dict(method='normed_toy', share=1)), r"normed_toy has the options \[\], got \['share'\]"),
    (lambda: methods_from_list(dict(toy=['conv1'])), 'an expansion is a list of methods with their layers, got'),
    (lambda: methods_from_list(['toy']), 'an expansion is a list of methods with their layers, got'),
    (lambda: methods_from_list([dict(method='toy')]), 'names the layers of each method, got None'),
    (lambda: methods_from_list([dict(method='toy', layers='conv1')]), "names the layers of each method, got 'conv1'"),
    (lambda: methods_from_list([dict(method='toy', layers=[1])]), r'names the layers of each method, got \[1\]'),
    (lambda: methods_from_list([dict(method='acnet', layers=['conv1'])]), "unknown method 'acnet'"),
    (lambda: methods_from_list([dict(method='toy', size=3, layers=['conv1'])]), r"options \['share'\], got \['size'\]"),
])
def test_what_is_no_method_raises(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_method_needs_a_name_of_its_own():
    @dataclass(frozen=True)
    class Nameless(Method):
        pass

    @dataclass(frozen=True)
    class Spaced(Method):
        name = 'two words'

    @dataclass(frozen=True)
    class Other(Method):
        name = 'dbb'

    for method_cls, message in (
            (Nameless, "Nameless needs a name that can be an argument, got ''"),
            (Spaced, "Spaced needs a name that can be an argument, got 'two words'"),
            (Other, "the method 'dbb' is DBB already")):
        with pytest.raises(ValueError, match=message):
            register_method(method_cls)
    assert registered_methods()['dbb'] is DBB
    assert register_method(Toy) is Toy  # as a module that is imported twice does


# Expand, fuse, verify


@both
@torch.no_grad()
def test_expand_by_name_fuse_and_verify(name):
    model = stock_model()
    expanded = expand(model, name, generator=torch.Generator().manual_seed(0))
    again = expand(model, name, generator=torch.Generator().manual_seed(0))
    assert_same_state(state_of(expanded), state_of(again))
    expected = {f'layer{n}.0.conv{c}' for n in (1, 2, 3, 4) for c in (1, 2)} | ({'conv1'} if name == 'toy' else set())
    assert layer_types(expanded) == dict.fromkeys(expected, TOYS[name].layers[0])  # normed ones leave the 7x7 alone
    assert_near(expanded(images()), model(images()), MODEL_RTOL[torch.float64])
    set_attach_rate(expanded, 0.3)
    assert (expanded(images()) - model(images())).abs().max() > 1e-3
    fused = fuse(expanded)
    assert tree(fused) == tree(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    report = verify(expanded, fused, inputs=images())
    assert {difference.name for difference in report.layers} == expected
    with torch.no_grad():
        fused.layer2[0].conv1.weight.mul_(1.001)
    with pytest.raises(timm_rep.VerificationError, match=r'layer layer2\.0\.conv1 is off'):
        verify(expanded, fused, inputs=images())


@torch.no_grad()
def test_expand_with_options():
    model = stock_model()
    expanded = expand(model, Toy(share=0.25))
    assert {layer.share for _, layer in rep_layers(expanded)} == {0.25}
    assert set(expansion_of(expanded).methods.values()) == {Toy(share=0.25)}
    assert_near(expanded(images()), model(images()), MODEL_RTOL[torch.float64])
    selected = expand(model, Toy(share=2.0), select='layer2.0.downsample.0')  # a 1x1, not taken unasked
    assert expansion_of(selected).methods == {'layer2.0.downsample.0': Toy(share=2.0)}
    assert_near(selected(images()), model(images()), MODEL_RTOL[torch.float64])


@torch.no_grad()
def test_expand_by_a_mapping_of_patterns():
    model = stock_model()
    expanded = expand(model, {
        'layer1.*': None,
        'layer2.0.downsample.0': 'toy',  # an exact name takes what the default policy would not
        'layer3.*': Toy(share=0.25),
        'layer4.0.conv1': Orepa(),
        '*': 'normed_toy',
    })
    expected = {
        'layer2.0.downsample.0': Toy(), 'layer3.0.conv1': Toy(share=0.25), 'layer3.0.conv2': Toy(share=0.25),
        'layer4.0.conv1': Orepa(), 'layer2.0.conv1': NormedToy(), 'layer2.0.conv2': NormedToy(),
        'layer4.0.conv2': NormedToy(),
    }
    assert expansion_of(expanded).methods == expected
    assert layer_types(expanded).keys() == expected.keys()
    assert_near(expanded(images()), model(images()), MODEL_RTOL[torch.float64])
    fused = fuse(expanded)
    assert tree(fused) == tree(model)
    assert_near(fused(images()), model(images()), MODEL_RTOL[torch.float64])


@pytest.mark.parametrize(('mapping', 'kwargs', 'message'), [
    ({'layer9.*': 'toy'}, {}, "no nn.Conv2d of ResNet matches 'layer9"),
    ({'layer1.*': 'toy', 'fc': None}, {}, "no nn.Conv2d of ResNet matches 'fc'"),
    ({'layer1.*': 'acnet'}, {}, "unknown method 'acnet'"),
    ({'*': None}, {}, 'no convolution of ResNet to expand'),
    ({'*': 'toy'}, dict(select='conv1'), 'a mapping of patterns to methods selects by its patterns'),
    ({'layer2.0.downsample.0': 'normed_toy'}, {}, r'cannot expand layer2\.0\.downsample\.0: .*larger than 1x1'),
])
def test_impossible_mapping_raises_and_changes_nothing(mapping, kwargs, message):
    model = stock_model()
    before, modules = state_of(model), tree(model)
    with pytest.raises(UserError, match=message):
        expand(model, mapping, **kwargs, inplace=True)
    assert tree(model) == modules
    assert_same_state(state_of(model), before)


@both
@torch.no_grad()
def test_repvgg(name):
    model = stock_model(tiny_repvgg)
    expanded = expand(model, name)
    # A method with norms gives the blocks' own branches an attach rate, too.
    assert ('rep' in expansion_of(expanded).convs) == (name == 'normed_toy')
    assert set(layer_types(expanded).values()) == {TOYS[name].layers[0]}
    assert_near(expanded(images()), model(images()), MODEL_RTOL[torch.float64])
    set_attach_rate(expanded, 0.3)
    fused = fuse(expanded)
    assert tree(fused) == tree(model)
    assert_near(fused(images()), expanded(images()), MODEL_RTOL[torch.float64])


# Models


@both
@torch.no_grad()
def test_model_with_layers_of_the_method(name):
    model = randomize_(timm.create_model('repan_resnet18_cifar', rep_layer=name, num_classes=3)).eval()
    assert set(layer_types(model).values()) == {TOYS[name].layers[0]}
    fused = fuse(model)
    stock = timm.create_model('repan_resnet18_cifar', num_classes=3, inference_mode=True).eval()
    assert tree(fused) == tree(stock)
    stock.load_state_dict(fused.state_dict())
    x = images(torch.float32, 32)
    assert_near(stock(x), model(x), MODEL_RTOL[torch.float32])
    verify(model, fused)


@torch.no_grad()
def test_repvgg_model_with_layers_of_the_method():
    model = timm.create_model('repan_repvgg_a0_cifar', rep_layer='toy', device='meta')
    blocks = dict(annealed_modules(model))
    assert layer_types(model) == {f'{name}.conv_kxk.conv': ToyConv2d for name in blocks}
    assert len(blocks) == 22


def test_model_of_a_method_that_is_not_registered():
    with pytest.raises(UserError, match=r"unknown method 'acnet'; allowed are .*'toy', 'normed_toy'"):
        timm.create_model('repan_resnet18_cifar', rep_layer='acnet')


# Annealing


@both
@pytest.mark.parametrize('rate', [0.0, 0.4])
@torch.no_grad()
def test_time_step(name, rate):
    model = randomize_(expand(tiny_resnet(), name)).double().eval()
    set_attach_rate(model, 0.3)
    expected = model(images())
    before = state_of(model)
    begin_time_step(model, torch.Generator().manual_seed(1), attach_rate=rate, compensate=True)
    assert_near(model(images()), expected, MODEL_RTOL[torch.float64])
    for layer_name, layer in rep_layers(model):
        assert layer.attach_rate.item() == rate
        assert layer.time_step == 1
        side = f'{layer_name}.side_kernel' if name == 'toy' else f'{layer_name}.conv_side.weight'
        assert not torch.equal(model.state_dict()[side], before[side])
    set_attach_rate(model, 0.9)
    assert (model(images()) - expected).abs().max() > 1e-3
    verify(model, fuse(model), inputs=images())


@both
def test_branches_of_a_layer(name):
    layer = randomize_(TOYS[name].layers[0](4, 6, 3, padding=1, dtype=torch.float64)).eval()
    layer.set_attach_rate_(0.3)
    branches = layer.branch_kernels()
    assert list(branches) == ['origin', 'side']
    assert_near(sum(branches.values()), layer.weight, 1e-12)
    layer(randn(2, 4, 9, 9)).square().sum().backward()
    shapes = {key: gradient.shape for key, gradient in layer.branch_gradients().items()}
    assert shapes == dict.fromkeys(branches, layer.weight.shape)


# Its expansion travels with the weights


@torch.no_grad()
def test_expansion_of_the_methods_makes_the_same_model():
    stock = stock_model()
    model = expand(stock, {'layer[12].*': Toy(share=0.25), 'layer3.*': 'normed_toy', '*': 'toy'})
    expansion = expansion_of(model)
    data = json.loads(json.dumps(expansion.to_list()))
    assert data == [
        dict(method='toy', share=0.5, layers=['conv1', 'layer4.0.conv1', 'layer4.0.conv2']),
        dict(method='toy', share=0.25, layers=[f'layer{n}.0.conv{c}' for n in (1, 2) for c in (1, 2)]),
        dict(method='normed_toy', layers=['layer3.0.conv1', 'layer3.0.conv2']),
    ]
    assert methods_from_list(data) == expansion.methods
    other = tiny_resnet().double().eval()
    assert expand_as_(other, methods_from_list(data)) is other
    assert tree(other) == tree(model)
    assert expansion_of(other) == expansion
    other.load_state_dict(model.state_dict())
    assert_near(other(images()), stock(images()), MODEL_RTOL[torch.float64])


def test_expansion_of_another_network_raises_and_changes_nothing():
    model = stock_model()
    modules = tree(model)
    for name in ('layer9.0.conv1', 'bn1', 'layer1'):
        with pytest.raises(UserError, match=rf"ResNet has no plain convolution '{name}'"):
            expand_as_(model, {'conv1': Toy(), name: Toy()})
        assert tree(model) == modules
    expanded = expand(model, 'toy')
    with pytest.raises(UserError, match="no plain convolution 'conv1'"):
        expand_as_(copy.deepcopy(expanded), {'conv1': Toy()})


# What other parts know of it


@both
@torch.no_grad()
def test_saved_model_comes_back_from_its_file_alone(name, tmp_path):
    model = randomize_(timm.create_model('repan_resnet18_cifar', rep_layer=name, num_classes=3)).eval()
    set_attach_rate(model, 0.3)
    timm_rep.save(model, tmp_path / 'model.safetensors')
    loaded = timm_rep.load(tmp_path / 'model.safetensors').eval()
    assert tree(loaded) == tree(model)
    assert expansion_of(loaded) == expansion_of(model)
    assert_same_state(state_of(loaded), state_of(model))


@torch.no_grad()
def test_saved_model_of_no_registry_goes_into_a_stock_model(tmp_path):
    model = randomize_(expand(stock_model(), {'layer1.*': Toy(share=0.25), '*': 'normed_toy'}))
    timm_rep.save(model, tmp_path / 'model.safetensors')
    loaded = timm_rep.load(tmp_path / 'model.safetensors', into=stock_model())
    assert expansion_of(loaded) == expansion_of(model)
    assert_same_state(state_of(loaded), state_of(model))


def test_file_of_a_method_that_is_not_registered_is_refused(tmp_path):
    timm_rep.save(expand(stock_model(), 'toy'), tmp_path / 'model.safetensors')
    del methods._METHODS['toy']
    try:
        with pytest.raises(UserError, match="unknown method 'toy'"):
            timm_rep.load(tmp_path / 'model.safetensors', into=stock_model())
    finally:
        register_method(Toy)


@both
@torch.no_grad()
def test_annealer_takes_its_layers_through_time_steps(name):
    model = expand(tiny_resnet(), name).double().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = timm_rep.AnnealingSchedule(time_steps=2, epochs=2, warmup_epochs=1)
    annealer = timm_rep.Annealer(model, optimizer, schedule, compensate=True, log_branches=True)
    for epoch in range(schedule.total_epochs):
        before = model(images())
        annealer.begin_epoch(epoch)
        if epoch == 2:
            assert_near(model(images()), before, MODEL_RTOL[torch.float64])
        with torch.enable_grad():
            model(images()).square().sum().backward()
        optimizer.step()
        annealer.end_epoch(train_loss=1.0)
    assert {int(layer.time_step) for _, layer in rep_layers(model)} == {1}
    assert {row['branch'] for row in annealer.branch_rows} == {'origin', 'side'}


@both
def test_card_of_an_export_says_what_it_is(name, tmp_path):
    model = expand(timm.create_model('test_resnet', num_classes=5), name)
    folder = timm_rep.export_folder(model, tmp_path / 'folder')
    card = (folder / 'README.md').read_text()
    assert TOYS[name].summary in card
    assert f'are {name}' in card or f'{name}:' in card
    provenance = json.loads((folder / 'config.json').read_text())['timm_rep']
    assert methods_from_list(provenance['expansion']) == expansion_of(model).methods


@both
def test_command_line_lists_it(name):
    result = CliRunner().invoke(main, ['list', name])
    assert result.exit_code == 0, result.output
    assert f'{TOYS[name].title}: {TOYS[name].summary}' in result.output
