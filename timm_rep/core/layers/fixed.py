"""Modules whose parts were made for one geometry, so that it cannot be changed on the module."""
from typing import Any

import torch.nn as nn

from ..errors import UserError
from .base import GEOMETRY

__all__ = ['FixedGeometry']


class FixedGeometry(nn.Module):
    """A convolution look-alike whose parts have the geometry, which it only tells: writing another one is refused.

    A plain convolution can be given another stride, padding or dilation, or a bias, at any time.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in (*GEOMETRY, 'bias') and name in vars(self):
            own = vars(self)[name]
            if (value, value) != own and (isinstance(value, nn.Parameter) or value != own):
                raise UserError(
                    f'{name} of a {type(self).__name__} cannot be changed, its branches were made with {own}: change '
                    'the plain convolution, before expand or after fuse')
        super().__setattr__(name, value)
