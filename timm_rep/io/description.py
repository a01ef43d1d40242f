"""What a model is, as plain data in the metadata of its file: architecture, arguments, expansion, input settings."""
import dataclasses
import json
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

import timm
import torch
import torch.nn as nn
from torch import Tensor

from .._version import __version__
from ..core.errors import UserError
from ..core.expand import expand_as_
from ..core.expansion import expansion_of, methods_from_list
from ..core.layers import RepLayer
from ..core.methods import Method
from ..core.walk import image_channels
from ..models.names import OWN_ARGS, TRAINING_PREFIXES
from .architecture import FACTORY_ARGS, create_model, create_skeleton, has_architecture
from .runs import plain_args

__all__ = ['Description', 'check_sum', 'describe', 'read_description']

_logger = logging.getLogger(__name__)

# Names of the metadata. The first marks our files and says which version wrote them.
VERSION, ARCHITECTURE, MODEL_ARGS, EXPANSION, SETTINGS = (
    'timm_rep', 'architecture', 'model_args', 'expansion', 'pretrained_cfg')
CHECK_SUM = 'crc32'
# What is kept of the model's pretrained_cfg: what it must be fed with.
SETTINGS_FIELDS = ('input_size', 'pool_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
# What a file may ask for: characters in all, the sum of all numbers among its arguments, modules of the network.
MAX_CHARACTERS = 2 ** 20
MAX_NUMBERS = 2 ** 22
MODULES_PER_TENSOR, MODULES_MORE = 16, 1000
# Zero by default; timm's train.py gives them all the same.
DROP_RATES = ('drop_rate', 'drop_path_rate', 'drop_block_rate')
# They do nothing, or nothing once trained.
NO_PART_OF_THE_FUNCTION = ('Identity', 'Drop')


@dataclass(frozen=True)
class Description:
    """What a model is.

    Attributes:
        architecture: Its registered name; None if timm cannot build its stock form.
        model_args: Further arguments of ``timm.create_model``.
        methods: The method of every rep layer by its name; empty for a stock model.
        settings: What it must be fed with, as in a ``pretrained_cfg``.
    """

    architecture: Optional[str]
    model_args: Dict[str, Any]
    methods: Dict[str, Method]
    settings: Dict[str, Any]

    def _stock_args(self) -> Dict[str, Any]:
        if not (self.architecture or '').startswith(TRAINING_PREFIXES):
            return self.model_args
        return dict({key: value for key, value in self.model_args.items() if key not in OWN_ARGS}, inference_mode=True)

    def expand_(self, model: nn.Module) -> nn.Module:
        """Expand a stock model as this one was, in place.

        Raises:
            UserError: If it cannot be. The model is then unchanged.
        """
        try:
            return expand_as_(model, self.methods)
        except Exception as e:  # a file may give a method's options any values
            raise UserError(f'{type(model).__name__} cannot be expanded as described: {e}') from e

    def skeleton(self, tensors: Optional[int] = None) -> nn.Module:
        """The model without memory for its weights, to compare with.

        Args:
            tensors: How many it should have; a much larger network is refused.

        Raises:
            UserError: If it cannot be built.
        """
        assert self.architecture is not None
        max_modules = None if tensors is None else MODULES_PER_TENSOR * tensors + MODULES_MORE
        try:
            model = create_skeleton(self.architecture, self._stock_args(), max_modules)
        except Exception as e:  # a file may give timm any arguments
            raise UserError(f'{self.architecture} cannot be built with {self.model_args}: {e}') from e
        return self.expand_(model)

    def build(self) -> nn.Module:
        """The model, with weights that are still to be loaded."""
        assert self.architecture is not None
        model: Any = self.expand_(create_model(self.architecture, **self._stock_args()))
        model._model_args = dict(self.model_args)
        if model.pretrained_cfg is not None and self.settings:
            settings = {key: tuple(value) if isinstance(value, list) else value for key, value in self.settings.items()}
            model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, 'pool_size': None, **settings}
        return model


def check_sum(metadata: Mapping[str, str], weights: Mapping[str, Tensor]) -> str:
    """A sum over all that a file holds, to tell damaged ones.

    Args:
        metadata: Texts by name; the sum itself does not count.
        weights: Tensors on the CPU.

    Returns:
        Eight digits.
    """
    total = zlib.crc32(repr(sorted((key, text) for key, text in metadata.items() if key != CHECK_SUM)).encode())
    for key in sorted(weights):
        tensor = weights[key]
        total = zlib.crc32(f'{key} {tensor.dtype} {tuple(tensor.shape)}'.encode(), total)
        if tensor.numel():
            total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return f'{total:08x}'


def _structure(model: nn.Module) -> Dict[str, str]:
    """All that tells two networks apart, besides the values of their weights."""
    found = {key: f'{value.dtype} {tuple(value.shape)}' for key, value in model.state_dict().items()}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, (nn.Conv2d, RepLayer)):
            conv: Any = module
            found[f'{name} (geometry)'] = f'{conv.stride} {conv.padding} {conv.dilation} {conv.groups}'
        elif not (any(module.children()) or module.state_dict() or kind.startswith(NO_PART_OF_THE_FUNCTION)):
            found[name] = repr(module)
    return found


def _first_difference(model: nn.Module, other: nn.Module) -> Optional[str]:
    one, two = _structure(model), _structure(other.to(next(model.parameters()).dtype))
    differing = sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))
    return f'{differing[0]} is {one.get(differing[0])}, not {two.get(differing[0])}' if differing else None


def _architecture_of(model: Any) -> Dict[str, str]:
    """Metadata that say how timm builds the stock form; none, with a warning, if it would not be this model's."""
    cfg = model.pretrained_cfg
    args = {key: value for key, value in getattr(model, '_model_args', {}).items() if value or key not in DROP_RATES}
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
        rebuilt = dataclasses.replace(_description(metadata), methods=expansion_of(model).methods).skeleton()
        why = _first_difference(model, rebuilt)
    except (TypeError, UserError) as e:
        why = str(e)
    if why is None:
        return metadata
    _logger.warning(
        'the file will not say how to build its model, which is not %s as timm builds it (%s); it is to be loaded with '
        'load(file, into=stock_model)', cfg['architecture'], why)
    return {}


def describe(model: nn.Module, weights: Mapping[str, Tensor]) -> Dict[str, str]:
    """Metadata for the file of a model.

    Args:
        model: Any model, in training or stock form.
        weights: Its weights, on the CPU.

    Returns:
        Texts by name.

    Raises:
        UserError: If the options of a method are no plain data.
    """
    try:
        expansion = json.dumps(expansion_of(model).to_list())
    except TypeError as e:
        raise UserError(f'the expansion cannot be written down: {e}') from e
    metadata = {'format': 'pt', VERSION: __version__, EXPANSION: expansion}
    if has_architecture(model):
        metadata.update(_architecture_of(model))
    return {**metadata, CHECK_SUM: check_sum(metadata, weights)}


def read_description(metadata: Mapping[str, str], weights: Mapping[str, Tensor], path: Path) -> Optional[Description]:
    """Read the metadata of a file.

    Args:
        metadata: Texts by name.
        weights: The tensors beside them.
        path: The file, for errors.

    Returns:
        The description; None if the file is not one of ours.

    Raises:
        UserError: If the metadata are not what :func:`describe` gives, name what is not known here, ask for weights
            from elsewhere, or are too large; or if the weights are not those that were written with them.
    """
    if VERSION not in metadata:
        return None
    if sum(map(len, metadata.values())) > MAX_CHARACTERS:
        raise UserError(f'{path}: its metadata have more than {MAX_CHARACTERS} characters')
    if metadata.get(CHECK_SUM) != check_sum(metadata, weights):
        raise UserError(f'{path} is damaged: what it holds is not what was written')
    try:
        return _description(metadata)
    except (UserError, RecursionError) as e:
        raise UserError(f'{path} does not describe its model: {e}') from e


def _description(metadata: Mapping[str, str]) -> Description:
    architecture = metadata.get(ARCHITECTURE)
    if architecture is not None and not timm.is_model(architecture):
        raise UserError(f'{architecture!r} is not registered with timm')
    args = _parse(metadata, MODEL_ARGS, dict)
    refused = sorted(FACTORY_ARGS & args.keys())
    if refused:
        raise UserError(f'{", ".join(refused)} are no arguments of a network')
    if not _sum_of_numbers(args) <= MAX_NUMBERS:
        raise UserError('too large numbers among the arguments')
    return Description(architecture, args, methods_from_list(_parse(metadata, EXPANSION, list)), _settings(metadata))


def _settings(metadata: Mapping[str, str]) -> Dict[str, Any]:
    given = plain_args(_parse(metadata, SETTINGS, dict), SETTINGS)
    settings = {key: given[key] for key in SETTINGS_FIELDS if given.get(key) is not None}
    for name, dimensions in (('input_size', 3), ('pool_size', 2)):
        size = settings.get(name, [1] * dimensions)
        if len(size) != dimensions or not all(0 < length <= MAX_NUMBERS for length in size):
            raise UserError(f'{name} cannot be {size}')
    return settings


def _parse(metadata: Mapping[str, str], name: str, kind: type) -> Any:
    try:
        value = json.loads(metadata.get(name, json.dumps(kind())))
    except ValueError as e:
        raise UserError(f'{name} is not JSON: {e}') from e
    if not isinstance(value, kind):
        raise UserError(f'{name} must be a {kind.__name__}')
    return value


def _sum_of_numbers(value: Any) -> float:
    if isinstance(value, (dict, list)):
        return sum(map(_sum_of_numbers, value.values() if isinstance(value, dict) else value))
    return abs(value) if isinstance(value, (int, float)) else 0
