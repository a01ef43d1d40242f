"""RepVGG's branches (CVPR 2021) for any convolution."""
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

import torch.nn as nn
from timm.models import register_notrace_module
from timm.models.byobnet import RepVggBlock
from torch import Tensor

from .. import kernels
from ..methods import Place, register_method
from .normed import NormedMethod, NormedRepLayer
from .norms import fold_batch_norm
from .repvgg import AnnealedRepVggBlock

__all__ = ['Rep', 'RepConv2d']


@register_notrace_module
class RepConv2d(NormedRepLayer):
    """RepVGG's branches for any KxK: a KxK, a 1x1 and, where the shapes allow it, the identity, with a norm in each.

    There is an identity branch if the input has the output's channels, the stride is one and the size is kept.

    `RepVGG: Making VGG-style ConvNets Great Again` - https://arxiv.org/abs/2101.03697

    Arguments and errors are those of :class:`NormedRepLayer`.
    """

    def _add_side_branches(self, dd: Dict[str, Any], norm_dd: Dict[str, Any]) -> None:
        self.conv_1x1 = self._new_1x1(dd)
        self.norm_1x1 = nn.BatchNorm2d(self.out_channels, **norm_dd)
        self.norm_identity: Optional[nn.BatchNorm2d] = None
        if self.in_channels == self.out_channels and self.stride == (1, 1) and self._centre_offset() == (0, 0):
            self.norm_identity = nn.BatchNorm2d(self.out_channels, **norm_dd)

    def _side_convs(self) -> Dict[str, nn.Conv2d]:
        return dict(conv_1x1=self.conv_1x1)

    def _side_norms(self) -> Tuple[nn.BatchNorm2d, ...]:
        return (self.norm_1x1,) if self.norm_identity is None else (self.norm_1x1, self.norm_identity)

    def _fold_sides(self) -> Dict[str, Tuple[Tensor, Tensor]]:
        sides = dict(conv_1x1=fold_batch_norm(self.conv_1x1.weight, None, self.norm_1x1))
        if self.norm_identity is not None:
            identity = kernels.grouped_identity(
                self.in_channels, self.groups, device=self.conv_1x1.weight.device, dtype=self.conv_1x1.weight.dtype)
            sides['identity'] = fold_batch_norm(identity, None, self.norm_identity)
        return sides

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm_kxk(self.conv_kxk(x))
        side = self.norm_1x1(self.conv_1x1(self._under_centre(x)))
        if self.norm_identity is not None:
            side = side + self.norm_identity(x)
        return self._attached(out, side)


@register_method
@dataclass(frozen=True)
class Rep(NormedMethod):
    """RepVGG's branches for 3x3 and 5x5 convolutions and the norms behind them.

    RepVGG's own blocks are that already: they get an attach rate, and their convolutions stay.
    """

    name = 'rep'
    title = 'REP'
    summary = (
        "RepVGG's blocks run a 1x1 and, where the shapes allow it, the identity beside each 3x3 convolution while "
        'training, each with a batch norm of its own.'
    )
    paper = 'arXiv:2101.03697'
    citation = """@inproceedings{ding2021repvgg,
  title={RepVGG: Making VGG-style ConvNets Great Again},
  author={Ding, Xiaohan and Zhang, Xiangyu and Ma, Ningning and Han, Jungong and Ding, Guiguang and Sun, Jian},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2021}
}"""
    layers = (RepConv2d, AnnealedRepVggBlock)

    def takes(self, place: Place) -> bool:
        return super().takes(place) and not place.is_inside(RepVggBlock)
