"""Statistics of the norms in the branches, measured on batches, for a model whose kernels have just been redrawn."""
import copy
import itertools
from contextlib import contextmanager
from typing import Any, Iterable, Iterator, List, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from .errors import UserError
from .layers.branches import NormedBranches
from .layers.norms import is_frozen, kept_statistics
from .walk import annealed_modules, unwrapped

__all__ = ['check_measurable', 'first_batches','measure_statistics', 'normed_modules']

MEASURED_BATCHES = 4


def first_batches(batches: Iterable[Any]) -> List[Tensor]:
    """The images of the first four batches.

    Args:
        batches: Batches of images, or of images and more, such as a loader gives.

    Returns:
        Image batches.

    Raises:
        UserError: If there are none, or they are something else.
    """
    found = []
    for batch in itertools.islice(batches, MEASURED_BATCHES):
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(images, Tensor):
            raise UserError(f'batches must hold tensors of images, or tuples that begin with one, got {type(batch)}')
        if not images.numel() or not images.isfinite().all():
            raise UserError(f'batches must hold images of finite values, got {tuple(images.shape)}')
        found.append(images)
    if not found:
        raise UserError("restoration 'measured' needs batches of images, such as batches=train_loader; got none")
    return found


def normed_modules(model: nn.Module) -> Iterator[NormedBranches]:
    """Walk over the modules of a model that have norms in their branches."""
    for _, module in annealed_modules(model):
        if isinstance(module, NormedBranches):
            yield module


class _Meter:
    """Statistics of what a norm sees in training mode, averaged over batches; a hook before its forward."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        self.sums: Tuple[Tensor, Tensor] = (torch.zeros_like(norm.weight), torch.zeros_like(norm.weight))
        self.batches = 0

    def __call__(self, norm: nn.Module, args: Tuple[Tensor]) -> None:
        var, mean = torch.var_mean(args[0].to(self.sums[0].dtype), (0, 2, 3), correction=0)
        self.sums = self.sums[0] + mean, self.sums[1] + var
        self.batches += 1

    def statistics(self) -> Tuple[Tensor, Tensor]:
        """Mean and variance ``(o,)``, also over all processes."""
        mean, var = (total / self.batches for total in self.sums)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for statistic in (mean, var):
                torch.distributed.all_reduce(statistic)
                statistic.div_(torch.distributed.get_world_size())
        return mean, var


Origins = List[Tuple[NormedBranches, _Meter]]
Sides = List[Tuple[nn.BatchNorm2d, _Meter]]


def _run(model: nn.Module, batches: Iterable[Tensor]) -> None:
    parameter = next(model.parameters())
    with torch.autocast(parameter.device.type, enabled=False), torch.compiler.set_stance('force_eager'):
        for images in batches:
            model(images.to(parameter.device, parameter.dtype))


@contextmanager
def _in_training_mode(norms: List[nn.BatchNorm2d]) -> Iterator[None]:
    """Let norms compute with the statistics of a batch, from fresh running ones, and have back what they kept."""
    kept = [(norm, norm.momentum, norm.num_batches_tracked, copy.deepcopy(norm.state_dict())) for norm in norms]
    try:
        for norm, _, count, _ in kept:
            if count is None:  # it need not have one
                norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=norm.weight.device)
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        yield
    finally:
        for norm, momentum, count, state in kept:
            norm.momentum = momentum
            norm.num_batches_tracked = count
            norm.load_state_dict(state)


def _meet(model: nn.Module, batches: Iterable[Tensor], sides: bool) -> Tuple[Origins, Sides]:
    """Run the model on the batches, with meters before the norms; it stays as it is."""
    modes = [(module, module.training) for module in model.modules()]
    origins: Origins = []
    side_norms: Sides = []
    handles = []
    model.eval()
    for module in normed_modules(model):
        origin, others = module.norms_to_measure()
        for norm in (origin, *(others if sides else ())):
            if is_frozen(norm):
                continue
            meter = _Meter(norm)
            handles.append(norm.register_forward_pre_hook(meter))
            if norm is origin:
                origins.append((module, meter))
            else:
                side_norms.append((norm, meter))
    try:
        with _in_training_mode([norm for norm, _ in side_norms]):  # for what comes behind an inner one
            _run(model, batches)
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in modes:
            part.training = mode
    return origins, side_norms


@torch.no_grad()
def check_measurable(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Try whether a model can be measured on batches; it stays as it is.

    Args:
        model: Model with rep layers.
        batches: Image batches.

    Raises:
        UserError: If it does not run on them.
    """
    try:
        _meet(unwrapped(model), batches, sides=True)
    except Exception as e:  # whatever a network may raise
        shapes = ', '.join(str(tuple(images.shape)) for images in batches)
        raise UserError(
            f"restoration 'measured' runs the model on batches of images, here of shapes {shapes}, by model(images). "
            f'That raised {type(e).__name__}: {e}. Nothing was changed'
        ) from e


@torch.no_grad()
def measure_statistics(model: nn.Module, batches: Iterable[Tensor], sides: bool) -> None:
    """Let the norms in the branches keep the statistics that they meet in training mode, averaged over batches.

    The model runs in eval mode, so that every layer sees what it sees in the network as it was. Where its outputs in
    eval mode are those of the network before a time step, and the side branches add nothing, they stay the same, and
    those in training mode are as before, too.

    Args:
        model: Model with rep layers.
        batches: Image batches; in a distributed training each process has its own.
        sides: Whether the norms of the side branches are to be measured, or of the origin branches only. The attach
            rate must then be zero.
    """
    origins, side_norms = _meet(unwrapped(model), batches, sides)
    for norm, meter in side_norms:
        if meter.batches:  # what the network does not run keeps what it has
            for statistic, measured in zip(kept_statistics(norm), meter.statistics()):
                statistic.copy_(measured)
    for module, meter in origins:
        if meter.batches:
            module.keep_statistics_(*meter.statistics())
