"""Export a model as a folder for the Hugging Face Hub, in stock form: any timm loads it without this package."""
import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.models import save_for_hf

from .._version import __version__
from ..core.errors import UserError
from ..core.expand import expand_fresh_
from ..core.expansion import Expansion, expansion_of
from ..core.fuse import fuse
from ..core.verify import check_values, verify
from ..core.walk import annealed_modules, copied, image_channels, image_shape, unwrapped, without_compiled_parts
from ..io.architecture import create_model, per_channel
from ..io.extras import has_packages
from ..io.output import new_folder, written_whole
from ..io.runs import Run, write_run
from ..models.names import is_training_form, plain_args, stock_form_args
from ..models.settings import INPUT_SETTINGS
from ..report.cost import Costs
from ..report.images import ImageCheck
from ..report.plots import draw_annealing
from .card import UNKNOWN_LICENSE, Expanding, model_card

__all__ = [
    'CARD_FILE', 'CONFIG_FILE', 'MANAGED_FILES', 'SELF_CHECK_FILE', 'SELF_CHECK_IMAGES', 'WEIGHTS_FILE',
    'check_training_form', 'export_folder', 'time_steps_of',
]

_logger = logging.getLogger(__name__)

WEIGHTS_FILE = 'model.safetensors'
CONFIG_FILE = 'config.json'
CARD_FILE = 'README.md'
PLOT_FILE = 'training.png'
# Input and output of the published weights, for anyone to compare with.
SELF_CHECK_FILE = 'test/rand_tensors.safetensors'
SELF_CHECK_IMAGES = 2
# All that an export may write: what a new publication may replace or remove.
MANAGED_FILES = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, PLOT_FILE, SELF_CHECK_FILE, 'args.yaml', 'summary.csv')

# What an exported pretrained_cfg takes over from the model's own, beside its input settings: how to build the network.
# All the rest (tag, url, test sizes, notes ...) may be about other weights, of which the model was once made.
STRUCTURE_FIELDS = ('architecture', 'fixed_input_size', 'min_input_size', 'first_conv', 'classifier')


def time_steps_of(model: nn.Module) -> int:
    """In how many time steps a model was trained: one, unless it was annealed."""
    return 1 + max((int(module.time_step) for _, module in annealed_modules(model)), default=0)


def _copy_of(model: Any, label_names: Optional[Sequence[str]]) -> Any:
    """A copy of a model to export, if it can be."""
    model = unwrapped(model)
    cfg = getattr(model, 'pretrained_cfg', None)
    if not isinstance(cfg, dict) or not timm.is_model(cfg.get('architecture') or ''):
        raise UserError(f'a {type(model).__name__} was not built by timm.create_model, which is to load the export')
    if getattr(model, 'num_classes', None) is None:
        raise UserError(f'a {type(model).__name__} puts out feature maps; an export is of a model that classifies')
    if label_names is not None and len(label_names) != model.num_classes:
        raise UserError(
            f'label_names must name the {model.num_classes} classes of the model, got {len(label_names)} names')
    if next(model.parameters()).dtype == torch.float64:
        raise UserError('timm builds networks of 32 bits, so an export cannot hold 64: call model.float() first')
    check_values(model)
    with without_compiled_parts(model):
        return copied(model).eval().cpu()


def _is_built_by_name(model: Any, architecture: str) -> bool:
    """Whether the name of one of our models and the number of its classes alone build it."""
    args = {key for key in getattr(model, '_model_args', {}) if 'drop' not in key}
    known = args <= {'num_classes', 'in_chans', 'inference_mode'} and image_channels(model) == 3
    return known and is_training_form(architecture)


def check_training_form(model: Any) -> None:
    """Refuse a model whose layers its name and arguments do not build, which is how a folder in training form is read.

    Args:
        model: Model in training form, built by ``timm.create_model``.

    Raises:
        UserError: If they do not.
    """
    architecture, args = model.pretrained_cfg['architecture'], plain_args(model)
    with torch.device('meta'):
        layers = expansion_of(create_model(architecture, **args)).to_list()
    if layers != expansion_of(model).to_list():
        raise UserError(
            f'the training form cannot be exported: timm does not build its layers as {architecture}'
            f'{f" with {args}" if args else ""}; leave it out, or keep it with timm_rep.save')


def _expanding(fused: nn.Module, expansion: Expansion) -> Optional[Expanding]:
    """What makes the training form of the stock form, as an argument of ``expand``; None if there is no such."""
    convs = {name for name, module in fused.named_modules() if isinstance(module, nn.Conv2d)}
    by_name = {name: method for name, method in expansion.methods.items() if name in convs}
    candidates: List[Expanding] = [*dict.fromkeys(expansion.methods.values()), by_name]
    for methods in candidates:
        try:
            if expansion_of(expand_fresh_(copied(fused), methods)).to_list() == expansion.to_list():
                return methods
        except UserError:  # of a method that takes nothing here, or not all of this
            continue
    return None


def _draw(run: Run, name: str, folder: Path) -> Optional[str]:
    """Draw the run, if there is what it takes."""
    if not run.history or not has_packages(['matplotlib']):
        return None
    try:
        draw_annealing(list(run.history), name, published=run.epoch).savefig(folder / PLOT_FILE)
    except UserError:  # of a run that noted no figure to draw
        return None
    return PLOT_FILE


def _say_classes_once(path: Path) -> None:
    """Leave the number of classes to the config itself: transformers does not take it from the arguments as well."""
    config = json.loads(path.read_text())
    config.get('model_args', {}).pop('num_classes', None)
    path.write_text(json.dumps(config, indent=2))


def _write_model(
        folder: Path,
        model: Any,
        own_fields: Mapping[str, Any],
        provenance: Mapping[str, Any],
        label_names: Optional[Sequence[str]],
        model_args: Optional[Dict[str, Any]] = None,
) -> None:
    """Write weights, config.json and self-check, and see that timm rebuilds from the folder alone what was written."""
    kept = (*STRUCTURE_FIELDS, *INPUT_SETTINGS)
    cfg = {**{key: model.pretrained_cfg[key] for key in kept if key in model.pretrained_cfg}, **own_fields}
    channels = image_channels(model)
    size = own_fields.get('input_size') or image_shape(model) or cfg['input_size']
    cfg['input_size'] = (channels, *size[1:])
    cfg.update({key: per_channel(cfg[key], channels) for key in ('mean', 'std') if key in cfg})
    model.pretrained_cfg = model.default_cfg = cfg
    config = dict(timm_rep=provenance, **({} if label_names is None else dict(label_names=list(label_names))))
    model._model_args = plain_args(model)
    model.to(memory_format=torch.contiguous_format)  # safetensors takes no other tensors
    dtype, size = next(model.parameters()).dtype, cfg['input_size']
    inputs = torch.randn(SELF_CHECK_IMAGES, *size, generator=torch.Generator().manual_seed(0), device='cpu').to(dtype)
    (folder / SELF_CHECK_FILE).parent.mkdir(parents=True)
    with torch.no_grad():
        tensors = dict(input=inputs, output=model(inputs).contiguous())
    safetensors.torch.save_file(tensors, folder / SELF_CHECK_FILE)
    try:
        save_for_hf(model, str(folder), config, model_args=model_args, safe_serialization=True)
        _say_classes_once(folder / CONFIG_FILE)
        rebuilt = timm.create_model(f'local-dir:{folder}', pretrained=True).to(dtype)
        # large inputs tell ReLU from ReLU6, but may overflow in half precision
        for gain in (1.0, 100.0) if dtype.itemsize >= 4 else (1.0,):
            verify(model, rebuilt, inputs=gain * inputs)
    except (RuntimeError, TypeError, ValueError) as e:  # keys, shapes, arguments, outputs
        raise UserError(f'the model is not what timm builds as {cfg["architecture"]}: {e}') from e


def export_folder(
        model: nn.Module,
        path: Union[str, Path],
        *,
        dataset: Optional[str] = None,
        metrics: Optional[Mapping[str, float]] = None,
        metrics_source: Optional[str] = None,
        tag: str = 'timm_rep',
        label_names: Optional[Sequence[str]] = None,
        data_config: Optional[Mapping[str, Any]] = None,
        license: str = UNKNOWN_LICENSE,
        repo: Optional[str] = None,
        run: Optional[Run] = None,
        costs: Optional[Costs] = None,
        images: Optional[ImageCheck] = None,
        training_folder: Union[str, Path, None] = None,
) -> Path:
    """Write a model in stock form as a folder that ``timm.create_model('local-dir:PATH', pretrained=True)`` loads.

    A copy of the model is fused, compared with its training form, written, and rebuilt from the folder, all before the
    folder gets its name: it appears complete or not at all. It holds ``model.safetensors``, ``config.json`` with the
    provenance under the key ``timm_rep``, a model card and ``test/rand_tensors.safetensors``, an input with its output;
    of a run also ``args.yaml``, ``summary.csv`` and, if matplotlib is there, a drawing of it.

    Args:
        model: Model of timm or of this package in training or stock form, built by ``timm.create_model``; not changed.
            What is around it (DDP, torch.compile) is left out.
        path: New or empty folder.
        dataset: Name of the data set that the model was trained on.
        metrics: Measured figures by name; ``top1`` and ``top5`` are accuracies in percent.
        metrics_source: Who measured the accuracies and on what, for the model card.
        tag: Recipe and data set, in timm's sense of a tag, e.g. ``'orepa_in1k'``.
        label_names: Names of the classes, in the order of the classifier.
        data_config: What the images go through, as ``timm.data.resolve_data_config`` gives it; by default what the
            model's ``pretrained_cfg`` says.
        license: Licence of the weights, as an identifier of the Hub; by default none is claimed.
        repo: Repository on the Hub where the folder will be, for the model card.
        run: The training run.
        costs: What both forms cost.
        images: How both forms compare on real images.
        training_folder: New or empty folder for one of our models as it is, with all branches, which the card says is
            on the repository's revision ``train``.

    Returns:
        The absolute path of the folder.

    Raises:
        FileExistsError: If the path is a file or a folder that is not empty. Nothing is changed.
        UserError: If an argument does not fit the model, or timm does not build the fused model by its architecture's
            name, for example one whose norms are folded too; or not the training form, if that is asked for.
        VerificationError: If the fused model is not the function of its training form, or is not finite.
    """
    path = new_folder(path)
    training_folder = None if training_folder is None else new_folder(training_folder)
    if training_folder is not None and (training_folder in (path, *path.parents) or path in training_folder.parents):
        raise UserError(f'the training form needs a folder beside {path}, not in or around it, got {training_folder}')
    training_form = _copy_of(model, label_names)
    architecture = training_form.pretrained_cfg['architecture']
    if training_folder is not None:
        check_training_form(training_form)
    fused: Any = fuse(training_form)
    report = verify(training_form, fused)
    expansion = expansion_of(training_form)
    papers = dict.fromkeys(method.paper for method in expansion.methods.values() if method.paper)
    own_fields = dict(data_config or {}, tag=tag, license=license, **(dict(paper_ids=list(papers)) if papers else {}))
    provenance = dict(
        version=__version__,
        timm=timm.__version__,
        torch=torch.__version__,
        training_architecture=architecture if expansion.methods else None,
        built_by_name=_is_built_by_name(training_form, architecture),
        expansion=expansion.to_list(),
        time_steps=time_steps_of(training_form),
        fused_difference=dict(
            outputs_relative=report.model.relative,
            worst_layer_relative=max(layer.relative for layer in report.layers),
            rtol=report.rtol,
        ) if expansion.methods else None,
        dataset=' '.join((dataset or '').split()) or None,
        metrics=dict(metrics or {}),
        metrics_source=metrics_source,
        epoch=run and run.epoch,
        costs=costs and dataclasses.asdict(costs),
        images=images and dataclasses.asdict(dataclasses.replace(images, classes=())),
    )
    with written_whole(path) as folder:
        stock_args = stock_form_args(fused.pretrained_cfg['architecture'])
        _write_model(folder, fused, own_fields, provenance, label_names, stock_args)
        plot = None
        if run is not None:
            write_run(run, folder)
            plot = _draw(run, path.name, folder)
        card = model_card(
            path.name, fused, provenance, expansion, _expanding(fused, expansion), repo=repo, run=run, costs=costs,
            images=images, plot=plot, labelled=label_names is not None, train_revision=training_folder is not None)
        (folder / CARD_FILE).write_text(card, encoding='utf-8', newline='\n')
        if training_folder is not None:
            with written_whole(training_folder) as other:
                _write_model(other, training_form, own_fields, dict(provenance, form='training'), label_names)
                shutil.copyfile(folder / CARD_FILE, other / CARD_FILE)
    _logger.info('exported %s to %s', fused.pretrained_cfg['architecture'], path)
    return path
