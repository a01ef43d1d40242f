"""Batch norms: what they keep, how they fold into the convolution before them, and what holds the place of one."""
import copy
from typing import Any, Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models import register_notrace_module
from torch import Tensor

from .. import kernels
from ..errors import UserError

# What a norm has and a folded one has not.
NORM_STATE = ('weight', 'bias', 'running_mean', 'running_var', 'eps', 'num_features', 'momentum')

FOLDABLE = (nn.BatchNorm2d, BatchNormAct2d, nn.SyncBatchNorm, SyncBatchNormAct)
FORWARDS = {cls.forward for cls in FOLDABLE}

__all__ = [
    'FoldedNorm', 'check_batch_norm', 'count_anew_', 'fold_batch_norm', 'is_foldable', 'is_fresh', 'is_frozen',
    'is_norm', 'kept_statistics', 'plain_batch_norm', 'reset_norm_', 'synchronized_as',
]


def is_norm(module: Optional[nn.Module], channels: int) -> bool:
    """Whether a module is a norm of so many channels: of a batch, a group, a layer, or with fixed statistics."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features == channels
    weight = getattr(module, 'weight', None)
    named = 'norm' in type(module).__name__.lower()  # timm and torchvision have many without a class in common
    return named and isinstance(weight, Tensor) and tuple(weight.shape) == (channels,)


def is_foldable(norm: Optional[nn.Module]) -> bool:
    """Whether a layer can take this norm in and give it back: a batch norm with nothing but its own state."""
    return type(norm) in FOLDABLE


def synchronized_as(norm: nn.Module, module: nn.Module) -> Any:
    """The module, its batch norms synchronized over processes if the norm is."""
    return convert_sync_batchnorm(module, norm.process_group) if isinstance(norm, nn.SyncBatchNorm) else module


def kept_statistics(norm: nn.BatchNorm2d) -> Tuple[Tensor, Tensor]:
    """Running mean and variance of a batch norm.

    Args:
        norm: Batch norm.

    Returns:
        Mean and variance, both ``(o,)``.

    Raises:
        UserError: If the norm keeps none.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise UserError(f'a batch norm with running statistics is needed, got {norm}')
    return norm.running_mean, norm.running_var


def check_batch_norm(norm: nn.Module, alone: bool = False) -> None:
    """Raise a UserError if a module, put in the place of a batch norm, cannot be folded.

    Args:
        norm: The module.
        alone: Whether it is nothing else (an activation, a forward of its own), and what it is folds all of it.
    """
    needed = ('weight', 'bias', 'running_mean', 'running_var', 'eps')
    more = alone and (
        any(not isinstance(part, nn.Identity) for name, part in norm.named_children() if name != 'parametrizations')
        or (not is_frozen(norm) and type(norm).forward not in FORWARDS))
    if more or any(getattr(norm, name, None) is None for name in needed):
        raise UserError(
            f'a batch norm with gain, bias and running statistics is needed, got {norm}: change the norms of the plain '
            'network, before expand or after fuse')


def fold_batch_norm(kernel: Tensor, bias: Optional[Tensor], norm: nn.BatchNorm2d) -> Tuple[Tensor, Tensor]:
    """:func:`timm_rep.kernels.fold_norm` with the values of a module, in float32 at least.

    Args:
        kernel: ``(o, i/g, h, w)``.
        bias: ``(o,)`` or None.
        norm: Batch norm with running statistics.

    Returns:
        Kernel and bias; float32 for half-precision values.
    """
    check_batch_norm(norm)
    dtype = torch.float64 if kernel.dtype == torch.float64 else torch.float32
    mean, var, gamma, beta = (v.to(dtype) for v in (*kept_statistics(norm), norm.weight, norm.bias))
    return kernels.fold_norm(
        kernel.to(dtype), None if bias is None else bias.to(dtype), mean, var, gamma, beta, norm.eps)


def is_frozen(norm: nn.Module) -> bool:
    """Whether this is what timm's ``freeze_batch_norm_2d`` leaves of a batch norm: its values, none to be trained."""
    return not isinstance(norm, nn.modules.batchnorm._BatchNorm)


@torch.no_grad()
def plain_batch_norm(norm: Any) -> nn.BatchNorm2d:
    """A batch norm in eval mode with the values of a synchronized or frozen one; timm's RepVGG block folds no other."""
    plain = nn.BatchNorm2d(len(norm.weight), norm.eps, device=norm.weight.device, dtype=norm.weight.dtype)
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
        getattr(plain, name).copy_(getattr(norm, name))
    return plain.eval()


def count_anew_(norm: nn.BatchNorm2d) -> None:
    """Let a norm with cumulative averages (no momentum) forget how many batches it saw: its input is another one."""
    if getattr(norm, 'momentum', 0.0) is None and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.zero_()


def is_fresh(norm: nn.BatchNorm2d) -> Tensor:
    """Whether a norm, also a frozen one, has seen no batch yet; a tensor, which may be on meta."""
    mean, var = kept_statistics(norm)
    return (mean == 0).all() & (var == 1).all()


@torch.no_grad()
def reset_norm_(norm: nn.BatchNorm2d) -> None:
    """Set a batch norm, also a frozen one, to gain one, bias zero, mean zero and variance one."""
    if not is_frozen(norm):
        norm.reset_parameters()
        return
    mean, var = kept_statistics(norm)
    for zero, one in ((norm.bias, norm.weight), (mean, var)):
        zero.zero_()
        one.fill_(1.0)


@register_notrace_module
class FoldedNorm(nn.Module):
    """Keeps the place, and the dropout and activation, of a batch norm that went into the layer before it.

    Args:
        norm: Plain batch norm, or timm's batch norm with activation.
        is_far: Whether the layer that took it in is not right in front of it in the same module.

    Raises:
        UserError: For another norm.
    """

    def __init__(self, norm: nn.Module, is_far: bool = False) -> None:
        super().__init__()
        self.is_far = is_far
        if not is_foldable(norm):
            raise UserError(f'a plain BatchNorm2d or BatchNormAct2d can be folded, got {norm}')
        # copies, since the norm may stay in a model that is expanded as a copy
        acts: Any = norm if isinstance(norm, (BatchNormAct2d, SyncBatchNormAct)) else None  # others do not call theirs
        self.drop: Optional[nn.Module] = copy.deepcopy(getattr(acts, 'drop', None))
        self.act: Optional[nn.Module] = copy.deepcopy(getattr(acts, 'act', None))
        self.train(norm.training)

    def __getattr__(self, name: str) -> Any:
        if name in NORM_STATE:  # of foreign code that folds norms
            raise AttributeError(
                f'FoldedNorm has no {name!r}: the norm lives in the rep layer in front of it. For the network with '
                'live norms, call timm_rep.fuse(model) first'
            )
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        if self.drop is not None:
            x = self.drop(x)
        return x if self.act is None else self.act(x)

    def unfolded(self, norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
        """A batch norm of the class that was here, with the values of another one.

        Args:
            norm: As :meth:`NormedRepLayer.fuse_conv_norm` returns it.

        Returns:
            The norm itself, or timm's with copies of the dropout and activation.
        """
        if self.act is None:
            return norm
        norm_act: Any = BatchNormAct2d(norm.num_features, norm.eps, apply_act=False).to(norm.weight)
        if is_frozen(norm):
            norm_act = freeze_batch_norm_2d(norm_act)
        else:
            norm_act.momentum = norm.momentum
            if norm.num_batches_tracked is None:
                norm_act.num_batches_tracked = None
        norm_act.load_state_dict(norm.state_dict())
        for name, parameter in norm.named_parameters():
            norm_act.get_parameter(name).requires_grad_(parameter.requires_grad)
        norm_act.drop, norm_act.act = copy.deepcopy(self.drop), copy.deepcopy(self.act)
        norm_act = synchronized_as(norm, norm_act)
        return norm_act.train(norm.training)
