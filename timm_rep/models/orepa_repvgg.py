"""OREPA-RepVGG: timm's RepVGG with an OREPA layer in place of the convolution of every 3x3 branch.

RepVGG keeps its three branches and their norms, so the OREPA layer has no 1x1 branch of its own and starts
kaiming-uniform with ``a = 1``. The norms start at weight one and bias zero as in the official code, where timm's RepVGG
draws them from N(0.1, 0.1).

`Online Convolutional Re-parameterization` - https://arxiv.org/abs/2204.00826 (CVPR 2022)
`RepVGG: Making VGG-style ConvNets Great Again` - https://arxiv.org/abs/2101.03697
"""
from typing import Any

from timm.models import ByobNet, generate_default_cfgs, register_model

from .build import create_repvgg
from .published import with_published
from .stock import imagenet_cfg, small_image_cfg

__all__ = []  # model entry points are added by register_model

default_cfgs = generate_default_cfgs(with_published({
    'orepa_repvgg_a0': imagenet_cfg(classifier='head.fc'),
    'orepa_repvgg_a1': imagenet_cfg(classifier='head.fc'),
    'orepa_repvgg_a2': imagenet_cfg(classifier='head.fc'),
    'orepa_repvgg_b0': imagenet_cfg(classifier='head.fc'),
    'orepa_repvgg_b1': imagenet_cfg(classifier='head.fc'),
    'orepa_repvgg_b1g4': imagenet_cfg(classifier='head.fc'),
    'orepa_repvgg_b2': imagenet_cfg(classifier='head.fc'),
    'orepa_repvgg_b2g4': imagenet_cfg(classifier='head.fc'),
    'orepa_repvgg_b3': imagenet_cfg(classifier='head.fc'),
    'orepa_repvgg_b3g4': imagenet_cfg(classifier='head.fc'),
    'orepa_repvgg_d2se': imagenet_cfg(classifier='head.fc', input_size=(3, 320, 320), pool_size=(10, 10), crop_pct=1.0),
    'orepa_repvgg_a0_cifar': small_image_cfg(classifier='head.fc', pool_size=(8, 8)),
    'orepa_repvgg_a1_cifar': small_image_cfg(classifier='head.fc', pool_size=(8, 8)),
    'orepa_repvgg_a2_cifar': small_image_cfg(classifier='head.fc', pool_size=(8, 8)),
    'orepa_repvgg_b0_cifar': small_image_cfg(classifier='head.fc', pool_size=(8, 8)),
}))


@register_model
def orepa_repvgg_a0(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """OREPA-RepVGG-A0."""
    return create_repvgg('orepa_repvgg_a0', pretrained, **kwargs)


@register_model
def orepa_repvgg_a1(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """OREPA-RepVGG-A1."""
    return create_repvgg('orepa_repvgg_a1', pretrained, **kwargs)


@register_model
def orepa_repvgg_a2(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """OREPA-RepVGG-A2."""
    return create_repvgg('orepa_repvgg_a2', pretrained, **kwargs)


@register_model
def orepa_repvgg_b0(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """OREPA-RepVGG-B0."""
    return create_repvgg('orepa_repvgg_b0', pretrained, **kwargs)


@register_model
def orepa_repvgg_b1(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """OREPA-RepVGG-B1."""
    return create_repvgg('orepa_repvgg_b1', pretrained, **kwargs)


@register_model
def orepa_repvgg_b1g4(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """OREPA-RepVGG-B1G4."""
    return create_repvgg('orepa_repvgg_b1g4', pretrained, **kwargs)


@register_model
def orepa_repvgg_b2(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """OREPA-RepVGG-B2."""
    return create_repvgg('orepa_repvgg_b2', pretrained, **kwargs)


@register_model
def orepa_repvgg_b2g4(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """OREPA-RepVGG-B2G4."""
    return create_repvgg('orepa_repvgg_b2g4', pretrained, **kwargs)


@register_model
def orepa_repvgg_b3(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """OREPA-RepVGG-B3."""
    return create_repvgg('orepa_repvgg_b3', pretrained, **kwargs)


@register_model
def orepa_repvgg_b3g4(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """OREPA-RepVGG-B3G4."""
    return create_repvgg('orepa_repvgg_b3g4', pretrained, **kwargs)


@register_model
def orepa_repvgg_d2se(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """OREPA-RepVGG-D2se."""
    return create_repvgg('orepa_repvgg_d2se', pretrained, **kwargs)


@register_model
def orepa_repvgg_a0_cifar(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """OREPA-RepVGG-A0 for small images."""
    return create_repvgg('orepa_repvgg_a0_cifar', pretrained, **kwargs)


@register_model
def orepa_repvgg_a1_cifar(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """OREPA-RepVGG-A1 for small images."""
    return create_repvgg('orepa_repvgg_a1_cifar', pretrained, **kwargs)


@register_model
def orepa_repvgg_a2_cifar(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """OREPA-RepVGG-A2 for small images."""
    return create_repvgg('orepa_repvgg_a2_cifar', pretrained, **kwargs)


@register_model
def orepa_repvgg_b0_cifar(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """OREPA-RepVGG-B0 for small images."""
    return create_repvgg('orepa_repvgg_b0_cifar', pretrained, **kwargs)
