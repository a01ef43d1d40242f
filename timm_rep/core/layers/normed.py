"""Layers with a batch norm in every branch, which stand for a convolution together with the norm behind it."""
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional, Sequence, Tuple, Type, TypeVar, Union

import torch
import torch.nn as nn
from timm.layers import freeze_batch_norm_2d
from torch import Tensor

from .. import kernels
from ..errors import UserError
from ..methods import Method, Place
from ..precision import full_float32, without_autocast
from .annealed import check_kernel
from .base import RepLayer, is_trainable, kaiming_uniform_
from .branches import NormedBranches
from .fixed import BranchConv2d, FixedGeometry
from .norms import (
    FoldedNorm,
    count_anew_,
    fold_batch_norm,
    is_foldable,
    is_fresh,
    is_frozen,
    kept_statistics,
    reset_norm_,
    synchronized_as,
)

__all__ = ['NormedMethod', 'NormedRepLayer', 'is_foldable_pair']

HIDDEN = 1e-30  # what gains below this leave of the outputs is no part of any sum
LARGEST = 1e4  # of the kernels, means and deviations of the stock form, in formats that have it
MAX_KERNEL_SIZE = 5  # larger ones are left alone: the papers' networks have none but the stem's


NormedT = TypeVar('NormedT', bound='NormedRepLayer')


class NormedRepLayer(FixedGeometry, NormedBranches, RepLayer):
    """A rep layer with a batch norm in every branch: it stands for a convolution and the norm behind it.

    In training mode the fused layer is not the same function, so :meth:`fuse` refuses there.

    The origin is ``conv_kxk`` with ``norm_kxk``. Subclasses make their side branches in :meth:`_add_side_branches`,
    and name and fold them as :class:`NormedBranches` says.

    Args:
        in_channels: As of :class:`RepLayer`, like all up to ``padding_mode``.
        kernel_size: Height and width, odd, not both one.
        padding: Zero padding in pixels.
        eps: Of all batch norms.
        momentum: Of all batch norms.
        generator: Source of the initial draw.

    Raises:
        UserError: For an even or 1x1 kernel, padding given as a string or mode other than zeros, or channels that the
            groups do not divide.
    """

    stock_bias: Optional[bool]  # of a convolution with bias in the stock form, whether that is trained
    __jit_ignored_attributes__ = ['far_norm']

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
        self.stock_bias = None
        # what holds the norm's place if it is not right behind the layer; in a tuple, so that it is no part of it
        self.far_norm: Optional[Tuple[FoldedNorm]] = None
        dd: Dict[str, Any] = dict(device=device, dtype=dtype)
        norm_dd: Dict[str, Any] = dict(eps=eps, momentum=momentum, **dd)
        self.conv_kxk = BranchConv2d(**self._geometry(), bias=False, **dd)
        self.norm_kxk = nn.BatchNorm2d(out_channels, **norm_dd)
        self._add_side_branches(dd, norm_dd)
        self.reset_parameters(generator)

    def _own_kwargs(self) -> Dict[str, Any]:
        return dict(eps=self.norm_kxk.eps, momentum=getattr(self.norm_kxk, 'momentum', 0.1))  # a frozen norm has none

    def _centre_offset(self) -> Tuple[int, int]:
        """Padding that a 1x1 needs to see the pixels under the centre of the KxK; less than zero crops."""
        pad, size, dilation = self.padding, self.kernel_size, self.dilation
        return pad[0] - dilation[0] * (size[0] // 2), pad[1] - dilation[1] * (size[1] // 2)

    def _new_1x1(self, dd: Dict[str, Any]) -> nn.Conv2d:
        """A 1x1 convolution of what :meth:`_under_centre` leaves of the input."""
        off_h, off_w = self._centre_offset()
        pointwise = dict(kernel_size=1, padding=(max(off_h, 0), max(off_w, 0)), dilation=1)
        return BranchConv2d(**dict(self._geometry(), **pointwise), bias=False, **dd)

    def _under_centre(self, x: Tensor) -> Tensor:
        """The input without the border that the centre of the KxK never sees."""
        off_h, off_w = self._centre_offset()
        return crop(x, max(-off_h, 0), max(-off_w, 0))

    def _add_side_branches(self, dd: Dict[str, Any], norm_dd: Dict[str, Any]) -> None:
        """Make the side branches, not initialised; the arguments are those of all modules and of all norms."""
        raise NotImplementedError(f'{type(self).__name__} must define _add_side_branches')

    def _origin(self) -> Tuple[nn.Conv2d, nn.BatchNorm2d]:
        return self.conv_kxk, self.norm_kxk

    def _check_branches(self) -> None:
        super()._check_branches()
        for conv in (self.conv_kxk, *self._side_convs().values()):
            if not _is_plain(conv):
                raise UserError(
                    f'a branch of a {type(self).__name__} was replaced by {conv}, which does not fold: change the '
                    'plain convolution, before expand or after fuse')

    @torch.no_grad()
    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw all branches afresh with the initial values of ``nn.Conv2d``, and reset all norms.

        Args:
            generator: Source of the draw.
        """
        for conv in (self.conv_kxk, *self._side_convs().values()):
            kaiming_uniform_(conv.weight, conv.weight[0].numel(), 5 ** 0.5, generator)
        for norm in self._norms():
            reset_norm_(norm)
        self._reset_annealing()

    def _norms(self) -> Tuple[nn.BatchNorm2d, ...]:
        return (self.norm_kxk, *self._side_norms(), *self._inner_norms())

    def _trains_kernel(self) -> bool:
        of_norms = {id(parameter) for norm in self._norms() for parameter in norm.parameters()}
        return is_trainable(parameter for parameter in self.parameters() if id(parameter) not in of_norms)

    def _trains_stock_bias_only(self) -> bool:
        """Whether the bias of the convolution was trained, and that of the norm was not."""
        sides = is_trainable(norm.bias for norm in (*self._side_norms(), *self._inner_norms()))
        return bool(self.stock_bias) and self.norm_kxk.bias.requires_grad and not sides

    def _trains_norms(self, name: str) -> bool:
        return is_trainable(getattr(norm, name) for norm in self._norms())

    def compose_weight(self) -> Tensor:
        return self.compose_weight_bias()[0]

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """A new ``nn.Conv2d`` with bias that has the layer's outputs in eval mode.

        Returns:
            A convolution on the same device, in the same dtype.

        Raises:
            UserError: In training mode.
        """
        self._refuse_training()
        kernel, bias = self.compose_weight_bias()
        kernels_or_gains, biases = self._trains_kernel() or self._trains_norms('weight'), self._trains_norms('bias')
        return self._plain_conv(kernel, bias, kernels_or_gains, biases)

    @torch.no_grad()
    def fuse_conv_norm(self) -> Tuple[nn.Conv2d, nn.BatchNorm2d]:
        """The stock pair: a convolution and a batch norm that have the layer's outputs in eval mode.

        Any gain and statistics would do for that; the norm gets those that further training needs. It has them from the
        pair that the layer was made for if no branch was trained with batches since. It is frozen if the origin's is,
        and synchronized. The convolution has a bias if the one had that the layer was made for: zeros, since what it
        adds is in the norm's mean.

        Returns:
            Convolution and batch norm, trainable where any branch is.

        Raises:
            UserError: In training mode, or if the norms were replaced by others with a state of their own.
        """
        self._refuse_training()
        origin = self.norm_kxk
        if not (is_foldable(origin) or is_frozen(origin)) or any(origin.children()):
            raise UserError(
                f'cannot fuse {type(self).__name__}: its batch norms were replaced by {type(origin).__name__}, or '
                'given parts (prepare_qat), which have more state than a batch norm. Fuse first, then change the norms '
                'of the stock form'
            )
        kernel, bias = self._fold()
        norm = nn.BatchNorm2d(self.out_channels, origin.eps, device=bias.device, dtype=origin.weight.dtype)
        mean, var, gain = (value.to(norm.weight).to(bias) for value in self._stock_norm(kernel, bias))  # rounded first
        hidden = self._hidden()
        gain = torch.where(hidden, 1.0, gain)
        kernel, gamma, beta = kernels.unfold_norm(kernel, bias, mean, var, norm.eps, gain)
        own_mean, own_var = kept_statistics(origin)
        mean, var = torch.where(hidden, own_mean, mean), torch.where(hidden, own_var, var)
        kernel = torch.where(hidden.view(-1, 1, 1, 1), self.conv_kxk.weight, kernel)
        gamma, beta = torch.where(hidden, origin.weight, gamma), torch.where(hidden, bias.to(beta), beta)
        values = dict(origin.state_dict(), weight=gamma, bias=beta, running_mean=mean, running_var=var)
        if is_frozen(origin):
            norm = freeze_batch_norm_2d(norm)
        else:
            norm.momentum = origin.momentum
            norm.weight.requires_grad_(self._trains_norms('weight'))
            norm.bias.requires_grad_(self._trains_norms('bias') and not self._trains_stock_bias_only())
        norm.load_state_dict(values)
        if 'num_batches_tracked' not in values:
            norm.num_batches_tracked = None
        kernel = kernel.to(self.conv_kxk.weight.dtype)
        trains_bias = bool(self.stock_bias) and is_trainable(self.parameters())
        conv = self._plain_conv(
            kernel, None if self.stock_bias is None else torch.zeros_like(kernel[:, 0, 0, 0]), self._trains_kernel(),
            trains_bias)
        return conv, synchronized_as(origin, norm).train(origin.training)

    def _stock_norm(self, kernel: Tensor, bias: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and gain ``(o,)`` of a norm behind the folded kernel, for training.

        If no norm but the origin's has seen a batch, they are the origin's, which has those of the stock norm.

        Else the norms imply them: outputs of a norm have its bias for mean and, but for eps, its gain for standard
        deviation. So the mean is exact; the variance is as if the pixels of the input were uncorrelated, when it goes
        as the squared norm of a kernel: the sum of the branches' variances, times the square of the sum of their
        kernels over the sum of their squares.

        Any scale of the kernel would do with a gain that fits; it has that of :meth:`_factor`, and no value leaves the
        range of its format.
        """
        sides = self._side_norms()
        origin, norms, rate = self.norm_kxk, (self.norm_kxk, *sides), self.attach_rate.to(bias)
        own_mean, own_var, own_gain = (value.to(bias) for value in (*kept_statistics(origin), origin.weight))
        gains = torch.stack([own_gain, *(rate * norm.weight.to(bias) for norm in sides)])
        means = torch.stack([origin.bias.to(bias), *(rate * norm.bias.to(bias) for norm in sides)])
        reached = torch.stack([var / (var + norm.eps) for norm in norms for var in [kept_statistics(norm)[1].to(bias)]])
        branches = {name: branch.to(bias) for name, branch in self.branch_kernels().items()}
        together = _square_of_sum_over_sum_of_squares(list(branches.values()))
        std = _norm_of(gains * torch.sqrt(reached)) * torch.sqrt(together)
        largest = torch.stack([std, kernel.abs().amax((1, 2, 3)), (means.sum(0) - bias).abs()]).amax(0)
        # where there is no variance, the gain is that of all branches
        factor = torch.minimum(self._factor(branches), _norm_of(gains) / origin.eps ** 0.5)
        factor = torch.where(factor > 0, factor, 1.0)
        factor = torch.maximum(factor, largest / min(LARGEST, torch.finfo(origin.weight.dtype).max ** 0.5))
        var = (std / factor).square()
        gain = torch.copysign(torch.sqrt(var + origin.eps) * factor, own_gain)
        mean = (means.sum(0) - bias) * torch.sqrt(var + origin.eps) / gain
        seen = torch.stack([~is_fresh(norm) for norm in sides]).any()
        own_gain = torch.where(own_gain == 0, gains.abs().amax(0), own_gain)
        return torch.where(seen, mean, own_mean), torch.where(seen, var, own_var), torch.where(seen, gain, own_gain)

    def _factor(self, branches: Mapping[str, Tensor]) -> Tensor:
        """By what ``(o,)`` to fold a kernel alone for a step of gradient descent to move it as far as the branches.

        A branch is folded by a factor ``f``, and so is the gradient by it: a step moves what it is folded to by ``f^2``
        times the gradient by that. Several branches together move it by the sum of their ``f^2``.

        Args:
            branches: Folded kernels.
        """
        _, var = kept_statistics(self.norm_kxk)
        kernel = next(iter(branches.values()))
        factors = [self.norm_kxk.weight.to(kernel) / torch.sqrt(var.to(kernel) + self.norm_kxk.eps)]
        for name, conv in self._side_convs().items():
            if conv.weight[0].numel() == 1:
                continue  # the norm behind takes out the one number, so no step moves anything by it
            size = _norm_of(conv.weight.to(kernel).flatten(1).T)
            factors.append(_norm_of(branches[name].flatten(1).T) / torch.where(size > 0, size, torch.inf))
        return _norm_of(torch.stack(factors))

    def stock_form(self, behind: Optional[nn.Module]) -> Tuple[nn.Module, Optional[nn.Module]]:
        if not isinstance(behind, FoldedNorm):
            return self.fuse(), None
        if self._forward_hooks or self._backward_hooks or self._backward_pre_hooks:
            raise UserError(
                f'a hook sees the outputs of a {type(self).__name__}, which stands for a convolution and the norm '
                'behind it; in the stock form it would see those of the convolution alone. Remove the hook before fuse'
            )
        conv, norm = self.fuse_conv_norm()
        return conv, behind.unfolded(norm)

    @torch.no_grad()
    def absorb_norm_(self, weight: Tensor, bias: Optional[Tensor] = None) -> None:
        """Make the layer compute, in eval mode, a convolution and the norm behind it, whose values ``norm_kxk`` holds.

        The origin's norm keeps gain and statistics, those of the convolution without its bias. The last norms of the
        side branches get its gain and bias. Where the gain is zero, or next to it, the kernel that it hides stays as it
        is: training starts from it (timm's ``zero_init_last``). Cumulative averages (no momentum) count anew.

        Args:
            weight: Kernel of the convolution ``(o, i/g, kh, kw)``.
            bias: Bias of the convolution ``(o,)``, or None for zeros.

        Raises:
            UserError: For another shape. The layer is then unchanged.
        """
        self.check_parts()
        check_kernel(self, self.weight_shape, weight, bias)
        norm, sides = self.norm_kxk, self._side_norms()
        with without_autocast(norm.weight), full_float32():
            kernel, folded_bias = fold_batch_norm(weight, bias, norm)
            mean, var = kept_statistics(norm)
            if bias is not None:
                mean.sub_(bias.to(mean))
            for own in sides:
                own.weight.fill_(1.0)
                own.bias.zero_()
            side_kernel, side_bias = self._side_kernel_bias()  # so that nothing is divided by a gain
            std = torch.sqrt(var.to(kernel) + norm.eps).reshape(-1, 1, 1, 1)
            self.conv_kxk.weight.copy_(weight.to(kernel) - self.attach_rate * std * side_kernel)
            for own in sides:
                own.weight.copy_(norm.weight)
                own.bias.copy_(norm.bias)
            norm.bias.sub_(self.attach_rate * (len(sides) * norm.bias + norm.weight * side_bias))
            hidden = self._hidden()
            composed, composed_bias = self._fold()  # take up the rounding of the first pass
            gain = torch.where(hidden, 1.0, norm.weight).to(std).reshape(-1, 1, 1, 1)
            self.conv_kxk.weight.add_((kernel - composed) * (std / gain))
            norm.bias.add_(folded_bias - composed_bias)
            count_anew_(norm)
            self.conv_kxk.weight.copy_(torch.where(hidden.view(-1, 1, 1, 1), weight, self.conv_kxk.weight))

    def _hidden(self) -> Tensor:
        """Which outputs ``(o,)`` show nothing of the input, since all branches come next to zero times."""
        gains = torch.stack([self.norm_kxk.weight, *(self.attach_rate * norm.weight for norm in self._side_norms())])
        return gains.abs().amax(0).float() < HIDDEN  # which float16 rounds to zero

    @classmethod
    @torch.no_grad()
    def from_conv(
            cls: Type[NormedT],
            conv: nn.Conv2d,
            generator: Optional[torch.Generator] = None,
            *,
            same_function: bool = True,
            norm: Optional[nn.BatchNorm2d] = None,
            **kwargs: Any,
    ) -> NormedT:
        """A rep layer for a convolution and the norm behind it, with their function in eval mode unless told otherwise.

        Of a freshly drawn layer the last norm of every branch starts with the weight and bias of the norm that it
        replaces, so that the host decides how a residual block starts (timm's ``zero_init_last``).

        Args:
            conv: The convolution; it stays as it is.
            generator: Source of the branches' draw.
            same_function: Whether the layer computes what the pair does, or is freshly drawn.
            norm: Batch norm behind it, see :meth:`absorb_norm_`. None for a convolution alone.
            **kwargs: More arguments of the layer's constructor.

        Returns:
            A layer on the same device, in the same dtypes and mode, trainable where the pair is.

        Raises:
            UserError: If this layer cannot stand for the pair.
        """
        if norm is None:
            return super().from_conv(conv, generator, same_function=same_function, **kwargs)
        if not norm.affine:
            raise UserError(f'{cls.__name__} needs a batch norm with weight and bias, got {norm}')
        kept_statistics(norm)
        kwargs.update(eps=norm.eps, momentum=norm.momentum)
        layer = synchronized_as(norm, super().from_conv(conv, generator, same_function=False, **kwargs))
        layer.stock_bias = None if conv.bias is None else conv.bias.requires_grad
        for own in layer._norms():
            if own.weight.dtype != norm.weight.dtype:
                own.to(norm.weight.dtype)
        for own in (layer.norm_kxk, *layer._side_norms()):
            own.weight.copy_(norm.weight)
            own.bias.copy_(norm.bias)
        for own in layer._norms():
            own.train(norm.training)
            if norm.num_batches_tracked is None:
                own.num_batches_tracked = None
            own.weight.requires_grad_(norm.weight.requires_grad)
            own.bias.requires_grad_(norm.bias.requires_grad)
        if layer.stock_bias:
            layer.norm_kxk.bias.requires_grad_(True)
        if same_function:
            values = norm.state_dict()
            for key in values.keys() - layer.norm_kxk.state_dict().keys():  # of an activation in it
                del values[key]
            layer.norm_kxk.load_state_dict(values)
            layer.absorb_norm_(conv.weight, conv.bias)
        return layer


def _norm_of(values: Tensor) -> Tensor:
    """Root of the sum of squares over the first axis; squares of the smallest floats are zero, so not of them."""
    peak = values.abs().amax(0)
    return peak * (values / torch.where(peak > 0, peak, 1.0)).square().sum(0).sqrt()


def _square_of_sum_over_sum_of_squares(branches: Sequence[Tensor]) -> Tensor:
    """For every output of kernels ``(o, i/g, h, w)``, ``(o,)``; one where their sum is zero."""
    flat = torch.stack([kernel.flatten(1) for kernel in branches])
    peak = flat.abs().amax((0, 2), keepdim=True)
    flat = flat / torch.where(peak > 0, peak, 1.0)  # squares of the smallest floats are zero
    square = flat.sum(0).square().sum(1)
    return torch.where(square > 0, square / flat.square().sum((0, 2)), 1.0)


def _is_plain(conv: nn.Module) -> bool:
    """Whether a module computes what a plain convolution of its kernel does, its values computed or not."""
    plain, found = nn.Conv2d, type(conv)
    same = found.forward is plain.forward and getattr(found, '_conv_forward', None) is plain._conv_forward
    return same and conv.bias is None and conv.padding_mode == 'zeros'


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Take so many rows and columns off each border, as a view."""
    return x[:, :, height:x.shape[2] - height, width:x.shape[3] - width]


def is_foldable_pair(place: Place) -> bool:
    """Whether a layer with norms can stand for a convolution and the norm behind it, but for the kernel's size."""
    norm = place.norm
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not is_foldable(norm):
        return False
    if not norm.affine or norm.running_mean is None or place.read_between or place.norm_stays:
        return False
    return not isinstance(place.conv.padding, str)


@dataclass(frozen=True)
class NormedMethod(Method):
    """A method whose layers have a norm in each branch; it takes 3x3 to 5x5 convolutions with a batch norm behind."""

    takes_norm = True

    def takes(self, place: Place) -> bool:
        sizes = place.conv.kernel_size
        return is_foldable_pair(place) and min(sizes) > 1 and max(sizes) <= MAX_KERNEL_SIZE
