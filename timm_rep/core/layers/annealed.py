"""The contract of annealing: a module with an origin branch and side branches, which an attach rate multiplies."""
import copy
import weakref
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, TypeVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import UserError

__all__ = [
    'AnnealedModule', 'OriginPart', 'check_attach_rate', 'check_kernel', 'check_own_values', 'is_channels_last',
    'refuse_stock_form',
]

# A parameter, and the index of what belongs to the origin branch: a row, slices, or ... for the whole.
OriginPart = Tuple[nn.Parameter, Any]

# Of a plain convolution, and of timm's RepVGG block: no rep layer has a parameter of such a name.
STOCK_KEYS = ('weight', 'conv_1x1.conv.weight')
STOCK_FORM = (
    'are in stock form, without branches. If those of all layers are, timm.create_model(NAME, pretrained=True, '
    'pretrained_cfg_overlay=dict(file=PATH, num_classes=N)) puts them into the branches, and so does timm_rep.expand '
    'with a stock model that holds them; else they are of a model with branches in other layers.'
)

# Hooks that put a computed tensor in the place of a parameter before each forward.
COMPUTING = (BasePruningMethod, SpectralNorm, WeightNorm)

# Averages (EMA) give a model at least this weight in an update.
LEAST_WEIGHT = 1e-6

AnnealedT = TypeVar('AnnealedT', bound='AnnealedModule')


def check_attach_rate(rate: float) -> None:
    """Raise a UserError if this is no attach rate."""
    if not 0.0 <= rate <= 1.0:
        raise UserError(f'attach rate must lie in [0, 1], got {rate}')


def refuse_stock_form(prefix: str, error_msgs: List[str]) -> None:
    """Say once that a layer is given the weights of a plain convolution, with ``strict=False`` too.

    Args:
        prefix: Of the layer's weights, which end in a dot unless it is the whole model.
        error_msgs: As torch's ``_load_from_state_dict`` collects them.
    """
    if not any(message.endswith(STOCK_FORM) for message in error_msgs):
        error_msgs.append(f'The weights{f" of {prefix[:-1]}" if prefix else ""} {STOCK_FORM}')


def check_kernel(module: nn.Module, shape: Sequence[int], weight: Tensor, bias: Optional[Tensor]) -> None:
    """Raise a UserError if a kernel and bias are not of the shape that a module takes."""
    if tuple(weight.shape) != tuple(shape):
        raise UserError(f'{type(module).__name__} takes a kernel of shape {tuple(shape)}, got {tuple(weight.shape)}')
    if bias is not None and tuple(bias.shape) != (shape[0],):
        raise UserError(f'bias must have shape ({shape[0]},), got {tuple(bias.shape)}')


def check_own_values(module: nn.Module) -> None:
    """Raise a UserError if a parameter of a module is computed from others, so that writing to it would be in vain."""
    for part in module.modules():
        if parametrize.is_parametrized(part) or any(isinstance(h, COMPUTING) for h in part._forward_pre_hooks.values()):
            raise UserError(
                f'the values of a {type(module).__name__} cannot be written: a parametrization, or pruning, computes '
                'them. Remove it first (torch.nn.utils.prune.remove, parametrize.remove_parametrizations)')


def is_channels_last(kernel: Tensor) -> bool:
    """Whether a kernel is in the memory format channels-last, and not in that of other tensors as well."""
    return kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()


class _Tie:
    """A module and the copies of it that are alive. In a pickle it ties those together that are in it."""

    def __init__(self, original: Optional['AnnealedModule'] = None) -> None:
        self.copies: weakref.WeakSet[AnnealedModule] = weakref.WeakSet()
        self._original = None if original is None else weakref.ref(original)

    def original(self) -> Optional['AnnealedModule']:
        """The module, if it is alive."""
        return None if self._original is None else self._original()

    def find_original(self, module: 'AnnealedModule') -> None:
        """Take a module that came out of a pickle for the original, but no shallow copy of it."""
        if self.original() is None:
            self._original = weakref.ref(module)

    def __reduce__(self) -> Any:
        return _Tie, ()


class _KnownToCopy:
    """What a copy of a module knows, to tell whether it was averaged with what it was copied from.

    Values are kept as numbers, so that nothing waits for a GPU as long as the copy holds what the original holds.
    """

    def __init__(self, tie: _Tie, original: 'AnnealedModule', buffers: Tuple[Tensor, ...]) -> None:
        self.tie = tie
        self.has_a_rate_of_its_own = False  # once it was set by the copy's own methods
        self.note_own(buffers)
        self.note_original(original._annealing_buffers())

    def __getstate__(self) -> Dict[str, Any]:
        return dict(vars(self), _tensors=(), _versions=None, _others_versions=None)  # they are others in another place

    def original(self) -> Optional['AnnealedModule']:
        """The module that this is a copy of, if it is alive."""
        return self.tie.original()

    def note_own(self, buffers: Tuple[Tensor, ...]) -> None:
        """Note what the copy itself has written."""
        self._tensors = buffers
        self._versions = _versions(buffers)
        self._own = _numbers(buffers)

    def note_original(self, buffers: Tuple[Tensor, ...]) -> None:
        """Note what the original holds now."""
        self._others = _numbers(buffers)
        self._others_versions = _versions(buffers)

    def may_be_averaged(self, buffers: Tuple[Tensor, ...], thoroughly: bool) -> bool:
        """Whether something else than the copy has written its buffers, and it could matter."""
        if thoroughly:  # a write by way of `data` moves no version
            return _numbers(buffers) != self._own or _versions(buffers) != self._versions
        if any(now is not tensor for now, tensor in zip(buffers, self._tensors)):
            return False  # put in their place for a while, by torch.func
        if _versions(buffers) == self._versions:
            return False
        original = self.original()
        told = original is None or _versions(original._annealing_buffers()) == self._others_versions
        return self._own != self._others or not told

    def take_over(self, buffers: Tuple[Tensor, ...]) -> bool:
        """Replace means of own and original values by those of the original. Others were written on purpose.

        Returns:
            Whether the buffers then hold other values than the copy has written.
        """
        now, before = _numbers(buffers), self._own
        written_again = now == self._own and (self.has_a_rate_of_its_own or self._averaging_would_show(buffers[0]))
        slacks = [8 * torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0 for tensor in buffers]
        is_mean = all(_lies_between(*values) for values in zip(now, self._own, self._others, slacks))
        if is_mean and not written_again:
            with torch.no_grad():
                for tensor, value in zip(buffers, self._others):
                    tensor.fill_(value)
        self.note_own(buffers)
        return self._own != before

    def _averaging_would_show(self, rate: Tensor) -> bool:
        """Whether a mean with the original's attach rate is another number than the copy's own, rounded as it is."""
        own, other = self._own[0], self._others[0]
        return LEAST_WEIGHT * abs(own - other) > torch.finfo(rate.dtype).eps * max(own, other)


def _versions(buffers: Tuple[Tensor, ...]) -> List[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in buffers]  # such tensors have none


def _numbers(buffers: Tuple[Tensor, ...]) -> List[float]:
    return [0 if tensor.is_meta else tensor.item() for tensor in buffers]


def _lies_between(value: float, one: float, other: float, slack: float) -> bool:
    """Whether a value lies between two others, up to rounding: whole numbers, which have no slack, are cut off."""
    low, high = sorted((one, other))
    return low - (slack or 1) <= value <= high + slack


class AnnealedModule(nn.Module):
    """A module that folds into one convolution and is made of an origin branch and side branches.

    Subclasses call :meth:`_init_annealing` in their constructor and define :meth:`compose_weight_bias`,
    :meth:`restore_`, :meth:`redraw_side_branches_`, :meth:`branch_kernels` and :meth:`branch_gradients`.

    Attributes:
        attach_rate: 0-dim buffer in [0, 1] that multiplies the side branches; saved in the state_dict. An averaged copy
            of a module (EMA), whatever averages it, has the attach rate and time step of the module.
        time_step: 0-dim buffer, how many time steps have begun before the one in force; saved in the state_dict.
    """

    __jit_unused_properties__ = ['attach_rate', 'time_step']

    # Of a module with copies, what they have in common; of a copy, what it knows of itself and of its original.
    _copies: Optional['_Tie'] = None
    _known: Optional['_KnownToCopy'] = None

    # Whether the module was last moved into the memory format channels-last, which its tensors need not show.
    is_channels_last = False

    def _init_annealing(self, device: Any = None, dtype: Optional[torch.dtype] = None) -> None:
        self.register_buffer('attach_rate', torch.ones((), device=device, dtype=dtype))
        self.register_buffer('time_step', torch.zeros((), dtype=torch.long, device=device))

    @property
    def attach_rate(self) -> Tensor:
        return self._annealing_buffer('attach_rate')

    @property
    def time_step(self) -> Tensor:
        return self._annealing_buffer('time_step')

    def _annealing_buffer(self, name: str) -> Tensor:
        if name not in self._buffers:
            raise AttributeError(f'{type(self).__name__} has no attribute {name!r}')
        self._settle(thoroughly=False)
        buffer: Any = self._buffers[name]
        return buffer

    def _annealing_buffers(self) -> Tuple[Any, Any]:
        return self._buffers['attach_rate'], self._buffers['time_step']

    def _settle(self, thoroughly: bool = True) -> None:
        """Take over the state of the module that this is an averaged copy of (EMA), if it was averaged.

        Averaging treats all buffers alike, but a mean of two attach rates is the rate of neither model.

        Args:
            thoroughly: Also where the copy holds what the original held when it last told; rounding may have moved it.
        """
        known = self._known
        if known is None or torch.compiler.is_compiling():
            return
        original = known.original()
        if known.may_be_averaged(self._annealing_buffers(), thoroughly):
            if original is not None:
                known.note_original(original._annealing_buffers())
            if known.take_over(self._annealing_buffers()):
                self._tell_copies()
        if original is None:
            self._known = None

    def _before_writing(self) -> None:
        """Let the copies take over what the module holds before it changes."""
        self._settle()
        for twin in self._living_copies():
            twin._settle()

    def _living_copies(self) -> List['AnnealedModule']:
        return [] if self._copies is None else list(self._copies.copies)

    def _tell_copies(self) -> None:
        for twin in self._living_copies():
            if twin._known is not None:
                twin._known.note_original(self._annealing_buffers())

    def _written(self, on_purpose: bool = True) -> None:
        """What is to be done after the module itself has written its buffers."""
        if self._known is not None:
            self._known.note_own(self._annealing_buffers())
            self._known.has_a_rate_of_its_own |= on_purpose
        self._tell_copies()

    def __deepcopy__(self: AnnealedT, memo: Dict[int, Any]) -> AnnealedT:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self._untied_state(), memo))
        original = None if self._known is None else self._known.original()
        twin._become_copy_of(memo.get(id(original), self))
        for other in self._living_copies():
            if id(other) in memo:  # a model and its average, copied together
                memo[id(other)]._become_copy_of(twin)
        return twin

    def _become_copy_of(self, original: 'AnnealedModule') -> None:
        if original._copies is None:
            original._copies = _Tie(original)
        self._known = _KnownToCopy(original._copies, original, self._annealing_buffers())
        original._copies.copies.add(self)

    def _untied_state(self) -> Dict[str, Any]:
        self._settle()
        state: Dict[str, Any] = dict(super().__getstate__())
        for key in ('_copies', '_known', '_update', '_together'):
            state.pop(key, None)
        return state

    def __getstate__(self) -> Dict[str, Any]:
        state = self._untied_state()
        if self._living_copies():
            state['_copies'] = self._copies
        if self._known is not None:
            state['_known'] = self._known
        return state

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._copies is not None:
            self._copies.find_original(self)
        if self._known is not None:
            self._known.note_own(self._annealing_buffers())
            self._known.tie.copies.add(self)

    def _apply(self: AnnealedT, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AnnealedT:
        self._before_writing()
        # a tensor that goes where the kernels go
        memory_format = torch.channels_last if self.is_channels_last else torch.contiguous_format
        buffer: Any = self._buffers['attach_rate']
        kernel = torch.empty(2, 2, 2, 2, dtype=buffer.dtype, device=buffer.device, memory_format=memory_format)
        super()._apply(fn, recurse)
        self.is_channels_last = is_channels_last(fn(kernel))
        self._written(on_purpose=False)
        return self

    def _load_from_state_dict(  # torch's
            self,
            state_dict: Mapping[str, Tensor],
            prefix: str,
            local_metadata: Any,
            strict: bool,
            missing_keys: List[str],
            unexpected_keys: List[str],
            error_msgs: List[str],
    ) -> None:
        self._before_writing()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        stock_keys = [f'{prefix}{key}' for key in STOCK_KEYS if f'{prefix}{key}' in state_dict]
        if stock_keys and f'{prefix}attach_rate' not in state_dict:
            refuse_stock_form(prefix, error_msgs)  # would leave what was drawn
        original = None if self._known is None else self._known.original()
        alike = original is not None and _numbers(original._annealing_buffers()) == _numbers(self._annealing_buffers())
        self._written(on_purpose=not alike)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._settle(thoroughly=False)  # averaging asks for it at every update
        super()._save_to_state_dict(*args, **kwargs)

    def train(self: AnnealedT, mode: bool = True) -> AnnealedT:
        self._settle()  # before a compiled forward, which does not look
        return super().train(mode)

    def set_attach_rate_(self, rate: float) -> None:
        """Set the factor of the side branches.

        Args:
            rate: In [0, 1].

        Raises:
            UserError: For a rate outside [0, 1].
        """
        check_attach_rate(rate)
        self._before_writing()
        self.attach_rate.fill_(rate)
        self._written()

    def set_time_step_(self, number: int) -> None:
        """Set the number of time steps that have begun before the one in force; this changes nothing else."""
        self._before_writing()
        self.time_step.fill_(number)
        self._written()

    def set_exact_rate_(self, rate: float, compensate: bool) -> None:
        """Set the attach rate at which :meth:`restore_` shall be exact when a time step begins.

        Args:
            rate: Attach rate that will be in force, in [0, 1].
            compensate: Whether the origin branch shall make up for the side branches at that rate, or at zero.
        """
        self.set_attach_rate_(rate if compensate else 0.0)

    def compose_weight_bias(self) -> Tuple[Tensor, Optional[Tensor]]:
        """Kernel ``(o, i/g, kh, kw)`` and bias ``(o,)`` at the attach rate in force, in the parameters' dtype."""
        raise NotImplementedError(f'{type(self).__name__} must define compose_weight_bias')

    def restore_(self, weight: Tensor, bias: Optional[Tensor] = None) -> None:
        """Make the module compute exactly this kernel, whatever its side branches hold."""
        raise NotImplementedError(f'{type(self).__name__} must define restore_')

    def redraw_side_branches_(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw the side branches afresh and leave the origin branch alone; this changes the module's function."""
        raise NotImplementedError(f'{type(self).__name__} must define redraw_side_branches_')

    def stock_form(self, behind: Optional[nn.Module]) -> Tuple[nn.Module, Optional[nn.Module]]:
        """What stands for the module in the stock model, as new modules.

        Args:
            behind: The next child of the same parent, if there is one.

        Returns:
            The module in its own place, and the one in the place of the next child, None if that stays.
        """
        raise NotImplementedError(f'{type(self).__name__} must define stock_form')

    def branch_kernels(self) -> Dict[str, Tensor]:
        """The kernel ``(o, i/g, kh, kw)`` that each branch adds to the sum, by name; the first is the origin's."""
        raise NotImplementedError(f'{type(self).__name__} must define branch_kernels')

    def branch_gradients(self) -> Dict[str, Tensor]:
        """The gradient of each branch's kernel parameter, by name; the first is the origin's. None are left out."""
        raise NotImplementedError(f'{type(self).__name__} must define branch_gradients')

    def origin_parameters(self) -> List[OriginPart]:
        """What of the parameters belongs to the origin branch: kernel, scale, and gain and bias of its norm.

        Returns:
            Each parameter with the index of that part, ``...`` for the whole.
        """
        raise NotImplementedError(f'{type(self).__name__} must define origin_parameters')

    def set_side_gain_(self, gain: float) -> None:
        """Set the gains of the side branches' last norms; a module without norms in its branches has none."""

    def _put_back_(self, weight: Tensor, bias: Optional[Tensor], keep_gain: bool) -> None:
        """Restore a folded kernel; where the origin branch has a norm, with the gain that it has, or with gain one."""
        self.restore_(weight, bias)

    def check_parts(self) -> None:
        """Raise a UserError if a part is not as it was made, so that nothing can be folded or written."""
        check_own_values(self)

    @torch.no_grad()
    def begin_time_step_(
            self,
            generator: Optional[torch.Generator] = None,
            attach_rate: float = 0.0,
            compensate: bool = False,
            keep_gain: bool = False,
            side_gain: float = 1.0,
    ) -> None:
        """Fold all branches, draw the side branches afresh, and put the folded kernel into the origin branch (RepAn).

        Args:
            generator: Source of the draw.
            attach_rate: Rate in force afterwards.
            compensate: Take what the fresh side branches add at that rate off the origin branch, so that outputs in
                eval mode stay the same. Without, they stay the same at rate zero. Linear layers always do it, and
                their outputs stay the same in training mode too.
            keep_gain: Let the origin branch's norm keep its gain, but where that is zero, instead of setting it to one.
            side_gain: Gain of the last norms of the fresh side branches.
        """
        self._before_writing()
        self.check_parts()
        weight, bias = self.compose_weight_bias()
        self.redraw_side_branches_(generator)
        self.set_side_gain_(side_gain)
        self.set_exact_rate_(attach_rate, compensate)
        self._put_back_(weight, bias, keep_gain)
        self.set_attach_rate_(attach_rate)
        self.set_time_step_(int(self.time_step) + 1)
