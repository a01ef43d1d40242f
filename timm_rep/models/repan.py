"""RepAn models: timm's ResNet, RepVGG and MobileNet-V1 with side branches that are annealed in time steps.

``rep_layer`` says what the side branches are: ``'dbb'`` (diverse branches), ``'acb'`` (1xK and Kx1), ``'rep'`` (1x1 and
identity) or ``'orepa'`` (linear branches, composed into one kernel at every step: annealing at OREPA's cost, which is
ours and not in the paper). The attach rate and the steps from one time step to the next are in
:mod:`timm_rep.core.annealing`.

`Enhanced Annealing through Re-parameterization` (RepAn, CVPR 2024)
"""
from typing import Any

from timm.models import ByobNet, EfficientNet, ResNet, generate_default_cfgs, register_model

from .build import create_mobilenetv1, create_repvgg, create_resnet
from .published import with_published
from .stock import imagenet_cfg, small_image_cfg

__all__ = []  # model entry points are added by register_model

default_cfgs = generate_default_cfgs(with_published({
    'repan_resnet18': imagenet_cfg(),
    'repan_resnet34': imagenet_cfg(),
    'repan_resnet50': imagenet_cfg(),
    'repan_resnet101': imagenet_cfg(),
    'repan_resnet18_cifar': small_image_cfg(),
    'repan_repvgg_a0': imagenet_cfg(classifier='head.fc'),
    'repan_repvgg_a1': imagenet_cfg(classifier='head.fc'),
    'repan_repvgg_a2': imagenet_cfg(classifier='head.fc'),
    'repan_repvgg_b0': imagenet_cfg(classifier='head.fc'),
    'repan_repvgg_b1': imagenet_cfg(classifier='head.fc'),
    'repan_repvgg_b1g4': imagenet_cfg(classifier='head.fc'),
    'repan_repvgg_b2': imagenet_cfg(classifier='head.fc'),
    'repan_repvgg_b2g4': imagenet_cfg(classifier='head.fc'),
    'repan_repvgg_b3': imagenet_cfg(classifier='head.fc'),
    'repan_repvgg_b3g4': imagenet_cfg(classifier='head.fc'),
    'repan_repvgg_a0_cifar': small_image_cfg(classifier='head.fc', pool_size=(8, 8)),
    'repan_repvgg_a1_cifar': small_image_cfg(classifier='head.fc', pool_size=(8, 8)),
    'repan_repvgg_a2_cifar': small_image_cfg(classifier='head.fc', pool_size=(8, 8)),
    'repan_repvgg_b0_cifar': small_image_cfg(classifier='head.fc', pool_size=(8, 8)),
    'repan_mobilenetv1_100': imagenet_cfg(classifier='classifier'),
}))


@register_model
def repan_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """RepAn-ResNet-18."""
    return create_resnet('repan_resnet18', pretrained, **kwargs)


@register_model
def repan_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """RepAn-ResNet-34."""
    return create_resnet('repan_resnet34', pretrained, **kwargs)


@register_model
def repan_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """RepAn-ResNet-50."""
    return create_resnet('repan_resnet50', pretrained, **kwargs)


@register_model
def repan_resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """RepAn-ResNet-101."""
    return create_resnet('repan_resnet101', pretrained, **kwargs)


@register_model
def repan_resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """RepAn-ResNet-18 for small images: 3x3 stride-1 stem, no max-pooling."""
    return create_resnet('repan_resnet18_cifar', pretrained, **kwargs)


@register_model
def repan_repvgg_a0(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-A0."""
    return create_repvgg('repan_repvgg_a0', pretrained, **kwargs)


@register_model
def repan_repvgg_a1(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-A1."""
    return create_repvgg('repan_repvgg_a1', pretrained, **kwargs)


@register_model
def repan_repvgg_a2(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-A2."""
    return create_repvgg('repan_repvgg_a2', pretrained, **kwargs)


@register_model
def repan_repvgg_b0(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-B0."""
    return create_repvgg('repan_repvgg_b0', pretrained, **kwargs)


@register_model
def repan_repvgg_b1(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-B1."""
    return create_repvgg('repan_repvgg_b1', pretrained, **kwargs)


@register_model
def repan_repvgg_b1g4(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-B1G4."""
    return create_repvgg('repan_repvgg_b1g4', pretrained, **kwargs)


@register_model
def repan_repvgg_b2(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-B2."""
    return create_repvgg('repan_repvgg_b2', pretrained, **kwargs)


@register_model
def repan_repvgg_b2g4(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-B2G4."""
    return create_repvgg('repan_repvgg_b2g4', pretrained, **kwargs)


@register_model
def repan_repvgg_b3(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-B3."""
    return create_repvgg('repan_repvgg_b3', pretrained, **kwargs)


@register_model
def repan_repvgg_b3g4(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-B3G4."""
    return create_repvgg('repan_repvgg_b3g4', pretrained, **kwargs)


@register_model
def repan_repvgg_a0_cifar(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-A0 for small images."""
    return create_repvgg('repan_repvgg_a0_cifar', pretrained, **kwargs)


@register_model
def repan_repvgg_a1_cifar(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-A1 for small images."""
    return create_repvgg('repan_repvgg_a1_cifar', pretrained, **kwargs)


@register_model
def repan_repvgg_a2_cifar(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-A2 for small images."""
    return create_repvgg('repan_repvgg_a2_cifar', pretrained, **kwargs)


@register_model
def repan_repvgg_b0_cifar(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-B0 for small images."""
    return create_repvgg('repan_repvgg_b0_cifar', pretrained, **kwargs)


@register_model
def repan_mobilenetv1_100(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """RepAn-MobileNet-V1."""
    return create_mobilenetv1('repan_mobilenetv1_100', pretrained, **kwargs)
