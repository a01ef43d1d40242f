"""Folders of images, of which timm takes what it finds without a word."""
from pathlib import Path

from ..core.errors import UserError
from ..models.checkpoint_filter import first_names

__all__ = ['check_folder', 'no_split']


def check_folder(folder: Path) -> None:
    """Refuse a folder of images that is not there, which timm does without a word.

    Raises:
        UserError: If there is none.
    """
    if not folder.exists():
        raise UserError(f'there is no folder of images {folder}')


def no_split(folder: Path, split: str) -> UserError:
    """What to say of a folder in which timm finds no split of a name, and takes all images that it holds."""
    there = [path.name for path in sorted(folder.iterdir()) if path.is_dir()] or ['none']
    return UserError(f'{folder} has no split {split!r}; give the name of a split, there is {first_names(there)}')
