"""OREPA-ResNet: timm's ResNet, ResNeXt and wide ResNet with OREPA layers in place of the convolutions.

Every 3x3 becomes an OREPA block, the 7x7 stem a squeezed stack of 3x3 blocks, the 1x1 of bottlenecks (their shortcuts
too) Rep-1x1; the shortcuts of basic blocks stay plain. Norms and activations are the host's.

`Online Convolutional Re-parameterization` - https://arxiv.org/abs/2204.00826 (CVPR 2022)
"""
from typing import Any

from timm.models import ResNet, generate_default_cfgs, register_model

from .build import create_resnet
from .published import with_published
from .stock import imagenet_cfg, small_image_cfg

__all__ = []  # model entry points are added by register_model

default_cfgs = generate_default_cfgs(with_published({
    'orepa_resnet18': imagenet_cfg(),
    'orepa_resnet34': imagenet_cfg(),
    'orepa_resnet50': imagenet_cfg(),
    'orepa_resnet101': imagenet_cfg(),
    'orepa_wide_resnet18_2': imagenet_cfg(),
    'orepa_resnext50_32x4d': imagenet_cfg(),
    'orepa_resnet18_cifar': small_image_cfg(),
}))


@register_model
def orepa_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """OREPA-ResNet-18."""
    return create_resnet('orepa_resnet18', pretrained, **kwargs)


@register_model
def orepa_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """OREPA-ResNet-34."""
    return create_resnet('orepa_resnet34', pretrained, **kwargs)


@register_model
def orepa_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """OREPA-ResNet-50."""
    return create_resnet('orepa_resnet50', pretrained, **kwargs)


@register_model
def orepa_resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """OREPA-ResNet-101."""
    return create_resnet('orepa_resnet101', pretrained, **kwargs)


@register_model
def orepa_wide_resnet18_2(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """OREPA wide ResNet-18: all widths doubled, the stem's too. timm has no such stock network."""
    return create_resnet('orepa_wide_resnet18_2', pretrained, **kwargs)


@register_model
def orepa_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """OREPA-ResNeXt-50 32x4d."""
    return create_resnet('orepa_resnext50_32x4d', pretrained, **kwargs)


@register_model
def orepa_resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """OREPA-ResNet-18 for small images: 3x3 stride-1 stem, no max-pooling."""
    return create_resnet('orepa_resnet18_cifar', pretrained, **kwargs)
