"""Weights into files and out of files: a model that is read is whole, and the one that the file is of."""
import dataclasses
import io
import json
import struct
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional

import safetensors.torch
import torch
import torch.nn as nn
from torch import Tensor

from ..core.errors import UserError
from ..core.expand import expand_as_
from ..core.expansion import expansion_of
from ..core.verify import check_values
from ..core.walk import annealed_modules, copied, unwrapped, without_compiled_parts
from ..models.checkpoint_filter import first_names
from ..models.damage import CHECKSUM, checksum
from ..models.names import OWN_ARGS
from ..models.settings import settings_beside
from .architecture import create_model
from .checkpoint import (
    FLOATS,
    Checkpoint,
    dtype_fits,
    model_args_of,
    read_checkpoint,
    take_input_settings,
    trained_architecture,
)
from .description import SETTINGS_FIELDS, describe, say_settings_
from .output import PathLike, new_output, written_whole

__all__ = ['build_filled', 'load', 'load_strictly', 'load_training_form', 'save', 'save_weights', 'training_form']

MAX_COUNT = 2 ** 31
SUFFIX = '.safetensors'
AS_DESCRIBED = 'the model that it describes'


def _weights_of(model: nn.Module) -> Dict[str, Tensor]:
    """Copies of the weights on the CPU; safetensors refuses tensors that share memory."""
    state = model.state_dict()
    for key, value in state.items():
        if value.is_complex():
            raise UserError(f'{key} is {value.dtype}, but files that load() reads hold real numbers only')
    return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}


def _safetensors(weights: Dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Content of a file, the same for the same model: safetensors itself writes metadata in any order."""
    content = safetensors.torch.save(weights)
    length = struct.unpack('<Q', content[:8])[0]
    numbers = content[8 + length:]
    header = {'__metadata__': dict(sorted(metadata.items())), **json.loads(content[8:8 + length])}
    header['__metadata__'][CHECKSUM] = checksum(header, [numbers])
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # tensors are aligned
    return struct.pack('<Q', len(text)) + text + numbers


def save(model: nn.Module, file: PathLike, *, replace: bool = False) -> None:
    """Write a model's weights with what they are: :func:`load` needs nothing but the file.

    The metadata of the file name the architecture and its arguments, which layers are which method with which options,
    and the input settings. Whoever reads safetensors reads the weights, too.

    Args:
        model: Model in training or stock form, also in wrappers (DDP, torch.compile, averaged copies). Of a model that
            timm cannot build the file tells the expansion only: ``load(file, into=stock_model)``.
        file: New ``.safetensors`` file, which is there whole or not at all.
        replace: Let it be a file that exists.

    Raises:
        UserError: For another suffix, or a model whose state is not all tensors of real numbers.
        FileExistsError: If the file exists. It then stays as it is.
        OSError: If it cannot be written. None is left then.
        VerificationError: If a value is not finite, or a running variance is negative.
    """
    path = new_output(file, suffixes=(SUFFIX,), replace=replace)
    model = unwrapped(model)
    with without_compiled_parts(model):
        check_values(model)
        content = _safetensors(_weights_of(model), describe(model))
    with written_whole(path, replace=replace) as temporary:
        temporary.write_bytes(content)


def save_weights(model: nn.Module, path: PathLike) -> None:
    """Write a model's state dict.

    Args:
        model: The model.
        path: New file: ``.safetensors`` as :func:`save` writes it, or ``.pth`` for the weights alone.

    Raises:
        UserError: For another suffix, or a model whose state is not all tensors of real numbers.
        FileExistsError: If the file exists. It then stays as it is.
        OSError: If it cannot be written. None is left then.
        VerificationError: If a value is not finite, or a running variance is negative.
    """
    path = new_output(path)
    if path.suffix == SUFFIX:
        save(model, path)
        return
    model = unwrapped(model)
    content = io.BytesIO()
    with without_compiled_parts(model):
        check_values(model)
        torch.save(_weights_of(model), content)
    with written_whole(path) as temporary:
        temporary.write_bytes(content.getvalue())


def _is_mean_count(own: Tensor, given: Tensor) -> bool:
    """Whether a number is what timm's avg_checkpoints.py makes of a count, such as that of a norm's batches."""
    return own.dtype == torch.int64 and own.ndim == 0 and given.dtype in FLOATS and bool(0 <= given < MAX_COUNT)


def _check_fit(model: nn.Module, state_dict: Mapping[str, Tensor], path: Path, form: str) -> None:
    """Raise a UserError if weights are not a model's, all of them and no more."""
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
        if not (dtype_fits(value.dtype, state_dict[key].dtype) or _is_mean_count(value, state_dict[key])):
            allowed = ', '.join(str(dtype) for dtype in (FLOATS if value.is_floating_point() else (value.dtype,)))
            raise UserError(
                f'{path} does not hold {form}: {key} is {state_dict[key].dtype}, allowed are {allowed}')
        if key.endswith('attach_rate') and not 0 <= state_dict[key] <= 1:
            raise UserError(f'{path} does not hold {form}: {key} must lie in [0, 1], got {state_dict[key].item():g}')


def load_strictly(model: nn.Module, state_dict: Dict[str, Tensor], path: Path, form: str) -> None:
    """Load weights that must be the model's, all of them and no more.

    Args:
        model: The model.
        state_dict: The weights.
        path: File that they come from, for the error.
        form: What they should be, for the error.

    Raises:
        UserError: If keys or shapes are not those of the model, or an attach rate lies outside [0, 1]. The model is
            then unchanged.
    """
    _check_fit(model, state_dict, path, form)
    model.load_state_dict(state_dict)


def build_filled(checkpoint: Checkpoint, form: str, build: Callable[[], nn.Module]) -> nn.Module:
    """Build the network of a checkpoint, once it is known to be that: no memory is taken for what the file lacks.

    Args:
        checkpoint: The checkpoint, read.
        form: What it should be, for the error.
        build: Builds the network.

    Returns:
        The model with the weights, in eval mode. Its ``pretrained_cfg`` has the input settings of the file or the run.

    Raises:
        UserError: If the weights are not those of the network, or the run had settings that timm does not understand.
    """
    with torch.device('meta'):
        skeleton = build()
    _check_fit(skeleton, checkpoint.state_dict, checkpoint.path, form)
    model = build()
    load_strictly(model, checkpoint.state_dict, checkpoint.path, form)
    settings = settings_beside(checkpoint.path) if checkpoint.description is None else checkpoint.description.settings
    say_settings_(model, {key: settings[key] for key in SETTINGS_FIELDS if key in settings})
    take_input_settings(model, checkpoint.args, checkpoint.path)
    return model.eval()


def _described_model(checkpoint: Checkpoint, overrides: Mapping[str, Any] = {}) -> nn.Module:
    """Build and load the model of one of our files. No memory is taken for weights that the file does not hold."""
    description, weights, path = checkpoint.description, checkpoint.state_dict, checkpoint.path
    assert description is not None
    if description.architecture is None:
        raise UserError(
            f'{path} is of a model that timm does not build; give its stock form: load(file, into=stock_model)')
    given = {key: value for key, value in overrides.items() if value is not None}
    description = dataclasses.replace(description, model_args={**description.model_args, **given})
    def build() -> nn.Module:
        try:
            model = description.build()
        except Exception as e:  # a file may give timm and the methods any arguments
            raise UserError(f'{path} does not describe its model: {e}') from e
        return _in_precision_of_(model, weights)

    return build_filled(checkpoint, AS_DESCRIBED, build)


def _in_precision_of_(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Give a model the precision of weights, of which some may have less than others."""
    dtypes = {value.dtype for value in weights.values() if value.dtype in FLOATS}
    if len(dtypes) == 1:
        return model.to(dtypes.pop())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        given = weights.get(name)
        if given is not None and given.dtype in FLOATS and tensor.is_floating_point():
            tensor.data = tensor.data.to(given.dtype)
    return model


def _load_into_(model: nn.Module, checkpoint: Checkpoint) -> None:
    description, weights, path = checkpoint.description, checkpoint.state_dict, checkpoint.path
    if description is None:
        raise UserError(f'{path} does not say which layers were expanded: it was not written by timm_rep.save')
    form = f'weights of this {type(model).__name__}'
    if not any(annealed_modules(model)):
        expanded = expand_as_(copied(model).to('meta'), description.methods, description.norms)
        _check_fit(expanded, weights, path, form)
        expand_as_(model, description.methods, description.norms)
    elif (expansion_of(model).methods, expansion_of(model).norms) != (description.methods, description.norms):
        raise UserError(f'into must be the stock form, or expanded as the model of {path} was')
    load_strictly(model, weights, path, form)


def load(file: PathLike, into: Optional[nn.Module] = None) -> nn.Module:
    """Read a model that :func:`save` wrote, or the checkpoint of a run of timm's train.py on one of our models.

    Args:
        file: The file; or the output folder of a run, which stands for its best checkpoint.
        into: Stock form of the model, needed only where timm does not build it. It is expanded and loaded in place, in
            its own precision, and stays in the mode that it is in.

    Returns:
        ``into``; else a new model in eval mode, in the precision of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If the file is damaged or not safe to read, does not say what it is, or is of another network. The
            model to load into is then unchanged.
    """
    checkpoint = read_checkpoint(file)
    if into is not None:
        _load_into_(into, checkpoint)
        return into
    if checkpoint.description is None and checkpoint.architecture is None:
        raise UserError(
            f'{checkpoint.path} does not say which model it is of: build that and take its load_state_dict(). Files of '
            'timm_rep.save and runs of train.py say it')
    return training_form(checkpoint) if checkpoint.description is None else _described_model(checkpoint)


def load_training_form(
        path: PathLike,
        architecture: Optional[str] = None,
        *,
        use_ema: bool = False,
        allow_pickle: bool = False,
        **kwargs: Any,
) -> nn.Module:
    """Build the model that a checkpoint is of, in training form, with its weights.

    Args:
        path: Checkpoint of timm's train.py, weights alone, or the output folder of a run.
        architecture: As in :func:`training_form`.
        use_ema: Take the averaged weights.
        allow_pickle: Load Python objects too, which can run any code.
        **kwargs: More of :func:`training_form`.

    Returns:
        The model, in eval mode. Its ``pretrained_cfg`` has the input settings of the run.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If the file is not safe to read, or as :func:`training_form` does.
    """
    return training_form(read_checkpoint(path, use_ema=use_ema, allow_pickle=allow_pickle), architecture, **kwargs)


def training_form(
        checkpoint: Checkpoint,
        architecture: Optional[str] = None,
        *,
        num_classes: Optional[int] = None,
        in_chans: Optional[int] = None,
        model_kwargs: Optional[Mapping[str, Any]] = None,
) -> nn.Module:
    """Build the model that a checkpoint is of, in training form, with its weights.

    Args:
        checkpoint: The checkpoint, read.
        architecture: Name of one of our models; by default the one that the checkpoint, or args.yaml beside it, names.
            A file of :func:`save` says all of this and of the following itself.
        num_classes: Of the classifier; by default as the run was told, else as the weights have it.
        in_chans: Image channels; by default as the run was told, else as the weights have it.
        model_kwargs: More arguments of ``timm.create_model``, beside those that the run was given.

    Returns:
        The model, in eval mode. Its ``pretrained_cfg`` has the input settings of the run.

    Raises:
        UserError: If the architecture is not known or has no rep layers.
        UserError: If the weights are not those of the architecture in training form.
    """
    overrides = {**dict(num_classes=num_classes, in_chans=in_chans), **(model_kwargs or {})}
    another_form = OWN_ARGS & overrides.keys()
    if _is_described(checkpoint) and architecture in (None, checkpoint.architecture) and not another_form:
        model = _described_model(checkpoint, overrides)
        _check_training_form(model, f'{checkpoint.path} is in stock form: it')
        return model
    architecture = architecture or checkpoint.architecture
    if architecture is None:
        raise UserError(f'{checkpoint.path} does not say which model it is of; name it (--model)')
    if architecture == trained_architecture(checkpoint):
        architecture = str(checkpoint.args['model'])  # with its tag, which may have input settings of its own
    args = model_args_of(checkpoint, architecture, overrides)

    def build() -> nn.Module:
        model = create_model(architecture, **args)
        _check_training_form(model, architecture)
        return model

    return build_filled(checkpoint, f'{architecture} in training form', build)


def _is_described(checkpoint: Checkpoint) -> bool:
    """Whether the file says how to build its model."""
    return checkpoint.description is not None and checkpoint.description.architecture is not None


def _check_training_form(model: nn.Module, name: str) -> None:
    if not any(annealed_modules(model)):
        raise UserError(f'{name} has no rep layers; `timm-rep list` shows the models that have')
