"""OREPA-ResNet: timm's ResNet, ResNeXt and wide ResNet with OREPA layers in place of the convolutions.

Every 3x3 becomes an OREPA block, the 7x7 stem a squeezed stack of 3x3 blocks, the 1x1 of bottlenecks (their shortcuts
too) Rep-1x1; the shortcuts of basic blocks stay plain. Norms and activations are the host's. Start values are those of
the official code: the last norm of every block at gain one (``zero_init_last=True`` for timm's zero), the plain
shortcuts with torch's own values.

`Online Convolutional Re-parameterization` - https://arxiv.org/abs/2204.00826 (CVPR 2022)
"""
from timm.models import generate_default_cfgs

from .build import register_architectures
from .published import with_published
from .stock import imagenet_cfg, small_image_cfg

__all__ = []  # the architectures are added by register_architectures

default_cfgs = generate_default_cfgs(with_published({
    'orepa_resnet18': imagenet_cfg(),
    'orepa_resnet34': imagenet_cfg(),
    'orepa_resnet50': imagenet_cfg(),
    'orepa_resnet101': imagenet_cfg(),
    'orepa_wide_resnet18_2': imagenet_cfg(),
    'orepa_resnext50_32x4d': imagenet_cfg(),
    'orepa_resnet18_cifar': small_image_cfg(),
}))

register_architectures(__name__)
