"""Kernels composed once per update where timm's train.py accumulates gradients."""
from typing import Any, Iterator

import torch.nn as nn

from ..core.micro_batch import micro_batch

__all__ = ['MicroBatches']


class MicroBatches:
    """timm's loader; while a batch is trained on, it is a micro-batch of an update.

    Batches at the end that fill no update of their own are handed on as they are.

    Args:
        loader: timm's, of micro-batches.
        model: What is trained, without wrappers.
        steps: Micro-batches of an update.
    """

    def __init__(self, loader: Any, model: nn.Module, steps: int) -> None:
        self._loader = loader
        self._model = model
        self._steps = steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        full = len(self) - len(self) % self._steps
        for number, batch in enumerate(self._loader, 1):
            if number > full:
                yield batch
                continue
            with micro_batch(self._model, last=number % self._steps == 0):
                yield batch
