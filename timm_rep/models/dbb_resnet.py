"""DBB-ResNet: timm's ResNet with a Diverse Branch Block in place of every 3x3 convolution and its norm.

The baseline of both papers, for comparisons with the same code around it.

`Diverse Branch Block: Building a Convolution as an Inception-like Unit` - https://arxiv.org/abs/2103.13425
"""
from timm.models import generate_default_cfgs

from .build import register_architectures
from .published import with_published
from .stock import imagenet_cfg, small_image_cfg

__all__ = []  # the architectures are added by register_architectures

default_cfgs = generate_default_cfgs(with_published({
    'dbb_resnet18': imagenet_cfg(),
    'dbb_resnet34': imagenet_cfg(),
    'dbb_resnet50': imagenet_cfg(),
    'dbb_resnet101': imagenet_cfg(),
    'dbb_resnet18_cifar': small_image_cfg(),
}))

register_architectures(__name__)
