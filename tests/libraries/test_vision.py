"""Detectors and segmentation nets of torchvision and segmentation_models_pytorch; timm's feature maps."""
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_near, randomize_, tiny_resnet
from library_recipes import PAGE, run
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FrozenBatchNorm2d

import timm_rep
from timm_rep.core.walk import rep_layers

in_a_checkout = pytest.mark.skipif(not PAGE.exists(), reason='the docs are in a checkout only')


@torch.no_grad()
def shaken(model):
    """Norms with statistics and gains of their own, also fixed ones."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.uniform_(0.5, 1.5, generator=generator)
    return model


def detector(kind, norm=FrozenBatchNorm2d):
    """A detector of torchvision on a narrow ResNet, of which it trains three stages."""
    torch.manual_seed(0)
    body = tiny_resnet(norm_layer=lambda channels, **kwargs: norm(channels))
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name.startswith(('layer2', 'layer3', 'layer4')))
    backbone = BackboneWithFPN(body, {f'layer{i}': str(i - 1) for i in range(1, 5)}, [8, 8, 12, 16], out_channels=16)
    threshold = dict(box_score_thresh=0.0) if kind is FasterRCNN else dict(score_thresh=0.0)
    return shaken(kind(backbone, num_classes=3, min_size=64, max_size=64, **threshold))


def scenes():
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 64, 64, generator=generator) for _ in range(2)]
    targets = [dict(boxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]), labels=torch.tensor([1 + i])) for i in range(2)]
    return images, targets


@in_a_checkout
@pytest.mark.parametrize('kind', [FasterRCNN, RetinaNet])
def test_detectors(kind):
    model = detector(kind)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    images, targets = scenes()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    done = run('torchvision', detector=model, images=images, targets=targets, torch=torch, timm_rep=timm_rep)
    rep, fused = done['rep'], done['fused']
    assert {name.split('.')[2] for name, _ in rep_layers(rep)} == {'layer2', 'layer3', 'layer4'}
    assert all(p.grad is not None for _, layer in rep_layers(rep) for p in layer.parameters())
    # the frozen part stands still, the rest has moved, and detections are those of the training form
    assert {name for name, parameter in fused.named_parameters() if not parameter.requires_grad} == frozen
    assert all(torch.equal(fused.state_dict()[name], start[name]) for name in frozen)
    assert not torch.equal(fused.backbone.body.layer4[0].conv1.weight, start['backbone.body.layer4.0.conv1.weight'])
    assert type(fused) is kind
    with torch.no_grad():
        x = torch.stack(images)
        for level, map_ in rep.backbone(x).items():
            assert_near(fused.backbone(x)[level], map_, 1e-5)
        for found, expected in zip(fused(images), rep(images)):
            assert found['boxes'].shape == expected['boxes'].shape
            assert found['boxes'].shape[0] > 0
            assert_near(found['boxes'], expected['boxes'], 1e-3)
    timm_rep.verify(rep.backbone, fused.backbone, inputs=x)


def test_detectors_start_with_the_same_losses():
    """Frozen norms have no batch statistics, so all is linear up to the heads."""
    model = detector(RetinaNet)
    rep = timm_rep.expand(model, {'backbone.body.*': 'orepa'})
    for one, other in zip(model.train()(*scenes()).values(), rep.train()(*scenes()).values()):
        assert_near(other, one, 1e-4)
    assert len(list(rep_layers(rep))) == 9
    everywhere = [name for name, _ in rep_layers(timm_rep.expand(model))]
    assert {name.split('.')[0] for name in everywhere} == {'backbone', 'head'}  # the backbone is narrow


def test_methods_with_norms_need_live_ones():
    with pytest.raises(timm_rep.UserError, match='FrozenBatchNorm2d'):
        timm_rep.expand(detector(FasterRCNN), 'dbb')
    rep = timm_rep.expand(detector(FasterRCNN, nn.BatchNorm2d), 'dbb')
    assert len(list(rep_layers(rep))) == 8


def small_deeplab():
    torch.manual_seed(0)
    backbone = IntermediateLayerGetter(tiny_resnet('bottleneck', output_stride=8), dict(layer4='out', layer3='aux'))
    return DeepLabV3(backbone, DeepLabHead(64, 4), FCNHead(48, 4))


def train_step(model, x, outputs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = sum(F.cross_entropy(out, torch.zeros(out.shape[0], *out.shape[2:]).long()) for out in outputs(model, x))
    loss.backward()
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    return loss.item()


@pytest.mark.parametrize('method', ['orepa', 'dbb'])
def test_deeplab(method):
    model = randomize_(small_deeplab())
    x = torch.rand(2, 3, 64, 64)
    rep = timm_rep.expand(model, method)
    assert [name for name, _ in rep_layers(rep) if name.startswith('classifier')]
    with torch.no_grad():
        expected = model.eval()(x)
        for name, map_ in rep.eval()(x).items():
            assert_near(map_, expected[name], 1e-4)
    train_step(rep.train(), x, lambda model, x: model(x).values())
    fused = timm_rep.fuse(rep.eval())
    timm_rep.verify(rep, fused, inputs=x, rtol=1e-4)
    small_deeplab().load_state_dict(fused.state_dict())


@in_a_checkout
def test_segmentation_models_pytorch():
    smp = pytest.importorskip('segmentation_models_pytorch', reason='needs segmentation_models_pytorch')
    done = run('segmentation_models_pytorch', smp=smp, timm_rep=timm_rep)
    assert {name.partition('.')[0] for name, _ in rep_layers(done['net'])} == {'encoder'}
    assert {name.partition('.')[0] for name, _ in rep_layers(done['whole'])} == {'encoder', 'decoder'}
    x = torch.rand(2, 3, 64, 64)
    for rep in (done['net'], done['whole']):
        train_step(rep.train(), x, lambda model, x: [model(x)])
        fused = timm_rep.fuse(randomize_(rep).eval())
        timm_rep.verify(rep, fused, inputs=x, rtol=1e-4)
        assert not list(rep_layers(fused))
    stock = smp.Unet('tu-resnet18', encoder_weights=None, classes=3).eval()
    stock.load_state_dict(timm_rep.fuse(done['net']).state_dict())
    assert_near(stock(x), done['net'].eval()(x), 1e-4)


@in_a_checkout
def test_feature_maps_with_output_strides():
    done = run('timm: feature maps and output strides', timm=timm, timm_rep=timm_rep)
    net, stock = randomize_(done['net']), done['stock'].eval()
    fused = timm_rep.fuse(net)
    stock.load_state_dict(fused.state_dict())
    assert type(fused) is type(stock)
    assert net.feature_info.reduction() == fused.feature_info.reduction() == stock.feature_info.reduction()
    assert net.feature_info.reduction()[-1] == 8
    x = torch.rand(1, 3, 64, 64)
    for ours, theirs, training in zip(fused(x), stock(x), net(x)):
        assert ours.shape[-1] >= 8
        assert torch.equal(ours, theirs)
        assert_near(ours, training, 1e-5)
