"""Optimizers that begin anew and are watched, also those that hold others."""
import functools
from collections.abc import Mapping
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
from timm.optim import Adahessian
from torch.utils.hooks import RemovableHandle

__all__ = ['has_closure', 'optimizers_in', 'register_step_hooks', 'reset_optimizer', 'with_closure_then']


def _optimizers_among(values: Any) -> Iterator[Any]:
    """Optimizers among values, also in lists and dicts of them."""
    for value in values:
        if isinstance(value, torch.optim.Optimizer):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _optimizers_among(value)
        elif isinstance(value, Mapping):
            yield from _optimizers_among(value.values())


def optimizers_in(optimizer: Any) -> List[Any]:
    """An optimizer and those that it holds, and so on.

    timm's Lookahead holds one, torch's ZeroRedundancyOptimizer and PostLocalSGDOptimizer do, and those of SAM; one made
    of several, such as Muon and AdamW, holds all of them.

    Args:
        optimizer: Any optimizer of torch or timm, or a wrapper of some.
    """
    found = [optimizer]
    for holder in found:
        attributes = (value for name, value in getattr(holder, '__dict__', {}).items() if name != 'state')
        found += [held for held in _optimizers_among(attributes) if not any(held is known for known in found)]
    return found


def register_step_hooks(
        optimizer: Any, before: Callable[..., Any], after: Callable[..., Any]) -> List[RemovableHandle]:
    """Have functions called around each update of an optimizer and of those that it holds.

    Which of them makes the update nobody can tell from outside: a wrapper may leave all of it to another one, or some.

    Args:
        optimizer: Any optimizer of torch or timm, or a wrapper of some.
        before: Hook of torch's ``register_step_pre_hook``.
        after: Hook of torch's ``register_step_post_hook``.

    Returns:
        What removes them again.
    """
    handles = []
    for one in optimizers_in(optimizer):
        if hasattr(one, '_optimizer_step_pre_hooks'):  # a wrapper may do without
            handles += [one.register_step_pre_hook(before), one.register_step_post_hook(after)]
    return handles


def has_closure(args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> bool:
    """Whether an update makes its gradients itself, going by the arguments of ``step``."""
    return any(map(callable, (*args, *kwargs.values())))


def with_closure_then(
        function: Callable[[], Any], args: Tuple[Any, ...], kwargs: Dict[str, Any],
) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
    """Arguments of ``step`` whose closure, if there is one, calls a function when it has made the gradients."""
    def followed(argument: Any) -> Any:
        if not callable(argument):
            return argument

        @functools.wraps(argument)
        def closure(*args: Any, **kwargs: Any) -> Any:
            loss = argument(*args, **kwargs)
            function()
            return loss

        return closure

    return tuple(map(followed, args)), {name: followed(value) for name, value in kwargs.items()}


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
