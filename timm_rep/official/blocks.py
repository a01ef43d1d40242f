"""The authors' kinds of block in training form, by the layer that stands for each."""
from typing import Any, Callable, Dict, Tuple, Type

import torch.nn as nn

from ..core import layers
from . import orepa
from .acb import ACB_START, fill_acb
from .dbb import DBB_STARTS, fill_dbb
from .plain import fill_plain
from .rep import REP_START, fill_rep
from .source import Source

__all__ = ['fill_block', 'skip_folded']

# How the names of a block's tensors start, and what fills its layer; of several that fit, the first is meant.
BLOCKS: Dict[Type[nn.Module], Tuple[Tuple[str, ...], Callable[[Source, str, Any], None]]] = {
    layers.OrepaStemConv2d: ((orepa.STEM_START,), orepa.fill_stem),
    layers.OrepaConv2d: (orepa.KXK_STARTS, orepa.fill_kxk),
    layers.OrepaPointwiseConv2d: ((orepa.POINTWISE_START,), orepa.fill_pointwise),
    layers.DiverseBranchConv2d: (DBB_STARTS, fill_dbb),
    layers.RepConv2d: ((REP_START,), fill_rep),
    layers.AsymmetricConv2d: ((ACB_START,), fill_acb),
}
# RepAn keeps the folded convolution beside the branches; in training form it is not what the block computes.
REPAN_FOLDED = ('rep_conv', 'dbb_reparam', 'fused_conv')


def skip_folded(source: Source, prefix: str) -> None:
    """Take what RepAn keeps of the last fold."""
    for name in REPAN_FOLDED:
        for kind in ('weight', 'bias'):
            source.take_optional(f'{prefix}.{name}.{kind}')


def fill_block(source: Source, prefix: str, layer: Any, norm: Any) -> None:
    """Fill a convolution or rep layer, and the norm behind it if it has none of its own."""
    for layer_type, (starts, fill) in BLOCKS.items():
        if any(source.has(f'{prefix}.{start}') for start in starts):
            if type(layer) is not layer_type:
                raise source.refusal(
                    f'{prefix} is a block of {layer_type.__name__}, where the model has {type(layer).__name__}')
            fill(source, prefix, layer)
            if not isinstance(layer, layers.NormedRepLayer):
                source.fill_norm(norm, f'{prefix}.bn')
            break
    else:
        fill_plain(source, f'{prefix}.conv', f'{prefix}.bn', layer, norm)
    skip_folded(source, prefix)
