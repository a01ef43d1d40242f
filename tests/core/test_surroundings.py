"""What stands around a convolution when it is expanded: shared modules, norms of all kinds, RepVGG's other branches."""
import pytest
import timm
import torch
import torch.nn as nn
from helpers import MODEL_RTOL, assert_near, randn, randomize_
from timm.layers import BatchNormAct2d

import timm_rep
from timm_rep import UserError, expand, expansion_of, fuse
from timm_rep.core.expand import expand_as_
from timm_rep.core.expansion import methods_from_list
from timm_rep.core.layers import AnnealedRepVggBlock
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
