"""A repository on the Hugging Face Hub: what is there, and folders sent to it in one commit each."""
import logging
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import RevisionNotFoundError

from .._version import __version__
from ..io.hub_errors import HubError, hide_tokens_in_logs, hub_message, without_tokens
from .card import TRAIN_REVISION, is_generated
from .export import CARD_FILE, MANAGED_FILES

__all__ = ['MAIN_REVISION', 'PublishError', 'file_sizes', 'hub_id', 'log_in', 'send_forms']

_logger = logging.getLogger(__name__)

MAIN_REVISION = 'main'


class PublishError(HubError):
    """The Hub did not take a model, or only a part of what was to be sent."""


def hub_id(repo: str, revision: str) -> str:
    """What timm loads as ``hf-hub:ID``."""
    return repo if revision == MAIN_REVISION else f'{repo}@{revision}'


def file_sizes(folder: Path) -> Dict[str, int]:
    """Names and sizes in bytes of all files in a folder."""
    paths = sorted(path for path in folder.rglob('*') if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def log_in(token: Optional[str]) -> HfApi:
    """The client of the Hub, once the token is known to be good: before the work whose result it is to send.

    Args:
        token: Access token; by default the one that ``hf auth login`` or ``HF_TOKEN`` gives.

    Returns:
        The client.

    Raises:
        PublishError: If there is no valid token, or no Hub.
    """
    hide_tokens_in_logs()
    api = HfApi(token=token, library_name='timm_rep', library_version=__version__)
    try:
        api.whoami()
    except Exception as e:  # those of the HTTP library of huggingface_hub, which is not always the same one
        raise PublishError(
            f'logging in to {api.endpoint} failed: {hub_message(e, token)}. '
            'Nothing was done; a dry run (--dry-run) writes the folder without') from None
    return api


def _head_of(api: HfApi, repo: str, revision: str, replace_card: bool) -> Any:
    """State of a branch, if what is there may be replaced; a branch is made if there is none."""
    try:
        info = api.model_info(repo, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo, branch=revision, exist_ok=True)
        return api.model_info(repo, revision=revision)  # its card is a copy of one that stays
    files = {file.rfilename for file in info.siblings or ()}
    if CARD_FILE not in files and not replace_card and files.intersection(MANAGED_FILES):
        there = ', '.join(sorted(files.intersection(MANAGED_FILES)))
        raise HubError(
            f'{hub_id(repo, revision)} holds {there}, but no model card of timm_rep, so they are not of a publication; '
            'to replace them give replace_card (--replace-card)')
    if CARD_FILE in files and not replace_card:
        path = api.hf_hub_download(repo, CARD_FILE, revision=info.sha)
        if not is_generated(Path(path).read_text(encoding='utf-8', errors='replace')):
            raise HubError(
                f'the model card of {hub_id(repo, revision)} was written or changed by hand; to put the new one in its '
                'place give replace_card (--replace-card), and your text back afterwards')
    return info


def _send(
        api: HfApi,
        repo: str,
        folder: Path,
        sent: List[str],
        token: Optional[str],
        **kwargs: Any,
) -> CommitInfo:
    """Send a folder in one commit, note it, and look at what arrived."""
    with warnings.catch_warnings(record=True) as told:  # by the server, about the card
        commit = api.upload_folder(repo_id=repo, folder_path=folder, delete_patterns=list(MANAGED_FILES), **kwargs)
    for warning in told:
        _logger.warning('%s', without_tokens(str(warning.message), token))
    sent.append(str(commit.commit_url))
    files = file_sizes(folder)
    found = api.get_paths_info(repo, list(files), revision=commit.oid)
    sizes = {file.path: getattr(file, 'size', None) for file in found}
    wrong = [name for name, size in files.items() if sizes.get(name) != size]
    if wrong:
        raise HubError(f'not all in {commit.commit_url} is what was sent ({", ".join(wrong)}); publish again')
    return commit


def send_forms(
        api: HfApi,
        repo: str,
        folder: Path,
        training_folder: Optional[Path],
        *,
        private: bool,
        revision: str,
        create_pr: bool,
        git_tag: Optional[str],
        replace_card: bool,
        token: Optional[str] = None,
) -> CommitInfo:
    """Look at the repository before anything is sent to it, then send the training form and the stock form.

    Args:
        api: The client.
        repo: Repository on the Hub.
        folder: The export in stock form.
        training_folder: The export in training form for the revision ``train``, if there is one.
        private: As in :func:`timm_rep.publish`.
        revision: Branch of the stock form.
        create_pr: As in :func:`timm_rep.publish`.
        git_tag: As in :func:`timm_rep.publish`.
        replace_card: As in :func:`timm_rep.publish`.
        token: Access token, if one was given, to leave it out of messages.

    Returns:
        The commit of the stock form.

    Raises:
        PublishError: If the repository, or a model card on it, is not to be written to, or the Hub did not take it all.
    """
    sent: List[str] = []
    name = repo.partition('/')[2]
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        head = _head_of(api, repo, revision, replace_card)
        if private and not head.private:
            raise HubError(f'{repo} exists and is public; it is not made private here, nor written to')
        if git_tag and git_tag in {ref.name for ref in api.list_repo_refs(repo).tags}:
            raise HubError(f'{repo} has the tag {git_tag} already')
        if training_folder is not None:
            parent = _head_of(api, repo, TRAIN_REVISION, replace_card).sha
            _send(
                api, repo, training_folder, sent, token, revision=TRAIN_REVISION, parent_commit=parent,
                commit_message=f'{name} in training form')
        commit = _send(
            api, repo, folder, sent, token, revision=None if create_pr else revision, parent_commit=head.sha,
            create_pr=create_pr, commit_message=f'{name}, fused by timm_rep {__version__}')
        if git_tag:
            api.create_tag(repo, tag=git_tag, revision=commit.oid)
        return commit
    except Exception as e:  # those of the HTTP library of huggingface_hub, which is not always the same one
        problem = str(e) if isinstance(e, HubError) else f'publishing to {repo} failed: {hub_message(e, token)}'
        state = f'On the Hub: {", ".join(sent)}' if sent else 'The Hub has confirmed no commit'
        state += f' (look at {api.endpoint}/{repo})'
        raise PublishError(
            without_tokens(f'{problem}. {state}', token) + f'; the folder {folder} is complete and stays') from None
