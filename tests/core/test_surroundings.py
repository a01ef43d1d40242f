"""What stands around a convolution when it is expanded: shared modules, norms of all kinds, RepVGG's other branches."""
import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from helpers import MODEL_RTOL, assert_near, randn, randomize_, tiny_resnet, tree
from timm.layers import (
    BatchNormAct2d,
    Conv2dSame,
    GroupNormAct,
    LayerNorm2d,
    LayerNormAct2d,
    StdConv2d,
    convert_splitbn_model,
    convert_sync_batchnorm,
    freeze_batch_norm_2d,
)
from timm.models.byobnet import RepVggBlock
from timm.utils import reparameterize_model

import timm_rep
from timm_rep import UserError, expand, expansion_of, fuse
from timm_rep.core.expand import expand_as_
from timm_rep.core.expansion import methods_from_list
from timm_rep.core.layers import AnnealedRepVggBlock
from timm_rep.core.layers.dbb import NormPad2d
from timm_rep.core.methods import as_method


def conv(inputs, outputs, **kwargs):
    return nn.Conv2d(inputs, outputs, 3, **dict(dict(padding=1, bias=False), **kwargs))


def test_a_shared_activation_lies_between_convolution_and_norm_at_both_places():
    relu = nn.ReLU()
    model = nn.Sequential(conv(3, 8), relu, nn.BatchNorm2d(8), conv(8, 8), relu, nn.BatchNorm2d(8))
    with pytest.raises(UserError, match='no convolution'):
        expand(model, 'dbb')


def test_a_shared_convolution_whose_norms_differ_is_expanded_at_both_places():
    shared = conv(3, 3)
    model = randomize_(nn.Sequential(shared, nn.BatchNorm2d(3), shared, nn.BatchNorm2d(3))).double().eval()
    rep = expand(model, 'orepa')
    assert rep[0] is rep[2]
    assert_near(rep(randn(2, 3, 8, 8)), model(randn(2, 3, 8, 8)), MODEL_RTOL[torch.float64])


def test_the_activation_of_a_norm_is_not_shared_with_the_copy():
    model = nn.Sequential(conv(3, 8), BatchNormAct2d(8, drop_layer=nn.Dropout)).eval()
    expand(model, 'dbb').train()
    assert not model[1].drop.training


@torch.no_grad()
def test_a_norm_with_parameters_in_its_activation():
    model = nn.Sequential(conv(3, 8), BatchNormAct2d(8, act_layer=nn.PReLU)).double()
    model = randomize_(model).eval()
    model[1].act.weight.fill_(0.7)
    x = randn(2, 3, 8, 8)
    rep = expand(model, 'dbb')
    fused = fuse(rep)
    assert_near(rep(x), model(x), MODEL_RTOL[torch.float64])
    assert_near(fused(x), model(x), MODEL_RTOL[torch.float64])
    assert fused.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize('pair', [
    lambda: (conv(3, 8, padding='same'), nn.BatchNorm2d(8)),
    lambda: (conv(3, 8), nn.BatchNorm2d(8, affine=False)),
    lambda: (conv(3, 8), nn.BatchNorm2d(8, track_running_stats=False)),
])
def test_the_default_policy_skips_what_a_layer_with_norms_cannot_be(pair):
    rep = expand(nn.Sequential(*pair(), conv(8, 8), nn.BatchNorm2d(8)), 'dbb')
    assert list(expansion_of(rep).methods) == ['2']


@pytest.mark.parametrize('name', ['stem.conv_1x1.conv', 'stem.attn.fc1'])
def test_other_parts_of_an_annealed_block_stay_plain(name):
    with torch.device('meta'):
        model = timm.create_model('repvgg_d2se')
    with pytest.raises(UserError, match=f'only the KxK convolution .*{name}'):
        expand(model, {name: 'orepa', '*': 'rep'})


def test_blocks_that_a_mapping_leaves_are_not_annealed():
    with torch.device('meta'):
        model = timm.create_model('repvgg_a0')
    rep = expand(model, {'stem.conv_kxk.conv': 'dbb', 'stages.3.*': 'rep', 'stages.0.*': 'orepa', '*': None})
    annealed = [name for name, module in rep.named_modules() if isinstance(module, AnnealedRepVggBlock)]
    assert annealed == ['stem', 'stages.3.0']


def test_weights_are_assigned_to_a_layer_on_the_meta_device():
    for cls, size in (
            (timm_rep.OrepaConv2d, 3), (timm_rep.OrepaStemConv2d, 7), (timm_rep.DiverseBranchConv2d, 3),
            (timm_rep.AsymmetricConv2d, 3), (timm_rep.RepConv2d, 3)):
        source = cls(4, 8, size, dtype=torch.float64).eval()
        layer = cls(4, 8, size, device='meta').eval()
        layer.load_state_dict(source.state_dict(), assign=True)
        assert torch.equal(layer.weight, source.weight)


NORMED = pytest.mark.parametrize('method', ['dbb', 'acb', 'rep'])


@torch.no_grad()
def assert_round_trip(stock, method, convert=lambda model: model):
    """Expand, shake all norms and scales, fuse: keys, classes, flags and dtypes of the stock model, outputs kept."""
    x = randn(2, 3, 8, 8)
    rep = expand(stock, method)
    assert_near(rep(x), stock(x), MODEL_RTOL[torch.float64])
    rep, stock = convert(shaken(rep)).eval(), convert(stock).eval()
    timm_rep.set_attach_rate(rep, 0.7)
    fused = fuse(rep)
    assert tree(fused) == tree(stock)
    stock.load_state_dict(fused.state_dict())
    for form in (fused, stock):
        assert_near(form(x), rep(x), MODEL_RTOL[torch.float64])
    return rep


@torch.no_grad()
def shaken(model):
    randomize_(model)  # knows plain batch norms only
    for seed, module in enumerate(model.modules()):
        if isinstance(module, nn.SyncBatchNorm):
            module.running_mean.copy_(randn(module.num_features, seed=seed))
            module.running_var.copy_(randn(module.num_features, seed=seed).abs() + 0.3)
            module.weight.copy_(randn(module.num_features, seed=seed + 1))
            module.bias.copy_(randn(module.num_features, seed=seed + 2))
    return model


def batch_norms(*acts):
    return [BatchNormAct2d(8) if act else nn.BatchNorm2d(8) for act in acts]


def two_pairs(*norms, bias=False):
    first, second = norms
    return nn.Sequential(conv(3, 8, bias=bias), first, conv(8, 8, bias=bias), second).double().eval()


@pytest.mark.parametrize('method', ['orepa', 'dbb', 'acb', 'rep'])
@pytest.mark.parametrize('before', [True, False])
def test_synchronized_norms_come_back_synchronized(method, before):
    stock = randomize_(two_pairs(*batch_norms(True, False)))
    if before:
        rep = assert_round_trip(shaken(convert_sync_batchnorm(stock)), method)
    else:
        rep = assert_round_trip(stock, method, convert_sync_batchnorm)
    assert len(expansion_of(rep).methods) == 2
    norms = [module for module in rep.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)


@pytest.mark.parametrize('norm', [
    torchvision.ops.FrozenBatchNorm2d(8), freeze_batch_norm_2d(BatchNormAct2d(8)), nn.GroupNorm(2, 8), LayerNorm2d(8),
    GroupNormAct(8, num_groups=2), LayerNormAct2d(8), nn.SyncBatchNorm(8), nn.InstanceNorm2d(8),
], ids=lambda norm: type(norm).__name__)
def test_a_norm_of_any_kind_stands_behind_a_linear_layer(norm):
    rep = assert_round_trip(nn.Sequential(conv(3, 8), norm).double().eval(), 'orepa')
    assert list(expansion_of(rep).methods) == ['0']


@NORMED
@pytest.mark.parametrize('norm', [torchvision.ops.FrozenBatchNorm2d(8), nn.GroupNorm(2, 8)])
def test_a_norm_that_no_layer_can_take_in_is_named(method, norm):
    model = nn.Sequential(conv(3, 8), norm)
    with pytest.raises(UserError, match=f'need a BatchNorm2d, here are {type(norm).__name__}'):
        expand(model, method)
    with pytest.raises(UserError, match=f'right behind the convolution; 0 has a {type(norm).__name__}'):
        expand(model, method, select='0')


@NORMED
def test_norms_split_over_the_batch_are_refused_when_fusing(method):
    rep = convert_splitbn_model(expand(two_pairs(*batch_norms(False, False)), method)).eval()
    with pytest.raises(UserError, match='batch norms were replaced by SplitBatchNorm2d'):
        fuse(rep)


@NORMED
def test_norms_with_parts_are_refused_when_fusing(method):
    rep = expand(two_pairs(*batch_norms(False, False)), method).eval()
    for _, layer in timm_rep.rep_layers(rep):
        layer.norm_kxk.add_module('activation_post_process', nn.BatchNorm2d(1))  # as prepare_qat does
    with pytest.raises(UserError, match=r'or given parts \(prepare_qat\)'):
        fuse(rep)


@pytest.mark.parametrize('method', ['orepa', 'dbb', 'acb', 'rep'])
@torch.no_grad()
def test_a_convolution_with_bias_in_front_of_a_norm(method):
    stock = randomize_(two_pairs(*batch_norms(True, False), bias=True))
    rep = assert_round_trip(stock, method)
    assert len(expansion_of(rep).methods) == 2
    again = expand_as_(two_pairs(*batch_norms(True, False), bias=True), expansion_of(rep).methods)
    again.load_state_dict(rep.state_dict())
    assert fuse(again).state_dict().keys() == stock.state_dict().keys()


@NORMED
@pytest.mark.parametrize('trained', ['weight', 'bias', '0.weight', '1.'])
def test_flags_of_a_convolution_with_bias_come_back(method, trained):
    stock = two_pairs(*batch_norms(True, False), bias=True)
    flags = {name: trained in name for name, _ in stock.named_parameters()}
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(flags[name])
    fused = fuse(expand(stock, method))
    assert {name: parameter.requires_grad for name, parameter in fused.named_parameters()} == flags


@NORMED
def test_a_norm_shared_by_two_convolutions_is_left_alone(method):
    shared = nn.BatchNorm2d(8)
    model = nn.Sequential(conv(3, 8), shared, conv(8, 8), shared, conv(8, 8), nn.BatchNorm2d(8))
    rep = expand(model, method)
    assert list(expansion_of(rep).methods) == ['4']
    assert rep[1] is rep[3]
    with pytest.raises(UserError, match='that of 2 cannot go with it: one of the two is shared'):
        expand(model, method, select='2')
    assert list(expansion_of(expand(model, 'orepa')).methods) == ['0', '2', '4']


@pytest.mark.parametrize('method', ['orepa', 'dbb', 'acb', 'rep'])
@torch.no_grad()
def test_a_half_precision_convolution_in_front_of_a_float32_norm(method):
    stock = randomize_(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), conv(8, 8), BatchNormAct2d(8))).eval()
    stock[0].half()
    stock[2].half()
    rep = expand(stock, method)
    fused = fuse(rep)
    assert {name: value.dtype for name, value in fused.state_dict().items()} == {
        name: value.dtype for name, value in stock.state_dict().items()}
    x = randn(2, 3, 8, 8, dtype=torch.float16)
    for form in (rep, fused):
        assert_near(form(x), stock(x), 1e-2)


@pytest.mark.parametrize('convert', [convert_sync_batchnorm, freeze_batch_norm_2d])
@torch.no_grad()
def test_annealed_blocks_with_norms_that_timms_block_does_not_fold(convert):
    rep = convert(randomize_(expand(nn.Sequential(RepVggBlock(4, 4)), 'rep'))).double().eval()
    timm_rep.set_attach_rate(rep, 0.3)
    x = randn(2, 4, 8, 8)
    assert_near(reparameterize_model(rep)(x), rep(x), MODEL_RTOL[torch.float64])


def filled_by_hand(model, state):
    """What accelerate's ``load_checkpoint_in_model`` does: it sets tensor by tensor, and knows no hook of a module."""
    for name, tensor in state.items():
        module = model.get_submodule(name.rpartition('.')[0])
        key = name.rpartition('.')[2]
        if key in module._parameters:
            module._parameters[key] = nn.Parameter(tensor)
        else:
            module._buffers[key] = tensor
    return model


class EmptyParameters:
    """accelerate's ``init_empty_weights``: parameters go to the meta device when they are registered, buffers stay."""

    def __enter__(self):
        self.register = register = nn.Module.register_parameter

        def register_empty(module, name, parameter):
            register(module, name, None if parameter is None else nn.Parameter(parameter.to('meta')))

        nn.Module.register_parameter = register_empty

    def __exit__(self, *error):
        nn.Module.register_parameter = self.register


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(('empty', 'moved'), [
    (EmptyParameters, False), (EmptyParameters, True), (lambda: torch.device('meta'), True)])
@pytest.mark.parametrize('layers', ['orepa', 'dbb', 'acb', 'rep'])
@torch.no_grad()
def test_weights_are_set_one_by_one_in_a_model_on_the_meta_device(layers, empty, moved, dtype):
    def build():
        classes = as_method(layers).layers
        return nn.Sequential(classes[0](3, 8, 3, padding=1), *(classes[2:] and [classes[2](8, 8, 5)]))

    source = randomize_(build()).eval().to(dtype)
    with empty():
        model = build().eval()
    filled_by_hand(model, source.state_dict())
    if moved:
        model.to('cpu')
    x = randn(2, 3, 8, 8, dtype=dtype)
    assert torch.equal(model(x), source(x))
    assert torch.equal(fuse(model)(x), fuse(source)(x))


@pytest.mark.parametrize(('entry', 'message'), [
    (dict(method='orepa', negative_slope='x', layers=['0']), "finite number or None, got 'x'"),
    (dict(method='orepa', branch_1x1=[1], layers=['0']), r'plain values, got branch_1x1=\[1\]'),
    (dict(method='orepa', layers=['stem']), "no plain convolution 'stem'"),
])
def test_an_expansion_of_a_strange_file_is_refused(entry, message):
    with torch.device('meta'):
        model = timm.create_model('repvgg_a0')
    with pytest.raises(UserError, match=message):
        expand_as_(model, methods_from_list([entry]))


def test_options_of_a_layer_made_by_hand_are_known():
    model = nn.Sequential(timm_rep.OrepaConv2d(4, 8, 3, branch_1x1=False, bias=False), nn.BatchNorm2d(8))
    again = expand_as_(nn.Sequential(conv(4, 8, padding=0), nn.BatchNorm2d(8)), expansion_of(model).methods)
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize('kind', ['orepa', 'dbb', 'acb', 'rep'])
@torch.no_grad()
def test_models_whose_weights_accelerate_offloads(kind):
    accelerate = pytest.importorskip('accelerate', reason='accelerate is not installed')
    model = expand(tiny_resnet().eval(), kind)
    x = randn(1, 3, 32, 32, dtype=torch.float32)
    expected = model(x)
    classes = sorted({type(layer).__name__ for _, layer in timm_rep.rep_layers(model)})
    accelerate.cpu_offload(model, execution_device=torch.device('cpu'), preload_module_classes=classes)
    assert_near(model(x), expected, 1e-6)
    with pytest.raises(UserError, match='offloaded by accelerate; fuse the model first'):
        fuse(model)


def test_weights_that_are_elsewhere_are_not_fused():
    model = expand(tiny_resnet(), 'orepa').to('meta')
    assert all(parameter.is_meta for parameter in fuse(model).parameters())
    model.layer1[0].conv1._hf_hook = object()  # accelerate's mark
    with pytest.raises(UserError, match=r'weights of layer1\.0\.conv1 are offloaded by accelerate'):
        fuse(model)


@pytest.mark.parametrize('method', ['dbb', 'acb', 'rep'])
def test_a_place_whose_layer_was_replaced_has_no_norm_and_is_not_fused(method):
    model = expand(tiny_resnet().eval(), method)
    part = nn.Sequential(nn.Sequential(model.layer1[0].conv1), nn.ReLU(), model.layer1[0].bn1)
    with pytest.raises(UserError, match='2 holds the place of a batch norm that went into a rep layer'):
        fuse(part)
    model.layer1[0].conv2 = conv(8, 8)
    before = tree(model)
    with pytest.raises(UserError, match=r'layer1\.0\.bn2 holds the place of a batch norm'):
        fuse(model, inplace=True)
    assert tree(model) == before
    model.layer1[0].bn2 = nn.BatchNorm2d(8).eval()
    assert fuse(model).state_dict().keys() == tiny_resnet().state_dict().keys()


@pytest.mark.parametrize(('method', 'make'), [
    ('dbb', nn.Conv2d), ('acb', nn.Conv2d), ('rep', nn.Conv2d), ('orepa', Conv2dSame), ('orepa', StdConv2d)])
def test_the_geometry_of_what_has_it_in_its_parts_cannot_be_changed(method, make):
    stock = nn.Sequential(make(4, 4, 3, 2, padding=1, bias=False), nn.BatchNorm2d(4)).double().eval()
    model = expand(stock, method)
    model[0].stride = 2  # as it is
    assert model[0].stride == (2, 2)
    for name, value in [('stride', (1, 1)), ('padding', 3), ('dilation', (2, 2))]:
        with pytest.raises(UserError, match=f'{name} of a .* cannot be changed, branches were made with'):
            setattr(model[0], name, value)
    if make is StdConv2d:
        with pytest.raises(UserError, match='eps of a StandardizedConv2d cannot be changed'):
            model[0].eps = 1e-2
    if make is nn.Conv2d:
        with pytest.raises(UserError, match=r'bias of a \w+ cannot be changed'):
            model[0].bias = nn.Parameter(torch.ones(4))
    assert_near(fuse(model)(randn(2, 4, 8, 8)), stock(randn(2, 4, 8, 8)), 1e-5)


def test_the_geometry_of_a_linear_layer_is_its_own():
    stock = nn.Sequential(conv(4, 4, stride=2), nn.BatchNorm2d(4)).double().eval()
    model = expand(stock, 'orepa')
    x = randn(2, 4, 8, 8)
    for form in (stock, model):
        form[0].stride, form[0].dilation, form[0].padding = (1, 1), (2, 2), (2, 2)
    assert_near(model(x), stock(x), 1e-5)
    assert_near(fuse(model)(x), stock(x), 1e-5)
    with pytest.raises(UserError, match="a OrepaConv2d supports padding_mode 'zeros', got 'circular'"):
        model[0].padding_mode = 'circular'


def test_a_network_with_lazy_modules_is_run_first():
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(UserError, match='Sequential has lazy modules, whose shapes are not known yet: run it once'):
        expand(model)
    model(torch.randn(2, 3, 8, 8))
    assert sorted(expansion_of(expand(model)).methods) == ['0', '2']


@pytest.mark.parametrize('method', ['dbb', 'acb', 'rep'])
def test_gradients_of_each_image_with_norms_that_keep_no_statistics(method):
    """torch's own way to have them of a network with batch norms: their functions of each image alone."""
    stock = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4)).double()
    model = torch.func.replace_all_batch_norm_modules_(expand(stock, method).train())
    parameters = dict(model.named_parameters())
    x = randn(3, 3, 8, 8)

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).exp().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for image, part in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, part), list(parameters.values()))
        assert_near(
            torch.cat([gradients[image].flatten() for gradients in found.values()]),
            torch.cat([gradient.flatten() for gradient in expected]), 1e-9)


def test_the_border_of_a_norm_that_keeps_no_statistics_is_its_image_of_zero():
    padded = NormPad2d(2, (1, 1)).double()
    padded.norm.weight.data.copy_(torch.tensor([0.5, 2.0]))
    x = randn(3, 2, 5, 5)
    expected = padded(x)
    torch.func.replace_all_batch_norm_modules_(padded)
    found = padded(x)
    assert_near(found[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], 1e-12)
    n = x.numel() // 2
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3)) * (n - 1) / n
    border = padded.norm.bias - mean * padded.norm.weight / torch.sqrt(var + padded.norm.eps)
    assert_near(found[0, :, 0, 0], border, 1e-12)


def test_a_sharded_network_is_not_expanded():
    model = tiny_resnet()
    model.fc.weight.full_tensor = None  # the mark of torch's DTensor
    with pytest.raises(UserError, match=r'spread over processes \(fully_shard\)'):
        expand(model)
