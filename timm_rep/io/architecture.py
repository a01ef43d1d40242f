"""Networks that a file names: built by timm, from arguments of the network only."""
import inspect
from typing import Any

import timm
import torch.nn as nn
from timm.models import build_model_with_cfg

from ..core.errors import UserError
from .hub_errors import HubError, hub_message

__all__ = ['FACTORY_ARGS', 'HUB_PREFIX', 'create_model']

# Arguments of timm's factory, not of a network: where weights come from, and where to. No file may give them.
FACTORY_ARGS = {'device', 'dtype', *(
    name for function in (timm.create_model, build_model_with_cfg)
    for name, parameter in inspect.signature(function).parameters.items() if parameter.kind is not parameter.VAR_KEYWORD
)}
HUB_PREFIX = 'hf-hub:'


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
