"""What a user has set on a network and expand and fuse carry over: trainable flags, hooks, wrappers, its own fuse."""
import copy
import functools

import pytest
import timm
import torch
import torch.nn as nn
from helpers import MODEL_RTOL, TINY_MODELS, assert_near, randn, randomize_, tiny_repvgg, tiny_resnet, tree
from timm.utils import reparameterize_model
from torch.nn.utils import prune, weight_norm

import timm_rep
from timm_rep import UserError, expand, fuse, verify
from timm_rep.core.layers import RepLayer
from timm_rep.core.walk import annealed_modules, rep_layers

KINDS = ['orepa', 'dbb', 'acb', 'rep']
RTOL = MODEL_RTOL[torch.float64]


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('tiny', TINY_MODELS)
def test_trainable_flags_survive_expand_time_step_and_fuse(tiny, kind):
    model = TINY_MODELS[tiny]().eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    rep = expand(model, kind)
    trained = {name: is_trained for name, is_trained in flags(rep).items() if not is_trained}
    timm_rep.begin_time_step(rep)
    assert trained == {name: is_trained for name, is_trained in flags(rep).items() if not is_trained}
    assert flags(fuse(rep)) == flags(model)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('tiny', TINY_MODELS)
def test_of_a_frozen_network_nothing_is_trained_in_any_form(tiny, kind):
    rep = expand(TINY_MODELS[tiny]().requires_grad_(False), kind).eval()
    for module in (rep, fuse(rep), *(module.fuse() for _, module in annealed_modules(rep))):
        assert not any(flags(module).values())
    rep.requires_grad_(True)
    for module in (fuse(rep), *(module.fuse() for _, module in annealed_modules(rep))):
        assert all(flags(module).values())


def test_a_frozen_bias_and_a_frozen_kernel_are_told_apart():
    conv = nn.Conv2d(4, 4, 3)
    conv.bias.requires_grad_(False)
    layer = timm_rep.OrepaConv2d.from_conv(conv)
    assert layer.branches.requires_grad
    assert not layer.bias.requires_grad
    assert flags(layer.fuse()) == dict(weight=True, bias=False)


@pytest.mark.parametrize('trained', ['0.bias', '1.bias', '1.weight', '0.weight'])
@pytest.mark.parametrize('kind', KINDS)
def test_one_trained_parameter_is_the_one_that_comes_back(kind, trained):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False).eval()
    model.get_parameter(trained).requires_grad_(True)
    rep = expand(model, kind)
    assert any(flags(rep).values())
    assert flags(fuse(rep)) == flags(model)


def calls_of(module, register='register_forward_hook'):
    seen = []
    handle = getattr(module, register)(lambda module, *args: seen.append(args[-1]))
    return seen, handle


@torch.no_grad()
@pytest.mark.parametrize('inplace', [True, False])
def test_hooks_move_along_both_ways_and_can_be_removed(inplace):
    model = randomize_(tiny_repvgg()).double().eval()
    conv = model.stages[0][0].conv_kxk
    seen, handle = calls_of(conv.conv)
    inputs, _ = calls_of(conv.conv, 'register_forward_pre_hook')
    deep, _ = calls_of(model.stages[0][1].conv_1x1.bn)  # inside a block that is made anew
    x = randn(1, 3, 32, 32)
    model(x)
    for kind in ('orepa', {'*.conv_kxk.conv': 'orepa'}):
        rep = expand(model, kind, inplace=inplace)
        rep(x)
        fused = fuse(rep, inplace=inplace)
        fused(x)
        model = fused if inplace else model
    assert [len(s) for s in (seen, inputs, deep)] == [5, 5, 5]
    for output in seen[1:]:
        assert_near(output, seen[0], RTOL)
    if inplace:
        handle.remove()
        fused(x)
        assert len(seen) == 5


@torch.no_grad()
@pytest.mark.parametrize('kind', ['dbb', 'acb', 'rep'])
def test_what_reads_between_convolution_and_norm_keeps_the_norm_out(kind):
    def pair():
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))

    hooked, also = pair(), nn.Sequential(pair(), pair()[:1], nn.BatchNorm2d(4))
    calls_of(hooked[0])
    with pytest.raises(UserError, match='no convolution'):
        expand(hooked, kind)
    with pytest.raises(UserError, match='sees the output of 0 before the norm'):
        expand(hooked, kind, select='0')
    calls_of(also[0][1], 'register_forward_pre_hook')
    with pytest.raises(UserError, match='no convolution'):
        expand(also, kind)
    behind = pair()
    seen, _ = calls_of(behind[1])
    rep = expand(randomize_(behind).double().eval(), kind)
    x = randn(1, 3, 8, 8)
    assert_near(rep(x), behind(x), RTOL)
    assert_near(seen[0], seen[1], RTOL)
    calls_of(rep[0])
    with pytest.raises(UserError, match='Remove the hook'):
        fuse(rep)


@torch.no_grad()
@pytest.mark.parametrize('kind', ['orepa', 'dbb'])
@pytest.mark.parametrize(('name', 'kwargs'), [
    ('ghostnet_050', {}),
    ('repghostnet_050', {}),
    ('test_efficientnet', dict(feature_location='expansion')),
    ('test_resnet', dict(feature_cls='hook')),
    ('test_resnet', dict(feature_cls='fx')),
])
def test_feature_maps_stay_what_they_are(name, kwargs, kind):
    model = randomize_(timm.create_model(name, features_only=True, **kwargs)).double().eval()
    x = randn(1, 3, 64, 64)
    expected = model(x)
    rep = expand(model, kind)
    for form in (rep, copy.deepcopy(rep).eval(), fuse(rep)):
        maps = form(x)
        assert len(maps) == len(expected)
        for actual, wanted in zip(maps, expected):
            assert_near(actual, wanted, RTOL)
    assert tree(fuse(rep)) == tree(model) or kwargs == dict(feature_cls='fx')  # whose class is made for each


def test_convolutions_that_are_more_than_that_are_not_taken():
    for change in (
        weight_norm,
        lambda conv: prune.l1_unstructured(conv, 'weight', 0.5),
        lambda conv: conv.weight.register_hook(lambda gradient: 0 * gradient),
        lambda conv: conv.bias.register_post_accumulate_grad_hook(lambda parameter: None),
        lambda conv: conv.register_state_dict_post_hook(lambda *args: None),
        lambda conv: conv.register_load_state_dict_post_hook(lambda *args: None),
        lambda conv: setattr(conv, 'forward', lambda x: x),
    ):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        change(model[0])
        with pytest.raises(UserError, match='no convolution'):
            expand(model, 'orepa')


@pytest.mark.parametrize('compute', [lambda conv: prune.l1_unstructured(conv, 'weight', 0.5), weight_norm])
def test_networks_with_computed_kernels_are_copied(compute):
    model = tiny_resnet().double()
    compute(model.layer1[0].conv1)
    x = randn(2, 3, 32, 32)
    expected = model.eval()(x)
    rep = expand(model, 'orepa')
    for form in (rep, fuse(rep)):
        assert type(form.layer1[0].conv1) is nn.Conv2d
        assert_near(form(x), expected, RTOL)
        for parameter in form.parameters():
            nn.init.zeros_(parameter)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize('wrap', [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))])
def test_wrappers_are_taken_off_before_fusing_and_put_on_after_expanding(wrap):
    model = tiny_resnet().eval()
    rep = expand(model, 'orepa')
    assert tree(fuse(wrap(rep))) == tree(model)
    assert fuse(wrap(rep), inplace=True) is rep
    with pytest.raises(UserError, match='before it is wrapped'):
        expand(wrap(model), 'orepa')


@pytest.mark.parametrize('kind', ['orepa', 'dbb'])
@pytest.mark.parametrize('inplace', [False, True])
def test_the_wrappers_of_compiled_parts_are_taken_off_too(kind, inplace):
    stock = tiny_resnet().eval()
    model = expand(stock, kind)
    compiled = functools.partial(torch.compile, backend='eager')
    model.conv1, model.bn1 = compiled(model.conv1), compiled(model.bn1)
    model.layer1[0].conv2 = compiled(model.layer1[0].conv2)
    model.layer1[0] = compiled(model.layer1[0])
    model.layer2 = model.again = compiled(model.layer2)
    x = randn(2, 3, 32, 32, dtype=torch.float32)
    report = verify(model, fuse(model), inputs=x)
    assert [layer.name for layer in report.layers] == [name for name, _ in rep_layers(expand(stock, kind))]
    stock.again = stock.layer2
    fused = fuse(model, inplace=inplace)
    assert tree(fused) == tree(stock)
    fresh = tiny_resnet().eval()
    fresh.again = fresh.layer2
    fresh.load_state_dict(fused.state_dict())
    assert_near(fresh(x), stock(x), MODEL_RTOL[torch.float32])
    assert inplace or hasattr(model.layer2, '_orig_mod')


@pytest.mark.parametrize('name', ['conv1', 'layer2'])
def test_a_hook_on_what_compile_made_of_a_part_is_not_lost(name):
    model = expand(tiny_resnet(), 'orepa')
    setattr(model, name, torch.compile(getattr(model, name), backend='eager'))
    hook = getattr(model, name).register_forward_hook(lambda *args: None)
    with pytest.raises(UserError, match=f'torch.compile made of {name}'):
        fuse(model)
    assert hasattr(getattr(model, name), '_orig_mod')
    hook.remove()
    assert tree(fuse(model)) == tree(tiny_resnet())


@torch.no_grad()
@pytest.mark.parametrize('kind', ['orepa', 'dbb'])
@pytest.mark.parametrize('name', ['repghostnet_050', 'efficientvim_m1', 'levit_128s'])
def test_a_network_that_folds_its_own_norms_does_so_in_stock_form(name, kind):
    if not timm.is_model(name):
        pytest.skip(f'older timm has no {name}')
    model = randomize_(timm.create_model(name)).eval()
    x = randn(1, 3, 224, 224, dtype=torch.float32)
    rep = expand(model, kind)
    deployed = reparameterize_model(rep)
    assert_near(deployed(x), model(x), 1e-4)
    assert_near(rep(x), model(x), 1e-4)  # which was left alone


class FeaturePyramid(nn.Module):
    """Has a method of the same name that does something else."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)

    def fuse(self, x, y):
        return x + y

    def forward(self, x):
        return self.fuse(x, self.bn(self.conv(x)))


def test_a_method_that_is_called_fuse_but_adds_maps_is_left_alone():
    model = FeaturePyramid().eval()
    rep = expand(model, 'orepa')
    rep(randn(1, 3, 8, 8, dtype=torch.float32))
    assert isinstance(rep.conv, RepLayer)
    assert 'fuse' in vars(rep)
    assert 'fuse' not in vars(fuse(rep))


@pytest.mark.parametrize('arguments', [dict(low=True), dict(high='nearest'), dict(low=640), dict(high=[32, 64])])
def test_settings_are_no_feature_maps(arguments):
    """As of Ultralytics' ``fuse(verbose=True, imgsz=[640, 640])``."""
    class Network(FeaturePyramid):
        def fuse(self, low=None, high=None):
            assert isinstance(self.conv, nn.Conv2d)
            return self

    rep = expand(Network().eval(), 'orepa')
    assert rep.fuse(**arguments) is rep
    assert not list(timm_rep.rep_layers(rep))
    trained = expand(Network(), 'orepa')
    with pytest.raises(AssertionError):
        trained.train().fuse()


def test_a_fuse_in_the_forward_of_its_own_module_folds_nothing():
    class Network(FeaturePyramid):
        def fuse(self, mode='sum'):
            return self.maps[0] + self.maps[1]

        def forward(self, x):
            self.maps = x, self.bn(self.conv(x))
            return self.fuse(mode='sum')

    rep = expand(Network().eval(), 'orepa')
    rep(randn(1, 3, 8, 8, dtype=torch.float32))
    assert isinstance(rep.conv, RepLayer)


def test_a_fuse_that_is_static_or_of_the_instance_is_left_alone():
    class Network(FeaturePyramid):
        @staticmethod
        def fuse(x, y):
            return x + y

    x = randn(1, 3, 8, 8, dtype=torch.float32)
    model = Network().eval()
    assert_near(expand(model, 'orepa')(x), model(x), 1e-5)
    model = FeaturePyramid().eval()
    model.fuse = mine = lambda x, y: 2 * x
    rep = expand(model, 'orepa', inplace=True)
    assert fuse(rep, inplace=True).fuse is mine


@pytest.mark.parametrize('kind', ['dbb', 'acb', 'rep'])
@pytest.mark.parametrize('change', [
    lambda model: setattr(model[1], 'forward', torch.relu),
    lambda model: model[1].weight.register_hook(lambda gradient: 0 * gradient),
    lambda model: model[1].register_buffer('mask', torch.ones(4)),
    lambda model: model[1].register_state_dict_post_hook(lambda *args: None),
    lambda model: setattr(model[1], 'weight', model[2].weight),
])
def test_norms_that_are_more_than_that_stay(change, kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    change(model)
    with pytest.raises(UserError, match='no convolution'):
        expand(model, kind)
    with pytest.raises(UserError, match='cannot go with it'):
        expand(model, kind, select='0')


def test_maps_by_name_are_no_switches():
    class Network(FeaturePyramid):
        def fuse(self, low=None, high=None):
            return low + high

        def forward(self, x):
            return self.fuse(low=x, high=self.bn(self.conv(x)))

    rep = expand(Network().eval(), 'orepa')
    rep(randn(1, 3, 8, 8, dtype=torch.float32))
    assert isinstance(rep.conv, RepLayer)


def test_the_handle_of_a_hook_on_a_repvgg_block_removes_it():
    model = tiny_repvgg().eval()
    seen, handle = calls_of(model.stages[0][0])
    expand(model, 'rep', inplace=True)
    x = randn(1, 3, 32, 32, dtype=torch.float32)
    model(x)
    handle.remove()
    model(x)
    assert len(seen) == 1


def test_convolutions_that_share_a_kernel_stay_plain():
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)) for _ in range(3)))
    model[1][0].weight = model[0][0].weight
    for kind in KINDS:
        rep = expand(model, kind)
        assert [name for name, _ in timm_rep.rep_layers(rep)] == ['2.0']
        assert rep[0][0].weight is rep[1][0].weight
    with pytest.raises(UserError, match=r"no nn.Conv2d .* matches '0.0'"):
        expand(model, 'orepa', select='0.0')


@torch.no_grad()
@pytest.mark.parametrize('kind', ['dbb', 'acb', 'rep'])
def test_a_kernel_behind_a_gain_of_zero_is_kept(kind):
    model = randomize_(tiny_resnet()).double().eval()
    block = model.layer1[0]
    block.bn2.weight.zero_()
    block.bn1.weight[::2] = 0
    rep = expand(model, kind)
    fused = fuse(rep)
    x = randn(1, 3, 32, 32)
    for form in (rep, fused):
        assert_near(form(x), model(x), RTOL)
    given_back = fused.layer1[0]
    for name in ('conv2.weight', 'bn2.weight', 'bn2.running_mean', 'bn2.running_var'):
        assert torch.equal(given_back.get_parameter(name) if 'weight' in name else given_back.get_buffer(name),
                           block.get_parameter(name) if 'weight' in name else block.get_buffer(name)), name
    assert torch.equal(given_back.conv1.weight[::2], block.conv1.weight[::2])
    assert torch.equal(rep.layer1[0].conv2.conv_kxk.weight, block.conv2.weight)
    rep.train().requires_grad_(True)
    with torch.enable_grad():
        rep(randn(4, 3, 32, 32)).square().sum().backward()
    assert rep.layer1[0].conv2.norm_kxk.weight.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize('kind', ['dbb', 'acb', 'rep'])
def test_a_convolution_shared_by_places_with_other_norms_is_left_alone(kind):
    shared = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    model = nn.Sequential(*(
        nn.Sequential(conv, nn.BatchNorm2d(4)) for conv in (nn.Conv2d(4, 4, 3, padding=1), shared, shared)))
    model = randomize_(model).double().eval()
    rep = expand(model, kind)
    assert [name for name, _ in timm_rep.rep_layers(rep)] == ['0.0']
    x = randn(1, 4, 8, 8)
    assert_near(fuse(rep)(x), model(x), RTOL)


@torch.no_grad()
@pytest.mark.parametrize('kind', ['dbb', 'acb', 'rep'])
def test_norms_that_are_kept_in_eval_mode_stay_in_it(kind):
    """The usual fine-tuning with fixed statistics."""
    model = randomize_(tiny_resnet()).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = randn(2, 3, 32, 32)
    rep = expand(model, kind)
    fused = fuse(rep)
    for form in (rep, fused):
        assert form.training
        assert not any(part.training for part in form.modules() if isinstance(part, nn.BatchNorm2d))
        assert_near(form(x), model(x), RTOL)
    with pytest.raises(UserError, match='in training mode'):
        fuse(rep.train())


@pytest.mark.parametrize('call', ['forward_features', 'alias', 'child'])
def test_a_fuse_in_a_forward_by_another_name_folds_nothing(call):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

        def fuse(self, mode='sum'):
            return self.map

        def forward_features(self, x):
            self.map = self.norm(self.conv(x))
            return self.fuse(mode='sum')

        def run(self, x):
            return self.forward_features(x)

        forward = run

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.neck = Net()

        def forward(self, x):
            return self.neck.run(x)

    model = timm_rep.expand(Parent().eval(), 'orepa')
    run = dict(forward_features=model.neck.forward_features, alias=model.neck, child=model)[call]
    run(randn(2, 3, 8, 8, dtype=torch.float32))
    assert len(list(timm_rep.rep_layers(model))) == 1


@pytest.mark.parametrize('select', [None, ['a.0']], ids=str)
def test_a_convolution_in_two_places_stays_one_layer(select):
    conv = nn.Conv2d(3, 8, 3, bias=False)
    model = nn.ModuleDict(dict(a=nn.Sequential(conv, nn.BatchNorm2d(8)), b=nn.Sequential(conv, nn.ReLU()))).eval()
    rep = timm_rep.expand(model, 'orepa', select=select)
    assert isinstance(rep.a[0], timm_rep.OrepaConv2d)
    assert rep.a[0] is rep.b[0]
    fused = timm_rep.fuse(rep)
    assert fused.a[0] is fused.b[0]


def test_flags_are_set_on_the_layer_not_on_its_kernel():
    layer = timm_rep.OrepaConv2d(4, 4, 3).requires_grad_(False)
    with pytest.raises(timm_rep.UserError, match=r'set the flag on the layer: layer.requires_grad_'):
        layer.weight.requires_grad_(True)
    with pytest.raises(timm_rep.UserError, match=r'set the flag on the layer'):
        layer.weight.requires_grad = True
    assert nn.Parameter(layer.weight).requires_grad is True
    assert nn.Parameter(layer.weight, requires_grad=False).requires_grad is False


@pytest.mark.parametrize('kind', ['orepa', 'dbb'])
@pytest.mark.parametrize('change', ['child', 'attribute', 'child of the norm', 'attribute of the norm'])
def test_convolutions_and_norms_with_more_to_them_run_as_before(change, kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
            owner = self.norm if 'norm' in change else self.conv
            owner.extra = nn.GELU() if 'child' in change else torch.tanh
            self.other, self.other_norm = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)

        def forward(self, x):
            owner = self.norm if 'norm' in change else self.conv
            return self.other_norm(self.other(owner.extra(self.norm(self.conv(x)))))

    model, x = Net().eval(), randn(2, 3, 8, 8, dtype=torch.float32)
    rep = timm_rep.expand(model, kind)
    assert_near(rep(x), model(x), 1e-5)
    assert isinstance(rep.other, timm_rep.core.layers.RepLayer)


def test_complex_convolutions_stay_and_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.complex64), nn.Conv2d(4, 4, 3))
    assert type(timm_rep.expand(model, select='*')[0]) is nn.Conv2d
    with pytest.raises(timm_rep.UserError, match='takes real kernels, got'):
        timm_rep.OrepaConv2d.from_conv(model[0])


class SharedConv(nn.Module):
    """Two blocks that share a convolution and its norm; they fold their own norms, or say that they are deployed."""

    class Block(nn.Module):
        def __init__(self, pair):
            super().__init__()
            self.pair, self.scale = pair, nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.scale * self.pair(x)

        def switch_to_deploy(self):
            assert not list(timm_rep.rep_layers(self))

    def __init__(self):
        super().__init__()
        pair = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.one, self.other = self.Block(pair), self.Block(nn.Sequential(*pair))
        self.third = nn.Sequential(*pair)

    def forward(self, x):
        return self.third(self.other(self.one(x)))


@pytest.mark.parametrize('kind', ['orepa', 'dbb'])
@torch.no_grad()
def test_a_layer_in_two_places_stays_one_where_a_block_folds_its_own(kind):
    model = randomize_(SharedConv()).eval()
    x = randn(1, 4, 8, 8, dtype=torch.float32)
    rep = copy.deepcopy(expand(model, kind))
    assert isinstance(rep.third[0], RepLayer)
    rep.other.switch_to_deploy()
    assert rep.one.pair[0] is rep.other.pair[0] is rep.third[0]
    assert rep.one.pair[1] is rep.other.pair[1] is rep.third[1]
    assert type(rep.third[0]) is nn.Conv2d
    assert_near(rep(x), model(x), 1e-5)
    deployed = reparameterize_model(expand(model, kind))
    assert deployed.one.pair[0] is deployed.third[0]
    assert deployed.state_dict().keys() == model.state_dict().keys()


def channels_last(model):
    return [
        name for name, kernel in model.named_parameters() if kernel.dim() == 4
        and kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
    ]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('before', [False, True])
def test_the_memory_format_of_kernels_moves_along_both_ways(kind, before):
    model = tiny_resnet().eval()
    if before:
        model.to(memory_format=torch.channels_last)
    rep = expand(model, kind)
    if not before:
        assert not channels_last(fuse(rep))
        rep = copy.deepcopy(rep.to(memory_format=torch.channels_last)).double()
        model.to(memory_format=torch.channels_last)
    assert channels_last(fuse(rep)) == channels_last(model) != []
    assert channels_last(reparameterize_model(rep))
    assert not channels_last(fuse(rep.to(memory_format=torch.contiguous_format)))
