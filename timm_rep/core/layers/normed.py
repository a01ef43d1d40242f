"""Layers with a batch norm in every branch, which stand for a convolution together with the norm behind it."""
import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, Iterable, Optional, Tuple, Type, TypeVar, Union

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from torch import Tensor

from .. import kernels
from ..errors import UserError
from ..methods import Method, Place
from ..precision import full_float32, without_autocast
from .base import RepLayer, kaiming_uniform_

__all__ = ['FoldedNorm', 'NormedRepLayer', 'fold_batch_norm', 'kept_statistics', 'redraw_branch_']

# Redrawn kernels of side branches lie within this bound over sqrt(o) (RepAn).
REDRAW_BOUND = 0.1
# Larger kernels are left alone: the papers' networks have none but the stem's.
MAX_KERNEL_SIZE = 5


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


NormedT = TypeVar('NormedT', bound='NormedRepLayer')


class FoldedNorm(nn.Module):
    """Keeps the place, and the dropout and activation, of a batch norm that went into the layer before it.

    Args:
        norm: Plain batch norm, or timm's batch norm with activation.

    Raises:
        UserError: For another norm.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        if not self.accepts(norm):
            raise UserError(f'a plain BatchNorm2d or BatchNormAct2d can be folded, got {norm}')
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
        norm_act.load_state_dict(norm.state_dict())
        norm_act.drop, norm_act.act = copy.deepcopy(self.drop), copy.deepcopy(self.act)
        return norm_act.train(norm.training)


class NormedRepLayer(RepLayer):
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
        UserError: For an even or 1x1 kernel, padding given as a string or mode other than zeros, or channels that the
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
            raise UserError(f'{name} takes padding in pixels, got {padding!r}')
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device=device)
        if self.kernel_size == (1, 1):
            raise UserError(f'{name} needs a kernel larger than 1x1')
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
            raise UserError(
                f'cannot {verb} {type(self).__name__} in training mode: its branches use batch statistics there, a '
                'fused convolution cannot. Call model.eval() first'
            )

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """A new ``nn.Conv2d`` with bias that has the layer's outputs in eval mode.

        Returns:
            A convolution on the same device, in the same dtype.

        Raises:
            UserError: In training mode.
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
            UserError: In training mode.
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
            UserError: For another shape. The layer is then unchanged.
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
    def absorb_norm_(self, weight: Tensor, bias: Optional[Tensor] = None) -> None:
        """Make the layer compute, in eval mode, a convolution and the norm behind it, whose values ``norm_kxk`` holds.

        The gain of that norm goes into the origin's kernel, and into the statistics that the origin's norm keeps.

        Args:
            weight: Kernel of the convolution ``(o, i/g, kh, kw)``.
            bias: Bias of the convolution ``(o,)``, or None for zeros.

        Raises:
            UserError: For another shape. The layer is then unchanged.
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
            cls: Type[NormedT],
            conv: nn.Conv2d,
            generator: Optional[torch.Generator] = None,
            norm: Optional[nn.BatchNorm2d] = None,
            **kwargs: Any,
    ) -> NormedT:
        """A rep layer with the eval-mode function of a convolution and the norm behind it.

        Args:
            conv: The convolution; it stays as it is.
            generator: Source of the side branches' draw.
            norm: Batch norm behind it, see :meth:`absorb_norm_`. None for a convolution alone.
            **kwargs: More arguments of the layer's constructor.

        Returns:
            A layer on the same device, in the same dtype and mode.

        Raises:
            UserError: If this layer cannot stand for the pair.
        """
        layer = cls.from_geometry(conv, generator, norm, **kwargs)
        if norm is None:
            layer.restore_(conv.weight, conv.bias)
        else:
            layer.norm_kxk.load_state_dict(norm.state_dict())
            layer.absorb_norm_(conv.weight, conv.bias)
        return layer

    @classmethod
    @torch.no_grad()
    def from_geometry(
            cls: Type[NormedT],
            conv: nn.Conv2d,
            generator: Optional[torch.Generator] = None,
            norm: Optional[nn.BatchNorm2d] = None,
            **kwargs: Any,
    ) -> NormedT:
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
            UserError: If this layer cannot stand for the pair.
        """
        if norm is None:
            return super().from_geometry(conv, generator, **kwargs)
        if not norm.affine:
            raise UserError(f'{cls.__name__} needs a batch norm with weight and bias, got {norm}')
        kept_statistics(norm)
        layer = super().from_geometry(conv, generator, eps=norm.eps, momentum=norm.momentum, **kwargs)
        for own in (layer.norm_kxk, *layer._side_norms()):
            own.weight.copy_(norm.weight)
            own.bias.copy_(norm.bias)
        return layer


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Take so many rows and columns off each border, as a view."""
    return x[:, :, height:x.shape[2] - height, width:x.shape[3] - width]


@dataclass(frozen=True)
class NormedMethod(Method):
    """A method whose layers have a norm in each branch; it takes 3x3 to 5x5 convolutions with a batch norm behind."""

    takes_norm = True

    def takes(self, place: Place) -> bool:
        sizes = place.conv.kernel_size
        if place.conv.bias is not None or not FoldedNorm.accepts(place.norm):
            return False
        return min(sizes) > 1 and max(sizes) <= MAX_KERNEL_SIZE
