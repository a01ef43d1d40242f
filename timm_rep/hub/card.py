"""The model card of an exported model: what it is, what was measured, how to use it. It states nothing else."""
import hashlib
import re
import shlex
from typing import Any, List, Mapping, Optional, Tuple, Union

import huggingface_hub

from .._version import REPOSITORY
from ..core.expansion import Expansion
from ..core.methods import Method, as_method
from ..io.extras import install_command
from ..io.runs import Run
from ..models.names import registering_package, timm_has
from ..report.cost import Costs
from ..report.images import ImageCheck

__all__ = ['TRAIN_REVISION', 'UNKNOWN_LICENSE', 'Expanding', 'is_generated', 'model_card']

Expanding = Union[Method, Mapping[str, Method]]

IMAGE_MODES = {1: 'L', 2: 'LA', 4: 'RGBA'}  # of PIL, by channels
NOT_MEASURED = 'not measured'
UNKNOWN_LICENSE = 'unknown'  # the Hub's own identifier
TRAIN_REVISION = 'train'
# The last line of every card, by which a changed one is known.
MARK = '<!-- written by timm_rep; sha256 of the text above: {} -->'
METRICS = dict(top1='Top-1 accuracy (%)', top5='Top-5 accuracy (%)')
# Arguments of train.py that the card shows; args.yaml has all.
RECIPE_ARGS = (
    'epochs', 'time_steps', 'batch_size', 'opt', 'lr', 'lr_base', 'weight_decay', 'sched', 'input_size', 'model_ema',
    'seed',
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


def _rows(rows: Mapping[str, str]) -> str:
    return '\n'.join(f'| {label} | {value} |' for label, value in rows.items())


def _eval_results(dataset: Optional[str], metrics: Mapping[str, Any]) -> Optional[List[huggingface_hub.EvalResult]]:
    if dataset is None:
        return None
    return [
        huggingface_hub.EvalResult(
            task_type='image-classification',
            dataset_type=re.sub(r'[\W_]+', '-', dataset.lower()).strip('-') or 'unknown',
            dataset_name=dataset,
            metric_type='accuracy',
            metric_name=f'top-{k} accuracy in percent',
            metric_value=round(metrics[f'top{k}'], 4),
            metric_args=dict(k=k),
        )
        for k in (1, 5) if f'top{k}' in metrics
    ] or None


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
    if run.teacher and 'kd_model_name' not in run.args:  # a folder's path is not told
        start += f' --kd-model-name {shlex.quote(run.teacher)}'
    text = f"""`args.yaml` holds the arguments of the run and names those left out. The same on your folder of images:

```sh
timm-rep train --config args.yaml --data-dir IMAGES{start}
```
"""
    if run.processes > 1:
        text += f'\nThe run was on {run.processes} processes at once, each with batches of `batch_size` images.\n'
    recipe = {f'`{key}`': run.args[key] for key in RECIPE_ARGS if run.args.get(key) not in (None, '', False)}
    text += f'\n| Argument | Value |\n|---|---|\n{_rows(recipe)}\n'
    pretrained = 'the pretrained weights of that name' if run.args.get('pretrained') else 'random weights'
    text += f'\nStarted from {", ".join(run.start_files.values()) or pretrained}.'
    if run.teacher:
        text += f' The teacher, whose outputs it learnt from, is `{run.teacher}`.'
    if run.epoch is not None:
        text += f' The weights are those after epoch {run.epoch}, counted from 0 as in `summary.csv`.'
    return text


def _usage(folder: str, repo: str, architecture: str, labelled: bool, channels: int) -> str:
    package = registering_package(architecture)
    needs = f"The weights are those of timm's own `{architecture}`: timm alone loads them."
    imports = 'import timm'
    if not timm_has(architecture):
        needs = f'timm has no `{architecture}`: install {package} and import it first, which registers it.'
        imports += f'\nimport {package}  # registers the architecture'
    label = "model.pretrained_cfg['label_names'][index]" if labelled else 'index'
    mode = IMAGE_MODES.get(channels, 'RGB')
    return f"""{needs}

Classify an image:

```python
{imports}
import torch
from PIL import Image

model = timm.create_model('hf-hub:{repo}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
with torch.inference_mode():
    scores = model(transform(Image.open('image.jpg').convert('{mode}')).unsqueeze(0)).softmax(-1)[0]
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


def _own_module(method: Method) -> Optional[str]:
    """The module that registers a method, if it is not ours."""
    module = type(method).__module__
    return None if module.partition('.')[0] == 'timm_rep' else module


def _literal(methods: Expanding) -> str:
    """An argument of ``expand`` as it is written in Python."""
    if isinstance(methods, Mapping):
        return '{\n' + ''.join(f'    {name!r}: {_literal(method)},\n' for name, method in methods.items()) + '}'
    if methods == as_method(methods.name):
        return repr(methods.name)
    return f'{_own_module(methods) or "timm_rep"}.{methods!r}'


def _training_on(
        repo: str,
        provenance: Mapping[str, Any],
        expansion: Expansion,
        expanding: Optional[Expanding],
        train_revision: bool,
) -> str:
    """How to get the weights into the training form, or into one with the default method."""
    layers = '' if expanding is None else f', {_literal(expanding)}'
    own = sorted({module for module in map(_own_module, expansion.methods.values()) if module})
    more_imports = ''.join(f'\nimport {module}  # registers a method that is no part of timm_rep' for module in own)
    device_modules = f' \\\n    --device-modules {" ".join(own)}' if own else ''
    text = f"""`timm_rep.expand` puts the kernels into the branches of rep layers, with the same outputs:

```python
import timm
import timm_rep{more_imports}

model = timm_rep.expand(timm.create_model('hf-hub:{repo}', pretrained=True){layers})
```

Train it as any timm model, then `timm_rep.fuse(model.eval())`.
"""
    if provenance['built_by_name']:
        text += f"""With timm's train.py, on classes of your own, with a new classifier:

```sh
timm-rep train --data-dir IMAGES --model {provenance['training_architecture']} --num-classes N \\
    --pretrained --pretrained-path model.safetensors{device_modules}
```
"""
    if train_revision:
        text += f"""
As its run left it, with all branches, it is on the revision `{TRAIN_REVISION}` of this repository:

```python
import timm
import timm_rep  # registers the architecture{more_imports}

model = timm.create_model('hf-hub:{repo.partition('@')[0]}@{TRAIN_REVISION}', pretrained=True)
```
"""
    return text


def _forms(costs: Optional[Costs], images: Optional[ImageCheck], difference: Optional[Mapping[str, Any]]) -> str:
    """What both forms cost and compute, as far as it was measured."""
    pairs = {}
    if costs is not None:
        pairs['Parameters (M)'] = '{:.2f} | {:.2f}'.format(*(count / 1e6 for count in costs.parameters))
        pairs['GMACs of an image'] = '{:.3f} | {:.3f}'.format(*costs.gmacs)
        pairs[f'Images per second, batches of {costs.batch}, {costs.dtype}'] = '{:.1f} | {:.1f}'.format(
            *costs.images_per_second)
    if images is not None:
        pairs[f'Top-1 accuracy (%) on {images.images} images'] = '{:.2f} | {:.2f}'.format(*images.top1)
        if images.top5 is not None:
            pairs[f'Top-5 accuracy (%) on {images.images} images'] = '{:.2f} | {:.2f}'.format(*images.top5)
    text = f'| | Training form | Stock form (this) |\n|---|---|---|\n{_rows(pairs)}\n\n' if pairs else ''
    if costs is not None:
        text += f'Measured on {costs.hardware}, torch {costs.torch}.\n'
    if difference is not None:
        text += (
            f'On random inputs the outputs of the two differ by {difference["outputs_relative"]:.1e} of the largest, '
            f'those of the worst layer by {difference["worst_layer_relative"]:.1e}.\n')
    if images is not None:
        text += f'On the real images the outputs differ by {images.relative:.1e} of the largest.\n'
    return text or f'Costs and differences: {NOT_MEASURED}.\n'


def _results(metrics: Mapping[str, float], source: Optional[str]) -> str:
    if not metrics:
        return f'Accuracy: {NOT_MEASURED}.\n'
    rows = {METRICS.get(key, key): f'{value:.4g}' for key, value in metrics.items()}
    return f'| Figure | Value |\n|---|---|\n{_rows(rows)}\n' + (f'\nAccuracy: {source}.\n' if source else '')


def model_card(
        folder: str,
        model: Any,
        provenance: Mapping[str, Any],
        expansion: Expansion,
        expanding: Optional[Expanding] = None,
        *,
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
        folder: Name of the folder.
        model: The fused model; its ``pretrained_cfg`` is that of the export.
        provenance: What config.json says under ``timm_rep``.
        expansion: What was a rep layer in the training form.
        expanding: What makes that form of the stock form, as an argument of ``expand``, if that has been seen.
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
    cfg, architecture = model.pretrained_cfg, model.pretrained_cfg['architecture']
    repo = repo or f'ORGANISATION/{folder}'
    name = repo.partition('/')[2].partition('@')[0]
    data = huggingface_hub.ModelCardData(
        model_name=name,
        license=cfg['license'],
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_rep', 'structural-re-parameterization'],
        eval_results=_eval_results(provenance['dataset'], provenance['metrics']),
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    summary, citations = _methods(expansion, provenance['time_steps'])
    drawing = f'\n![Accuracy, loss and learning rate of every epoch]({plot})\n' if plot else ''
    bibliography = '\n\n'.join(f'```bibtex\n{citation}\n```' for citation in citations)
    return _marked(f"""---
{data.to_yaml()}
---

# {name}

An image classifier, trained with [timm_rep]({REPOSITORY}) and fused into `{architecture}`: structural
re-parameterization trains with several branches for each convolution and folds them into one afterwards.
{summary and chr(10) + summary + chr(10)}
## Model details

- **Architecture:** `{architecture}`, {parameters / 1e6:.2f} M parameters
- **Trained as:** {_trained_as(provenance, expansion)}
- **Data set:** {provenance['dataset'] or 'not stated'}
- **Classes:** {model.num_classes}
- **Images:** {' x '.join(map(str, cfg['input_size']))} (channels, height, width)
- **Licence:** weights {cfg['license']}; the code that trained and loads them, timm_rep and timm, apache-2.0
- **Versions:** timm_rep {provenance['version']}, timm {provenance['timm']}, torch {provenance['torch']}

## How to use it

{_usage(folder, repo, architecture, labelled, cfg['input_size'][0])}
timm_rep, wherever this card asks for it, is at {REPOSITORY}: `{install_command()}`.

## How to train it on

{_training_on(repo, provenance, expansion, expanding, train_revision)}
## Results

{_results(provenance['metrics'], provenance['metrics_source'])}
## Training form and stock form

{_forms(costs, images, provenance['fused_difference'])}
## Training

{_training(run)}
{drawing}
## Citation

{bibliography}
""")
