"""Gradient accumulation that composes once per update, not once per micro-batch."""
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Iterator, List

import torch.nn as nn

from .errors import UserError
from .layers import LinearRepLayer
from .layers.update import UpdateKernels
from .walk import rep_layers

__all__ = ['check_no_update', 'micro_batch']


def check_no_update(model: nn.Module) -> None:
    """Raise a UserError if a model is in the middle of an update, so that writing to it would lose gradients."""
    for _, layer in rep_layers(model):
        if isinstance(layer, LinearRepLayer) and layer._update is not None:
            layer._update.forget(layer)


def _update_of(layers: List[LinearRepLayer], model: nn.Module) -> UpdateKernels:
    """The update that the layers are in the middle of, or a new one."""
    updates = {id(layer._update): layer._update for layer in layers}
    for update in updates.values():
        if update is not None and update.is_open:
            raise UserError('a micro-batch of this model is being computed already; one cannot begin inside another')
    begun = [update for update in updates.values() if update is not None and not _is_over(update, model)]
    if len(begun) > 1 or (begun and len(updates) > 1):
        raise UserError('some layers of the model are in the middle of an update and others are not; was it begun with '
                        'a part of the model, or with another one that shares layers with it?')
    return begun[0] if begun else UpdateKernels()


def _is_over(update: UpdateKernels, model: nn.Module) -> bool:
    """Whether an update was given up: its gradients were cleared."""
    if update.is_empty():
        return True
    if update.is_broken:
        if any(p.grad is not None and bool(p.grad.any()) for p in model.parameters()):
            raise UserError('a micro-batch of this update ended in an error; clear the gradients with zero_grad() and '
                            'begin the update anew')
        return True
    update.check()
    return False


def _check_wrapper(model: nn.Module) -> None:
    if isinstance(model, nn.DataParallel):
        raise UserError('DataParallel copies the layers at every forward; use DistributedDataParallel')
    if any(hasattr(module, 'set_requires_gradient_sync') or type(module).__name__ == 'FullyShardedDataParallel'
           for module in model.modules()):
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
        last: Whether this is the last micro-batch before a step of the optimizer. It uses every layer that those before
            it used.

    Raises:
        UserError: If weights or gradients were changed in the middle of an update (cleared gradients begin it anew),
            after an error without clearing them, inside another micro-batch of the model, or for DataParallel, FSDP and
            second derivatives. The optimizer's step raises it too, in the middle of an update.
    """
    _check_wrapper(model)
    layers = [layer for _, layer in rep_layers(model) if isinstance(layer, LinearRepLayer)]
    with ExitStack() as contexts:
        if not last:
            module: Any
            for module in model.modules():
                if hasattr(module, 'no_sync'):
                    contexts.enter_context(module.no_sync())
        with _kernels_shared(model, layers, last) if layers else nullcontext():
            yield


@contextmanager
def _kernels_shared(model: nn.Module, layers: List[LinearRepLayer], last: bool) -> Iterator[None]:
    update = _update_of(layers, model)
    for layer in layers:
        layer._update = update
    update.begin(last)
    try:
        yield
    finally:
        update.is_open = False
    update.is_broken = False
    if last:
        for layer in layers:
            vars(layer).pop('_update', None)  # as it was; TorchScript would take None for an attribute of its own
        _finish(update, model)
    elif update.is_used:
        update.note_gradients()
    else:
        warnings.warn('micro_batch: no kernel was shared; compiled layers compose at every micro-batch', stacklevel=4)


def _finish(update: UpdateKernels, model: nn.Module) -> None:
    """See to it that all gradients have arrived."""
    owing = update.owing()
    if owing and (update.is_outdated() or any(hasattr(module, 'no_sync') for module in model.modules())):
        names = [name for name, layer in rep_layers(model) if layer in owing]
        raise UserError(
            f'{", ".join(names)} had no part in the last micro-batch of an update, so what they learnt from those '
            'before was lost: compose at every micro-batch, without this context')
    if owing:
        update.pay()
    update.end()
