"""Precision of composing: away from autocast, and in full float32 where training may use less."""
import threading
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial, wraps
from typing import Any, Callable, ContextManager, Iterator, List, Tuple

import torch
from torch import Tensor

__all__ = ['float32_products', 'full_float32', 'sheltered', 'without_autocast']

WITH_AUTOCAST = ('cpu', 'cuda', 'mps', 'xpu')


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Context in which products keep the dtype of their factors; the meta device has no autocast to switch off."""
    return torch.autocast('cpu' if tensor.is_meta else tensor.device.type, enabled=False)


def sheltered(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A formula of a kernel as a forward calls it: away from autocast, half-precision tensors in float32.

    Args:
        formula: Function of tensors, of which the first decides, and of what else it takes.

    Returns:
        A function of the same arguments, whose result has the dtype of the first.
    """
    @wraps(formula)
    def run(*args: Any) -> Tensor:
        dtype = args[0].dtype
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        with without_autocast(args[0]):
            full = [
                arg.to(compute) if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
            return formula(*full).to(dtype)
    return run


class _HighestPrecision:
    """The settings of the process, which are put back when the last of those inside leaves, in whichever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: List[Tuple[Callable[[Any], None], Any]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._before = _switch_to_highest()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                for put, value in () if self._inside else self._before:
                    put(value)


_highest_precision = _HighestPrecision()


def _switch_to_highest() -> List[Tuple[Callable[[Any], None], Any]]:
    """Allow float32 products in full float32 only; what puts the settings back."""
    backends: Any = torch.backends
    allow_conv_tf32 = partial(setattr, backends.cudnn, 'allow_tf32')
    older: List[Tuple[Callable[[Any], None], Any]] = []
    newer: List[Tuple[Callable[[Any], None], Any]] = []
    with suppress(RuntimeError):  # torch refuses to tell it once fp32_precision says something else
        older.append((torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    with suppress(RuntimeError):
        older.append((allow_conv_tf32, backends.cudnn.allow_tf32))
    for backend, operation in (('cuda', 'matmul'), ('mkldnn', 'matmul'), ('cudnn', 'conv'), ('cudnn', 'rnn')):
        holder: Any = getattr(getattr(backends, backend), operation, None)
        if hasattr(holder, 'fp32_precision'):  # torch 2.9 and newer
            newer.append((partial(setattr, holder, 'fp32_precision'), holder.fp32_precision))
    torch.set_float32_matmul_precision('highest')
    allow_conv_tf32(False)
    for put, _ in newer:
        put('ieee')
    return older + newer


def float32_products() -> Any:
    """What float32 products may be computed in now, by whichever of torch's settings."""
    matmul: Any = torch.backends.cuda.matmul
    if hasattr(matmul, 'fp32_precision'):  # torch 2.9 and newer, where the older question may be refused
        return matmul.fp32_precision
    return torch.get_float32_matmul_precision()


@contextmanager
def _full_float32() -> Iterator[None]:
    with ExitStack() as stack:
        for kind in filter(torch.is_autocast_enabled, WITH_AUTOCAST):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_highest_precision())
        yield


def full_float32() -> ContextManager[None]:
    """Context in which float32 is computed in full, whatever was allowed for training: autocast, or TF32 products.

    A compiled or exported graph cannot switch that, so there it does nothing.
    """
    return nullcontext() if torch.compiler.is_compiling() else _full_float32()
