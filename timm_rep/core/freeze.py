"""Origin branches that stand still while the side branches grow."""
from typing import Any, Dict, List, Tuple

import torch
import torch.nn as nn
from timm.optim import Adahessian, RMSpropTF
from torch import Tensor

from .errors import UserError
from .optimizers import optimizers_in, register_step_hooks, reset_optimizer, with_closure_then
from .sharded import is_sharded
from .walk import annealed_modules

__all__ = ['OriginFreeze']

# They count steps, but what they do in one does not follow from how many there were.
COUNT_WITHOUT_EFFECT = (
    torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.ASGD, torch.optim.RMSprop, torch.optim.Rprop, RMSpropTF)


def _state_of(optimizer: Any, parameter: Tensor) -> Dict[str, Tensor]:
    """What an optimizer holds for each value of a parameter."""
    state = optimizer.state.get(parameter, {})
    return {
        name: value for name, value in state.items() if isinstance(value, Tensor) and value.shape == parameter.shape}


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
        optimizer: Its optimizer, also one that holds others (timm's Lookahead, torch's ZeroRedundancyOptimizer, Muon
            and AdamW in one).

    Raises:
        UserError: For torch's fused SGD with momentum, which cannot take parameters up later than others; for
            parameters that are sharded, or not all trained by this one.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        if is_sharded(model):
            raise UserError('freeze_origin does not work with parameters that are spread over processes (fully_shard)')
        self.active = False
        self._parts = [part for _, module in annealed_modules(model) for part in module.origin_parameters()]
        # by optimizer, during an update, of parts of parameters, whose rest is trained: their values, and its state
        self._kept: Dict[int, List[Tuple[Tensor, Any, Tensor, Dict[str, Tensor]]]] = {}
        self._optimizer, self._optimizers = optimizer, optimizers_in(optimizer)
        sgd_groups = [g for one in self._optimizers if isinstance(one, torch.optim.SGD) for g in one.param_groups]
        if any(group['fused'] and group['momentum'] for group in sgd_groups):
            raise UserError('freeze_origin does not work with fused SGD with momentum; take SGD(..., fused=False)')
        known = {id(p) for one in self._optimizers for group in one.param_groups for p in group['params']}
        if any(parameter.requires_grad and id(parameter) not in known for parameter, _ in self._parts):
            raise UserError(
                'freeze_origin keeps one optimizer from the origin branches, and this one does not have all of them: '
                'another one would move them. Give it all that is trained')
        self.handles = register_step_hooks(optimizer, self._before, self._after)

    def thaw(self) -> None:
        """Let the optimizer take up the origin branches, which were frozen since it was new, as new parameters.

        One that corrects its first steps by their number (Adam) would take far too large ones: it has counted those of
        the side branches in the same parameter. So it begins anew with such parameters, and, if it counts for all
        together (LAMB, Adan), with all of them.
        """
        if any('step' in group for one in self._optimizers for group in one.param_groups):
            reset_optimizer(self._optimizer)
        for one in self._optimizers:
            if isinstance(one, COUNT_WITHOUT_EFFECT):
                continue
            for parameter, index in self._parts:
                if index is not ... and 'step' in one.state.get(parameter, ()):
                    del one.state[parameter]
                    if isinstance(one, Adahessian):  # as it begins in its constructor
                        one.state[parameter]['hessian step'] = 0

    def _drop_gradients(self) -> None:
        for parameter, index in self._parts:
            if parameter.grad is None:
                continue
            if index is ...:
                parameter.grad = None
            else:
                parameter.grad[index] = 0.0

    @torch.no_grad()
    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        if not self.active:
            return None
        self._drop_gradients()
        self._kept[id(optimizer)] = [
            (parameter, index, parameter[index].clone(), {
                name: value[index].clone() for name, value in _state_of(optimizer, parameter).items()})
            for parameter, index in self._parts if index is not ...]
        return with_closure_then(self._drop_gradients, args, kwargs)

    @torch.no_grad()
    def _after(self, optimizer: Any, *_: Any) -> None:
        for parameter, index, values, held in self._kept.pop(id(optimizer), ()):
            parameter[index] = values
            for name, state in _state_of(optimizer, parameter).items():
                if name in held:
                    state[index] = held[name]
                elif name == 'momentum_buffer':  # new, but for what weight decay has left
                    state[index] = 0.0
