"""RepAn models: timm's ResNet, RepVGG and MobileNet-V1 with side branches that are annealed in time steps.

``rep_layer`` says what the side branches are: ``'dbb'`` (diverse branches), ``'acb'`` (1xK and Kx1), ``'rep'`` (1x1 and
identity) or ``'orepa'`` (linear branches, composed into one kernel at every step: annealing at OREPA's cost, which is
ours and not in the paper). The attach rate and the steps from one time step to the next are in
:mod:`timm_rep.core.annealing`.

`Enhanced Annealing through Re-parameterization` (RepAn, CVPR 2024)
"""
from timm.models import generate_default_cfgs

from .build import register_architectures
from .published import with_published
from .stock import imagenet_cfg, small_image_cfg

__all__ = []  # the architectures are added by register_architectures

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

register_architectures(__name__)
