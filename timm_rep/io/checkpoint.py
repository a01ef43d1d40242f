"""Checkpoint files: read safely, as the model that they are of, and written without replacing any."""
import argparse
import inspect
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

import safetensors
import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import build_model_with_cfg, clean_state_dict, split_model_name_tag
from torch import Tensor

from ..core.errors import UserError
from ..core.walk import annealed_modules
from ..models.checkpoint_filter import first_names
from ..models.names import TRAINING_PREFIXES
from .hub_errors import HubError, hub_message
from .output import PathLike
from .runs import plain_args, read_run_args

__all__ = [
    'FACTORY_ARGS', 'Checkpoint', 'build_model', 'find_checkpoint', 'load_stock_form', 'load_strictly',
    'load_training_form', 'model_args_of', 'read_checkpoint', 'take_input_settings', 'trained_architecture',
    'training_form',
]

WEIGHTS_KEYS = ('state_dict', 'model', 'model_state')  # the last is RepAn's
EMA_KEYS = ('state_dict_ema', 'model_ema')
# What train.py leaves in its output folder: which checkpoint speaks for the run, best first.
RUN_CHECKPOINTS = ('model_best.pth.tar', 'last.pth.tar')
# Arguments of timm's train.py that go into the model, by the name that create_model knows.
MODEL_ARGS = dict(num_classes='num_classes', in_chans='in_chans', gp='global_pool', bn_eps='bn_eps')
# What a model must be fed with, as train.py's arguments decide.
DATA_CONFIG_KEYS = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')

# Arguments of timm's factory, not of a network: where weights come from, and where to. No file may give them.
FACTORY_ARGS = {'device', 'dtype', *(
    name for function in (timm.create_model, build_model_with_cfg)
    for name, parameter in inspect.signature(function).parameters.items() if parameter.kind is not parameter.VAR_KEYWORD
)}
# Tensors of a file may share their numbers, as tied weights do, but they are not many times what it holds.
SHARING = 2
HUB_PREFIX = 'hf-hub:'


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file, read.

    Attributes:
        path: Where it was.
        state_dict: The weights.
        args: Arguments of the training run, from the checkpoint or args.yaml beside it; empty if there are none.
        architecture: Name of the model, if the file or its run says it.
        epoch: Epoch after which it was written, counted from 0, if the file says it.
        metric: Figure by which train.py ranked it, if the file says it.
    """

    path: Path
    state_dict: Dict[str, Tensor]
    args: Dict[str, Any]
    architecture: Optional[str]
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
    wanted = ' nor '.join(RUN_CHECKPOINTS)
    raise FileNotFoundError(f'{path} is not the output folder of a run: it holds neither {wanted}')


def _check_records(path: Path) -> None:
    """Refuse compressed records, which torch.save does not write: they may take many times the file's size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            unpacked = sum(record.file_size for record in file.infolist())
        if unpacked > path.stat().st_size:
            raise UserError(f'its records take {unpacked} bytes, more than the file')


def _read_file(path: Path, allow_pickle: bool) -> Any:
    try:
        if path.suffix == '.safetensors':
            return safetensors.torch.load_file(path)
        _check_records(path)
        # train.py puts its arguments into the checkpoint
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location='cpu', weights_only=not allow_pickle)
    except (OSError, ImportError):
        raise
    except Exception as e:  # a damaged file makes the readers raise almost anything
        refused = re.search(r'(?i)unsupported (?:global: )?GLOBAL (\S+)', str(e))
        if refused:
            raise UserError(
                f'{path} holds Python objects ({refused[1]}), not only weights; it is not loaded, since that could run '
                'code (allow_pickle=True or --allow-pickle loads it all the same: only if you trust whoever made it)'
            ) from e
        kind = 'safetensors file' if path.suffix == '.safetensors' else 'PyTorch checkpoint'
        first_line = str(e).partition('\n')[0]
        raise UserError(f'{path} is not a {kind} ({type(e).__name__}: {first_line})') from e


def _check_tensors(weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are no plain arrays of real numbers, or that take much more than the file holds."""
    total = 0
    for key, value in weights.items():
        if value.layout != torch.strided or value.device.type != 'cpu' or value.is_quantized or value.is_complex():
            kind = f'{value.dtype}, {value.layout}, on {value.device}'
            raise UserError(f'{path} holds {key} as {kind}; weights are dense tensors of real numbers')
        total += value.numel() * value.element_size()
    if total > SHARING * path.stat().st_size:
        raise UserError(f'{path} has {path.stat().st_size} bytes, but its tensors take {total}; it is not loaded')


def read_checkpoint(path: PathLike, *, use_ema: bool = False, allow_pickle: bool = False) -> Checkpoint:
    """Read a checkpoint of timm's train.py, or a file of weights alone. No code in the file is run unless allowed.

    Args:
        path: ``.safetensors``, any file of ``torch.save``, or the output folder of a run.
        use_ema: Take the averaged weights.
        allow_pickle: Load Python objects too, which can run any code: only for files whose maker you trust.

    Returns:
        The checkpoint, with weights on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If the file is no checkpoint, is damaged, holds other Python objects than weights and arguments, has
            tensors that take much more than the file, or has no EMA weights to take.
    """
    path = find_checkpoint(path)
    content = _read_file(path, allow_pickle)
    if not isinstance(content, dict):
        raise UserError(f'{path} holds a {type(content).__name__}, not weights')
    wanted = EMA_KEYS if use_ema else WEIGHTS_KEYS
    weights = next((content[key] for key in wanted if isinstance(content.get(key), dict)), None)
    if weights is None:
        if use_ema:
            raise UserError(f'{path} has no EMA weights; it was written without --model-ema')
        weights = content
    if not weights or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()):
        raise UserError(f'{path} holds no weights; its keys are {", ".join(map(str, list(content)[:5]))}')
    _check_tensors(weights, path)
    args = content.get('args')
    args = plain_args(vars(args), path) if isinstance(args, argparse.Namespace) else read_run_args(path)
    architecture = args.get('model') or content.get('arch')
    weights = clean_state_dict(clean_state_dict(weights))  # older timm strips one prefix (compile, DDP) a call
    epoch, metric = content.get('epoch'), content.get('metric')
    return Checkpoint(
        path,
        weights,
        args,
        architecture if isinstance(architecture, str) else None,
        epoch if isinstance(epoch, int) else None,
        metric if isinstance(metric, (int, float)) else None,
    )


def load_strictly(model: nn.Module, state_dict: Dict[str, Tensor], path: Path, form: str) -> None:
    """Load weights that must be the model's, all of them and no more.

    Args:
        model: The model.
        state_dict: The weights.
        path: File that they come from, for the error.
        form: What they should be, for the error.

    Raises:
        UserError: If keys or shapes are not those of the model, or an attach rate lies outside [0, 1].
    """
    own = model.state_dict()
    missing, unexpected = own.keys() - state_dict.keys(), state_dict.keys() - own.keys()
    if missing or unexpected:
        raise UserError(
            f'{path} does not hold {form}'
            + (f'; missing: {first_names(missing)}' if missing else '')
            + (f'; not expected: {first_names(unexpected)}' if unexpected else '')
        )
    for key, value in own.items():
        if value.shape != state_dict[key].shape:
            raise UserError(
                f'{path} does not hold {form}: {key} has shape {tuple(state_dict[key].shape)}, the model takes '
                f'{tuple(value.shape)}'
            )
        if key.endswith('attach_rate') and not 0 <= state_dict[key] <= 1:
            raise UserError(f'{path} does not hold {form}: {key} must lie in [0, 1], got {state_dict[key].item():g}')
    model.load_state_dict(state_dict)


def trained_architecture(checkpoint: Checkpoint) -> Optional[str]:
    """The architecture that a run trained, without the tag of the weights that it started from.

    Args:
        checkpoint: A checkpoint of the run.

    Returns:
        Its name; None if the arguments of the run do not say it, be it because it took the model from the Hub.
    """
    name = checkpoint.args.get('model')
    if not isinstance(name, str) or ':' in name:
        return None
    return split_model_name_tag(name)[0]


def _is_of(checkpoint: Checkpoint, architecture: str) -> bool:
    """Whether a run was of an architecture, as far as it says; what it took from the Hub can be of any."""
    return bool(checkpoint.args.get('model')) and trained_architecture(checkpoint) in (
        None, split_model_name_tag(architecture)[0])


def model_args_of(checkpoint: Checkpoint, architecture: str, overrides: Mapping[str, Any]) -> Dict[str, Any]:
    """Arguments of ``timm.create_model`` that build the model of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        architecture: The model to build; what the run was told is used if it was of the same.
        overrides: Arguments in place of the run's; None leaves the run's.

    Returns:
        The arguments by name.
    """
    run = checkpoint.args if _is_of(checkpoint, architecture) else {}
    args = {name: run[key] for key, name in MODEL_ARGS.items() if run.get(key) is not None}
    if 'in_chans' not in args and run.get('input_size'):
        args['in_chans'] = run['input_size'][0]
    model_kwargs = run.get('model_kwargs') or {}
    args.update({name: value for name, value in model_kwargs.items() if name not in FACTORY_ARGS})
    args.update({name: value for name, value in overrides.items() if value is not None})
    return args


def take_input_settings(model: Any, checkpoint: Checkpoint) -> None:
    """Let the model's metadata say what it was trained on, where the run's arguments differ from the defaults.

    Args:
        model: A model of timm; its ``pretrained_cfg`` is changed if the run was of its architecture.
        checkpoint: A checkpoint of the run.

    Raises:
        UserError: If timm does not understand the settings.
    """
    if _is_of(checkpoint, model.pretrained_cfg.get('architecture', '')):
        try:
            config = resolve_data_config(checkpoint.args, model=model)
        except AssertionError as e:
            raise UserError(f'input settings of the run of {checkpoint.path} cannot be used: {e}') from e
        if tuple(config['input_size']) != tuple(model.pretrained_cfg['input_size']):
            model.pretrained_cfg['pool_size'] = None
        model.pretrained_cfg.update({key: config[key] for key in DATA_CONFIG_KEYS})


def build_model(architecture: str, /, **kwargs: Any) -> nn.Module:
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


def load_training_form(
        path: PathLike,
        architecture: Optional[str] = None,
        *,
        use_ema: bool = False,
        allow_pickle: bool = False,
        num_classes: Optional[int] = None,
        in_chans: Optional[int] = None,
        model_kwargs: Optional[Mapping[str, Any]] = None,
) -> nn.Module:
    """Build the model that a checkpoint is of, in training form, with its weights.

    Args:
        path: Checkpoint of timm's train.py, weights alone, or the output folder of a run.
        architecture: Name of one of our models; by default the one that the checkpoint, or args.yaml beside it, names.
        use_ema: Take the averaged weights.
        allow_pickle: Load Python objects too, which can run any code.
        num_classes: Of the classifier; by default as the run was told, else the model's own.
        in_chans: Image channels; by default as the run was told, else the model's own.
        model_kwargs: More arguments of ``timm.create_model``, beside those that the run was given.

    Returns:
        The model, in eval mode. Its ``pretrained_cfg`` has the input settings of the run.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If the file is not safe to read, or the architecture is not known or has no rep layers.
        UserError: If the weights are not those of the architecture in training form.
    """
    checkpoint = read_checkpoint(path, use_ema=use_ema, allow_pickle=allow_pickle)
    return training_form(
        checkpoint, architecture, num_classes=num_classes, in_chans=in_chans, model_kwargs=model_kwargs)


def training_form(
        checkpoint: Checkpoint,
        architecture: Optional[str] = None,
        *,
        num_classes: Optional[int] = None,
        in_chans: Optional[int] = None,
        model_kwargs: Optional[Mapping[str, Any]] = None,
) -> nn.Module:
    """Build the model that a checkpoint is of, once it is read; the rest of :func:`load_training_form`.

    Args:
        checkpoint: The checkpoint.
        architecture: As in :func:`load_training_form`.
        num_classes: As in :func:`load_training_form`.
        in_chans: As in :func:`load_training_form`.
        model_kwargs: As in :func:`load_training_form`.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: If the architecture is not known or has no rep layers.
        UserError: If the weights are not those of the architecture in training form.
    """
    architecture = architecture or checkpoint.architecture
    if architecture is None:
        raise UserError(f'{checkpoint.path} does not say which model it is of; name it (--model)')
    if architecture == trained_architecture(checkpoint):
        architecture = str(checkpoint.args['model'])  # with its tag, which may have input settings of its own
    overrides = dict(num_classes=num_classes, in_chans=in_chans)
    args = model_args_of(checkpoint, architecture, {**overrides, **(model_kwargs or {})})
    model = build_model(architecture, **args)
    if not any(annealed_modules(model)):
        raise UserError(f'{architecture} has no rep layers; `timm-rep list` shows the models that have')
    load_strictly(model, checkpoint.state_dict, checkpoint.path, f'{architecture} in training form')
    take_input_settings(model, checkpoint)
    return model.eval()


def load_stock_form(path: PathLike) -> nn.Module:
    """Build the stock form of the model that a file of fused weights is of, with these weights.

    Args:
        path: Stock weights in the folder of their run, whose args.yaml names the model.

    Returns:
        The model, in eval mode. Its ``pretrained_cfg`` has the input settings of the run.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If the file is not safe to read, or its model is not known.
        UserError: If the weights are not those of the model in stock form.
    """
    checkpoint = read_checkpoint(path)
    architecture = checkpoint.architecture
    if architecture is None:
        raise UserError(f'{checkpoint.path} does not say which model it is of: no args.yaml beside it names it')
    args = model_args_of(checkpoint, architecture, {})
    if architecture.startswith(TRAINING_PREFIXES):
        args['inference_mode'] = True
    model = build_model(architecture, **args)
    load_strictly(model, checkpoint.state_dict, checkpoint.path, f'{architecture} in stock form')
    take_input_settings(model, checkpoint)
    return model.eval()
