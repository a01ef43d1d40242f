"""Layers with a batch norm in every branch, which stand for a convolution together with the norm behind it."""
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, Optional, Tuple, Type, TypeVar, Union

import torch
import torch.nn as nn
from timm.layers import freeze_batch_norm_2d
from torch import Tensor

from .. import kernels
from ..errors import UserError
from ..methods import Method, Place
from ..precision import full_float32, without_autocast
from .annealed import AnnealedModule, check_kernel
from .base import RepLayer, is_trainable, kaiming_uniform_
from .norms import FoldedNorm, fold_batch_norm, is_frozen, kept_statistics, reset_norm_

__all__ = ['NormedBranches', 'NormedMethod', 'NormedRepLayer']

# Redrawn kernels of side branches lie within this bound over sqrt(o) (RepAn).
REDRAW_BOUND = 0.1
MAX_KERNEL_SIZE = 5  # larger ones are left alone: the papers' networks have none but the stem's


NormedT = TypeVar('NormedT', bound='NormedRepLayer')


class NormedBranches(AnnealedModule):
    """What is made of branches with a norm in each, of which all but the origin have an attach rate.

    Folding and restoring go by the kept (running) statistics, so they are exact in eval mode at every attach rate; in
    training mode batch statistics replace the kept ones.

    Subclasses have :meth:`_origin`, whose convolution may itself be a rep layer, and name and fold their side branches
    (:meth:`_side_convs`, :meth:`_side_norms`, :meth:`_fold_sides`).
    """

    def _origin(self) -> Tuple[Any, Any]:
        """The convolution of the origin branch, and its norm, which is not used if the convolution has norms itself."""
        raise NotImplementedError(f'{type(self).__name__} must define _origin')

    def _side_convs(self) -> Dict[str, nn.Conv2d]:
        """The convolutions of the side branches that end in the outputs, by branch."""
        raise NotImplementedError(f'{type(self).__name__} must define _side_convs')

    def _side_norms(self) -> Tuple[nn.BatchNorm2d, ...]:
        """The last norm of every side branch."""
        raise NotImplementedError(f'{type(self).__name__} must define _side_norms')

    def _inner_norms(self) -> Tuple[nn.BatchNorm2d, ...]:
        """Norms inside a side branch."""
        return ()

    def _fold_sides(self) -> Dict[str, Tuple[Tensor, Tensor]]:
        """Kernel and bias ``(o,)`` of every side branch by the kept statistics, without the attach rate.

        A kernel may be smaller than the layer's, around the same centre.
        """
        raise NotImplementedError(f'{type(self).__name__} must define _fold_sides')

    def _fold_origin(self) -> Tuple[Tensor, Tensor]:
        conv, norm = self._origin()
        return conv.compose_weight_bias() if isinstance(conv, NormedBranches) else fold_batch_norm(
            conv.weight, None, norm)

    def _origin_norm(self) -> nn.BatchNorm2d:
        """The norm whose kept statistics the origin has."""
        conv, norm = self._origin()
        found: nn.BatchNorm2d = conv._origin_norm() if isinstance(conv, NormedBranches) else norm
        return found

    def _write_origin_(self, kernel: Tensor, bias: Tensor) -> None:
        """Let the origin compute this in eval mode; its norm keeps its statistics and gets gain one."""
        conv, norm = self._origin()
        if isinstance(conv, NormedBranches):
            conv.restore_(kernel, bias)
            return
        kernel, gamma, beta = kernels.unfold_norm(kernel, bias, *kept_statistics(norm), norm.eps)
        if isinstance(conv, RepLayer):
            conv.restore_(kernel)
        else:
            conv.weight.copy_(kernel)
        norm.weight.copy_(gamma)
        norm.bias.copy_(beta)

    def _shift_origin_(self, kernel: Tensor, bias: Tensor) -> None:
        """Add to the origin's kernel and bias, behind a norm of gain one."""
        conv, norm = self._origin()
        if isinstance(conv, NormedBranches):
            conv._shift_origin_(kernel, bias)
            return
        if isinstance(conv, RepLayer):
            conv.restore_(conv.compose_weight() + kernel)
        else:
            conv.weight.add_(kernel)
        norm.bias.add_(bias)

    def _pad(self, kernel: Tensor) -> Tensor:
        height, width = self.kernel_size  # type: ignore[misc]
        return kernels.pad_to_size(kernel, (height, width))

    def _side_kernel_bias(self) -> Tuple[Tensor, Tensor]:
        """Kernel ``(o, i/g, kh, kw)`` and bias ``(o,)`` of the sum of the side branches, without the attach rate."""
        sides = list(self._fold_sides().values())
        kernel = self._pad(kernels.merge_parallel([kernel for kernel, _ in sides]))
        bias = sides[0][1]
        for _, following in sides[1:]:
            bias = bias + following
        return kernel, bias

    def compose_weight_bias(self) -> Tuple[Tensor, Tensor]:
        """Kernel and bias by the kept statistics, at the attach rate in force, differentiably.

        Returns:
            Kernel ``(o, i/g, kh, kw)`` and bias ``(o,)``, in the parameters' dtype; composed in float32 at least.
        """
        parameter = next(self.parameters())
        with without_autocast(parameter), full_float32():
            kernel, bias = self._fold_origin()
            side_kernel, side_bias = self._side_kernel_bias()
            kernel, bias = kernel + self.attach_rate * side_kernel, bias + self.attach_rate * side_bias
        return kernel.to(parameter.dtype), bias.to(parameter.dtype)

    @torch.no_grad()
    def branch_kernels(self) -> Dict[str, Tensor]:
        """The kernel that each branch adds to the sum by the kept statistics, with the attach rate.

        Returns:
            A kernel ``(o, i/g, kh, kw)`` for each branch; they add up to that of :meth:`compose_weight_bias`.
        """
        with without_autocast(next(self.parameters())), full_float32():
            branches = self._origin_kernels()
            sides = self._fold_sides()
        return dict(branches, **{name: self.attach_rate * self._pad(kernel) for name, (kernel, _) in sides.items()})

    def _origin_kernels(self) -> Dict[str, Tensor]:
        """The origin's kernel; of a rep layer in its place those of its branches, whose sides get another name."""
        conv, norm = self._origin()
        if not isinstance(conv, RepLayer):
            return dict(origin=self._fold_origin()[0])
        branches = conv.branch_kernels()
        if not isinstance(conv, NormedBranches):
            branches = {name: fold_batch_norm(kernel, None, norm)[0] for name, kernel in branches.items()}
        return _told_apart(branches)

    def branch_gradients(self) -> Dict[str, Tensor]:
        conv, _ = self._origin()
        if isinstance(conv, RepLayer):
            gradients = _told_apart(conv.branch_gradients())
        else:
            gradients = {} if conv.weight.grad is None else dict(origin=conv.weight.grad)
        sides = {name: side.weight.grad for name, side in self._side_convs().items()}
        return dict(gradients, **{name: grad for name, grad in sides.items() if grad is not None})

    def _output_statistics(self) -> Tuple[Tensor, Tensor]:
        """Mean and variance ``(o,)`` of the outputs, as the weights and biases of the branches' last norms imply them.

        A norm's outputs have its bias for mean and its weight for standard deviation. So the mean is exact; the
        variance is as if the branches were uncorrelated.
        """
        conv, norm = self._origin()
        if isinstance(conv, NormedBranches):
            mean, var = conv._output_statistics()
        else:
            mean, var = norm.bias, norm.weight.square()
        for side in self._side_norms():
            mean = mean + self.attach_rate * side.bias
            var = var + (self.attach_rate * side.weight).square()
        return mean, var

    def _implied_statistics(self, bias: Tensor) -> Tuple[Tensor, Tensor]:
        """Mean and variance ``(o,)`` of the outputs of the folded kernel, whose bias is given."""
        mean, var = self._output_statistics()
        return mean - bias, var

    @torch.no_grad()
    def imply_statistics_(self) -> None:
        mean, var = self._implied_statistics(self.compose_weight_bias()[1])
        running_mean, running_var = kept_statistics(self._origin_norm())
        running_mean.copy_(mean)
        running_var.copy_(var)

    @torch.no_grad()
    def restore_(self, weight: Tensor, bias: Optional[Tensor] = None) -> None:
        """Make the module compute exactly this kernel and bias in eval mode, whatever the side branches hold.

        The origin branch takes ``K - attach_rate * (sum of the side branches)``. Its norm keeps its running statistics
        and gets gain one; no learnt weight is divided by.

        Args:
            weight: Kernel ``(o, i/g, kh, kw)``.
            bias: ``(o,)``, or None for zeros.

        Raises:
            UserError: For another shape. The module is then unchanged.
        """
        with without_autocast(next(self.parameters())), full_float32():
            side_kernel, side_bias = self._side_kernel_bias()
            check_kernel(self, side_kernel.shape, weight, bias)
            bias = torch.zeros_like(side_bias) if bias is None else bias.to(side_bias)
            weight = weight.to(side_kernel)
            self._write_origin_(weight - self.attach_rate * side_kernel, bias - self.attach_rate * side_bias)
            kernel, composed_bias = self.compose_weight_bias()  # take up the rounding of the first pass
            self._shift_origin_(weight - kernel, bias - composed_bias)

    @torch.no_grad()
    def redraw_side_branches_(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw the side branches afresh: kernels from U(-b, b) with ``b = 0.1 / sqrt(o)``, norms reset (RepAn).

        Args:
            generator: Source of the draw.
        """
        for conv in self._side_convs().values():
            # with a = 0 the bound is sqrt(6 / fan)
            kaiming_uniform_(conv.weight, 6 * conv.out_channels / REDRAW_BOUND ** 2, generator=generator)
        for norm in (*self._side_norms(), *self._inner_norms()):
            reset_norm_(norm)

    def _refuse_training(self) -> None:
        if self.training:
            raise UserError(
                f'cannot fuse {type(self).__name__} in training mode: its branches use batch statistics there, a '
                'fused convolution cannot. Call model.eval() first'
            )


def _told_apart(branches: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Tell the side branches of a layer in the origin's place from the module's own."""
    return {name if name == 'origin' else f'kxk_{name}': value for name, value in branches.items()}


class NormedRepLayer(NormedBranches, RepLayer):
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

    def _origin(self) -> Tuple[nn.Conv2d, nn.BatchNorm2d]:
        return self.conv_kxk, self.norm_kxk

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
        """The stock pair: a convolution without bias and a batch norm that have the layer's outputs in eval mode.

        Any statistics would do for that. The norm gets those that the branches' norms imply for further training: the
        sum of their means, and of their variances as if the branches were uncorrelated. It is frozen if the origin's
        is.

        Returns:
            Convolution and batch norm, trainable where any branch is.

        Raises:
            UserError: In training mode.
        """
        self._refuse_training()
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
            norm.weight.requires_grad_(self._trains_norms('weight'))
            norm.bias.requires_grad_(self._trains_norms('bias'))
        norm.load_state_dict(values)
        return self._plain_conv(kernel, None, self._trains_kernel(), False), norm.train(self.training)

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

        The gain of that norm goes into the origin's kernel, and into the statistics that the origin's norm keeps.

        Args:
            weight: Kernel of the convolution ``(o, i/g, kh, kw)``.
            bias: Bias of the convolution ``(o,)``, or None for zeros.

        Raises:
            UserError: For another shape. The layer is then unchanged.
        """
        check_kernel(self, self.weight_shape, weight, bias)
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
            A layer on the same device, in the same dtype and mode, trainable where the pair is.

        Raises:
            UserError: If this layer cannot stand for the pair.
        """
        if norm is None:
            return super().from_conv(conv, generator, same_function=same_function, **kwargs)
        if not norm.affine:
            raise UserError(f'{cls.__name__} needs a batch norm with weight and bias, got {norm}')
        kept_statistics(norm)
        kwargs.update(eps=norm.eps, momentum=norm.momentum)
        layer = super().from_conv(conv, generator, same_function=False, **kwargs)
        for own in (layer.norm_kxk, *layer._side_norms()):
            own.weight.copy_(norm.weight)
            own.bias.copy_(norm.bias)
        for own in layer._norms():
            own.weight.requires_grad_(norm.weight.requires_grad)
            own.bias.requires_grad_(norm.bias.requires_grad)
        if same_function:
            values = norm.state_dict()  # an activation in it may have some of its own
            layer.norm_kxk.load_state_dict({key: values[key] for key in layer.norm_kxk.state_dict()})
            layer.absorb_norm_(conv.weight, conv.bias)
        return layer


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Take so many rows and columns off each border, as a view."""
    return x[:, :, height:x.shape[2] - height, width:x.shape[3] - width]


@dataclass(frozen=True)
class NormedMethod(Method):
    """A method whose layers have a norm in each branch; it takes 3x3 to 5x5 convolutions with a batch norm behind."""

    takes_norm = True

    def takes(self, place: Place) -> bool:
        conv, norm, sizes = place.conv, place.norm, place.conv.kernel_size
        if norm is None or not FoldedNorm.accepts(norm) or not norm.affine or norm.running_mean is None:
            return False
        if place.read_between:
            return False
        plain = conv.bias is None and not isinstance(conv.padding, str)
        return plain and min(sizes) > 1 and max(sizes) <= MAX_KERNEL_SIZE
