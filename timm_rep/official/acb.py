"""ACB blocks, of the repositories of DBB and RepAn."""
from ..core.layers import AsymmetricConv2d
from .source import Source

__all__ = ['ACB_START', 'fill_acb']

ACB_START = 'square_'
# What the authors call the parts of the layer (official acb.py).
ACB_NAMES = dict(
    conv_kxk='square_conv', norm_kxk='square_bn', conv_1xk='hor_conv', norm_1xk='hor_bn', conv_kx1='ver_conv',
    norm_kx1='ver_bn')


def fill_acb(source: Source, prefix: str, layer: AsymmetricConv2d) -> None:
    """Fill a layer."""
    source.fill_branches(layer, prefix, ACB_NAMES)
