"""Linear layers with an origin kernel and side branches beside it, each ended by a scale over output channels."""
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ..precision import full_float32
from .annealed import OriginPart
from .base import LinearRepLayer, kaiming_uniform_

__all__ = ['ScaledRepLayer']


class ScaledRepLayer(LinearRepLayer):
    """A rep layer with the kernel ``s_0 W + attach_rate * (s_1 side_1 + ...)``; scales are vectors over outputs.

    All scales start at one over the root of the number of branches, so that a fresh kernel is as large as one branch.

    Subclasses make their side branches, call :meth:`_init_branches` in their constructor, and define
    :meth:`_composed` and :meth:`_draw_sides`.
    """

    def _init_branches(
            self,
            branch_names: Tuple[str, ...],
            bias: bool,
            generator: Optional[torch.Generator],
            **dd: Any,
    ) -> None:
        """Make origin, scales and bias, and draw all values; the origin comes first in the names."""
        self.branch_names: Tuple[str, ...] = branch_names
        self.origin = nn.Parameter(torch.empty(self.weight_shape, **dd))
        self.scale = nn.Parameter(torch.empty(len(branch_names), self.out_channels, **dd))
        self._init_bias(bias, **dd)
        self.init_non_persistent_buffers()
        self.reset_parameters(generator)

    def _composed(self, scale: Tensor) -> Tensor:
        """The kernel at the attach rate in force, with these scales ``(n, o)`` in place of the layer's."""
        raise NotImplementedError(f'{type(self).__name__} must define _composed')

    def _draw_sides(self, generator: Optional[torch.Generator]) -> None:
        """Draw the kernels of the side branches."""
        raise NotImplementedError(f'{type(self).__name__} must define _draw_sides')

    def _side_gradients(self) -> Dict[str, Optional[Tensor]]:
        """The gradient of each side branch's kernel, by name."""
        raise NotImplementedError(f'{type(self).__name__} must define _side_gradients')

    def _compose(self, channels_last: bool) -> Tensor:
        return self._composed(self.scale)

    @torch.no_grad()
    def branch_kernels(self) -> Dict[str, Tensor]:
        """The kernel that each branch adds to the sum, with its scale and the attach rate.

        Returns:
            A kernel ``(o, i/g, kh, kw)`` for each branch; they add up to :meth:`compose_weight`.
        """
        kernels_of: Dict[str, Tensor] = {}
        with full_float32():
            for row, name in enumerate(self.branch_names):
                only = torch.zeros_like(self.scale)
                only[row] = self.scale[row]
                kernels_of[name] = self._composed(only)
        return kernels_of

    def branch_gradients(self) -> Dict[str, Tensor]:
        gradients = dict(origin=self.origin.grad, **self._side_gradients())
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}

    def origin_parameters(self) -> List[OriginPart]:
        return [(self.origin, ...), (self.scale, 0)]

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw all branches afresh: kaiming-uniform kernels, scales as the class says.

        Args:
            generator: Source of the draw.
        """
        kaiming_uniform_(self.origin, self.origin[0].numel(), generator=generator)
        self.scale[0].fill_(self._initial_scale())
        self._reset_annealing()
        self.redraw_side_branches_(generator)
        self._reset_bias(generator)

    @torch.no_grad()
    def redraw_side_branches_(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw all branches but the origin afresh, kernels and scales.

        Args:
            generator: Source of the draw.
        """
        self._draw_sides(generator)
        self.scale[1:].fill_(self._initial_scale())

    def _initial_scale(self) -> float:
        return len(self.branch_names) ** -0.5

    @torch.no_grad()
    def clear_origin_(self) -> Tensor:
        self.scale[0].fill_(1.0)
        return self.origin.zero_()
