"""Check that a fused model computes what its training form computes, layer by layer and end to end."""
import dataclasses
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Iterator, List, Mapping, Optional, Tuple, Union

import torch
import torch.nn as nn
from torch import Tensor

from .errors import UserError
from .layers import FoldedNorm
from .precision import full_float32
from .sharded import check_whole
from .walk import annealed_modules, conv_name, folded_norms, image_shape, unwrapped, without_compiled_parts

__all__ = ['DEFAULT_RTOL', 'Difference', 'Report', 'VerificationError', 'check_values', 'compare_outputs', 'verify']

# Largest difference allowed, relative to the largest output.
DEFAULT_RTOL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class VerificationError(RuntimeError):
    """A fused model is not the function of its training form."""


@dataclass(frozen=True)
class Difference:
    """Largest difference of two outputs.

    Attributes:
        name: Layer, or '' for the whole model.
        absolute: Largest absolute difference.
        largest: Largest absolute value of the training form's output.
    """

    name: str
    absolute: float
    largest: float

    @property
    def relative(self) -> float:
        """The difference relative to the largest output."""
        return self.absolute / self.largest if self.largest else self.absolute


@dataclass(frozen=True)
class Report:
    """Outcome of :func:`verify`.

    Attributes:
        layers: Difference of every rep layer that the fused model has under the same name.
        model: Difference of the models' outputs.
        rtol: Tolerance relative to the largest output.
        atol: Absolute tolerance.
        exports: Difference of other formats of the fused model, by file.
    """

    layers: Tuple[Difference, ...]
    model: Difference
    rtol: float
    atol: float
    exports: Tuple[Difference, ...] = ()

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda d: d.relative, default=None)
        text = f'outputs agree to {self.model.relative:.1e} of the largest (tolerance {self.rtol:.0e})'
        if worst is not None:
            text += f'; {len(self.layers)} rep layers agree to {worst.relative:.1e} (worst: {worst.name})'
        for export in self.exports:
            text += f'; {export.name} agrees to {export.relative:.1e}'
        return text


@contextmanager
def _eval_mode(*models: nn.Module) -> Iterator[None]:
    training = [[(module, module.training) for module in model.modules()] for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for states in training:
            for module, was_training in states:
                module.training = was_training


def check_values(model: nn.Module) -> None:
    """Check that a model's state can be right at all.

    Args:
        model: Any model.

    Raises:
        VerificationError: If a value is not finite, or a running variance is negative.
        UserError: If the model is sharded, or its state holds something else than tensors.
    """
    check_whole(model)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):  # of a module with get_extra_state()
            raise UserError(f'{name} is a {type(tensor).__name__}, but files of weights hold tensors only')
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise VerificationError(f'{name} has values that are not finite')
        if name.endswith('running_var') and (tensor < 0).any():
            raise VerificationError(f'{name} has negative values')


def compare_outputs(name: str, expected: Tensor, actual: Tensor, rtol: float, atol: float = 0.0) -> Difference:
    """Compare two outputs, in float64.

    Args:
        name: Layer, or '' for the whole model.
        expected: Output of the training form.
        actual: Output of the fused form.
        rtol: Largest allowed difference relative to the largest expected value.
        atol: Absolute part of the tolerance.

    Returns:
        The difference, within the tolerance.

    Raises:
        VerificationError: If shapes or values differ, or one of the two is not finite.
    """
    label = f'layer {name}' if name else 'the model'
    if expected.shape != actual.shape:
        raise VerificationError(f'{label}: output shapes differ, {tuple(expected.shape)} and {tuple(actual.shape)}')
    for form, tensor in (('training', expected), ('fused', actual)):
        if not torch.isfinite(tensor).all():
            raise VerificationError(f'{label}: the {form} form puts out non-finite values')
    exact = torch.complex128 if expected.is_complex() or actual.is_complex() else torch.float64
    expected, actual = expected.to(exact), actual.to(exact)
    absolute, largest = ((t.abs().max().item() if t.numel() else 0.0) for t in (expected - actual, expected))
    difference = Difference(name, absolute, largest)
    allowed = atol + rtol * difference.largest
    if difference.absolute > allowed:
        raise VerificationError(
            f'{label} is off: largest difference {difference.absolute:.3e}, allowed {allowed:.3e} '
            f'(rtol {rtol:.0e} of the largest output {difference.largest:.3e}, atol {atol:.0e})'
        )
    return difference


def _compare_all(expected: Any, actual: Any, rtol: float, atol: float) -> Difference:
    """Compare all tensors of two outputs: one, or lists and dicts of feature maps. The largest difference of them."""
    wanted, found = list(_tensors(expected)), list(_tensors(actual))
    if not wanted:
        raise UserError(f'verify: there is no tensor in what the model puts out, a {type(expected).__name__}')
    if len(wanted) != len(found):
        raise VerificationError(f'the models put out {len(wanted)} and {len(found)} tensors')
    differences = [compare_outputs('', one, other, rtol, atol) for one, other in zip(wanted, found)]
    return max(differences, key=lambda difference: difference.relative)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif dataclasses.is_dataclass(output):
        yield from _tensors(vars(output))
    elif isinstance(output, (list, tuple, Mapping)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def _counterparts(
        model: nn.Module,
        fused: nn.Module,
        name: str,
        folded: Optional[Tuple[str, FoldedNorm]],
) -> Optional[Tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """A layer and what stands for it in the fused model, each with the norm that belongs to it."""
    try:
        layer, plain = model.get_submodule(name), fused.get_submodule(name)
    except AttributeError:  # folded further, e.g. RepVGG's deploy form
        return None
    if folded is not None:
        norm_name, norm = folded
        return nn.Sequential(layer, norm), nn.Sequential(plain, fused.get_submodule(norm_name))
    return layer, plain


def _layer_input(layer: Any, generator: torch.Generator) -> Tensor:
    size = [max(16, d * (k - 1) + 1) for k, d in zip(layer.kernel_size, layer.dilation)]
    x = torch.randn(2, layer.in_channels, *size, generator=generator, device='cpu')
    reference = next(layer.parameters())
    return x.to(device=reference.device, dtype=reference.dtype)


@torch.no_grad()
def verify(
        model: nn.Module,
        fused: nn.Module,
        *,
        inputs: Union[Tensor, Tuple[Any, ...], None] = None,
        rtol: Optional[float] = None,
        atol: float = 0.0,
) -> Report:
    """Compare a rep model with its fused form, in eval mode, layer by layer and end to end.

    Both compute in full float32 here, also where TF32 is allowed, or inside autocast.

    Args:
        model: Model in training form, also in wrappers (DDP, torch.compile, averaged copies).
        fused: The same model in stock or deploy form. Both may put out feature maps.
        inputs: Images ``(b, c, h, w)`` for the end-to-end check, or a tuple of all that the model is called with; two
            random images of the model's input size if None.
        rtol: Largest allowed difference relative to the largest output; by default 1e-10 in float64, 1e-5 in float32.
        atol: Absolute part of the tolerance.

    Returns:
        The differences found, all within the tolerance.

    Raises:
        VerificationError: If a layer or the model is off, or an output is not finite. It names the first that is.
        UserError: If inputs are needed and the model does not say its input size, or does not run on them.
    """
    model, fused = unwrapped(model), unwrapped(fused)
    reference = next(model.parameters())
    if rtol is None:
        rtol = DEFAULT_RTOL.get(reference.dtype, DEFAULT_RTOL[torch.float32])
    generator = torch.Generator().manual_seed(0)
    if inputs is None:
        shape = image_shape(model)
        if shape is None:
            raise UserError('verify: the model has no pretrained_cfg with an input_size; pass inputs')
        inputs = torch.randn(2, *shape, generator=generator, device='cpu')
        inputs = inputs.to(device=reference.device, dtype=reference.dtype)

    differences: List[Difference] = []
    with (
        without_compiled_parts(model), without_compiled_parts(fused),
        _eval_mode(model, fused), full_float32(),
    ):
        norms = folded_norms(model)
        for name, layer in annealed_modules(model):
            forms = _counterparts(model, fused, conv_name(model, name), norms.get(name))
            if forms is not None:
                x = _layer_input(layer, generator)
                differences.append(compare_outputs(name, forms[0](x), forms[1](x), rtol, atol))
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        try:
            expected = model(*arguments)
        except (RuntimeError, ValueError, TypeError) as error:
            shapes = ', '.join(str(tuple(getattr(value, 'shape', ()))) for value in arguments)
            raise UserError(f'verify: the model does not run on images of {shapes}: {error}') from error
        end_to_end = _compare_all(expected, fused(*arguments), rtol, atol)
    return Report(tuple(differences), end_to_end, rtol, atol)
