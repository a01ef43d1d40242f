"""Publish a trained model on the Hugging Face Hub: fuse, verify, measure, write the folder, send it in one commit."""
import dataclasses
import itertools
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple

import timm
import torch.nn as nn
from huggingface_hub.utils import validate_repo_id

from ..core.errors import UserError
from ..core.expansion import expansion_of
from ..core.fuse import fuse
from ..core.verify import Report, verify
from ..io.checkpoint import Checkpoint, model_args_of, read_checkpoint, trained_architecture, training_form
from ..io.output import PathLike
from ..io.runs import Run, read_run
from ..models.names import stock_architecture, timm_has
from ..models.published import published_weights
from ..report.cost import measure_costs
from ..report.images import TOP_K, ImageCheck, compare_on_images
from .card import TRAIN_REVISION, UNKNOWN_LICENSE
from .export import CONFIG_FILE, DATA_FIELDS, export_folder, export_training_form, new_folder, time_steps_of
from .repository import MAIN_REVISION, Publication, PublishError, file_sizes, hub_id, log_in, send_forms

__all__ = ['PublishError', 'Published', 'publish']

_logger = logging.getLogger(__name__)



@dataclass(frozen=True)
class Published:
    """What :func:`publish` did.

    Attributes:
        folder: The export folder; it stays.
        files: Names and sizes in bytes of all files in it.
        training_folder: Folder of the training form, if that was asked for.
        repo: Repository on the Hub.
        revision: Branch that it went to, or was to go to.
        commit: URL of the commit; None in a dry run.
        pull_request: URL of the pull request, if one was opened.
        report: Comparison of the fused model with the training form, layer by layer and end to end.
        images: Comparison on real images, if there were any.
        entry: Entry to add to the registry of published weights, so that ``pretrained=True`` finds them; None of a pull
            request, and if the architecture's name alone does not build the network.
    """

    folder: Path
    files: Dict[str, int]
    training_folder: Optional[Path]
    repo: str
    revision: str
    commit: Optional[str]
    pull_request: Optional[str]
    report: Report
    images: Optional[ImageCheck]
    entry: Optional[Dict[str, Dict[str, Any]]]

    @property
    def hub_id(self) -> str:
        """What timm loads as ``hf-hub:ID``; of a pull request, once it is merged."""
        return hub_id(self.repo, self.revision)


def _check_arguments(
        repo: str,
        tag: Optional[str],
        revision: Optional[str],
        create_pr: bool,
        git_tag: Optional[str],
        include_training_form: bool,
) -> None:
    try:
        validate_repo_id(repo)
    except ValueError as e:
        raise UserError(f'repo must be ORG/NAME, got {repo!r}: {e}') from None
    if repo.count('/') != 1:
        raise UserError(f'repo must be ORG/NAME, got {repo!r}')
    if tag is not None and not re.fullmatch(r'[A-Za-z0-9_]+', tag):
        raise UserError(f'tag must be letters, digits and _, as in orepa_in1k; got {tag!r}')
    if revision is not None and not re.fullmatch(r'[\w./-]+', revision):
        raise UserError(f'revision must be letters, digits and _ . / -; got {revision!r}')
    if create_pr:
        refused = dict(revision=revision, git_tag=git_tag, include_training_form=include_training_form)
        given = [name for name, value in refused.items() if value]
        if given:
            raise UserError(f'a pull request changes nothing but the main revision; got {", ".join(given)} besides it')
    if include_training_form and revision == TRAIN_REVISION:
        raise UserError(f'revision {TRAIN_REVISION!r} is that of the training form; give another')


def _plain(name: str) -> str:
    """A name without what readers overlook: case, and which mark separates its parts."""
    return re.sub(r'[^a-z0-9]+', '-', name.lower())


def _check_claims(checkpoint: Checkpoint, architecture: str, repo: str, tag: str) -> None:
    """Refuse what would claim to be another model, or one of timm's own recipes."""
    trained = trained_architecture(checkpoint)
    if trained not in (None, architecture):
        raise UserError(
            f'the run of {checkpoint.path} says that it trained {trained}, not {architecture}; its arguments and '
            'figures would be published as those of another model'
        )
    stock = stock_architecture(architecture)
    name = repo.partition('/')[2]
    owners = dict.fromkeys(timm.list_models(f'{stock}.*', pretrained=True), 'timm') if timm_has(stock) else {}
    for published, entry in published_weights().items():
        if published.partition('.')[0] == architecture and entry['hf_hub_id'] != repo:
            owners[f'{stock}.{published.partition(".")[2]}'] = entry['hf_hub_id']
    for recipe, owner in owners.items():
        for what, own in ((f'tag {tag!r}', f'{stock}.{tag}'), (f'name {name!r}', name)):
            if f'{_plain(own)}-'.startswith(f'{_plain(recipe)}-'):
                raise UserError(f'{what} claims {recipe}, a recipe of {owner}; these weights are not of it')
    claimed = re.split(r'[^a-z0-9_]', name.lower())[0]
    if timm.is_model(claimed) and claimed not in (stock, architecture):
        raise UserError(f'name {name!r} says {claimed}, but the model is {architecture}, whose stock form is {stock}')


def _default_tag(model: nn.Module, dataset: Optional[str]) -> str:
    """Methods and data set, in timm's manner."""
    methods = [method.name for method in expansion_of(model).methods.values()]
    methods += ['repan'] * (time_steps_of(model) > 1)
    data = re.sub('[^a-z0-9]+', '', (dataset or '').lower())
    return '_'.join(filter(None, (*dict.fromkeys(methods), data))) or 'timm_rep'


def _training_folder(folder: Path) -> Path:
    return folder.with_name(f'{folder.name}.{TRAIN_REVISION}')


def _new_folders(out: Optional[PathLike], name: str, training_form: bool) -> Tuple[Path, Optional[Path]]:
    """What to write: ``out``, else NAME in the current folder, or the first of NAME-2, NAME-3 ... that is free."""
    if out is None:
        names = (Path(name if number == 1 else f'{name}-{number}') for number in itertools.count(1))
        out = next(path for path in names if not (path.exists() or _training_folder(path).exists()))
    folder = new_folder(out)
    return folder, new_folder(_training_folder(folder)) if training_form else None


def _run_of(checkpoint: Checkpoint, use_ema: bool, model_kwargs: Mapping[str, Any]) -> Optional[Run]:
    """The run of a checkpoint; without its figures if arguments are given that make its model another."""
    run = read_run(checkpoint.path, checkpoint.args, checkpoint.epoch, metric=checkpoint.metric, use_ema=use_ema)
    trained = model_args_of(checkpoint, checkpoint.args.get('model') or '', {})
    changed = [key for key, value in model_kwargs.items() if trained.get(key) != value]
    if run is None or not (run.metrics and checkpoint.args and changed):
        return run
    _logger.warning('the figures of the run are not stated: it trained another model (%s)', ', '.join(changed))
    return dataclasses.replace(run, metrics={})


def _figures(
        run: Optional[Run],
        images: Optional[ImageCheck],
        use_ema: bool,
        num_classes: int,
) -> Tuple[Dict[str, float], Optional[str]]:
    """The accuracies to publish, and who measured them; none rather than one of other weights."""
    if images is not None and images.complete:
        figures = dict(top1=images.top1[1]) if images.top5 is None else dict(top1=images.top1[1], top5=images.top5[1])
        return figures, (
            f'measured with the fused model on {images.images} images, of {images.source}, when it was published')
    if run is not None and run.metrics:
        split = run.args.get('val_split') or 'validation'
        weights = 'averaged weights' if use_ema else 'trained weights'
        figures = {name: value for name, value in run.metrics.items() if name != 'top5' or num_classes > TOP_K}
        return figures, f'measured by the training run on its split `{split}`, with the {weights} in training form'
    return {}, None


def _registry_entry(folder: Path, full_name: str) -> Optional[Dict[str, Dict[str, Any]]]:
    """What to add to the registry of published weights: where they are, and what they must be fed with.

    None if it takes further arguments to build the network that these weights are of.
    """
    config = json.loads((folder / CONFIG_FILE).read_text())
    provenance, cfg = config['timm_rep'], dict(config['pretrained_cfg'], num_classes=config['num_classes'])
    architecture, args = provenance['training_architecture'], provenance['training_args']
    if args != {}:
        _logger.warning('no entry for the registry: %s alone does not build this network', architecture)
        return None
    entry = {key: cfg[key] for key in ('num_classes', 'license', *DATA_FIELDS) if key in cfg}
    return {f'{architecture}.{cfg["tag"]}': dict(hf_hub_id=full_name, **entry)}


def publish(
        source: PathLike,
        repo: str,
        *,
        architecture: Optional[str] = None,
        use_ema: bool = False,
        num_classes: Optional[int] = None,
        in_chans: Optional[int] = None,
        model_kwargs: Optional[Mapping[str, Any]] = None,
        allow_pickle: bool = False,
        data: Optional[PathLike] = None,
        max_images: Optional[int] = None,
        split: Optional[str] = None,
        dataset: Optional[str] = None,
        tag: Optional[str] = None,
        license: str = UNKNOWN_LICENSE,
        out: Optional[PathLike] = None,
        dry_run: bool = False,
        private: bool = False,
        revision: Optional[str] = None,
        create_pr: bool = False,
        git_tag: Optional[str] = None,
        include_training_form: bool = False,
        replace_card: bool = False,
        device: str = 'cpu',
        token: Optional[str] = None,
        progress: bool = False,
) -> Published:
    """Fuse a trained model, verify it, and publish the stock form on the Hugging Face Hub in one commit.

    All is checked before anything is sent: the fused model against the training form, layer by layer and end to end,
    on random inputs and on real images if there are some; that no value is not finite; that nothing claims to be
    another model's recipe. The folder stays, whatever happens. A model card on the Hub that somebody wrote or changed
    is not overwritten.

    Args:
        source: Checkpoint of timm's train.py, or the output folder of the run, of which ``model_best.pth.tar`` (else
            ``last.pth.tar``), ``args.yaml`` and ``summary.csv`` are taken.
        repo: ``'ORG/NAME'`` on the Hub, e.g. ``'me/resnet50.orepa_in1k'``; made if it is not there.
        architecture: Name of the model, if the checkpoint does not say it.
        use_ema: Take the averaged weights.
        num_classes: Of the classifier; by default as the run was told.
        in_chans: Image channels; by default as the run was told.
        model_kwargs: More arguments of ``timm.create_model``, beside those that the run was given.
        allow_pickle: Load Python objects in the checkpoint too, which can run any code.
        data: Folder of real images to compare both forms on, and to measure the accuracy with.
        split: Split of them to take; by default that on which the run validated, else ``validation``.
        max_images: Take only so many of them; then no accuracy is stated as the model's.
        dataset: Name of the data set; by default as the run was told. Needed if the run was told and ``data`` is given.
        tag: Recipe and data set, in timm's sense of a tag; by default method and data set.
        license: Licence of the weights, as an identifier of the Hub; by default none is claimed.
        out: New folder to write; by default NAME in the current folder, or the first free of NAME-2, NAME-3 ...
        dry_run: Write the folder and send nothing.
        private: Make a new repository private. One that exists and is public is refused.
        revision: Branch to publish on, instead of the main one; made if it is not there.
        create_pr: Open a pull request instead of writing to the main revision.
        git_tag: Tag the commit, e.g. ``'v1'``, so that ``hf-hub:ORG/NAME@v1`` stays what it is.
        include_training_form: Put the weights in training form on the revision ``train`` as well.
        replace_card: Replace a model card that was written or changed by hand.
        device: Where images are run and speed is measured.
        token: Access token; by default the one that ``hf auth login`` or ``HF_TOKEN`` gives. Never shown or written.
        progress: Show progress bars.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: If the source or the folder of images is not there.
        FileExistsError: If ``out``, or ``out`` with ``.train`` for the training form, is there and not empty.
        UserError: If an argument does not fit, the weights are not those of the architecture, or the metadata would
            claim another model's recipe.
        VerificationError: If the fused model is not the same function, or not finite. Nothing is written or sent.
        PublishError: If the Hub did not take it.
    """
    _check_arguments(repo, tag, revision, create_pr, git_tag, include_training_form)
    checkpoint = read_checkpoint(source, use_ema=use_ema, allow_pickle=allow_pickle)
    model: Any = training_form(
        checkpoint, architecture, num_classes=num_classes, in_chans=in_chans, model_kwargs=model_kwargs)
    architecture = str(model.pretrained_cfg['architecture'])
    run = _run_of(checkpoint, use_ema, model_kwargs or {})
    trained_on = None if run is None else run.args.get('dataset') or None
    if data is not None and trained_on and not dataset:
        raise UserError(f'the run trained on {trained_on}; say with dataset (--dataset) what images those of data are')
    dataset = dataset or trained_on
    tag = tag or _default_tag(model, dataset)
    _check_claims(checkpoint, architecture, repo, tag)
    folder, training_folder = _new_folders(out, repo.partition('/')[2], include_training_form)
    revision = revision or MAIN_REVISION
    api = None if dry_run else log_in(token)

    fused = fuse(model)
    report = verify(model, fused)
    images = None
    if data is not None:
        split = split or str(checkpoint.args.get('val_split') or 'validation')
        images = compare_on_images(
            model, fused, data, split=split, class_map=checkpoint.args.get('class_map'), max_images=max_images,
            device=device, progress=progress)
    costs = measure_costs(model, fused, model.pretrained_cfg['input_size'], device=device)
    metrics, metrics_source = _figures(run, images, use_ema, model.num_classes)
    full_name = hub_id(repo, revision)
    common: Dict[str, Any] = dict(
        tag=tag, license=license, repo=full_name, label_names=None if images is None else images.classes)
    export_folder(
        model.cpu(), folder, dataset=dataset, metrics=metrics, metrics_source=metrics_source, run=run, costs=costs,
        images=images, train_revision=include_training_form, **common)
    if training_folder is not None:
        export_training_form(model, training_folder, **common)

    commit = None
    if api is not None:
        commit = send_forms(
            Publication(api, repo, folder, token), training_folder, private=private, revision=revision,
            create_pr=create_pr, git_tag=git_tag, replace_card=replace_card)
    return Published(
        folder,
        file_sizes(folder),
        training_folder,
        repo,
        revision,
        None if commit is None else str(commit.commit_url),
        None if commit is None else commit.pr_url,
        report,
        images,
        None if create_pr else _registry_entry(folder, full_name),
    )
