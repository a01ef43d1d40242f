"""How large the gradient of every branch is, noted while a model trains."""
from typing import Any, Dict, List, Tuple

import torch
import torch.nn as nn
from timm.utils import unwrap_model
from torch import Tensor

from .optimizers import has_closure, register_step_hooks, with_closure_then
from .walk import annealed_modules

__all__ = ['BranchLog']


class BranchLog:
    """Gradient magnitudes of all branches, averaged over the updates since the last :meth:`take_rows`.

    They are read before each update of the optimizer, or whenever its closure has made them: averaged over ranks,
    clipped, unscaled (but by optimizers that are fused with the scaling of float16 AMP).

    Args:
        model: Model with rep layers, also in wrappers (DDP, torch.compile).
        optimizer: Its optimizer, also one that holds another (timm's Lookahead, torch's ZeroRedundancyOptimizer).
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self._modules = list(annealed_modules(unwrap_model(model)))
        self._sums: Dict[Tuple[int, str, str], Tensor] = {}
        self._updates = 0
        self._updating: Any = None  # which optimizer is: those that it holds have the same gradients
        self.handles = register_step_hooks(optimizer, self._before, self._after)

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        if self._updating not in (None, optimizer):
            return None
        self._updating = optimizer
        if has_closure(args, kwargs):
            return with_closure_then(self._read, args, kwargs)
        self._read()
        return None

    def _after(self, optimizer: Any, *_: Any) -> None:
        if self._updating is optimizer:
            self._updating = None

    @torch.no_grad()
    def _read(self) -> None:
        gradients = {
            (depth, name, branch): gradient
            for depth, (name, module) in enumerate(self._modules)
            for branch, gradient in module.branch_gradients().items()
        }
        norms = torch._foreach_norm(list(gradients.values())) if gradients else []
        for (key, gradient), norm in zip(gradients.items(), norms):
            rms = norm / gradient.numel() ** 0.5
            self._sums[key] = self._sums[key] + rms if key in self._sums else rms
        self._updates += 1

    def take_rows(self, epoch: int) -> List[Dict[str, Any]]:
        """The magnitudes so far; the log starts anew.

        Args:
            epoch: Epoch to note them under.

        Returns:
            One dict for each branch of each layer: ``epoch``, ``depth`` of the layer, counted from 0 at the input,
            ``layer``, ``branch``, and ``rms``, the root mean square of the elements of its gradient.
        """
        rows = [
            dict(epoch=epoch, depth=depth, layer=layer, branch=branch, rms=total.item() / self._updates)
            for (depth, layer, branch), total in self._sums.items()
        ]
        self._sums, self._updates = {}, 0
        return rows
