"""Folders of images, of which timm takes what it finds without a word."""
import numbers
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from ..core.errors import UserError
from ..models.checkpoint_filter import first_names

__all__ = ['check_classes', 'check_folder', 'class_indices', 'is_folder', 'no_split', 'number_of_classes']

READERS = ('hfds', 'hfids', 'tfds', 'torch', 'wds')  # of timm; what has none of these before its name is a folder


def is_folder(dataset: Optional[str]) -> bool:
    """Whether timm reads a data set of this name from a folder of images by classes, or an archive of such."""
    reader, separator, name = (dataset or '').lower().partition('/')
    if separator and reader == 'torch':
        return name.rpartition('/')[2] in ('folder', 'image_folder')
    return not separator or reader not in READERS


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


def class_indices(images: Any) -> Dict[str, int]:
    """The number of each class by its name, as timm counts the folders that it finds.

    Args:
        images: Data set of timm.

    Returns:
        Numbers by names; none if the data set does not name its classes.
    """
    reader = getattr(images, 'reader', images)  # torchvision's have none
    indices: Any = getattr(reader, 'class_to_idx', getattr(reader, 'class_name_to_idx', None))  # the latter of archives
    named = isinstance(indices, dict) and all(isinstance(index, int) for index in indices.values())
    return dict(indices) if named else {}


def number_of_classes(images: Any) -> int:
    """How many outputs a model needs for a data set that names its classes; a class map may name more than it holds.

    Args:
        images: Data set of timm.

    Returns:
        One more than the largest number of a class that has images, or of all if it does not say which have; zero if it
        names none.
    """
    indices = class_indices(images)
    if not indices:
        return 0
    reader = getattr(images, 'reader', images)
    targets = getattr(reader, 'targets', None)
    if targets is None:
        targets = [target for _, target, *_ in getattr(reader, 'samples', ())]
    listed = targets.tolist() if hasattr(targets, 'tolist') else targets  # a tensor, of torchvision's MNIST
    counted = [int(target) for target in listed if isinstance(target, numbers.Integral)]
    return max(counted or indices.values()) + 1


def check_classes(trained: Mapping[str, int], other: Mapping[str, int], trained_split: str, split: str) -> None:
    """Refuse a split whose classes are not those that were trained on by the same numbers.

    Args:
        trained: Numbers of the classes trained on, by their names; none if the data set does not name them.
        other: The same of another split, which may lack classes.
        trained_split: Name of the former.
        split: Name of the latter.

    Raises:
        UserError: If one has another number, or none.
    """
    for name, index in other.items():
        if trained and trained.get(name) != index:
            theirs = f'class {trained[name]} there' if name in trained else 'not there'
            raise UserError(
                f'the split {split!r} has other classes than {trained_split!r}: {name!r} is class {index} of it, and '
                f"{theirs}, so that no accuracy would be right; for timm's reader --class-map FILE gives both the same")
