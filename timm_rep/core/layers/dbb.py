"""Diverse Branch Block (CVPR 2021)."""
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor

from .. import kernels
from ..composition import needs_plain_formula
from ..errors import UserError
from ..methods import register_method
from .fixed import BranchConv2d
from .normed import NormedMethod, NormedRepLayer
from .norms import fold_batch_norm, is_frozen, kept_statistics

__all__ = ['DBB', 'DiverseBranchConv2d', 'NormPad2d']

# Statistics that the two passes of a checkpoint have moved agree up to these, unless they are of two batches.
SAME_RTOL, SAME_ATOL = 1e-5, 1e-7


class NormPad2d(nn.Module):
    """Batch norm, then pad with the norm's image of zero by the kept statistics.

    So the border holds what a convolution of the zero-padded input would have put there, and a KxK convolution or an
    average pooling behind it folds exactly. As in the authors' code it is made of the statistics that this very batch
    has moved.

    Gradient checkpointing passes a batch twice. The second pass starts from the statistics that the first one found,
    and leaves those that it left, so that outputs, gradients and statistics are those without checkpointing. It raises
    a UserError if the first was not the module's last pass in training mode, as with two forwards before a backward.
    Code made by ``torch.compile`` or TorchScript cannot tell the passes apart, and gives other gradients if it is
    checkpointed: take one or the other.
    """

    def __init__(self, channels: int, padding: Tuple[int, int], **kwargs: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, **kwargs)
        self.padding = padding
        self._found: Optional[Dict[str, Tensor]] = None  # buffers of the norm before the last pass in training mode

    @torch.jit.unused
    def _normalize(self, x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """The norm's outputs, and the statistics kept after them."""
        norm = self.norm
        if norm.running_mean is None:  # torch.func's replace_all_batch_norm_modules_
            var, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
            return norm(x), mean, var
        traced = not isinstance(x, Tensor) or torch.compiler.is_compiling() or needs_plain_formula(x)
        if traced or not norm.training or is_frozen(norm):
            outputs = norm(x)
            return (outputs, *kept_statistics(norm))
        if torch._C._current_graph_task_id() == -1:
            self._found = {name: buffer.clone() for name, buffer in norm.named_buffers()}
            outputs = norm(x)
            return (outputs, *kept_statistics(norm))
        # inside a backward: the second pass of a checkpoint
        found, self._found = self._found, None
        if found is not None:
            outputs = torch.func.functional_call(norm, found, (x,))
            mean, var = found['running_mean'], found['running_var']
            if all(torch.allclose(a, b, SAME_RTOL, SAME_ATOL) for a, b in zip((mean, var), kept_statistics(norm))):
                return outputs, mean, var
        raise UserError(
            'gradient checkpointing of DBB layers needs a backward right after each forward in training mode: their '
            'border is made of the running statistics, which another pass has moved since. Keep to that, or call '
            'model.set_grad_checkpointing(False)'
        )

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if torch.jit.is_scripting():
            outputs, mean, var = norm(x), norm.running_mean, norm.running_var
        else:
            outputs, mean, var = self._normalize(x)
        zero = torch.zeros_like(norm.weight).reshape(1, -1, 1, 1)
        border = F.batch_norm(zero, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps).detach().type_as(x)
        pad_h, pad_w = self.padding
        padded = F.pad(outputs, [pad_w, pad_w, pad_h, pad_h])
        height, width = padded.shape[2:]
        with torch.no_grad():  # no gradient comes to the border: what it overwrites is no part of any
            for strip in (
                    padded[:, :, :pad_h], padded[:, :, height - pad_h:],
                    padded[..., :pad_w], padded[..., width - pad_w:]):
                strip.copy_(border.expand_as(strip))
        return padded


@register_notrace_module
class DiverseBranchConv2d(NormedRepLayer):
    """Diverse Branch Block: the baseline of both papers, four branches on feature maps, a batch norm in each.

    Origin ``conv_kxk``; a 1x1; a 1x1 then average pooling; a 1x1 (identity plus a learnt residual) then KxK. The norm
    between two stages pads with its own image of zero, so that folding is exact at the border. A depthwise block has
    no 1x1 branch, pools its input directly and has twice the inner channels.

    `Diverse Branch Block: Building a Convolution as an Inception-like Unit` - https://arxiv.org/abs/2103.13425

    Arguments and errors are those of :class:`NormedRepLayer`.
    """

    if TYPE_CHECKING:
        seq_identity: Tensor

    def _add_side_branches(self, dd: Dict[str, Any], norm_dd: Dict[str, Any]) -> None:
        in_channels, out_channels, groups = self.in_channels, self.out_channels, self.groups
        depthwise = in_channels == out_channels == groups
        inner = 2 * in_channels if depthwise else in_channels

        self.conv_1x1: Optional[nn.Conv2d] = None
        self.norm_1x1: Optional[nn.BatchNorm2d] = None
        self.avg_conv: Optional[nn.Conv2d] = None
        self.avg_inner_norm: Optional[NormPad2d] = None
        if not depthwise:
            self.conv_1x1 = self._new_1x1(dd)
            self.norm_1x1 = nn.BatchNorm2d(out_channels, **norm_dd)
            self.avg_conv = BranchConv2d(in_channels, out_channels, 1, groups=groups, bias=False, **dd)
            self.avg_inner_norm = NormPad2d(out_channels, self.padding, **norm_dd)
        self.avg_norm = nn.BatchNorm2d(out_channels, **norm_dd)

        self.seq_1x1 = nn.Parameter(torch.empty(inner, in_channels // groups, 1, 1, **dd))
        self.seq_inner_norm = NormPad2d(inner, self.padding, **norm_dd)
        self.seq_kxk = BranchConv2d(**dict(self._geometry(), in_channels=inner, padding=0), bias=False, **dd)
        self.seq_norm = nn.BatchNorm2d(out_channels, **norm_dd)
        self.register_buffer('seq_identity', torch.empty(inner, in_channels // groups, 1, 1, **dd), persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Fill the identity that the inner 1x1 is added to."""
        device = self._device_of_constant(self.seq_identity, self.seq_1x1)
        identity = kernels.grouped_identity(self.in_channels, self.groups, device=device, dtype=self.seq_1x1.dtype)
        identity = identity.unflatten(0, (self.groups, -1))
        ratio = self.seq_1x1.shape[0] // self.in_channels
        self.seq_identity = identity.repeat(1, ratio, 1, 1, 1).flatten(0, 1)

    def _seq_kernel(self) -> Tensor:
        return self.seq_1x1 + self.seq_identity.to(self.seq_1x1.dtype)  # weights may be assigned one by one

    def _side_convs(self) -> Dict[str, nn.Conv2d]:
        convs = dict(conv_1x1=self.conv_1x1, average=self.avg_conv, sequential=self.seq_kxk)
        return {name: conv for name, conv in convs.items() if conv is not None}

    def _side_norms(self) -> Tuple[nn.BatchNorm2d, ...]:
        norms = (self.norm_1x1, self.avg_norm, self.seq_norm)
        return tuple(norm for norm in norms if norm is not None)

    def _inner_norms(self) -> Tuple[nn.BatchNorm2d, ...]:
        norms = (self.avg_inner_norm, self.seq_inner_norm)
        return tuple(padded.norm for padded in norms if padded is not None)

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw all branches afresh with the initial values of ``nn.Conv2d``, and reset all norms.

        Args:
            generator: Source of the draw.
        """
        super().reset_parameters(generator)
        self.seq_1x1.zero_()

    @torch.no_grad()
    def redraw_side_branches_(self, generator: Optional[torch.Generator] = None) -> None:
        super().redraw_side_branches_(generator)
        self.seq_1x1.zero_()

    def _fold_sides(self) -> Dict[str, Tuple[Tensor, Tensor]]:
        height, width = self.kernel_size
        sides: Dict[str, Tuple[Tensor, Tensor]] = {}
        first, first_bias = fold_batch_norm(self._seq_kernel(), None, self.seq_inner_norm.norm)
        second, bias = fold_batch_norm(self.seq_kxk.weight, None, self.seq_norm)
        kernel = kernels.merge_sequential(first, second, self.groups)
        sides['sequential'] = kernel, bias + kernels.merge_sequential_bias(first_bias, second, self.groups)

        average = kernels.average_kernel((height, width), device=kernel.device, dtype=kernel.dtype)
        inner_bias: Optional[Tensor] = None
        if self.avg_conv is not None and self.avg_inner_norm is not None:
            pointwise, inner_bias = fold_batch_norm(self.avg_conv.weight, None, self.avg_inner_norm.norm)
            average = kernels.merge_pointwise_depthwise(pointwise, average)
        else:
            average = average.expand(self.out_channels, -1, -1, -1)
        sides['average'] = fold_batch_norm(average, inner_bias, self.avg_norm)

        if self.conv_1x1 is not None and self.norm_1x1 is not None:
            sides['conv_1x1'] = fold_batch_norm(self.conv_1x1.weight, None, self.norm_1x1)
        return sides

    def _average(self, x: Tensor) -> Tensor:
        if self.dilation == (1, 1):
            return F.avg_pool2d(x, self.kernel_size, self.stride)
        weight = torch.full(
            [x.shape[1], 1, self.kernel_size[0], self.kernel_size[1]],
            1.0 / (self.kernel_size[0] * self.kernel_size[1]), device=x.device, dtype=x.dtype)
        return F.conv2d(x, weight, None, self.stride, 0, self.dilation, x.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        pad_h, pad_w = self.padding
        out = self.norm_kxk(self.conv_kxk(x))

        mixed = F.conv2d(x, self._seq_kernel(), None, 1, 0, 1, self.groups)
        side = self.seq_norm(self.seq_kxk(self.seq_inner_norm(mixed)))

        if self.avg_conv is not None and self.avg_inner_norm is not None:
            padded = self.avg_inner_norm(self.avg_conv(x))
        else:
            padded = F.pad(x, [pad_w, pad_w, pad_h, pad_h])
        side = side + self.avg_norm(self._average(padded))

        if self.conv_1x1 is not None and self.norm_1x1 is not None:
            side = side + self.norm_1x1(self.conv_1x1(self._under_centre(x)))
        return self._attached(out, side)


@register_method
@dataclass(frozen=True)
class DBB(NormedMethod):
    """Diverse branch blocks for 3x3 and 5x5 convolutions and the norms behind them."""

    name = 'dbb'
    title = 'DBB'
    summary = (
        'DBB runs four branches (3x3, 1x1, 1x1-3x3, 1x1-average pooling) in place of each 3x3 convolution while '
        'training, each with batch norms of its own.'
    )
    paper = 'arXiv:2103.13425'
    citation = """@inproceedings{ding2021diverse,
  title={Diverse Branch Block: Building a Convolution as an Inception-like Unit},
  author={Ding, Xiaohan and Zhang, Xiangyu and Han, Jungong and Ding, Guiguang},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2021}
}"""
    layers = (DiverseBranchConv2d,)
