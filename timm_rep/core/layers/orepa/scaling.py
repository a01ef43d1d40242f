"""How the branches of OREPA's layers are scaled: by vectors, and what its Table 3 compares that with."""
from typing import Any, Dict, List, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ...errors import UserError
from ..annealed import OriginPart
from ..base import LinearRepLayer

__all__ = ['SCALINGS', 'ScalingChoice', 'check_scaling']

SCALINGS = ('vector', 'scalar', 'none')


def check_scaling(scaling: Any) -> str:
    """The scaling itself, if it is one.

    Raises:
        UserError: If it is none.
    """
    if scaling not in SCALINGS:
        raise UserError(f"scaling must be {', '.join(map(repr, SCALINGS[:-1]))} or {SCALINGS[-1]!r}, got {scaling!r}")
    return str(scaling)


class ScalingChoice(LinearRepLayer):
    """A linear layer whose branches are scaled by ``scale``, one row for each.

    A row is a vector over output channels, one number, or a constant one, as ``scaling`` says.
    """

    scale: Tensor
    scaling: str

    def _add_scale(self, branches: int, scaling: str, dd: Dict[str, Any]) -> None:
        if scaling == 'none':
            self.register_buffer('scale', torch.ones(branches, 1, **dd), persistent=False)
        else:
            width = self.out_channels if scaling == 'vector' else 1
            self.register_parameter('scale', nn.Parameter(torch.empty(branches, width, **dd)))

    def _fill_constant_scale(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.scaling == 'none':
            self.scale = torch.ones(self.scale.shape, device=device, dtype=dtype)

    def _fill_scale(self, row: int, value: float) -> None:
        if self.scaling != 'none':
            self.scale[row].fill_(value)

    def _scales(self) -> Tensor:
        """``(n, o)``, whatever the scaling is."""
        return self.scale if self.scaling == 'vector' else self.scale.expand(-1, self.out_channels)

    @staticmethod
    def _side_by_side(layers: Sequence['ScalingChoice'], names: Tuple[str, ...]) -> List[Tensor]:
        """Parameters of several layers as those of one with that many times the groups; scales and attach rates last.

        Args:
            layers: Layers of one shape.
            names: Parameters that have the channels of the groups in their first dimension.
        """
        joined = [torch.cat([getattr(layer, name) for layer in layers]) for name in names]
        rates = torch.stack([layer.attach_rate for layer in layers]).repeat_interleave(layers[0].out_channels)
        return [*joined, torch.cat([layer._scales() for layer in layers], dim=1), rates]

    def _scale_of_origin(self) -> List[OriginPart]:
        return [(self.scale, 0)] if isinstance(self.scale, nn.Parameter) else []
