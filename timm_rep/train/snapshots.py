"""The weights at the end of each time step, in training form and fused."""
import copy
import logging
from pathlib import Path
from typing import Any, Mapping

import torch.nn as nn

from ..core.fuse import fuse
from ..core.verify import VerificationError
from ..io.checkpoint import take_input_settings
from ..io.weights import save

__all__ = ['DivergedError', 'save_snapshots']

_logger = logging.getLogger('train')  # timm's


class DivergedError(RuntimeError):
    """The weights are not finite any more."""


def save_snapshots(folder: Path, time_step: int, forms: Mapping[str, nn.Module], args: Any) -> None:
    """Keep the weights at the end of a time step: ``time_step-1.safetensors`` of the first, with ``-stock`` fused.

    Args:
        folder: Output folder of the run.
        time_step: The time step that has ended, counted from 0.
        forms: Models in training form by what goes behind the name: '' and '-ema'.
        args: Arguments of the run: the files say what the models were fed with.

    Raises:
        DivergedError: If the weights are not finite.
    """
    for suffix, model in forms.items():
        name = f'time_step-{time_step + 1}{suffix}'
        model = copy.deepcopy(model).eval()
        take_input_settings(model, vars(args), folder)
        try:
            save(model, folder / f'{name}.safetensors', replace=True)
        except VerificationError as e:
            raise DivergedError(f'the training has diverged in time step {time_step + 1} or before: {e}') from None
        save(fuse(model, inplace=True), folder / f'{name}-stock.safetensors', replace=True)
    _logger.info(f'Snapshot of time step {time_step + 1} in {folder}')
