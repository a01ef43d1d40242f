"""Rep layers: modules that look like a convolution and compute its kernel from branches. One method a file.

Importing this registers the methods, in the order of this list.
"""
from .annealed import AnnealedModule
from .base import LinearRepLayer, RepLayer
from .hosted import HostedConv2d, StandardizedConv2d
from .normed import NormedRepLayer
from .norms import FoldedNorm
from .orepa import Orepa, OrepaConv2d, OrepaPointwiseConv2d, OrepaStemConv2d  # isort: split

from .dbb import DBB, DiverseBranchConv2d  # isort: split

from .acb import ACB, AsymmetricConv2d  # isort: split

from .rep import Rep, RepConv2d
from .repvgg import AnnealedRepVggBlock

__all__ = [
    'ACB',
    'DBB',
    'AnnealedModule',
    'AnnealedRepVggBlock',
    'AsymmetricConv2d',
    'DiverseBranchConv2d',
    'FoldedNorm',
    'HostedConv2d',
    'LinearRepLayer',
    'NormedRepLayer',
    'Orepa',
    'OrepaConv2d',
    'OrepaPointwiseConv2d',
    'OrepaStemConv2d',
    'Rep',
    'RepConv2d',
    'RepLayer',
    'StandardizedConv2d',
]
