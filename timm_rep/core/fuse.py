"""Take rep layers out of a model again: its stock form."""
import copy
from typing import Callable, Dict, List

import torch.nn as nn

from .errors import UserError
from .expand import ModelT
from .walk import annealed_modules, next_sibling, parent_of

__all__ = ['fuse', 'when_fused']

_WHEN_FUSED: List[Callable[[nn.Module], None]] = []


def when_fused(action: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Have a function called with every module of a model that was fused, as a decorator.

    Args:
        action: For example one that lets a model's metadata name what it is now.

    Returns:
        The function.
    """
    _WHEN_FUSED.append(action)
    return action


def fuse(model: ModelT, *, inplace: bool = False) -> ModelT:
    """Turn a rep model into its stock form: plain convolutions, live norms, the module tree and keys of timm's model.

    To fold the norms (and RepVGG's branches) too, call ``timm.utils.reparameterize_model`` on the result.

    Args:
        model: Model with rep layers; without any, it comes back unchanged.
        inplace: Change the model itself instead of a copy.

    Returns:
        The fused model. If its architecture is one of ours with a stock counterpart, its ``pretrained_cfg`` names that.

    Raises:
        UserError: For layers with norms in their branches in training mode. The model is then unchanged.
    """
    replacements: Dict[str, nn.Module] = {}
    for name, module in annealed_modules(model):
        if name == '':
            raise UserError("fuse needs a model around the layer; for one alone use the layer's own fuse()")
        sibling, behind = next_sibling(model, name)
        replacements[name], norm = module.stock_form(behind)
        if norm is not None:
            replacements[sibling] = norm
    if not inplace:
        model = copy.deepcopy(model)
    # A shared layer is one module in several places.
    places: Dict[int, List[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    for name, new_module in replacements.items():
        for place in places[id(model.get_submodule(name))]:
            setattr(*parent_of(model, place), new_module)
    for part in model.modules():
        for action in _WHEN_FUSED:
            action(part)
    return model
