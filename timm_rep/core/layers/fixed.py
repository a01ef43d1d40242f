"""Modules whose parts were made for one geometry, so that it cannot be changed on the module; what was put on one."""
import inspect
from typing import Any, List

import torch.nn as nn

from ..errors import UserError
from .base import GEOMETRY

__all__ = ['BranchConv2d', 'FixedGeometry', 'own_methods']

# What accelerate leaves on a module whose forward it has wrapped: to move it between devices, or for autocast.
ACCELERATE = {'_hf_hook', '_original_forward'}
OWN_PACKAGE = __name__.partition('.')[0] + '.'


def own_methods(module: nn.Module) -> List[str]:
    """Names of the methods of its class that others were put in place of on a module itself.

    Not those that this package puts there, nor a forward that accelerate has wrapped: it computes the same.
    """
    found = []
    for name, value in vars(module).items():
        method = getattr(type(module), name, None)
        if callable(value) and callable(method) and not type(value).__module__.startswith(OWN_PACKAGE):
            wrapped = inspect.unwrap(value) if ACCELERATE & vars(module).keys() else value
            if getattr(wrapped, '__func__', wrapped) is not inspect.unwrap(method):
                found.append(name)
    return found


class FixedGeometry(nn.Module):
    """A convolution look-alike whose parts have the geometry, which it only tells: writing another one is refused.

    A plain convolution can be given another stride, padding or dilation, or a bias, at any time. Of a host,
    the settings of its rule are told, too.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        told = vars(self) if name in (*GEOMETRY, 'bias') else vars(self).get('stock_settings', {})
        if name in told:
            own = told[name]
            if (value, value) == own:
                value = own
            if isinstance(value, nn.Parameter) or value != own:
                raise UserError(
                    f'{name} of a {type(self).__name__} cannot be changed, branches were made with {own}: change '
                    'the plain convolution, before expand or after fuse')
        super().__setattr__(name, value)


class BranchConv2d(FixedGeometry, nn.Conv2d):
    """A convolution that is a branch, or a part of one: it folds by the geometry that it was made with."""
