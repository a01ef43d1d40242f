"""Origin branches that stand still while the side branches grow."""
from typing import Any, Dict, List, Tuple

import torch
import torch.nn as nn
from timm.optim import Adahessian, RMSpropTF
from torch import Tensor

from .errors import UserError
from .optimizers import optimizers_that_step, reset_optimizer
from .sharded import is_sharded
from .walk import annealed_modules

__all__ = ['OriginFreeze']

# They count steps, but what they do in one does not follow from how many there were.
COUNT_WITHOUT_EFFECT = (
    torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.ASGD, torch.optim.RMSprop, torch.optim.Rprop, RMSpropTF)


class OriginFreeze:
    """Keeps the optimizer from the origin branches of a model as long as :attr:`active` is set.

    Their gradients are dropped right before each update, after clipping, as RepAn's code does: so there is no weight
    decay and no momentum of them either. It works under DDP, which wants gradients of all parameters.

    Where the origin branch is a part of a parameter (OREPA), that part and its part of the optimizer's state are put
    back after each update. If it was frozen from a new optimizer on, then after :meth:`thaw` it goes on as with a new
    one. That is exact where each value is updated by itself: SGD, Adam and its relatives, Lion, Rprop, Adagrad,
    RMSprop. Nearly so are ASGD and an Adagrad whose learning rate falls, which go by the steps that were taken, timm's
    RMSpropTF, whose mean of squares has fallen by one step, and Adagrad or RMSprop with weight decay, of which the
    first update leaves its square. Optimizers that normalize by a whole parameter (LAMB, LARS, Muon, Adafactor) see
    its parts together, in every epoch.

    Args:
        model: Model with rep layers, also in wrappers (DDP, torch.compile).
        optimizer: Its optimizer, also one that holds another (timm's Lookahead, torch's ZeroRedundancyOptimizer).

    Raises:
        UserError: For torch's fused SGD with momentum, which cannot take parameters up later than others; for
            parameters that are sharded, or not all trained by this one; for several in one; in a step with a closure.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        if is_sharded(model):
            raise UserError('freeze_origin does not work with parameters that are spread over processes (fully_shard)')
        self.active = False
        self._parts = [part for _, module in annealed_modules(model) for part in module.origin_parameters()]
        # parts of parameters, whose rest is trained: their values, and those of the state
        self._kept: List[Tuple[Tensor, Any, Tensor, Dict[str, Tensor]]] = []
        self._outer = optimizer
        self._optimizer, *others = optimizers_that_step(optimizer)
        if others:
            raise UserError(
                f'freeze_origin keeps one optimizer from the origin branches, and {type(optimizer).__name__} holds '
                'several')
        if isinstance(self._optimizer, torch.optim.SGD) and any(
                group['fused'] and group['momentum'] for group in self._optimizer.param_groups):
            raise UserError('freeze_origin does not work with fused SGD with momentum; take SGD(..., fused=False)')
        known = {id(parameter) for group in optimizer.param_groups for parameter in group['params']}
        if any(parameter.requires_grad and id(parameter) not in known for parameter, _ in self._parts):
            raise UserError(
                'freeze_origin keeps one optimizer from the origin branches, and this one does not have all of them: '
                'another one would move them. Give it all that is trained')
        self._optimizer.register_step_pre_hook(self._before)
        self._optimizer.register_step_post_hook(self._after)

    def thaw(self) -> None:
        """Let the optimizer take up the origin branches, which were frozen since it was new, as new parameters.

        One that corrects its first steps by their number (Adam) would take far too large ones: it has counted those of
        the side branches in the same parameter. So it begins anew with such parameters, and, if it counts for all
        together (LAMB, Adan), with all of them.
        """
        if any('step' in group for group in self._optimizer.param_groups):
            reset_optimizer(self._outer)
        if isinstance(self._optimizer, COUNT_WITHOUT_EFFECT):
            return
        for parameter, index in self._parts:
            if index is not ... and 'step' in self._optimizer.state.get(parameter, ()):
                del self._optimizer.state[parameter]
                if isinstance(self._optimizer, Adahessian):  # as it begins in its constructor
                    self._optimizer.state[parameter]['hessian step'] = 0

    def _state_of(self, parameter: Tensor) -> Dict[str, Tensor]:
        """What the optimizer holds for each value of a parameter."""
        state = self._optimizer.state.get(parameter, {})
        return {
            name: value for name, value in state.items()
            if isinstance(value, Tensor) and value.shape == parameter.shape
        }

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
                held = {name: value[index].clone() for name, value in self._state_of(parameter).items()}
                self._kept.append((parameter, index, parameter[index].clone(), held))

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        for parameter, index, values, held in self._kept:
            parameter[index] = values
            for name, state in self._state_of(parameter).items():
                if name in held:
                    state[index] = held[name]
                elif name == 'momentum_buffer':  # new, but for what weight decay has left
                    state[index] = 0.0
        self._kept = []
