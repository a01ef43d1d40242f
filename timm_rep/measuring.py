"""What the two forms of a model cost, and what they make of real images."""
import platform
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.data import create_dataset, create_loader, resolve_data_config
from torch.utils.flop_counter import FlopCounterMode

from .surgery import image_channels
from .verification import DEFAULT_RTOL, VerificationError, compare_outputs

__all__ = ['Costs', 'ImageCheck', 'compare_on_images', 'hardware_name', 'images_per_second', 'measure_costs']

TIMING_ROUNDS = 7
TIMING_BATCH = 8
IMAGE_BATCH = 32
TOP_K = 5


@dataclass(frozen=True)
class Costs:
    """Costs of the training form and of the stock form, each in this order.

    Attributes:
        parameters: Number of parameters.
        gmacs: Billions of multiply-adds of convolutions and matrix products for one image, in eval mode.
        images_per_second: In eval mode, median of several rounds.
        batch: Images in a batch of the timing.
        hardware: What it was timed on.
        torch: Version of torch.
    """

    parameters: Tuple[int, int]
    gmacs: Tuple[float, float]
    images_per_second: Tuple[float, float]
    batch: int
    hardware: str
    torch: str


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
    """

    images: int
    complete: bool
    top1: Tuple[float, float]
    top5: Optional[Tuple[float, float]]
    relative: float
    classes: Tuple[str, ...]


def hardware_name(device: Union[str, torch.device] = 'cpu') -> str:
    """Name of what a device is, for a statement of speed.

    Args:
        device: The device.

    Returns:
        Name of the GPU; or of the processor, with the number of threads that torch uses.
    """
    device = torch.device(device)
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type != 'cpu':
        return device.type
    name = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.is_file():
        lines = (line.partition(':') for line in info.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == 'model name'), name)
    threads = torch.get_num_threads()
    return f'{name}, {threads} thread{"s" if threads != 1 else ""}'


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32: it alone makes a difference of 1e-3."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@torch.inference_mode()
def images_per_second(models: Sequence[nn.Module], images: torch.Tensor, rounds: int = TIMING_ROUNDS) -> List[float]:
    """Median throughput of each model, in turns, so that a busy machine hits all alike.

    Args:
        models: Models in eval mode.
        images: One batch, on the models' device.
        rounds: How often each model runs; once more before that to warm up.

    Returns:
        Images per second of each.
    """
    def run(model: nn.Module) -> float:
        start = time.perf_counter()
        model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - start

    for model in models:
        run(model)
    seconds = [[run(model) for model in models] for _ in range(rounds)]
    return [len(images) / median(measured) for measured in zip(*seconds)]


@torch.inference_mode()
def _gmacs(model: nn.Module, image: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() / 2e9


def measure_costs(
        model: nn.Module,
        fused: nn.Module,
        input_size: Sequence[int],
        *,
        batch: int = TIMING_BATCH,
        device: Union[str, torch.device] = 'cpu',
) -> Costs:
    """Measure what both forms of a model cost.

    Args:
        model: Training form, in eval mode; moved to the device.
        fused: Stock form, in eval mode; moved to the device.
        input_size: Channels, height and width of an image.
        batch: Images in a batch of the timing.
        device: Where to time.

    Returns:
        The costs.
    """
    forms = [form.to(device) for form in (model, fused)]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *input_size, generator=generator).to(device, next(fused.parameters()).dtype)
    parameters, gmacs = zip(*((sum(p.numel() for p in form.parameters()), _gmacs(form, images[:1])) for form in forms))
    speeds = images_per_second(forms, images)
    return Costs(
        (parameters[0], parameters[1]), (gmacs[0], gmacs[1]), (speeds[0], speeds[1]), batch, hardware_name(device),
        torch.__version__)


def _correct(outputs: torch.Tensor, targets: torch.Tensor, k: int) -> int:
    return int((outputs.topk(k, dim=1).indices == targets[:, None]).any(dim=1).sum())


def compare_on_images(
        model: Any,
        fused: nn.Module,
        folder: Union[str, Path],
        *,
        split: str = 'validation',
        max_images: Optional[int] = None,
        device: Union[str, torch.device] = 'cpu',
        progress: bool = False,
) -> ImageCheck:
    """Run both forms of a model on a folder of images, with the model's own input settings.

    Args:
        model: Training form, in eval mode; moved to the device.
        fused: Stock form, in eval mode; moved to the device.
        folder: Folder with one folder of images for each class, or one that holds such a folder for the split.
        split: Name of that split.
        max_images: Take the first so many of a fixed shuffle instead of all.
        device: Where to run.
        progress: Show a progress bar.

    Returns:
        What was found.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the images are not of as many classes as the model knows.
        VerificationError: If the outputs differ by more than the tolerance, or are not finite.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'no folder of images at {folder}')
    try:
        mode = 'L' if image_channels(model) == 1 else 'RGB'
        dataset = create_dataset('', root=str(folder), split=split, input_img_mode=mode)
    except RuntimeError as e:
        raise ValueError(f'{folder} holds no images that timm reads: {e}') from None
    classes = sorted(dataset.reader.class_to_idx, key=dataset.reader.class_to_idx.get)
    if len(classes) != model.num_classes:
        raise ValueError(
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
    with torch.inference_mode(), _full_precision():
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
    return ImageCheck(count, count == found, top1, top5 if top_k else None, relative, tuple(classes))
