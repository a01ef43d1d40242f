"""Checkpoints in the authors' layouts give the authors' outputs; what is not one of the model is refused."""
import gzip
import json
import pickle
import re
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
from click.testing import CliRunner
from helpers import DEPLOY_RTOL, MODEL_RTOL, assert_near, assert_same_state, randn, randomize_, state_of
from timm.models import ByoBlockCfg, ByoModelCfg, EfficientNet, ResNet
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.resnet import BasicBlock, Bottleneck

import timm_rep
from timm_rep import fuse, load_official_checkpoint, rep_layers, set_attach_rate
from timm_rep.cli.main import main
from timm_rep.core.expand import expand_fresh_
from timm_rep.core.walk import annealed_modules
from timm_rep.models.stock import build_repvgg
from timm_rep.official import load as official
from timm_rep.official.networks import fill_from_official_

GOLDEN = Path(__file__).parents[1] / 'golden'
NAME = 'orepa_repvgg_a0_cifar'


def tiny_resnet(block, widths=(4, 8), small_images=False, **kwargs):
    """timm's ResNet with one or two narrow stages and a narrow stem."""
    model = ResNet(block, (1, 1, 1, 1), num_classes=5, **kwargs)
    geometry = dict(kernel_size=3, padding=1) if small_images else dict(kernel_size=7, stride=2, padding=3)
    model.conv1, model.bn1 = nn.Conv2d(3, widths[0], bias=False, **geometry), nn.BatchNorm2d(widths[0])
    if small_images:
        model.maxpool = nn.Identity()
    options = {key: kwargs[key] for key in ('cardinality', 'base_width') if key in kwargs}
    in_chans = widths[0]
    for stage in range(4):
        blocks = []
        depth = 2 if block is Bottleneck and not options else 1
        for position in range(depth if stage < len(widths) else 0):
            width, stride = widths[stage], 2 if stage and not position else 1
            out_chans = width * block.expansion
            downsample = None
            if stride != 1 or in_chans != out_chans:
                downsample = nn.Sequential(
                    nn.Conv2d(in_chans, out_chans, 1, stride, bias=False), nn.BatchNorm2d(out_chans))
            blocks.append(block(in_chans, width, stride, downsample, **options))
            in_chans = out_chans
        setattr(model, f'layer{stage + 1}', nn.Sequential(*blocks))
    model.fc = nn.Linear(in_chans, model.num_classes)
    return model


def tiny_repvgg(width=8, groups=0, small_images=False, **kwargs):
    blocks = [ByoBlockCfg(type='rep', d=2, c=width, s=2, gs=groups), ByoBlockCfg(type='rep', d=1, c=width, s=2, gs=0)]
    if small_images:
        blocks[0] = ByoBlockCfg(type='rep', d=2, c=width, s=1, gs=0)
    cfg = ByoModelCfg(blocks=tuple(blocks), stem_type='rep', stem_chs=width, **kwargs)
    return build_repvgg(cfg, small_images=small_images, num_classes=5)


def tiny_mobilenet(act_layer=nn.ReLU):
    blocks = decode_arch_def([['dsa_r1_k3_s1_c8'], ['dsa_r1_k3_s2_c16']])
    return EfficientNet(blocks, num_classes=5, num_features=0, stem_size=8, act_layer=act_layer)


SE = dict(attn_layer='se', attn_kwargs=dict(rd_ratio=0.0625, rd_divisor=1))
# How to build the golden networks in stock form, and the rep layer that they are trained with here.
CASES = dict(
    orepa_basic=(lambda: tiny_resnet(BasicBlock), 'orepa'),
    orepa_bottleneck=(lambda: tiny_resnet(Bottleneck, widths=(4,)), 'orepa'),
    orepa_grouped=(lambda: tiny_resnet(Bottleneck, widths=(4,), cardinality=8, base_width=32), 'orepa'),
    orepa_repvgg=(tiny_repvgg, 'orepa'),
    dbb_basic=(lambda: tiny_resnet(BasicBlock), 'dbb'),
    repvgg=(lambda: tiny_repvgg(16, groups=4, **SE), None),
    dbb_mobilenet=(tiny_mobilenet, 'dbb'),
    repan_repvgg=(lambda: tiny_repvgg(small_images=True), 'rep'),
    repan_dbb=(lambda: tiny_resnet(BasicBlock, small_images=True), 'dbb'),
    repan_acb=(lambda: tiny_resnet(BasicBlock, small_images=True), 'acb'),
    repan_rep=(lambda: tiny_resnet(BasicBlock, small_images=True), 'rep'),
    repan_mobilenet_rep=(tiny_mobilenet, 'rep'),
)
FOLDED = ['orepa_basic', 'orepa_bottleneck', 'orepa_repvgg', 'dbb_basic', 'dbb_mobilenet', 'repvgg', 'repan_repvgg']
ANNEALED = ['repan_repvgg', 'repan_dbb', 'repan_acb', 'repan_rep', 'repan_mobilenet_rep']
# What may be as it was drawn: side branches of a layer that was restored, kernels in front of a gain of zero.
DRAWN = dict(
    repan_dbb=r'conv1\.',
    repan_acb=r'conv1\.',
    repan_rep=r'conv1\.',
    repan_mobilenet_rep=r'blocks\..*conv_dw\.conv_1x1\.weight$',
    folded_repvgg=r'.*\.conv_1x1\.conv\.weight$',
)


def golden(name):
    """Input, expected outputs and state dicts in float64; dicts keep their constants as they are."""
    tensors = safetensors.torch.load(gzip.decompress((GOLDEN / f'{name}.safetensors.gz').read_bytes()))
    tensors = {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}

    def part(prefix):
        return {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}

    return tensors['input'], tensors, part('weights.'), part('folded.')


def build(name, form='training', layer=None):
    stock, own_layer = CASES[name]
    layer = layer or own_layer
    model = stock()
    return (expand_fresh_(model, layer) if layer and form == 'training' else model).eval()


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('name', CASES)
@torch.no_grad()
def test_training_form_has_the_authors_outputs(name, dtype):
    x, expected, weights, _ = golden(name)
    model = build(name).to(dtype)
    fill_from_official_(model, weights)
    assert any(annealed_modules(model)) == (CASES[name][1] is not None)
    assert_near(model(x.to(dtype)), expected['output'].to(dtype), MODEL_RTOL[dtype])
    assert_near(fuse(model)(x.to(dtype)), expected['output'].to(dtype), MODEL_RTOL[dtype])


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('name', ANNEALED)
@torch.no_grad()
def test_attach_rate_is_the_authors(name, dtype):
    x, expected, weights, _ = golden(name)
    outputs = expected['output_at_0.3'].to(dtype)
    model = build(name).to(dtype)
    set_attach_rate(model, 0.3)
    fill_from_official_(model, weights)
    assert_near(model(x.to(dtype)), outputs, MODEL_RTOL[dtype])
    assert_near(fuse(model)(x.to(dtype)), outputs, MODEL_RTOL[dtype])
    set_attach_rate(model, 1.0)
    with pytest.raises(AssertionError, match='largest difference'):
        assert_near(model(x.to(dtype)), outputs, 1e-2)


def swapped(weights, one, other):
    """The weights with two parts in each other's place."""
    return {key.replace(one, '?').replace(other, one).replace('?', other): value for key, value in weights.items()}


@pytest.mark.parametrize(('name', 'change'), [
    ('repan_acb', lambda w: swapped(w, 'hor_bn', 'ver_bn')),
    ('repan_rep', lambda w: swapped(w, 'dbb_origin.bn', 'dbb_1x1.bn')),
    ('dbb_mobilenet', lambda w: swapped(w, 'dbb_avg.avgbn', 'dbb_1x1_kxk.bn2')),
    ('repan_mobilenet_rep', lambda w: swapped(w, 'stem.0.depthwise.dbb_origin.bn', 'stem.1.depthwise.dbb_origin.bn')),
])
@torch.no_grad()
def test_another_mapping_is_not_the_authors(name, change):
    x, expected, weights, _ = golden(name)
    model = build(name).double()
    fill_from_official_(model, change(weights))
    with pytest.raises(AssertionError, match='largest difference'):
        assert_near(model(x), expected['output'], 1e-2)


@torch.no_grad()
def test_identity_of_a_rep_layer_adds_nothing():
    x, expected, weights, _ = golden('repan_rep')
    model = build('repan_rep').double()
    fill_from_official_(model, weights)
    norms = [layer.norm_identity for _, layer in rep_layers(model) if layer.norm_identity is not None]
    assert len(norms) == 3
    for norm in norms:
        norm.weight.fill_(1.0)
    with pytest.raises(AssertionError, match='largest difference'):
        assert_near(model(x), expected['output'], 1e-2)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('name', FOLDED)
@torch.no_grad()
def test_deploy_form_has_the_authors_outputs(name, dtype):
    x, expected, _, folded = golden(name)
    model = build(name, 'stock').to(dtype)
    fill_from_official_(model, folded)
    assert_near(model(x.to(dtype)), expected['folded_output'].to(dtype), DEPLOY_RTOL[dtype])
    again = build(name, 'stock').to(dtype)
    fill_from_official_(again, folded)
    drawn = DRAWN['folded_repvgg'] if 'repvgg' in name else None
    assert_same_state(filled(again, drawn), filled(model, drawn))  # nothing else is left as it was drawn


def filled(model, drawn):
    """What is not meant to be left as it was drawn."""
    return {key: value for key, value in state_of(model).items() if drawn is None or not re.match(drawn, key)}


@pytest.mark.parametrize('name', CASES)
def test_nothing_is_left_as_it_was_drawn(name):
    states = []
    for _ in range(2):
        model = build(name).double()
        fill_from_official_(model, golden(name)[2])
        states.append(filled(model, DRAWN.get(name)))
    assert_same_state(*states)


@pytest.mark.parametrize('name', ['repvgg', 'repan_repvgg'])
@torch.no_grad()
def test_plain_branches_are_restored_into_rep_layers(name):
    x, expected, weights, _ = golden(name)
    model = build(name, layer='orepa').double()
    fill_from_official_(model, weights)
    assert list(rep_layers(model))
    assert_near(model(x), expected['output'], MODEL_RTOL[torch.float64])


@torch.no_grad()
def test_a_stem_without_the_mirrored_kernels_is_not_the_authors():
    """The comparison can fail: the same kernels in a true stack are another network."""
    x, expected, weights, _ = golden('orepa_basic')
    model = build('orepa_basic').double()
    fill_from_official_(model, weights)
    for layer in model.conv1.stack[1:]:
        views = layer.branch_views()
        for kernel in (views['origin'], views['sequential'], layer.dw_conv):
            kernel.copy_(kernel.flip([-2, -1]))
    with pytest.raises(AssertionError, match='largest difference'):
        assert_near(model(x), expected['output'], 1e-2)


def without(weights, *names):
    assert set(names) <= set(weights)
    return {key: value for key, value in weights.items() if key not in names}


@pytest.mark.parametrize(('name', 'change', 'message'), [
    ('orepa_basic', lambda w: without(w, 'stage1.0.conv1.vector'), r'missing: stage1\.0\.conv1\.vector$'),
    ('orepa_basic', lambda w: without(w, 'stage0.conv1.weight1.weight_orepa_gconv_dw'), r'missing: stage0\.conv1\.wei'),
    ('orepa_basic', lambda w: without(w, 'stage2.0.conv2.bn.running_var'), r'missing: stage2\.0\.conv2\.bn\.running_v'),
    ('orepa_basic', lambda w: {**w, 'stage5.conv.weight': w['linear.bias']}, r'not expected: stage5\.conv\.weight$'),
    ('orepa_basic', lambda w: {**w, 'stage1.0.conv1.conv.bias': w['linear.bias']}, r'not expected: stage1'),
    ('orepa_basic', lambda w: without(w, 'linear.bias'), r'missing: linear\.bias$'),
    ('orepa_basic', lambda w: {**w, 'linear.weight': w['linear.weight'][:, 1:]}, r'linear\.weight has shape \(5, 7\)'),
    ('orepa_basic', lambda w: {**w, 'stage1.0.conv1.id_tensor': w['stage1.0.conv1.id_tensor'] * 2}, 'the constant '),
    ('orepa_basic', lambda w: {k: v * 1.01 if 'prior' in k else v for k, v in w.items()}, 'constant .*orepa_prior is'),
    ('orepa_bottleneck', lambda w: without(w, 'stage1.0.conv1.weight_or1x1_origin'), r'missing: .*or1x1_origin$'),
    ('orepa_repvgg', lambda w: without(w, 'stage1.1.rbr_identity.bias'), r'missing: stage1\.1\.rbr_identity\.bias$'),
    ('dbb_basic', lambda w: without(w, 'stage1.0.conv1.dbb_avg.bn.bn.bias'), r'missing: stage1\.0\.conv1\.dbb_avg\.bn'),
    ('repvgg', lambda w: without(w, 'stage0.se.down.bias'), r'missing: stage0\.se\.down\.bias$'),
    ('repan_repvgg', lambda w: without(w, 'stages.1.sequential.1.bn_0.weight'), r'missing: stages\.1.*0\.weight$'),
    ('repan_dbb', lambda w: without(w, 'stage0.1.weight'), r'missing: stage0\.1\.weight$'),
    ('repan_acb', lambda w: without(w, 'stage1.0.conv1.hor_bn.bias'), r'missing: stage1\.0\.conv1\.hor_bn\.bias$'),
    ('repan_rep', lambda w: {k: v for k, v in w.items() if '2.0.conv2.dbb_1x1' not in k}, r'2\.0\.conv2\.dbb_1x1\.bn'),
    ('repan_mobilenet_rep', lambda w: {**w, 'stem.2.conv.weight': w['linear.bias']}, r'not expected: stem\.2\.conv'),
])
def test_what_is_missing_or_left_over_is_named(name, change, message):
    with pytest.raises(ValueError, match=rf'does not hold official weights of \w+Net; .*{message}'):
        fill_from_official_(build(name).double(), change(golden(name)[2]))


@pytest.mark.parametrize(('name', 'model', 'message'), [
    ('orepa_basic', lambda: build('dbb_basic'), r'stage0\.conv1 is an OREPA stem block, .* a plain one'),
    ('orepa_basic', lambda: build('orepa_basic', 'stock'), r'stage0\.conv1 is an OREPA stem block, .* a plain one'),
    ('orepa_basic', lambda: build('orepa_bottleneck'), r'stage1\.0\.conv1 is an OREPA block, .* has a Rep-1x1 one'),
    ('orepa_basic', lambda: expand_fresh_(tiny_resnet(BasicBlock, (4, 8, 8)), 'orepa'), r'missing: stage3\.0'),
    ('orepa_basic', lambda: expand_fresh_(tiny_resnet(BasicBlock, (4,)), 'orepa'), r'not expected: stage2\.0'),
    ('orepa_basic', lambda: expand_fresh_(tiny_resnet(BasicBlock, (4, 12)), 'orepa'), r'stage2.* has shape .* takes'),
    ('orepa_basic', lambda: build('orepa_repvgg'), r'missing: .*; not expected: '),
    ('orepa_repvgg', lambda: build('orepa_basic'), r'missing: .*; not expected: '),
    ('orepa_repvgg', lambda: build('orepa_repvgg', 'stock'), r'stage0\.rbr_dense is an OREPA block, .* a plain one'),
    ('repvgg', lambda: build('orepa_repvgg'), r'not expected: .*se\.'),
    ('repan_acb', lambda: build('repan_rep'), r'stage1\.0\.conv1 is an ACB block, where the model has a REP one'),
    ('repan_rep', lambda: build('repan_dbb'), r'stage1\.0\.conv1 is a REP block, where the model has a DBB one'),
    ('repan_mobilenet_rep', lambda: build('dbb_mobilenet'), r'conv1 is a REP block, where the model has a DBB one'),
    ('repan_mobilenet_rep', lambda: build('repan_rep'), r'missing: .*; not expected: '),
    ('dbb_basic', lambda: build('orepa_basic'), r'stage1\.0\.conv1 is a DBB block, where the model has an OREPA one'),
])
def test_another_architecture_is_refused(name, model, message):
    with pytest.raises(ValueError, match=message):
        fill_from_official_(model().double(), golden(name)[2])


def test_only_these_networks():
    known = 'official checkpoints are of ResNets, RepVGGs and MobileNet-V1'
    with pytest.raises(ValueError, match=rf'{known}; .* is a Linear'):
        fill_from_official_(nn.Linear(2, 2), golden('repvgg')[2])
    with pytest.raises(ValueError, match='test_byobnet is a ByobNet'):
        fill_from_official_(timm.create_model('test_byobnet'), golden('repvgg')[2])
    with pytest.raises(ValueError, match='test_efficientnet is a EfficientNet'):
        fill_from_official_(timm.create_model('test_efficientnet'), golden('dbb_mobilenet')[2])
    model = build('dbb_basic')
    model.reset_classifier(0)
    with pytest.raises(ValueError, match='ResNet was built without'):
        fill_from_official_(model, golden('dbb_basic')[2])


def test_mobilenet_must_have_the_authors_activation():
    """timm's own MobileNet differs from the authors' above 6 only, which a comparison may miss."""
    model = expand_fresh_(tiny_mobilenet(nn.ReLU6), 'dbb')
    with pytest.raises(ValueError, match=r"has ReLU, EfficientNet has ReLU6; build it with act_layer='relu'"):
        fill_from_official_(model, golden('dbb_mobilenet')[2])


def test_unused_row_of_scales_is_ignored():
    """The authors' RepVGG blocks with an identity branch save a row that nothing has set: it may hold anything."""
    weights = golden('orepa_repvgg')[2]
    scale = weights['stage1.1.rbr_dense.vector']
    assert scale.shape == (6, 8)
    scale[5] = float('nan')
    model = build('orepa_repvgg').double()
    fill_from_official_(model, weights)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_parts_that_the_authors_have_not_are_refused():
    model = build('orepa_basic', 'stock')
    model.layer1[0].extra = nn.Conv2d(2, 2, 1)
    with pytest.raises(ValueError, match=r'nothing for layer1\.0\.extra\.bias, layer1\.0\.extra\.weight'):
        fill_from_official_(model.double(), golden('orepa_basic')[3])


# The whole way, from a file.

PARTS = {'conv_kxk': 'rbr_dense', 'conv_1x1': 'rbr_1x1', 'identity': 'rbr_identity', 'reparam_conv': 'rbr_reparam'}


def official_names(state_dict):
    """RepVGG's own names of the tensors of timm's RepVGG."""
    result = {}
    for key, value in state_dict.items():
        key = key.replace('head.fc.', 'linear.').replace('stem.', 'stage0.')
        if key.startswith('stages.'):
            _, stage, rest = key.split('.', 2)
            key = f'stage{int(stage) + 1}.{rest}'
        result['.'.join(PARTS.get(part, part) for part in key.split('.'))] = value
    return result


@pytest.fixture(scope='module')
def stock():
    return randomize_(timm.create_model(NAME, inference_mode=True, num_classes=3)).eval()


@pytest.fixture(scope='module')
def training_file(stock, tmp_path_factory):
    path = tmp_path_factory.mktemp('official') / 'RepVGG-train.pth.tar'
    weights = {f'module.{key}': value for key, value in official_names(stock.state_dict()).items()}
    torch.save(dict(epoch=119, arch='RepVGG-A0', state_dict=weights, best_acc1=torch.tensor(70.0)), path)
    return path


@torch.no_grad()
def test_batches_are_counted(stock, tmp_path):
    weights = official_names(stock.state_dict())
    counts = [key for key in weights if key.endswith('num_batches_tracked')]
    weights.update({key: torch.tensor(number) for number, key in enumerate(counts, start=3)})
    loaded = official_names(load_official_checkpoint(weights, NAME, inference_mode=True).state_dict())
    assert {key: loaded[key].item() for key in counts} == {key: weights[key].item() for key in counts}
    old = load_official_checkpoint(without(weights, *counts), NAME, inference_mode=True).state_dict()
    assert {value.item() for key, value in old.items() if key.endswith('num_batches_tracked')} == {0}
    for wrong in (torch.tensor(float('inf')), torch.tensor(float('nan')), torch.tensor(-3), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match=rf'{counts[0]} is not a number of batches'):
            load_official_checkpoint({**weights, counts[0]: wrong}, NAME, inference_mode=True)


@pytest.fixture(scope='module')
def deploy_file(stock, tmp_path_factory):
    path = tmp_path_factory.mktemp('official') / 'RepVGG-deploy.pth'
    torch.save(official_names(timm.utils.reparameterize_model(stock).state_dict()), path)
    return path


@torch.no_grad()
def assert_same_outputs(model, stock, rtol=MODEL_RTOL[torch.float32]):
    x = randn(2, 3, 32, 32, dtype=torch.float32)
    assert_near(model(x), stock(x), rtol)


def test_file_in_training_form(stock, training_file):
    model = load_official_checkpoint(training_file, NAME)
    assert not model.training
    assert model.num_classes == 3
    assert list(rep_layers(model))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_same_outputs(model, stock)


def test_file_in_deploy_form(stock, deploy_file):
    model = load_official_checkpoint(deploy_file, NAME)
    assert not list(rep_layers(model))
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert_same_outputs(model, stock, DEPLOY_RTOL[torch.float32])


def test_state_dict_and_wrappers(stock, training_file, tmp_path):
    weights = official_names(stock.state_dict())
    assert_same_outputs(load_official_checkpoint(weights, NAME), stock)
    double = {key: value.double() if value.is_floating_point() else value for key, value in weights.items()}
    assert next(load_official_checkpoint(double, NAME).parameters()).dtype == torch.float64
    wrapped = tmp_path / 'model_epoch_0100.pyth'
    torch.save(dict(epoch=99, model_state=weights), wrapped)
    assert_same_outputs(load_official_checkpoint(wrapped, NAME), stock)
    alone = tmp_path / 'weights.safetensors'
    safetensors.torch.save_file(weights, alone)
    assert_same_outputs(load_official_checkpoint(alone, NAME), stock)


@torch.no_grad()
def test_attach_rate_of_a_restored_layer(stock, training_file):
    model = load_official_checkpoint(training_file, NAME, attach_rate=0.25)
    assert {layer.attach_rate.item() for _, layer in rep_layers(model)} == {0.25}
    assert_same_outputs(model, stock)
    with pytest.raises(ValueError, match='attach rate'):
        load_official_checkpoint(training_file, NAME, attach_rate=1.5)


def test_two_imports_are_the_same(training_file, deploy_file):
    for file in (training_file, deploy_file):
        seed = torch.get_rng_state()
        first = state_of(load_official_checkpoint(file, NAME))
        assert torch.equal(torch.get_rng_state(), seed)
        torch.rand(1)
        assert_same_state(state_of(load_official_checkpoint(file, NAME)), first)


@pytest.mark.parametrize('layer', ['rep', 'acb', 'orepa'])
@torch.no_grad()
def test_annealed_repvgg(layer, stock, training_file, deploy_file):
    name = NAME.replace('orepa', 'repan')
    model = load_official_checkpoint(training_file, name, rep_layer=layer)
    assert any(annealed_modules(model))
    assert_same_outputs(model, stock)
    model = load_official_checkpoint(deploy_file, name, rep_layer=layer)
    assert not any(annealed_modules(model))
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert_same_outputs(model, stock, DEPLOY_RTOL[torch.float32])


class Payload:
    """What a pickle from a stranger may hold: unpickling calls a function."""

    def __reduce__(self):
        return sys.setrecursionlimit, (1234,)


@pytest.mark.parametrize('save', [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_hostile_file_is_refused_and_not_run(save, tmp_path):
    path = tmp_path / 'evil.pth'
    save(dict(state_dict=Payload()), path)
    limit = sys.getrecursionlimit()
    with pytest.raises(ValueError, match=r'setrecursionlimit|is not a PyTorch checkpoint'):
        load_official_checkpoint(path, NAME)
    assert sys.getrecursionlimit() == limit


def test_bad_arguments_raise(stock, training_file, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_official_checkpoint(tmp_path / 'missing.pth', NAME)
    with pytest.raises(ValueError, match="unknown model 'orepa_nothing'"):
        load_official_checkpoint(training_file, 'orepa_nothing')
    for wrong in ({}, {'epoch': 1}, {1: torch.ones(1)}):
        with pytest.raises(ValueError, match='a state dict holds tensors only'):
            load_official_checkpoint(wrong, NAME)
    with pytest.raises(ValueError, match=r'RepVGG-train.*weights of orepa_repvgg_b0_cifar; missing: '):
        load_official_checkpoint(training_file, 'orepa_repvgg_b0_cifar')
    with pytest.raises(ValueError, match=r'weights of orepa_repvgg_a2_cifar; '):
        load_official_checkpoint(training_file, 'orepa_repvgg_a2_cifar')
    scalar = {**official_names(stock.state_dict()), 'linear.weight': torch.tensor(1.0)}
    with pytest.raises(ValueError, match=r'linear.weight has shape \(\)'):
        load_official_checkpoint({**scalar, 'linear.bias': torch.zeros(10)}, NAME)
    with pytest.raises(ValueError, match=r'missing: .*not expected: '):  # timm's own names
        load_official_checkpoint(stock.state_dict(), NAME)


# The command.


def call(*args, code=0):
    result = CliRunner().invoke(main, ['import-official', *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    if code:
        assert result.output.startswith('Error: ')
        assert result.output.count('\n') == 1
    return result.output


def test_help_has_an_example():
    assert '  timm-rep import-official ResNet-50.pth.tar --model orepa_resnet50 --out ' in call('--help')


def test_import_writes_weights_to_train_on(stock, training_file, tmp_path):
    out = tmp_path / 'new' / 'weights.safetensors'
    printed = call(training_file, '--model', NAME, '--out', out)
    assert f'{out}: {NAME} in training form, 3 classes; training form and stock form: outputs agree' in printed
    model = timm.create_model(NAME, num_classes=3, checkpoint_path=str(out)).eval()
    assert_same_outputs(model, stock)
    before = out.read_bytes()
    assert 'exists already' in call(training_file, '--model', NAME, '--out', out, code=2)
    assert out.read_bytes() == before


def test_import_of_a_deploy_file_writes_stock_weights(stock, deploy_file, tmp_path):
    out = tmp_path / 'weights.pth'
    printed = json.loads(call(deploy_file, '--model', NAME, '--out', out, '--json'))
    assert printed == dict(output=str(out), architecture=NAME, form='stock', num_classes=3, model_kwargs={}, fused=None)
    model = timm.create_model(NAME, num_classes=3, inference_mode=True, checkpoint_path=str(out)).eval()
    assert_same_outputs(model, stock, DEPLOY_RTOL[torch.float32])


def test_import_writes_a_hub_folder_in_stock_form(stock, training_file, tmp_path):
    out = tmp_path / 'hub'
    printed = json.loads(call(training_file, '--model', NAME, '--out', out, '--license', 'mit', '--json'))
    assert printed['form'] == 'stock'
    assert printed['fused']['model']['relative'] <= printed['fused']['rtol']
    config = json.loads((out / 'config.json').read_text())
    assert config['pretrained_cfg']['license'] == 'mit'
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    assert not list(rep_layers(model))
    assert_same_outputs(model, stock)


@pytest.mark.parametrize('out', ['weights.safetensors', 'weights.pth', 'hub'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_import_writes_no_values_that_are_not_finite(value, out, deploy_file, tmp_path):
    weights = torch.load(deploy_file)
    weights['linear.bias'][0] = value
    torch.save(weights, tmp_path / 'broken.pth')
    message = call(tmp_path / 'broken.pth', '--model', NAME, '--out', tmp_path / out, code=1)
    assert 'values that are not finite' in message
    assert [path.name for path in tmp_path.iterdir()] == ['broken.pth']


@pytest.mark.parametrize('value', [float('nan'), -1.0])
def test_import_writes_no_variance_that_cannot_be(value, stock, tmp_path):
    """A stock model has no fused form to be compared with."""
    weights = official_names(stock.state_dict())
    weights['stage0.rbr_dense.bn.running_var'] = torch.full_like(weights['stage0.rbr_dense.bn.running_var'], value)
    torch.save(weights, tmp_path / 'broken.pth')
    out = tmp_path / 'weights.pth'
    options = ['--model', NAME, '--model-kwargs', 'inference_mode=True', '--out', out]
    message = call(tmp_path / 'broken.pth', *options, code=1)
    assert 'stem.conv_kxk.bn.running_var has ' in message
    assert not out.exists()


def test_import_checks_the_fused_model(training_file, tmp_path, monkeypatch):
    def wrong(model):
        fused = fuse(model)
        with torch.no_grad():
            fused.stem.conv_kxk.conv.weight.mul_(1.01)
        return fused

    monkeypatch.setattr(official, 'fuse', wrong)
    assert 'layer stem.conv_kxk.conv is off' in call(
        training_file, '--model', NAME, '--out', tmp_path / 'weights.pth', code=1)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope='module')
def mobilenet():
    return randomize_(timm.create_model('mobilenetv1_100', num_classes=3, act_layer='relu')).eval()


@pytest.fixture(scope='module')
def mobilenet_file(mobilenet, tmp_path_factory):
    """RepAn's names of the tensors of a MobileNet of plain blocks."""
    parts = {'conv_dw': 'depthwise.conv', 'bn1': 'depthwise.bn', 'conv_pw': 'pointwise.conv', 'bn2': 'pointwise.bn'}
    positions = {
        name: f'stem.{position}'
        for position, name in enumerate(name for name, _ in mobilenet.named_modules() if name.count('.') == 2)}
    weights = {}
    for key, value in mobilenet.state_dict().items():
        block, part, kind = key.rsplit('.', 2) if key.startswith('blocks') else ('', *key.split('.'))
        own = dict(conv_stem='conv1.conv', bn1='conv1.bn', classifier='linear')
        weights[f'{positions[block]}.{parts[part]}.{kind}' if block else f'{own[part]}.{kind}'] = value
    path = tmp_path_factory.mktemp('official') / 'model_epoch_0001.pyth'
    torch.save(dict(epoch=0, model_state=weights), path)
    return path


def test_import_takes_arguments_of_the_model(mobilenet, mobilenet_file, tmp_path):
    options = ['--model', 'repan_mobilenetv1_100', '--model-kwargs', 'rep_layer=acb']
    out = tmp_path / 'weights.safetensors'
    assert "build it with act_layer='relu'" in call(mobilenet_file, *options, '--out', out, code=2)
    options += ['--model-kwargs', 'act_layer=relu', '--attach-rate', 0.5]
    printed = call(mobilenet_file, *options, '--out', out)
    assert 'training form, 3 classes, built with rep_layer=acb act_layer=relu; training' in printed
    model = timm.create_model(
        'repan_mobilenetv1_100', num_classes=3, rep_layer='acb', act_layer='relu', checkpoint_path=str(out)).eval()
    assert {layer.attach_rate.item() for _, layer in rep_layers(model)} == {0.5}
    assert_same_outputs(model, mobilenet)

    folder = tmp_path / 'hub'
    if not hasattr(mobilenet, '_model_args'):  # an older timm, whose folders do not hold arguments
        assert 'is not what timm builds as mobilenetv1_100' in call(mobilenet_file, *options, '--out', folder, code=2)
        return
    printed = json.loads(call(mobilenet_file, *options, '--out', folder, '--json'))
    assert printed['architecture'] == 'mobilenetv1_100'
    assert printed['model_kwargs'] == dict(act_layer='relu')
    assert_same_outputs(timm.create_model(f'local-dir:{folder}', pretrained=True).eval(), mobilenet)


@pytest.mark.parametrize(('option', 'message'), [
    ('rep_layer', "'rep_layer' is not KEY=VALUE"),
    ('=acb', "'=acb' is not KEY=VALUE"),
    ('rep_layer=none', "unknown method 'none'"),
    ('nonsense=1', 'repan_mobilenetv1_100 cannot be built with .*nonsense=1'),
    ('act_layer=nonsense', 'repan_mobilenetv1_100 cannot be built with .*nonsense'),
    ('model_name=x', 'repan_mobilenetv1_100 cannot be built with '),
    ('num_classes=0', 'was built without'),
    ('num_classes=4', 'linear.weight has shape'),
])
def test_bad_arguments_of_the_model_are_one_line(option, message, mobilenet_file, tmp_path):
    out = tmp_path / 'out.pth'
    options = ['--model', 'repan_mobilenetv1_100', '--model-kwargs', 'act_layer=relu', '--model-kwargs', option]
    result = CliRunner().invoke(main, ['import-official', str(mobilenet_file), *options, '--out', str(out)])
    assert result.exit_code == 2, result.exception
    assert re.search(message, result.output)
    assert result.output.splitlines()[-1].startswith('Error: ')
    assert not out.exists()


def test_import_errors_are_one_line_and_write_nothing(training_file, tmp_path):
    out = tmp_path / 'out'
    assert 'no checkpoint file at' in call(tmp_path / 'missing.pth', '--model', NAME, '--out', out, code=2)
    assert 'does not hold official weights of orepa_resnet18_cifar; missing' in call(
        training_file, '--model', 'orepa_resnet18_cifar', '--out', out, code=2)
    assert 'must end in .safetensors or .pth' in call(
        training_file, '--model', NAME, '--out', tmp_path / 'out.onnx', code=2)
    assert list(tmp_path.iterdir()) == []


def test_public_name():
    assert timm_rep.load_official_checkpoint is load_official_checkpoint
