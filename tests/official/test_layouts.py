"""State dicts in the authors' layouts give the authors' outputs; what is not one of the model is refused."""
import gzip
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
from helpers import DEPLOY_RTOL, MODEL_RTOL, assert_near, assert_same_state, randomize_, state_of
from timm.models import ByoBlockCfg, ByoModelCfg, EfficientNet, ResNet
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.resnet import BasicBlock, Bottleneck

from timm_rep import Orepa, UserError, fuse, rep_layers, set_attach_rate
from timm_rep.core.expand import expand_fresh_
from timm_rep.core.walk import annealed_modules
from timm_rep.models.stock import build_repvgg
from timm_rep.official.networks import fill_from_official_

GOLDEN = Path(__file__).parents[1] / 'golden'
DTYPES = (torch.float64, torch.float32)


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
# Those that the authors' code folds, and those with an attach rate.
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


def filled_model(name, weights, dtype=torch.float64, form='training', layer=None, attach_rate=1.0, used=False):
    model = build(name, form, layer).to(dtype)
    if used:
        randomize_(model)
    set_attach_rate(model, attach_rate)
    fill_from_official_(model, weights)
    return model


def without_drawn(model, drawn):
    """What is not meant to be left as it was drawn."""
    return {key: value for key, value in state_of(model).items() if drawn is None or not re.match(drawn, key)}


def assert_differ(actual, expected):
    """What makes the other comparisons mean something: they can fail."""
    with pytest.raises(AssertionError, match='largest difference'):
        assert_near(actual, expected, 1e-2)


@pytest.mark.parametrize('name', CASES)
@torch.no_grad()
def test_training_form_has_the_authors_outputs(name):
    x, expected, weights, _ = golden(name)
    for dtype in DTYPES:
        model = filled_model(name, weights, dtype)
        assert any(annealed_modules(model)) == (CASES[name][1] is not None)
        assert_near(model(x.to(dtype)), expected['output'].to(dtype), MODEL_RTOL[dtype])
        assert_near(fuse(model)(x.to(dtype)), expected['output'].to(dtype), MODEL_RTOL[dtype])
        again = without_drawn(filled_model(name, weights, dtype, used=True), DRAWN.get(name))
        assert_same_state(again, without_drawn(model, DRAWN.get(name)))  # nothing is left as it was


@pytest.mark.parametrize('name', ANNEALED)
@torch.no_grad()
def test_attach_rate_is_the_authors(name):
    x, expected, weights, _ = golden(name)
    for dtype in DTYPES:
        outputs = expected['output_at_0.3'].to(dtype)
        model = filled_model(name, weights, dtype, attach_rate=0.3)
        assert_near(model(x.to(dtype)), outputs, MODEL_RTOL[dtype])
        assert_near(fuse(model)(x.to(dtype)), outputs, MODEL_RTOL[dtype])
        set_attach_rate(model, 1.0)
        assert_differ(model(x.to(dtype)), outputs)


@pytest.mark.parametrize('name', FOLDED)
@torch.no_grad()
def test_deploy_form_has_the_authors_outputs(name):
    x, expected, _, folded = golden(name)
    drawn = DRAWN['folded_repvgg'] if 'repvgg' in name else None
    for dtype in DTYPES:
        model = filled_model(name, folded, dtype, form='stock')
        assert_near(model(x.to(dtype)), expected['folded_output'].to(dtype), DEPLOY_RTOL[dtype])
        again = without_drawn(filled_model(name, folded, dtype, form='stock', used=True), drawn)
        assert_same_state(again, without_drawn(model, drawn))


@pytest.mark.parametrize('name', ['repvgg', 'repan_repvgg'])
@torch.no_grad()
def test_plain_branches_are_restored_into_rep_layers(name):
    x, expected, weights, _ = golden(name)
    model = filled_model(name, weights, layer='orepa')
    assert list(rep_layers(model))
    assert_near(model(x), expected['output'], MODEL_RTOL[torch.float64])


def swapped(weights, one, other):
    """The weights with two parts in each other's place."""
    return {key.replace(one, '?').replace(other, one).replace('?', other): value for key, value in weights.items()}


@pytest.mark.parametrize(('name', 'one', 'other'), [
    ('repan_acb', 'hor_bn', 'ver_bn'),
    ('repan_rep', 'dbb_origin.bn', 'dbb_1x1.bn'),
])
@torch.no_grad()
def test_another_mapping_is_not_the_authors(name, one, other):
    x, expected, weights, _ = golden(name)
    assert_differ(filled_model(name, swapped(weights, one, other))(x), expected['output'])


def without(weights, *names):
    assert set(names) <= set(weights)
    return {key: value for key, value in weights.items() if key not in names}


@pytest.mark.parametrize(('name', 'change', 'message'), [
    ('orepa_basic', lambda w: without(w, 'stage1.0.conv1.vector'), r'missing: stage1\.0\.conv1\.vector$'),
    ('orepa_basic', lambda w: without(w, 'stage0.conv1.weight1.weight_orepa_gconv_dw'), r'missing: stage0\.conv1\.wei'),
    ('orepa_basic', lambda w: {**w, 'stage1.0.conv1.conv.bias': w['linear.bias']}, r'not expected: stage1'),
    ('orepa_basic', lambda w: without(w, 'linear.bias'), r'missing: linear\.bias$'),
    ('orepa_basic', lambda w: {**w, 'linear.weight': w['linear.weight'][:, 1:]}, r'linear\.weight has shape \(5, 7\)'),
    ('orepa_basic', lambda w: {k: v * 1.1 if 'prior' in k else v for k, v in w.items()}, 'constant .*orepa_prior is'),
    ('orepa_bottleneck', lambda w: without(w, 'stage1.0.conv1.weight_or1x1_origin'), r'missing: .*or1x1_origin$'),
    ('orepa_repvgg', lambda w: without(w, 'stage1.1.rbr_identity.bias'), r'missing: stage1\.1\.rbr_identity\.bias$'),
    ('dbb_basic', lambda w: without(w, 'stage1.0.conv1.dbb_avg.bn.bn.bias'), r'missing: stage1\.0\.conv1\.dbb_avg\.bn'),
    ('repvgg', lambda w: without(w, 'stage0.se.down.bias'), r'missing: stage0\.se\.down\.bias$'),
    ('repan_repvgg', lambda w: without(w, 'stages.1.sequential.1.bn_0.weight'), r'missing: stages\.1.*0\.weight$'),
    ('repan_rep', lambda w: {k: v for k, v in w.items() if '2.0.conv2.dbb_1x1' not in k}, r'2\.0\.conv2\.dbb_1x1\.bn'),
])
def test_what_is_missing_or_left_over_is_named(name, change, message):
    with pytest.raises(UserError, match=rf'does not hold official weights of \w+Net; .*{message}'):
        fill_from_official_(build(name).double(), change(golden(name)[2]))


@pytest.mark.parametrize(('name', 'model', 'message'), [
    ('orepa_basic', lambda: build('orepa_basic', 'stock'), r'conv1 is a block of OrepaStemConv2d, .* has Conv2d'),
    ('orepa_basic', lambda: build('orepa_bottleneck'), r'conv1 is a block of OrepaConv2d, .* OrepaPointwiseConv2d'),
    ('orepa_basic', lambda: expand_fresh_(tiny_resnet(BasicBlock, (4, 8, 8)), 'orepa'), r'missing: stage3\.0'),
    ('orepa_basic', lambda: expand_fresh_(tiny_resnet(BasicBlock, (4,)), 'orepa'), r'not expected: stage2\.0'),
    ('orepa_basic', lambda: expand_fresh_(tiny_resnet(BasicBlock, (4, 12)), 'orepa'), r'stage2.* has shape .* takes'),
    ('orepa_basic', lambda: build('orepa_basic', layer=Orepa(scaling='scalar')), r"all branches.* scaling='scalar'"),
    ('orepa_basic', lambda: build('orepa_basic', layer=Orepa(branches=('origin', 'prior'))), 'are origin, prior, scal'),
    ('orepa_repvgg', lambda: build('orepa_basic'), r'missing: .*; not expected: '),
    ('orepa_repvgg', lambda: build('orepa_repvgg', 'stock'), r'dense is a block of OrepaConv2d, .* has Conv2d'),
    ('repvgg', lambda: build('orepa_repvgg'), r'not expected: .*se\.'),
    ('repan_acb', lambda: build('repan_rep'), r'conv1 is a block of AsymmetricConv2d, where the model has RepConv2d'),
    ('repan_mobilenet_rep', lambda: build('repan_rep'), r'missing: .*; not expected: '),
])
def test_another_architecture_is_refused(name, model, message):
    with pytest.raises(UserError, match=message):
        fill_from_official_(model().double(), golden(name)[2])


def test_only_these_networks():
    known = 'official checkpoints are of ResNets, RepVGGs and MobileNet-V1'
    with pytest.raises(UserError, match=rf'{known}; .* is a Linear'):
        fill_from_official_(nn.Linear(2, 2), golden('repvgg')[2])
    with pytest.raises(UserError, match='test_byobnet is a ByobNet'):
        fill_from_official_(timm.create_model('test_byobnet'), golden('repvgg')[2])
    with pytest.raises(UserError, match='test_efficientnet is a EfficientNet'):
        fill_from_official_(timm.create_model('test_efficientnet'), golden('dbb_mobilenet')[2])
    model = build('dbb_basic')
    model.reset_classifier(0)
    with pytest.raises(UserError, match='ResNet was built without'):
        fill_from_official_(model, golden('dbb_basic')[2])


def test_mobilenet_must_have_the_authors_activation():
    """timm's own MobileNet differs from the authors' above 6 only, which a comparison may miss."""
    model = expand_fresh_(tiny_mobilenet(nn.ReLU6), 'dbb')
    with pytest.raises(UserError, match=r"has ReLU; build EfficientNet with act_layer='relu'"):
        fill_from_official_(model, golden('dbb_mobilenet')[2])


def test_unused_row_of_scales_is_ignored():
    """The authors' RepVGG blocks with an identity branch save a row that nothing has set: it may hold anything."""
    weights = golden('orepa_repvgg')[2]
    scale = weights['stage1.1.rbr_dense.vector']
    assert scale.shape == (6, 8)
    scale[5] = float('nan')
    model = filled_model('orepa_repvgg', weights)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_parts_that_the_authors_have_not_are_refused():
    model = build('orepa_basic', 'stock')
    model.layer1[0].extra = nn.Conv2d(2, 2, 1)
    with pytest.raises(UserError, match=r'nothing for layer1\.0\.extra\.bias, layer1\.0\.extra\.weight'):
        fill_from_official_(model.double(), golden('orepa_basic')[3])
