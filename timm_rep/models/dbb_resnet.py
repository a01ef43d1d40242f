"""DBB-ResNet: timm's ResNet with a Diverse Branch Block in place of every 3x3 convolution and its norm.

The baseline of both papers, for comparisons with the same code around it.

`Diverse Branch Block: Building a Convolution as an Inception-like Unit` - https://arxiv.org/abs/2103.13425
"""
from typing import Any

from timm.models import ResNet, generate_default_cfgs, register_model

from .build import create_resnet
from .published import with_published
from .stock import imagenet_cfg, small_image_cfg

__all__ = []  # model entry points are added by register_model

default_cfgs = generate_default_cfgs(with_published({
    'dbb_resnet18': imagenet_cfg(),
    'dbb_resnet34': imagenet_cfg(),
    'dbb_resnet50': imagenet_cfg(),
    'dbb_resnet101': imagenet_cfg(),
    'dbb_resnet18_cifar': small_image_cfg(),
}))


@register_model
def dbb_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """DBB-ResNet-18."""
    return create_resnet('dbb_resnet18', pretrained, **kwargs)


@register_model
def dbb_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """DBB-ResNet-34."""
    return create_resnet('dbb_resnet34', pretrained, **kwargs)


@register_model
def dbb_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """DBB-ResNet-50."""
    return create_resnet('dbb_resnet50', pretrained, **kwargs)


@register_model
def dbb_resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """DBB-ResNet-101."""
    return create_resnet('dbb_resnet101', pretrained, **kwargs)


@register_model
def dbb_resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """DBB-ResNet-18 for small images: 3x3 stride-1 stem, no max-pooling."""
    return create_resnet('dbb_resnet18_cifar', pretrained, **kwargs)
