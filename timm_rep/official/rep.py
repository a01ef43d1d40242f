"""REP blocks, of RepAn's repository."""
from ..core.layers import RepConv2d
from .plain import silence_
from .source import Source

__all__ = ['REP_START', 'fill_rep']

REP_START = 'dbb_origin.'
# What the authors call the parts of the layer (official repblock.py).
KXK_NAMES = dict(conv_kxk='dbb_origin.conv', norm_kxk='dbb_origin.bn')
POINTWISE_NAMES = dict(conv_1x1='dbb_1x1.conv', norm_1x1='dbb_1x1.bn')


def fill_rep(source: Source, prefix: str, layer: RepConv2d) -> None:
    """Fill a layer. The authors' has no identity branch, and no 1x1 if it is depthwise."""
    source.fill_branches(layer, prefix, KXK_NAMES)
    silence_(layer.norm_identity)
    if layer.groups == layer.out_channels:
        silence_(layer.norm_1x1)
    else:
        source.fill_branches(layer, prefix, POINTWISE_NAMES)
