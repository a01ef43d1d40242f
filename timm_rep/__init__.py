"""timm_rep: structural re-parameterization for timm. Importing it registers the models with timm."""
from . import models
from .hub import export_folder
from .layers import DiverseBranchConv2d, OrepaConv2d, OrepaPointwiseConv2d, OrepaStemConv2d
from .publishing import Published, PublishError, publish
from .selfcheck import check_export
from .surgery import expand, fuse, rep_layers, set_attach_rate
from .verification import Report, VerificationError, verify

__all__ = [
    'DiverseBranchConv2d',
    'OrepaConv2d',
    'OrepaPointwiseConv2d',
    'OrepaStemConv2d',
    'PublishError',
    'Published',
    'Report',
    'VerificationError',
    'check_export',
    'expand',
    'export_folder',
    'fuse',
    'models',
    'publish',
    'rep_layers',
    'set_attach_rate',
    'verify',
]
__version__ = '0.1.0'
