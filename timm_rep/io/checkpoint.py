"""Checkpoint files: read safely, with what they say of the model that they are of."""
import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

import timm
import torch
import torch.nn as nn
from timm.models import clean_state_dict, split_model_name_tag
from torch import Tensor

from ..core.errors import UserError
from ..core.layers import RepLayer
from ..models.files import read_file
from ..models.names import OWN_ARGS, TRAINING_PREFIXES, stock_architecture
from ..models.settings import INPUT_SETTINGS, check_input_size
from .architecture import FACTORY_ARGS, create_model, input_settings
from .description import Description, read_description
from .output import PathLike
from .plain_data import plain
from .runs import read_run_args

__all__ = [
    'FLOATS', 'Checkpoint', 'dtype_fits', 'find_checkpoint', 'model_args_of', 'read_checkpoint',
    'take_input_settings', 'trained_architecture',
]

# Of timm, OREPA and RepAn; the tutorials of PyTorch; and many CIFAR trainings.
WEIGHTS_KEYS = ('state_dict', 'model', 'model_state', 'model_state_dict', 'net')
EMA_KEYS = ('state_dict_ema', 'model_ema')
# What train.py leaves in its output folder: which checkpoint speaks for the run, best first.
RUN_CHECKPOINTS = ('model_best.pth.tar', 'last.pth.tar')
# Arguments of timm's train.py that go into the model, by the name that create_model knows.
MODEL_ARGS = dict(
    num_classes='num_classes', in_chans='in_chans', gp='global_pool', bn_momentum='bn_momentum', bn_eps='bn_eps',
    drop='drop_rate', drop_path='drop_path_rate', drop_block='drop_block_rate')
# As many image channels as nothing in a network has of anything else.
NO_WIDTH = 1009

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Tensors of a file may share their numbers, as tied weights do, but they are not many times what it holds.
SHARING = 2


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file, read.

    Attributes:
        path: Where it was.
        state_dict: The weights.
        args: Arguments of the training run, from the checkpoint or args.yaml beside it; empty if there are none.
        architecture: Name of the model, if the file or its run says it.
        description: What the model is, if the file is one of :func:`timm_rep.save`.
        epoch: Epoch after which it was written, counted from 0, if the file says it.
        metric: Figure by which train.py ranked it, if the file says it.
    """

    path: Path
    state_dict: Dict[str, Tensor]
    args: Dict[str, Any]
    architecture: Optional[str]
    description: Optional[Description] = None
    epoch: Optional[int] = None
    metric: Optional[float] = None


def find_checkpoint(path: PathLike) -> Path:
    """The checkpoint that a path stands for.

    Args:
        path: A checkpoint file, or the output folder of a run of timm's train.py.

    Returns:
        The file itself; of a folder ``model_best.pth.tar``, else ``last.pth.tar``.

    Raises:
        FileNotFoundError: If there is no such file, or the folder holds neither.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f'no checkpoint file at {path}')
        return path
    for name in RUN_CHECKPOINTS:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(
        f'{path} is not the output folder of a run: it holds neither {" nor ".join(RUN_CHECKPOINTS)}')


def _check_tensors(weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are no plain arrays of real numbers, or that take much more than the file holds."""
    total = 0
    for key, value in weights.items():
        plain_kind = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_nested
        if not plain_kind or value.device.type != 'cpu' or value.is_quantized or value.is_complex():
            nested = 'nested, ' if value.is_nested else ''
            kind = f'{type(value).__name__} ({nested}{value.dtype}, {value.layout}, on {value.device})'
            raise UserError(f'{path} holds {key} as {kind}; weights are dense tensors of real numbers')
        total += value.numel() * value.element_size()
    if total > SHARING * path.stat().st_size:
        raise UserError(f'{path} has {path.stat().st_size} bytes, but its tensors take {total}; it is not loaded')


def _run_args(args: Any, path: Path) -> Dict[str, Any]:
    """Arguments of the run, from the checkpoint, else from the file beside it."""
    if not isinstance(args, argparse.Namespace):
        return read_run_args(path)
    try:
        return plain(vars(args))
    except UserError as e:
        raise UserError(f'{path} holds arguments of no run: {e}') from e


def dtype_fits(own: torch.dtype, given: torch.dtype) -> bool:
    """Whether a tensor of a model takes the numbers of a file: weights in any usual precision, all else as it is.

    Args:
        own: Of the model's tensor.
        given: Of the file's tensor.

    Returns:
        Whether it does.
    """
    return given == own or (own.is_floating_point and given in FLOATS)


def read_checkpoint(path: PathLike, *, use_ema: bool = False, allow_pickle: bool = False) -> Checkpoint:
    """Read a checkpoint of timm's train.py, a file of :func:`timm_rep.save`, or one of weights alone.

    No code in the file is run unless allowed.

    Args:
        path: ``.safetensors``, any file of ``torch.save``, or the output folder of a run.
        use_ema: Take the averaged weights.
        allow_pickle: Load Python objects too, which can run any code: only for files whose maker you trust.

    Returns:
        The checkpoint, with weights on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If the file is no checkpoint, is damaged, holds other Python objects than weights and arguments, has
            tensors that take much more than the file, describes a model that cannot be trusted or is not known, or has
            no EMA weights to take.
    """
    path = find_checkpoint(path)
    content, metadata = read_file(path, allow_pickle)
    if not isinstance(content, dict):
        raise UserError(f'{path} holds a {type(content).__name__}, not weights')
    wanted = EMA_KEYS if use_ema else WEIGHTS_KEYS
    weights = next((content[key] for key in wanted if isinstance(content.get(key), dict)), None)
    if weights is None:
        if use_ema:
            raise UserError(f'{path} has no EMA weights; it was written without --model-ema')
        weights = content
    if not weights or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()):
        keys = ', '.join(key[:99] if isinstance(key, str) else type(key).__name__ for key in list(content)[:5])
        raise UserError(f'{path} holds no weights; its keys are {keys}')
    _check_tensors(weights, path)
    description = read_description(metadata, path)
    args = _run_args(content.get('args'), path)
    described = None if description is None else description.architecture
    architecture = described or args.get('model') or content.get('arch')
    if description is None:
        weights = clean_state_dict(clean_state_dict(weights))  # older timm strips one prefix (compile, DDP) a call
    epoch, metric = content.get('epoch'), content.get('metric')
    return Checkpoint(
        path,
        weights,
        args,
        architecture if isinstance(architecture, str) else None,
        description,
        epoch if isinstance(epoch, int) else None,
        metric if isinstance(metric, (int, float)) else None,
    )


def trained_architecture(checkpoint: Checkpoint) -> Optional[str]:
    """The architecture that a run trained, without the tag of the weights that it started from.

    Args:
        checkpoint: A checkpoint of the run.

    Returns:
        Its name; None if the arguments of the run do not say it, be it because it took the model from the Hub.
    """
    return _trained(checkpoint.args)


def _trained(args: Mapping[str, Any]) -> Optional[str]:
    name = args.get('model')
    return None if not isinstance(name, str) or ':' in name else split_model_name_tag(name)[0]


def _sizes_of(checkpoint: Checkpoint, architecture: str, args: Mapping[str, Any]) -> Dict[str, int]:
    """Classes and image channels that the shapes of the weights tell, as far as they do."""
    names = (prefix + architecture for prefix in ('', *TRAINING_PREFIXES))  # a stock form may have no name of its own
    registered = next(filter(timm.is_model, names), None)
    if registered is None:
        return {}
    own_args = {name: value for name, value in args.items() if name in OWN_ARGS}
    with torch.device('meta'):
        try:
            skeleton: Any = create_model(registered, in_chans=NO_WIDTH, **own_args)
        except UserError:
            skeleton = create_model(registered, **own_args)  # whose message has no number of ours
    classifier = skeleton.pretrained_cfg.get('classifier') or ''
    classifier = classifier if isinstance(classifier, str) else classifier[0]
    shapes = {key: value.shape for key, value in checkpoint.state_dict.items()}
    sizes = {}
    if f'{classifier}.weight' in shapes:
        sizes['num_classes'] = shapes[f'{classifier}.weight'][0]
    widths = {key: tuple(value.shape[1:2]) for key, value in skeleton.state_dict().items()}
    convs = (name for name, module in skeleton.named_modules() if isinstance(module, (nn.Conv2d, RepLayer)))
    stock_key = f'{next(convs, None)}.weight'  # of the first layer; in training form it has others
    keys = [key for key in (stock_key, *widths) if widths.get(key, (NO_WIDTH,)) == (NO_WIDTH,)]
    first = next((shapes[key] for key in keys if len(shapes.get(key, ())) > 1), None)
    if first is not None:
        sizes['in_chans'] = first[1]
    return sizes


def model_args_of(checkpoint: Checkpoint, architecture: str, overrides: Mapping[str, Any]) -> Dict[str, Any]:
    """Arguments of ``timm.create_model`` that build the model of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        architecture: The model to build; what the run was told is used if it was of the same.
        overrides: Arguments in place of the run's; None leaves the run's.

    Returns:
        The arguments by name. What neither says of classes and image channels is taken from the weights' shapes.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    description = checkpoint.description
    if description is not None and description.architecture == split_model_name_tag(architecture)[0]:
        return {**description.model_args, **given}
    of_same = trained_architecture(checkpoint) in (None, split_model_name_tag(architecture)[0])  # from the Hub: of any
    run = checkpoint.args if checkpoint.args.get('model') and of_same else {}
    args = {name: run[key] for key, name in MODEL_ARGS.items() if run.get(key) is not None}
    if 'in_chans' not in args and run.get('input_size'):
        args['in_chans'] = run['input_size'][0]
    model_kwargs = run.get('model_kwargs') or {}
    args.update({name: value for name, value in model_kwargs.items() if name not in FACTORY_ARGS})
    args.update(given)
    return {**_sizes_of(checkpoint, architecture, args), **args}


def take_input_settings(model: Any, args: Mapping[str, Any], source: PathLike) -> None:
    """Let the model's metadata say what it was trained on, where the run's arguments differ from the defaults.

    Args:
        model: A model of timm; its ``pretrained_cfg`` is changed if the run was of its architecture, in either form.
        args: Arguments of the run.
        source: Where they come from, for the error.

    Raises:
        UserError: If timm does not understand the settings.
    """
    trained, own = _trained(args), model.pretrained_cfg.get('architecture', '')
    if not args.get('model') or (trained is not None and stock_architecture(trained) != stock_architecture(own)):
        return
    try:
        config = input_settings(model, args)
        check_input_size(config['input_size'])
    except (AssertionError, TypeError, UserError) as e:
        raise UserError(
            f'input settings of the run of {source} cannot be used: {str(e) or type(e).__name__}') from e
    if tuple(config['input_size']) != tuple(model.pretrained_cfg['input_size']):
        model.pretrained_cfg['pool_size'] = None
    model.pretrained_cfg.update({key: config[key] for key in INPUT_SETTINGS})
