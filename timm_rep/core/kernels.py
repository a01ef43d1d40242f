"""Kernel algebra: pure tensor functions on which every rep layer, fusion and test stands.

A convolution kernel is written ``(o, i/g, h, w)``: output channels, input channels per group, height, width. Inner
channels of a sequence are ``t``, groups are ``g``. All functions are differentiable, keep device and dtype, and import
nothing but torch. Even kernels have no centre, so every function that needs one refuses them.

Sources: DBB (CVPR 2021, transforms I to VI), OREPA (CVPR 2022, equations 3 and 4).
"""
import math
from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError

__all__ = [
    'average_kernel', 'fold_norm', 'frequency_prior', 'grouped_identity', 'merge_parallel', 'merge_pointwise_depthwise',
    'merge_sequential', 'merge_sequential_bias', 'pad_to_size', 'unfold_norm',
]


def pad_to_size(kernel: Tensor, size: Tuple[int, int]) -> Tensor:
    """Zero-pad a kernel to a larger odd size so that the centres stay aligned (DBB transform VI).

    Args:
        kernel: ``(o, i/g, h, w)``, both sizes odd.
        size: Target height and width, odd and not smaller than the kernel's.

    Returns:
        ``(o, i/g, *size)``.

    Raises:
        UserError: If a size is even or the kernel is larger than the target.
    """
    height, width = kernel.shape[-2], kernel.shape[-1]
    if height % 2 == 0 or width % 2 == 0 or size[0] % 2 == 0 or size[1] % 2 == 0:
        raise UserError(f'only odd kernels have a centre to align, got {height}x{width} to {size[0]}x{size[1]}')
    if height > size[0] or width > size[1]:
        raise UserError(f'a {height}x{width} kernel does not fit into {size[0]}x{size[1]}')
    pad_h = (size[0] - height) // 2
    pad_w = (size[1] - width) // 2
    return F.pad(kernel, [pad_w, pad_w, pad_h, pad_h])


def merge_parallel(kernels: Sequence[Tensor]) -> Tensor:
    """Kernel of parallel convolutions whose outputs are added (DBB transforms II and VI, OREPA equation 4).

    Args:
        kernels: Kernels ``(o, i/g, h_b, w_b)`` of odd sizes; the smaller ones are centred in the largest.

    Returns:
        ``(o, i/g, max h_b, max w_b)``.

    Raises:
        UserError: If the list is empty or the kernels differ in channels.
    """
    if not kernels:
        raise UserError('merge_parallel needs at least one kernel, got none')
    channels = {tuple(kernel.shape[:2]) for kernel in kernels}
    if len(channels) > 1:
        raise UserError(f'parallel kernels must have the same channels, got {sorted(channels)}')
    size = (max(k.shape[2] for k in kernels), max(k.shape[3] for k in kernels))
    merged = pad_to_size(kernels[0], size)
    for kernel in kernels[1:]:
        merged = merged + pad_to_size(kernel, size)
    return merged


def merge_sequential(first: Tensor, second: Tensor, groups: int = 1) -> Tensor:
    """Kernel of two convolutions in sequence, ``second(first(x))`` (DBB transform III, OREPA equation 3).

    The composition is a true (flipped) convolution of kernels, so it is exact wherever the sequence touches no padding
    between its layers. Both convolutions have the same number of groups, and the first one has stride 1.

    Args:
        first: ``(t, i/g, h1, w1)``.
        second: ``(o, t/g, h2, w2)``.
        groups: Number of groups ``g`` of both convolutions.

    Returns:
        ``(o, i/g, h1 + h2 - 1, w1 + w2 - 1)``.

    Raises:
        UserError: If the inner channels do not match.
    """
    inner, in_per_group, h1, w1 = first.shape
    out_channels, inner_per_group, h2, w2 = second.shape
    if inner != inner_per_group * groups:
        raise UserError(
            f'inner channels do not match: the first kernel has {inner} outputs, the second takes '
            f'{inner_per_group} inputs in each of {groups} groups'
        )
    if h1 == 1 and w1 == 1:  # one matrix product per group
        mixer = first.reshape(groups, inner_per_group, in_per_group)
        stacked = second.reshape(out_channels, inner_per_group, h2 * w2).transpose(1, 2)
        merged = torch.matmul(stacked.reshape(groups, -1, inner_per_group), mixer)
        return merged.reshape(out_channels, h2 * w2, in_per_group).transpose(1, 2).reshape(-1, in_per_group, h2, w2)
    if h2 == 1 and w2 == 1:
        mixer = second.reshape(groups, out_channels // groups, inner_per_group)
        merged = torch.matmul(mixer, first.reshape(groups, inner_per_group, in_per_group * h1 * w1))
        return merged.reshape(out_channels, in_per_group, h1, w1)
    # Each input channel is an image whose channels are the inner ones; the second kernel slides over it, flipped. As a
    # matrix product: TF32 is on by default for convolutions, not for products.
    images = first.reshape(groups, inner_per_group, in_per_group, h1, w1)
    images = images.permute(0, 2, 1, 3, 4).reshape(groups * in_per_group, inner_per_group, h1, w1)
    patches = F.unfold(images, (h2, w2), padding=(h2 - 1, w2 - 1))
    patches = patches.reshape(groups, in_per_group, patches.shape[1], patches.shape[2])
    flipped = second.flip([2, 3]).reshape(groups, 1, out_channels // groups, -1)
    merged = torch.matmul(flipped, patches).transpose(1, 2)
    return merged.reshape(out_channels, in_per_group, h1 + h2 - 1, w1 + w2 - 1)


def merge_sequential_bias(first_bias: Tensor, second: Tensor, groups: int = 1) -> Tensor:
    """Bias that the first convolution of a sequence leaves at the output of the second.

    Exact if the second convolution sees the first bias everywhere, in its padding too.

    Args:
        first_bias: ``(t,)``.
        second: ``(o, t/g, h, w)``.
        groups: Number of groups ``g`` of the second convolution.

    Returns:
        ``(o,)``, to be added to the second convolution's own bias.
    """
    gain = second.sum([2, 3]).reshape(groups, -1, second.shape[1])
    return torch.matmul(gain, first_bias.reshape(groups, -1, 1)).reshape(-1)


def merge_pointwise_depthwise(pointwise: Tensor, depthwise: Tensor) -> Tensor:
    """Kernel of a 1x1 convolution followed by one spatial filter per output channel (average, frequency prior).

    Args:
        pointwise: ``(o, i/g, 1, 1)``.
        depthwise: ``(o, 1, h, w)`` or ``(1, 1, h, w)``.

    Returns:
        ``(o, i/g, h, w)``.
    """
    return pointwise * depthwise


def grouped_identity(
        channels: int,
        groups: int = 1,
        size: Tuple[int, int] = (1, 1),
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """Kernel that passes every channel through unchanged: one at the centre, zero elsewhere.

    Args:
        channels: Number of input and output channels.
        groups: Number of groups ``g``.
        size: Odd height and width.
        device: Device of the result.
        dtype: Data type of the result.

    Returns:
        ``(channels, channels/g, *size)``.
    """
    per_group = channels // groups
    eye = torch.eye(per_group, device=device, dtype=dtype).repeat(groups, 1)
    return pad_to_size(eye.reshape(channels, per_group, 1, 1), size)


def average_kernel(
        size: Tuple[int, int],
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """Spatial filter of an average pooling (DBB transform V).

    Args:
        size: Height and width of the window.
        device: Device of the result.
        dtype: Data type of the result.

    Returns:
        ``(1, 1, *size)``, every tap ``1 / (h * w)``.
    """
    return torch.full((1, 1, size[0], size[1]), 1.0 / (size[0] * size[1]), device=device, dtype=dtype)


def frequency_prior(
        out_channels: int,
        size: Tuple[int, int],
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """OREPA's fixed frequency filters, a cosine (DCT-II) basis: one spatial filter per output channel.

    The first half of the channels varies along the height, the second half along the width; the frequency number
    counts up from 1 within each half: ``cos(pi * (h + 0.5) * n / H)``. (OREPA, frequency prior filter, Section 3.)

    Args:
        out_channels: Number of filters ``o``.
        size: Height and width, any positive numbers.
        device: Device of the result.
        dtype: Data type of the result.

    Returns:
        ``(o, 1, *size)``.
    """
    height, width = size
    half = out_channels / 2
    channel = torch.arange(out_channels, device=device, dtype=torch.float64)
    along_height = channel < half
    number = torch.where(along_height, channel + 1, channel + 1 - half).reshape(-1, 1, 1, 1)
    row = torch.arange(height, device=device, dtype=torch.float64).reshape(1, 1, -1, 1)
    column = torch.arange(width, device=device, dtype=torch.float64).reshape(1, 1, 1, -1)
    vertical = torch.cos(math.pi * (row + 0.5) * number / height).expand(-1, -1, height, width)
    horizontal = torch.cos(math.pi * (column + 0.5) * number / width).expand(-1, -1, height, width)
    prior = torch.where(along_height.reshape(-1, 1, 1, 1), vertical, horizontal)
    return prior.to(dtype or torch.get_default_dtype())


def fold_norm(
        kernel: Tensor,
        bias: Optional[Tensor],
        mean: Tensor,
        var: Tensor,
        gamma: Optional[Tensor],
        beta: Optional[Tensor],
        eps: float,
) -> Tuple[Tensor, Tensor]:
    """Fold a batch norm in eval mode into the convolution before it (DBB transform I).

    Args:
        kernel: ``(o, i/g, h, w)``.
        bias: ``(o,)`` or None.
        mean: Running mean ``(o,)``.
        var: Running variance ``(o,)``.
        gamma: Weight of the norm ``(o,)``, or None for ones.
        beta: Bias of the norm ``(o,)``, or None for zeros.
        eps: Added to the variance.

    Returns:
        Kernel ``(o, i/g, h, w)`` and bias ``(o,)`` of the folded convolution.
    """
    gain = torch.rsqrt(var + eps)
    if gamma is not None:
        gain = gain * gamma
    shift = -mean if bias is None else bias - mean
    folded_bias = shift * gain
    if beta is not None:
        folded_bias = folded_bias + beta
    return kernel * gain.reshape(-1, 1, 1, 1), folded_bias


def unfold_norm(
        kernel: Tensor,
        bias: Optional[Tensor],
        mean: Tensor,
        var: Tensor,
        eps: float,
        gamma: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Split a convolution with bias into one without and a batch norm with the given statistics.

    The inverse of :func:`fold_norm`.

    Args:
        kernel: ``(o, i/g, h, w)``.
        bias: ``(o,)`` or None for zeros.
        mean: Running mean ``(o,)`` that the norm keeps.
        var: Running variance ``(o,)`` that the norm keeps.
        eps: Added to the variance.
        gamma: Weight ``(o,)`` that the norm gets, nowhere zero; None for its standard deviation, which leaves the
            kernel as it is.

    Returns:
        Kernel ``(o, i/g, h, w)``, norm weight ``(o,)`` and norm bias ``(o,)``.
    """
    std = torch.sqrt(var + eps)
    if gamma is None:
        return kernel, std, mean if bias is None else mean + bias
    beta = mean * gamma / std
    return kernel * (std / gamma).reshape(-1, 1, 1, 1), gamma, beta if bias is None else beta + bias
