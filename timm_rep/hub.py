"""Export a model as a folder for the Hugging Face Hub, in stock form: any timm loads it without this package."""
import copy
import logging
import math
import shutil
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import huggingface_hub
import timm
import torch
import torch.nn as nn
from timm.models import save_for_hf

from .layers import DiverseBranchConv2d, LinearRepLayer
from .surgery import annealed_modules, fuse, image_channels
from .verification import Report, VerificationError, verify

__all__ = ['export_folder']

_logger = logging.getLogger(__name__)

# What an exported pretrained_cfg takes over from the model's own: how to build and feed the network. All the rest (tag,
# url, test sizes, notes ...) may be about other weights, of which the model was once made.
STRUCTURE_FIELDS = ('architecture', 'fixed_input_size', 'min_input_size', 'pool_size', 'first_conv', 'classifier')
DATA_FIELDS = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
# Rows that every model card has.
METRICS = dict(top1='Top-1 accuracy (%)', top5='Top-5 accuracy (%)')
NOT_MEASURED = 'not measured'

PAPERS = dict(OREPA='arXiv:2204.00826', DBB='arXiv:2103.13425')
CITATIONS = dict(
    OREPA="""@inproceedings{hu2022online,
  title={Online Convolutional Re-parameterization},
  author={Hu, Mu and Feng, Junyi and Hua, Jiashen and Lai, Baisheng and Huang, Jianqiang and Gong, Xiaojin and
    Hua, Xian-Sheng},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2022}
}""",
    DBB="""@inproceedings{ding2021diverse,
  title={Diverse Branch Block: Building a Convolution as an Inception-like Unit},
  author={Ding, Xiaohan and Zhang, Xiangyu and Han, Jungong and Ding, Guiguang},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2021}
}""",
    timm="""@misc{rw2019timm,
  author={Ross Wightman},
  title={PyTorch Image Models},
  year={2019},
  howpublished={\\url{https://github.com/huggingface/pytorch-image-models}},
  doi={10.5281/zenodo.4414861}
}""",
)


def _methods(model: nn.Module) -> List[str]:
    layers = [layer for _, layer in annealed_modules(model)]
    found = dict(
        OREPA=any(isinstance(layer, LinearRepLayer) for layer in layers),
        DBB=any(isinstance(layer, DiverseBranchConv2d) for layer in layers),
    )
    return [name for name, present in found.items() if present]


def _needs_plugin(architecture: str) -> bool:
    """Whether only this package registers the architecture."""
    return timm.model_entrypoint(architecture).__module__.partition('.')[0] == __name__.partition('.')[0]


def _new_folder(path: Union[str, Path]) -> Path:
    path = Path(path).resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        kind = 'a folder that is not empty' if path.is_dir() else 'a file'
        raise FileExistsError(f'{path} is {kind}; give a new or empty folder (nothing was changed)')
    return path


def _architecture(model: nn.Module) -> str:
    architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    if architecture is None or not timm.is_model(architecture):
        raise ValueError(
            f'export_folder takes a model built by timm.create_model, got a {type(model).__name__} '
            + (f'of the unknown architecture {architecture!r}' if architecture else 'without architecture')
        )
    return architecture


def _check_labels(label_names: Optional[Sequence[str]], model: Any) -> None:
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(
            f'label_names must name the {model.num_classes} classes of the model, got {len(label_names)} names')


def _check_metrics(metrics: Mapping[str, Optional[float]]) -> None:
    for name, value in metrics.items():
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ValueError(f'metrics must be finite numbers, or None for {NOT_MEASURED!r}; got {name}={value!r}')


def _check_finite(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise VerificationError(f'{name} of the fused model has non-finite values')


def _pretrained_cfg(model: Any, data_config: Mapping[str, Any]) -> Dict[str, Any]:
    """Describe a fused model's weights as weights of their own."""
    unknown = set(data_config) - set(DATA_FIELDS)
    if unknown:
        raise ValueError(f'unknown in data_config: {", ".join(sorted(unknown))}; allowed are {", ".join(DATA_FIELDS)}')
    own = model.pretrained_cfg
    cfg = {key: own[key] for key in (*STRUCTURE_FIELDS, *DATA_FIELDS) if key in own}
    cfg.update(data_config)
    in_chans = image_channels(model)
    if 'input_size' in data_config and cfg['input_size'][0] != in_chans:
        raise ValueError(f'data_config: the model takes {in_chans} channels, got input_size {cfg["input_size"]}')
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


def _model_card(
        name: str,
        model: Any,
        provenance: Mapping[str, Any],
        report: Optional[Report],
) -> huggingface_hub.ModelCard:
    cfg, dataset, metrics = model.pretrained_cfg, provenance['dataset'], provenance['metrics']
    architecture = cfg['architecture']
    plugin = _needs_plugin(architecture)
    top1 = metrics.get('top1')
    data = huggingface_hub.ModelCardData(
        model_name=name,
        license=cfg['license'],
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_rep', 'structural-re-parameterization'],
        eval_results=None if top1 is None or dataset is None else [huggingface_hub.EvalResult(
            task_type='image-classification',
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type='accuracy',
            metric_name='top-1 accuracy in percent',
            metric_value=top1,
        )],
    )

    labels = dict(METRICS, **{key: key for key in metrics if key not in METRICS})
    rows = {label: metrics.get(key) for key, label in labels.items()}
    rows['Largest difference of the fused outputs, relative'] = None if report is None else report.model.relative
    table = '\n'.join(f'| {label} | {NOT_MEASURED if v is None else format(v, ".4g")} |' for label, v in rows.items())

    if plugin:
        needs = f'timm has no `{architecture}`: install timm_rep and import it first, which registers the architecture.'
    else:
        needs = f'The weights are those of timm\'s own `{architecture}`: timm alone loads them, nothing else is needed.'
    if provenance['rep_layers']:
        layers = ', '.join(f'{count} {layer}' for layer, count in provenance['rep_layers'].items())
        trained_as = f'`{provenance["training_architecture"]}` ({layers})'
    else:
        trained_as = 'not stated: the model was exported from its stock form'
    methods = provenance['methods'] or list(PAPERS)
    citations = '\n\n'.join(f'```bibtex\n{CITATIONS[key]}\n```' for key in (*methods, 'timm'))
    parameters = sum(p.numel() for p in model.parameters())
    imports = 'import timm_rep  # registers the architecture\nimport timm' if plugin else 'import timm'
    return huggingface_hub.ModelCard(f"""---
{data.to_yaml()}
---

# {name}

An image classifier, trained with timm_rep and fused into `{architecture}`: structural re-parameterization trains with
several branches for each convolution and folds them into one afterwards.

## Model details

- **Architecture:** `{architecture}`, {parameters / 1e6:.2f} M parameters
- **Trained as:** {trained_as}
- **Data set:** {dataset or 'not stated'}
- **Classes:** {model.num_classes}
- **Images:** {' x '.join(map(str, cfg['input_size']))} (channels, height, width)
- **Versions:** timm_rep {provenance['version']}, timm {provenance['timm']}, torch {provenance['torch']}

## How to load it

{needs}

```python
{imports}

model = timm.create_model('hf-hub:ORGANISATION/{name}', pretrained=True).eval()  # from the Hub
model = timm.create_model('local-dir:{name}', pretrained=True).eval()  # from this folder (timm 1.0.26 or newer)
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
```

## Results

| Figure | Value |
|---|---|
{table}

## Citation

{citations}
""")


def _check_reload(folder: Path, fused: Any, inputs: torch.Tensor) -> None:
    """Check that timm rebuilds from the folder alone the network that was written there."""
    architecture = fused.pretrained_cfg['architecture']
    try:
        reloaded = timm.create_model(f'local-dir:{folder}', pretrained=True).to(inputs.dtype)
        # large inputs tell ReLU from ReLU6, but may overflow in half precision
        for gain in (1.0, 100.0) if inputs.element_size() >= 4 else (1.0,):
            verify(fused, reloaded, inputs=gain * inputs)
    except RuntimeError as e:
        raise RuntimeError(f'the fused model is not what timm builds as {architecture}: {e}') from e


def export_folder(
        model: nn.Module,
        path: Union[str, Path],
        *,
        dataset: Optional[str] = None,
        metrics: Optional[Mapping[str, Optional[float]]] = None,
        tag: str = 'timm_rep',
        label_names: Optional[Sequence[str]] = None,
        data_config: Optional[Mapping[str, Any]] = None,
        license: str = 'apache-2.0',
) -> Path:
    """Write a model in stock form as a folder that ``timm.create_model('local-dir:PATH', pretrained=True)`` loads.

    A copy of the model is fused, compared with its training form, written, and rebuilt from the folder, all before the
    folder gets its name: it appears complete or not at all. It holds ``model.safetensors``, ``config.json`` with the
    provenance under the key ``timm_rep``, and a model card.

    Args:
        model: Model of timm or of this package in training or stock form, built by ``timm.create_model``; not changed.
        path: New or empty folder.
        dataset: Name of the data set that the model was trained on.
        metrics: Measured figures by name; ``top1`` and ``top5`` are accuracies in percent, None is one not measured.
        tag: Recipe and data set, in timm's sense of a tag, e.g. ``'orepa_in1k'``.
        label_names: Names of the classes, in the order of the classifier.
        data_config: What the images go through, as ``timm.data.resolve_data_config`` gives it; by default what the
            model's ``pretrained_cfg`` says.
        license: Licence of the weights, as an identifier of the Hub.

    Returns:
        The absolute path of the folder.

    Raises:
        FileExistsError: If the path is a file or a folder that is not empty. Nothing is changed.
        ValueError: If the model has no architecture that timm can build, or an argument does not fit it.
        VerificationError: If the fused model is not the function of its training form, or is not finite.
        RuntimeError: If timm does not rebuild the fused model, for example one whose norms are folded too.
    """
    from . import __version__  # not known yet when the package imports this module

    path = _new_folder(path)
    architecture = _architecture(model)
    metrics = dict(metrics or {})
    _check_metrics(metrics)
    _check_labels(label_names, model)

    training_form = copy.deepcopy(model).eval().cpu()
    # safetensors takes contiguous tensors only
    fused: Any = fuse(training_form).to(memory_format=torch.contiguous_format)
    cfg = _pretrained_cfg(fused, data_config or {})
    _check_finite(fused)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, *cfg['input_size'], generator=generator).to(next(fused.parameters()).dtype)
    layers = Counter(type(layer).__name__ for _, layer in annealed_modules(training_form))
    checked = verify(training_form, fused, inputs=inputs)
    report = checked if layers else None

    methods = _methods(training_form)
    cfg.update(tag=tag, license=license)
    if methods:
        cfg['paper_ids'] = [PAPERS[method] for method in methods]
    fused.pretrained_cfg = fused.default_cfg = cfg
    provenance = dict(
        version=__version__,
        timm=timm.__version__,
        torch=torch.__version__,
        training_architecture=architecture if layers else None,
        rep_layers=dict(layers),
        methods=methods,
        fused_difference=_difference(report),
        dataset=dataset,
        metrics=metrics,
    )
    model_config: Dict[str, Any] = dict(timm_rep=provenance)
    if label_names is not None:
        model_config['label_names'] = list(label_names)
    model_args = dict(inference_mode=True) if _needs_plugin(cfg['architecture']) else None

    temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}')
    try:
        save_for_hf(fused, str(temporary), model_config, model_args=model_args, safe_serialization=True)
        _model_card(path.name, fused, provenance, report).save(temporary / 'README.md')
        _check_reload(temporary, fused, inputs)
        if path.exists():
            path.rmdir()  # empty; on Windows a folder cannot be renamed onto it
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _logger.info('exported %s to %s', cfg['architecture'], path)
    return path
