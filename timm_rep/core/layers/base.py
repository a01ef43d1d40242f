"""The contract of rep layers, which look like convolutions, and what those without norms in their branches share."""
import math
from typing import Any, Dict, Hashable, Iterable, Optional, Sequence, Tuple, Type, TypeVar, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..composition import prefers_channels_last
from ..errors import UserError
from ..precision import full_float32
from .annealed import AnnealedModule, check_kernel, is_channels_last
from .composed import composed_kernel, refuse_writing
from .together import KernelsTogether
from .update import UpdateKernels

__all__ = ['LinearRepLayer', 'RepLayer', 'is_trainable', 'kaiming_uniform_']

# What a convolution is made with, besides its bias.
GEOMETRY = (
    'in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation', 'groups', 'padding_mode')

LayerT = TypeVar('LayerT', bound='RepLayer')
LinearT = TypeVar('LinearT', bound='LinearRepLayer')


def _pair(name: str, value: Any, least: int) -> Tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise UserError(f'{name} must be one or two integers of at least {least}, got {value!r}')
    return pair


def kaiming_uniform_(
        tensor: Tensor,
        fan_in: float,
        negative_slope: float = 0.0,
        generator: Optional[torch.Generator] = None,
) -> Tensor:
    """Fill a tensor, or a slice of one, from U(-b, b) with ``b = sqrt(6 / ((1 + a^2) * fan_in))``.

    ``torch.nn.init.kaiming_uniform_`` reads the fan from the shape, which a slice of a larger parameter does not have.
    With a generator the draw is the same whatever the device of the tensor.

    Args:
        tensor: Filled in place.
        fan_in: Inputs that one output sums over.
        negative_slope: ``a``.
        generator: Source of the draw; the default generator of the tensor's device if None.

    Returns:
        The tensor.
    """
    bound = math.sqrt(6.0 / ((1.0 + negative_slope ** 2) * fan_in))
    with torch.no_grad():
        if generator is None or tensor.is_meta:
            return tensor.uniform_(-bound, bound)
        drawn = torch.empty(tensor.shape, dtype=tensor.dtype, device=generator.device)
        return tensor.copy_(drawn.uniform_(-bound, bound, generator=generator))


def standardized(kernel: Tensor, gain: Optional[Tensor], eps: float) -> Tensor:
    """A kernel ``(o, i, kh, kw)`` with mean 0 and variance 1 in each output channel, times its gain ``(o,)``."""
    rows = kernel.reshape(1, kernel.shape[0], -1)
    return F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0., eps=eps).reshape(kernel.shape)


def is_trainable(parameters: Iterable[Optional[Tensor]]) -> bool:
    """Whether any of these parameters is trained."""
    return any(parameter is not None and parameter.requires_grad for parameter in parameters)


class RepLayer(AnnealedModule):
    """A convolution look-alike whose kernel is composed from branches.

    It has a convolution's attributes (``in_channels`` to ``padding_mode``, ``bias``, and ``weight``, which composes at
    every read and refuses to be written to), but is not an ``nn.Conv2d``: nothing can write its weight by mistake.

    Subclasses define, besides what annealing asks for, :meth:`compose_weight`, :meth:`reset_parameters` and
    :meth:`fuse`.

    Args:
        in_channels: Input channels ``i``.
        out_channels: Output channels ``o``.
        kernel_size: Height and width, odd.
        stride: Stride of the convolution.
        padding: Zero padding in pixels, or ``'same'`` / ``'valid'``.
        dilation: Dilation of the kernel.
        groups: Number of groups ``g``; divides both channel counts.
        padding_mode: Only ``'zeros'``.

    Raises:
        UserError: For an even kernel size, another padding mode, or channels that the groups do not divide.
    """

    __constants__ = list(GEOMETRY)
    __jit_unused_properties__ = [*AnnealedModule.__jit_unused_properties__, 'weight']

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Union[int, Tuple[int, int]],
            stride: Union[int, Tuple[int, int]] = 1,
            padding: Union[str, int, Tuple[int, int]] = 0,
            dilation: Union[int, Tuple[int, int]] = 1,
            groups: int = 1,
            padding_mode: str = 'zeros',
            device: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if padding_mode != 'zeros':
            raise UserError(f"{name} supports padding_mode 'zeros', got {padding_mode!r}")
        if isinstance(padding, str) and padding not in ('same', 'valid'):
            raise UserError(f"padding must be 'same', 'valid' or integers, got {padding!r}")
        if min(in_channels, out_channels, groups) < 1 or in_channels % groups or out_channels % groups:
            raise UserError(
                f'channels must be positive multiples of groups, got in_channels={in_channels}, '
                f'out_channels={out_channels}, groups={groups}'
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair('kernel_size', kernel_size, 1)
        if any(size % 2 == 0 for size in self.kernel_size):
            raise UserError(f'{name} needs an odd kernel size (branches share a centre), got {self.kernel_size}')
        self.stride = _pair('stride', stride, 1)
        self.padding = padding if isinstance(padding, str) else _pair('padding', padding, 0)
        self.dilation = _pair('dilation', dilation, 1)
        self.groups = groups
        self.padding_mode = padding_mode
        if padding == 'same' and self.stride != (1, 1):
            raise UserError(f"padding 'same' needs stride 1, got {self.stride}")
        self._init_annealing(device)

    def init_non_persistent_buffers(self) -> None:
        """Fill the constants that are not saved; timm calls it after it built a model on the meta device."""

    @staticmethod
    def _device_of_constant(constant: Tensor, parameter: Tensor) -> torch.device:
        """Beside a parameter of the layer itself; where it is already while that is on the meta device."""
        return constant.device if parameter.is_meta else parameter.device

    def _apply(self: LayerT, fn: Any, recurse: bool = True) -> LayerT:
        # The constants keep full precision through a change of dtype, and get their values after to_empty(). Before it,
        # since whoever has filled a model on the meta device tensor by tensor (accelerate) knows nothing of them.
        self.init_non_persistent_buffers()
        super()._apply(fn, recurse)
        self.init_non_persistent_buffers()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.init_non_persistent_buffers()  # of what load_state_dict(assign=True) has put in place of meta tensors

    def compose_weight(self) -> Tensor:
        """Compose the kernel at the attach rate in force, differentiably.

        Returns:
            ``(o, i/g, kh, kw)`` in the parameters' dtype; composed in full float32, or float64 for float64 parameters.
        """
        raise NotImplementedError(f'{type(self).__name__} must define compose_weight')

    @property
    def weight(self) -> Tensor:
        """The composed kernel, computed anew at every read; writing to it raises a UserError."""
        return composed_kernel(self._kernel_to_read())

    @weight.setter
    def weight(self, value: Any) -> None:
        refuse_writing()

    def _kernel_to_read(self) -> Tensor:
        return self.compose_weight()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'padding_mode' and value != 'zeros':
            raise UserError(f"a {type(self).__name__} supports padding_mode 'zeros', got {value!r}")
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: Optional[nn.Parameter]) -> None:
        if name in ('weight', 'weight_orig'):  # layer.weight = nn.Parameter(...); torch.nn.utils.prune
            refuse_writing()
        super().register_parameter(name, param)

    @property
    def weight_shape(self) -> Tuple[int, int, int, int]:
        """Shape of the kernel, without composing it."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _reset_annealing(self) -> None:
        self.set_attach_rate_(1.0)
        self.set_time_step_(0)

    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw all parameters afresh, with the paper's initial values; attach rate one, time step zero."""
        raise NotImplementedError(f'{type(self).__name__} must define reset_parameters')

    def fuse(self) -> nn.Conv2d:
        """A new plain convolution with the layer's function; the layer itself stays as it is."""
        raise NotImplementedError(f'{type(self).__name__} must define fuse')

    def stock_form(self, behind: Optional[nn.Module]) -> Tuple[nn.Module, Optional[nn.Module]]:
        return self.fuse(), None

    def extra_repr(self) -> str:
        text = f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}'
        defaults: Dict[str, Any] = dict(padding=(0, 0), dilation=(1, 1), groups=1)
        for key, default in defaults.items():
            if getattr(self, key) != default:
                text += f', {key}={getattr(self, key)}'
        return text if self.bias is not None else f'{text}, bias=False'

    def _geometry(self) -> Dict[str, Any]:
        return {name: getattr(self, name) for name in GEOMETRY}

    def _own_kwargs(self) -> Dict[str, Any]:
        """Constructor arguments beyond a convolution's geometry."""
        return {}

    def like(self: LayerT, in_channels: int, device: Any = None) -> LayerT:
        """A freshly drawn layer of the same kind with another number of input channels.

        Args:
            in_channels: Input channels ``i``.
            device: Where to put it; the layer's own device if None.

        Returns:
            A layer in the same dtype.
        """
        reference = next(self.parameters())
        kwargs = dict(self._geometry(), **self._own_kwargs(), in_channels=in_channels, dtype=reference.dtype)
        return type(self)(**kwargs, device=device or reference.device)

    @classmethod
    @torch.no_grad()
    def from_conv(
            cls: Type[LayerT],
            conv: nn.Conv2d,
            generator: Optional[torch.Generator] = None,
            *,
            same_function: bool = True,
            **kwargs: Any,
    ) -> LayerT:
        """A rep layer with the geometry of a plain convolution, and with its function unless told otherwise.

        Args:
            conv: The convolution; it stays as it is.
            generator: Source of the branches' draw.
            same_function: Whether the layer computes what the convolution does, by :meth:`restore_`, or is freshly
                drawn for a training from scratch.
            **kwargs: More arguments of the layer's constructor.

        Returns:
            A layer on the same device, in the same dtype and mode, trainable if the convolution is.

        Raises:
            UserError: If this layer cannot stand for the convolution.
        """
        if not conv.weight.is_floating_point():
            raise UserError(f'{cls.__name__} takes real kernels, got {conv.weight.dtype}')
        geometry = {name: getattr(conv, name) for name in GEOMETRY}
        kwargs.update(geometry, generator=generator, device=conv.weight.device, dtype=conv.weight.dtype)
        layer = cls(**kwargs).train(conv.training)
        for module in layer.modules():
            if isinstance(module, AnnealedModule):
                module._buffers['attach_rate'] = module.attach_rate.to(conv.weight.dtype)
        if same_function:
            layer.restore_(conv.weight, conv.bias)
        for parameter in layer.parameters():
            parameter.requires_grad_(conv.weight.requires_grad)
        return layer.to(memory_format=torch.channels_last) if is_channels_last(conv.weight) else layer

    def _plain_conv(self, weight: Tensor, bias: Optional[Tensor], trainable: bool, bias_trainable: bool) -> nn.Conv2d:
        # skip_init: fusing draws nothing from the global random generator
        conv = torch.nn.utils.skip_init(
            nn.Conv2d, **self._geometry(), bias=bias is not None, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            conv.weight.copy_(weight)
            if conv.bias is not None and bias is not None:
                conv.bias.copy_(bias)
                conv.bias.requires_grad_(bias_trainable)
        conv.weight.requires_grad_(trainable)
        conv = conv.train(self.training)
        return conv.to(memory_format=torch.channels_last) if self.is_channels_last else conv


class LinearRepLayer(RepLayer):
    """A rep layer without norms in its branches: every step composes one kernel and convolves once.

    Fusing and restoring are exact in training mode too, since nothing in it depends on batch statistics. They compose
    in full float32; the forward composes in TF32 where that is allowed.
    """

    __constants__ = [*RepLayer.__constants__, 'standardize_eps']

    bias: Optional[nn.Parameter]

    # What is added to the kernel's variance where it is standardised (StandardizedConv2d); None where it is not.
    standardize_eps: Optional[float] = None

    # Kernels that the micro-batches of an update share; none outside of an update.
    _update: Optional[UpdateKernels] = None

    # What composes the kernels of all layers of a model at once, if something does.
    _together: Optional[KernelsTogether] = None

    def _before_writing(self) -> None:
        if self._update is not None:
            self._update.forget(self)
        super()._before_writing()

    def _init_bias(self, bias: bool, device: Optional[torch.device], dtype: Optional[torch.dtype]) -> None:
        self.register_parameter(
            'bias', nn.Parameter(torch.empty(self.out_channels, device=device, dtype=dtype)) if bias else None)

    def _own_kwargs(self) -> Dict[str, Any]:
        return dict(bias=self.bias is not None)

    def _reset_bias(self, generator: Optional[torch.Generator]) -> None:
        # nn.Conv2d's own initial values: U(-b, b), b = 1 / sqrt(fan_in)
        if self.bias is not None:
            fan_in = self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]
            kaiming_uniform_(self.bias, 6 * fan_in, generator=generator)

    def _compose(self, channels_last: bool) -> Tensor:
        raise NotImplementedError(f'{type(self).__name__} must define _compose')

    def compose_weight(self) -> Tensor:
        with full_float32():
            return self._compose(False)

    def _kernel_to_read(self) -> Tensor:
        exchanging = self._together is not None and self._together.is_exchanging()
        return self.kernel_for(self.attach_rate) if exchanging else self.compose_weight()

    def compose_weight_bias(self) -> Tuple[Tensor, Optional[Tensor]]:
        return self.compose_weight(), self.bias

    def kernel_for(self, x: Tensor) -> Tensor:
        """The composed kernel for an input, which the micro-batches of an update share."""
        if torch.jit.is_scripting():
            weight = self._compose(False)
        elif self._together is not None and self._together.exchange is not None:
            weight = self._together.exchanged_kernel(self, x)
        elif torch.compiler.is_compiling():  # before the others, so that no graph depends on them
            weight = self._compose(prefers_channels_last(x))
        elif self._update is not None:
            weight = self._update.kernel(self, x)
        else:
            weight = self.new_kernel(prefers_channels_last(x))
        return weight

    def new_kernel(self, channels_last: bool) -> Tensor:
        """The kernel, composed now: alone, or together with those of all layers of a model."""
        return self._compose(channels_last) if self._together is None else self._together.kernel(self, channels_last)

    def composed_like(self) -> Hashable:
        """What layers have in common whose kernels one call of :meth:`compose_side_by_side` can compose.

        None if that method is not defined.
        """
        return None

    @classmethod
    def compose_side_by_side(cls, layers: Sequence[Any], channels_last: bool) -> Tensor:
        """The kernels of several layers that are composed alike, in one call.

        Args:
            layers: Layers of this class with one :meth:`composed_like`.
            channels_last: Memory format of the kernels.

        Returns:
            The kernels of all one after another, ``(n*o, i/g, kh, kw)``.
        """
        raise NotImplementedError(f'{cls.__name__} composes each kernel by itself')

    def forward(self, x: Tensor, gain: Optional[Tensor] = None) -> Tensor:
        """Convolve with the composed kernel, which is standardised first where the layer's place asks for that.

        Args:
            x: ``(n, i, h, w)``.
            gain: ``(o,)``, what a standardised kernel is multiplied by.
        """
        kernel = self.kernel_for(x)
        if self.standardize_eps is not None:
            kernel = standardized(kernel, gain, self.standardize_eps)
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def set_exact_rate_(self, rate: float, compensate: bool) -> None:
        self.set_attach_rate_(rate)  # without norms, the origin branch can always make up for the others

    def clear_origin_(self) -> Tensor:
        """Set the origin branch to zero with scale one, and return its kernel to write to."""
        raise NotImplementedError(f'{type(self).__name__} must define clear_origin_')

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """A new ``nn.Conv2d`` with the composed kernel, on the same device, in the same dtype and mode.

        Returns:
            A convolution with the layer's outputs: to 1e-6 of the largest in float32, 1e-12 in float64. Its kernel is
            trainable if any branch is.
        """
        trainable = is_trainable(parameter for parameter in self.parameters() if parameter is not self.bias)
        return self._plain_conv(self.compose_weight(), self.bias, trainable, is_trainable([self.bias]))

    @torch.no_grad()
    def restore_(self, weight: Tensor, bias: Optional[Tensor] = None) -> None:
        """Make the layer compute exactly this kernel at the attach rate in force, whatever the side branches hold.

        The origin branch becomes ``K - attach_rate * (sum of the side branches)`` with scale one; no learnt scale is
        divided by. It is rounded once: to 6e-8 of the largest value of that sum, or of ``K``, in float32, to 4e-3 in
        bfloat16. So a kernel far smaller than its side branches loses digits, in a time step too.

        Args:
            weight: Kernel ``(o, i/g, kh, kw)``.
            bias: ``(o,)``; None sets an existing bias to zero.

        Raises:
            UserError: For another shape, a bias for a layer without one, or values that are computed (pruning). The
                layer is then unchanged.
        """
        check_kernel(self, self.weight_shape, weight, bias)
        if bias is not None and self.bias is None:
            raise UserError(f'this {type(self).__name__} was built with bias=False, it cannot hold a bias')
        self._before_writing()
        self.check_parts()
        weight = weight.clone()  # it may be a parameter of the layer
        origin = self.clear_origin_()
        for _ in range(2):  # the second pass takes up the rounding of the first
            origin.add_(weight.to(origin) - self.compose_weight())
        if self.bias is not None:
            self.bias.zero_() if bias is None else self.bias.copy_(bias)

    @classmethod
    def from_conv(cls: Type[LinearT], conv: nn.Conv2d, *args: Any, **kwargs: Any) -> LinearT:
        layer = super().from_conv(conv, *args, bias=conv.bias is not None, **kwargs)
        if layer.bias is not None and conv.bias is not None:
            layer.bias.requires_grad_(conv.bias.requires_grad)
        return layer


# A symbolic trace records this call as it is: a traced input has no memory format.
torch.fx.wrap('prefers_channels_last')
