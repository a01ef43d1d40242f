"""The authors' kinds of block in training form, by the layer that stands for each."""
from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Tuple, Type

import torch.nn as nn

from ..core.layers import (
    AsymmetricConv2d,
    DiverseBranchConv2d,
    NormedRepLayer,
    OrepaConv2d,
    OrepaPointwiseConv2d,
    OrepaStemConv2d,
    RepConv2d,
)
from . import orepa
from .acb import ACB_START, fill_acb
from .dbb import DBB_STARTS, fill_dbb
from .plain import fill_plain
from .rep import REP_START, fill_rep
from .source import Source

__all__ = ['fill_block', 'skip_folded']


@dataclass(frozen=True)
class Block:
    """A kind of block: how it is called, how its tensors' names start, what fills its layer."""

    label: str
    starts: Tuple[str, ...]
    fill: Callable[[Source, str, Any], None]


# Of several that fit a checkpoint, the first is meant.
BLOCKS: Dict[Type[nn.Module], Block] = {
    OrepaStemConv2d: Block('an OREPA stem', (orepa.STEM_START,), orepa.fill_stem),
    OrepaConv2d: Block('an OREPA', orepa.KXK_STARTS, orepa.fill_kxk),
    OrepaPointwiseConv2d: Block('a Rep-1x1', (orepa.POINTWISE_START,), orepa.fill_pointwise),
    DiverseBranchConv2d: Block('a DBB', DBB_STARTS, fill_dbb),
    RepConv2d: Block('a REP', (REP_START,), fill_rep),
    AsymmetricConv2d: Block('an ACB', (ACB_START,), fill_acb),
}
# RepAn keeps the folded convolution beside the branches; in training form it is not what the block computes.
REPAN_FOLDED = ('rep_conv', 'dbb_reparam', 'fused_conv')


def skip_folded(source: Source, prefix: str) -> None:
    """Take what RepAn keeps of the last fold."""
    for name in REPAN_FOLDED:
        for kind in ('weight', 'bias'):
            source.take_optional(f'{prefix}.{name}.{kind}')


def _block_for(source: Source, prefix: str, layer: nn.Module) -> Optional[Block]:
    """The block that has this prefix and must be the layer's; None for a plain one, or none at all."""
    for layer_type, block in BLOCKS.items():
        if any(source.has(f'{prefix}.{start}') for start in block.starts):
            if type(layer) is layer_type:
                return block
            own = BLOCKS.get(type(layer))
            raise source.refusal(
                f'{prefix} is {block.label} block, where the model has {own.label if own else "a plain"} one')
    return None


def fill_block(source: Source, prefix: str, layer: Any, norm: Any) -> None:
    """Fill a convolution or rep layer, and the norm behind it if it has none of its own."""
    block = _block_for(source, prefix, layer)
    if block is None:
        fill_plain(source, f'{prefix}.conv', f'{prefix}.bn', layer, norm)
    else:
        block.fill(source, prefix, layer)
        if not isinstance(layer, NormedRepLayer):
            source.fill_norm(norm, f'{prefix}.bn')
    skip_folded(source, prefix)
