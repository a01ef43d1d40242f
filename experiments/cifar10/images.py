"""The images of CIFAR-10 as tensors: decoded once, cropped and mirrored in batches on the device."""
import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

CROP_PADDING = 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Images(NamedTuple):
    """Images of one split, uint8 ``(n, height, width, 3)``, padded at the border if they are to be cropped."""

    pixels: torch.Tensor
    targets: torch.Tensor

    def to(self, device):
        return Images(self.pixels.to(device), self.targets.to(device))


def read_split(folder, classes, limit):
    """Decode the images of a split, or the same number of every class, always the same ones, that add up to a limit."""
    if limit is not None and (limit < len(classes) or limit % len(classes)):
        raise ValueError(f'{limit} images of {folder.name} cannot be the same number of each of {len(classes)} classes')
    generator = torch.Generator().manual_seed(0)
    files, targets = [], []
    for target, name in enumerate(classes):
        found = sorted(path for path in (folder / name).iterdir() if path.is_file())
        if limit is not None:
            if len(found) < limit // len(classes):
                raise ValueError(f'{folder / name} has {len(found)} images, {limit // len(classes)} are asked for')
            order = torch.randperm(len(found), generator=generator)[:limit // len(classes)]
            found = [found[i] for i in sorted(order.tolist())]
        files += found
        targets += [target] * len(found)
    with ThreadPoolExecutor(min(os.cpu_count(), 16)) as pool:
        pixels = list(pool.map(lambda path: np.asarray(Image.open(path).convert('RGB')), files))
    return Images(torch.from_numpy(np.stack(pixels)), torch.tensor(targets))


def read_data(data, images=None, test_images=None):
    """Both splits, that for training padded to be cropped, and a description that tells other data from these."""
    classes = sorted(path.name for path in (data / 'train').iterdir() if path.is_dir())
    train = read_split(data / 'train', classes, images)
    test = read_split(data / 'test', classes, test_images)
    digest = hashlib.sha256()
    for split in (train, test):
        digest.update(split.pixels.numpy().tobytes())
        digest.update(split.targets.numpy().tobytes())
    description = dict(
        classes=len(classes), train=len(train.targets), test=len(test.targets), sha256=digest.hexdigest()[:16])
    padding = (0, 0, CROP_PADDING, CROP_PADDING, CROP_PADDING, CROP_PADDING)
    return train._replace(pixels=F.pad(train.pixels, padding)), test, description


@functools.lru_cache
def mean_and_std(device):
    return [torch.tensor(values, device=device) * 255 for values in (MEAN, STD)]


def normalized(pixels, channels_last):
    """Network input ``(n, 3, height, width)`` of uint8 pixels ``(n, height, width, 3)``."""
    mean, std = mean_and_std(pixels.device)
    x = ((pixels.float() - mean) / std).permute(0, 3, 1, 2)
    return x if channels_last else x.contiguous()


def train_batches(images, batch_size, generator, channels_last):
    """One epoch in random order, each image shifted by up to the padding and mirrored or not; the rest is dropped."""
    device, (height, width) = images.pixels.device, images.pixels.shape[1:3]
    height, width = height - 2 * CROP_PADDING, width - 2 * CROP_PADDING
    # Drawn on the CPU, once for an epoch: the same on every device, and no wait in the loop.
    count = len(images.targets)
    order = torch.randperm(count, generator=generator).to(device)
    top, left = torch.randint(2 * CROP_PADDING + 1, (2, count, 1), generator=generator).to(device)
    mirrored = (torch.rand(count, 1, generator=generator) < 0.5).to(device)
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    columns = left + torch.where(mirrored, columns.flip(0), columns)
    for start in range(0, count - batch_size + 1, batch_size):
        part = slice(start, start + batch_size)
        chosen = order[part]
        pixels = images.pixels[chosen[:, None, None], rows[part, :, None], columns[part, None, :]]
        yield normalized(pixels, channels_last), images.targets[chosen]
