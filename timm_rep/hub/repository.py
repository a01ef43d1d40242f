"""A repository on the Hugging Face Hub: what is there, and folders sent to it in one commit each."""
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import RevisionNotFoundError

from .._version import __version__
from ..io.hub_errors import HubError, hub_message
from .card import TRAIN_REVISION, is_generated
from .export import CARD_FILE, MANAGED_FILES

__all__ = ['MAIN_REVISION', 'Publication', 'PublishError', 'file_sizes', 'hub_id', 'log_in', 'send_forms']

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
    api = HfApi(token=token, library_name='timm_rep', library_version=__version__)
    try:
        api.whoami()
    except Exception as e:  # those of the HTTP library of huggingface_hub, which is not always the same one
        raise PublishError(
            f'logging in to {api.endpoint} failed: {hub_message(e, token)}. '
            'Nothing was done; a dry run (--dry-run) writes the folder without') from None
    return api


@dataclass
class Publication:
    """A folder, the repository that it is for, and what of it is there already.

    Attributes:
        api: The client.
        repo: Repository on the Hub.
        folder: The export in stock form.
        token: Access token, if one was given, to leave it out of messages.
        sent: What is on the Hub.
    """

    api: HfApi
    repo: str
    folder: Path
    token: Optional[str]
    sent: List[str] = field(default_factory=list)

    def error(self, problem: str, state: Optional[str] = None) -> PublishError:
        """What went wrong, what is on the Hub all the same, and that the folder stays."""
        state = ', '.join(filter(None, (*self.sent, state)))
        state = f'On the Hub: {state}' if state else 'Nothing of it is published'
        return PublishError(f'{problem}. {state}; the folder {self.folder} is complete and stays')

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Say of any failure what it was a failure of."""
        try:
            yield
        except HubError:
            raise
        except Exception as e:  # those of the HTTP library of huggingface_hub, which is not always the same one
            raise self.error(f'{what} failed: {hub_message(e, self.token)}') from None

    def head_of(self, revision: str, replace_card: bool) -> Any:
        """State of a branch, if its model card may be replaced; a branch is made if there is none."""
        try:
            info = self.api.model_info(self.repo, revision=revision)
        except RevisionNotFoundError:
            self.api.create_branch(self.repo, branch=revision, exist_ok=True)
            return self.api.model_info(self.repo, revision=revision)  # its card is a copy of one that stays
        if CARD_FILE in {file.rfilename for file in info.siblings or ()} and not replace_card:
            path = self.api.hf_hub_download(self.repo, CARD_FILE, revision=info.sha)
            if not is_generated(Path(path).read_text(encoding='utf-8', errors='replace')):
                raise self.error(
                    f'the model card of {hub_id(self.repo, revision)} was written or changed by hand; to put the new '
                    'one in its place give replace_card (--replace-card), and your text back afterwards')
        return info

    def send(self, folder: Path, revision: str, parent: str, message: str, create_pr: bool = False) -> CommitInfo:
        """Send a folder in one commit, and look at what arrived."""
        try:
            commit = self.api.upload_folder(
                repo_id=self.repo,
                folder_path=folder,
                commit_message=message,
                revision=None if create_pr else revision,
                parent_commit=parent,
                delete_patterns=list(MANAGED_FILES),
                create_pr=create_pr,
            )
        except Exception as e:
            what = f'sending {folder.name} to {hub_id(self.repo, revision)}'
            state = self._seen_after_failure(folder.name, revision, parent, create_pr)
            raise self.error(f'{what} failed: {hub_message(e, self.token)}', state) from None
        self.sent.append(f'{hub_id(self.repo, revision)} in {commit.commit_url}')
        files = file_sizes(folder)
        with self.step(f'looking at {commit.commit_url}'):
            found = self.api.get_paths_info(self.repo, list(files), revision=commit.oid)
            sizes = {file.path: getattr(file, 'size', None) for file in found}
            wrong = [name for name, size in files.items() if sizes.get(name) != size]
            if wrong:
                raise self.error(f'not all in {commit.commit_url} is what was sent ({", ".join(wrong)}); publish again')
        return commit

    def _seen_after_failure(self, name: str, revision: str, parent: str, create_pr: bool) -> Optional[str]:
        """The answer may have been lost: whether a commit is there all the same; None if there is none so far."""
        page = f'{self.api.endpoint}/{self.repo}/' + ('discussions' if create_pr else f'commits/{revision}')
        try:
            changed = create_pr or self.api.model_info(self.repo, revision=revision).sha != parent
        except Exception:  # then it is not known
            changed = True
        return f'perhaps {name}, look at {page}' if changed else None


def send_forms(
        publication: Publication,
        training_folder: Optional[Path],
        *,
        private: bool,
        revision: str,
        create_pr: bool,
        git_tag: Optional[str],
        replace_card: bool,
) -> CommitInfo:
    """Look at the repository before anything is sent to it, then send the training form and the stock form.

    Args:
        publication: The folder of the stock form, and where it goes.
        training_folder: Folder of the training form, if there is one, for the revision ``train``.
        revision: Branch of the stock form.

    All others as in :func:`timm_rep.publish`.

    Returns:
        The commit of the stock form.

    Raises:
        PublishError: If the repository, or a model card on it, is not to be written to, or the Hub did not take it all.
    """
    api, repo = publication.api, publication.repo
    with publication.step(f'creating {repo}'):
        api.create_repo(repo, private=private or None, exist_ok=True)
    with publication.step(f'reading {repo}'):
        head = publication.head_of(revision, replace_card)
        if private and not head.private:
            raise publication.error(f'{repo} exists and is public; it is not made private here, nor written to')
        if git_tag and git_tag in {ref.name for ref in api.list_repo_refs(repo).tags}:
            raise publication.error(f'{repo} has the tag {git_tag} already')
        train_head = None if training_folder is None else publication.head_of(TRAIN_REVISION, replace_card)
    name = repo.partition('/')[2]
    if training_folder is not None and train_head is not None:
        publication.send(training_folder, TRAIN_REVISION, train_head.sha, f'{name} in training form')
    message = f'{name}, fused by timm_rep {__version__}'
    commit = publication.send(publication.folder, revision, head.sha, message, create_pr)
    if git_tag:
        with publication.step(f'tagging {commit.commit_url} {git_tag}'):
            api.create_tag(repo, tag=git_tag, revision=commit.oid)
    return commit
