"""From the name of an architecture to its network: a stock network whose convolutions are swapped.

The part of a name before the first ``_`` says which method the layers are of; ``repan`` takes any, by ``rep_layer``,
and makes RepVGG's own branches annealable too. Names that mean the same network share its builder here.

ResNets and RepVGGs with OREPA layers start as the official ones: what stays plain (shortcuts, RepVGG's 1x1, classifier)
with torch's own values, and the last norm of a residual block at gain one; ``zero_init_last=True`` starts it at zero,
as timm's ResNets do by default, where a block is then its shortcut. All else starts as timm's networks.
"""
import functools
import sys
from typing import Any, Dict, Optional, TypeVar

import timm
import torch.nn as nn
from timm.models import ByobNet, ByoModelCfg, ResNet, register_model
from timm.models._builder import pretrained_cfg_for_features

from ..core.errors import UserError
from ..core.expand import anneal_repvgg_blocks_, expand_fresh_
from ..core.layers import Orepa
from ..core.methods import MethodLike, as_method
from .checkpoint_filter import checkpoint_filter_fn
from .published import build_model
from .stock import RESNETS, build_repvgg, build_resnet, repvgg_kwargs, reset_repvgg_norms_, start_as_torch_

__all__ = ['register_architectures']

# Names that begin so leave the method to rep_layer, and anneal RepVGG's own branches.
ANY_METHOD = 'repan'

# What timm's class for feature maps alone does not take, and that weights may have more than it.
NO_CLASSIFIER: Dict[str, Any] = dict(
    kwargs_filter=('num_classes', 'num_features', 'head_conv', 'global_pool'), pretrained_strict=False)

ModelT = TypeVar('ModelT', bound=nn.Module)


def _swapped(model: ModelT, rep_layer: MethodLike, inference_mode: bool) -> ModelT:
    method = as_method(rep_layer)  # an unknown one is refused in stock form too
    return model if inference_mode else expand_fresh_(model, method)


def _build_resnet(rep_layer: MethodLike = 'dbb', inference_mode: bool = False, **kwargs: Any) -> ResNet:
    official = not inference_mode and isinstance(as_method(rep_layer), Orepa)
    if official:
        kwargs.setdefault('zero_init_last', False)
    model = build_resnet(**kwargs)
    if official:
        start_as_torch_(model)
    return _swapped(model, rep_layer, inference_mode)


def _build_mobilenetv1(rep_layer: MethodLike = 'dbb', inference_mode: bool = False, **kwargs: Any) -> nn.Module:
    model: nn.Module = timm.create_model('mobilenetv1_100', **kwargs)
    return _swapped(model, rep_layer, inference_mode)


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
        if isinstance(as_method(rep_layer), Orepa):
            start_as_torch_(model)
    model = _swapped(model, rep_layer, inference_mode)
    return anneal_repvgg_blocks_(model) if annealed and not inference_mode else model


def _features_alone(kwargs: Dict[str, Any]) -> bool:
    """Whether timm gives a network of the EfficientNet family a class of its own for its feature maps."""
    return bool(kwargs.get('features_only')) and not {'feature_cfg', 'feature_cls'} & set(kwargs)


def _create(variant: str, pretrained: bool, rep_layer: Optional[MethodLike] = None, **kwargs: Any) -> nn.Module:
    prefix, _, stock = variant.partition('_')
    build: Any
    features_alone = False
    if stock in RESNETS:
        build, defaults = _build_resnet, RESNETS[stock]
    elif stock.startswith('repvgg'):
        build, defaults = functools.partial(_build_repvgg, annealed=prefix == ANY_METHOD), repvgg_kwargs(stock)
    else:
        build, defaults = _build_mobilenetv1, {}
        features_alone = _features_alone(kwargs)
        if features_alone:
            del kwargs['features_only']
            build, defaults = functools.partial(build, features_only=True), NO_CLASSIFIER
    if prefix != ANY_METHOD:
        if rep_layer is not None:
            raise UserError(f'{variant} has {prefix} layers; {ANY_METHOD}_{stock} takes rep_layer, got {rep_layer!r}')
        rep_layer = prefix
    if rep_layer is not None:
        build = functools.partial(build, rep_layer=rep_layer)
    model: Any = build_model(
        build, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **{**defaults, **kwargs})
    if features_alone:
        model.pretrained_cfg = model.default_cfg = pretrained_cfg_for_features(model.pretrained_cfg)
    return model


def _entry_point(variant: str, module_name: str) -> Any:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(variant, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = variant
    create.__module__ = module_name
    return register_model(create)


def register_architectures(module_name: str) -> None:
    """Register the architectures of a module with timm, each as a function of the module.

    Args:
        module_name: Module whose ``default_cfgs`` name them.
    """
    module: Any = sys.modules[module_name]
    for variant in module.default_cfgs:
        setattr(module, variant, _entry_point(variant, module_name))
