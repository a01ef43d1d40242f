"""What reading the kernel of a rep layer gives: a tensor that is computed, so writing to it is refused."""
import copy
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..composition import needs_plain_formula
from ..errors import UserError

__all__ = ['ComposedKernel', 'composed_kernel', 'refuse_writing']

INPLACE_OPERATORS = frozenset(f'__i{name}__' for name in (
    'add', 'sub', 'mul', 'matmul', 'truediv', 'floordiv', 'mod', 'pow', 'and', 'or', 'xor', 'lshift', 'rshift'))
WRITES = INPLACE_OPERATORS | {'__setitem__'}
SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
SET_REQUIRES_GRAD = Tensor.requires_grad.__set__  # type: ignore[attr-defined]


def refuse_writing() -> None:
    """Raise a UserError that says how a kernel is written."""
    raise UserError(
        'the kernel of a rep layer is composed from its branches at every read, so writing to it would change nothing. '
        "Write with the layer's restore_(kernel); for plain convolutions, call timm_rep.fuse(model) first"
    )


def composed_kernel(kernel: Tensor) -> Tensor:
    """Let a kernel refuse writes; where a compiler, an exporter or torch.func looks at it, it stays as it is.

    Args:
        kernel: As composed.

    Returns:
        The same values.
    """
    watched = torch.compiler.is_compiling() or needs_plain_formula(kernel)
    return kernel if watched or type(kernel) is not Tensor else kernel.as_subclass(ComposedKernel)


class ComposedKernel(Tensor):
    """A kernel, or a view of one, that can be computed with but not written to; what comes of it is a plain tensor."""

    _is_detached = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, '__name__', '')
        if func == SET_REQUIRES_GRAD or (name == 'requires_grad_' and not args[0]._is_detached):
            raise UserError(
                'the kernel of a rep layer is composed from its branches at every read; set the flag on the layer: '
                'layer.requires_grad_(...)')
        named_so = name.endswith('_') and not name.endswith('__') and name != 'requires_grad_'
        if name in WRITES or func == SET_DATA or named_so or kwargs.get('inplace'):
            written = args[0] if args else None
        else:
            written = kwargs.get('out')
        for tensor in written if isinstance(written, (list, tuple)) else [written]:
            if isinstance(tensor, cls) and not isinstance(tensor, nn.Parameter):  # a new parameter is written to
                refuse_writing()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            if isinstance(result, (list, tuple)) and type(result) in (list, tuple):
                return type(result)(cls._guarded(part, (*args, *kwargs.values())) for part in result)
            result = cls._guarded(result, (*args, *kwargs.values()))
            if name == 'detach' and isinstance(result, cls):
                result._is_detached = True  # nn.Parameter(kernel) sets the flag of one
            return result

    @classmethod
    def _guarded(cls, result: Any, args: Any) -> Any:
        """The result, guarded if it is a view of a kernel."""
        kernels = [arg for arg in args if isinstance(arg, cls) and not isinstance(arg, nn.Parameter)]
        if type(result) is not Tensor or not kernels or not _has_memory(result):
            return result
        shares_memory = any(kernel.untyped_storage()._cdata == result.untyped_storage()._cdata for kernel in kernels)
        return result.as_subclass(cls) if shares_memory else result

    def _plain(self) -> Tensor:
        """As a plain tensor, or a plain parameter if it was made one."""
        plain = self.as_subclass(Tensor)
        return nn.Parameter(plain.detach(), self.requires_grad) if isinstance(self, nn.Parameter) else plain

    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(self._plain(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:  # a file with a kernel in it needs no class of ours
        return self._plain().__reduce_ex__(protocol)


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own: a sparse one has not, nor one inside torch.func."""
    return tensor.layout == torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
