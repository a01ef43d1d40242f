"""What models make of real images: one way to open them, one loop over them, and both forms of a model compared."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import create_dataset, create_loader
from torch import Tensor

from ..core.errors import UserError
from ..core.precision import full_float32
from ..core.verify import DEFAULT_RTOL, VerificationError, compare_outputs
from ..core.walk import image_channels
from ..io.architecture import input_settings
from ..io.folders import check_folder, is_folder, no_split, number_of_classes

__all__ = [
    'ImageCheck', 'Score', 'as_device', 'compare_on_images', 'evaluate', 'open_images', 'with_progress',
]

IMAGE_BATCH = 32
TOP_K = 5

PathLike = Union[str, Path]


@dataclass(frozen=True)
class Score:
    """Figures of one model, or of several together.

    Attributes:
        name: What was evaluated.
        top1: Accuracy in percent.
        top5: Share of images with the true class among the five likeliest, in percent.
        loss: Mean cross entropy, in nats.
    """

    name: str
    top1: float
    top5: float
    loss: float


@dataclass(frozen=True)
class ImageCheck:
    """Training form and fused model on the same real images.

    Attributes:
        images: How many.
        complete: Whether that is all that the folder holds.
        top1: Accuracy in percent of the training form and of the fused model.
        top5: The same for the first five answers; None with fewer than six classes.
        relative: Largest difference of the outputs, relative to the largest output of its batch.
        classes: Names of the classes, in the order of the classifier; those that a class map makes one in one name.
        source: Which images: the name of the split, or of the folder if it has no splits; no other folder's.
    """

    images: int
    complete: bool
    top1: Tuple[float, float]
    top5: Optional[Tuple[float, float]]
    relative: float
    classes: Tuple[str, ...]
    source: str


def as_device(device: Union[str, torch.device]) -> torch.device:
    """The device of a name.

    Args:
        device: Name, or the device.

    Returns:
        The device.

    Raises:
        UserError: If torch cannot compute there.
    """
    try:
        found = torch.zeros(1, device=device)
        found.item()  # which the meta device has not
        return found.device
    except (RuntimeError, AssertionError) as e:  # the latter where torch is built without CUDA
        raise UserError(f'device {str(device)!r} cannot be used: {str(e).splitlines()[0]}') from None


def with_progress(batches: Iterable[Any], label: str, progress: bool) -> Iterable[Any]:
    """The batches, behind a progress bar if one is asked for and somebody watches."""
    from tqdm import tqdm  # comes with huggingface_hub; of use here only

    return tqdm(batches, desc=label, unit='batch', leave=False, disable=None if progress else True)


def open_images(
        folder: Path,
        split: str,
        model: Any,
        *,
        batch_size: int,
        workers: int = 0,
        device: torch.device,
        dataset: str = '',
        class_map: Union[str, Mapping[str, int], None] = None,
        img_mode: Optional[str] = None,
        splits_only: bool = True,
        **kwargs: Any,
) -> Any:
    """Open images as timm does, prepared for a model's evaluation; but never those of several splits as one.

    Args:
        folder: Folder, or whatever timm takes for it.
        split: Name of the split, or what timm takes for the same (``val``, ``validation`` ...).
        model: Model with a ``pretrained_cfg``.
        batch_size: Images in a batch.
        workers: Processes that load them.
        device: Where they will be needed.
        dataset: Kind and name of the data set, as timm takes them; by default a folder with one for each class.
        class_map: Text file with the names of the classes in order, or their numbers by name, if they are not in the
            order of their names.
        img_mode: Mode of PIL; by default what the model's channels ask for.
        splits_only: Whether a folder without splits is refused.
        **kwargs: Of ``timm.data.create_dataset``.

    Returns:
        timm's loader.

    Raises:
        UserError: If there are no images, no such split or class map, or more classes than the model knows.
    """
    if isinstance(class_map, str) and class_map and not class_map.lower().endswith('.txt'):
        # older timm unpickles them without a check
        raise UserError(f'no images can be read for a run whose class map is not a text file, got {class_map}')
    kwargs.update(class_map=class_map or '', input_img_mode=img_mode or ('L' if image_channels(model) == 1 else 'RGB'))
    if is_folder(dataset):
        check_folder(folder)
        if not folder.is_dir():
            raise UserError(f'{folder} is a file; images are taken from a folder with one folder for each class')
    try:
        images: Any = create_dataset(dataset, root=str(folder), split=split, batch_size=batch_size, **kwargs)
    except (RuntimeError, ValueError, ImportError, AssertionError) as e:  # the last for a class map that is not there
        raise UserError(f'{folder} holds no images that timm reads{f": {e}" if str(e) else ""}') from None
    reader: Any = getattr(images, 'reader', images)  # torchvision's data sets are their own
    if is_folder(dataset) and Path(reader.root) == folder:  # timm takes all of it where it finds no split of that name
        depth = len(folder.parts) + 2  # of images in folders of classes
        if splits_only or any(len(Path(path).parts) > depth for path, _ in reader.samples):
            raise no_split(folder, split)
    classes = number_of_classes(images)
    if classes > model.num_classes:
        raise UserError(f'{folder} holds images of {classes} classes, the model knows {model.num_classes}')
    return create_loader(
        images, batch_size=batch_size, num_workers=workers, persistent_workers=False, use_prefetcher=False,
        device=device, **input_settings(model))


@torch.inference_mode()
def evaluate(
        forward: Callable[[Tensor], Sequence[Tensor]],
        names: Sequence[str],
        batches: Iterable[Any],
        device: torch.device,
        progress: bool = False,
) -> Tuple[List[Score], int]:
    """Run through images once, and score all that is made of them.

    Args:
        forward: Gives outputs ``(n, c)``, one for each name, for images ``(n, ...)``.
        names: What is evaluated.
        batches: Images and their classes ``(n)``.
        device: Where to compute.
        progress: Show a progress bar.

    Returns:
        The scores, and the number of images.

    Raises:
        UserError: If there are no images.
    """
    totals = torch.zeros(len(names), 3, dtype=torch.float64)
    count = 0
    with full_float32():
        for images, targets in with_progress(batches, 'images', progress):
            images, targets = images.to(device), targets.to(device)
            for total, output in zip(totals, forward(images)):
                found = output.topk(min(TOP_K, output.shape[1])).indices == targets[:, None]
                loss = F.cross_entropy(output.float(), targets, reduction='sum')
                total += torch.stack([found[:, 0].sum(), found.sum(), loss]).cpu()
            count += len(targets)
    if not count:
        raise UserError('no images to evaluate on')
    means = (totals / count).tolist()
    return [Score(name, 100 * top1, 100 * top5, loss) for name, (top1, top5, loss) in zip(names, means)], count


def compare_on_images(
        model: Any,
        fused: nn.Module,
        folder: PathLike,
        *,
        split: str = 'validation',
        dataset: str = '',
        class_map: Union[str, Mapping[str, int], None] = None,
        img_mode: Optional[str] = None,
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
        dataset: Name of timm's for folders of images (``torch/folder``), which say in what order the classes are.
        class_map: Text file with the names of the classes in order, or their numbers by name, if they are not in the
            order of their names.
        img_mode: Mode of PIL; by default what the model's channels ask for.
        max_images: Take the first so many of a fixed shuffle instead of all.
        device: Where to run.
        progress: Show a progress bar.

    Returns:
        What was found.

    Raises:
        UserError: If there are no images or no such class map, the images are not of as many classes as the model
            knows, the folder holds other splits than the one asked for, or torch has no such device.
        VerificationError: If the outputs differ by more than the tolerance, or are not finite.
    """
    device, folder = as_device(device), Path(folder).absolute()
    loader = open_images(
        folder, split, model, batch_size=IMAGE_BATCH, device=device, dataset=dataset, class_map=class_map,
        img_mode=img_mode, splits_only=False)
    reader = getattr(loader.dataset, 'reader', loader.dataset)
    index_of, samples, root = reader.class_to_idx, reader.samples, Path(reader.root)
    names: List[List[str]] = [[] for _ in range(model.num_classes)]
    for name, index in index_of.items():
        if index < len(names):
            names[index].append(name)
    if not all(names):
        named = len(set(index_of.values()))
        raise UserError(f'{root} holds images of {named} classes, the model knows {model.num_classes}')
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    reader.samples = [samples[index] for index in sorted(order[:max_images])]
    model, fused = model.to(device), fused.to(device)
    dtype = next(model.parameters()).dtype
    differences, rtol = [], DEFAULT_RTOL[dtype]

    def forward(images: Tensor) -> List[Tensor]:
        expected, actual = model(images.to(dtype)), fused(images.to(dtype))
        differences.append(compare_outputs('', expected, actual, rtol).relative)
        return [expected, actual]

    try:
        scores, count = evaluate(forward, ('training form', 'fused'), loader, device, progress)
    except VerificationError as e:
        raise VerificationError(f'on the images of {folder}, {e}') from None
    return ImageCheck(
        count,
        count == len(samples),
        (scores[0].top1, scores[1].top1),
        (scores[0].top5, scores[1].top5) if model.num_classes > TOP_K else None,
        max(differences),
        tuple(' / '.join(of_class) for of_class in names),
        f'the split `{root.name}`' if root != folder else f'the folder `{folder.name}`',
    )
