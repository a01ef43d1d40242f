"""The model card of an exported model: what it is, what was measured, how to use it. It states nothing else."""
import hashlib
import re
import shlex
from typing import Any, List, Mapping, Optional, Tuple, Union

import huggingface_hub

from .._version import REPOSITORY
from ..core.expansion import Expansion
from ..core.methods import Method, as_method
from ..core.verify import Report
from ..io.checkpoint import MODEL_ARGS
from ..io.extras import install_command
from ..io.runs import WHY_LEFT_OUT, Run
from ..models.names import registering_package, timm_has
from ..report.cost import Costs
from ..report.images import ImageCheck

__all__ = [
    'NOT_MEASURED', 'TRAIN_REVISION', 'UNKNOWN_LICENSE', 'Expanding', 'is_generated', 'model_card',
    'training_form_card',
]

Expanding = Union[Method, Mapping[str, Method]]

NOT_MEASURED = 'not measured'
UNKNOWN_LICENSE = 'unknown'  # the Hub's own identifier
TRAIN_REVISION = 'train'
TAGS = ('image-classification', 'timm', 'timm_rep', 'structural-re-parameterization')
# The last line of every card, by which a changed one is known.
MARK = '<!-- written by timm_rep; sha256 of the text above: {} -->'
# Rows that every model card has.
METRICS = dict(top1='Top-1 accuracy (%)', top5='Top-5 accuracy (%)')
# Arguments of train.py that make up a recipe, for the table on the card.
RECIPE_ARGS = (
    'epochs', 'batch_size', 'opt', 'momentum', 'weight_decay', 'lr', 'lr_base', 'sched', 'warmup_epochs', 'min_lr',
    'time_steps', 'attach_warmup_epochs', 'lr_cycle_decay',
    'smoothing', 'aa', 'mixup', 'cutmix', 'reprob', 'drop_path', 'input_size', 'img_size', 'model_ema',
    'model_ema_decay', 'amp', 'seed', 'kd_model_name',
)
# Of any method, where the run had more than one time step.
ANNEALING = (
    'RepAn trains in time steps: at the start of each the branches are folded, the side branches drawn afresh and '
    'brought in with a rising attach rate, the folded kernel put back into the origin branch, and the learning rate '
    'restarted.'
)
ANNEALING_CITATION = """@inproceedings{fei2024repan,
  title={RepAn: Enhanced Annealing through Re-parameterization},
  author={Fei, Xiang and Zheng, Xiawu and Wang, Yan and Chao, Fei and Wu, Chenglin and Cao, Liujuan},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2024}
}"""
TIMM_CITATION = """@misc{rw2019timm,
  author={Ross Wightman},
  title={PyTorch Image Models},
  year={2019},
  howpublished={\\url{https://github.com/huggingface/pytorch-image-models}},
  doi={10.5281/zenodo.4414861}
}"""


def _marked(card: str) -> str:
    """A card with the line behind it that tells whether anybody changed it."""
    return f'{card}\n{MARK.format(hashlib.sha256(card.encode()).hexdigest())}\n'


def is_generated(card: str) -> bool:
    """Whether a card is one of ours that nobody has changed since.

    Args:
        card: The card that is there.

    Returns:
        Whether nothing of anybody's is lost with it.
    """
    return card == _marked(card.rpartition('\n' + MARK.partition('{}')[0])[0])


def _header(name: str, license: str, results: Optional[List[huggingface_hub.EvalResult]] = None) -> str:
    data = huggingface_hub.ModelCardData(
        model_name=name,
        license=license,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=list(TAGS),
        eval_results=results,
    )
    return f'---\n{data.to_yaml()}\n---\n'


def _name(repo: str) -> str:
    return repo.partition('/')[2].partition('@')[0]


def _license(license: str) -> str:
    return 'not stated' if license == UNKNOWN_LICENSE else license


def _figure(value: Optional[float], spec: str = '.4g') -> str:
    if value is None:
        return NOT_MEASURED
    return format(value, spec) if value else '0'


def _eval_results(dataset: Optional[str], metrics: Mapping[str, Any]) -> Optional[List[huggingface_hub.EvalResult]]:
    if dataset is None:
        return None
    results = [
        huggingface_hub.EvalResult(
            task_type='image-classification',
            dataset_type=re.sub(r'[\W_]+', '-', dataset.lower()).strip('-') or 'unknown',
            dataset_name=dataset,
            metric_type='accuracy',
            metric_name=f'top-{k} accuracy in percent',
            metric_value=round(metrics[f'top{k}'], 4),
            metric_args=dict(k=k),
        )
        for k in (1, 5) if metrics.get(f'top{k}') is not None
    ]
    return results or None


def _methods(expansion: Expansion, time_steps: int) -> Tuple[str, List[str]]:
    """What the methods of a model do, and their citations."""
    methods = {method.name: method for method in expansion.methods.values()}.values()
    annealed = time_steps > 1
    summaries = [method.summary for method in methods if method.summary] + [ANNEALING] * annealed
    citations = [method.citation for method in methods if method.citation] + [ANNEALING_CITATION] * annealed
    return ' '.join(summaries), [*citations, TIMM_CITATION]


def _trained_as(provenance: Mapping[str, Any], expansion: Expansion) -> str:
    if provenance['training_architecture'] is None:
        return 'not stated: the model was exported from its stock form'
    time_steps = f', in {provenance["time_steps"]} time steps' if provenance['time_steps'] > 1 else ''
    return f'`{provenance["training_architecture"]}`{time_steps}; {expansion}'


def _training(run: Optional[Run]) -> str:
    if run is None or not run.args:
        return 'Not stated: the model was exported without the arguments of its training run.'
    start = ''.join(f' {option} {shlex.quote(name)}' for option, name in run.start_files.items())
    text = f"""`args.yaml` holds the arguments of the run. The same again, with your own folder of the images:

```sh
timm-rep train --config args.yaml --data-dir IMAGES{start}
```
"""
    if run.processes > 1:
        text += f'\nThe run was on {run.processes} processes at once, each with batches of `batch_size` images.\n'
    if run.left_out:
        text += f'\nLeft out of `args.yaml`, {WHY_LEFT_OUT}: {", ".join(run.left_out)}.\n'
    recipe = {key: run.args[key] for key in RECIPE_ARGS if run.args.get(key) not in (None, '', False)}
    table = '\n'.join(f'| `{key}` | {value} |' for key, value in recipe.items())
    text += f'\n| Argument | Value |\n|---|---|\n{table}\n'
    if run.start_files:
        text += f'\nStarted from {", ".join(run.start_files.values())}, which is not part of this repository.'
    else:
        start = 'the pretrained weights of that name' if run.args.get('pretrained') else 'random weights'
        text += f'\nStarted from {start}.'
    if run.epoch is not None:
        text += f' The weights are those after epoch {run.epoch}, counted from 0 as in `summary.csv`.'
    return text


def _usage(folder: str, repo: str, architecture: str, labelled: bool) -> str:
    package = registering_package(architecture)
    if timm_has(architecture):
        needs = f'The weights are those of timm\'s own `{architecture}`: timm alone loads them, nothing else is needed.'
        imports = 'import timm'
    else:
        needs = f'timm has no `{architecture}`: install {package} and import it first, which registers it.'
        imports = f'import timm\nimport {package}  # registers the architecture'
    label = "model.pretrained_cfg['label_names'][index]" if labelled else 'index'
    return f"""{needs}

Classify an image:

```python
{imports}
import torch
from PIL import Image

model = timm.create_model('hf-hub:{repo}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
with torch.inference_mode():
    scores = model(transform(Image.open('image.jpg').convert('RGB')).unsqueeze(0)).softmax(-1)[0]
for index in scores.argsort(descending=True)[:5].tolist():
    print({label}, f'{{scores[index]:.1%}}')
```

Feature maps of every stage, and embeddings (the pooled features before the classifier):

```python
backbone = timm.create_model('hf-hub:{repo}', pretrained=True, features_only=True).eval()
embedder = timm.create_model('hf-hub:{repo}', pretrained=True, num_classes=0).eval()
```

From a copy of this folder: `timm.create_model('local-dir:{folder}', pretrained=True)` (timm 1.0.26 or newer). To check
that the weights arrived as they were published: `timm-rep verify hf-hub:{repo}`, or compare with the input and the
output in `test/rand_tensors.safetensors`.
"""


def _train_options(args: Mapping[str, Any]) -> str:
    """Arguments of a model as options of timm's train.py, which has some of its own."""
    own = {name: f'--{option.replace("_", "-")}' for option, name in MODEL_ARGS.items()}
    options = [f' {own[key]} {shlex.quote(str(value))}' for key, value in args.items() if key in own]
    others = [shlex.quote(f'{key}={value}') for key, value in args.items() if key not in own]
    return ''.join(options) + (f' --model-kwargs {" ".join(others)}' if others else '')


def _literal(methods: Expanding) -> str:
    """An argument of ``expand`` as it is written in Python."""
    if isinstance(methods, Mapping):
        return '{\n' + ''.join(f'    {name!r}: {_literal(method)},\n' for name, method in methods.items()) + '}'
    return repr(methods.name) if methods == as_method(methods.name) else f'timm_rep.{methods!r}'


def _training_on(repo: str, provenance: Mapping[str, Any], expanding: Optional[Expanding]) -> str:
    """How to get the weights into the training form, or into one with the default method."""
    layers = '' if expanding is None else f', {_literal(expanding)}'
    text = f"""`timm_rep.expand` puts the kernels into the branches of rep layers, with the same outputs:

```python
import timm
import timm_rep

model = timm_rep.expand(timm.create_model('hf-hub:{repo}', pretrained=True){layers})
```

Train it as any timm model, then `timm_rep.fuse(model.eval())`.
"""
    architecture, args = provenance['training_architecture'], provenance['training_args']
    if args is not None:
        text += f"""With timm's train.py, on classes of your own, with a new classifier:

```sh
timm-rep train --data-dir IMAGES --model {architecture}{_train_options(args)} --num-classes N \\
    --pretrained --pretrained-path model.safetensors
```
"""
    return text


def _training_form(repo: str) -> str:
    return f"""```python
import timm
import timm_rep  # registers the architecture

model = timm.create_model('hf-hub:{repo.partition('@')[0]}@{TRAIN_REVISION}', pretrained=True)
```
"""


def _forms(
        parameters: int,
        costs: Optional[Costs],
        images: Optional[ImageCheck],
        report: Optional[Report],
) -> str:
    def pair(values: Any, spec: str) -> str:
        return ' | '.join(_figure(value, spec) for value in values or (None, None))

    millions = [None, parameters / 1e6] if costs is None else [count / 1e6 for count in costs.parameters]
    timed = f', batches of {costs.batch}, float32' if costs else ''
    checked = f' on {images.images} images' if images else ''
    hardware = f'Measured on {costs.hardware}, torch {costs.torch}.' if costs else f'Speed: {NOT_MEASURED}.'
    differences = [
        None if report is None else report.model.relative,
        None if images is None else images.relative,
        None if report is None else max(layer.relative for layer in report.layers),
    ]
    model, real, layer = (_figure(value, '.1e') for value in differences)
    return f"""| | Training form | Stock form (this) |
|---|---|---|
| Parameters (M) | {pair(millions, ".2f")} |
| GMACs of an image | {pair(costs and costs.gmacs, ".3f")} |
| Images per second{timed} | {pair(costs and costs.images_per_second, ".1f")} |
| Top-1 accuracy (%){checked} | {pair(images and images.top1, ".2f")} |
| Top-5 accuracy (%){checked} | {pair(images and images.top5, ".2f")} |

{hardware}

| Largest difference of the fused outputs, relative to the largest output | Value |
|---|---|
| whole model, random inputs | {model} |
| whole model, real images | {real} |
| worst layer, random inputs | {layer} |
"""


def _results(provenance: Mapping[str, Any]) -> str:
    metrics = provenance['metrics']
    labels = dict(METRICS, **{key: key for key in metrics if key not in METRICS})
    table = '\n'.join(f'| {label} | {_figure(metrics.get(key))} |' for key, label in labels.items())
    source = provenance.get('metrics_source')
    return f'| Figure | Value |\n|---|---|\n{table}\n' + (f'\nAccuracy: {source}.\n' if source else '')


def model_card(
        name: str,
        model: Any,
        provenance: Mapping[str, Any],
        expansion: Expansion,
        expanding: Optional[Expanding] = None,
        *,
        report: Optional[Report] = None,
        repo: Optional[str] = None,
        run: Optional[Run] = None,
        costs: Optional[Costs] = None,
        images: Optional[ImageCheck] = None,
        plot: Optional[str] = None,
        labelled: bool = False,
        train_revision: bool = False,
) -> str:
    """Write the model card of a fused model.

    Args:
        name: Name of the folder.
        model: The fused model; its ``pretrained_cfg`` is that of the export.
        provenance: What config.json says under ``timm_rep``.
        expansion: What was a rep layer in the training form.
        expanding: What makes that form of the stock form, as an argument of ``expand``, if that has been seen.
        report: Comparison with the training form; None if there was none.
        repo: Repository on the Hub, if known, with ``@REVISION`` unless it is the main one.
        run: The training run.
        costs: What both forms cost.
        images: Comparison on real images.
        plot: File name of the drawing of the run.
        labelled: Whether config.json has the names of the classes.
        train_revision: Whether the training form is on the revision ``train`` of the repository.

    Returns:
        The card. Figures that are not given read "not measured".
    """
    cfg, dataset, architecture = model.pretrained_cfg, provenance['dataset'], model.pretrained_cfg['architecture']
    folder, name = name, _name(repo) if repo else name
    repo = repo or f'ORGANISATION/{name}'
    parameters = sum(parameter.numel() for parameter in model.parameters())
    summary, citations = _methods(expansion, provenance['time_steps'])
    training_form = f"""
As its run left it, with all branches, it is on the revision `{TRAIN_REVISION}` of this repository:

{_training_form(repo)}""" if train_revision else ''
    drawing = f'\n![Accuracy, loss and learning rate of every epoch]({plot})\n' if plot else ''
    bibliography = '\n\n'.join(f'```bibtex\n{citation}\n```' for citation in citations)
    return _marked(f"""{_header(name, cfg['license'], _eval_results(dataset, provenance['metrics']))}
# {name}

An image classifier, trained with [timm_rep]({REPOSITORY}) and fused into `{architecture}`: structural
re-parameterization trains with several branches for each convolution and folds them into one afterwards.
{summary and chr(10) + summary + chr(10)}
## Model details

- **Architecture:** `{architecture}`, {parameters / 1e6:.2f} M parameters
- **Trained as:** {_trained_as(provenance, expansion)}
- **Data set:** {dataset or 'not stated'}
- **Classes:** {model.num_classes}
- **Images:** {' x '.join(map(str, cfg['input_size']))} (channels, height, width)
- **Licence:** weights {_license(cfg['license'])}; the code that trained and loads them, timm_rep and timm, apache-2.0
- **Versions:** timm_rep {provenance['version']}, timm {provenance['timm']}, torch {provenance['torch']}

## How to use it

{_usage(folder, repo, architecture, labelled)}
timm_rep, wherever this card asks for it, is at {REPOSITORY}: `{install_command()}`.

## How to train it on

{_training_on(repo, provenance, expanding)}{training_form}
## Results

{_results(provenance)}
## Training form and stock form

{_forms(parameters, costs, images, report)}
## Training

{_training(run)}
{drawing}
## Citation

{bibliography}
""")


def training_form_card(repo: str, architecture: str, license: str) -> str:
    """Write the model card of weights in training form.

    Args:
        repo: Repository on the Hub with the stock form, with ``@REVISION`` unless it is on the main one.
        architecture: One of our models.
        license: Licence of the weights.

    Returns:
        The card.
    """
    name = _name(repo)
    return _marked(f"""{_header(name, license)}
# {name}, training form

The weights of `{repo}` before they were fused: `{architecture}` with all branches, to train on.
What it is and what was measured is on the card of `{repo}`, which has the stock form, for all other uses.

{_training_form(repo)}
timm_rep is at {REPOSITORY}: `{install_command()}`.
""")
