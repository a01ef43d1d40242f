"""The tensors of an authors' checkpoint, each of which must find its place."""
import math
from typing import List, Mapping, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from ..core.errors import UserError
from ..core.layers import NormedRepLayer
from ..models.checkpoint_filter import first_names

__all__ = ['Source', 'Weights', 'is_folded']

Weights = Mapping[str, Tensor]

# What an entry of a constant may differ by, in float32 and in half precision.
CONSTANT_ATOL, HALF_CONSTANT_ATOL = 1e-6, 1e-2


def is_folded(tensors: Weights) -> bool:
    """Whether these are of a deploy file: no norm is left in them."""
    return not any(name.endswith('running_mean') for name in tensors)


class Source:
    """The tensors of a checkpoint, all of which must be taken.

    What is missing, left over or of another shape comes out at the end: until then a tensor that is not there is zeros,
    so that one pass finds all that is wrong.

    Args:
        tensors: The authors' state dict.
        label: What to call it in messages.
        architecture: Of the model that takes the tensors.

    Attributes:
        architecture: As given.
        is_folded: As :func:`is_folded` says.

    Raises:
        UserError: If a tensor is complex, quantized, sparse or without values.
    """

    def __init__(self, tensors: Weights, label: str, architecture: str) -> None:
        self._tensors = tensors
        self._left = set(tensors)
        self._label = label
        self.architecture = architecture
        self.is_folded = is_folded(tensors)
        self._missing: List[str] = []
        self._misfits: List[str] = []
        for name, value in tensors.items():
            if value.is_meta or value.is_complex() or value.is_quantized or value.layout != torch.strided:
                raise self.refusal(f'{name} is not a plain tensor of real numbers')

    def has(self, start: str) -> bool:
        """Whether a name begins so."""
        return any(name.startswith(start) for name in self._tensors)

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor that must be there, of this shape."""
        value = self.take_optional(name)
        if value is None:
            self._missing.append(name)
        elif tuple(value.shape) != tuple(shape):
            self._misfits.append(f'{name} has shape {tuple(value.shape)}, the model takes {tuple(shape)}')
        else:
            return value
        return torch.zeros(tuple(shape))

    def take_optional(self, name: str) -> Optional[Tensor]:
        """A tensor, or None."""
        self._left.discard(name)
        return self._tensors.get(name)

    def take_count(self, name: str) -> int:
        """A number of batches; 0 if it is not there, since old checkpoints do not count."""
        value = self.take_optional(name)
        if value is None:
            return 0
        if value.numel() == 1 and 0 <= value.item() < math.inf:
            return int(value)
        self._misfits.append(f'{name} is not a number of batches')
        return 0

    def fill(self, tensor: Tensor, name: str) -> None:
        """Overwrite a tensor of the model."""
        tensor.copy_(self.take(name, tensor.shape))

    def fill_norm(self, norm: nn.BatchNorm2d, name: str) -> None:
        """Overwrite a batch norm of the model."""
        for kind in ('weight', 'bias', 'running_mean', 'running_var'):
            self.fill(getattr(norm, kind), f'{name}.{kind}')
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(self.take_count(f'{name}.num_batches_tracked'))

    def fill_branches(self, layer: NormedRepLayer, prefix: str, names: Mapping[str, str]) -> None:
        """Overwrite the convolutions and norms of a layer.

        Args:
            layer: Of the model.
            prefix: Name of the block in the checkpoint.
            names: What the checkpoint calls each part of the layer; a part that this layer has not is left out.
        """
        for name, theirs in names.items():
            part = getattr(layer, name)
            if isinstance(part, nn.Conv2d):
                self.fill(part.weight, f'{prefix}.{theirs}.weight')
            elif part is not None:
                self.fill_norm(getattr(part, 'norm', part), f'{prefix}.{theirs}')

    def check_constant(self, name: str, expected: Tensor) -> None:
        """A constant that we compute: if the checkpoint has it, it must be ours."""
        value = self.take_optional(name)
        if value is None:
            return
        atol = CONSTANT_ATOL if value.dtype in (torch.float32, torch.float64) else HALF_CONSTANT_ATOL
        if value.shape != expected.shape or not torch.allclose(value.double(), expected.double(), rtol=0.0, atol=atol):
            self._misfits.append(f'the constant {name} is another than that of the published code')

    def refusal(self, reason: str) -> UserError:
        """The error for a checkpoint that is not one of the architecture."""
        return UserError(f'{self._label} does not hold official weights of {self.architecture}; {reason}')

    def check_all_taken(self) -> None:
        """Raise if anything was missing, of another shape, or is left over."""
        if self._missing or self._left:
            raise self.refusal('; '.join(
                f'{what}: {first_names(names)}'
                for what, names in (('missing', self._missing), ('not expected', sorted(self._left))) if names
            ))
        if self._misfits:
            raise self.refusal(self._misfits[0])
