"""RepAn models: timm's ResNet, RepVGG and MobileNet-V1 with side branches that are annealed in time steps.

``rep_layer`` says what the side branches are: ``'dbb'`` (diverse branches), ``'acb'`` (1xK and Kx1), ``'rep'`` (1x1 and
identity) or ``'orepa'`` (linear branches, composed into one kernel at every step: annealing at OREPA's cost, which is
ours and not in the paper). The attach rate and the steps from one time step to the next are in
:mod:`timm_rep.annealing`.

`Enhanced Annealing through Re-parameterization` (RepAn, CVPR 2024)
"""
from typing import Any, cast

import timm
from timm.models import ByobNet, ByoModelCfg, EfficientNet, ResNet, generate_default_cfgs, register_model

from ..core.expand import anneal_repvgg_blocks_, expand_fresh_
from ..core.methods import as_method
from .checkpoint_filter import checkpoint_filter_fn
from .published import build_model, with_published
from .stock import (
    RESNETS,
    build_repvgg,
    build_resnet,
    imagenet_cfg,
    repvgg_kwargs,
    reset_repvgg_norms_,
    small_image_cfg,
)

__all__ = []


def _build_resnet(rep_layer: str = 'dbb', inference_mode: bool = False, **kwargs: Any) -> ResNet:
    as_method(rep_layer)
    model = build_resnet(**kwargs)
    return model if inference_mode else expand_fresh_(model, rep_layer)


def _build_repvgg(cfg: ByoModelCfg, rep_layer: str = 'rep', inference_mode: bool = False, **kwargs: Any) -> ByobNet:
    as_method(rep_layer)
    model = build_repvgg(cfg, **kwargs)
    if inference_mode:
        return model
    # The blocks have 1x1 and identity branches of their own; another layer comes on top, in the KxK branch.
    return anneal_repvgg_blocks_(expand_fresh_(reset_repvgg_norms_(model), rep_layer))


def _build_mobilenetv1(rep_layer: str = 'dbb', inference_mode: bool = False, **kwargs: Any) -> EfficientNet:
    as_method(rep_layer)
    model = cast(EfficientNet, timm.create_model('mobilenetv1_100', **kwargs))
    return model if inference_mode else expand_fresh_(model, rep_layer)


def _create_repan_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> ResNet:
    return build_model(
        _build_resnet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **dict(RESNETS[variant[len('repan_'):]], **kwargs),
    )


def _create_repan_repvgg(variant: str, pretrained: bool = False, **kwargs: Any) -> ByobNet:
    return build_model(
        _build_repvgg,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **dict(repvgg_kwargs(variant[len('repan_'):]), **kwargs),
    )


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
    return _create_repan_resnet('repan_resnet18', pretrained, **kwargs)


@register_model
def repan_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """RepAn-ResNet-34."""
    return _create_repan_resnet('repan_resnet34', pretrained, **kwargs)


@register_model
def repan_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """RepAn-ResNet-50."""
    return _create_repan_resnet('repan_resnet50', pretrained, **kwargs)


@register_model
def repan_resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """RepAn-ResNet-101."""
    return _create_repan_resnet('repan_resnet101', pretrained, **kwargs)


@register_model
def repan_resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """RepAn-ResNet-18 for small images: 3x3 stride-1 stem, no max-pooling."""
    return _create_repan_resnet('repan_resnet18_cifar', pretrained, **kwargs)


@register_model
def repan_repvgg_a0(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-A0."""
    return _create_repan_repvgg('repan_repvgg_a0', pretrained, **kwargs)


@register_model
def repan_repvgg_a1(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-A1."""
    return _create_repan_repvgg('repan_repvgg_a1', pretrained, **kwargs)


@register_model
def repan_repvgg_a2(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-A2."""
    return _create_repan_repvgg('repan_repvgg_a2', pretrained, **kwargs)


@register_model
def repan_repvgg_b0(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-B0."""
    return _create_repan_repvgg('repan_repvgg_b0', pretrained, **kwargs)


@register_model
def repan_repvgg_b1(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-B1."""
    return _create_repan_repvgg('repan_repvgg_b1', pretrained, **kwargs)


@register_model
def repan_repvgg_b1g4(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-B1G4."""
    return _create_repan_repvgg('repan_repvgg_b1g4', pretrained, **kwargs)


@register_model
def repan_repvgg_b2(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-B2."""
    return _create_repan_repvgg('repan_repvgg_b2', pretrained, **kwargs)


@register_model
def repan_repvgg_b2g4(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-B2G4."""
    return _create_repan_repvgg('repan_repvgg_b2g4', pretrained, **kwargs)


@register_model
def repan_repvgg_b3(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-B3."""
    return _create_repan_repvgg('repan_repvgg_b3', pretrained, **kwargs)


@register_model
def repan_repvgg_b3g4(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-B3G4."""
    return _create_repan_repvgg('repan_repvgg_b3g4', pretrained, **kwargs)


@register_model
def repan_repvgg_a0_cifar(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-A0 for small images."""
    return _create_repan_repvgg('repan_repvgg_a0_cifar', pretrained, **kwargs)


@register_model
def repan_repvgg_a1_cifar(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-A1 for small images."""
    return _create_repan_repvgg('repan_repvgg_a1_cifar', pretrained, **kwargs)


@register_model
def repan_repvgg_a2_cifar(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-A2 for small images."""
    return _create_repan_repvgg('repan_repvgg_a2_cifar', pretrained, **kwargs)


@register_model
def repan_repvgg_b0_cifar(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """RepAn-RepVGG-B0 for small images."""
    return _create_repan_repvgg('repan_repvgg_b0_cifar', pretrained, **kwargs)


@register_model
def repan_mobilenetv1_100(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """RepAn-MobileNet-V1."""
    return build_model(
        _build_mobilenetv1,
        'repan_mobilenetv1_100',
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(flatten_sequential=True),
        **kwargs,
    )
