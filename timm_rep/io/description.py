"""What a model is, as plain data in the metadata of its file: architecture, arguments, expansion, input settings."""
import dataclasses
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

import timm
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch.overrides import TorchFunctionMode

from .._version import __version__
from ..core.errors import UserError
from ..core.expand import expand_as_
from ..core.expansion import expansion_of, methods_from_list, norms_from_list
from ..core.layers import AnnealedModule, RepLayer
from ..core.layers.fixed import own_methods
from ..core.methods import Method
from ..core.walk import image_channels
from ..models.names import OWN_ARGS, TRAINING_PREFIXES, plain_args
from ..models.settings import INPUT_SETTINGS, check_input_size, with_tuples
from .architecture import FACTORY_ARGS, create_model

__all__ = ['SETTINGS_FIELDS', 'Description', 'describe', 'read_description', 'say_settings_']

_logger = logging.getLogger(__name__)

# Names of the metadata. The first marks our files and says which version wrote them.
VERSION, ARCHITECTURE, MODEL_ARGS, EXPANSION, SETTINGS = (
    'timm_rep', 'architecture', 'model_args', 'expansion', 'pretrained_cfg')
# What is kept of the model's pretrained_cfg: what it must be fed with.
SETTINGS_FIELDS = ('pool_size', *INPUT_SETTINGS)
# They do nothing, or nothing once trained.
NO_PART_OF_THE_FUNCTION = ('Identity', 'Drop')
TRAINING_NUMBERS = ('_', 'drop', 'momentum')
# How a network runs, and what its weights tell.
NO_SETTINGS = ('training', 'p', 'inplace', 'grad_checkpointing', 'fused_attn', 'distilled_training', 'in_chans')
# The same function in eval mode.
ALIKE: Mapping[type, type] = {
    nn.BatchNorm1d: nn.BatchNorm2d, nn.SyncBatchNorm: nn.BatchNorm2d, SyncBatchNormAct: BatchNormAct2d}


@dataclass(frozen=True)
class Description:
    """What a model is.

    Attributes:
        architecture: Its registered name; None if timm cannot build its stock form.
        model_args: Further arguments of ``timm.create_model``.
        methods: The method of every rep layer by its name; empty for a stock model.
        settings: What it must be fed with, as in a ``pretrained_cfg``.
        norms: Names of norms that layers have taken in which are not right behind them, by the layers' names.
    """

    architecture: Optional[str]
    model_args: Dict[str, Any]
    methods: Dict[str, Method]
    settings: Dict[str, Any]
    norms: Dict[str, str] = dataclasses.field(default_factory=dict)

    def build(self) -> nn.Module:
        """The model, with weights that are still to be loaded.

        Raises:
            Exception: Whatever timm makes of strange arguments.
        """
        assert self.architecture is not None
        args = self.model_args
        if self.architecture.startswith(TRAINING_PREFIXES):
            args = dict({key: value for key, value in args.items() if key not in OWN_ARGS}, inference_mode=True)
        model: Any = expand_as_(create_model(self.architecture, **args), self.methods, self.norms)
        model._model_args = dict(self.model_args)
        return model


def say_settings_(model: Any, settings: Mapping[str, Any]) -> None:
    """Let a model's metadata say what it must be fed with.

    Args:
        model: A model of timm, in either form.
        settings: Fields of its ``pretrained_cfg``, as JSON has them.
    """
    if model.pretrained_cfg is not None and settings:
        model.pretrained_cfg = model.default_cfg = {
            **model.pretrained_cfg, 'pool_size': None, **with_tuples(settings)}


class _NoStartValues(TorchFunctionMode):
    """Draws no start values: tensors without data have no use for them, and take ten times as long over them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_) or getattr(func, '__module__', '') == nn.init.__name__:
            return args[0] if args else kwargs['tensor']
        return func(*args, **kwargs)


def _unsaid(module: nn.Module) -> str:
    """What modules need not say in their text: numbers, and methods that were put on the module itself."""
    said = [
        f'{name}={value}' for name, value in sorted(vars(module).items())
        if isinstance(value, float) and not (name == 'p' or name.startswith(TRAINING_NUMBERS))]
    said += [f'another {name}' for name in sorted(own_methods(module))]
    return ' '.join(said)


def _structure(model: nn.Module) -> Dict[str, str]:
    """All that tells two networks apart, besides the values and the precision of their weights."""
    found = {key: str(tuple(value.shape)) for key, value in model.state_dict().items()}
    for name, module in model.named_modules():
        kind = type(module).__name__
        found[f'{name} (unsaid)'] = _unsaid(module)
        if isinstance(module, (nn.Conv2d, RepLayer)):
            conv: Any = module
            found[f'{name} (geometry)'] = (
                f'{conv.stride} {conv.padding} {conv.dilation} {conv.groups} {conv.padding_mode}')
        elif any(module._parameters) or any(module._buffers):
            settings = re.sub(r'momentum=[^,]*', '', module.extra_repr())  # momentum is no part of the function
            found[f'{name} (settings)'] = settings
        elif not (list(module.children()) or module.state_dict() or kind.startswith(NO_PART_OF_THE_FUNCTION)):
            found[name] = repr(module)
    return found


def _is_setting(value: Any) -> bool:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(part, (bool, int, float, str, type(None))) for part in parts)


def _other_than(model: nn.Module, rebuilt: nn.Module) -> str:
    """The first module of a network that has another class than in a network of the same structure, or other settings.

    What only one of the two has besides is no setting of timm's.
    """
    twins = dict(rebuilt.named_modules())
    for name, module in model.named_modules():
        twin = twins.get(name)
        kinds = [ALIKE.get(type(part), type(part)) for part in (module, twin)]
        if twin is None or any(kind.__name__.startswith(NO_PART_OF_THE_FUNCTION) for kind in kinds):
            continue
        if len({f'{kind.__module__}.{kind.__qualname__}' for kind in kinds}) > 1:
            return f'{name or "the network"} is a {kinds[0].__name__}'
        for key, value in () if isinstance(module, AnnealedModule) else vars(twin).items():
            own = vars(module).get(key, value)
            known = not key.startswith(TRAINING_NUMBERS) and key not in NO_SETTINGS
            if known and own is not value and _is_setting(own) and _is_setting(value) and own != value:
                return f'{key} of {name or "the network"} is {own!r}'
    return ''


def _architecture_of(model: Any) -> Dict[str, str]:
    """Metadata that say how timm builds the stock form; none, with a warning, if it would not be this model's."""
    cfg = model.pretrained_cfg
    args = plain_args(model)
    if not args.get('features_only'):
        args.update(in_chans=image_channels(model))
        if isinstance(getattr(model, 'num_classes', None), int):
            args.update(num_classes=model.num_classes)
    try:
        metadata = {
            ARCHITECTURE: cfg['architecture'],
            MODEL_ARGS: json.dumps(args, sort_keys=True),
            SETTINGS: json.dumps({key: cfg[key] for key in SETTINGS_FIELDS if cfg.get(key) is not None}),
        }
        with torch.device('meta'), _NoStartValues():
            expansion = expansion_of(model)
            rebuilt = dataclasses.replace(
                _description(metadata), methods=expansion.methods, norms=expansion.norms).build()
        why = _other_than(model, rebuilt) if _structure(model) == _structure(rebuilt) else 'its modules are others'
        if not why:
            return metadata
    except (TypeError, UserError) as e:
        why = str(e)
    _logger.warning(
        'the file will not say how to build its model, which is not %s as timm builds it (%s); it is to be loaded with '
        'load(file, into=stock_model)', cfg['architecture'], why)
    return {}


def describe(model: nn.Module) -> Dict[str, str]:
    """Metadata for the file of a model.

    Args:
        model: Any model, in training or stock form.

    Returns:
        Texts by name.
    """
    metadata = {'format': 'pt', VERSION: __version__, EXPANSION: json.dumps(expansion_of(model).to_list())}
    cfg = getattr(model, 'pretrained_cfg', None)
    if isinstance(cfg, dict) and timm.is_model(cfg.get('architecture') or ''):
        metadata.update(_architecture_of(model))
    return metadata


def read_description(metadata: Mapping[str, str], path: Path) -> Optional[Description]:
    """Read the metadata of a file.

    Args:
        metadata: Texts by name.
        path: The file, for errors.

    Returns:
        The description; None if the file is not one of ours.

    Raises:
        UserError: If the metadata are not what :func:`describe` gives, name what is not known here, or ask for weights
            from elsewhere.
    """
    if VERSION not in metadata:
        return None
    try:
        return _description(metadata)
    except UserError as e:
        raise UserError(f'{path} does not describe its model: {e}') from e


def _description(metadata: Mapping[str, str]) -> Description:
    architecture = metadata.get(ARCHITECTURE)
    if architecture is not None and not timm.is_model(architecture):
        raise UserError(f'{architecture!r} is not registered with timm')
    args = _parse(metadata, MODEL_ARGS, dict)
    refused = sorted(FACTORY_ARGS & args.keys())
    if refused:
        raise UserError(f'{", ".join(refused)} are no arguments of a network')
    given = _parse(metadata, SETTINGS, dict)
    settings = {key: given[key] for key in SETTINGS_FIELDS if given.get(key) is not None}
    if 'input_size' in settings:
        check_input_size(settings['input_size'])
    expansion = _parse(metadata, EXPANSION, list)
    return Description(architecture, args, methods_from_list(expansion), settings, norms_from_list(expansion))


def _parse(metadata: Mapping[str, str], name: str, kind: type) -> Any:
    try:
        value = json.loads(metadata.get(name, json.dumps(kind())))
    except (ValueError, RecursionError) as e:
        raise UserError(f'{name} is not JSON: {e}') from e
    if not isinstance(value, kind):
        raise UserError(f'{name} must be a {kind.__name__}')
    return value
