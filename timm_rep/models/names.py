"""Names of architectures: which stock network a model of ours fuses into, and how it says so."""
import logging
from typing import Any, Dict, Mapping, Tuple

import timm
import torch.nn as nn

from ..core.fuse import when_fused
from ..core.methods import Method

__all__ = [
    'OWN_ARGS', 'TRAINING_PREFIXES', 'is_training_form', 'plain_args', 'registering_package', 'stock_architecture',
    'stock_form_args', 'timm_has',
]

_logger = logging.getLogger(__name__)

# Prefixes of our architectures whose stock form is the timm architecture named behind it.
TRAINING_PREFIXES = ('orepa_', 'dbb_', 'repan_')
# Arguments that our architectures have and their stock forms have not.
OWN_ARGS = frozenset(('inference_mode', 'rep_layer'))


def stock_architecture(architecture: str) -> str:
    """Name of the timm architecture that a fused model of ours is.

    Args:
        architecture: Name of a registered architecture.

    Returns:
        The name without our prefix if timm has that architecture, else the name itself.
    """
    for prefix in TRAINING_PREFIXES:
        if architecture.startswith(prefix) and timm.is_model(architecture[len(prefix):]):
            return architecture[len(prefix):]
    return architecture


def is_training_form(architecture: str) -> bool:
    """Whether an architecture is one of ours, which have rep layers unless ``inference_mode=True`` is given."""
    return architecture.startswith(TRAINING_PREFIXES)


def stock_form_args(architecture: str) -> Dict[str, Any]:
    """What builds the stock form, besides the name that :func:`stock_architecture` gives: nothing where timm has it."""
    return dict(inference_mode=True) if is_training_form(stock_architecture(architecture)) else {}


def plain_args(model: Any) -> Dict[str, Any]:
    """The arguments that a model was built with, as timm keeps them, with methods by their names."""
    args = getattr(model, '_model_args', {})
    return {key: value.name if isinstance(value, Method) else value for key, value in args.items()}


def registering_package(architecture: str) -> str:
    """The package whose import makes a registered architecture known: ``'timm'``, ours, or that of somebody else."""
    return timm.model_entrypoint(architecture).__module__.partition('.')[0]


def timm_has(architecture: str) -> bool:
    """Whether timm alone builds a registered architecture, without any other package."""
    return registering_package(architecture) == 'timm'


def _as_stock(architecture: str, args: Mapping[str, Any]) -> Tuple[str, Dict[str, Any]]:
    """Architecture and model arguments of the stock form."""
    stock_args = {key: value for key, value in args.items() if key not in OWN_ARGS}
    return stock_architecture(architecture), dict(stock_args, **stock_form_args(architecture))


@when_fused
def name_stock_architecture(model: Any) -> None:
    """Let the model's own metadata, which exports and reloads go by, name what it is now."""
    cfg = getattr(model, 'pretrained_cfg', None)
    architecture = cfg.get('architecture', '') if isinstance(cfg, dict) else ''
    if not isinstance(cfg, dict) or not is_training_form(architecture):
        return
    stock, model._model_args = _as_stock(architecture, getattr(model, '_model_args', {}))
    if stock != architecture:
        stock_cfg = timm.get_pretrained_cfg(stock)
        first_conv = stock_cfg.first_conv if stock_cfg else cfg.get('first_conv')
        model.pretrained_cfg = model.default_cfg = dict(cfg, architecture=stock, first_conv=first_conv)
        model._traits = dict(getattr(model, '_traits', {}), first_conv=first_conv)


@when_fused
def name_stock_architecture_in_config(model: nn.Module) -> None:
    """The same for configurations of modules around the network (transformers' ``TimmWrapper...``, backbones)."""
    own: Any = getattr(model, 'config', None)
    for config in (own, *vars(own).values()) if hasattr(own, '__dict__') else ():
        architecture, backbone = (getattr(config, name, None) for name in ('architecture', 'backbone'))
        if isinstance(architecture, str) and is_training_form(architecture):
            config.architecture, config.model_args = _as_stock(architecture, getattr(config, 'model_args', None) or {})
        if isinstance(backbone, str) and is_training_form(backbone):
            config.backbone = stock_architecture(backbone)
            if stock_form_args(backbone):
                _logger.warning('a configuration with backbone=%r builds the training form, not this one', backbone)
