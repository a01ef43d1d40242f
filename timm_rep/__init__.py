"""timm_rep: structural re-parameterization for timm. Importing it registers the models with timm."""
from . import models
from .annealing import AnnealingSchedule, attach_rate, begin_time_step, reset_optimizer
from .hub import export_folder
from .layers import (
    AsymmetricConv2d,
    DiverseBranchConv2d,
    OrepaConv2d,
    OrepaPointwiseConv2d,
    OrepaStemConv2d,
    RepConv2d,
)
from .official import load_official_checkpoint
from .publishing import Published, PublishError, publish
from .selfcheck import check_export
from .surgery import expand, fuse, rep_layers, set_attach_rate
from .verification import Report, VerificationError, verify

__all__ = [
    'AnnealingSchedule',
    'AsymmetricConv2d',
    'DiverseBranchConv2d',
    'OrepaConv2d',
    'OrepaPointwiseConv2d',
    'OrepaStemConv2d',
    'PublishError',
    'Published',
    'RepConv2d',
    'Report',
    'VerificationError',
    'attach_rate',
    'begin_time_step',
    'check_export',
    'expand',
    'export_folder',
    'fuse',
    'load_official_checkpoint',
    'models',
    'publish',
    'rep_layers',
    'reset_optimizer',
    'set_attach_rate',
    'verify',
]
__version__ = '0.1.0'
