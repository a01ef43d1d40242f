"""Export a model as a folder for the Hugging Face Hub, in stock form: any timm loads it without this package."""
import ast
import copy
import dataclasses
import importlib.util
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.models import save_for_hf

from ..core.errors import UserError
from ..core.fuse import fuse
from ..core.layers import (
    AnnealedModule,
    AnnealedRepVggBlock,
    AsymmetricConv2d,
    DiverseBranchConv2d,
    LinearRepLayer,
    RepConv2d,
)
from ..core.verify import Report, check_values, verify
from ..core.walk import annealed_modules, image_channels, rep_layers
from ..io.output import new_folder, written_whole
from ..io.runs import Run, write_run
from ..report.cost import Costs
from ..report.images import ImageCheck
from ..report.plots import draw_annealing
from .card import NOT_MEASURED, PAPERS, UNKNOWN_LICENSE, model_card, needs_plugin, restoring_args, training_form_card

__all__ = [
    'CARD_FILE', 'CONFIG_FILE', 'MANAGED_FILES', 'SELF_CHECK_BYTES', 'SELF_CHECK_FILE', 'WEIGHTS_FILE',
    'export_folder', 'export_training_form', 'methods_of', 'why_not_restored',
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
# Of restored weights in float32, to tell another network: side branches are large against what they cancel to.
RESTORED_RTOL = 1e-4
DATA_FIELDS = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')


def methods_of(model: nn.Module) -> List[str]:
    """Names of the published methods that a model's rep layers come from.

    Args:
        model: Any model.

    Returns:
        Keys of ``model_card.METHODS``; none for a stock model.
    """
    layers = [layer for _, module in annealed_modules(model) for layer in module.modules()
              if isinstance(layer, AnnealedModule)]
    found = dict(
        OREPA=any(isinstance(layer, LinearRepLayer) for layer in layers),
        DBB=any(isinstance(layer, DiverseBranchConv2d) for layer in layers),
        ACB=any(isinstance(layer, AsymmetricConv2d) for layer in layers),
        REP=any(isinstance(layer, (RepConv2d, AnnealedRepVggBlock)) for layer in layers),
        RepAn=any(int(layer.time_step) > 0 for layer in layers),
    )
    return [name for name, present in found.items() if present]


def _architecture(model: nn.Module) -> str:
    architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    if architecture is None or not timm.is_model(architecture):
        raise UserError(
            f'export_folder takes a model built by timm.create_model, got a {type(model).__name__} '
            + (f'of the unknown architecture {architecture!r}' if architecture else 'without architecture')
        )
    return architecture


def _check_labels(label_names: Optional[Sequence[str]], model: Any) -> None:
    if label_names is not None and len(label_names) != model.num_classes:
        raise UserError(
            f'label_names must name the {model.num_classes} classes of the model, got {len(label_names)} names')


def _check_metrics(metrics: Mapping[str, Optional[float]]) -> None:
    for name, value in metrics.items():
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise UserError(f'metrics must be finite numbers, or None for {NOT_MEASURED!r}; got {name}={value!r}')


def _pretrained_cfg(model: Any, data_config: Mapping[str, Any]) -> Dict[str, Any]:
    """Describe a fused model's weights as weights of their own."""
    unknown = set(data_config) - set(DATA_FIELDS)
    if unknown:
        raise UserError(f'unknown in data_config: {", ".join(sorted(unknown))}; allowed are {", ".join(DATA_FIELDS)}')
    own = model.pretrained_cfg
    cfg = {key: own[key] for key in (*STRUCTURE_FIELDS, *DATA_FIELDS) if key in own}
    cfg.update(data_config)
    in_chans = image_channels(model)
    if 'input_size' in data_config and cfg['input_size'][0] != in_chans:
        raise UserError(f'data_config: the model takes {in_chans} channels, got input_size {cfg["input_size"]}')
    cfg['input_size'] = (in_chans, *cfg['input_size'][1:])
    if tuple(cfg['input_size'][1:]) != tuple(own['input_size'][1:]):
        cfg['pool_size'] = None
    return cfg


def _difference(report: Optional[Report]) -> Optional[Dict[str, Any]]:
    """Numbers of a report for config.json; None where there was no training form to compare with."""
    if report is None:
        return None
    worst = max(report.layers, key=lambda difference: difference.relative)
    return dict(
        outputs_relative=report.model.relative,
        outputs_absolute=report.model.absolute,
        worst_layer=worst.name,
        worst_layer_relative=worst.relative,
        rtol=report.rtol,
    )


def _check_same_network(model: nn.Module, other: nn.Module, inputs: torch.Tensor, rtol: Optional[float] = None) -> None:
    # large inputs tell ReLU from ReLU6, but may overflow in half precision
    for gain in (1.0, 100.0) if inputs.element_size() >= 4 else (1.0,):
        verify(model, other, inputs=gain * inputs, rtol=rtol)


def _check_reload(folder: Path, fused: Any, inputs: torch.Tensor) -> None:
    """Check that timm rebuilds from the folder alone the network that was written there."""
    architecture = fused.pretrained_cfg['architecture']
    try:
        _check_same_network(fused, timm.create_model(f'local-dir:{folder}', pretrained=True).to(inputs.dtype), inputs)
    except (RuntimeError, UserError) as e:
        raise RuntimeError(f'the fused model is not what timm builds as {architecture}: {e}') from e


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


@torch.no_grad()
def _write_self_check(model: nn.Module, inputs: torch.Tensor, folder: Path) -> None:
    path = folder / SELF_CHECK_FILE
    path.parent.mkdir()
    safetensors.torch.save_file(dict(input=inputs, output=model.eval()(inputs).contiguous()), path)


def _draw(run: Run, name: str, folder: Path) -> Optional[str]:
    """Draw the run, if there is what it takes."""
    if not run.history:
        return None
    if importlib.util.find_spec('matplotlib') is None:
        _logger.warning('no drawing of the run: matplotlib is missing (pip install "timm_rep[demo]")')
        return None
    try:
        figure = draw_annealing(list(run.history), name, published=run.epoch)
    except ValueError:
        return None
    figure.savefig(folder / PLOT_FILE)
    return PLOT_FILE


def _training_args(model: nn.Module, architecture: str) -> Dict[str, Any]:
    """What builds the training form besides the name of its architecture and the number of classes."""
    args = {
        key: value for key, value in getattr(model, '_model_args', {}).items()
        if key not in ('num_classes', 'in_chans', 'inference_mode')
        and not key.endswith(('drop_rate', 'drop_path_rate', 'drop_block_rate'))  # no part of the network
    }
    own: Any = timm.get_pretrained_cfg(architecture)
    if image_channels(model) != own.input_size[0]:
        args['in_chans'] = image_channels(model)
    return args


def why_not_restored(
        fused: Any,
        architecture: str,
        args: Mapping[str, Any],
        overlay: Mapping[str, Any],
) -> Optional[str]:
    """Put fused weights into the training form as timm does it, and compare.

    Args:
        fused: Stock form, on the CPU.
        architecture: Name of the training form.
        args: Of ``timm.create_model``.
        overlay: What its ``pretrained_cfg_overlay`` says, besides where the weights are.

    Returns:
        None if the training form has the same outputs, else what is wrong.
    """
    if not _is_literal(args):
        return f'not all of its arguments can be written down: {args}'
    fused = copy.deepcopy(fused).float()
    weights = dict(overlay, state_dict=fused.state_dict())
    try:
        model = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=weights, **args).eval()
        _check_same_network(fused, model, _self_check_inputs(fused, fused.pretrained_cfg), RESTORED_RTOL)
    except (RuntimeError, TypeError, ValueError) as e:
        return str(e)
    return None


def _is_literal(args: Mapping[str, Any]) -> bool:
    try:
        return bool(ast.literal_eval(repr(dict(args))) == args)
    except (SyntaxError, ValueError):
        return False


def _label_config(label_names: Optional[Sequence[str]]) -> Dict[str, Any]:
    return {} if label_names is None else dict(label_names=list(label_names))


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

    Returns:
        The absolute path of the folder.

    Raises:
        FileExistsError: If the path is a file or a folder that is not empty. Nothing is changed.
        UserError: If the model has no architecture that timm can build, or an argument does not fit it.
        VerificationError: If the fused model is not the function of its training form, or is not finite.
        RuntimeError: If timm does not rebuild the fused model, for example one whose norms are folded too.
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
    cfg = _pretrained_cfg(fused, data_config or {})
    check_values(fused)
    inputs = _self_check_inputs(fused, cfg)
    # RepVGG blocks with an attach rate, and rep layers, also those inside such blocks
    modules = {**dict(annealed_modules(training_form)), **dict(rep_layers(training_form))}
    layers = Counter(type(module).__name__ for module in modules.values())
    checked = verify(training_form, fused, inputs=inputs)
    report = checked if layers else None

    methods = methods_of(training_form)
    cfg.update(tag=tag, license=license)
    if methods:
        cfg['paper_ids'] = [PAPERS[method] for method in methods if method in PAPERS]
    fused.pretrained_cfg = fused.default_cfg = cfg
    provenance = dict(
        _versions(),
        training_architecture=architecture if layers else None,
        training_args=_training_args(model, architecture),
        rep_layers=dict(layers),
        methods=methods,
        fused_difference=_difference(report),
        dataset=dataset,
        metrics=metrics,
        metrics_source=metrics_source,
        epoch=None if run is None else run.epoch,
        costs=None if costs is None else dataclasses.asdict(costs),
    )
    if images is not None:
        provenance['images'] = {k: v for k, v in dataclasses.asdict(images).items() if k != 'classes'}
    if layers and needs_plugin(architecture):
        why = why_not_restored(fused, architecture, *restoring_args(provenance, cfg, fused.num_classes))
        if why is not None:
            _logger.warning('the card does not say how to restore %s from these weights: %s', architecture, why)
            provenance['training_args'] = None
    model_args = dict(inference_mode=True) if needs_plugin(cfg['architecture']) else None
    with written_whole(path) as temporary:
        config = dict(_label_config(label_names), timm_rep=provenance)
        save_for_hf(fused, str(temporary), config, model_args=model_args, safe_serialization=True)
        _write_self_check(fused, inputs, temporary)
        plot = None
        if run is not None:
            write_run(run, temporary)
            plot = _draw(run, path.name, temporary)
        card = model_card(
            path.name, fused, provenance, report, repo=repo, run=run, costs=costs, images=images, plot=plot)
        card.save(temporary / CARD_FILE)
        _check_reload(temporary, fused, inputs)
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
        UserError: If the model has no architecture that timm can build, or an argument does not fit it.
        VerificationError: If it has values that are not finite.
        RuntimeError: If timm does not rebuild it.
    """
    path = new_folder(path)
    architecture = _architecture(model)
    _check_labels(label_names, model)
    training_form: Any = copy.deepcopy(model).eval().cpu().to(memory_format=torch.contiguous_format)
    check_values(training_form)
    cfg = dict(_pretrained_cfg(training_form, {}), tag=tag, license=license)
    training_form.pretrained_cfg = training_form.default_cfg = cfg
    provenance = dict(_versions(), form='training', training_architecture=architecture)
    inputs = _self_check_inputs(training_form, cfg)
    with written_whole(path) as temporary:
        config = dict(_label_config(label_names), timm_rep=provenance)
        save_for_hf(
            training_form,
            str(temporary),
            config,
            model_args=_training_args(model, architecture) or None,
            safe_serialization=True,
        )
        _write_self_check(training_form, inputs, temporary)
        training_form_card(repo, architecture, license).save(temporary / CARD_FILE)
        _check_reload(temporary, training_form, inputs)
    return path


def _versions() -> Dict[str, Any]:
    from .._version import __version__
    return dict(version=__version__, timm=timm.__version__, torch=torch.__version__)
