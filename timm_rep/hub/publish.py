"""Publish a trained model on the Hugging Face Hub: fuse, verify, measure, write the folder, send it in one commit."""
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple

import timm
import torch.nn as nn
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..core.errors import UserError
from ..core.expansion import expansion_of
from ..core.fuse import fuse
from ..core.verify import Report, verify
from ..io.checkpoint import read_checkpoint, trained_architecture
from ..io.folders import is_folder
from ..io.hub_errors import without_tokens
from ..io.output import PathLike, new_folder
from ..io.runs import Run, read_run
from ..io.weights import training_form
from ..models.names import stock_architecture, timm_has
from ..models.settings import INPUT_SETTINGS
from ..report.cost import measure_costs
from ..report.images import ImageCheck, compare_on_images
from .card import TRAIN_REVISION, UNKNOWN_LICENSE
from .export import CONFIG_FILE, check_training_form, export_folder, time_steps_of
from .repository import MAIN_REVISION, PublishError, file_sizes, hub_id, log_in, send_forms

__all__ = ['PublishError', 'Published', 'publish']


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


def _check_arguments(repo: str, tag: Optional[str], revision: Optional[str], create_pr: bool, **others: Any) -> None:
    if not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', repo):
        raise UserError(f'repo must be ORG/NAME, got {repo!r}')
    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise UserError(f'{repo!r} can be no name of a repository: {e}') from None
    if tag is not None and not re.fullmatch(r'[A-Za-z0-9_]+', tag):
        raise UserError(f'tag must be letters, digits and _, as in orepa_in1k; got {tag!r}')
    if revision == TRAIN_REVISION:
        raise UserError(f'revision {TRAIN_REVISION!r} is that of the training form; give another')
    given = [name for name, value in dict(others, revision=revision).items() if value]
    if create_pr and given:
        raise UserError(f'a pull request changes nothing but the main revision; got {", ".join(given)} besides it')


def _default_tag(model: nn.Module, dataset: Optional[str]) -> str:
    """Methods and data set, in timm's manner."""
    methods = [method.name for method in expansion_of(model).methods.values()]
    methods += ['repan'] * (time_steps_of(model) > 1)
    data = re.sub('[^a-z0-9]+', '', (dataset or '').lower())
    return '_'.join(filter(None, (*dict.fromkeys(methods), data))) or 'timm_rep'


def _new_folders(out: Optional[PathLike], name: str, training_form: bool) -> Tuple[Path, Optional[Path]]:
    """What to write: ``out``, else NAME in the current folder, or the first of NAME-2, NAME-3 ... that is free."""
    names = (Path(name if number == 1 else f'{name}-{number}') for number in itertools.count(1))
    folder = new_folder(out or next(path for path in names if not path.exists()))
    return folder, new_folder(folder.with_name(f'{folder.name}.{TRAIN_REVISION}')) if training_form else None


def _figures(run: Optional[Run], images: Optional[ImageCheck], use_ema: bool) -> Tuple[Dict[str, float], Optional[str]]:
    """The accuracies to publish, and who measured them; none rather than one of other weights."""
    if images is not None and images.complete:
        figures = dict(top1=images.top1[1], **({} if images.top5 is None else dict(top5=images.top5[1])))
        return figures, (
            f'measured with the fused model on {images.images} images, of {images.source}, when it was published')
    if run is not None and run.metrics:
        split = run.args.get('val_split') or 'validation'
        weights = 'averaged weights' if use_ema else 'trained weights'
        return run.metrics, f'measured by the training run on its split `{split}`, with the {weights} in training form'
    return {}, None


def _registry_entry(folder: Path, full_name: str) -> Optional[Dict[str, Dict[str, Any]]]:
    """What to add to the registry of published weights; None if a name there would not build the network."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    provenance, cfg = config['timm_rep'], dict(config['pretrained_cfg'], num_classes=config['num_classes'])
    if not provenance['built_by_name']:
        return None
    entry = {key: cfg[key] for key in ('num_classes', 'license', *INPUT_SETTINGS) if key in cfg}
    return {f'{provenance["training_architecture"]}.{cfg["tag"]}': dict(hf_hub_id=full_name, **entry)}


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
    _check_arguments(
        repo, tag, revision, create_pr, git_tag=git_tag, include_training_form=include_training_form)
    checkpoint = read_checkpoint(source, use_ema=use_ema, allow_pickle=allow_pickle)
    model: Any = training_form(
        checkpoint, architecture, num_classes=num_classes, in_chans=in_chans, model_kwargs=model_kwargs)
    architecture, trained = str(model.pretrained_cfg['architecture']), trained_architecture(checkpoint)
    if trained not in (None, architecture):
        raise UserError(f'the run of {checkpoint.path} says that it trained {trained}, not {architecture}')
    run = read_run(checkpoint.path, checkpoint.args, checkpoint.epoch, metric=checkpoint.metric, use_ema=use_ema)
    trained_on = None if run is None else run.args.get('dataset') or None
    if data is not None and trained_on and not dataset:
        raise UserError(f'the run trained on {trained_on}; say with dataset (--dataset) what images those of data are')
    dataset = dataset or trained_on
    tag = tag or _default_tag(model, dataset)
    recipe = f'{stock_architecture(architecture)}.{tag}'
    if timm_has(stock_architecture(architecture)) and timm.models.is_model_pretrained(recipe):
        raise UserError(f"tag {tag!r} claims {recipe}, a recipe of timm's; these weights are not of it")
    if include_training_form:
        check_training_form(model)
    folder, training_folder = _new_folders(out, repo.partition('/')[2], include_training_form)
    revision = revision or MAIN_REVISION
    api = None if dry_run else log_in(token)

    fused = fuse(model)
    report = verify(model, fused)
    images = None
    if data is not None:
        split = split or str(checkpoint.args.get('val_split') or 'validation')
        reader = trained_on if trained_on and is_folder(trained_on) else ''  # which says the order of the classes
        images = compare_on_images(
            model, fused, data, split=split, dataset=reader, class_map=checkpoint.args.get('class_map'),
            img_mode=checkpoint.args.get('input_img_mode'), max_images=max_images, device=device, progress=progress)
    costs = measure_costs(model, fused, model.pretrained_cfg['input_size'], device=device)
    # arguments that are given by hand may make it another model than the run measured
    metrics, metrics_source = _figures(None if model_kwargs else run, images, use_ema)
    full_name = hub_id(repo, revision)
    export_folder(
        model.cpu(), folder, dataset=dataset, metrics=metrics, metrics_source=metrics_source, tag=tag,
        label_names=None if images is None else images.classes, license=license, repo=full_name, run=run, costs=costs,
        images=images, training_folder=training_folder)
    commit = None
    if api is not None:
        commit = send_forms(
            api, repo, folder, training_folder, private=private, revision=revision, create_pr=create_pr,
            git_tag=git_tag, replace_card=replace_card, token=token)
    return Published(
        folder,
        file_sizes(folder),
        training_folder,
        repo,
        revision,
        None if commit is None else without_tokens(str(commit.commit_url), token),
        None if commit is None or commit.pr_url is None else without_tokens(commit.pr_url, token),
        report,
        images,
        None if create_pr else _registry_entry(folder, full_name),
    )
