"""The tensors of an authors' checkpoint, each of which must find its place."""
from typing import Any, List, Mapping, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from ..core.errors import UserError
from ..core.layers import NormedRepLayer
from ..io.checkpoint import dtype_fits
from ..models.checkpoint_filter import first_names

__all__ = ['Source', 'Weights', 'is_folded']

Weights = Mapping[str, Tensor]

# What an entry of a constant may differ by, in half precision too; those of another formula are far off.
CONSTANT_ATOL = 1e-2


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
    """

    def __init__(self, tensors: Weights, label: str, architecture: str) -> None:
        self._tensors = tensors
        self._left = set(tensors)
        self._label = label
        self.architecture = architecture
        self.is_folded = is_folded(tensors)
        self._missing: List[str] = []
        self._misfits: List[str] = []

    def has(self, start: str) -> bool:
        """Whether a name begins so."""
        return any(name.startswith(start) for name in self._tensors)

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor that must be there, of this shape, for one of this type."""
        value = self.take_optional(name)
        if value is None:
            self._missing.append(name)
        elif tuple(value.shape) != tuple(shape):
            self._misfits.append(f'{name} has shape {tuple(value.shape)}, the model takes {tuple(shape)}')
        elif not dtype_fits(dtype, value.dtype):
            self._misfits.append(f'{name} is {value.dtype}, the model takes {dtype}')
        else:
            return value
        return torch.zeros(tuple(shape))

    def take_optional(self, name: str) -> Optional[Tensor]:
        """A tensor, or None."""
        self._left.discard(name)
        return self._tensors.get(name)

    def fill(self, tensor: Tensor, name: str) -> None:
        """Overwrite a tensor of the model."""
        tensor.copy_(self.take(name, tensor.shape, tensor.dtype))

    def fill_weight_bias(self, layer: Any, name: str) -> None:
        """Overwrite what a layer or norm learns."""
        self.fill(layer.weight, f'{name}.weight')
        self.fill(layer.bias, f'{name}.bias')

    def fill_norm(self, norm: Any, name: str) -> None:
        """Overwrite a batch norm of the model; old checkpoints do not count its batches."""
        self.fill_weight_bias(norm, name)
        self.fill(norm.running_mean, f'{name}.running_mean')
        self.fill(norm.running_var, f'{name}.running_var')
        if norm.num_batches_tracked is not None and self.has(f'{name}.num_batches_tracked'):
            self.fill(norm.num_batches_tracked, f'{name}.num_batches_tracked')

    def fill_branches(self, layer: NormedRepLayer, prefix: str, names: Mapping[str, str]) -> None:
        """Overwrite the convolutions and norms of a layer, by what the block of that prefix calls each of them."""
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
        if value.shape != expected.shape or not torch.allclose(value.double(), expected, rtol=0, atol=CONSTANT_ATOL):
            self._misfits.append(f'the constant {name} is another than that of the published code')

    def refusal(self, reason: str) -> UserError:
        """The error for a checkpoint that is not one of the architecture."""
        return UserError(f'{self._label} does not hold official weights of {self.architecture}; {reason}')

    def check_all_taken(self) -> None:
        """Raise if anything was missing, of another shape, or is left over."""
        if self._missing or self._left:
            raise self.refusal('; '.join(
                f'{what}: {first_names(names)}'
                for what, names in (('missing', self._missing), ('not expected', self._left)) if names
            ))
        if self._misfits:
            raise self.refusal(self._misfits[0])
