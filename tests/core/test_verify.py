"""verify() passes for a right fusion and names the first layer that is off."""
import copy
import dataclasses

import pytest
import timm
import torch
import torch.nn as nn
from helpers import TINY_MODELS, EmulatedTF32, randn, randomize_, tiny_resnet
from timm.utils import reparameterize_model
from torch.optim.swa_utils import AveragedModel

from timm_rep import UserError, VerificationError, expand, fuse, rep_layers, set_attach_rate, verify


def pair(name='basic', layer='orepa', dtype=torch.float32):
    model = randomize_(expand(TINY_MODELS[name](), layer)).to(dtype).eval()
    set_attach_rate(model, 0.3)
    return model, fuse(model)


def images(dtype=torch.float32):
    return randn(2, 3, 64, 64, dtype=dtype)


@pytest.mark.parametrize(('name', 'layer', 'dtype'), [
    ('basic', 'orepa', torch.bfloat16),
    ('bottleneck', 'orepa', torch.float64),
    ('repvgg', 'orepa', torch.float32),
    ('basic', 'dbb', torch.float64),
], ids=str)
def test_right_fusion_passes_and_is_reported(name, layer, dtype):
    model, fused = pair(name, layer, dtype)
    report = verify(model, fused, inputs=images(dtype))
    assert [difference.name for difference in report.layers] == [name for name, _ in rep_layers(model)]
    for difference in (*report.layers, report.model):
        assert difference.largest > 0
        assert difference.relative <= report.rtol
        assert difference.relative == difference.absolute / difference.largest
    text = str(report)
    assert f'{len(report.layers)} rep layers' in text
    assert 'outputs agree' in text


def test_default_inputs_and_modes_are_kept():
    model = timm.create_model('orepa_resnet18_cifar', num_classes=3, in_chans=1).train()
    fused = fuse(model).eval()
    report = verify(model, fused)
    assert report.model.largest > 0
    assert report.rtol == 1e-5
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in fused.modules())


@pytest.mark.parametrize('layer', ['orepa', 'dbb'])
def test_right_fusion_passes_where_tf32_is_allowed(layer):
    model, _ = pair('basic', layer, torch.float32)
    with EmulatedTF32():
        report = verify(model, fuse(model), inputs=images())
    assert report.model.relative <= 1e-5


@pytest.mark.parametrize('layer', ['orepa', 'dbb'])
def test_right_fusion_passes_inside_autocast(layer):
    model, fused = pair(layer=layer)
    with torch.autocast('cpu', torch.bfloat16):
        assert verify(model, fused, inputs=images()).model.relative < 1e-5
        assert model(images()).dtype == torch.bfloat16


def test_the_default_device_of_new_tensors_does_not_matter():
    model = timm.create_model('orepa_resnet18_cifar').eval()
    fused = fuse(model)
    with torch.device('meta'):
        assert verify(model, fused).model.relative < 1e-5


def test_deploy_form_is_compared_end_to_end():
    model, fused = pair('repvgg')
    deploy = reparameterize_model(fused)
    report = verify(model, deploy, inputs=images(), rtol=1e-4)
    assert not report.layers
    assert report.model.relative <= 1e-4


@pytest.mark.parametrize(('name', 'layer', 'altered', 'first', 'factor'), [
    ('basic', 'orepa', ['layer2.0.conv1', 'layer3.0.conv2'], 'layer2.0.conv1', 1.001),
    ('bottleneck', 'orepa', ['layer4.0.conv3', 'conv1'], 'conv1', 1.001),
    ('bottleneck', 'orepa', ['layer4.0.conv3', 'conv1'], 'conv1', float('nan')),
    ('basic', 'dbb', ['layer3.0.conv1'], 'layer3.0.conv1', 1.001),
    ('basic', 'dbb', ['layer3.0.conv1'], 'layer3.0.conv1', 0.0),
])
def test_first_altered_layer_is_named(name, layer, altered, first, factor):
    model, fused = pair(name, layer)
    with torch.no_grad():
        for place in altered:
            fused.get_submodule(place).weight[0].mul_(factor)
    message = f'layer {first}: .*non-finite' if factor != factor else f'layer {first} is off: largest difference'
    with pytest.raises(VerificationError, match=message):
        verify(model, fused, inputs=images())


def test_difference_outside_the_rep_layers_is_found():
    model, fused = pair()
    with torch.no_grad():
        fused.fc.weight.mul_(1.001)
    with pytest.raises(VerificationError, match='the model is off'):
        verify(model, fused, inputs=images())
    assert verify(model, fused, inputs=images(), rtol=0.01).rtol == 0.01
    assert verify(model, fused, inputs=images(), atol=1e6).atol == 1e6


def test_non_finite_training_form_is_told_apart():
    model, fused = pair()
    with torch.no_grad():
        model.layer1[0].conv1.scale[0, 0] = float('inf')
    with pytest.raises(VerificationError, match=r'layer layer1\.0\.conv1: the training form puts out non-finite'):
        verify(model, fused, inputs=images())


def test_shape_mismatch_raises():
    model, fused = pair()
    other = copy.deepcopy(fused)
    other.reset_classifier(7)
    with pytest.raises(VerificationError, match=r'the model: output shapes differ, \(2, 5\) and \(2, 7\)'):
        verify(model, other, inputs=images())


def test_missing_input_size_raises():
    with pytest.raises(ValueError, match='pass inputs'):
        verify(*pair())


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x, y):
        return self.norm(self.conv(x)) + y


def test_all_that_the_model_is_called_with_may_be_given():
    x = images()
    model = randomize_(expand(TwoInputs().eval(), 'rep', example_inputs=(x, 1.0)))
    assert verify(model, fuse(model), inputs=(x, 2.0)).model.relative < 1e-5
    with pytest.raises(UserError, match=r"does not run on images of \(2, 3, 64, 64\): .*'y'"):
        verify(model, fuse(model), inputs=x)


def test_images_that_the_model_does_not_take_raise():
    with pytest.raises(UserError, match=r'does not run on images of \(2, 1, 64, 64\): .*expected input'):
        verify(*pair(), inputs=randn(2, 1, 64, 64))


@pytest.mark.parametrize('output', [list, tuple, lambda maps: dict(enumerate(maps)), lambda maps: dict(all=list(maps))])
def test_feature_maps_are_compared_one_by_one(output):
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = randomize_(expand(tiny_resnet(), 'orepa'))
            self.factor = 1.0

        def forward(self, x):
            stem = self.net.maxpool(self.net.act1(self.net.bn1(self.net.conv1(x))))
            return output([stem, self.factor * self.net.layer1(stem)])

    model = Maps().eval()
    fused = fuse(model)
    x = randn(1, 3, 32, 32, dtype=torch.float32)
    verify(AveragedModel(model), torch.compile(fused, backend='eager'), inputs=x)
    fused.factor = 1.01
    with pytest.raises(VerificationError, match='the model is off'):
        verify(model, fused, inputs=x)


@dataclasses.dataclass
class Boxes:
    scores: torch.Tensor
    boxes: torch.Tensor


class Detector(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.conv, self.make = nn.Conv2d(3, 4, 3), make

    def forward(self, x):
        return self.make(self.conv(x))


def test_other_outputs_are_compared_too():
    x = randn(1, 3, 8, 8, dtype=torch.float32)
    model = Detector(lambda y: Boxes(torch.complex(y, y), y[:0])).eval()
    other = copy.deepcopy(model)
    verify(model, other, inputs=x)
    other.make = lambda y: Boxes(torch.complex(y, 5 * y), y[:0])
    with pytest.raises(VerificationError, match='the model is off'):
        verify(model, other, inputs=x)
    other.make = model.make = lambda y: 'nothing'
    with pytest.raises(UserError, match='no tensor in what the model puts out, a str'):
        verify(model, other, inputs=x)
