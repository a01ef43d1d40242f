"""What the two forms of a model make of real images."""
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Optional, Pattern, Tuple, Union

import torch
import torch.nn as nn
from timm.data import create_dataset, create_loader, resolve_data_config

from ..core.errors import UserError
from ..core.precision import full_float32
from ..core.verify import DEFAULT_RTOL, VerificationError, compare_outputs
from ..core.walk import image_channels

__all__ = ['ImageCheck', 'compare_on_images']

IMAGE_BATCH = 32
TOP_K = 5


@dataclass(frozen=True)
class ImageCheck:
    """Training form and fused model on the same real images.

    Attributes:
        images: How many.
        complete: Whether that is all that the folder holds.
        top1: Accuracy in percent of the training form and of the fused model.
        top5: The same for the first five answers; None with fewer than six classes.
        relative: Largest difference of the outputs, relative to the largest output of its batch.
        classes: Names of the classes, in the order of the classifier.
        source: Which images, in words without the name of any folder but the split's.
    """

    images: int
    complete: bool
    top1: Tuple[float, float]
    top5: Optional[Tuple[float, float]]
    relative: float
    classes: Tuple[str, ...]
    source: str


def _correct(outputs: torch.Tensor, targets: torch.Tensor, k: int) -> int:
    return int((outputs.topk(k, dim=1).indices == targets[:, None]).any(dim=1).sum())


def _word_in_name(words: str) -> Pattern[str]:
    return re.compile(rf'(?<![a-z])(?:{words})(?![a-z])', re.IGNORECASE)


TRAIN_NAME = _word_in_name('train|training')
SPLIT_NAME = _word_in_name('train|training|val|valid|validation|eval|evaluation|test|testing|dev')


def _check_split(folder: Path, found: Path, split: str) -> str:
    """Raise a UserError if timm took the images of several splits, or those of a training split unasked.

    Args:
        folder: Folder that was given.
        found: Folder whose images timm took: that of the split, or the one that was given.
        split: Name of the split.

    Returns:
        What images they are, in words.
    """
    if found == folder:
        splits = sorted(
            path.name for path in folder.iterdir()
            if SPLIT_NAME.search(path.name) and path.is_dir() and any(inner.is_dir() for inner in path.iterdir()))
        if splits:
            raise UserError(
                f'{folder} has no split {split!r} but {", ".join(splits)}; give one of them as split (--split)')
    name = found.name
    if TRAIN_NAME.search(name) and not TRAIN_NAME.search(split):
        raise UserError(
            f'{found} are training images by its name, on which no accuracy is that of the model; give the folder of '
            f'others, or split={name!r} (--split {name}) if that is what you want'
        )
    return f'the split `{name}`' if found != folder or SPLIT_NAME.fullmatch(name) else 'a folder without splits'


def compare_on_images(
        model: Any,
        fused: nn.Module,
        folder: Union[str, Path],
        *,
        split: str = 'validation',
        class_map: Optional[str] = None,
        max_images: Optional[int] = None,
        device: Union[str, torch.device] = 'cpu',
        progress: bool = False,
) -> ImageCheck:
    """Run both forms of a model on a folder of images, with the model's own input settings.

    Args:
        model: Training form, in eval mode; moved to the device.
        fused: Stock form, in eval mode; moved to the device.
        folder: Folder with one folder of images for each class, or one that holds such a folder for the split.
        split: Name of that split, or what timm takes for the same (``val``, ``validation`` ...).
        class_map: Text file with the names of the classes in order, if they are not in that of their names.
        max_images: Take the first so many of a fixed shuffle instead of all.
        device: Where to run.
        progress: Show a progress bar.

    Returns:
        What was found.

    Raises:
        FileNotFoundError: If there is no such folder or class map.
        UserError: If the images are not of as many classes as the model knows, none are to be taken, or the folder
            holds other splits than the one asked for.
        VerificationError: If the outputs differ by more than the tolerance, or are not finite.
    """
    if max_images is not None and max_images < 1:
        raise UserError(f'max_images must be at least 1, got {max_images}')
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f'no folder of images at {folder}')
    if class_map and not class_map.lower().endswith('.txt'):  # older timm unpickles others without a check
        raise UserError(f'no images can be compared for a run whose class map is not a text file, got {class_map}')
    try:
        mode = 'L' if image_channels(model) == 1 else 'RGB'
        reading: Any = dict(class_map=class_map or '', input_img_mode=mode)
        dataset = create_dataset('', root=str(folder), split=split, **reading)
    except RuntimeError as e:
        raise UserError(f'{folder} holds no images that timm reads: {e}') from None
    except AssertionError:
        raise FileNotFoundError(
            f'the run took its classes from the class map {class_map}, which is not there: without it no images can be '
            'compared'
        ) from None
    source = _check_split(folder, Path(dataset.reader.root), split)
    index_of = dataset.reader.class_to_idx
    classes = sorted(index_of, key=index_of.get)
    if len(classes) != model.num_classes:
        raise UserError(
            f'{folder} holds images of {len(classes)} classes, the model knows {model.num_classes}; give the folder '
            'with one folder for each class'
        )
    found = len(dataset)
    count = found if max_images is None else min(max_images, found)
    order = torch.randperm(found, generator=torch.Generator().manual_seed(0)).tolist()
    samples = dataset.reader.samples
    dataset.reader.samples = [samples[index] for index in sorted(order[:count])]
    loader: Iterable[Any] = create_loader(
        dataset,
        batch_size=IMAGE_BATCH,
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=False,
        device=torch.device(device),
        **resolve_data_config(model=model),
    )
    if progress:
        from tqdm import tqdm  # comes with huggingface_hub
        loader = tqdm(loader, desc='images', unit='batch', leave=False)

    top_k = TOP_K if model.num_classes > TOP_K else None
    model, fused = model.to(device), fused.to(device)
    correct = [[0, 0], [0, 0]]
    relative, rtol = 0.0, DEFAULT_RTOL[next(model.parameters()).dtype]
    with torch.inference_mode(), full_float32():
        for images, targets in loader:
            images, targets = images.to(device), targets.to(device)
            outputs = model(images), fused(images)
            try:
                relative = max(relative, compare_outputs('', *outputs, rtol).relative)
            except VerificationError as e:
                raise VerificationError(f'on the images of {folder}, {e}') from None
            for output, counts in zip(outputs, correct):
                counts[0] += _correct(output, targets, 1)
                counts[1] += _correct(output, targets, top_k) if top_k else 0
    top1, top5 = ((100 * correct[0][k] / count, 100 * correct[1][k] / count) for k in (0, 1))
    return ImageCheck(count, count == found, top1, top5 if top_k else None, relative, tuple(classes), source)
