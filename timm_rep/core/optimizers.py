"""Optimizers that begin anew, also those that hold another one."""
from typing import Any, List

import torch
from timm.optim import Adahessian

__all__ = ['optimizers_in', 'reset_optimizer']


def optimizers_in(optimizer: Any) -> List[Any]:
    """An optimizer and the one that it holds, and so on; the last one makes the updates.

    timm's Lookahead holds one, torch's ZeroRedundancyOptimizer and PostLocalSGDOptimizer do, and those of SAM.

    Args:
        optimizer: Any optimizer of torch or timm, or a wrapper of one.
    """
    found = [optimizer]
    while True:
        held = [value for value in vars(found[-1]).values() if isinstance(value, torch.optim.Optimizer)]
        if not held or held[0] in found:
            return found
        found.append(held[0])


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
