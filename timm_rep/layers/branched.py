"""Layers with a batch norm in every branch, which stand for a convolution together with the norm behind it."""
import copy
from typing import TYPE_CHECKING, Any, Dict, Iterable, Optional, Tuple, Type, TypeVar, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from timm.models import register_notrace_module
from torch import Tensor

from .. import kernels
from ..composition import full_float32, without_autocast
from .base import RepLayer, kaiming_uniform_

__all__ = [
    'AsymmetricConv2d',
    'BranchedRepLayer',
    'DiverseBranchConv2d',
    'FoldedNorm',
    'NormPad2d',
    'RepConv2d',
    'fold_batch_norm',
    'kept_statistics',
    'redraw_branch_',
]

# Redrawn kernels of side branches lie within this bound over sqrt(o) (RepAn).
REDRAW_BOUND = 0.1


def kept_statistics(norm: nn.BatchNorm2d) -> Tuple[Tensor, Tensor]:
    """Running mean and variance of a batch norm.

    Args:
        norm: Batch norm.

    Returns:
        Mean and variance, both ``(o,)``.

    Raises:
        ValueError: If the norm keeps none.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f'a batch norm with running statistics is needed, got {norm}')
    return norm.running_mean, norm.running_var


def fold_batch_norm(kernel: Tensor, bias: Optional[Tensor], norm: nn.BatchNorm2d) -> Tuple[Tensor, Tensor]:
    """:func:`timm_rep.kernels.fold_norm` with the values of a module, in float32 at least.

    Args:
        kernel: ``(o, i/g, h, w)``.
        bias: ``(o,)`` or None.
        norm: Batch norm with running statistics.

    Returns:
        Kernel and bias; float32 for half-precision values.
    """
    dtype = torch.float64 if kernel.dtype == torch.float64 else torch.float32
    mean, var, gamma, beta = (v.to(dtype) for v in (*kept_statistics(norm), norm.weight, norm.bias))
    return kernels.fold_norm(
        kernel.to(dtype), None if bias is None else bias.to(dtype), mean, var, gamma, beta, norm.eps)


def is_frozen(norm: nn.Module) -> bool:
    """Whether this is what timm's ``freeze_batch_norm_2d`` leaves of a batch norm: its values, none to be trained."""
    return not isinstance(norm, nn.modules.batchnorm._BatchNorm)


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


@torch.no_grad()
def redraw_branch_(
        weights: Iterable[Tensor],
        norms: Iterable[nn.BatchNorm2d],
        out_channels: int,
        generator: Optional[torch.Generator] = None,
) -> None:
    """Draw kernels from U(-b, b) with ``b = 0.1 / sqrt(o)`` and reset norms: a fresh side branch (RepAn).

    Args:
        weights: Kernels, filled in place.
        norms: Set to gain one, bias zero, mean zero and variance one.
        out_channels: ``o``.
        generator: Source of the draw.
    """
    for weight in weights:
        # with a = 0 the bound is sqrt(6 / fan)
        kaiming_uniform_(weight, 6 * out_channels / REDRAW_BOUND ** 2, generator=generator)
    for norm in norms:
        reset_norm_(norm)


BranchedT = TypeVar('BranchedT', bound='BranchedRepLayer')


class NormPad2d(nn.Module):
    """Batch norm, then pad with the norm's image of zero by the kept statistics.

    So the border holds what a convolution of the zero-padded input would have put there, and a KxK convolution or an
    average pooling behind it folds exactly.

    As in the authors' code, each pass in training mode moves the statistics that the next one's border is made of. So
    gradient checkpointing, which passes twice, gives gradients that are off a little: it recomputes another border.
    """

    def __init__(self, channels: int, padding: Tuple[int, int], **kwargs: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, **kwargs)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        zero = torch.zeros_like(norm.weight).reshape(1, -1, 1, 1)
        border = F.batch_norm(
            zero, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        border = border.detach().type_as(x)
        pad_h, pad_w = self.padding
        return F.pad(self.norm(x) - border, [pad_w, pad_w, pad_h, pad_h]) + border


class FoldedNorm(nn.Module):
    """Keeps the place, and the dropout and activation, of a batch norm that went into the layer before it.

    Args:
        norm: Plain batch norm, or timm's batch norm with activation.

    Raises:
        ValueError: For another norm.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        if not self.accepts(norm):
            raise ValueError(f'a plain BatchNorm2d or BatchNormAct2d can be folded, got {norm}')
        self.drop: Optional[nn.Module] = getattr(norm, 'drop', None)
        self.act: Optional[nn.Module] = getattr(norm, 'act', None)

    @staticmethod
    def accepts(norm: Optional[nn.Module]) -> bool:
        """Whether a layer can take this norm in."""
        return type(norm) in (nn.BatchNorm2d, BatchNormAct2d)

    def forward(self, x: Tensor) -> Tensor:
        if self.drop is not None:
            x = self.drop(x)
        return x if self.act is None else self.act(x)

    def unfolded(self, norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
        """A batch norm of the class that was here, with the values of another one.

        Args:
            norm: As :meth:`BranchedRepLayer.fuse_conv_norm` returns it.

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
        norm_act.load_state_dict(norm.state_dict())
        norm_act.drop, norm_act.act = copy.deepcopy(self.drop), copy.deepcopy(self.act)
        return norm_act.train(norm.training)


class BranchedRepLayer(RepLayer):
    """A rep layer with a batch norm in every branch: it stands for a convolution and the norm behind it.

    Fusing and restoring go by the kept (running) statistics. In eval mode both are exact at every attach rate. In
    training mode batch statistics replace the kept ones, so there the fused layer is not the same function, and
    :meth:`fuse` refuses.

    The origin is ``conv_kxk`` with ``norm_kxk``. Subclasses make their side branches in :meth:`_add_side_branches`,
    name them in :meth:`_side_convs` and :meth:`_side_norms`, and fold them in :meth:`_fold_sides`.

    Args:
        in_channels: Input channels ``i``.
        out_channels: Output channels ``o``.
        kernel_size: Height and width, odd, not both one.
        stride: Stride of the convolution.
        padding: Zero padding in pixels.
        dilation: Dilation of the kernel.
        groups: Number of groups ``g``.
        padding_mode: Only ``'zeros'``.
        eps: Of all batch norms.
        momentum: Of all batch norms.
        generator: Source of the initial draw.

    Raises:
        ValueError: For an even or 1x1 kernel, padding given as a string or mode other than zeros, or channels that the
            groups do not divide.
    """

    if TYPE_CHECKING:  # not for TorchScript, which takes class annotations for attributes
        padding: Tuple[int, int]
        conv_kxk: nn.Conv2d
        norm_kxk: nn.BatchNorm2d

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Union[int, Tuple[int, int]],
            stride: Union[int, Tuple[int, int]] = 1,
            padding: Union[int, Tuple[int, int]] = 0,
            dilation: Union[int, Tuple[int, int]] = 1,
            groups: int = 1,
            padding_mode: str = 'zeros',
            eps: float = 1e-5,
            momentum: Optional[float] = 0.1,
            generator: Optional[torch.Generator] = None,
            device: Any = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        name = type(self).__name__
        if isinstance(padding, str):
            raise ValueError(f'{name} takes padding in pixels, got {padding!r}')
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device=device)
        if self.kernel_size == (1, 1):
            raise ValueError(f'{name} needs a kernel larger than 1x1')
        self.bias = None
        dd: Dict[str, Any] = dict(device=device, dtype=dtype)
        norm_dd: Dict[str, Any] = dict(eps=eps, momentum=momentum, **dd)
        self.conv_kxk = nn.Conv2d(**self._geometry(), bias=False, **dd)
        self.norm_kxk = nn.BatchNorm2d(out_channels, **norm_dd)
        self._add_side_branches(dd, norm_dd)
        self.reset_parameters(generator)

    def _own_kwargs(self) -> Dict[str, Any]:
        return dict(eps=self.norm_kxk.eps, momentum=self.norm_kxk.momentum)

    def _centre_offset(self) -> Tuple[int, int]:
        """Padding that a 1x1 needs to see the pixels under the centre of the KxK; less than zero crops."""
        pad, size, dilation = self.padding, self.kernel_size, self.dilation
        return pad[0] - dilation[0] * (size[0] // 2), pad[1] - dilation[1] * (size[1] // 2)

    def _add_side_branches(self, dd: Dict[str, Any], norm_dd: Dict[str, Any]) -> None:
        """Make the side branches, not initialised; the arguments are those of all modules and of all norms."""
        raise NotImplementedError(f'{type(self).__name__} must define _add_side_branches')

    def _side_convs(self) -> Dict[str, nn.Conv2d]:
        """The convolutions of the side branches that end in the outputs, by branch."""
        raise NotImplementedError(f'{type(self).__name__} must define _side_convs')

    def _side_norms(self) -> Tuple[nn.BatchNorm2d, ...]:
        """The last norm of every side branch."""
        raise NotImplementedError(f'{type(self).__name__} must define _side_norms')

    def _inner_norms(self) -> Tuple[nn.BatchNorm2d, ...]:
        """Norms between two stages of a side branch."""
        return ()

    def _fold_sides(self) -> Dict[str, Tuple[Tensor, Tensor]]:
        """Kernel and bias ``(o,)`` of every side branch by the kept statistics, without the attach rate.

        A kernel may be smaller than the layer's, around the same centre.
        """
        raise NotImplementedError(f'{type(self).__name__} must define _fold_sides')

    def _side_kernel_bias(self) -> Tuple[Tensor, Tensor]:
        """Kernel ``(o, i/g, kh, kw)`` and bias ``(o,)`` of the sum of the side branches, without the attach rate."""
        with without_autocast(self.conv_kxk.weight), full_float32():
            sides = list(self._fold_sides().values())
            kernel = self._pad(kernels.merge_parallel([kernel for kernel, _ in sides]))
            bias = sides[0][1]
            for _, following in sides[1:]:
                bias = bias + following
        return kernel, bias

    def _pad(self, kernel: Tensor) -> Tensor:
        height, width = self.kernel_size
        return kernels.pad_to_size(kernel, (height, width))

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw all branches afresh with the initial values of ``nn.Conv2d``, and reset all norms.

        Args:
            generator: Source of the draw.
        """
        for conv in (self.conv_kxk, *self._side_convs().values()):
            kaiming_uniform_(conv.weight, conv.weight[0].numel(), 5 ** 0.5, generator)
        for norm in (self.norm_kxk, *self._side_norms(), *self._inner_norms()):
            reset_norm_(norm)
        self._reset_annealing()

    @torch.no_grad()
    def redraw_side_branches_(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw the side branches afresh: kernels from U(-b, b) with ``b = 0.1 / sqrt(o)``, norms reset (RepAn).

        Args:
            generator: Source of the draw.
        """
        weights = [conv.weight for conv in self._side_convs().values()]
        redraw_branch_(weights, (*self._side_norms(), *self._inner_norms()), self.out_channels, generator)

    def compose_weight_bias(self) -> Tuple[Tensor, Tensor]:
        """Kernel and bias by the kept statistics, at the attach rate in force, differentiably.

        Returns:
            Kernel ``(o, i/g, kh, kw)`` and bias ``(o,)``, in the parameters' dtype; composed in float32 at least.
        """
        kernel, bias = fold_batch_norm(self.conv_kxk.weight, None, self.norm_kxk)
        side_kernel, side_bias = self._side_kernel_bias()
        kernel, bias = kernel + self.attach_rate * side_kernel, bias + self.attach_rate * side_bias
        return kernel.to(self.conv_kxk.weight.dtype), bias.to(self.conv_kxk.weight.dtype)

    @torch.no_grad()
    def branch_kernels(self) -> Dict[str, Tensor]:
        """The kernel that each branch adds to the sum by the kept statistics, with the attach rate.

        Returns:
            A kernel ``(o, i/g, kh, kw)`` for each branch; they add up to :meth:`compose_weight`.
        """
        with without_autocast(self.conv_kxk.weight), full_float32():
            folded = self._fold_sides()
        sides = {name: self.attach_rate * self._pad(kernel) for name, (kernel, _) in folded.items()}
        return dict(origin=fold_batch_norm(self.conv_kxk.weight, None, self.norm_kxk)[0], **sides)

    def branch_gradients(self) -> Dict[str, Tensor]:
        convs = dict(origin=self.conv_kxk, **self._side_convs())
        return {name: conv.weight.grad for name, conv in convs.items() if conv.weight.grad is not None}

    def compose_weight(self) -> Tensor:
        return self.compose_weight_bias()[0]

    def _refuse_training(self, verb: str) -> None:
        if self.training:
            raise RuntimeError(
                f'cannot {verb} {type(self).__name__} in training mode: its branches use batch statistics there, a '
                'fused convolution cannot. Call model.eval() first'
            )

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """A new ``nn.Conv2d`` with bias that has the layer's outputs in eval mode.

        Returns:
            A convolution on the same device, in the same dtype.

        Raises:
            RuntimeError: In training mode.
        """
        self._refuse_training('fuse')
        return self._plain_conv(*self.compose_weight_bias())

    def _implied_statistics(self, bias: Tensor) -> Tuple[Tensor, Tensor]:
        """Mean and variance ``(o,)`` of the outputs of the folded kernel, whose bias is given.

        A norm's outputs have its bias for mean and its weight for standard deviation. So the mean is exact; the
        variance is as if the branches were uncorrelated.
        """
        mean = self.norm_kxk.bias - bias
        var = self.norm_kxk.weight.square()
        for norm in self._side_norms():
            mean = mean + self.attach_rate * norm.bias
            var = var + (self.attach_rate * norm.weight).square()
        return mean, var

    @torch.no_grad()
    def imply_statistics_(self) -> None:
        mean, var = self._implied_statistics(self.compose_weight_bias()[1])
        running_mean, running_var = kept_statistics(self.norm_kxk)
        running_mean.copy_(mean)
        running_var.copy_(var)

    @torch.no_grad()
    def fuse_conv_norm(self) -> Tuple[nn.Conv2d, nn.BatchNorm2d]:
        """The stock pair: a convolution without bias and a batch norm that have the layer's outputs in eval mode.

        Any statistics would do for that. The norm gets those that the branches' norms imply for further training: the
        sum of their means, and of their variances as if the branches were uncorrelated. It is frozen if the origin's
        is.

        Returns:
            Convolution and batch norm.

        Raises:
            RuntimeError: In training mode.
        """
        self._refuse_training('fuse')
        kernel, bias = self.compose_weight_bias()
        mean, var = self._implied_statistics(bias)
        origin = self.norm_kxk
        norm = nn.BatchNorm2d(self.out_channels, origin.eps, device=mean.device, dtype=mean.dtype)
        kernel, gamma, beta = kernels.unfold_norm(kernel, bias, mean, var, norm.eps)
        values = dict(origin.state_dict(), weight=gamma, bias=beta, running_mean=mean, running_var=var)
        if is_frozen(origin):
            norm = freeze_batch_norm_2d(norm)
        else:
            norm.momentum = origin.momentum
        norm.load_state_dict(values)
        return self._plain_conv(kernel, None), norm.train(self.training)

    @torch.no_grad()
    def restore_(self, weight: Tensor, bias: Optional[Tensor] = None) -> None:
        """Make the layer compute exactly this kernel and bias in eval mode, whatever the side branches hold.

        The origin branch takes ``K - attach_rate * (sum of the side branches)``. Its norm keeps its running statistics
        and gets gain one; no learnt weight is divided by.

        Args:
            weight: Kernel ``(o, i/g, kh, kw)``.
            bias: ``(o,)``, or None for zeros.

        Raises:
            ValueError: For another shape. The layer is then unchanged.
        """
        self._check_kernel(weight, bias)
        norm = self.norm_kxk
        bias = torch.zeros_like(norm.bias) if bias is None else bias.to(norm.bias)
        side_kernel, side_bias = self._side_kernel_bias()
        kernel, gamma, beta = kernels.unfold_norm(
            weight.to(side_kernel) - self.attach_rate * side_kernel,
            bias - self.attach_rate * side_bias,
            *kept_statistics(norm),
            norm.eps,
        )
        self.conv_kxk.weight.copy_(kernel)
        norm.weight.copy_(gamma)
        norm.bias.copy_(beta)
        kernel, composed_bias = self.compose_weight_bias()  # take up the rounding of the first pass
        self.conv_kxk.weight.add_(weight.to(kernel) - kernel)
        norm.bias.add_(bias - composed_bias)

    @torch.no_grad()
    def take_norm_(self, weight: Tensor, bias: Optional[Tensor] = None) -> None:
        """Make the layer compute, in eval mode, a convolution and the norm behind it, whose values ``norm_kxk`` holds.

        The gain of that norm goes into the origin's kernel, and into the statistics that the origin's norm keeps.

        Args:
            weight: Kernel of the convolution ``(o, i/g, kh, kw)``.
            bias: Bias of the convolution ``(o,)``, or None for zeros.

        Raises:
            ValueError: For another shape. The layer is then unchanged.
        """
        self._check_kernel(weight, bias)
        norm = self.norm_kxk
        kernel, folded_bias = fold_batch_norm(weight, bias, norm)
        mean, var = kept_statistics(norm)
        gain = norm.weight * torch.rsqrt(var + norm.eps)
        mean.sub_(torch.zeros_like(mean) if bias is None else bias.to(mean)).mul_(gain)
        var.mul_(gain.square())
        self.restore_(kernel, folded_bias)

    @classmethod
    @torch.no_grad()
    def from_conv(
            cls: Type[BranchedT],
            conv: nn.Conv2d,
            generator: Optional[torch.Generator] = None,
            norm: Optional[nn.BatchNorm2d] = None,
            **kwargs: Any,
    ) -> BranchedT:
        """A rep layer with the eval-mode function of a convolution and the norm behind it.

        Args:
            conv: The convolution; it stays as it is.
            generator: Source of the side branches' draw.
            norm: Batch norm behind it, see :meth:`take_norm_`. None for a convolution alone.
            **kwargs: More arguments of the layer's constructor.

        Returns:
            A layer on the same device, in the same dtype and mode.

        Raises:
            ValueError: If this layer cannot stand for the pair.
        """
        layer = cls.for_conv(conv, generator, norm, **kwargs)
        if norm is None:
            layer.restore_(conv.weight, conv.bias)
        else:
            layer.norm_kxk.load_state_dict(norm.state_dict())
            layer.take_norm_(conv.weight, conv.bias)
        return layer

    @classmethod
    @torch.no_grad()
    def for_conv(
            cls: Type[BranchedT],
            conv: nn.Conv2d,
            generator: Optional[torch.Generator] = None,
            norm: Optional[nn.BatchNorm2d] = None,
            **kwargs: Any,
    ) -> BranchedT:
        """A freshly drawn rep layer with the geometry of a convolution and the norm behind it, not their function.

        The last norm of every branch starts with the weight and bias of the norm that it replaces, so that the host
        decides how a residual block starts (timm's ``zero_init_last``).

        Args:
            conv: The convolution; it stays as it is.
            generator: Source of the draw.
            norm: Batch norm behind it, or None.
            **kwargs: More arguments of the layer's constructor.

        Returns:
            A layer on the same device, in the same dtype and mode.

        Raises:
            ValueError: If this layer cannot stand for the pair.
        """
        if norm is None:
            return super().for_conv(conv, generator, **kwargs)
        if not norm.affine:
            raise ValueError(f'{cls.__name__} needs a batch norm with weight and bias, got {norm}')
        kept_statistics(norm)
        layer = super().for_conv(conv, generator, eps=norm.eps, momentum=norm.momentum, **kwargs)
        for own in (layer.norm_kxk, *layer._side_norms()):
            own.weight.copy_(norm.weight)
            own.bias.copy_(norm.bias)
        return layer


@register_notrace_module
class DiverseBranchConv2d(BranchedRepLayer):
    """Diverse Branch Block: the baseline of both papers, four branches on feature maps, a batch norm in each.

    Origin ``conv_kxk``; a 1x1; a 1x1 then average pooling; a 1x1 (identity plus a learnt residual) then KxK. The norm
    between two stages pads with its own image of zero, so that folding is exact at the border. A depthwise block has
    no 1x1 branch, pools its input directly and has twice the inner channels.

    `Diverse Branch Block: Building a Convolution as an Inception-like Unit` - https://arxiv.org/abs/2103.13425

    Args:
        in_channels: Input channels ``i``.
        out_channels: Output channels ``o``.
        kernel_size: Height and width, odd, not both one.
        stride: Stride of the convolution.
        padding: Zero padding in pixels.
        dilation: Dilation of the kernel.
        groups: Number of groups ``g``.
        padding_mode: Only ``'zeros'``.
        eps: Of all batch norms.
        momentum: Of all batch norms.
        generator: Source of the initial draw.

    Raises:
        ValueError: For an even or 1x1 kernel, padding given as a string or mode other than zeros, or channels that the
            groups do not divide.
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
            self.conv_1x1 = nn.Conv2d(
                in_channels, out_channels, 1, stride=self.stride, groups=groups, bias=False, **dd)
            self.norm_1x1 = nn.BatchNorm2d(out_channels, **norm_dd)
            self.avg_conv = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False, **dd)
            self.avg_inner_norm = NormPad2d(out_channels, self.padding, **norm_dd)
        self.avg_norm = nn.BatchNorm2d(out_channels, **norm_dd)

        self.seq_1x1 = nn.Parameter(torch.empty(inner, in_channels // groups, 1, 1, **dd))
        self.seq_inner_norm = NormPad2d(inner, self.padding, **norm_dd)
        self.seq_kxk = nn.Conv2d(**dict(self._geometry(), in_channels=inner, padding=0), bias=False, **dd)
        self.seq_norm = nn.BatchNorm2d(out_channels, **norm_dd)
        self.register_buffer('seq_identity', torch.empty(inner, in_channels // groups, 1, 1, **dd), persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Fill the identity that the inner 1x1 is added to."""
        identity = kernels.grouped_identity(
            self.in_channels, self.groups, device=self.seq_identity.device, dtype=self.seq_identity.dtype)
        identity = identity.unflatten(0, (self.groups, -1))
        ratio = self.seq_identity.shape[0] // self.in_channels
        self.seq_identity.copy_(identity.repeat(1, ratio, 1, 1, 1).flatten(0, 1))

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
        first, first_bias = fold_batch_norm(self.seq_1x1 + self.seq_identity, None, self.seq_inner_norm.norm)
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

        mixed = F.conv2d(x, self.seq_1x1 + self.seq_identity, None, 1, 0, 1, self.groups)
        side = self.seq_norm(self.seq_kxk(self.seq_inner_norm(mixed)))

        if self.avg_conv is not None and self.avg_inner_norm is not None:
            padded = self.avg_inner_norm(self.avg_conv(x))
        else:
            padded = F.pad(x, [pad_w, pad_w, pad_h, pad_h])
        side = side + self.avg_norm(self._average(padded))

        if self.conv_1x1 is not None and self.norm_1x1 is not None:
            off_h, off_w = self._centre_offset()
            side = side + self.norm_1x1(self.conv_1x1(F.pad(x, [off_w, off_w, off_h, off_h])))
        return out + self.attach_rate.to(out.dtype) * side


def _crop(x: Tensor, height: int, width: int) -> Tensor:
    """Take so many rows and columns off each border, as a view."""
    return x[:, :, height:x.shape[2] - height, width:x.shape[3] - width]


@register_notrace_module
class AsymmetricConv2d(BranchedRepLayer):
    """Asymmetric Convolution Block: a KxK, a 1xK and a Kx1, a batch norm behind each.

    `ACNet: Strengthening the Kernel Skeletons` - https://arxiv.org/abs/1908.03930

    Args:
        in_channels: Input channels ``i``.
        out_channels: Output channels ``o``.
        kernel_size: Height and width, odd, both larger than one.
        stride: Stride of the convolution.
        padding: Zero padding in pixels.
        dilation: Dilation of the kernel.
        groups: Number of groups ``g``.
        padding_mode: Only ``'zeros'``.
        eps: Of all batch norms.
        momentum: Of all batch norms.
        generator: Source of the initial draw.

    Raises:
        ValueError: For a kernel that is even or has a side of one, padding given as a string or mode other than zeros,
            or channels that the groups do not divide.
    """

    def _add_side_branches(self, dd: Dict[str, Any], norm_dd: Dict[str, Any]) -> None:
        height, width = self.kernel_size
        if height == 1 or width == 1:
            raise ValueError(f'AsymmetricConv2d needs a kernel larger than 1 each way, got {self.kernel_size}')
        off_h, off_w = self._centre_offset()
        row = dict(kernel_size=(1, width), padding=(max(off_h, 0), self.padding[1]))
        column = dict(kernel_size=(height, 1), padding=(self.padding[0], max(off_w, 0)))
        self.conv_1xk = nn.Conv2d(**dict(self._geometry(), **row), bias=False, **dd)
        self.norm_1xk = nn.BatchNorm2d(self.out_channels, **norm_dd)
        self.conv_kx1 = nn.Conv2d(**dict(self._geometry(), **column), bias=False, **dd)
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
        side = self.norm_1xk(self.conv_1xk(_crop(x, max(-off_h, 0), 0)))
        side = side + self.norm_kx1(self.conv_kx1(_crop(x, 0, max(-off_w, 0))))
        return out + self.attach_rate.to(out.dtype) * side


@register_notrace_module
class RepConv2d(BranchedRepLayer):
    """RepVGG's branches for any KxK: a KxK, a 1x1 and, where the shapes allow it, the identity, with a norm in each.

    There is an identity branch if the input has the output's channels, the stride is one and the size is kept.

    `RepVGG: Making VGG-style ConvNets Great Again` - https://arxiv.org/abs/2101.03697

    Args:
        in_channels: Input channels ``i``.
        out_channels: Output channels ``o``.
        kernel_size: Height and width, odd, not both one.
        stride: Stride of the convolution.
        padding: Zero padding in pixels.
        dilation: Dilation of the kernel.
        groups: Number of groups ``g``.
        padding_mode: Only ``'zeros'``.
        eps: Of all batch norms.
        momentum: Of all batch norms.
        generator: Source of the initial draw.

    Raises:
        ValueError: For an even or 1x1 kernel, padding given as a string or mode other than zeros, or channels that the
            groups do not divide.
    """

    def _add_side_branches(self, dd: Dict[str, Any], norm_dd: Dict[str, Any]) -> None:
        off_h, off_w = self._centre_offset()
        pointwise = dict(kernel_size=1, padding=(max(off_h, 0), max(off_w, 0)), dilation=1)
        self.conv_1x1 = nn.Conv2d(**dict(self._geometry(), **pointwise), bias=False, **dd)
        self.norm_1x1 = nn.BatchNorm2d(self.out_channels, **norm_dd)
        self.norm_identity: Optional[nn.BatchNorm2d] = None
        if self.in_channels == self.out_channels and self.stride == (1, 1) and (off_h, off_w) == (0, 0):
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
        off_h, off_w = self._centre_offset()
        out = self.norm_kxk(self.conv_kxk(x))
        side = self.norm_1x1(self.conv_1x1(_crop(x, max(-off_h, 0), max(-off_w, 0))))
        if self.norm_identity is not None:
            side = side + self.norm_identity(x)
        return out + self.attach_rate.to(out.dtype) * side
