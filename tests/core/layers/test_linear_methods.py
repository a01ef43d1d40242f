"""Linear methods besides OREPA: their formulas on feature maps, what they take, and training with them."""
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import MODEL_RTOL, assert_near, layer_types, randn, randomize_, state_of, tiny_resnet, tree
from timm.optim import param_groups_weight_decay

import timm_rep
from timm_rep import (
    Dilated,
    DilatedConv2d,
    DOConv2d,
    ExpandedConv2d,
    ExpandNet,
    MobileOne,
    MobileOneConv2d,
    Orepa,
    RefConv,
    RefConv2d,
    RepNas,
    RepNasConv2d,
    UserError,
    expand,
    expansion_of,
    fuse,
    rep_layers,
)
from timm_rep.core.annealing import begin_time_step
from timm_rep.core.kernels import merge_sequential
from timm_rep.core.layers.dilated import BRANCHES
from timm_rep.core.methods import method_from_dict, method_of_layer

METHODS = ('doconv', 'expandnet', 'refconv', 'dilated', 'mobileone', 'repnas')
methods = pytest.mark.parametrize('method', METHODS)
groups_of_6 = pytest.mark.parametrize('groups', [1, 2, 6])


def layer_of(layer_cls, *args, rate=0.3, **kwargs):
    layer = randomize_(layer_cls(*args, bias=False, dtype=torch.float64, **kwargs))
    layer.set_attach_rate_(rate)
    return layer


def scaled(layer, name, out):
    rate = 1.0 if name == 'origin' else layer.attach_rate.double()
    return out * (rate * layer.scale[layer.branch_names.index(name)]).reshape(1, -1, 1, 1)


# Formulas, on feature maps


@groups_of_6
@pytest.mark.parametrize('size', [3, (1, 5)])
def test_doconv_mixes_the_taps_of_every_input_channel(groups, size):
    """A depthwise convolution with as many filters as taps, whose outputs the kernel sums (feature composition)."""
    layer = layer_of(DOConv2d, 6, 12, size, groups=groups)
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    residual = layer.residual.reshape(6, taps, taps).transpose(1, 2)
    filters = torch.eye(taps, dtype=torch.float64) + layer.attach_rate.double() * residual
    x = randn(2, 6, 8, 9)
    inner = F.conv2d(x, filters.reshape(6 * taps, 1, *layer.kernel_size), groups=6)
    assert_near(layer(x), F.conv2d(inner, layer.origin.reshape(12, -1, 1, 1), groups=groups), 1e-12)


@groups_of_6
@pytest.mark.parametrize('channels', [(6, 12), (12, 6)])
def test_expandnet_is_a_sequence_beside_the_origin(groups, channels):
    layer = layer_of(ExpandedConv2d, *channels, 3, groups=groups, expansion=2)
    assert layer.seq_kxk.shape == (2 * channels[1], 2 * channels[0] // groups, 3, 3)
    x = randn(2, channels[0], 8, 9)
    out = x
    for kernel in (layer.seq_first, layer.seq_kxk, layer.seq_last):
        out = F.conv2d(out, kernel, groups=groups)
    expected = scaled(layer, 'origin', F.conv2d(x, layer.origin, groups=groups)) + scaled(layer, 'sequence', out)
    assert_near(layer(x), expected, 1e-12)


@pytest.mark.parametrize(('groups', 'slices'), [(1, 1), (2, 2), (6, 6)])
def test_refconv_convolves_the_slices_of_the_kernel(groups, slices):
    layer = layer_of(RefConv2d, 6, 6, 5, groups=groups)
    over = nn.Conv2d(36 // groups, 36 // groups, 3, padding=1, groups=36 // groups // slices, bias=False).double()
    over.weight = nn.Parameter(layer.residual.detach())
    mixed = over(layer.origin.reshape(1, -1, 5, 5)).reshape(layer.origin.shape)
    assert_near(layer.weight, layer.origin + layer.attach_rate.double() * mixed, 1e-12)
    assert 'origin' in layer.state_dict()
    assert not layer.origin.requires_grad


@groups_of_6
@pytest.mark.parametrize('size', [5, 7, 9, 13, 17, 31])
def test_dilated_branches_are_dilated_convolutions(groups, size):
    layer = layer_of(DilatedConv2d, 6, 6, size, groups=groups, padding='same')
    x = randn(1, 6, 20, 33)
    branches = [pair.split('/') for pair in BRANCHES[min(size, 17)].split(',')]
    views = layer.branch_views()
    assert list(views) == list(layer.branch_names)
    out = 0
    for (name, view), (_, dilation) in zip(views.items(), [(size, 1), *branches]):
        out = out + scaled(layer, name, F.conv2d(x, view, None, 1, 'same', int(dilation), groups))
    assert_near(layer(x), out, 1e-12)


@pytest.mark.parametrize('size', BRANCHES)
def test_papers_dilated_branches_fit_and_reach_the_border(size):
    reach = [(int(pair[0]) - 1) * int(pair[2:]) + 1 for pair in BRANCHES[size].split(',')]
    assert size - 2 <= max(reach) <= size


@groups_of_6
@pytest.mark.parametrize(('size', 'copies', 'stride'), [(3, 3, 1), (5, 1, 1), (1, 2, 1), (3, 2, 2)])
def test_mobileone_is_its_branches_side_by_side(groups, size, copies, stride):
    layer = layer_of(MobileOneConv2d, 6, 6, size, stride, size // 2, groups=groups, copies=copies)
    x = randn(2, 6, 8, 9)
    branches = {'origin': layer.origin, **{
        f'copy_{n}': layer.copies.split(layer.out_channels)[n - 1] for n in range(1, copies)}}
    outputs = {name: F.conv2d(x, kernel, None, stride, size // 2, 1, groups) for name, kernel in branches.items()}
    if size > 1:
        outputs['conv_1x1'] = F.conv2d(x, layer.conv_1x1, None, stride, groups=groups)
    if stride == 1:
        outputs['skip'] = x
    assert layer.branch_names == tuple(outputs)
    assert_near(layer(x), sum(scaled(layer, name, out) for name, out in outputs.items()), 1e-12)


@groups_of_6
@pytest.mark.parametrize('size', [3, (1, 5)])
def test_repnas_weighs_branches_of_unit_norm(groups, size):
    layer = layer_of(RepNasConv2d, 6, 6, size, groups=groups, padding='same')
    size = layer.kernel_size
    with torch.no_grad():
        layer.importance.copy_(torch.tensor([0.7, -0.2, 1.5]))
    x = randn(2, 6, 8, 9)
    pad = (size[0] // 2, size[1] // 2)

    def normed(out, kernel):
        return out * (2 / kernel.square().sum([1, 2, 3])).sqrt().reshape(1, -1, 1, 1)

    average = F.avg_pool2d(F.conv2d(x, layer.average, groups=groups), size, 1, pad)
    inner = x + F.conv2d(x, layer.seq_1x1, groups=groups)
    outputs = dict(
        average=normed(average, layer.average / (size[0] * size[1]) ** 0.5),
        conv_1x1=normed(F.conv2d(x, layer.conv_1x1, groups=groups), layer.conv_1x1),
        sequential=normed(
            F.conv2d(inner, layer.seq_kxk, padding=pad, groups=groups),
            layer.seq_kxk + merge_sequential(layer.seq_1x1, layer.seq_kxk, groups)),
    )
    rate = layer.attach_rate.double()
    out = sum(rate * weight * outputs[name] for weight, name in zip(layer.importance, layer.branch_names[1:]))
    assert_near(layer(x), F.conv2d(x, layer.origin, padding=pad, groups=groups) + out, 1e-10)


@pytest.mark.parametrize('make', [
    lambda: ExpandedConv2d(64, 64, 3, bias=False),
    lambda: DilatedConv2d(64, 64, 7, groups=64, bias=False),
    lambda: MobileOneConv2d(64, 48, 3, bias=False),
    lambda: DOConv2d(64, 64, 3, bias=False),
    lambda: RefConv2d(64, 64, 3, bias=False),
], ids=['expanded', 'dilated', 'mobileone', 'doconv', 'refconv'])
def test_fresh_kernels_are_as_large_as_a_plain_one(make):
    """So that a layer starts like a convolution, kaiming-uniform, also where no norm is behind it."""
    torch.manual_seed(0)
    layer = make()
    expected = (2 / layer.weight[0].numel()) ** 0.5
    x = torch.randn(4, layer.in_channels, 12, 12)
    assert layer(x).std().item() == pytest.approx(2 ** 0.5, rel=0.25)
    assert layer.branch_kernels()['origin'].std().item() <= 1.05 * expected


# Methods


def vgg(size=3, groups=1):
    """Three convolutions, two with norms, in front of a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, size, padding=size // 2, groups=groups, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )


TAKEN = dict(
    doconv=({'0', '3'}, {'0', '3'}),
    expandnet=({'0', '3'}, {'0', '3'}),
    refconv=({'0', '3'}, {'0', '3'}),
    dilated=(None, {'3'}),
    mobileone=({'0', '3'}, {'0', '3'}),
    repnas=({'0', '3'}, {'0', '3'}),
)


@methods
@pytest.mark.parametrize(('size', 'groups', 'row'), [(3, 1, 0), (7, 8, 1)])
def test_default_policy(method, size, groups, row):
    taken = TAKEN[method][row]
    if taken is None:
        with pytest.raises(UserError, match="no convolution of Sequential to expand with 'dilated'"):
            expand(vgg(size, groups), method)
    else:
        assert set(layer_types(expand(vgg(size, groups), method))) == taken


def test_policies_at_large_networks():
    """Of ConvNeXt every depthwise 7x7, which no norm of its channels need follow; of RepVGG no branch of the blocks."""
    with torch.device('meta'):
        convnext, repvgg = timm.create_model('convnext_atto'), timm.create_model('repvgg_a0')
        mobilenet = timm.create_model('mobilenetv3_small_050')
    assert expansion_of(expand(convnext, 'dilated')).convs == dict(dilated=12)
    names = set(layer_types(expand(repvgg, 'mobileone')))
    assert len(names) == 22
    assert all(name.endswith('conv_kxk.conv') for name in names)
    taken = layer_types(expand(mobilenet, MobileOne(copies=1)))
    convs = {name: m for name, m in mobilenet.named_modules() if isinstance(m, nn.Conv2d)}
    assert {name for name, conv in convs.items() if conv.kernel_size == (1, 1) and name in taken} == {
        name for name, conv in convs.items()
        if conv.kernel_size == (1, 1) and name in taken and conv.in_channels == conv.out_channels}


@methods
def test_model_keeps_its_function_through_everything(method, tmp_path):
    """Expand, a training step, a time step, a file and back."""
    stock = randomize_(vgg(7, 8)).double().eval()
    x = randn(4, 3, 16, 16)
    model = expand(stock, method, generator=torch.Generator().manual_seed(0))
    assert_near(model(x), stock(x), MODEL_RTOL[torch.float64])
    assert_near(model.train()(x), stock.train()(x), MODEL_RTOL[torch.float64])
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    before = state_of(model)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
    for name, value in model.named_parameters():
        assert name == '0.bias' or not torch.equal(value, before[name]), name  # the norm takes that out again
    expected = model.eval()(x)
    assert (expected - stock.eval()(x)).abs().max() > 1e-4
    begin_time_step(model, torch.Generator().manual_seed(1), attach_rate=0.3)
    assert_near(model(x), expected, MODEL_RTOL[torch.float64])
    timm_rep.save(model, tmp_path / 'model.safetensors')
    again = timm_rep.load(tmp_path / 'model.safetensors', into=vgg(7, 8)).double().eval()
    assert {type(layer) for _, layer in rep_layers(again)} == {type(layer) for _, layer in rep_layers(model)}
    assert_near(again(x), expected, 1e-5)
    fused = fuse(model)
    assert tree(fused) == tree(stock)
    assert_near(fused(x), expected, MODEL_RTOL[torch.float64])


@methods
@pytest.mark.parametrize('size', [32])
def test_architectures_take_them(method, size):
    model = timm.create_model('repan_mobilenetv1_100', rep_layer=method) if method != 'dilated' else expand(
        timm.create_model('convnext_atto'), method)
    assert expansion_of(model).convs[method] > 5
    assert model.eval()(torch.randn(1, 3, size, size)).isfinite().all()


def test_repnas_importances_are_not_decayed_and_one_branch_less_is_no_parameter():
    model = expand(tiny_resnet(), RepNas(branches='origin,average'))
    no_decay, _ = param_groups_weight_decay(model, 0.1)
    ids = {id(parameter) for parameter in no_decay['params']}
    assert all(id(layer.importance) in ids for _, layer in rep_layers(model))
    plain = RepNasConv2d(4, 4, 3, branches=['origin'], device='meta')
    plain.load_state_dict(RepNasConv2d(4, 4, 3, branches=['origin']).state_dict(), assign=True)
    assert [name for name, _ in plain.named_parameters()] == ['origin', 'bias']
    assert plain(torch.randn(1, 4, 5, 5)).isfinite().all()


def test_doconvs_residual_is_not_decayed_by_timms_rule():
    model = expand(tiny_resnet(), 'doconv')
    no_decay, _ = param_groups_weight_decay(model, 0.1)
    ids = {id(parameter) for parameter in no_decay['params']}
    layers = [layer for _, layer in rep_layers(model)]
    assert layers
    assert all(id(layer.residual) in ids and id(layer.origin) not in ids for layer in layers)


def test_refconv_trains_the_convolutions_over_frozen_kernels():
    stock = vgg()
    model = expand(stock, 'refconv')
    kernel = stock[3].weight.detach()
    assert torch.equal(model[3].weight, kernel)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[3].origin, kernel)
    assert not torch.equal(model[3].weight, kernel)
    assert fuse(model.eval())[3].weight.requires_grad
    assert model[3].origin_parameters() == []


@pytest.mark.parametrize('method', [
    ExpandNet(expansion=2), RefConv(map_size=1), Dilated(branches='3/1,3/3'), MobileOne(copies=2),
    RepNas(), RepNas(branches=('sequential', 'origin')), RepNas(branches='origin')])
def test_options_travel_and_are_told_of_layers_made_by_hand(method):
    assert method_from_dict(method.to_dict()) == method
    layer = dict(rep_layers(expand(vgg(7, 8), method)))['3']
    assert method_of_layer(layer) == method
    del layer.method
    assert method_of_layer(layer) == method
    assert layer.like(8).branch_names == layer.branch_names


# Bad input


@pytest.mark.parametrize(('make', 'message'), [
    (lambda: ExpandNet(expansion=0), 'expansion must be an integer from 1 to 64, got 0'),
    (lambda: ExpandNet(expansion=2.0), 'expansion must be an integer from 1 to 64, got 2.0'),
    (lambda: ExpandNet(expansion=10 ** 12), 'expansion must be an integer'),
    (lambda: RefConv(map_size=10 ** 12 + 1), 'map_size must be an odd integer'),
    (lambda: ExpandNet(expansion=True), 'expansion must be an integer'),
    (lambda: RefConv(map_size=2), 'map_size must be an odd integer from 1 to 31, got 2'),
    (lambda: RefConv(map_size='3'), "map_size must be an odd integer from 1 to 31, got '3'"),
    (lambda: MobileOne(copies=0), 'copies must be an integer from 1 to 64, got 0'),
    (lambda: MobileOne(copies=10 ** 9), 'copies must be an integer from 1 to 64'),
    (lambda: Dilated(branches='4/1'), "odd sizes with dilations, such as '5/1,3/2,3/3', .*; got '4/1'"),
    (lambda: Dilated(branches='3'), "got '3'"),
    (lambda: Dilated(branches=''), "got ''"),
    (lambda: Dilated(branches='3/0'), "got '3/0'"),
    (lambda: Dilated(branches='3/²'), "got '3/²'"),
    (lambda: Dilated(branches=('3/1',)), r"got \('3/1',\)"),
    (lambda: Dilated(branches=','.join(['3/1'] * 65)), 'branches must be odd sizes'),
    (lambda: DilatedConv2d(4, 4, 7, branches='3/4'), r'a branch of 3/4 does not fit into a kernel of \(7, 7\)'),
    (lambda: DilatedConv2d(4, 4, 3), r'need a kernel of at least 5x5, got \(3, 3\)'),
    (lambda: DilatedConv2d(4, 4, 7, branches='x'), "got 'x'"),
    (lambda: RepNas(branches='average'), "'origin' and any of 'average', .*, each once; got 'average'"),
    (lambda: RepNas(branches=('origin', 'prior')), r"got \('origin', 'prior'\)"),
    (lambda: RepNas(branches=3), 'each once; got 3'),
    (lambda: RepNasConv2d(4, 4, 3, branches=['origin', 'origin']), 'each once'),
    (lambda: RepNasConv2d(4, 4, 1), 'needs a kernel larger than 1x1'),
    (lambda: ExpandedConv2d(4, 4, 3, expansion=-1), 'expansion must be'),
    (lambda: RefConv2d(4, 4, 3, map_size=4), 'map_size must be'),
    (lambda: MobileOneConv2d(4, 6, 1, copies=1), 'no branch beside it'),
    (lambda: MobileOneConv2d(4, 4, 3, copies=None), 'copies must be'),
    (lambda: method_from_dict(dict(method='dilated', branches=['3/1'])), r"plain values, got branches=\['3/1'\]"),
    (lambda: method_from_dict(dict(method='doconv', depth=3)), r"doconv has the options \[\], got \['depth'\]"),
    *[(lambda cls=cls: cls(4, 4, 2), 'odd kernel size') for cls in (DOConv2d, ExpandedConv2d, RefConv2d)],
    *[(lambda cls=cls: cls(4, 4, 5, padding_mode='reflect'), "padding_mode 'zeros'")
      for cls in (DOConv2d, ExpandedConv2d, RefConv2d, DilatedConv2d, MobileOneConv2d)],
])
def test_bad_options_raise_one_clear_error(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_selection_that_does_not_fit_leaves_the_model_as_it_was():
    model = vgg(7, 8)
    before, state = tree(model), state_of(model)
    for method, message in (
            (Dilated(), r'cannot expand 0: dilated branches need a kernel of at least 5x5, got \(3, 3\)'),
            (Dilated(branches='7/1'), r'cannot expand 0: a branch of 7/1 does not fit'),
            (Orepa(), None)):
        if message:
            with pytest.raises(UserError, match=message):
                expand(model, method, select=['3', '0'], inplace=True)
    assert tree(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# With norms in the branches


@pytest.mark.parametrize(('method', 'size', 'groups', 'taken'), [
    (MobileOne(normed=True, copies=2), 3, 1, dict.fromkeys('03', timm_rep.NormedMobileOneConv2d)),
    (Dilated(normed=True), 7, 8, {'3': timm_rep.NormedDilatedConv2d}),
    (Dilated(normed=True, branches='3/2,1/1'), 9, 8, {'3': timm_rep.NormedDilatedConv2d}),
], ids=str)
def test_normed_forms_take_the_norm_in_and_give_it_back(method, size, groups, taken, tmp_path):
    stock = randomize_(vgg(size, groups)).double().eval()
    x = randn(4, 3, 16, 16)
    model = expand(stock, method)
    assert layer_types(model) == taken
    assert_near(model(x), stock(x), MODEL_RTOL[torch.float64])
    F.cross_entropy(model.train()(x), torch.arange(4)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    timm_rep.save(model, tmp_path / 'model.safetensors')
    again = timm_rep.load(tmp_path / 'model.safetensors', into=vgg(size, groups)).double().eval()
    assert_near(again(x), model.eval()(x), 1e-5)
    begin_time_step(model, torch.Generator().manual_seed(0))
    assert_near(fuse(model)(x), again(x), 1e-5)
    assert tree(fuse(model)) == tree(stock)
    for _, layer in rep_layers(model):
        del layer.method
        assert method_of_layer(layer).normed
        assert layer.like(8).branch_gradients() == {}


def test_normed_forms_need_a_batch_norm():
    assert method_from_dict(MobileOne(normed=True).to_dict()) == MobileOne(normed=True)
    with pytest.raises(UserError, match=r"'mobileone' needs a plain BatchNorm2d right behind the .*; 6 has none"):
        expand(vgg(), MobileOne(normed=True), select='6')
    for make in (lambda: MobileOne(normed=1), lambda: Dilated(normed='yes')):
        with pytest.raises(UserError, match='normed must be True or False, got'):
            make()
    with pytest.raises(UserError, match='copies must be'):
        timm_rep.NormedMobileOneConv2d(4, 4, 3, copies=0)
    with pytest.raises(UserError, match=r'need a kernel of at least 5x5, got \(3, 3\)'):
        timm_rep.NormedDilatedConv2d(4, 4, 3)


@pytest.mark.parametrize('method', timm_rep.methods.registered_methods())
def test_networks_go_to_channels_last(method):
    kernel_size = 7 if method == 'dilated' else 3
    net = nn.Sequential(nn.Conv2d(4, 4, kernel_size, groups=4, bias=False), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last)
    rep = timm_rep.expand(net.eval(), method, select='0').to(memory_format=torch.channels_last)
    x = randn(2, 4, 9, 9, dtype=torch.float32).to(memory_format=torch.channels_last)
    assert_near(rep(x), net(x), 1e-5)
