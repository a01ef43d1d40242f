"""Networks that a file names: built by timm, from arguments of the network only, and no larger than networks are."""
import inspect
import reprlib
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Mapping, Optional, Sequence, Tuple

import timm
import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import build_model_with_cfg, get_pretrained_cfg, parse_model_name
from torch.nn.modules import module as torch_module

from ..core.errors import UserError
from ..core.walk import image_channels
from .hub_errors import HubError, hub_message

__all__ = [
    'FACTORY_ARGS', 'HUB_PREFIX', 'check_network_args', 'create_model', 'input_settings',
    'no_endless_network', 'per_channel',
]

# Arguments of timm's factory, not of a network: where weights come from, and where to. No file may give them.
FACTORY_ARGS = {'device', 'dtype', *(
    name for function in (timm.create_model, build_model_with_cfg)
    for name, parameter in inspect.signature(function).parameters.items() if parameter.kind is not parameter.VAR_KEYWORD
)}
HUB_PREFIX = 'hf-hub:'
# Depths, widths, sizes and factors: timm repeats, and allocates, as often as they say. Classes only widen a layer.
MAX_NUMBER = 10 ** 4
UNBOUNDED_ARGS = ('num_classes',)
# Modules and parameters: three times those of HRNet-W64 with DBB layers, ten times those of timm's largest networks.
MAX_PARTS = 30_000


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _numbers(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _numbers(part)


def check_network_args(args: Mapping[str, Any]) -> None:
    """Refuse arguments that timm would build for hours, or until no memory is left.

    Args:
        args: Plain data, by the names of arguments.

    Raises:
        UserError: For larger numbers than there are in a network.
    """
    for name, value in args.items():
        if name not in UNBOUNDED_ARGS and any(abs(number) > MAX_NUMBER for number in _numbers(value)):
            raise UserError(f'{name} has numbers above {MAX_NUMBER}, more than any network is built of')


def per_channel(values: Sequence[float], channels: int) -> Tuple[float, ...]:
    """A mean or deviation for each channel: the average where there are others, as timm's loader trains with."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def input_settings(model: Any, args: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
    """What the images of a model go through.

    Args:
        model: CNN with a ``pretrained_cfg``.
        args: Arguments of train.py that say otherwise.

    Returns:
        What ``timm.data.resolve_data_config`` gives, with means and deviations of the model's channels.

    Raises:
        AssertionError: Or a TypeError, for settings that timm does not understand.
    """
    config = resolve_data_config(dict(args or {}), model=model)
    channels = image_channels(model)
    return dict(config, **{key: per_channel(config[key], channels) for key in ('mean', 'std')})


@contextmanager
def no_endless_network() -> Iterator[None]:
    """Stop timm where what it builds has more parts than any network.

    Raises:
        UserError: If it has.
    """
    left = MAX_PARTS

    def count(*registered: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError(f'it has more than {MAX_PARTS} modules and parameters, which no network has')

    hooks = [
        register(count) for register in (
            torch_module.register_module_module_registration_hook,
            torch_module.register_module_parameter_registration_hook,
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _source_of(architecture: str) -> str:
    """Where timm finds the description of a model: 'hf-hub', 'local-dir', or '' for its registry."""
    try:
        source = parse_model_name(architecture)[0]
    except (AssertionError, ValueError):  # of none that timm knows
        source = None
    return '' if source in (None, 'timm') else source


def check_known(architecture: str) -> None:
    """Raise a UserError if timm has no model of a name; what is described elsewhere is not looked at."""
    if _source_of(architecture):
        return
    if not timm.is_model(architecture):
        raise UserError(f'unknown model {architecture!r}; `timm-rep list` shows the models with rep layers')
    try:
        get_pretrained_cfg(architecture)
    except RuntimeError as e:
        raise UserError(f'unknown model {architecture!r}: {e}') from None  # timm names the tag


def create_model(architecture: str, /, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` with errors that say what the user can do.

    Args:
        architecture: Registered name; ``'hf-hub:ORG/NAME'`` for one that is described on the Hub, or
            ``'local-dir:FOLDER'`` in a folder.
        **kwargs: Of the model.

    Returns:
        The model, which knows its arguments.

    Raises:
        UserError: If there is no such model or folder, or the model does not take the arguments.
        HubError: If the description of the model cannot be had from the Hub.
    """
    source = _source_of(architecture)
    check_known(architecture)
    check_network_args(kwargs)
    try:
        with no_endless_network():
            model: Any = timm.create_model(architecture, **kwargs)
    except OSError as e:
        if not source:
            raise
        kind, why = (HubError, hub_message(e)) if source == 'hf-hub' else (UserError, str(e))
        raise kind(f'{architecture} cannot be looked up, name its architecture: {why}') from None
    except (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, ValueError, RuntimeError) as e:
        if kwargs.get('pretrained') and isinstance(e, (ValueError, RuntimeError)):  # of the weights
            raise
        given = ', '.join(f'{key}={reprlib.repr(value)}' for key, value in kwargs.items())
        raise UserError(f'{architecture} cannot be built with {given}: {e}') from e
    if not hasattr(model, '_model_args'):  # older timm
        model._model_args = kwargs
    return model
