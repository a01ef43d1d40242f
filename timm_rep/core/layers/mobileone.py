"""MobileOne's branches: several kernels side by side, a 1x1 and a scale, with scales in place of norms."""
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import register_notrace_module
from timm.models.byobnet import RepVggBlock
from torch import Tensor

from .. import kernels
from ..errors import UserError
from ..methods import Method, Place, register_method
from ..precision import sheltered
from .base import RepLayer, kaiming_uniform_
from .fixed import BranchConv2d
from .normed import NormedRepLayer, is_foldable_pair
from .norms import fold_batch_norm
from .scaled import ScaledRepLayer

__all__ = ['MobileOne', 'MobileOneConv2d', 'NormedMobileOneConv2d']

COPIES = 4  # of MobileOne-S0
MAX_COPIES = 64  # a file says how many


def check_copies(copies: Any) -> None:
    """Raise a UserError if this is no number of kernels side by side."""
    if isinstance(copies, bool) or not isinstance(copies, int) or not 1 <= copies <= MAX_COPIES:
        raise UserError(f'copies must be an integer from 1 to {MAX_COPIES}, got {copies!r}')


def mobileone_kernel(
        origin: Tensor,
        scale: Tensor,
        attach_rate: Tensor,
        copies: Optional[Tensor],
        conv_1x1: Optional[Tensor],
        identity: Optional[Tensor],
) -> Tensor:
    """A kernel, more of its kind, a 1x1 and the identity, each with a scale (MobileOne, Section 3.3).

    Args:
        origin: ``(o, i/g, kh, kw)``.
        scale: One row for each branch in this order, ``(n, o)``.
        attach_rate: 0-dim, multiplies all but the origin.
        copies: One after another, ``(c*o, i/g, kh, kw)``, if there are any.
        conv_1x1: ``(o, i/g, 1, 1)``, if there is one.
        identity: Constant ``(o, i/g, 1, 1)``, if there is that branch.

    Returns:
        ``(o, i/g, kh, kw)``.
    """
    kernel = origin * scale[0].reshape(-1, 1, 1, 1)
    gains = (scale * attach_rate).reshape(scale.shape[0], -1, 1, 1, 1)
    row = 1
    if copies is not None:
        several = copies.reshape(-1, origin.shape[0], origin.shape[1], origin.shape[2], origin.shape[3])
        row += several.shape[0]
        kernel = kernel + (several * gains[1:row]).sum(0)
    centre: Optional[Tensor] = None
    if conv_1x1 is not None:
        centre = conv_1x1 * gains[row]
        row += 1
    if identity is not None:
        skip = identity * gains[row]
        centre = skip if centre is None else centre + skip
    if centre is not None:
        pad_h, pad_w = origin.shape[2] // 2, origin.shape[3] // 2
        kernel = kernel + F.pad(centre, [pad_w, pad_w, pad_h, pad_h])
    return kernel


_mobileone_kernel = sheltered(mobileone_kernel)
# A symbolic trace records this call as it is.
torch.fx.wrap('_mobileone_kernel')


@register_notrace_module
class MobileOneConv2d(ScaledRepLayer):
    """MobileOne's block without norms: several KxK side by side, a 1x1, and a scale of the input, all with scales.

    There is a 1x1 beside a kernel that is larger, and a scale of the input where that has the output's channels and the
    stride is one.

    `MobileOne: An Improved One millisecond Mobile Backbone` - https://arxiv.org/abs/2206.04040

    The paper has a batch norm in each branch (:class:`NormedMobileOneConv2d`); here every branch ends in a scale, so
    that a step composes one kernel.

    Args:
        in_channels: As of :class:`torch.nn.Conv2d`, like all up to ``padding_mode``, which is only ``'zeros'``.
        kernel_size: Height and width, odd.
        copies: How many KxK there are, the origin among them.
        generator: Source of the initial draw.

    Raises:
        UserError: For a number of copies that is none, or that leaves the origin alone, an even kernel, a padding mode
            other than zeros, or channels that the groups do not divide.
    """

    copies: Optional[nn.Parameter]
    conv_1x1: Optional[nn.Parameter]
    identity: Optional[Tensor]

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Union[int, Tuple[int, int]],
            stride: Union[int, Tuple[int, int]] = 1,
            padding: Union[str, int, Tuple[int, int]] = 0,
            dilation: Union[int, Tuple[int, int]] = 1,
            groups: int = 1,
            bias: bool = True,
            padding_mode: str = 'zeros',
            copies: int = COPIES,
            generator: Optional[torch.Generator] = None,
            device: Any = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device=device)
        check_copies(copies)
        pointwise, skip = self.kernel_size != (1, 1), in_channels == out_channels and self.stride == (1, 1)
        if copies == 1 and not pointwise and not skip:
            raise UserError('a 1x1 convolution with copies=1 has no branch beside it where channels or stride change')
        dd: Dict[str, Any] = dict(device=device, dtype=dtype)
        # of four dimensions, or channels-last could not be asked for
        kxk = torch.empty((copies - 1) * out_channels, *self.weight_shape[1:], **dd)
        centre = torch.empty(*self.weight_shape[:2], 1, 1, **dd)
        self.register_parameter('copies', nn.Parameter(kxk) if copies > 1 else None)
        self.register_parameter('conv_1x1', nn.Parameter(centre) if pointwise else None)
        self.register_buffer('identity', torch.empty_like(centre) if skip else None, persistent=False)
        names = ['origin', *(f'copy_{n}' for n in range(1, copies))]
        names += ['conv_1x1'] * pointwise + ['skip'] * skip
        self._init_branches(tuple(names), bias, generator, **dd)

    def _number_of_copies(self) -> int:
        return 1 if self.copies is None else len(self.copies) // self.out_channels + 1

    def _own_kwargs(self) -> Dict[str, Any]:
        return dict(super()._own_kwargs(), copies=self._number_of_copies())

    def init_non_persistent_buffers(self) -> None:
        """Fill the identity; float32 or float64."""
        if self.identity is not None:
            dtype = torch.float64 if self.origin.dtype == torch.float64 else torch.float32
            device = self._device_of_constant(self.identity, self.origin)
            self.identity = kernels.grouped_identity(self.in_channels, self.groups, device=device, dtype=dtype)

    def _draw_sides(self, generator: Optional[torch.Generator]) -> None:
        for kxk in () if self.copies is None else self.copies.split(self.out_channels):
            kaiming_uniform_(kxk, kxk[0].numel(), generator=generator)
        if self.conv_1x1 is not None:
            kaiming_uniform_(self.conv_1x1, self.conv_1x1.shape[1], generator=generator)

    def _side_gradients(self) -> Dict[str, Optional[Tensor]]:
        gradients: Dict[str, Optional[Tensor]] = {}
        if self.copies is not None and self.copies.grad is not None:
            several = self.copies.grad.split(self.out_channels)
            gradients.update((f'copy_{n}', gradient) for n, gradient in enumerate(several, 1))
        if self.conv_1x1 is not None:
            gradients['conv_1x1'] = self.conv_1x1.grad
        return gradients

    def _composed(self, scale: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return mobileone_kernel(
                self.origin, scale, self.attach_rate.to(scale.dtype), self.copies, self.conv_1x1, self.identity)
        return _mobileone_kernel(
            self.origin, scale, self.attach_rate, self.copies, self.conv_1x1, self.identity)


@register_notrace_module
class NormedMobileOneConv2d(NormedRepLayer):
    """MobileOne's block with the paper's batch norm in each branch, for kernels larger than 1x1.

    There is a scale of the input, here a batch norm, if it has the output's channels, the stride is one and the size is
    kept. Arguments and errors are those of :class:`NormedRepLayer`, and ``copies`` of :class:`MobileOneConv2d`.
    """

    def __init__(self, *args: Any, copies: int = COPIES, **kwargs: Any) -> None:
        check_copies(copies)
        self.copies = copies  # for what the constructor calls
        super().__init__(*args, **kwargs)

    def _own_kwargs(self) -> Dict[str, Any]:
        return dict(super()._own_kwargs(), copies=self.copies)

    def _add_side_branches(self, dd: Dict[str, Any], norm_dd: Dict[str, Any]) -> None:
        beside = range(1, self.copies)
        self.copy_convs = nn.ModuleList([BranchConv2d(**self._geometry(), bias=False, **dd) for _ in beside])
        self.copy_norms = nn.ModuleList([nn.BatchNorm2d(self.out_channels, **norm_dd) for _ in beside])
        self.conv_1x1 = self._new_1x1(dd)
        self.norm_1x1 = nn.BatchNorm2d(self.out_channels, **norm_dd)
        self.norm_skip: Optional[nn.BatchNorm2d] = None
        if self.in_channels == self.out_channels and self.stride == (1, 1) and self._centre_offset() == (0, 0):
            self.norm_skip = nn.BatchNorm2d(self.out_channels, **norm_dd)

    def _side_convs(self) -> Dict[str, Any]:
        return dict({f'copy_{n}': conv for n, conv in enumerate(self.copy_convs, 1)}, conv_1x1=self.conv_1x1)

    def _side_norms(self) -> Tuple[Any, ...]:
        norms = (*self.copy_norms, self.norm_1x1)
        return norms if self.norm_skip is None else (*norms, self.norm_skip)

    def _fold_sides(self) -> Dict[str, Tuple[Tensor, Tensor]]:
        sides = {
            name: fold_batch_norm(conv.weight, None, norm)
            for (name, conv), norm in zip(self._side_convs().items(), self._side_norms())}
        if self.norm_skip is not None:
            weight = self.conv_1x1.weight
            identity = kernels.grouped_identity(self.in_channels, self.groups, device=weight.device, dtype=weight.dtype)
            sides['skip'] = fold_batch_norm(identity, None, self.norm_skip)
        return sides

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm_kxk(self.conv_kxk(x))
        side = self.norm_1x1(self.conv_1x1(self._under_centre(x)))
        for conv, norm in zip(self.copy_convs, self.copy_norms):
            side = side + norm(conv(x))
        if self.norm_skip is not None:
            side = side + self.norm_skip(x)
        return self._attached(out, side)


@register_method
@dataclass(frozen=True)
class MobileOne(Method):
    """MobileOne's branches for convolutions with a norm behind them, 1x1 ones too; of a RepVGG block only the KxK.

    Args:
        copies: How many kernels of full size each layer has, the origin among them.
        normed: Have the paper's batch norm in each branch in place of scales, for KxK convolutions with one behind.
    """

    name = 'mobileone'
    title = 'MobileOne branches'
    summary = (
        'MobileOne branches (by default with scales in place of batch norms) compose the kernel of each convolution '
        'from several of its size (four by default), a 1x1 and a scale of the input at every training step.'
    )
    paper = 'arXiv:2206.04040'
    citation = """@inproceedings{vasu2023mobileone,
  title={MobileOne: An Improved One millisecond Mobile Backbone},
  author={Vasu, Pavan Kumar Anasosalu and Gabriel, James and Zhu, Jeff and Tuzel, Oncel and Ranjan, Anurag},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2023}
}"""
    layers = (MobileOneConv2d, NormedMobileOneConv2d)

    copies: int = COPIES
    normed: bool = False

    def __post_init__(self) -> None:
        check_copies(self.copies)
        if not isinstance(self.normed, bool):
            raise UserError(f'normed must be True or False, got {self.normed!r}')

    @property
    def takes_norm(self) -> bool:  # type: ignore[override]
        return self.normed

    @classmethod
    def of_layer(cls, layer: Any) -> 'MobileOne':
        return cls(copies=layer._own_kwargs()['copies'], normed=isinstance(layer, NormedMobileOneConv2d))

    def takes(self, place: Place) -> bool:
        conv = place.conv
        if self.normed:
            return is_foldable_pair(place) and max(conv.kernel_size) > 1
        if place.norm is None or (place.is_inside(RepVggBlock) and max(conv.kernel_size) == 1):
            return False
        return self.copies > 1 or max(conv.kernel_size) > 1 or (
            conv.in_channels == conv.out_channels and conv.stride == (1, 1))

    def layer_for(self, place: Place) -> Tuple[Type[RepLayer], Dict[str, Any]]:
        return NormedMobileOneConv2d if self.normed else MobileOneConv2d, dict(copies=self.copies)
