"""Asymmetric Convolution Block of ACNet (ICCV 2019)."""
from dataclasses import dataclass
from typing import Any, Dict, Tuple

import torch.nn as nn
from timm.models import register_notrace_module
from torch import Tensor

from ..errors import UserError
from ..methods import register_method
from .fixed import BranchConv2d
from .normed import NormedMethod, NormedRepLayer, crop
from .norms import fold_batch_norm

__all__ = ['ACB', 'AsymmetricConv2d']


@register_notrace_module
class AsymmetricConv2d(NormedRepLayer):
    """Asymmetric Convolution Block: a KxK, a 1xK and a Kx1, a batch norm behind each.

    `ACNet: Strengthening the Kernel Skeletons` - https://arxiv.org/abs/1908.03930

    Arguments and errors are those of :class:`NormedRepLayer`; both sides of the kernel must be larger than one.
    """

    def _add_side_branches(self, dd: Dict[str, Any], norm_dd: Dict[str, Any]) -> None:
        height, width = self.kernel_size
        if height == 1 or width == 1:
            raise UserError(f'AsymmetricConv2d needs a kernel larger than 1 each way, got {self.kernel_size}')
        off_h, off_w = self._centre_offset()
        row = dict(kernel_size=(1, width), padding=(max(off_h, 0), self.padding[1]))
        column = dict(kernel_size=(height, 1), padding=(self.padding[0], max(off_w, 0)))
        self.conv_1xk = BranchConv2d(**dict(self._geometry(), **row), bias=False, **dd)
        self.norm_1xk = nn.BatchNorm2d(self.out_channels, **norm_dd)
        self.conv_kx1 = BranchConv2d(**dict(self._geometry(), **column), bias=False, **dd)
        self.norm_kx1 = nn.BatchNorm2d(self.out_channels, **norm_dd)

    def _side_convs(self) -> Dict[str, nn.Conv2d]:
        return dict(conv_1xk=self.conv_1xk, conv_kx1=self.conv_kx1)

    def _side_norms(self) -> Tuple[nn.BatchNorm2d, ...]:
        return self.norm_1xk, self.norm_kx1

    def _fold_sides(self) -> Dict[str, Tuple[Tensor, Tensor]]:
        return dict(
            conv_1xk=fold_batch_norm(self.conv_1xk.weight, None, self.norm_1xk),
            conv_kx1=fold_batch_norm(self.conv_kx1.weight, None, self.norm_kx1),
        )

    def forward(self, x: Tensor) -> Tensor:
        off_h, off_w = self._centre_offset()
        out = self.norm_kxk(self.conv_kxk(x))
        side = self.norm_1xk(self.conv_1xk(crop(x, max(-off_h, 0), 0)))
        side = side + self.norm_kx1(self.conv_kx1(crop(x, 0, max(-off_w, 0))))
        return self._attached(out, side)


@register_method
@dataclass(frozen=True)
class ACB(NormedMethod):
    """Asymmetric convolution blocks for 3x3 and 5x5 convolutions and the norms behind them."""

    name = 'acb'
    title = 'ACB'
    summary = (
        'ACB runs a 1x3 and a 3x1 beside each 3x3 convolution while training, each with a batch norm of its own.'
    )
    paper = 'arXiv:1908.03930'
    citation = """@inproceedings{ding2019acnet,
  title={ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks},
  author={Ding, Xiaohan and Guo, Yuchen and Ding, Guiguang and Han, Jungong},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2019}
}"""
    layers = (AsymmetricConv2d,)
