"""Networks that a file names: built by timm, from arguments of the network only, and without memory to look at."""
import inspect
from contextlib import contextmanager
from typing import Any, Iterator, Mapping, Optional

import timm
import torch
import torch.nn as nn
from timm.models import build_model_with_cfg
from torch.nn.modules.module import register_module_module_registration_hook

from ..core.errors import UserError
from .hub_errors import HubError, hub_message

__all__ = ['FACTORY_ARGS', 'HUB_PREFIX', 'create_model', 'create_skeleton', 'has_architecture']

# Arguments of timm's factory, not of a network: where weights come from, and where to. No file may give them.
FACTORY_ARGS = {'device', 'dtype', *(
    name for function in (timm.create_model, build_model_with_cfg)
    for name, parameter in inspect.signature(function).parameters.items() if parameter.kind is not parameter.VAR_KEYWORD
)}
HUB_PREFIX = 'hf-hub:'


def has_architecture(model: Any) -> bool:
    """Whether a model says of which architecture of timm's registry it is."""
    cfg = getattr(model, 'pretrained_cfg', None)
    architecture = cfg.get('architecture') if isinstance(cfg, dict) else None
    return isinstance(architecture, str) and timm.is_model(architecture)


def create_model(architecture: str, /, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` with errors that say what the user can do.

    Args:
        architecture: Registered name, or ``'hf-hub:ORG/NAME'`` for one that is described on the Hub.
        **kwargs: Of the model.

    Returns:
        The model, which knows its arguments.

    Raises:
        UserError: If there is no such model, or it does not take the arguments.
        HubError: If the description of the model cannot be had from the Hub.
    """
    on_hub = architecture.startswith(HUB_PREFIX)
    if not on_hub and not timm.is_model(architecture):
        raise UserError(f'unknown model {architecture!r}; `timm-rep list` shows the models with rep layers')
    try:
        model: Any = timm.create_model(architecture, **kwargs)
    except (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as e:
        given = ', '.join(f'{key}={value!r}' for key, value in kwargs.items())
        raise UserError(f'{architecture} cannot be built with {given}: {e}') from e
    except OSError as e:
        if not on_hub:
            raise
        raise HubError(f'{architecture} cannot be looked up, name its architecture: {hub_message(e)}') from None
    if not hasattr(model, '_model_args'):  # older timm
        model._model_args = kwargs
    return model


@contextmanager
def _at_most(modules: int) -> Iterator[None]:
    """Stop the building of a network that has more modules."""
    registered = 0

    def count(*_: Any) -> None:
        nonlocal registered
        registered += 1
        if registered > modules:
            raise UserError(f'the network has more than {modules} modules')

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def create_skeleton(architecture: str, args: Mapping[str, Any], max_modules: Optional[int] = None) -> nn.Module:
    """Build a network whose tensors have shapes but take no memory.

    Args:
        architecture: Registered name.
        args: Of the model.
        max_modules: More modules than that are refused.

    Returns:
        The model, on the meta device.

    Raises:
        UserError: If there is no such model, or it does not take the arguments.
    """
    with torch.device('meta'), _at_most(2 ** 20 if max_modules is None else max_modules):
        return create_model(architecture, **args)
