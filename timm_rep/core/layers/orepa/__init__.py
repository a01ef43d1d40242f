"""OREPA: linear branches, each ended by a scale over output channels, composed into one kernel at every step.

`Online Convolutional Re-parameterization` - https://arxiv.org/abs/2204.00826 (CVPR 2022)
"""
import math
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple, Type

import torch.nn as nn
from timm.models.byobnet import RepVggBlock
from timm.models.resnet import BasicBlock

from ...errors import UserError
from ...methods import Method, Place, register_method
from ..base import LinearRepLayer
from .kxk import OrepaConv2d
from .pointwise import OrepaPointwiseConv2d
from .stem import OrepaStemConv2d

__all__ = ['Orepa', 'OrepaConv2d', 'OrepaPointwiseConv2d', 'OrepaStemConv2d']

# Kernels of this size and larger become a stack of 3x3 blocks in ungrouped stems (official code).
STEM_KERNEL_SIZE = 7
# Share of the KxK parameters in convolutions with a norm right behind them, from which on the paper's choice is kept.
PAIRED_SHARE = 0.5
# Share of the 1x1 in the parameters of all convolutions from which on they are taken too, where that is not so.
POINTWISE_SHARE = 0.25


@register_method
@dataclass(frozen=True)
class Orepa(Method):
    """OREPA blocks for KxK convolutions, Rep-1x1 for 1x1 ones, a squeezed stack of 3x3 blocks for large square ones.

    By default it takes the convolutions with a norm right behind them; of a RepVGG block only the KxK branch, and not
    the shortcuts of a ResNet BasicBlock. That is the choice of the official networks. In a network where such
    convolutions hold less than half of the parameters of all KxK ones, it takes every KxK; and if the 1x1 hold at least
    a quarter of the parameters of all convolutions, every 1x1 but the classifier.

    Source: OREPA Section 3.

    Args:
        branch_1x1: Have the plain 1x1 branch in KxK layers; None for the paper's choice: not in RepVGG's blocks, which
            have one of their own.
        negative_slope: ``a`` of the kaiming-uniform draw of KxK layers; None for the paper's: 1 in RepVGG's blocks,
            else 0.
    """

    name = 'orepa'
    title = 'OREPA'
    summary = (
        'OREPA composes the kernel of each convolution from linear branches at every training step (up to six for a '
        '3x3: plain, average pooling, frequency prior, 1x1-3x3, 1x1, depthwise separable), each with a learnt scale '
        'for every output channel; the one norm comes behind their sum. The branches never see an image, so '
        'training costs little more than that of the plain network.'
    )
    paper = 'arXiv:2204.00826'
    citation = """@inproceedings{hu2022online,
  title={Online Convolutional Re-parameterization},
  author={Hu, Mu and Feng, Junyi and Hua, Jiashen and Lai, Baisheng and Huang, Jianqiang and Gong, Xiaojin and
    Hua, Xian-Sheng},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2022}
}"""
    layers = (OrepaConv2d, OrepaPointwiseConv2d, OrepaStemConv2d)

    branch_1x1: Optional[bool] = None
    negative_slope: Optional[float] = None

    def __post_init__(self) -> None:
        if not isinstance(self.branch_1x1, (bool, type(None))):
            raise UserError(f'branch_1x1 must be True, False or None, got {self.branch_1x1!r}')
        slope = self.negative_slope
        if isinstance(slope, bool) or not (slope is None or (isinstance(slope, (int, float)) and math.isfinite(slope))):
            raise UserError(f'negative_slope must be a finite number or None, got {slope!r}')

    @classmethod
    def of_layer(cls, layer: nn.Module) -> 'Orepa':
        if not isinstance(layer, OrepaConv2d):
            return cls()
        return cls(branch_1x1='conv_1x1' in layer.branch_names, negative_slope=layer.negative_slope)

    def takes(self, place: Place) -> bool:
        if place.is_inside(RepVggBlock):
            return place.norm is not None and place.name.endswith('conv_kxk.conv')
        if place.is_inside(BasicBlock) and 'downsample' in place.name.split('.'):
            return False
        if place.norm is not None:
            return True
        if place.shares.paired >= PAIRED_SHARE:
            return False
        if place.conv.kernel_size == (1, 1):
            return place.shares.pointwise >= POINTWISE_SHARE and not place.is_classifier
        return True

    def layer_for(self, place: Place) -> Tuple[Type[LinearRepLayer], Dict[str, Any]]:
        height, width = place.conv.kernel_size
        in_repvgg = place.is_inside(RepVggBlock)
        if (height, width) == (1, 1):
            return OrepaPointwiseConv2d, {}
        if height == width >= STEM_KERNEL_SIZE and place.conv.groups == 1 and not in_repvgg:
            return OrepaStemConv2d, {}
        branch_1x1, negative_slope = (False, 1.0) if in_repvgg else (True, 0.0)
        return OrepaConv2d, dict(
            branch_1x1=branch_1x1 if self.branch_1x1 is None else self.branch_1x1,
            negative_slope=negative_slope if self.negative_slope is None else self.negative_slope,
        )
