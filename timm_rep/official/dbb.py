"""DBB blocks, of the repositories of DBB and RepAn."""
from ..core.layers import DiverseBranchConv2d
from .source import Source

__all__ = ['DBB_STARTS', 'fill_dbb']

DBB_STARTS = ('dbb_avg.', 'dbb_1x1_kxk.')
# What the authors call the parts of the layer (official diversebranchblock.py).
DBB_NAMES = dict(
    conv_kxk='dbb_origin.conv', norm_kxk='dbb_origin.bn', conv_1x1='dbb_1x1.conv', norm_1x1='dbb_1x1.bn',
    avg_conv='dbb_avg.conv', avg_inner_norm='dbb_avg.bn.bn', avg_norm='dbb_avg.avgbn',
    seq_inner_norm='dbb_1x1_kxk.bn1.bn', seq_kxk='dbb_1x1_kxk.conv2', seq_norm='dbb_1x1_kxk.bn2')


def fill_dbb(source: Source, prefix: str, layer: DiverseBranchConv2d) -> None:
    """Fill a layer; a depthwise one has fewer branches."""
    source.fill_branches(layer, prefix, DBB_NAMES)
    if layer.avg_conv is None:
        first = source.take(f'{prefix}.dbb_1x1_kxk.conv1.weight', layer.seq_1x1.shape)
        layer.seq_1x1.copy_(first.to(layer.seq_1x1) - layer.seq_identity)
    else:
        source.fill(layer.seq_1x1, f'{prefix}.dbb_1x1_kxk.idconv1.weight')
