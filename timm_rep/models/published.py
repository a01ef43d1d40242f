"""Published weights of our models: what ``pretrained=True`` finds, and what it says where there are none."""
import json
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, TypeVar

import torch.nn as nn
from timm.models import build_model_with_cfg, resolve_pretrained_cfg

from ..core.errors import UserError

__all__ = ['build_model', 'published_weights', 'with_published']

REGISTRY = Path(__file__).with_name('published.json')

ModelT = TypeVar('ModelT', bound=nn.Module)
Cfgs = Dict[str, Dict[str, Any]]


def published_weights(registry: Path = REGISTRY) -> Cfgs:
    """The weights that are published, by 'architecture.tag' of our models, as `timm-rep publish` prints the entries.

    Args:
        registry: JSON file.

    Returns:
        What differs from the architecture's own settings, above all ``hf_hub_id``.
    """
    entries = json.loads(registry.read_text())
    return {
        name: {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
        for name, entry in entries.items()
    }


def with_published(cfgs: Cfgs, published: Optional[Mapping[str, Dict[str, Any]]] = None) -> Dict[str, Any]:
    """Add the published weights to the settings of the architectures.

    Args:
        cfgs: Settings by architecture, for timm's ``generate_default_cfgs``.
        published: Published weights; by default those of the registry.

    Returns:
        The settings, with one more entry for each published set of weights of these architectures.
    """
    published = published_weights() if published is None else published
    added = {
        name: {**cfgs[name.partition('.')[0]], **entry}
        for name, entry in published.items() if name.partition('.')[0] in cfgs
    }
    return {**cfgs, **added}


def build_model(
        model_cls: Callable[..., ModelT],
        variant: str,
        pretrained: bool,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> ModelT:
    """Call timm's ``build_model_with_cfg``, which says more where ``pretrained=True`` finds no weights.

    Args:
        model_cls: Builds the model.
        variant: Name of the architecture.
        pretrained: Load weights.
        pretrained_cfg: As timm's.
        pretrained_cfg_overlay: As timm's.
        **kwargs: More of timm's.

    Returns:
        The model.

    Raises:
        UserError: If weights are asked for and none are published.
    """
    if pretrained:
        cfg: Any = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
        if not (cfg.has_weights or cfg.state_dict):
            raise UserError(
                f'no weights of {variant} are published yet. There are two ways to get some: import those of the '
                f'authors (`timm-rep import-official FILE --model {variant} --out DIR`), or train it; then pass '
                'pretrained_cfg_overlay=dict(file=...), or dict(hf_hub_id=...) for weights on the Hub'
            )
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        **kwargs,
    )
