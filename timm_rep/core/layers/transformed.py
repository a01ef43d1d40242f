"""Linear layers whose one side branch is a learnt change of the origin kernel, which starts at no change."""
from typing import Any, Dict, List, Optional

import torch
import torch.nn as nn
from torch import Tensor

from .annealed import OriginPart
from .base import LinearRepLayer, kaiming_uniform_

__all__ = ['TransformedRepLayer']


class TransformedRepLayer(LinearRepLayer):
    """A rep layer with the kernel ``W + attach_rate * residual(W)``, the residual being linear in the origin ``W``.

    The residual starts at zero, so that a fresh layer is the plain convolution, and a time step sets it to zero again.
    Since it acts on the origin, no origin makes up for it whatever it holds: :meth:`restore_` clears it, and then the
    kernel is the origin, bit by bit.

    Subclasses call :meth:`_init_branches` in their constructor and define ``_compose``.
    """

    branch_names = ('origin', 'residual')

    origin: Tensor
    residual: Tensor

    def _init_branches(
            self,
            origin: Tensor,
            residual: Tensor,
            bias: bool,
            generator: Optional[torch.Generator],
            **dd: Any,
    ) -> None:
        """Take both parts, of which a parameter is trained and any other tensor is only saved, and draw them."""
        for name, tensor in dict(origin=origin, residual=residual).items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        self._init_bias(bias, **dd)
        self.reset_parameters(generator)

    @torch.no_grad()
    def branch_kernels(self) -> Dict[str, Tensor]:
        """The origin, and what the residual makes of it at the attach rate in force; they add up to the kernel."""
        return dict(origin=self.origin.clone(), residual=self.compose_weight() - self.origin)

    def branch_gradients(self) -> Dict[str, Tensor]:
        gradients = {name: getattr(self, name).grad for name in self.branch_names}
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}

    def origin_parameters(self) -> List[OriginPart]:
        return [(self.origin, ...)] if isinstance(self.origin, nn.Parameter) else []

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw the origin kaiming-uniform, and set the residual to zero.

        Args:
            generator: Source of the draw.
        """
        kaiming_uniform_(self.origin, self.origin[0].numel(), generator=generator)
        self._reset_annealing()
        self.redraw_side_branches_(generator)
        self._reset_bias(generator)

    @torch.no_grad()
    def redraw_side_branches_(self, generator: Optional[torch.Generator] = None) -> None:
        """Set the residual to zero, where it starts.

        Args:
            generator: Not used.
        """
        self.residual.zero_()

    @torch.no_grad()
    def clear_origin_(self) -> Tensor:
        self.residual.zero_()
        return self.origin.zero_()
