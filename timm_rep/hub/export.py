"""Export a model as a folder for the Hugging Face Hub, in stock form: any timm loads it without this package."""
import copy
import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.models import save_for_hf

from .._version import __version__
from ..core.errors import UserError
from ..core.expand import expand
from ..core.expansion import Expansion, expansion_of
from ..core.fuse import fuse
from ..core.verify import Report, check_values, verify
from ..core.walk import annealed_modules, image_channels
from ..io.extras import has_packages, install_command
from ..io.output import written_whole
from ..io.runs import Run, write_run
from ..models.names import is_training_form, stock_form_args
from ..report.cost import Costs
from ..report.images import ImageCheck
from ..report.plots import draw_annealing
from .card import NOT_MEASURED, UNKNOWN_LICENSE, Expanding, model_card, training_form_card

__all__ = [
    'CARD_FILE', 'CONFIG_FILE', 'DATA_FIELDS', 'MANAGED_FILES', 'SELF_CHECK_BYTES', 'SELF_CHECK_FILE', 'WEIGHTS_FILE',
    'export_folder', 'export_training_form', 'new_folder', 'time_steps_of',
]

_logger = logging.getLogger(__name__)

WEIGHTS_FILE = 'model.safetensors'
CONFIG_FILE = 'config.json'
CARD_FILE = 'README.md'
PLOT_FILE = 'training.png'
# Input and output of the published weights, for anyone to compare with.
SELF_CHECK_FILE = 'test/rand_tensors.safetensors'
# What it may weigh, to be read. Besides images it holds a little.
SELF_CHECK_BYTES = 2 ** 26
SELF_CHECK_ALLOWANCE = 2 ** 20
SELF_CHECK_IMAGES = 2
# All that an export may write: what a new publication may replace or remove.
MANAGED_FILES = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, PLOT_FILE, SELF_CHECK_FILE, 'args.yaml', 'summary.csv')

# What an exported pretrained_cfg takes over from the model's own: how to build and feed the network. All the rest (tag,
# url, test sizes, notes ...) may be about other weights, of which the model was once made.
STRUCTURE_FIELDS = ('architecture', 'fixed_input_size', 'min_input_size', 'pool_size', 'first_conv', 'classifier')
DATA_FIELDS = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')


def new_folder(path: Union[str, Path]) -> Path:
    """Check that a folder can be written to.

    Args:
        path: New or empty folder.

    Returns:
        The absolute path.

    Raises:
        FileExistsError: If it is a file or a folder that is not empty.
    """
    path = Path(path).resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        kind = 'a folder that is not empty' if path.is_dir() else 'a file'
        raise FileExistsError(f'{path} is {kind}; give a new or empty folder (nothing was changed)')
    return path


def time_steps_of(model: nn.Module) -> int:
    """In how many time steps a model was trained: one, unless it was annealed."""
    return 1 + max((int(module.time_step) for _, module in annealed_modules(model)), default=0)


def _architecture(model: nn.Module) -> str:
    architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    if architecture is None or not timm.is_model(architecture):
        raise UserError(
            f'export_folder takes a model built by timm.create_model, got a {type(model).__name__} '
            + (f'of the unknown architecture {architecture!r}' if architecture else 'without architecture')
        )
    return str(architecture)


def _check_labels(label_names: Optional[Sequence[str]], model: Any) -> None:
    if label_names is not None and len(label_names) != model.num_classes:
        raise UserError(
            f'label_names must name the {model.num_classes} classes of the model, got {len(label_names)} names')


def _check_metrics(metrics: Mapping[str, Optional[float]]) -> None:
    for name, value in metrics.items():
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise UserError(f'metrics must be finite numbers, or None for {NOT_MEASURED!r}; got {name}={value!r}')


def _pretrained_cfg(model: Any, data_config: Mapping[str, Any], **own_fields: Any) -> Dict[str, Any]:
    """Describe a model's weights as weights of their own."""
    unknown = set(data_config) - set(DATA_FIELDS)
    if unknown:
        raise UserError(f'unknown in data_config: {", ".join(sorted(unknown))}; allowed are {", ".join(DATA_FIELDS)}')
    before = model.pretrained_cfg
    cfg = {key: before[key] for key in (*STRUCTURE_FIELDS, *DATA_FIELDS) if key in before}
    cfg.update(data_config, **own_fields)
    in_chans = image_channels(model)
    if 'input_size' in data_config and cfg['input_size'][0] != in_chans:
        raise UserError(f'data_config: the model takes {in_chans} channels, got input_size {cfg["input_size"]}')
    cfg['input_size'] = (in_chans, *cfg['input_size'][1:])
    if tuple(cfg['input_size'][1:]) != tuple(before['input_size'][1:]):
        cfg['pool_size'] = None
    return cfg


def _self_check_inputs(model: nn.Module, cfg: Mapping[str, Any]) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    size = (image_channels(model), *cfg['input_size'][1:])
    image_bytes = math.prod(size) * dtype.itemsize
    images = min(SELF_CHECK_IMAGES, (SELF_CHECK_BYTES - SELF_CHECK_ALLOWANCE) // image_bytes)
    if images < 1:
        raise UserError(
            f'an image of {"x".join(map(str, size))} takes {image_bytes} bytes, too much for the self-check of an '
            f'export, which takes at most {SELF_CHECK_BYTES - SELF_CHECK_ALLOWANCE}')
    return torch.randn(images, *size, generator=torch.Generator().manual_seed(0)).to(dtype)


def _training_args(model: nn.Module, architecture: str) -> Optional[Dict[str, Any]]:
    """What builds one of our models besides its name and the number of classes; None if that cannot be written down."""
    args = {
        key: value for key, value in getattr(model, '_model_args', {}).items()
        if key not in ('num_classes', 'in_chans', 'inference_mode')
        and not key.endswith(('drop_rate', 'drop_path_rate', 'drop_block_rate'))  # no part of the network
    }
    own = timm.get_pretrained_cfg(architecture)
    if own is None or image_channels(model) != own.input_size[0]:
        args['in_chans'] = image_channels(model)
    try:
        json.dumps(args)
    except TypeError:
        return None
    return args


def _expanding(fused: nn.Module, expansion: Expansion) -> Optional[Expanding]:
    """What makes the training form of the stock form, as an argument of ``expand``; None if there is no such."""
    convs = {name for name, module in fused.named_modules() if isinstance(module, nn.Conv2d)}
    by_name = {name: method for name, method in expansion.methods.items() if name in convs}
    candidates: List[Expanding] = [*dict.fromkeys(expansion.methods.values()), by_name]
    for methods in candidates:
        try:
            if expansion_of(expand(fused, methods)).to_list() == expansion.to_list():
                return methods
        except UserError:  # of a method that takes nothing here, or not all of this
            continue
    return None


def _provenance(
        model: nn.Module,
        architecture: str,
        expansion: Expansion,
        report: Optional[Report],
        **facts: Any,
) -> Dict[str, Any]:
    """What config.json says of where the weights come from."""
    difference = None
    if report is not None:
        worst = max(report.layers, key=lambda layer: layer.relative)
        difference = dict(
            outputs_relative=report.model.relative,
            outputs_absolute=report.model.absolute,
            worst_layer=worst.name,
            worst_layer_relative=worst.relative,
            rtol=report.rtol,
        )
    return dict(
        _versions(),
        training_architecture=None if report is None else architecture,
        training_args=_training_args(model, architecture) if is_training_form(architecture) else None,
        expansion=expansion.to_list(),
        time_steps=time_steps_of(model),
        fused_difference=difference,
        **facts,
    )


def _versions() -> Dict[str, Any]:
    return dict(version=__version__, timm=timm.__version__, torch=torch.__version__)


def _draw(run: Run, name: str, folder: Path) -> Optional[str]:
    """Draw the run, if there is what it takes."""
    if not run.history:
        return None
    if not has_packages(['matplotlib']):
        _logger.warning('no drawing of the run: matplotlib is missing (%s)', install_command('demo'))
        return None
    try:
        figure = draw_annealing(list(run.history), name, published=run.epoch)
    except UserError:  # of a run that noted no figure to draw
        return None
    figure.savefig(folder / PLOT_FILE)
    return PLOT_FILE


def _write_model(
        folder: Path,
        model: Any,
        inputs: torch.Tensor,
        provenance: Mapping[str, Any],
        model_args: Mapping[str, Any],
        label_names: Optional[Sequence[str]],
) -> None:
    """Write weights, config.json and self-check, and see that timm rebuilds from the folder alone what was written."""
    config: Dict[str, Any] = {} if label_names is None else dict(label_names=list(label_names))
    config.update(timm_rep=provenance)
    try:
        save_for_hf(model, str(folder), config, model_args=dict(model_args) or None, safe_serialization=True)
    except ValueError as e:  # arguments of the model that are not plain values
        raise UserError(f'config.json cannot say what the model is built with: {e}') from e
    self_check = folder / SELF_CHECK_FILE
    self_check.parent.mkdir()
    with torch.no_grad():
        tensors = dict(input=inputs, output=model.eval()(inputs).contiguous())
    safetensors.torch.save_file(tensors, self_check)
    for file in (self_check, folder / WEIGHTS_FILE):  # which only their owner could read
        file.chmod((folder / CONFIG_FILE).stat().st_mode)
    architecture = model.pretrained_cfg['architecture']
    try:
        rebuilt = timm.create_model(f'local-dir:{folder}', pretrained=True).to(inputs.dtype)
        # large inputs tell ReLU from ReLU6, but may overflow in half precision
        for gain in (1.0, 100.0) if inputs.element_size() >= 4 else (1.0,):
            verify(model, rebuilt, inputs=gain * inputs)
    except (RuntimeError, TypeError, ValueError) as e:  # keys, shapes, arguments, outputs
        raise UserError(f'the model is not what timm builds as {architecture}: {e}') from e


def export_folder(
        model: nn.Module,
        path: Union[str, Path],
        *,
        dataset: Optional[str] = None,
        metrics: Optional[Mapping[str, Optional[float]]] = None,
        metrics_source: Optional[str] = None,
        tag: str = 'timm_rep',
        label_names: Optional[Sequence[str]] = None,
        data_config: Optional[Mapping[str, Any]] = None,
        license: str = UNKNOWN_LICENSE,
        repo: Optional[str] = None,
        run: Optional[Run] = None,
        costs: Optional[Costs] = None,
        images: Optional[ImageCheck] = None,
        train_revision: bool = False,
) -> Path:
    """Write a model in stock form as a folder that ``timm.create_model('local-dir:PATH', pretrained=True)`` loads.

    A copy of the model is fused, compared with its training form, written, and rebuilt from the folder, all before the
    folder gets its name: it appears complete or not at all. It holds ``model.safetensors``, ``config.json`` with the
    provenance under the key ``timm_rep``, a model card and ``test/rand_tensors.safetensors``, an input with its output;
    of a run also ``args.yaml``, ``summary.csv`` and, if matplotlib is there, a drawing of it.

    Args:
        model: Model of timm or of this package in training or stock form, built by ``timm.create_model``; not changed.
        path: New or empty folder.
        dataset: Name of the data set that the model was trained on.
        metrics: Measured figures by name; ``top1`` and ``top5`` are accuracies in percent, None is one not measured.
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
        train_revision: Whether the training form will be on the repository's revision ``train``, for the model card.

    Returns:
        The absolute path of the folder.

    Raises:
        FileExistsError: If the path is a file or a folder that is not empty. Nothing is changed.
        UserError: If an argument does not fit the model, or timm does not build the fused model by its architecture's
            name, for example one whose norms are folded too.
        VerificationError: If the fused model is not the function of its training form, or is not finite.
    """
    path = new_folder(path)
    architecture = _architecture(model)
    dataset = ' '.join((dataset or '').split()) or None
    metrics = dict(metrics or {})
    _check_metrics(metrics)
    _check_labels(label_names, model)

    training_form = copy.deepcopy(model).eval().cpu()
    # safetensors takes contiguous tensors only
    fused: Any = fuse(training_form).to(memory_format=torch.contiguous_format)
    expansion = expansion_of(training_form)
    cfg = _pretrained_cfg(fused, data_config or {}, tag=tag, license=license)
    papers = dict.fromkeys(method.paper for method in expansion.methods.values() if method.paper)
    if papers:
        cfg['paper_ids'] = list(papers)
    fused.pretrained_cfg = fused.default_cfg = cfg
    check_values(fused)
    inputs = _self_check_inputs(fused, cfg)
    verified = verify(training_form, fused, inputs=inputs)
    report = verified if any(annealed_modules(training_form)) else None

    provenance = _provenance(
        training_form,
        architecture,
        expansion,
        report,
        dataset=dataset,
        metrics=metrics,
        metrics_source=metrics_source,
        epoch=run and run.epoch,
        costs=costs and dataclasses.asdict(costs),
    )
    if images is not None:
        provenance['images'] = {k: v for k, v in dataclasses.asdict(images).items() if k != 'classes'}
    with written_whole(path) as folder:
        _write_model(folder, fused, inputs, provenance, stock_form_args(cfg['architecture']), label_names)
        plot = None
        if run is not None:
            write_run(run, folder)
            plot = _draw(run, path.name, folder)
        card = model_card(
            path.name, fused, provenance, expansion, _expanding(fused, expansion), report=report, repo=repo, run=run,
            costs=costs, images=images, plot=plot, labelled=label_names is not None, train_revision=train_revision)
        (folder / CARD_FILE).write_text(card, encoding='utf-8', newline='\n')
    _logger.info('exported %s to %s', cfg['architecture'], path)
    return path


def export_training_form(
        model: nn.Module,
        path: Union[str, Path],
        *,
        repo: str,
        tag: str = 'timm_rep',
        label_names: Optional[Sequence[str]] = None,
        license: str = UNKNOWN_LICENSE,
) -> Path:
    """Write a model in training form as a folder that timm loads once this package is imported.

    Args:
        model: One of our models in training form; not changed.
        path: New or empty folder.
        repo: Repository on the Hub where the folder will be a revision.
        tag: As in :func:`export_folder`.
        label_names: As in :func:`export_folder`.
        license: As in :func:`export_folder`.

    Returns:
        The absolute path of the folder.

    Raises:
        FileExistsError: If the path is a file or a folder that is not empty. Nothing is changed.
        UserError: If an argument does not fit the model, or timm does not build the model by its architecture's name.
        VerificationError: If it has values that are not finite.
    """
    path = new_folder(path)
    architecture = _architecture(model)
    _check_labels(label_names, model)
    training_form: Any = copy.deepcopy(model).eval().cpu().to(memory_format=torch.contiguous_format)
    check_values(training_form)
    cfg = _pretrained_cfg(training_form, {}, tag=tag, license=license)
    training_form.pretrained_cfg = training_form.default_cfg = cfg
    provenance = dict(
        _versions(), form='training', training_architecture=architecture,
        expansion=expansion_of(training_form).to_list())
    inputs = _self_check_inputs(training_form, cfg)
    with written_whole(path) as folder:
        _write_model(folder, training_form, inputs, provenance, _training_args(model, architecture) or {}, label_names)
        card = training_form_card(repo, architecture, license)
        (folder / CARD_FILE).write_text(card, encoding='utf-8', newline='\n')
    return path
