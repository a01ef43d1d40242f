"""Optimizers that begin anew, also those that hold others."""
import itertools
from typing import Any, List

import torch
from timm.optim import Adahessian

__all__ = ['optimizers_in', 'optimizers_that_step', 'reset_optimizer']


def _held_by(optimizer: Any) -> List[Any]:
    values = getattr(optimizer, '__dict__', {}).values()
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in values]
    return [part for part in itertools.chain(*lists) if isinstance(part, torch.optim.Optimizer)]


def optimizers_in(optimizer: Any) -> List[Any]:
    """An optimizer and those that it holds, and so on.

    timm's Lookahead holds one, torch's ZeroRedundancyOptimizer and PostLocalSGDOptimizer do, and those of SAM; one made
    of several, such as Muon and AdamW, holds all of them.

    Args:
        optimizer: Any optimizer of torch or timm, or a wrapper of some.
    """
    found = [optimizer]
    for holder in found:
        found += [held for held in _held_by(holder) if not any(held is known for known in found)]
    return found


def optimizers_that_step(optimizer: Any) -> List[Any]:
    """Those of :func:`optimizers_in` that hold no other: they make the updates."""
    return [one for one in optimizers_in(optimizer) if not _held_by(one)]


def reset_optimizer(optimizer: Any) -> None:
    """Let an optimizer start anew with the parameters, learning rate and settings that it has.

    More than ``optimizer.state.clear()``: some of timm's optimizers (LAMB, Adan) count their steps elsewhere,
    AdaHessian cannot make its state anew, and some (Lookahead, ZeroRedundancyOptimizer) hold another optimizer.

    Args:
        optimizer: Any optimizer of torch or timm.
    """
    for holder in optimizers_in(optimizer):
        holder.state.clear()
        for group in holder.param_groups:
            group.pop('step', None)
            if 'lookahead_step' in group:
                group['lookahead_step'] = 0
        if isinstance(holder, Adahessian):  # its state begins in its constructor
            holder.generator = torch.Generator().manual_seed(holder.seed)
            for parameter in holder.get_params():
                parameter.hess = 0.0
                holder.state[parameter]['hessian step'] = 0
