"""The model card of an exported model: what it is, what was measured, how to use it. It states nothing else."""
import hashlib
import json
import re
import shlex
from typing import Any, Dict, List, Mapping, Optional, Tuple

import huggingface_hub
import timm
import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..core.verify import Report
from ..io.checkpoint import MODEL_ARGS
from ..io.runs import WHY_LEFT_OUT, Run
from ..report.cost import Costs
from ..report.images import ImageCheck

__all__ = [
    'NOT_MEASURED', 'OWN_TEXT_BEGIN', 'OWN_TEXT_END', 'PAPERS', 'UNKNOWN_LICENSE', 'lost_text', 'model_card',
    'needs_plugin', 'restoring_args', 'training_form_card', 'update_card',
]

NOT_MEASURED = 'not measured'
UNKNOWN_LICENSE = 'unknown'  # the Hub's own identifier
# Rows that every model card has.
METRICS = dict(top1='Top-1 accuracy (%)', top5='Top-5 accuracy (%)')
# What stands between these lines is its owner's, and survives the next publication.
OWN_TEXT_BEGIN = '<!-- timm_rep: your own text, from here ... -->'
OWN_TEXT_END = '<!-- timm_rep: ... to here, is kept when the model is published again -->'
# Tells whether anybody wrote into the rest of a card.
CHECKSUM = '<!-- timm_rep: checksum of the generated text {} -->'
# Metadata that is written anew; all other keys of a card are its owner's.
GENERATED_KEYS = ('license', 'library_name', 'pipeline_tag', 'model-index')
# Arguments of train.py that make up a recipe, for the table on the card.
RECIPE_ARGS = (
    'epochs', 'batch_size', 'opt', 'momentum', 'weight_decay', 'lr', 'lr_base', 'sched', 'warmup_epochs', 'min_lr',
    'time_steps', 'attach_warmup_epochs', 'lr_cycle_decay',
    'smoothing', 'aa', 'mixup', 'cutmix', 'reprob', 'drop_path', 'input_size', 'img_size', 'model_ema',
    'model_ema_decay', 'amp', 'seed', 'kd_model_name',
)

PAPERS = dict(OREPA='arXiv:2204.00826', DBB='arXiv:2103.13425', ACB='arXiv:1908.03930', REP='arXiv:2101.03697')
METHODS = dict(
    OREPA='OREPA composes the kernel of each convolution from linear branches at every training step (up to six for a '
          '3x3: plain, average pooling, frequency prior, 1x1-3x3, 1x1, depthwise separable), each with a learnt scale '
          'for every output channel; the one norm comes behind their sum. The branches never see an image, so '
          'training costs little more than that of the plain network.',
    DBB='DBB runs four branches (3x3, 1x1, 1x1-3x3, 1x1-average pooling) in place of each 3x3 convolution while '
        'training, each with batch norms of its own.',
    ACB='ACB runs a 1x3 and a 3x1 beside each 3x3 convolution while training, each with a batch norm of its own.',
    REP='RepVGG\'s blocks run a 1x1 and, where the shapes allow it, the identity beside each 3x3 convolution while '
        'training, each with a batch norm of its own.',
    RepAn='RepAn trains in time steps: at the start of each the branches are folded, the side branches drawn afresh '
          'and brought in with a rising attach rate, the folded kernel put back into the origin branch, and the '
          'learning rate restarted.',
)
# The two papers behind this package; they stand on every card.
OWN_PAPERS = ('OREPA', 'RepAn')
CITATIONS = dict(
    OREPA="""@inproceedings{hu2022online,
  title={Online Convolutional Re-parameterization},
  author={Hu, Mu and Feng, Junyi and Hua, Jiashen and Lai, Baisheng and Huang, Jianqiang and Gong, Xiaojin and
    Hua, Xian-Sheng},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2022}
}""",
    RepAn="""@inproceedings{fei2024repan,
  title={RepAn: Enhanced Annealing through Re-parameterization},
  author={Fei, Xiang and Zheng, Xiawu and Wang, Yan and Chao, Fei and Wu, Chenglin and Cao, Liujuan},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2024}
}""",
    ACB="""@inproceedings{ding2019acnet,
  title={ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks},
  author={Ding, Xiaohan and Guo, Yuchen and Ding, Guiguang and Han, Jungong},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2019}
}""",
    REP="""@inproceedings{ding2021repvgg,
  title={RepVGG: Making VGG-style ConvNets Great Again},
  author={Ding, Xiaohan and Zhang, Xiangyu and Ma, Ningning and Han, Jungong and Ding, Guiguang and Sun, Jian},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2021}
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


def needs_plugin(architecture: str) -> bool:
    """Whether only this package registers an architecture.

    Args:
        architecture: Name of a registered architecture.

    Returns:
        Whether timm alone has it not.
    """
    return timm.model_entrypoint(architecture).__module__.partition('.')[0] == __name__.partition('.')[0]


def _metadata(card: str) -> Tuple[Dict[str, Any], str]:
    """Metadata of a card, and all behind them; a block that is no metadata is text."""
    block = REGEX_YAML_BLOCK.match(card)
    try:
        data = yaml.safe_load(block[2]) if block else None
    except yaml.YAMLError:
        data = None
    return (data, card[block.end():]) if block and isinstance(data, dict) else ({}, card)


def _own_text(card: str) -> Optional[str]:
    """What stands between the two marks; None unless both are there, once each and in order."""
    text, end, _ = card.partition(OWN_TEXT_BEGIN)[2].partition(OWN_TEXT_END)
    return text if end and (card.count(OWN_TEXT_BEGIN), card.count(OWN_TEXT_END)) == (1, 1) else None


def _put_own_text(card: str, text: str) -> str:
    before, _, rest = card.partition(OWN_TEXT_BEGIN)
    return before + OWN_TEXT_BEGIN + text + OWN_TEXT_END + rest.partition(OWN_TEXT_END)[2]


def _generated_lines(card: str) -> List[str]:
    """All lines of a card that its next version does not keep."""
    data, text = _metadata(card)
    if _own_text(text) is not None:
        text = _put_own_text(text, '')
    for mark in (OWN_TEXT_BEGIN, OWN_TEXT_END):
        text = text.replace(mark, '')
    text = re.sub(CHECKSUM.format(r'\w*'), '', text)
    values = [f'{key}: {json.dumps(data[key], sort_keys=True, default=str)}' for key in GENERATED_KEYS if key in data]
    return [line.strip() for line in text.splitlines() if line.strip()] + values


def _checksum(card: str) -> str:
    return CHECKSUM.format(hashlib.sha256('\n'.join(_generated_lines(card)).encode()).hexdigest()[:16])


def _with_checksum(card: str) -> huggingface_hub.ModelCard:
    return huggingface_hub.ModelCard(f'{card}\n{_checksum(card)}\n')


def lost_text(old: str, new: str) -> Optional[str]:
    """Find what somebody wrote into a card that :func:`update_card` would not keep.

    Args:
        old: The card that is there.
        new: The card to put in its place.

    Returns:
        A line that would be lost, rather one that differs in more than its figures; None if there is none, or if all of
        them were generated.
    """
    if _checksum(old) in old:
        return None
    kept = _generated_lines(new)
    shapes = {re.sub(r'\d', '', line) for line in kept}
    lost = [line for line in _generated_lines(old) if line not in kept]
    return min(lost, key=lambda line: re.sub(r'\d', '', line) in shapes, default=None)


def update_card(old: str, new: str) -> str:
    """Put what its owner wrote into a card into the next version of it.

    Args:
        old: The card that is there.
        new: A card that :func:`model_card` or :func:`training_form_card` made.

    Returns:
        The new card with the text between the marks of the old one, its tags, and its metadata of other keys.
    """
    text = _own_text(old)
    data, body = _metadata(new if text is None else _put_own_text(new, text))
    before = _metadata(old)[0]
    added = {key: value for key, value in before.items() if key not in (*GENERATED_KEYS, *data)}
    tags = before.get('tags') or []
    tags = tags if isinstance(tags, list) else [tags]
    tags = data['tags'] + [tag for tag in tags if tag not in data['tags']]
    metadata = yaml.safe_dump({**data, 'tags': tags, **added}, sort_keys=False, allow_unicode=True)
    return f'---\n{metadata}---\n{body}'


def _name(repo: str) -> str:
    return repo.partition('/')[2].partition('@')[0]


def _license(license: str) -> str:
    return 'not stated' if license == UNKNOWN_LICENSE else license


def _figure(value: Optional[float], spec: str = '.4g') -> str:
    if value is None:
        return NOT_MEASURED
    return format(value, spec) if value else '0'


def _slug(dataset: str) -> str:
    return re.sub(r'[\W_]+', '-', dataset.lower()).strip('-') or 'unknown'


def _eval_results(dataset: Optional[str], metrics: Mapping[str, Any]) -> Optional[List[huggingface_hub.EvalResult]]:
    if dataset is None:
        return None
    results = [
        huggingface_hub.EvalResult(
            task_type='image-classification',
            dataset_type=_slug(dataset),
            dataset_name=dataset,
            metric_type='accuracy',
            metric_name=f'top-{k} accuracy in percent',
            metric_value=round(metrics[f'top{k}'], 4),
            metric_args=dict(k=k),
        )
        for k in (1, 5) if metrics.get(f'top{k}') is not None
    ]
    return results or None


def _training(run: Optional[Run]) -> str:
    if run is None or not run.args:
        return 'Not stated: the model was exported without the arguments of its training run.'
    start = ''.join(f' {option} {shlex.quote(name)}' for option, name in run.start_files.items())
    annealed = (run.args.get('time_steps') or 1) > 1 or (run.args.get('attach_warmup_epochs') or 0) > 0
    script = 'python train_scripts/train.py' if annealed else 'timm-rep run train'
    source = ' (`train_scripts/train.py` is in the source of timm_rep)' if annealed else ''
    text = f"""`args.yaml` holds the arguments of the run. The same again, with your own folder of the images{source}:

```sh
{script} --config args.yaml --data-dir IMAGES{start}
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


def _usage(folder: str, repo: str, plugin: bool, architecture: str) -> str:
    if plugin:
        needs = (
            f'timm has no `{architecture}`: install timm_rep and import it first, which registers the architecture.')
        imports = 'import timm\nimport timm_rep  # registers the architecture'
    else:
        needs = f'The weights are those of timm\'s own `{architecture}`: timm alone loads them, nothing else is needed.'
        imports = 'import timm'
    return f"""{needs}

Classify an image:

```python
{imports}
import torch
from PIL import Image

model = timm.create_model('hf-hub:{repo}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
with torch.inference_mode():
    scores = model(transform(Image.open('image.jpg').convert('RGB')).unsqueeze(0)).softmax(-1)
print(scores.topk(min(5, scores.shape[-1])))
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


def restoring_args(
        provenance: Mapping[str, Any],
        cfg: Mapping[str, Any],
        classes: int,
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """What puts fused weights back into the training form, besides where they are.

    Args:
        provenance: What config.json says under ``timm_rep``.
        cfg: The ``pretrained_cfg`` of the export.
        classes: Number of classes.

    Returns:
        Arguments of ``timm.create_model``, and its ``pretrained_cfg_overlay``.
    """
    keys = ('input_size', 'mean', 'std', 'crop_pct', 'interpolation')
    overlay = {key: cfg[key] for key in keys if cfg.get(key) is not None}
    return dict(provenance['training_args'], num_classes=classes), dict(num_classes=classes, **overlay)


def _train_options(args: Mapping[str, Any]) -> str:
    """Arguments of a model as options of timm's train.py, which has some of its own."""
    own = {name: f'--{option.replace("_", "-")}' for option, name in MODEL_ARGS.items()}
    options = [f' {own[key]} {shlex.quote(str(value))}' for key, value in args.items() if key in own]
    others = [shlex.quote(f'{key}={value}') for key, value in args.items() if key not in own]
    return ''.join(options) + (f' --model-kwargs {" ".join(others)}' if others else '')


def _continue_training(repo: str, cfg: Mapping[str, Any], provenance: Mapping[str, Any], classes: int) -> str:
    """How to get the weights into the training form, if one of our models is that form."""
    training_architecture = provenance['training_architecture']
    training_args = provenance['training_args']
    if training_architecture is None or training_args is None or not needs_plugin(training_architecture):
        return f"""`timm_rep.expand` puts rep layers into the model, with the same outputs:

```python
import timm
import timm_rep

model = timm_rep.expand(timm.create_model('hf-hub:{repo}', pretrained=True))
```
"""
    args, overlay = restoring_args(provenance, cfg, classes)
    arg_lines = ''.join(f'    {key}={value!r},\n' for key, value in args.items())
    overlay_lines = ''.join(f'        {key}={value!r},\n' for key, value in overlay.items())
    options = _train_options(training_args)
    return f"""With timm_rep installed, the weights go back into the branches, with the same outputs:

```python
import timm
import timm_rep

model = timm.create_model(
    '{training_architecture}',
    pretrained=True,
{arg_lines}    pretrained_cfg_overlay=dict(
        hf_hub_id='{repo}',
{overlay_lines}    ),
)
```

Train it as any timm model, then `timm_rep.fuse(model.eval())`. With timm's train.py, on classes of your own, with a new
classifier: `--model {training_architecture}{options} --num-classes N --pretrained --pretrained-path model.safetensors`.
"""


def _forms(
        parameters: int,
        costs: Optional[Costs],
        images: Optional[ImageCheck],
        report: Optional[Report],
) -> str:
    def pair(values: Any, spec: str) -> str:
        return ' | '.join(_figure(value, spec) for value in values or (None, None))

    millions = (None, parameters / 1e6) if costs is None else tuple(count / 1e6 for count in costs.parameters)
    timed = f', batches of {costs.batch}, float32' if costs else ''
    checked = f' on {images.images} images' if images else ''
    rows = [
        f'| Parameters (M) | {_figure(millions[0], ".2f")} | {_figure(millions[1], ".2f")} |',
        f'| GMACs of an image | {pair(costs and costs.gmacs, ".3f")} |',
        f'| Images per second{timed} | {pair(costs and costs.images_per_second, ".1f")} |',
        f'| Top-1 accuracy (%){checked} | {pair(images and images.top1, ".2f")} |',
        f'| Top-5 accuracy (%){checked} | {pair(images and images.top5, ".2f")} |',
    ]
    differences = [
        ('whole model, random inputs', None if report is None else report.model.relative),
        ('whole model, real images', None if images is None else images.relative),
        ('worst layer, random inputs', None if report is None else max(d.relative for d in report.layers)),
    ]
    hardware = f'Measured on {costs.hardware}, torch {costs.torch}.' if costs else f'Speed: {NOT_MEASURED}.'
    table = '\n'.join(rows)
    difference_table = '\n'.join(f'| {label} | {_figure(value, ".1e")} |' for label, value in differences)
    return f"""| | Training form | Stock form (this) |
|---|---|---|
{table}

{hardware}

| Largest difference of the fused outputs, relative to the largest output | Value |
|---|---|
{difference_table}
"""


def model_card(
        name: str,
        model: Any,
        provenance: Mapping[str, Any],
        report: Optional[Report],
        *,
        repo: Optional[str] = None,
        run: Optional[Run] = None,
        costs: Optional[Costs] = None,
        images: Optional[ImageCheck] = None,
        plot: Optional[str] = None,
) -> huggingface_hub.ModelCard:
    """Write the model card of a fused model.

    Args:
        name: Name of the folder.
        model: The fused model; its ``pretrained_cfg`` is that of the export.
        provenance: What config.json says under ``timm_rep``.
        report: Comparison with the training form; None if there was none.
        repo: Repository on the Hub, if known, with ``@REVISION`` unless it is the main one.
        run: The training run.
        costs: What both forms cost.
        images: Comparison on real images.
        plot: File name of the drawing of the run.

    Returns:
        The card. Figures that are not given read "not measured".
    """
    cfg, dataset, metrics = model.pretrained_cfg, provenance['dataset'], provenance['metrics']
    architecture = cfg['architecture']
    folder, name = name, _name(repo) if repo else name
    repo = repo or f'ORGANISATION/{name}'
    data = huggingface_hub.ModelCardData(
        model_name=name,
        license=cfg['license'],
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_rep', 'structural-re-parameterization'],
        eval_results=_eval_results(dataset, metrics),
    )

    labels = dict(METRICS, **{key: key for key in metrics if key not in METRICS})
    table = '\n'.join(f'| {label} | {_figure(metrics.get(key))} |' for key, label in labels.items())
    source = provenance.get('metrics_source')
    source = f'\nAccuracy: {source}.\n' if source else ''
    if provenance['rep_layers']:
        layers = ', '.join(f'{count} {layer}' for layer, count in provenance['rep_layers'].items())
        trained_as = f'`{provenance["training_architecture"]}` ({layers})'
    else:
        trained_as = 'not stated: the model was exported from its stock form'
    methods = list(provenance['methods'])
    block = ' '.join(METHODS[method] for method in methods)
    citations: Dict[str, str] = {key: CITATIONS[key] for key in (*methods, *OWN_PAPERS, 'timm')}
    drawing = f'\n![Accuracy, loss and learning rate of every epoch]({plot})\n' if plot else ''
    bibliography = '\n\n'.join(f'```bibtex\n{citation}\n```' for citation in citations.values())
    return _with_checksum(f"""---
{data.to_yaml()}
---

# {name}

An image classifier, trained with timm_rep and fused into `{architecture}`: structural re-parameterization trains with
several branches for each convolution and folds them into one afterwards.
{block and chr(10) + block + chr(10)}
{OWN_TEXT_BEGIN}

{OWN_TEXT_END}

## Model details

- **Architecture:** `{architecture}`, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters
- **Trained as:** {trained_as}
- **Data set:** {dataset or 'not stated'}
- **Classes:** {model.num_classes}
- **Images:** {' x '.join(map(str, cfg['input_size']))} (channels, height, width)
- **Licence:** weights {_license(cfg['license'])}; the code that trained and loads them, timm_rep and timm, apache-2.0
- **Versions:** timm_rep {provenance['version']}, timm {provenance['timm']}, torch {provenance['torch']}

## How to use it

{_usage(folder, repo, needs_plugin(architecture), architecture)}
## How to train it on

{_continue_training(repo, cfg, provenance, model.num_classes)}
## Results

| Figure | Value |
|---|---|
{table}
{source}
## Training form and stock form

{_forms(sum(p.numel() for p in model.parameters()), costs, images, report)}
## Training

{_training(run)}
{drawing}
## Citation

{bibliography}
""")


def training_form_card(repo: str, architecture: str, license: str) -> huggingface_hub.ModelCard:
    """Write the model card of weights in training form.

    Args:
        repo: Repository on the Hub with the stock form, with ``@REVISION`` unless it is on the main one.
        architecture: One of our models.
        license: Licence of the weights.

    Returns:
        The card.
    """
    name = _name(repo)
    data = huggingface_hub.ModelCardData(
        model_name=name, license=license, library_name='timm', pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_rep', 'structural-re-parameterization'])
    return _with_checksum(f"""---
{data.to_yaml()}
---

# {name}, training form

The weights of `{repo}` before they were fused: `{architecture}` with all branches, to train on.
What it is and what was measured is on the card of `{repo}`, which has the stock form, for all other uses.

{OWN_TEXT_BEGIN}

{OWN_TEXT_END}

```python
import timm
import timm_rep  # registers the architecture

model = timm.create_model('hf-hub:{repo.partition('@')[0]}@train', pretrained=True)
```
""")
