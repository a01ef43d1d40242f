"""Checkpoint files in, files in another form out: what ``timm-rep fuse``, ``verify`` and ``expand`` do."""
import argparse
import dataclasses
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple, Union

import safetensors
import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import clean_state_dict
from torch import Tensor

from .checkpoints import checkpoint_filter_fn, first_names
from .exporting import export_onnx, export_program
from .hub import export_folder
from .runs import read_run_args
from .surgery import LAYERS, TRAINING_PREFIXES, annealed_modules, fuse
from .verification import Report, verify

__all__ = [
    'Checkpoint',
    'build_model',
    'expand_checkpoint',
    'find_checkpoint',
    'fuse_checkpoint',
    'load_stock_form',
    'load_training_form',
    'read_checkpoint',
    'save_weights',
    'training_form',
    'verify_checkpoint',
]

WEIGHTS_KEYS = ('state_dict', 'model', 'model_state')  # the last is RepAn's
EMA_KEYS = ('state_dict_ema', 'model_ema')
WEIGHTS_SUFFIXES = ('.safetensors', '.pth')
# What train.py leaves in its output folder: which checkpoint speaks for the run, best first.
RUN_CHECKPOINTS = ('model_best.pth.tar', 'last.pth.tar')
# Arguments of timm's train.py that go into the model, by the name that create_model knows.
MODEL_ARGS = dict(num_classes='num_classes', in_chans='in_chans', gp='global_pool', bn_eps='bn_eps')
# What a model must be fed with, as train.py's arguments decide.
DATA_CONFIG_KEYS = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')

PathLike = Union[str, Path]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file, read.

    Attributes:
        path: Where it was.
        state_dict: The weights.
        args: Arguments of the training run, from the checkpoint or args.yaml beside it; empty if there are none.
        architecture: Name of the model, if the file or its run says it.
        epoch: Epoch after which it was written, counted from 0, if the file says it.
    """

    path: Path
    state_dict: Dict[str, Tensor]
    args: Dict[str, Any]
    architecture: Optional[str]
    epoch: Optional[int] = None


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


def _read_file(path: Path, allow_pickle: bool) -> Any:
    if path.suffix == '.safetensors':
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as e:
            raise ValueError(f'{path} is not a safetensors file: {e}') from None
    try:
        # train.py puts its arguments into the checkpoint
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location='cpu', weights_only=not allow_pickle)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as e:
        refused = re.search(r'(?i)unsupported (?:global: )?GLOBAL (\S+)', str(e))
        if refused:
            raise ValueError(
                f'{path} holds Python objects ({refused[1]}), not only weights; it is not loaded, since that could run '
                'code (allow_pickle=True or --allow-pickle loads it all the same: only if you trust whoever made it)'
            ) from e
        raise ValueError(f'{path} is not a PyTorch checkpoint') from e


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
        ValueError: If the file is no checkpoint, holds other Python objects than weights and arguments, or has no EMA
            weights to take.
    """
    path = find_checkpoint(path)
    content = _read_file(path, allow_pickle)
    if not isinstance(content, dict):
        raise ValueError(f'{path} holds a {type(content).__name__}, not weights')
    wanted = EMA_KEYS if use_ema else WEIGHTS_KEYS
    weights = next((content[key] for key in wanted if isinstance(content.get(key), dict)), None)
    if weights is None:
        if use_ema:
            raise ValueError(f'{path} has no EMA weights; it was written without --model-ema')
        weights = content
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f'{path} holds no weights; its keys are {", ".join(map(str, list(content)[:5]))}')
    args = content.get('args')
    args = vars(args) if isinstance(args, argparse.Namespace) else read_run_args(path)
    architecture = args.get('model') or content.get('arch')
    weights = clean_state_dict(clean_state_dict(weights))  # older timm strips one prefix (compile, DDP) a call
    epoch = content.get('epoch')
    return Checkpoint(
        path,
        weights,
        args,
        architecture if isinstance(architecture, str) else None,
        epoch if isinstance(epoch, int) else None,
    )


def _load_strictly(model: nn.Module, state_dict: Dict[str, Tensor], path: Path, form: str) -> None:
    """Load weights that must be the model's, all of them and no more."""
    own = model.state_dict()
    missing, unexpected = own.keys() - state_dict.keys(), state_dict.keys() - own.keys()
    if missing or unexpected:
        raise RuntimeError(
            f'{path} does not hold {form}'
            + (f'; missing: {first_names(missing)}' if missing else '')
            + (f'; not expected: {first_names(unexpected)}' if unexpected else '')
        )
    for key, value in own.items():
        if value.shape != state_dict[key].shape:
            raise RuntimeError(
                f'{path} does not hold {form}: {key} has shape {tuple(state_dict[key].shape)}, the model takes '
                f'{tuple(value.shape)}'
            )
    model.load_state_dict(state_dict)


def _model_args(checkpoint: Checkpoint, architecture: str, overrides: Dict[str, Any]) -> Dict[str, Any]:
    run = checkpoint.args if checkpoint.args.get('model') == architecture else {}
    args = {name: run[key] for key, name in MODEL_ARGS.items() if run.get(key) is not None}
    if 'in_chans' not in args and run.get('input_size'):
        args['in_chans'] = run['input_size'][0]
    args.update(run.get('model_kwargs') or {})
    args.update({name: value for name, value in overrides.items() if value is not None})
    return args


def _take_input_settings(model: Any, checkpoint: Checkpoint) -> None:
    """Let the model's metadata say what it was trained on, where the run's arguments differ from the defaults."""
    if checkpoint.args.get('model') == model.pretrained_cfg.get('architecture'):
        config = resolve_data_config(checkpoint.args, model=model)
        if tuple(config['input_size']) != tuple(model.pretrained_cfg['input_size']):
            model.pretrained_cfg['pool_size'] = None
        model.pretrained_cfg.update({key: config[key] for key in DATA_CONFIG_KEYS})


def build_model(architecture: str, /, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` with errors that say what the user can do.

    Args:
        architecture: Registered name.
        **kwargs: Of the model.

    Returns:
        The model.

    Raises:
        ValueError: If there is no such model, or it does not take the arguments.
    """
    if not timm.is_model(architecture):
        raise ValueError(f'unknown model {architecture!r}; `timm-rep list` shows the models with rep layers')
    try:
        return timm.create_model(architecture, **kwargs)
    except (TypeError, KeyError, AssertionError) as e:
        given = ', '.join(f'{key}={value!r}' for key, value in kwargs.items())
        raise ValueError(f'{architecture} cannot be built with {given}: {e}') from e


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
        ValueError: If the file is not safe to read, or the architecture is not known or has no rep layers.
        RuntimeError: If the weights are not those of the architecture in training form.
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
        ValueError: If the architecture is not known or has no rep layers.
        RuntimeError: If the weights are not those of the architecture in training form.
    """
    architecture = architecture or checkpoint.architecture
    if architecture is None:
        raise ValueError(f'{checkpoint.path} does not say which model it is of; name it')
    overrides = dict(num_classes=num_classes, in_chans=in_chans)
    args = _model_args(checkpoint, architecture, {**overrides, **(model_kwargs or {})})
    model = build_model(architecture, **args)
    if not any(annealed_modules(model)):
        raise ValueError(f'{architecture} has no rep layers; `timm-rep list` shows the models that have')
    _load_strictly(model, checkpoint.state_dict, checkpoint.path, f'{architecture} in training form')
    _take_input_settings(model, checkpoint)
    return model.eval()


def load_stock_form(path: PathLike) -> nn.Module:
    """Build the stock form of the model that a file of fused weights is of, with these weights.

    Args:
        path: Stock weights in the folder of their run, whose args.yaml names the model.

    Returns:
        The model, in eval mode. Its ``pretrained_cfg`` has the input settings of the run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not safe to read, or its model is not known.
        RuntimeError: If the weights are not those of the model in stock form.
    """
    checkpoint = read_checkpoint(path)
    architecture = checkpoint.architecture
    if architecture is None:
        raise ValueError(f'{checkpoint.path} does not say which model it is of: no args.yaml beside it names it')
    if not timm.is_model(architecture):
        raise ValueError(f'unknown model {architecture!r} in the args.yaml beside {checkpoint.path}')
    args = _model_args(checkpoint, architecture, {})
    if architecture.startswith(TRAINING_PREFIXES):
        args['inference_mode'] = True
    model = timm.create_model(architecture, **args)
    _load_strictly(model, checkpoint.state_dict, checkpoint.path, f'{architecture} in stock form')
    _take_input_settings(model, checkpoint)
    return model.eval()


def _check_output(path: PathLike, folder_allowed: bool) -> Path:
    path = Path(path)
    if path.suffix not in WEIGHTS_SUFFIXES and (path.suffix or not folder_allowed):
        allowed = ' or '.join(WEIGHTS_SUFFIXES) + (', or have no suffix for a Hub folder' if folder_allowed else '')
        raise ValueError(f'output {path} must end in {allowed}')
    if path.exists():
        raise FileExistsError(f'output {path} exists already; nothing was written')
    return path


def save_weights(model: nn.Module, path: PathLike) -> None:
    """Write a model's state dict.

    Args:
        model: The model.
        path: New file; ``.safetensors`` or ``.pth`` says in which format.

    Raises:
        ValueError: For another suffix.
        FileExistsError: If the file exists. It then stays as it is.
    """
    path = _check_output(path, folder_allowed=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    # clones, since safetensors refuses tensors that share memory
    weights = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    if path.suffix == '.safetensors':
        # save_file() would write a file that only its owner can read
        path.write_bytes(safetensors.torch.save(weights, metadata=dict(format='pt')))
    else:
        torch.save(weights, path)


def fuse_checkpoint(
        path: PathLike,
        output: Optional[PathLike] = None,
        architecture: Optional[str] = None,
        *,
        onnx: Optional[PathLike] = None,
        program: Optional[PathLike] = None,
        **kwargs: Any,
) -> Report:
    """Fuse a trained checkpoint, check that the outputs are the same, and write the stock form.

    Args:
        path: Checkpoint in training form, or the output folder of a run.
        output: New ``.safetensors`` or ``.pth`` file for the weights alone; without a suffix a Hub folder, which any
            timm loads without this package.
        architecture: Name of the model, if the checkpoint does not say it.
        onnx: New ONNX file, see :func:`timm_rep.exporting.export_onnx`.
        program: New file for a ``torch.export`` program, see :func:`timm_rep.exporting.export_program`.
        **kwargs: More of :func:`load_training_form`.

    Returns:
        What the check found, and how far the other formats are off. Nothing is written unless it succeeds.

    Raises:
        FileExistsError: If an output exists.
        ValueError: If no output is given, for another suffix of it, or as :func:`load_training_form` does.
        ImportError: If packages of the extra ``export`` are missing.
        RuntimeError: As :func:`load_training_form` does.
        VerificationError: If the fused model is not the same function.
    """
    if output is None and onnx is None and program is None:
        raise ValueError('no output is given: neither weights or a folder, nor ONNX, nor a torch.export program')
    output = None if output is None else _check_output(output, folder_allowed=True)
    for exported in (onnx, program):
        if exported is not None and Path(exported).exists():
            raise FileExistsError(f'output {exported} exists already; nothing was written')
    model = load_training_form(path, architecture, **kwargs)
    fused = fuse(model)
    report = verify(model, fused)
    exports = [
        dataclasses.replace(export(fused, file), name=str(file))
        for export, file in ((export_onnx, onnx), (export_program, program)) if file is not None
    ]
    if output is not None and output.suffix:
        save_weights(fused, output)
    elif output is not None:
        export_folder(model, output)  # takes the training form, to note where the weights come from
    return dataclasses.replace(report, exports=tuple(exports))


def verify_checkpoint(
        path: PathLike,
        fused_path: Optional[PathLike] = None,
        architecture: Optional[str] = None,
        **kwargs: Any,
) -> Report:
    """Check that a trained checkpoint and its fused form compute the same.

    Args:
        path: Checkpoint in training form.
        fused_path: Weights in stock form, or a Hub folder; if None, the checkpoint is fused in memory.
        architecture: Name of the model, if the checkpoint does not say it.
        **kwargs: More of :func:`load_training_form`.

    Returns:
        What the check found.

    Raises:
        FileNotFoundError: If one of the files is not there.
        ValueError: As :func:`load_training_form` does.
        RuntimeError: If weights are not those of the model, or as :func:`load_training_form` does.
        VerificationError: If the two are not the same function.
    """
    model: Any = load_training_form(path, architecture, **kwargs)
    fused = fuse(model)
    if fused_path is not None:
        fused_path = Path(fused_path)
        if fused_path.is_dir():
            fused = timm.create_model(f'local-dir:{fused_path}', pretrained=True)
        else:
            weights = read_checkpoint(fused_path).state_dict
            name = model.pretrained_cfg['architecture']
            _load_strictly(fused, weights, fused_path, f'{name} in stock form')
    return verify(model, fused)


def _training_architecture(name: str, layer: str) -> Tuple[str, Dict[str, Any]]:
    """Our model whose stock form a stock model is, and what it is built with."""
    if layer not in LAYERS:
        raise ValueError(f'unknown layer {layer!r}; allowed are {", ".join(LAYERS)}')
    stock = name.partition('.')[0]
    for prefix in TRAINING_PREFIXES:
        stock = stock.removeprefix(prefix)
    if timm.is_model(f'{layer}_{stock}'):
        return f'{layer}_{stock}', {}
    if timm.is_model(f'repan_{stock}'):
        return f'repan_{stock}', dict(rep_layer=layer)
    known = {model.partition('_')[2] for model in timm.list_models([f'{layer}_*', 'repan_*'])}
    raise ValueError(f'layer {layer!r} stands for the stock models {", ".join(sorted(known))}; got {name!r}')


def expand_checkpoint(
        source: PathLike,
        output: PathLike,
        layer: str = 'orepa',
        architecture: Optional[str] = None,
        *,
        num_classes: Optional[int] = None,
        in_chans: Optional[int] = None,
) -> Report:
    """Put the weights of a stock model into the training form of ours, with the same outputs.

    Args:
        source: Weights in stock form; or a timm model, with a tag if wanted, whose pretrained weights timm gets.
        output: New ``.safetensors`` or ``.pth`` file.
        layer: ``'orepa'``, ``'dbb'``, ``'acb'`` or ``'rep'``. Where there is no model of that name in front, it is a
            ``repan_`` model with this ``rep_layer``.
        architecture: The stock model that a file of weights is of, if the file does not say it.
        num_classes: Of the classifier; by default as the run was told, else the model's own.
        in_chans: Image channels; by default as the run was told, else the model's own.

    Returns:
        What the check of the outputs found. Nothing is written unless it succeeds.

    Raises:
        FileExistsError: If the output exists.
        FileNotFoundError: If the source is neither a file nor a model of timm's.
        ValueError: For an unknown layer or model, or a file that is not safe to read.
        RuntimeError: If the weights are not those of the model in stock form.
        VerificationError: If the outputs differ.
    """
    output = _check_output(output, folder_allowed=False)
    overrides = dict(num_classes=num_classes, in_chans=in_chans)
    if Path(source).is_file():
        checkpoint = read_checkpoint(source)
        name = architecture or checkpoint.architecture
        if name is None:
            raise ValueError(f'{source} does not say which model it is of; name it')
        target, layer_args = _training_architecture(name, layer)
        args = {**_model_args(checkpoint, name, overrides), **layer_args}
        stock = timm.create_model(target, inference_mode=True, **args)
        _load_strictly(stock, checkpoint.state_dict, checkpoint.path, f'{name} in stock form')
        _take_input_settings(stock, checkpoint)
    elif timm.is_model(str(source)):
        target, layer_args = _training_architecture(str(source), layer)
        args = {key: value for key, value in overrides.items() if value is not None}
        stock = timm.create_model(str(source), pretrained=True, **args)
        args.update(layer_args)
    else:
        raise FileNotFoundError(f'{source} is neither a file nor a model of timm')
    model = timm.create_model(target, **args).eval()
    model.load_state_dict(checkpoint_filter_fn(stock.state_dict(), model))
    report = verify(model, stock.eval())
    save_weights(model, output)
    return report
