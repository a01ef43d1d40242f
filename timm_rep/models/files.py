"""Files of weights, looked at before anything of them is used, and read."""
import argparse
import pickle
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Iterator, Mapping, Tuple

import safetensors
import torch

from ..core.errors import UserError
from .damage import check_records, check_sum
from .pickles import UnsafePickleError, check_pickles

__all__ = ['check_file', 'read_file']

ALLOW_PICKLE = ' (allow_pickle=True or --allow-pickle loads it all the same: only if you trust whoever made it)'


def _in_words(error: Exception) -> str:
    """What a reader says, but what torch says of refused files, which is how to load them unsafely."""
    text = str(error).partition('\n')[0]
    unsafe = isinstance(error, pickle.UnpicklingError) or re.search('weights_only|safe_globals|pickle_module', text)
    return type(error).__name__ if unsafe else f'{type(error).__name__}: {text}'


@contextmanager
def _refusals(path: Path, way_out: str = '') -> Iterator[None]:
    """Whatever a reader of a file raises, as UserErrors: damage makes the readers raise almost anything."""
    try:
        yield
    except (FileNotFoundError, PermissionError, ImportError):
        raise
    except UserError as e:
        raise UserError(f'{path} is not loaded: {e}{way_out if isinstance(e, UnsafePickleError) else ""}') from e
    except Exception as e:
        kind = 'safetensors file' if path.suffix == '.safetensors' else 'PyTorch checkpoint'
        raise UserError(f'{path} is not a {kind} ({_in_words(e)})') from e


@contextmanager
def _checked(path: Path, allow_pickle: bool = False) -> Iterator[BinaryIO]:
    """A file of torch.save, looked through: the very file that is to be read, as a run may replace it at any time."""
    # train.py puts its arguments into the checkpoint
    with path.open('rb') as file, torch.serialization.safe_globals([argparse.Namespace]):
        check_records(file)
        if not allow_pickle:
            check_pickles(file)
        yield file


def read_file(path: Path, allow_pickle: bool) -> Tuple[Any, Mapping[str, str]]:
    """What a file of weights holds, on the CPU.

    Args:
        path: The file.
        allow_pickle: Run the code that it holds.

    Returns:
        What it holds, and the metadata beside it.

    Raises:
        UserError: If it is damaged, or holds more than weights and plain data.
        OSError: If it cannot be read.
    """
    with _refusals(path, ALLOW_PICKLE):
        if path.suffix == '.safetensors':
            with safetensors.safe_open(path, 'pt') as opened:
                content, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}
            check_sum(path, metadata)
            return content, metadata
        with _checked(path, allow_pickle) as file:
            return torch.load(file, map_location='cpu', weights_only=not allow_pickle), {}


def check_file(path: Path) -> None:
    """Refuse a file of weights that is damaged, as far as its own sums tell, or more than weights and plain data.

    Args:
        path: The file; a kind that timm does not read with torch passes.

    Raises:
        UserError: If it is refused.
        OSError: If it cannot be read.
    """
    with _refusals(path):
        if path.suffix == '.safetensors':
            with safetensors.safe_open(path, 'pt') as opened:
                metadata = opened.metadata() or {}
            check_sum(path, metadata)
        elif path.suffix not in ('.npz', '.npy'):
            with _checked(path):
                pass
