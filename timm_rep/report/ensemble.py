"""What the time steps of one run give together: the average of their outputs, and the average of their weights.

Every time step ends with the learning rate at its lowest, in a minimum of its own, so a run of annealing leaves an
ensemble at no extra training cost.

Source: `Snapshot Ensembles: Train 1, Get M for Free` (ICLR 2017), and, for the weights, `Averaging Weights Leads to
Wider Optima and Better Generalization` (SWA, UAI 2018).
"""
import itertools
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, IterableDataset, Subset

from ..io.checkpoint import read_checkpoint
from ..io.folders import check_classes, class_indices
from ..io.output import new_output
from ..io.weights import load, save_weights
from .images import Score, as_device, evaluate, open_images, with_progress

__all__ = ['EnsembleResult', 'average_outputs', 'evaluate_snapshots', 'find_snapshots']

_logger = logging.getLogger(__name__)

BN_IMAGES = 2048
BATCH_SIZE = 128  # if the run does not say

PathLike = Union[str, Path]


@dataclass(frozen=True)
class EnsembleResult:
    """What the snapshots of a run reach, alone and together.

    Attributes:
        snapshots: One score for each time step, in order.
        outputs: Score of the mean of their probabilities.
        weights: Score of the mean of their weights, with batch norms re-estimated.
        images: Number of held-out images.
        bn_images: Number of training images that the batch norms were re-estimated on.
    """

    snapshots: List[Score]
    outputs: Score
    weights: Score
    images: int
    bn_images: int


def find_snapshots(run_dir: PathLike, *, use_ema: bool = False) -> List[Tuple[int, Path]]:
    """Find the snapshots in stock form, ``time_step-N-stock.safetensors``, N from 1, in the folder of a run.

    Args:
        run_dir: The folder.
        use_ema: Take those of the averaged weights, ``time_step-N-ema-stock.safetensors``.

    Returns:
        Time step and file, in order.

    Raises:
        FileNotFoundError: If there is no such folder, or it has no snapshots.
    """
    name = f'time_step-N{"-ema" if use_ema else ""}-stock.safetensors'
    pattern = re.escape(name).replace('N', r'(\d+)')
    matches = ((re.fullmatch(pattern, path.name), path) for path in Path(run_dir).iterdir())
    found = sorted((int(match[1]), path) for match, path in matches if match)
    if not found:
        raise FileNotFoundError(f'{run_dir} has no snapshots of time steps, {name}')
    return found


def average_outputs(logits: Sequence[Tensor]) -> Tensor:
    """Logarithm of the mean of several models' probabilities.

    Args:
        logits: Outputs ``(n, c)`` of each model for ``n`` images and ``c`` classes.

    Returns:
        ``(n, c)``; its exponentials are the mean of the softmax outputs.
    """
    return torch.stack([F.log_softmax(output, dim=1) for output in logits]).logsumexp(dim=0) - math.log(len(logits))


def _some_images(loader: Any, images: int, batch_size: int) -> Tuple[Iterable[Any], int]:
    """Whole batches of about so many images of a loader's dataset, drawn at random but always the same."""
    if isinstance(loader.dataset, IterableDataset):
        batches = -(-images // batch_size)
        return itertools.islice(loader, batches), batches * batch_size
    # all batches weigh the same in the statistics, so they have to be of one size
    images = min(images, len(loader.dataset))
    images = images // batch_size * batch_size or images
    chosen = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(0))[:images].tolist()
    return DataLoader(Subset(loader.dataset, chosen), batch_size=batch_size, num_workers=loader.num_workers), images


def evaluate_snapshots(
        run_dir: PathLike,
        data_dir: PathLike,
        *,
        val_split: Optional[str] = None,
        train_split: Optional[str] = None,
        batch_size: Optional[int] = None,
        workers: Optional[int] = None,
        device: Optional[Union[str, torch.device]] = None,
        bn_images: int = BN_IMAGES,
        use_ema: bool = False,
        output: Optional[PathLike] = None,
        progress: bool = False,
) -> EnsembleResult:
    """Evaluate the snapshots of a run's time steps, the average of their outputs and the average of their weights.

    Image size, normalisation, crop, classes and the kind of data set are those of the run, from its args.yaml. The
    batch norms of the averaged weights are re-estimated on training images, prepared like those to evaluate on, without
    augmentation.

    Args:
        run_dir: Folder with ``time_step-N-stock.safetensors`` and the args.yaml of the run.
        data_dir: The images, as timm's train.py takes them.
        val_split: Split to evaluate on; by default the run's.
        train_split: Split to re-estimate batch norms on; by default the run's.
        batch_size: Images a batch; by default the run's.
        workers: Processes that load images; by default as many as in the run.
        device: Where to compute; by default on the GPU if there is one.
        bn_images: How many images to re-estimate batch norms on, rounded down to whole batches; at least 2.
        use_ema: Take the snapshots of the averaged weights.
        output: New ``.safetensors`` or ``.pth`` file for the average of the weights, stock form.
        progress: Show progress bars.

    Returns:
        The scores.

    Raises:
        FileExistsError: If the output exists. Nothing is evaluated then.
        FileNotFoundError: If there is no such folder, or no snapshots in it.
        UserError: If the snapshots are not all of the run's model, or there are no images, no such split or device, or
            the splits number the same class differently.
    """
    if output is not None:
        output = new_output(output)
    device = as_device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    snapshots = find_snapshots(run_dir, use_ema=use_ema)
    args = read_checkpoint(snapshots[0][1]).args
    models: List[Any] = [load(path).to(device, torch.float32) for _, path in snapshots]
    average = AveragedModel(models[0]).eval()
    for model in models:
        average.update_parameters(model)

    batch_size = batch_size or args.get('validation_batch_size') or args.get('batch_size') or BATCH_SIZE
    workers = args.get('workers') or 0 if workers is None else workers
    val_split = val_split or args.get('val_split') or 'validation'
    train_split = train_split or args.get('train_split') or 'train'
    val_loader, train_loader = (
        open_images(
            Path(data_dir), split, models[0], batch_size=batch_size, workers=workers, device=device,
            dataset=args.get('dataset') or '', class_map=args.get('class_map'), img_mode=args.get('input_img_mode'),
            input_key=args.get('input_key'), target_key=args.get('target_key'), is_training=training)
        for split, training in ((val_split, False), (train_split, True))
    )
    trained, classes = class_indices(train_loader.dataset), class_indices(val_loader.dataset)
    check_classes(trained, classes, train_split, val_split)
    if 0 < len(classes) < models[0].num_classes:
        _logger.warning(
            '%s holds images of %d classes, the model knows %d: they are taken for its first ones',
            data_dir, len(classes), models[0].num_classes)
    train_batches, bn_images = _some_images(train_loader, bn_images, batch_size)
    update_bn(with_progress(train_batches, 'batch norms', progress), average, device)

    def forward(images: Tensor) -> List[Tensor]:
        logits = [model(images).float() for model in models]
        return [*logits, average_outputs(logits), average(images)]

    names = [*(f'time step {number}' for number, _ in snapshots), 'average of outputs', 'average of weights']
    scores, images = evaluate(forward, names, val_loader, device, progress)
    if output is not None:
        save_weights(average.module, output)
    return EnsembleResult(scores[:-2], scores[-2], scores[-1], images, bn_images)
