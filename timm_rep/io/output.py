"""Output files and folders: new ones only, and each there whole or not at all."""
import os
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Tuple, Union

import safetensors

from ..core.errors import UserError

__all__ = ['PathLike', 'clear_left_behind', 'is_weights_file', 'new_folder', 'new_output', 'written_whole']

WEIGHTS_SUFFIXES = ('.safetensors', '.pth')
# Of files that somebody may take for a format of weights that is written here.
OTHER_SUFFIXES = (
    '.bin', '.ckpt', '.gz', '.h5', '.json', '.npz', '.onnx', '.pickle', '.pkl', '.pt', '.pt2', '.pyth', '.tar', '.txt',
    '.yaml', '.zip')

PathLike = Union[str, Path]


def _check_place(path: Path) -> None:
    around = next(parent for parent in path.absolute().parents if parent.exists())
    if not around.is_dir():
        raise NotADirectoryError(f'{path} cannot be written: {around} is a file')


def new_output(
        path: PathLike,
        *,
        folder_allowed: bool = False,
        suffixes: Tuple[str, ...] = WEIGHTS_SUFFIXES,
        replace: bool = False,
) -> Path:
    """Check the place for a new file before work is done for it.

    Args:
        path: New file.
        folder_allowed: Whether it may be a folder: what has no suffix of a file, such as ``resnet18.orepa_in1k``.
        suffixes: What a file must end in.
        replace: Let it be a file that exists.

    Returns:
        The path.

    Raises:
        UserError: For another suffix.
        FileExistsError: If it exists.
        NotADirectoryError: If there is a file where a folder around it would be.
    """
    path = Path(path)
    if path.suffix not in suffixes and (path.suffix in OTHER_SUFFIXES or not folder_allowed):
        allowed = ' or '.join(suffixes) + (', or be the name of a Hub folder' if folder_allowed else '')
        raise UserError(f'output {path} must end in {allowed}')
    if path.exists() and not (replace and path.is_file()):
        raise FileExistsError(f'output {path} exists already; nothing was written')
    _check_place(path)
    return path


def new_folder(path: PathLike) -> Path:
    """Check the place for a new folder before work is done for it.

    Args:
        path: New or empty folder.

    Returns:
        The absolute path.

    Raises:
        FileExistsError: If it is a file or a folder that is not empty.
        NotADirectoryError: If there is a file where a folder around it would be.
    """
    path = Path(path).resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        kind = 'a folder that is not empty' if path.is_dir() else 'a file'
        raise FileExistsError(f'{path} is {kind}; give a new or empty folder (nothing was changed)')
    _check_place(path)
    return path


def is_weights_file(path: Path) -> bool:
    """Whether a name is that of a file of weights that is written here, not of a Hub folder."""
    return path.suffix in WEIGHTS_SUFFIXES


def _leave_nothing(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():  # which nothing below a file does
        path.unlink()


def clear_left_behind(folder: Path) -> None:
    """Remove what processes that were killed had begun to write in a folder.

    Args:
        folder: Folder that no other process writes to.
    """
    for path in folder.glob(f'.tmp-{"[0-9a-f]" * 8}*'):
        _leave_nothing(path)


def _permit_as_usual(path: Path) -> None:
    """Give files the permissions of any new file; safetensors writes such that only their owner can read."""
    usual = path.with_suffix('.mode')
    usual.touch()
    mode = usual.stat().st_mode
    usual.unlink()
    for file in path.rglob('*') if path.is_dir() else (path,):
        if file.is_file():
            file.chmod(mode)


@contextmanager
def written_whole(path: Path, *, replace: bool = False, follow: bool = True) -> Iterator[Path]:
    """A file or folder to write, which gets its name only when all went well.

    Args:
        path: New file or folder, or an empty folder; those around it are made.
        replace: Let it be a file that is there already.
        follow: Write what a link points to, instead of a file in the place of the link.

    Yields:
        Where to write it.

    Raises:
        OSError: If it cannot be written, or the file is there. Nothing is left then, and nothing is changed.
    """
    if follow and path.is_symlink():
        path = Path(os.path.realpath(path))
    temporary = path.with_name(f'.tmp-{uuid.uuid4().hex[:8]}{path.suffix}')  # short: names may be as long as can be
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _permit_as_usual(temporary)
        if path.is_dir():
            path.rmdir()  # on Windows a folder cannot be renamed onto it
        elif path.exists() and not replace:
            raise FileExistsError('there is a file of that name by now')
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as e:
        raise OSError(f'{path} cannot be written: {e}') from e
    finally:
        _leave_nothing(temporary)
