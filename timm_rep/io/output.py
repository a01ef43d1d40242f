"""Output files and folders: written whole or not at all, none replaced."""
import io
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Tuple, Union

import safetensors
import safetensors.torch
import torch
import torch.nn as nn

from ..core.errors import UserError
from ..core.verify import check_values

__all__ = ['is_weights_file', 'new_output', 'save_weights', 'written_whole']

WEIGHTS_SUFFIXES = ('.safetensors', '.pth')
# Of files that somebody may take for a format of weights that is written here.
OTHER_SUFFIXES = ('.bin', '.ckpt', '.h5', '.onnx', '.pkl', '.pt', '.pt2', '.pyth', '.tar')

PathLike = Union[str, Path]


def new_output(
        path: PathLike,
        *,
        folder_allowed: bool = False,
        suffixes: Tuple[str, ...] = WEIGHTS_SUFFIXES,
) -> Path:
    """Check the place for new weights before work is done for them.

    Args:
        path: New file.
        folder_allowed: Whether it may be a folder: what has no suffix of a file, such as ``resnet18.orepa_in1k``.
        suffixes: What a file must end in.

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
    if path.exists():
        raise FileExistsError(f'output {path} exists already; nothing was written')
    return path


def is_weights_file(path: Path) -> bool:
    """Whether a name is that of a file of weights that is written here, not of a Hub folder."""
    return path.suffix in WEIGHTS_SUFFIXES


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file or folder to write, which gets its name only when all went well.

    Args:
        path: New file or folder, or an empty folder; those around it are made.

    Yields:
        Where to write it.

    Raises:
        OSError: If it cannot be written. Nothing is left then.
    """
    temporary = path.with_name(f'.{uuid.uuid4().hex[:8]}.{path.name}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir():
            path.rmdir()  # on Windows a folder cannot be renamed onto it
        temporary.rename(path)
    except (OSError, safetensors.SafetensorError) as e:
        raise OSError(f'{path} cannot be written: {e}') from e
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def save_weights(model: nn.Module, path: PathLike) -> None:
    """Write a model's state dict.

    Args:
        model: The model.
        path: New file; ``.safetensors`` or ``.pth`` says in which format.

    Raises:
        UserError: For another suffix.
        FileExistsError: If the file exists. It then stays as it is.
        OSError: If it cannot be written. None is left then.
        VerificationError: If a value is not finite, or a running variance is negative.
    """
    path = new_output(path)
    check_values(model)
    # clones, since safetensors refuses tensors that share memory
    weights = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    if path.suffix == '.safetensors':
        # save_file() would write a file that only its owner can read
        content = safetensors.torch.save(weights, metadata=dict(format='pt'))
    else:
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        content = buffer.getvalue()
    with written_whole(path) as temporary:
        temporary.write_bytes(content)
