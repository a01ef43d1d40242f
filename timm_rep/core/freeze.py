"""Origin branches that stand still while the side branches grow."""
from typing import Any, List, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from .errors import UserError
from .walk import annealed_modules

__all__ = ['OriginFreeze']


class OriginFreeze:
    """Keeps the optimizer from the origin branches of a model as long as :attr:`active` is set.

    Their gradients are dropped right before each update, after clipping, as RepAn's code does: so there is no weight
    decay and no momentum of them either. It works under DDP, which wants gradients of all parameters.

    Args:
        model: Model with rep layers, also in wrappers (DDP, torch.compile).
        optimizer: Its optimizer; timm's Lookahead too.

    Raises:
        UserError: For torch's fused SGD with momentum, which cannot take parameters up later than others; in a step
            with a closure.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.active = False
        self._parts = [part for _, module in annealed_modules(model) for part in module.origin_parameters()]
        self._kept: List[Tuple[Tensor, Any, Tensor]] = []  # parts of parameters, whose rest is trained
        self._optimizer = getattr(optimizer, '_base_optimizer', optimizer)
        if isinstance(self._optimizer, torch.optim.SGD) and any(
                group['fused'] and group['momentum'] for group in self._optimizer.param_groups):
            raise UserError('freeze_origin does not work with fused SGD with momentum; take SGD(..., fused=False)')
        self._optimizer.register_step_pre_hook(self._before)
        self._optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def _before(self, _: Any, args: Any, kwargs: Any) -> None:
        if not self.active:
            return
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            raise UserError(
                'freeze_origin does not work with optimizer.step(closure): the closure makes gradients after they were '
                'dropped. Call it, then step()')
        for parameter, index in self._parts:
            if parameter.grad is None:
                continue
            if index is ...:
                parameter.grad = None
            else:
                parameter.grad[index] = 0.0
                self._kept.append((parameter, index, parameter[index].clone()))

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        for parameter, index, values in self._kept:
            parameter[index] = values
            for name, state in self._optimizer.state[parameter].items():
                if name == 'lookahead_slow_buff':  # weights, not moments
                    continue
                if isinstance(state, Tensor) and state.shape == parameter.shape:
                    state[index] = 0.0  # momentum that weight decay has left
        self._kept = []
