"""timm_rep: structural re-parameterization for timm. Importing it registers the models with timm."""
from . import models
from ._version import __version__
from .core.annealing import AnnealingSchedule, attach_rate, begin_time_step, reset_optimizer
from .core.errors import UserError
from .core.expand import expand
from .core.expansion import Expansion, expansion_of
from .core.fuse import fuse
from .core.layers import (
    ACB,
    DBB,
    AsymmetricConv2d,
    DiverseBranchConv2d,
    Orepa,
    OrepaConv2d,
    OrepaPointwiseConv2d,
    OrepaStemConv2d,
    Rep,
    RepConv2d,
)
from .core.methods import Method, register_method
from .core.verify import Report, VerificationError, verify
from .core.walk import rep_layers, set_attach_rate
from .hub.check import check_export
from .hub.export import export_folder
from .hub.publish import Published, PublishError, publish
from .io.weights import load, save
from .official.load import load_official_checkpoint

__all__ = [
    'ACB', 'DBB', 'AnnealingSchedule', 'AsymmetricConv2d', 'DiverseBranchConv2d', 'Expansion', 'Method', 'Orepa',
    'OrepaConv2d', 'OrepaPointwiseConv2d', 'OrepaStemConv2d', 'PublishError', 'Published', 'Rep', 'RepConv2d', 'Report',
    'UserError', 'VerificationError', '__version__', 'attach_rate', 'begin_time_step', 'check_export', 'expand',
    'expansion_of', 'export_folder', 'fuse', 'load', 'load_official_checkpoint', 'models', 'publish', 'register_method',
    'rep_layers', 'reset_optimizer', 'save', 'set_attach_rate', 'verify',
]
