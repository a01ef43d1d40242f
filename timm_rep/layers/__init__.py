"""Rep layers: modules that look like a convolution and compute its kernel from branches."""
from .base import LinearRepLayer, RepLayer
from .branched import BranchedRepLayer, DiverseBranchConv2d
from .orepa import OrepaConv2d, OrepaPointwiseConv2d, OrepaStemConv2d

__all__ = [
    'BranchedRepLayer',
    'DiverseBranchConv2d',
    'LinearRepLayer',
    'OrepaConv2d',
    'OrepaPointwiseConv2d',
    'OrepaStemConv2d',
    'RepLayer',
]
