"""The public names, and the models in timm's registry: what ``import timm_rep`` stands for."""
from . import models
from ._version import __version__
from .core import layers, methods
from .core.annealer import Annealer
from .core.annealing import AnnealingSchedule, attach_rate, begin_time_step
from .core.capture import capture
from .core.distributed import RepDistributedDataParallel
from .core.errors import UserError
from .core.expand import expand
from .core.expansion import Expansion, expansion_of
from .core.fuse import fuse
from .core.layers import (
    ACB,
    DBB,
    AsymmetricConv2d,
    Dilated,
    DilatedConv2d,
    DiverseBranchConv2d,
    DOConv,
    DOConv2d,
    ExpandedConv2d,
    ExpandNet,
    MobileOne,
    MobileOneConv2d,
    NormedDilatedConv2d,
    NormedMobileOneConv2d,
    Orepa,
    OrepaConv2d,
    OrepaPointwiseConv2d,
    OrepaStemConv2d,
    RefConv,
    RefConv2d,
    Rep,
    RepConv2d,
    RepNas,
    RepNasConv2d,
)
from .core.methods import Method, register_method
from .core.micro_batch import micro_batch
from .core.optimizers import reset_optimizer
from .core.prune import prune_branches
from .core.verify import Report, VerificationError, verify
from .core.walk import rep_layers, set_attach_rate
from .hub.check import check_export
from .hub.export import export_folder
from .hub.publish import Published, PublishError, publish
from .io.hub_errors import HubError
from .io.weights import load, save
from .official.load import load_official_checkpoint
from .report import cost, ensemble, plots, run_pictures  # noqa: F401  timm_rep.report.plots and the like exist

__all__ = [
    'ACB',
    'DBB',
    'Annealer',
    'AnnealingSchedule',
    'AsymmetricConv2d',
    'DOConv',
    'DOConv2d',
    'Dilated',
    'DilatedConv2d',
    'DiverseBranchConv2d',
    'ExpandNet',
    'ExpandedConv2d',
    'Expansion',
    'HubError',
    'Method',
    'MobileOne',
    'MobileOneConv2d',
    'NormedDilatedConv2d',
    'NormedMobileOneConv2d',
    'Orepa',
    'OrepaConv2d',
    'OrepaPointwiseConv2d',
    'OrepaStemConv2d',
    'PublishError',
    'Published',
    'RefConv',
    'RefConv2d',
    'Rep',
    'RepConv2d',
    'RepDistributedDataParallel',
    'RepNas',
    'RepNasConv2d',
    'Report',
    'UserError',
    'VerificationError',
    '__version__',
    'attach_rate',
    'begin_time_step',
    'capture',
    'check_export',
    'expand',
    'expansion_of',
    'export_folder',
    'fuse',
    'layers',
    'load',
    'load_official_checkpoint',
    'methods',
    'micro_batch',
    'models',
    'prune_branches',
    'publish',
    'register_method',
    'rep_layers',
    'reset_optimizer',
    'save',
    'set_attach_rate',
    'verify',
]
