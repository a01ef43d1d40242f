"""From the name of an architecture to its network: a stock network whose convolutions are swapped.

The part of a name before the first ``_`` says which method the layers are of; ``repan`` takes any, by ``rep_layer``,
and makes RepVGG's own branches annealable too. Names that mean the same network share its builder here.
"""
import functools
from typing import Any, Optional, TypeVar, cast

import timm
import torch.nn as nn
from timm.models import ByobNet, ByoModelCfg, EfficientNet, ResNet

from ..core.errors import UserError
from ..core.expand import anneal_repvgg_blocks_, expand_fresh_
from ..core.methods import MethodLike, as_method
from .checkpoint_filter import checkpoint_filter_fn
from .published import build_model
from .stock import RESNETS, build_repvgg, build_resnet, repvgg_kwargs, reset_repvgg_norms_

__all__ = ['create_mobilenetv1', 'create_repvgg', 'create_resnet']

# Names that begin so leave the method to rep_layer, and anneal RepVGG's own branches.
ANY_METHOD = 'repan'

ModelT = TypeVar('ModelT', bound=nn.Module)


def _swapped(model: ModelT, rep_layer: MethodLike, inference_mode: bool) -> ModelT:
    method = as_method(rep_layer)  # an unknown one is refused in stock form too
    return model if inference_mode else expand_fresh_(model, method)


def _build_resnet(rep_layer: MethodLike = 'dbb', inference_mode: bool = False, **kwargs: Any) -> ResNet:
    return _swapped(build_resnet(**kwargs), rep_layer, inference_mode)


def _build_mobilenetv1(rep_layer: MethodLike = 'dbb', inference_mode: bool = False, **kwargs: Any) -> EfficientNet:
    return _swapped(cast(EfficientNet, timm.create_model('mobilenetv1_100', **kwargs)), rep_layer, inference_mode)


def _build_repvgg(
        cfg: ByoModelCfg,
        rep_layer: MethodLike = 'rep',
        inference_mode: bool = False,
        annealed: bool = True,
        **kwargs: Any,
) -> ByobNet:
    # The blocks have 1x1 and identity branches of their own; another layer comes on top, in the KxK branch.
    model = build_repvgg(cfg, **kwargs)
    if not inference_mode:
        reset_repvgg_norms_(model)
    model = _swapped(model, rep_layer, inference_mode)
    return anneal_repvgg_blocks_(model) if annealed and not inference_mode else model


def _create(
        build: Any,
        variant: str,
        pretrained: bool,
        rep_layer: Optional[MethodLike],
        **kwargs: Any,
) -> Any:
    prefix, _, stock = variant.partition('_')
    if prefix != ANY_METHOD:
        if rep_layer is not None:
            raise UserError(f'{variant} has {prefix} layers; {ANY_METHOD}_{stock} takes rep_layer, got {rep_layer!r}')
        build = functools.partial(build, rep_layer=prefix)
    elif rep_layer is not None:
        kwargs['rep_layer'] = rep_layer
    return build_model(build, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


def create_resnet(
        variant: str,
        pretrained: bool = False,
        rep_layer: Optional[MethodLike] = None,
        **kwargs: Any,
) -> ResNet:
    """Create a ResNet, ResNeXt or wide ResNet with rep layers.

    Args:
        variant: Name of the architecture.
        pretrained: Load weights.
        rep_layer: Method of a ``repan_`` model; ``'dbb'`` by default.
        **kwargs: As of timm's.

    Returns:
        The network.

    Raises:
        UserError: For an unknown method, or one for a model whose name says its own.
    """
    stock = RESNETS[variant.partition('_')[2]]
    model: ResNet = _create(_build_resnet, variant, pretrained, rep_layer, **dict(stock, **kwargs))
    return model


def create_repvgg(
        variant: str,
        pretrained: bool = False,
        rep_layer: Optional[MethodLike] = None,
        **kwargs: Any,
) -> ByobNet:
    """Create a RepVGG with rep layers in its KxK branches.

    Args:
        variant: Name of the architecture.
        pretrained: Load weights.
        rep_layer: Method of a ``repan_`` model; by default ``'rep'``, RepVGG's own branches alone.
        **kwargs: As of timm's.

    Returns:
        The network.

    Raises:
        UserError: For an unknown method, or one for a model whose name says its own.
    """
    prefix, _, stock = variant.partition('_')
    build = functools.partial(_build_repvgg, annealed=prefix == ANY_METHOD)
    model: ByobNet = _create(build, variant, pretrained, rep_layer, **dict(repvgg_kwargs(stock), **kwargs))
    return model


def create_mobilenetv1(
        variant: str,
        pretrained: bool = False,
        rep_layer: Optional[MethodLike] = None,
        **kwargs: Any,
) -> EfficientNet:
    """Create a MobileNet-V1 with rep layers.

    Args:
        variant: Name of the architecture.
        pretrained: Load weights.
        rep_layer: Method; ``'dbb'`` by default.
        **kwargs: As of timm's.

    Returns:
        The network.

    Raises:
        UserError: For an unknown method.
    """
    feature_cfg = dict(flatten_sequential=True)
    model: EfficientNet = _create(
        _build_mobilenetv1, variant, pretrained, rep_layer, **dict(dict(feature_cfg=feature_cfg), **kwargs))
    return model
