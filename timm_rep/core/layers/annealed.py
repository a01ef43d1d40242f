"""The contract of annealing: a module with an origin branch and side branches, which an attach rate multiplies."""
import copy
import weakref
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from ..errors import UserError

__all__ = ['AnnealedModule', 'check_attach_rate', 'check_kernel']

AnnealedT = TypeVar('AnnealedT', bound='AnnealedModule')


def check_attach_rate(rate: float) -> None:
    """Raise a UserError if this is no attach rate."""
    if not 0.0 <= rate <= 1.0:
        raise UserError(f'attach rate must lie in [0, 1], got {rate}')


def check_kernel(module: nn.Module, shape: Sequence[int], weight: Tensor, bias: Optional[Tensor]) -> None:
    """Raise a UserError if a kernel and bias are not of the shape that a module takes."""
    if tuple(weight.shape) != tuple(shape):
        raise UserError(f'{type(module).__name__} takes a kernel of shape {tuple(shape)}, got {tuple(weight.shape)}')
    if bias is not None and tuple(bias.shape) != (shape[0],):
        raise UserError(f'bias must have shape ({shape[0]},), got {tuple(bias.shape)}')


class AnnealedModule(nn.Module):
    """A module that folds into one convolution and is made of an origin branch and side branches.

    Subclasses call :meth:`_init_annealing` in their constructor and define :meth:`compose_weight_bias`,
    :meth:`restore_`, :meth:`redraw_side_branches_`, :meth:`branch_kernels` and :meth:`branch_gradients`.

    Attributes:
        attach_rate: 0-dim float32 buffer in [0, 1] that multiplies the side branches; saved in the state_dict. An
            averaged copy of a module (EMA), whatever averages it, has the attach rate and time step of the module.
        time_step: 0-dim buffer, how many time steps have begun before the one in force; saved in the state_dict.
    """

    __jit_unused_properties__ = ['attach_rate', 'time_step']

    # Of a copy only: what it was copied from, and of each of the two buffers the tensor, its version and its value when
    # the module itself last wrote it.
    _copied_from: Optional['weakref.ref[AnnealedModule]'] = None
    _written: Dict[str, Tuple[Any, int, Tensor]] = {}

    def _init_annealing(self, device: Any = None) -> None:
        self.register_buffer('attach_rate', torch.ones((), device=device))
        self.register_buffer('time_step', torch.zeros((), dtype=torch.long, device=device))

    @property
    def attach_rate(self) -> Tensor:
        return self._annealing_buffer('attach_rate')

    @property
    def time_step(self) -> Tensor:
        return self._annealing_buffer('time_step')

    def _annealing_buffer(self, name: str) -> Tensor:
        """One of the two buffers; of an averaged copy (EMA) that of the model it averages.

        Averaging treats all buffers alike, but a mean of two attach rates is the rate of neither model. Values of a
        copy that changed, and not by its own methods, are such means.
        """
        if name not in self._buffers:
            raise AttributeError(f'{type(self).__name__} has no attribute {name!r}')
        tensor: Any = self._buffers[name]
        original = None if self._copied_from is None else self._copied_from()
        if original is None or torch.compiler.is_compiling():
            return tensor
        written, version, _ = self._written.get(name, (None, 0, tensor))
        if tensor is written and tensor._version != version:
            if not all(torch.equal(tensor, value) for tensor, _, value in self._written.values()):
                with torch.no_grad():
                    for each, (tensor, _, _) in self._written.items():
                        tensor.copy_(original._annealing_buffer(each))
            self._note_written()
        current: Tensor = self._buffers[name]  # type: ignore[assignment]
        return current

    def _note_written(self) -> None:
        if self._copied_from is not None:
            buffers = [(name, self._buffers[name]) for name in ('attach_rate', 'time_step')]
            self._written = {
                name: (tensor, tensor._version, tensor.detach().clone()) for name, tensor in buffers
                if tensor is not None and not tensor.is_inference()  # which has no version
            }

    def _settle(self) -> None:
        for name in ('attach_rate', 'time_step'):
            self._annealing_buffer(name)

    def __deepcopy__(self: AnnealedT, memo: Dict[int, Any]) -> AnnealedT:
        self._settle()
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin._copied_from = weakref.ref(self)
        twin._note_written()
        return twin

    def __getstate__(self) -> Dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ('_copied_from', '_written')}

    def _apply(self: AnnealedT, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AnnealedT:
        self._settle()
        rate: Any = self._buffers['attach_rate']
        super()._apply(fn, recurse)
        moved: Any = self._buffers['attach_rate']
        if moved.dtype != rate.dtype:  # a rate is the same number in every precision
            self._buffers['attach_rate'] = rate.to(moved.device)
        self._note_written()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._note_written()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._settle()
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
        self.attach_rate.fill_(rate)
        self._note_written()

    def set_time_step_(self, number: int) -> None:
        """Set the number of time steps that have begun before the one in force; this changes nothing else."""
        self.time_step.fill_(number)
        self._note_written()

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

    def imply_statistics_(self) -> None:
        """Let the origin branch's norm keep the statistics that the branches' norms imply for the folded kernel.

        A module without norms in its branches has none to set. This changes the function until :meth:`restore_`.
        """

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

    @torch.no_grad()
    def begin_time_step_(
            self,
            generator: Optional[torch.Generator] = None,
            attach_rate: float = 0.0,
            compensate: bool = False,
            imply_statistics: bool = False,
    ) -> None:
        """Fold all branches, draw the side branches afresh, and put the folded kernel into the origin branch (RepAn).

        Args:
            generator: Source of the draw.
            attach_rate: Rate in force afterwards.
            compensate: Take what the fresh side branches add at that rate off the origin branch, so that outputs in
                eval mode stay the same. Without, they stay the same at rate zero. Linear layers always do it, and
                their outputs stay the same in training mode too.
            imply_statistics: Give the origin branch's norm the statistics of the folded kernel instead of keeping its
                own, as :meth:`imply_statistics_` does.
        """
        weight, bias = self.compose_weight_bias()
        if imply_statistics:
            self.imply_statistics_()
        self.redraw_side_branches_(generator)
        self.set_exact_rate_(attach_rate, compensate)
        self.restore_(weight, bias)
        self.set_attach_rate_(attach_rate)
        self.set_time_step_(int(self.time_step) + 1)
