"""Gradient accumulation that composes once per update, not once per micro-batch."""
import warnings
from contextlib import contextmanager, nullcontext
from typing import Any, ContextManager, Iterator, List

import torch.nn as nn

from .errors import UserError
from .layers import LinearRepLayer
from .layers.update import UpdateKernels
from .walk import rep_layers

__all__ = ['micro_batch']


def _update_of(layers: List[LinearRepLayer]) -> UpdateKernels:
    """The update that the layers are in the middle of, or a new one."""
    known = {id(layer._update): layer._update for layer in layers}
    update = layers[0]._update
    if len(known) > 1:
        raise UserError('some layers of the model are in the middle of an update and others are not; was it begun with '
                        'a part of the model, or with another one that shares layers with it?')
    return UpdateKernels() if update is None else update


def _check(update: UpdateKernels, model: nn.Module) -> None:
    if update.is_open:
        raise UserError('a micro-batch of this model is being computed already; one cannot begin inside another')
    if update.is_outdated():
        raise UserError(
            'the weights were changed in the middle of an update: the last micro-batch before a step of the optimizer '
            'needs last=True')
    if update.is_broken:
        if any(p.grad is not None and bool(p.grad.any()) for p in model.parameters()):
            raise UserError('a micro-batch of this update ended in an error; clear the gradients with zero_grad() and '
                            'begin the update anew')


def _check_wrapper(model: nn.Module) -> None:
    if isinstance(model, nn.DataParallel):
        raise UserError('DataParallel copies the layers at every forward; use DistributedDataParallel')
    if any(hasattr(module, 'set_requires_gradient_sync') for module in model.modules()):
        raise UserError('kernels of layers that FSDP has sharded cannot be shared by micro-batches')


@contextmanager
def micro_batch(model: nn.Module, last: bool) -> Iterator[None]:
    """Context for forward and backward of one micro-batch, in which kernels are composed once per update.

    Accumulating gradients over several micro-batches composes the same kernels for each of them. Inside this context
    all convolve with what was composed for the first one, and the last one hands the sum of the kernels' gradients to
    the branches: same gradients, up to rounding, at a fraction of the cost. It concerns linear layers (OREPA); others,
    compiled ones too, do what they always do.

    >>> import timm, torch, timm_rep
    >>> model = timm.create_model('orepa_resnet18_cifar')
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> batches = torch.randn(4, 2, 3, 32, 32)
    >>> for number, images in enumerate(batches, 1):
    ...     with timm_rep.micro_batch(model, last=number == len(batches)):
    ...         (model(images).square().mean() / len(batches)).backward()
    >>> optimizer.step()

    Of DistributedDataParallel, gradients are exchanged in the last micro-batch only (its ``no_sync``).

    Args:
        model: Model, also in DistributedDataParallel.
        last: Whether this is the last micro-batch before a step of the optimizer; it may have one backward.

    Raises:
        UserError: If the update before had no last micro-batch, if weights or gradients were changed in the middle of
            an update (cleared gradients begin it anew), after an error without clearing them, inside another
            micro-batch of the model, or for DataParallel, FSDP and second derivatives.
    """
    _check_wrapper(model)
    layers = [layer for _, layer in rep_layers(model) if isinstance(layer, LinearRepLayer)]
    no_sync: Any = None if last else getattr(model, 'no_sync', None)
    exchange: ContextManager[Any] = nullcontext() if no_sync is None else no_sync()
    if not layers:
        with exchange:
            yield
        return
    update = _update_of(layers)
    _check(update, model)
    if update.is_broken:
        update = UpdateKernels()
    update.check_gradients()
    for layer in layers:
        layer._update = update
    update.is_open, update.is_last, update.is_broken = True, last, True
    try:
        with exchange:
            yield
    finally:
        update.is_open = False
    update.is_broken = False
    if last:
        for layer in layers:
            layer._update = None
        _finish(update, model)
    elif update:
        update.note_gradients()
    else:
        warnings.warn('micro_batch: no kernel was shared; compiled layers compose at every micro-batch', stacklevel=3)


def _finish(update: UpdateKernels, model: nn.Module) -> None:
    """See to it that all gradients have arrived."""
    owing = update.owing()
    if not owing:
        return
    if update.is_outdated() or hasattr(model, 'no_sync'):
        names = [name for name, layer in rep_layers(model) if layer in owing]
        raise UserError(
            f'{", ".join(names)} had no part in the last micro-batch of an update, so what they learnt from those '
            'before was lost: compose at every micro-batch, without this context')
    update.pay()
