"""Output files and folders: new ones only, and each there whole or not at all."""
import glob
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Tuple, Union

import safetensors

from ..core.errors import UserError

__all__ = ['PathLike', 'is_weights_file', 'new_folder', 'new_output', 'written_whole']

WEIGHTS_SUFFIXES = ('.safetensors', '.pth')
# Of files that somebody may take for a format of weights that is written here.
OTHER_SUFFIXES = ('.bin', '.ckpt', '.h5', '.onnx', '.pkl', '.pt', '.pt2', '.pyth', '.tar')

PathLike = Union[str, Path]


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
    """
    path = Path(path)
    if path.suffix not in suffixes and (path.suffix in OTHER_SUFFIXES or not folder_allowed):
        allowed = ' or '.join(suffixes) + (', or be the name of a Hub folder' if folder_allowed else '')
        raise UserError(f'output {path} must end in {allowed}')
    if path.exists() and not (replace and path.is_file()):
        raise FileExistsError(f'output {path} exists already; nothing was written')
    return path


def new_folder(path: PathLike) -> Path:
    """Check the place for a new folder before work is done for it.

    Args:
        path: New or empty folder.

    Returns:
        The absolute path.

    Raises:
        FileExistsError: If it is a file or a folder that is not empty.
    """
    path = Path(path).resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        kind = 'a folder that is not empty' if path.is_dir() else 'a file'
        raise FileExistsError(f'{path} is {kind}; give a new or empty folder (nothing was changed)')
    return path


def is_weights_file(path: Path) -> bool:
    """Whether a name is that of a file of weights that is written here, not of a Hub folder."""
    return path.suffix in WEIGHTS_SUFFIXES


def _leave_nothing(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _permit_as_usual(path: Path) -> None:
    """Give files the permissions of any new file; safetensors writes such that only their owner can read."""
    usual = path.with_name(f'{path.name}.mode')
    usual.touch()
    mode = usual.stat().st_mode
    usual.unlink()
    for file in path.rglob('*') if path.is_dir() else (path,):
        if file.is_file():
            file.chmod(mode)


@contextmanager
def written_whole(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A file or folder to write, which gets its name only when all went well.

    Args:
        path: New file or folder, or an empty folder; those around it are made.
        replace: Let it be a file that is there already, and clear what was left of it by a process that was killed.

    Yields:
        Where to write it.

    Raises:
        OSError: If it cannot be written, or the file is there. Nothing is left then, and nothing is changed.
    """
    temporary = path.with_name(f'.{uuid.uuid4().hex[:8]}.{path.name}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _permit_as_usual(temporary)
        if path.is_dir():
            path.rmdir()  # on Windows a folder cannot be renamed onto it
        elif path.exists() and not replace:
            raise FileExistsError('there is a file of that name by now')
        temporary.replace(path)
        if replace:
            for left_behind in path.parent.glob(f'.{"[0-9a-f]" * 8}.{glob.escape(path.name)}'):
                _leave_nothing(left_behind)
    except (OSError, safetensors.SafetensorError) as e:
        raise OSError(f'{path} cannot be written: {e}') from e
    finally:
        _leave_nothing(temporary)
