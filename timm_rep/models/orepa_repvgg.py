"""OREPA-RepVGG: timm's RepVGG with an OREPA layer in place of the convolution of every 3x3 branch.

RepVGG keeps its three branches and their norms, so the OREPA layer has no 1x1 branch of its own and starts
kaiming-uniform with ``a = 1``. As in the official code the norms start at weight one and bias zero, where timm's RepVGG
draws them from N(0.1, 0.1), and the 1x1 branches and the classifier with torch's own values, where timm's are normal.

`Online Convolutional Re-parameterization` - https://arxiv.org/abs/2204.00826 (CVPR 2022)
`RepVGG: Making VGG-style ConvNets Great Again` - https://arxiv.org/abs/2101.03697
"""
from timm.models import generate_default_cfgs

from .build import register_architectures
from .published import with_published
from .stock import imagenet_cfg, small_image_cfg

__all__ = []  # the architectures are added by register_architectures

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

register_architectures(__name__)
