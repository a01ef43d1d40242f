"""Checkpoints in another form: fused, compared with their fused form, expanded."""
import dataclasses
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import timm

from ..core.errors import UserError
from ..core.fuse import fuse
from ..core.methods import as_method
from ..core.verify import Report, verify
from ..io.architecture import create_model
from ..io.checkpoint import model_args_of, read_checkpoint
from ..io.description import SETTINGS_FIELDS
from ..io.hub_errors import hub_errors
from ..io.output import PathLike, is_weights_file, new_output
from ..io.programs import ONNX_SUFFIX, PROGRAM_SUFFIX, export_onnx, export_program
from ..io.weights import build_filled, load_strictly, load_training_form, save_weights
from ..models.checkpoint_filter import checkpoint_filter_fn
from ..models.names import OWN_ARGS, TRAINING_PREFIXES, stock_architecture
from .check import load_export
from .export import export_folder

__all__ = ['expand_checkpoint', 'fuse_checkpoint', 'verify_checkpoint']


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
        output: New ``.safetensors`` or ``.pth`` file for the weights alone; any other name is that of a Hub folder,
            which any timm loads without this package.
        architecture: Name of the model, if the checkpoint does not say it.
        onnx: New ONNX file, see :func:`timm_rep.io.programs.export_onnx`.
        program: New file for a ``torch.export`` program, see :func:`timm_rep.io.programs.export_program`.
        **kwargs: More of :func:`load_training_form`.

    Returns:
        What the check found, and how far the other formats are off. Nothing is written unless it succeeds.

    Raises:
        FileExistsError: If an output exists.
        UserError: If no output is given, for another suffix of it, if packages of the extra ``export`` are missing, or
            as :func:`load_training_form` does.
        VerificationError: If the fused model is not the same function.
    """
    if output is None and onnx is None and program is None:
        raise UserError('no output is given: neither weights or a folder, nor ONNX, nor a torch.export program')
    for suffix, exported, option in ((ONNX_SUFFIX, onnx, '--onnx'), (PROGRAM_SUFFIX, program, '--torch-export')):
        if exported is not None:
            new_output(exported, suffixes=(suffix,))
        if output is not None and Path(output).suffix == suffix:
            raise UserError(f'{output} is no file of weights; write it with {option} {output}')
    output = None if output is None else new_output(output, folder_allowed=True)
    model = load_training_form(path, architecture, **kwargs)
    fused = fuse(model)
    report = verify(model, fused)
    exports = [
        dataclasses.replace(export(fused, file), name=str(file))
        for export, file in ((export_onnx, onnx), (export_program, program)) if file is not None
    ]
    if output is not None and is_weights_file(output):
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
        UserError: If weights are not those of the model, or as :func:`load_training_form` does.
        VerificationError: If the two are not the same function.
    """
    model: Any = load_training_form(path, architecture, **kwargs)
    fused: Any = fuse(model)
    name = model.pretrained_cfg['architecture']
    if fused_path is not None:
        fused_path = Path(fused_path)
        if fused_path.is_dir():
            fused = load_export(fused_path)
            found, expected = fused.pretrained_cfg['architecture'], stock_architecture(name)
            if found != expected:
                raise UserError(f'{fused_path} is an export of {found}, not of {expected}, the stock form of {name}')
        else:
            weights = read_checkpoint(fused_path).state_dict
            load_strictly(fused, weights, fused_path, f'{name} in stock form')
    return verify(model, fused)


def _training_architecture(name: str, layer: str) -> Tuple[str, Dict[str, Any]]:
    """Our model whose stock form a stock model is, and what it is built with."""
    as_method(layer)
    stock = name.partition('.')[0]
    for prefix in TRAINING_PREFIXES:
        stock = stock.removeprefix(prefix)
    if timm.is_model(f'{layer}_{stock}'):
        return f'{layer}_{stock}', {}
    if timm.is_model(f'repan_{stock}'):
        return f'repan_{stock}', dict(rep_layer=layer)
    known = {model.partition('_')[2] for model in timm.list_models([f'{layer}_*', 'repan_*'])}
    raise UserError(
        f'layer {layer!r} stands for the stock models {", ".join(sorted(known))}; got {name!r}. In Python '
        f'timm_rep.expand(model, {layer!r}) takes any CNN, and timm_rep.save writes what it makes')


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
        layer: Name of a method. Where there is no model of that name in front, it is a ``repan_`` model with this
            ``rep_layer``.
        architecture: The stock model that a file of weights is of, if the file does not say it.
        num_classes: Of the classifier; by default as the run was told, else as the weights have it.
        in_chans: Image channels; by default as the run was told, else as the weights have it.

    Returns:
        What the check of the outputs found. Nothing is written unless it succeeds.

    Raises:
        FileExistsError: If the output exists.
        FileNotFoundError: If the source is neither a file nor a model of timm's.
        UserError: For an unknown layer or model, a file that is not safe to read, or if the weights are not those of
            the model in stock form.
        HubError: If pretrained weights cannot be fetched.
        VerificationError: If the outputs differ.
    """
    output = new_output(output)
    overrides = dict(num_classes=num_classes, in_chans=in_chans)
    if Path(source).is_file():
        checkpoint = read_checkpoint(source)
        name = architecture or checkpoint.architecture
        if name is None:
            raise UserError(f'{source} does not say which model it is of; name it (--model)')
        target, layer_args = _training_architecture(name, layer)
        args = {key: value for key, value in model_args_of(checkpoint, name, overrides).items() if key not in OWN_ARGS}
        args.update(layer_args)
        stock: Any = build_filled(
            checkpoint, f'{name} in stock form', lambda: create_model(target, inference_mode=True, **args))
    elif timm.is_model(str(source)):
        if not timm.models.is_model_pretrained(str(source)):
            raise UserError(f'timm has no pretrained weights of {source}')
        target, layer_args = _training_architecture(str(source), layer)
        args = {key: value for key, value in overrides.items() if value is not None}
        with hub_errors(f'{source}'):
            stock = create_model(str(source), pretrained=True, **args)
        args.update(layer_args)
    else:
        raise FileNotFoundError(f'{source} is neither a file nor a model of timm')
    model: Any = create_model(target, **args).eval()
    model.load_state_dict(checkpoint_filter_fn(stock.state_dict(), model))
    settings = {key: stock.pretrained_cfg[key] for key in SETTINGS_FIELDS if key in stock.pretrained_cfg}
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **settings}
    report = verify(model, stock.eval())
    save_weights(model, output)
    return report
