"""Blocks of OREPA's repository: the KxK, the Rep-1x1 and the stem, a stack of KxK blocks."""
from typing import Any, Dict, Sequence

import torch
from torch import Tensor

from ..core import kernels
from ..core.layers import OrepaConv2d, OrepaPointwiseConv2d
from .source import Source

__all__ = ['KXK_STARTS', 'POINTWISE_START', 'STEM_START', 'fill_kxk', 'fill_pointwise', 'fill_stem']

# How the names of a block's tensors start; RepVGG has a class of its own for the KxK.
KXK_STARTS = KXK_START, REPVGG_KXK_START = 'weight_orepa_', 'weight_rbr_'
POINTWISE_START = 'weight_or1x1_'
STEM_START = 'weight0.'
# Rows of the authors' scales, by branch (official blocks.py, blocks_repvgg.py, where there is no conv_1x1).
SCALE_ROWS = ('origin', 'average', 'prior', 'sequential', 'conv_1x1', 'separable')
CONSTANTS: Dict[str, Any] = dict(device=torch.device('cpu'), dtype=torch.float64)


def fill_kxk(source: Source, prefix: str, layer: OrepaConv2d, mirrored: bool = False) -> None:
    """Fill a layer; ``mirrored`` gives it the authors' kernel mirrored in both axes."""
    missing = [name for name in SCALE_ROWS if name not in (*layer.branch_names, 'conv_1x1')]
    if missing or layer.scaling != 'vector':
        raise source.refusal(
            f"the authors' layers have all branches, with a scale for each output; the model's are "
            f"{', '.join(layer.branch_names)}, scaling={layer.scaling!r}")
    in_repvgg = source.has(f'{prefix}.{REPVGG_KXK_START}')
    start = f'{prefix}.{REPVGG_KXK_START if in_repvgg else KXK_START}'
    out_channels, in_per_group = layer.weight_shape[:2]
    groups, size = layer.groups, layer.kernel_size
    views = layer.branch_views()

    def take(name: str, shape: Sequence[int], spatial: bool = False) -> Tensor:
        value = source.take(start + name, shape)
        return value.flip([2, 3]) if spatial and mirrored else value

    pointwise = (out_channels, in_per_group, 1, 1)
    views['origin'].copy_(take('origin', layer.weight_shape, spatial=True))
    views['average'].copy_(take('avg_conv', pointwise).flatten(1))
    if 'conv_1x1' in views:
        views['conv_1x1'].copy_(take('1x1', pointwise).flatten(1))

    prior_conv = take('pfir_conv', pointwise).flatten(1)
    if mirrored:
        prior_conv = prior_conv * _mirror_sign(layer).to(prior_conv).reshape(-1, 1)
    views['prior'].copy_(prior_conv)

    inner = layer.seq_1x1.shape[0]
    source.fill(layer.seq_1x1, f'{start}1x1_kxk_idconv1')
    sequential = take('1x1_kxk_conv2', (out_channels, inner // groups, *size), spatial=True)
    views['sequential'].copy_(sequential.unflatten(1, (-1, in_per_group)).transpose(1, 2))

    layer.dw_conv.copy_(take('gconv_dw', layer.dw_conv.shape, spatial=True))
    # The authors' grouped form lets the group vary fastest over the outputs of this 1x1.
    expansion = views['separable'].shape[2]
    separable = take('gconv_pw', (out_channels, in_per_group * expansion, 1, 1))
    separable = separable.unflatten(0, (-1, groups)).transpose(0, 1)
    views['separable'].copy_(separable.reshape(views['separable'].shape))

    # In RepVGG a block with identity branch has a row more, which nothing sets or uses (official blocks_repvgg.py).
    unused = in_repvgg and layer.in_channels == layer.out_channels and layer.stride == (1, 1)
    rows = [name for name in SCALE_ROWS if name in layer.branch_names]
    scale = source.take(f'{prefix}.vector', (len(rows) + unused, out_channels))
    for row, name in zip(scale, rows):
        layer.scale[layer.branch_names.index(name)].copy_(row)
    _check_constants(source, prefix, start, layer)


def _prior(layer: OrepaConv2d) -> Tensor:
    return kernels.frequency_prior(layer.out_channels, layer.kernel_size, **CONSTANTS)


def _mirror_sign(layer: OrepaConv2d) -> Tensor:
    """The sign that each prior filter gets by mirroring in both axes, ``(o,)``; of an even number of filters."""
    prior = _prior(layer)
    mirrored = prior.flip([2, 3])
    return torch.where((mirrored - prior).abs().amax([1, 2, 3]) < (mirrored + prior).abs().amax([1, 2, 3]), 1.0, -1.0)


def _check_constants(source: Source, prefix: str, start: str, layer: OrepaConv2d) -> None:
    in_per_group, inner = layer.weight_shape[1], layer.seq_1x1.shape[0]
    identity = kernels.grouped_identity(in_per_group, **CONSTANTS).repeat(inner // in_per_group, 1, 1, 1)
    source.check_constant(f'{prefix}.id_tensor', identity)
    source.check_constant(f'{start}avg_avg', kernels.average_kernel(layer.kernel_size, **CONSTANTS)[0, 0])
    source.check_constant(f'{start}prior', _prior(layer)[:, 0])


def fill_pointwise(source: Source, prefix: str, layer: OrepaPointwiseConv2d) -> None:
    """Fill a 1x1 layer."""
    source.fill(layer.conv_1x1, f'{prefix}.{POINTWISE_START}origin')
    source.fill(layer.seq_first, f'{prefix}.{POINTWISE_START}l2i_conv1')
    source.fill(layer.seq_second, f'{prefix}.{POINTWISE_START}l2i_conv2')
    source.fill(layer.scale, f'{prefix}.vector')


def fill_stem(source: Source, prefix: str, layer: Any) -> None:
    """Fill a stem. The authors squeeze by cross-correlation, so all layers but the first enter it mirrored."""
    for position, part in enumerate(layer.stack):
        fill_kxk(source, f'{prefix}.weight{position}', part, mirrored=position > 0)
    layer.kernel_offset.zero_()
