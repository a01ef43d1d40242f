"""CIFAR-10 as tensors: decoded once, kept beside the folder, cropped and mirrored a whole batch at a time."""
import functools
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

CROP_PADDING = 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Images(NamedTuple):
    """Images of one split, uint8 ``(n, height, width, 3)``."""

    pixels: torch.Tensor
    targets: torch.Tensor

    def to(self, device):
        return Images(self.pixels.to(device), self.targets.to(device))

    def __getitem__(self, chosen):
        return Images(self.pixels[chosen], self.targets[chosen])


def decode(folder):
    """Arrays of both splits of a folder with `train/CLASS/*` and `test/CLASS/*`."""
    arrays = {}
    for split in ('train', 'test'):
        classes = sorted(path for path in (folder / split).iterdir() if path.is_dir())
        files = [sorted(path for path in of_class.iterdir() if path.is_file()) for of_class in classes]
        with ThreadPoolExecutor(min(os.cpu_count(), 16)) as pool:
            pixels = list(pool.map(lambda path: np.asarray(Image.open(path).convert('RGB')), chain(*files)))
        arrays[f'{split}_pixels'] = np.stack(pixels)
        arrays[f'{split}_targets'] = np.repeat(np.arange(len(classes)), [len(found) for found in files])
    return arrays


def read_data(folder):
    """Both splits, and a description that tells other data from these; decoded images are kept in FOLDER-uint8.npz."""
    cache = folder.with_name(f'{folder.name}-uint8.npz')
    if cache.exists():
        with np.load(cache) as found:
            arrays = dict(found)
    else:
        arrays = decode(folder)
        temporary = cache.with_name(f'.{os.getpid()}-{cache.name}')
        np.savez(temporary, **arrays)
        temporary.replace(cache)
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(array.tobytes())
    train, test = (
        Images(torch.from_numpy(arrays[f'{split}_pixels']), torch.from_numpy(arrays[f'{split}_targets']))
        for split in ('train', 'test'))
    description = dict(
        train=len(train.targets), test=len(test.targets), classes=int(train.targets.max()) + 1,
        sha256=digest.hexdigest()[:16])
    return train, test, description


def set_aside(images, count, batch_size):
    """Split off images for the choice of learning rates, always the same ones: the rest, and those."""
    if len(images.targets) < count + batch_size:
        sys.exit(f'error: {count} of {len(images.targets)} training images set aside leave no batch of {batch_size}')
    order = torch.randperm(len(images.targets), generator=torch.Generator().manual_seed(0))
    return images[order[count:].sort().values], images[order[:count].sort().values]


@functools.lru_cache
def scale_and_shift(device, pixels):
    """What normalises the flat values of an image; several times as fast as by channel."""
    mean, std = (255 * torch.tensor(values) for values in (MEAN, STD))
    return (1 / std).repeat(pixels).to(device), (-mean / std).repeat(pixels).to(device)


def normalized(pixels):
    """Network input ``(n, 3, height, width)``, channels last in memory, of uint8 pixels ``(n, height, width, 3)``."""
    scale, shift = scale_and_shift(pixels.device, pixels.shape[1] * pixels.shape[2])
    return torch.addcmul(shift, pixels.flatten(1).float(), scale).view(pixels.shape).permute(0, 3, 1, 2)


def padded(images):
    """Images with a black border for :func:`train_batches` to crop."""
    padding = (0, 0, CROP_PADDING, CROP_PADDING, CROP_PADDING, CROP_PADDING)
    return images._replace(pixels=F.pad(images.pixels, padding))


def train_batches(images, batch_size, generator):
    """An epoch of padded images in random order, shifted by up to the padding, mirrored or not; the rest is dropped."""
    pixels, count = images.pixels, len(images.targets)
    height, width = (size - 2 * CROP_PADDING for size in pixels.shape[1:3])
    offsets = 2 * CROP_PADDING + 1
    # All crops of all images, seen in place.
    crops = pixels.as_strided(
        (count, offsets, offsets, height, width, 3), (*pixels.stride()[:3], *pixels.stride()[1:]))
    # Drawn on the CPU, once for an epoch: the same on every device, and no wait in the loop.
    order = torch.randperm(count, generator=generator).to(pixels.device)
    top, left = torch.randint(offsets, (2, count), generator=generator).to(pixels.device)
    mirrored = (torch.rand(count, 1, 1, 1, generator=generator) < 0.5).to(pixels.device)
    for start in range(0, count - batch_size + 1, batch_size):
        part = slice(start, start + batch_size)
        x = crops[order[part], top[part], left[part]]
        yield normalized(torch.where(mirrored[part], x.flip(2), x)), images.targets[order[part]]
