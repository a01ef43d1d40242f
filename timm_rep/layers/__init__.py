"""Rep layers: modules that look like a convolution and compute its kernel from branches."""
from .base import AnnealedModule, LinearRepLayer, RepLayer
from .branched import AsymmetricConv2d, BranchedRepLayer, DiverseBranchConv2d, FoldedNorm, RepConv2d
from .orepa import OrepaConv2d, OrepaPointwiseConv2d, OrepaStemConv2d
from .repvgg import AnnealedRepVggBlock

__all__ = [
    'AnnealedModule',
    'AnnealedRepVggBlock',
    'AsymmetricConv2d',
    'BranchedRepLayer',
    'DiverseBranchConv2d',
    'FoldedNorm',
    'LinearRepLayer',
    'OrepaConv2d',
    'OrepaPointwiseConv2d',
    'OrepaStemConv2d',
    'RepConv2d',
    'RepLayer',
]
