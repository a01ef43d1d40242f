"""Plain blocks of the authors, a convolution and its norm, and folded ones, a convolution with bias."""
from typing import Any, Optional

import torch.nn as nn

from ..core import kernels
from ..core.layers import LinearRepLayer, NormedRepLayer
from .source import Source

__all__ = ['fill_folded', 'fill_plain', 'silence_']

# What the authors call the convolution of a folded block.
FOLDED_NAMES = (
    'orepa_reparam', 'or1x1_reparam', 'or_large_reparam', 'dbb_reparam', 'rbr_reparam', 'rep_conv', 'fused_conv',
    'conv')


def silence_(norm: Optional[nn.BatchNorm2d]) -> None:
    """Let a branch that ends in this norm, if there is one, add nothing."""
    if norm is not None:
        norm.reset_parameters()
        nn.init.zeros_(norm.weight)


def fill_plain(source: Source, conv_name: str, norm_name: str, layer: Any, norm: Any) -> None:
    """Fill a convolution and its norm; where we have a rep layer, restore it."""
    weight_name = f'{conv_name}.weight'
    if isinstance(layer, NormedRepLayer):  # has the norm in it
        source.fill_norm(layer.norm_kxk, norm_name)
        layer.absorb_norm_(source.take(weight_name, layer.weight_shape).to(layer.norm_kxk.weight))
        return
    if isinstance(layer, LinearRepLayer):
        layer.restore_(source.take(weight_name, layer.weight_shape))
    else:
        source.fill(layer.weight, weight_name)
    source.fill_norm(norm, norm_name)


def fill_folded(source: Source, prefix: str, conv: nn.Conv2d, norm: Any) -> None:
    """Fill a convolution and its norm from a folded block; the norm gets mean 0 and variance 1."""
    name = next((name for name in FOLDED_NAMES if source.has(f'{prefix}.{name}.')), FOLDED_NAMES[-1])
    norm.reset_parameters()
    kernel = source.take(f'{prefix}.{name}.weight', conv.weight.shape)
    bias = source.take(f'{prefix}.{name}.bias', norm.bias.shape).to(norm.bias)
    kernel, gamma, beta = kernels.unfold_norm(kernel, bias, norm.running_mean, norm.running_var, norm.eps)
    conv.weight.copy_(kernel)
    norm.weight.copy_(gamma)
    norm.bias.copy_(beta)
