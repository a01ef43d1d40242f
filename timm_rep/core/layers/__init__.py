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

from .rep import Rep, RepConv2d  # isort: split

from .doconv import DOConv, DOConv2d
from .expandnet import ExpandedConv2d, ExpandNet
from .refconv import RefConv, RefConv2d  # isort: split

from .dilated import Dilated, DilatedConv2d, NormedDilatedConv2d
from .mobileone import MobileOne, MobileOneConv2d, NormedMobileOneConv2d
from .repnas import RepNas, RepNasConv2d
from .repvgg import AnnealedRepVggBlock

__all__ = [
    'ACB',
    'DBB',
    'AnnealedModule',
    'AnnealedRepVggBlock',
    'AsymmetricConv2d',
    'DOConv',
    'DOConv2d',
    'Dilated',
    'DilatedConv2d',
    'DiverseBranchConv2d',
    'ExpandNet',
    'ExpandedConv2d',
    'FoldedNorm',
    'HostedConv2d',
    'LinearRepLayer',
    'MobileOne',
    'MobileOneConv2d',
    'NormedDilatedConv2d',
    'NormedMobileOneConv2d',
    'NormedRepLayer',
    'Orepa',
    'OrepaConv2d',
    'OrepaPointwiseConv2d',
    'OrepaStemConv2d',
    'RefConv',
    'RefConv2d',
    'Rep',
    'RepConv2d',
    'RepLayer',
    'RepNas',
    'RepNasConv2d',
    'StandardizedConv2d',
]
