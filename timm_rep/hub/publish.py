"""Publish a trained model on the Hugging Face Hub: fuse, verify, measure, write the folder, send it in one commit."""
import dataclasses
import functools
import itertools
import json
import logging
import re
import tempfile
import unicodedata
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple, Union

import timm
import torch.nn as nn
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from ..core.errors import UserError
from ..core.fuse import fuse
from ..core.verify import Report, verify
from ..io.checkpoint import Checkpoint, model_args_of, read_checkpoint, trained_architecture
from ..io.hub_errors import HubError, reason, status_of
from ..io.output import new_folder
from ..io.runs import Run, read_run
from ..io.weights import training_form
from ..models.names import stock_architecture
from ..models.published import published_weights
from ..report.cost import measure_costs
from ..report.images import TOP_K, ImageCheck, compare_on_images
from .card import OWN_TEXT_BEGIN, OWN_TEXT_END, UNKNOWN_LICENSE, lost_text, needs_plugin, update_card
from .export import (
    CARD_FILE,
    CONFIG_FILE,
    DATA_FIELDS,
    MANAGED_FILES,
    export_folder,
    export_training_form,
    methods_of,
    why_not_restored,
)

__all__ = ['PublishError', 'Published', 'publish']

_logger = logging.getLogger(__name__)

MAIN_REVISION = 'main'
TRAIN_REVISION = 'train'

PathLike = Union[str, Path]


class PublishError(HubError):
    """The Hub did not take a model, or only a part of what was to be sent."""


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
        entry: Entry to add to ``timm_rep/pretrained.json``, so that ``pretrained=True`` finds the weights; None of a
            pull request, and if it would build another network.
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
        return _hub_id(self.repo, self.revision)


def _hub_id(repo: str, revision: str) -> str:
    return repo if revision == MAIN_REVISION else f'{repo}@{revision}'


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


def _check_recipe(checkpoint: Checkpoint, architecture: str, repo: str, tag: str) -> None:
    """Refuse what would claim to be another model, or one of timm's own recipes."""
    trained = trained_architecture(checkpoint)
    if trained not in (None, architecture):
        raise UserError(
            f'the run of {checkpoint.path} says that it trained {trained}, not {architecture}; its arguments and '
            'figures would be published as those of another model'
        )
    stock = stock_architecture(architecture)
    name = repo.partition('/')[2]
    recipes = {} if needs_plugin(stock) else dict.fromkeys(timm.list_models(f'{stock}.*', pretrained=True), 'timm')
    for published, entry in published_weights().items():
        if published.partition('.')[0] == architecture and entry['hf_hub_id'] != repo:
            recipes[f'{stock}.{published.partition(".")[2]}'] = entry['hf_hub_id']
    for recipe, owner in recipes.items():
        for what, own in ((f'tag {tag!r}', f'{stock}.{tag}'), (f'name {name!r}', name)):
            if f'{_plain(own)}-'.startswith(f'{_plain(recipe)}-'):
                raise UserError(f'{what} claims {recipe}, a recipe of {owner}; these weights are not of it')
    claimed = re.split(r'[^a-z0-9_]', name.lower())[0]
    if timm.is_model(claimed) and claimed not in (stock, architecture):
        raise UserError(f'name {name!r} says {claimed}, but the model is {architecture}, whose stock form is {stock}')


def _plain(name: str) -> str:
    """A name without what readers overlook: case, and which mark separates its parts."""
    return re.sub(r'[^a-z0-9]+', '-', name.lower())


def _default_tag(model: nn.Module, dataset: Optional[str]) -> str:
    """Method and data set, in timm's manner."""
    letters = unicodedata.normalize('NFKD', dataset or '').lower()  # without accents, which become marks of their own
    data = re.sub(r'[^a-z0-9]+', '', letters)
    return '_'.join(part for part in (*map(str.lower, methods_of(model)), data) if part) or 'timm_rep'


def _free_folder(name: str) -> Path:
    """NAME in the current folder, or the first of NAME-2, NAME-3 ... that is free, also with the training form."""
    names = (name if number == 1 else f'{name}-{number}' for number in itertools.count(1))
    return next(path for path in map(Path, names) if not (path.exists() or _training_folder(path).exists()))


def _training_folder(folder: Path) -> Path:
    return folder.with_name(f'{folder.name}.{TRAIN_REVISION}')


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


def _without_figures_of_another(run: Run, checkpoint: Checkpoint, model_kwargs: Mapping[str, Any]) -> Run:
    """The run; without its figures if arguments are given that make its model another."""
    trained = model_args_of(checkpoint, checkpoint.args.get('model') or '', {})
    changed = [key for key, value in model_kwargs.items() if trained.get(key) != value]
    if not (run.metrics and checkpoint.args and changed):
        return run
    _logger.warning('the figures of the run are not stated: it trained another model (%s)', ', '.join(changed))
    return dataclasses.replace(run, metrics={})


def _entry(architecture: str, folder: Path, hub_id: str, fused: nn.Module) -> Optional[Dict[str, Dict[str, Any]]]:
    """What to add to the registry of published weights: where they are, and what they must be fed with.

    None if the architecture with its own arguments is not the network that these weights are of.
    """
    config = json.loads((folder / CONFIG_FILE).read_text())
    cfg: Dict[str, Any] = dict(config['pretrained_cfg'], num_classes=config['num_classes'])
    entry = {key: cfg[key] for key in ('num_classes', 'license', *DATA_FIELDS) if key in cfg}
    args = config['timm_rep']['training_args']
    # without arguments the export has tried it already
    why = why_not_restored(fused, architecture, {}, entry) if args else None
    if args is None or why is not None:
        _logger.warning('no entry for the registry: %s', why or f'{architecture} is not restored from these weights')
        return None
    return {f'{architecture}.{cfg["tag"]}': dict(hf_hub_id=hub_id, **entry)}


def _files(folder: Path) -> Dict[str, int]:
    paths = sorted(path for path in folder.rglob('*') if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


@contextmanager
def _told(what: str, folder: Path, token: Optional[str], sent: List[str]) -> Iterator[None]:
    """Say of any failure what it was, what is on the Hub all the same, and that the folder stays."""
    try:
        yield
    except PublishError:
        raise
    except Exception as e:  # those of the HTTP library of huggingface_hub, which is not always the same one
        done = f'On the Hub: {", ".join(sent)}' if sent else 'Nothing of it is published'
        raise PublishError(
            f'{what} failed: {reason(e, token)}. {done}; the folder {folder} is complete and stays') from None


def _info(api: HfApi, repo: str, revision: str) -> Any:
    """State of a branch, which is made if there is none."""
    try:
        return api.model_info(repo, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo, branch=revision, exist_ok=True)
        return api.model_info(repo, revision=revision)


def _old_card(api: HfApi, repo: str, info: Any) -> str:
    """The model card that is there now."""
    if CARD_FILE not in {file.rfilename for file in info.siblings or ()}:
        return ''
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo, CARD_FILE, revision=info.sha, local_dir=folder)
        return Path(path).read_text(encoding='utf-8')


def _take_over(folder: Path, old_card: str, hub_id: str, replace_card: bool) -> None:
    """Put what the owner wrote into the card that is there into the new one."""
    if not old_card:
        return
    path = folder / CARD_FILE
    card = path.read_text(encoding='utf-8')
    lost = lost_text(old_card, card)
    if lost is not None and not replace_card:
        raise PublishError(
            f'the model card of {hub_id} was written or changed by hand, and this would be lost: {lost!r}. Put what '
            f'shall stay between its lines {OWN_TEXT_BEGIN} and {OWN_TEXT_END}, and give replace_card '
            f'(--replace-card). Nothing of it is published; the folder {folder} is complete and stays'
        )
    path.write_text(update_card(old_card, card), encoding='utf-8')


def _differing(api: HfApi, folder: Path, repo: str, revision: str) -> Optional[str]:
    """Name of a file that is not on the Hub as it is here; None if all are."""
    names = list(_files(folder))
    there = {file.path: file for file in api.get_paths_info(repo, names, revision=revision)}
    return next((name for name in names if not _is_copy(there.get(name), folder / name)), None)


def _is_copy(file: Any, path: Path) -> bool:
    if file is None:
        return False
    if file.lfs is None:
        return bool(file.blob_id == git_hash(path.read_bytes()))
    with path.open('rb') as content:
        return bool(file.lfs.sha256 == sha_fileobj(content).hex())


def _commit(
        api: HfApi,
        folder: Path,
        repo: str,
        revision: str,
        info: Any,
        message: str,
        sent: List[str],
        create_pr: bool = False,
) -> CommitInfo:
    """Send a folder in one commit. If its answer is lost, look for it; if it may come yet, note that as sent."""
    files = _files(folder)
    stale = {file.rfilename for file in info.siblings or ()} & set(MANAGED_FILES) - set(files)
    operations: List[Any] = [CommitOperationAdd(name, str(folder / name)) for name in files]
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    try:
        return api.create_commit(
            repo,
            operations,
            commit_message=message,
            revision=None if create_pr else revision,
            parent_commit=info.sha,
            create_pr=create_pr,
        )
    except Exception as e:
        status = status_of(e)
        if status is not None and status < 500:
            raise
        # a gateway's error, too, says nothing of the server behind it
        unknown = create_pr or status in (None, 502, 504)
        if not create_pr:
            try:
                head: Any = api.model_info(repo, revision=revision).sha
                if _differing(api, folder, repo, head) is None:
                    url = f'{api.endpoint}/{repo}/commit/{head}'
                    return CommitInfo(commit_url=url, commit_message=message, commit_description='', oid=head)
            except Exception:
                unknown = True
        if unknown:
            page = 'discussions' if create_pr else f'commits/{revision}'
            sent.append(f'perhaps {folder.name}, look at {api.endpoint}/{repo}/{page}')
        raise


def _check_arrival(api: HfApi, folder: Path, repo: str, commit: CommitInfo) -> None:
    name = _differing(api, folder, repo, commit.oid)
    if name is not None:
        raise PublishError(f'{name} in {commit.commit_url} is not what was sent; publish again')


def _log_in(token: Optional[str]) -> HfApi:
    """The client of the Hub, once the token is known to be good: before the work whose result it is to send."""
    from .._version import __version__

    api = HfApi(token=token, library_name='timm_rep', library_version=__version__)
    try:
        api.whoami()
    except Exception as e:  # those of the HTTP library of huggingface_hub, which is not always the same one
        raise PublishError(
            f'logging in to {api.endpoint} failed: {reason(e, token)}. '
            'Nothing was done; a dry run (--dry-run) writes the folder without') from None
    return api


def _upload(
        api: HfApi,
        folder: Path,
        training_folder: Optional[Path],
        repo: str,
        *,
        private: bool,
        revision: str,
        create_pr: bool,
        git_tag: Optional[str],
        replace_card: bool,
        token: Optional[str],
) -> Any:
    sent: List[str] = []
    told = functools.partial(_told, folder=folder, token=token, sent=sent)
    with told(f'creating {repo}'):
        api.create_repo(repo, private=private or None, exist_ok=True)
    with told(f'reading {repo}'):
        info = _info(api, repo, revision)
        if private and not info.private:
            raise PublishError(
                f'{repo} exists and is public; it is not made private here, nor written to. Nothing is published; the '
                f'folder {folder} is complete and stays'
            )
        tags = {ref.name for ref in api.list_repo_refs(repo).tags} if git_tag else ()
        if git_tag in tags:
            raise PublishError(f'{repo} has the tag {git_tag} already. Nothing is published; the folder {folder} stays')
        _take_over(folder, _old_card(api, repo, info), _hub_id(repo, revision), replace_card)
        if training_folder is not None:
            train_info = _info(api, repo, TRAIN_REVISION)
            train_card = _old_card(api, repo, train_info)
            # a new branch starts as a copy of the main one
            if train_card != _old_card(api, repo, api.model_info(repo, revision=MAIN_REVISION)):
                _take_over(training_folder, train_card, _hub_id(repo, TRAIN_REVISION), replace_card)
    name = repo.partition('/')[2]
    if training_folder is not None:
        what = f'the training form in {_hub_id(repo, TRAIN_REVISION)}'
        with told(f'sending {what}'):
            commit = _commit(
                api, training_folder, repo, TRAIN_REVISION, train_info, f'{name} in training form', sent)
        sent.append(what)
        with told(f'checking {what}'):
            _check_arrival(api, training_folder, repo, commit)
    with told(f'sending {folder.name} to {_hub_id(repo, revision)}'):
        message = f'{name}, fused by timm_rep {api.library_version}'
        commit = _commit(api, folder, repo, revision, info, message, sent, create_pr)
    sent.append(str(commit.commit_url))
    with told(f'checking {commit.commit_url}' + (f', before tagging it {git_tag},' if git_tag else '')):
        _check_arrival(api, folder, repo, commit)
    if git_tag:
        with told(f'tagging {commit.commit_url} {git_tag}'):
            api.create_tag(repo, tag=git_tag, revision=commit.oid)
    return commit


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
    another model's recipe. The folder stays, whatever happens. Of the model card that is on the Hub, what stands
    between the two marks is kept, and metadata of the owner's; text elsewhere that nobody generated is refused.

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
        replace_card: Replace a model card that was written or changed by hand outside of the two marks.
        device: Where images are run and speed is measured.
        token: Access token; by default the one that ``hf auth login`` or ``HF_TOKEN`` gives. Never shown or written.
        progress: Show progress bars.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: If the source or the folder of images is not there.
        FileExistsError: If ``out``, or ``out`` with ``.train`` for the training form, is there and not empty.
        UserError: If an argument does not fit, or if the metadata would claim another model's recipe.
        UserError: If the weights are not those of the architecture.
        VerificationError: If the fused model is not the same function, or not finite. Nothing is written or sent.
        PublishError: If the Hub did not take it.
    """
    _check_arguments(repo, tag, revision, create_pr, git_tag, include_training_form)
    checkpoint = read_checkpoint(source, use_ema=use_ema, allow_pickle=allow_pickle)
    model: Any = training_form(
        checkpoint, architecture, num_classes=num_classes, in_chans=in_chans, model_kwargs=model_kwargs)
    architecture = str(model.pretrained_cfg['architecture'])
    run = read_run(
        checkpoint.path, checkpoint.args, checkpoint.epoch, metric=checkpoint.metric, use_ema=use_ema)
    if run is not None:
        run = _without_figures_of_another(run, checkpoint, model_kwargs or {})
        if data is not None and not dataset and run.args.get('dataset'):
            raise UserError(
                f'the run trained on {run.args["dataset"]}; say with dataset (--dataset) what images those of data are')
        dataset = dataset or run.args.get('dataset') or None
    tag = tag or _default_tag(model, dataset)
    _check_recipe(checkpoint, architecture, repo, tag)
    folder = new_folder(_free_folder(repo.partition('/')[2]) if out is None else out)
    training_folder = new_folder(_training_folder(folder)) if include_training_form else None
    revision = revision or MAIN_REVISION
    hub_id = _hub_id(repo, revision)
    api = None if dry_run else _log_in(token)

    fused = fuse(model)
    report = verify(model, fused)
    images = None
    if data is not None:
        images = compare_on_images(
            model,
            fused,
            data,
            split=split or str(checkpoint.args.get('val_split') or 'validation'),
            class_map=checkpoint.args.get('class_map'),
            max_images=max_images,
            device=device,
            progress=progress,
        )
    costs = measure_costs(model, fused, model.pretrained_cfg['input_size'], device=device)
    metrics, metrics_source = _figures(run, images, use_ema, model.num_classes)
    common: Dict[str, Any] = dict(
        tag=tag, license=license, repo=hub_id, label_names=None if images is None else images.classes)
    folder = export_folder(
        model.cpu(), folder, dataset=dataset, metrics=metrics, metrics_source=metrics_source, run=run, costs=costs,
        images=images, **common)
    if training_folder is not None:
        export_training_form(model, training_folder, **common)

    entry = None if create_pr else _entry(architecture, folder, hub_id, fused.cpu())
    commit = None
    if api is not None:
        commit = _upload(
            api,
            folder,
            training_folder,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            git_tag=git_tag,
            replace_card=replace_card,
            token=token,
        )
    return Published(
        folder,
        _files(folder),
        training_folder,
        repo,
        revision,
        None if commit is None else str(commit.commit_url),
        None if commit is None else commit.pr_url,
        report,
        images,
        entry,
    )
