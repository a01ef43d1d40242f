"""Composition of OREPA kernels: the plain formulas, and the same with an explicit backward that saves only parameters.

Composing is all that OREPA adds to a plain convolution, so it is written in few, large operations. The parameters that
end in the outputs lie side by side in one tensor ``branches`` of shape ``(o, i/g, l)``: for every pair of an output
and an input channel one row, divided into

``[origin taps k | fixed-filter weights b | separable weights e | inner taps m*k]``

with ``k = kh * kw`` taps; ``b`` branches of a 1x1 followed by a fixed filter (average, frequency prior, and the centre
tap where there is a plain 1x1); ``e`` depthwise filters per input channel; ``m = t / i`` inner kernels per input
channel of the 1x1-KxK branch. The scales of all branches act as one tensor of gains ``(o, l)``. So one product, one sum
and one optimizer update serve all branches. Branches may be missing: then there are no such entries, and the inner 1x1
or the depthwise filters have no channels.

The function exists twice, tested against each other: :func:`compose_orepa_plain` is the formula in operations that
autograd, ``torch.export``, ``torch.func`` and TorchScript follow; :func:`compose_orepa` has an explicit backward, for
plain autograd in eager mode and under ``torch.compile``. All other derivatives go through the plain formula:
:func:`needs_plain_formula` tells which is wanted.
"""
import math
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .precision import without_autocast

__all__ = [
    'compose_orepa', 'compose_orepa_plain', 'compose_pointwise', 'compose_pointwise_plain', 'needs_plain_formula',
    'prefers_channels_last', 'spread_scale',
]

# Input channels that share one matrix product in the gradients of the separable branch.
INPUTS_PER_PRODUCT = 4


def spread_scale(scale: Tensor, attach_rate: Tensor, row_branch: Tensor) -> Tensor:
    """Gain of every entry of ``branches``: its branch's scale, times the attach rate unless it is the origin's.

    Args:
        scale: One row for each branch, ``(n, o)``.
        attach_rate: In [0, 1]; 0-dim, or one for each output channel.
        row_branch: Constant ``(2, n, l)``, one where entry ``l`` belongs to branch ``n``: the origin's entries in the
            first matrix, those of the side branches in the second.

    Returns:
        ``(o, l)``.
    """
    if attach_rate.dim() == 0:
        return scale.t().mm(torch.addcmul(row_branch[0], row_branch[1], attach_rate))
    return scale.t().mm(row_branch[0]).add_((scale * attach_rate).t().mm(row_branch[1]))


def compose_orepa_plain(
        branches: Tensor,
        gains: Tensor,
        seq_1x1: Tensor,
        dw_conv: Tensor,
        filters: Tensor,
        groups: int,
) -> Tensor:
    """OREPA kernel from its parameters, as the formula is written (OREPA equations 3 and 4).

    Args:
        branches: ``(o, i/g, l)``, divided as the module docstring says.
        gains: ``(o, l)``, from :func:`spread_scale`.
        seq_1x1: Learnt residual of the inner 1x1, ``(t, i/g, 1, 1)``; the identity is added to it. Without that branch
            ``t`` is 0.
        dw_conv: ``(i*e, 1, kh, kw)``; the filters of one input channel lie together. Without that branch ``e`` is 0.
        filters: Constant ``(o, l, k)``, the spatial filter that each entry acts by: its own tap for the origin and for
            the inner taps (through the identity), a fixed filter, or zero for the separable weights.
        groups: Number of groups ``g``.

    Returns:
        ``(o, i/g, kh, kw)``.
    """
    out_channels, in_per_group = branches.shape[0], branches.shape[1]
    taps = filters.shape[2]
    expansion = dw_conv.shape[0] // (groups * in_per_group)
    ratio = seq_1x1.shape[0] // (groups * in_per_group)
    direct = branches.shape[2] - ratio * taps - expansion

    # Origin, 1x1 then a fixed filter of the output channel, and the inner kernels seen through the identity. The long
    # dimension of every product is last.
    kernel = torch.einsum('olk,oil->oki', filters * gains.unsqueeze(2), branches)

    # 1x1 then KxK: the inner kernels seen through the learnt residual.
    # A missing branch adds an empty sum: no size is asked for, which a tracer would complain of.
    weighted = branches * gains.unsqueeze(1)
    out_per_group = out_channels // groups
    inner = weighted[:, :, direct + expansion:].reshape(groups, out_per_group, in_per_group, ratio, taps)
    mixer = seq_1x1.reshape(groups, ratio, in_per_group, in_per_group)
    kernel = kernel + torch.einsum('gojmk,gmji->goki', inner, mixer).reshape(kernel.shape)

    # Depthwise then 1x1.
    separable = weighted[:, :, direct:direct + expansion].reshape(groups, out_per_group, in_per_group, expansion)
    depthwise = dw_conv.reshape(groups, in_per_group, expansion, taps)
    kernel = kernel.transpose(1, 2)
    kernel = kernel + torch.einsum('goie,giek->goik', separable, depthwise).reshape(kernel.shape)
    return kernel.reshape(out_channels, in_per_group, dw_conv.shape[2], dw_conv.shape[3])


def _inner_matrix(branches: Tensor, gains: Tensor, first: int, taps: int, groups: int) -> Tensor:
    """Scaled inner kernels as the matrix of the 1x1-KxK product, ``(g, o/g * k, t/g)``, written in one pass."""
    out_channels, in_per_group, entries = branches.shape
    ratio = (entries - first) // taps
    inner = branches[:, :, first:].view(out_channels, in_per_group, ratio, taps)
    gain = gains[:, first].view(-1, 1, 1, 1)
    if torch.compiler.is_compiling():  # writes in one pass without being told where to
        return (inner * gain).permute(0, 3, 2, 1).reshape(groups, -1, ratio * in_per_group)
    matrix = branches.new_empty(out_channels, taps, ratio, in_per_group)
    torch.mul(inner, gain, out=matrix.permute(0, 3, 2, 1))
    return matrix.view(groups, -1, ratio * in_per_group)


def _by_input(rows: Tensor, groups: int) -> Tensor:
    """``(o, i/g, n)`` as one matrix for each input channel, ``(i, o/g, n)``; a view unless grouped."""
    out_channels, in_per_group, entries = rows.shape
    if groups == 1:
        return rows.transpose(0, 1)
    rows = rows.reshape(groups, out_channels // groups, in_per_group, entries)
    return rows.transpose(1, 2).reshape(groups * in_per_group, -1, entries)


def _by_output(matrices: Tensor, groups: int) -> Tensor:
    """The inverse of :func:`_by_input`, always a view: ``(g, o/g, i/g, n)``."""
    inputs, out_per_group, entries = matrices.shape
    return matrices.view(groups, inputs // groups, out_per_group, entries).transpose(1, 2)


def _compose_orepa_forward(
        branches: Tensor,
        gains: Tensor,
        seq_1x1: Tensor,
        dw_conv: Tensor,
        filters: Tensor,
        groups: int,
        channels_last: bool,
) -> Tensor:
    out_channels, in_per_group, entries = branches.shape
    taps = filters.shape[2]
    height, width = dw_conv.shape[2:]
    expansion = dw_conv.shape[0] // (groups * in_per_group)
    first_inner = entries - seq_1x1.shape[0] // (groups * in_per_group) * taps
    first_separable = first_inner - expansion

    # All products have a long dimension last: few taps there would leave most of a vector register empty.
    kernel = torch.bmm((filters * gains.unsqueeze(2)).transpose(1, 2), branches.transpose(1, 2))
    if first_inner < entries:
        matrix = _inner_matrix(branches, gains, first_inner, taps, groups)
        kernel.view(groups, -1, in_per_group).baddbmm_(matrix, seq_1x1.view(groups, -1, in_per_group))
    if expansion == 0:
        kernel = kernel.view(out_channels, height, width, in_per_group).permute(0, 3, 1, 2)
        return kernel if channels_last else kernel.contiguous()

    pointwise = _by_input(branches[:, :, first_separable:first_inner], groups)
    separable = _by_output(torch.bmm(pointwise, dw_conv.view(-1, expansion, taps)), groups)
    gain = gains[:, first_separable].view(groups, -1, 1, 1)
    by_group = kernel.view(groups, -1, taps, in_per_group).transpose(2, 3)
    if channels_last:
        by_group.addcmul_(separable, gain)
        return kernel.view(out_channels, height, width, in_per_group).permute(0, 3, 1, 2)
    if torch.compiler.is_compiling():
        return torch.addcmul(by_group, separable, gain).reshape(out_channels, in_per_group, height, width)
    kernel = branches.new_empty(out_channels, in_per_group, height, width)
    torch.addcmul(by_group, separable, gain, out=kernel.view(groups, -1, in_per_group, taps))
    return kernel


def _inner_backward(
        grad: Tensor,
        grad_branches: Tensor,
        branches: Tensor,
        gains: Tensor,
        seq_1x1: Tensor,
        first_inner: int,
        groups: int,
) -> Tensor:
    """Gradient of seq_1x1; what the inner kernels get through it is added to that of the branches."""
    out_channels, in_per_group = branches.shape[:2]
    taps = grad.shape[2] * grad.shape[3]
    mixer = seq_1x1.view(groups, -1, in_per_group)
    grad_matrix = grad.permute(0, 2, 3, 1).reshape(groups, -1, in_per_group)
    grad_mixer = torch.bmm(_inner_matrix(branches, gains, first_inner, taps, groups).transpose(1, 2), grad_matrix)
    grad_inner = torch.bmm(grad_matrix, mixer.transpose(1, 2)).view(out_channels, taps, -1, in_per_group)
    grad_branches[:, :, first_inner:].view(out_channels, in_per_group, -1, taps).add_(grad_inner.permute(0, 3, 2, 1))
    return grad_mixer.view(seq_1x1.shape)


def _separable_backward(
        grad: Tensor,
        grad_rows: Tensor,
        grad_branches: Tensor,
        branches: Tensor,
        gains: Tensor,
        dw_conv: Tensor,
        direct: int,
        groups: int,
) -> Tensor:
    """Gradient of dw_conv; that of the weights on it is written to that of the branches."""
    out_channels, in_per_group, taps = grad_rows.shape
    expansion = dw_conv.shape[0] // (groups * in_per_group)
    first_inner = direct + expansion
    # A few input channels at a time, so that the products are not too narrow.
    block = math.gcd(in_per_group, INPUTS_PER_PRODUCT)
    grad_rows = _by_input(grad_rows.view(out_channels, -1, block * taps), groups)
    filters_of_input = dw_conv.view(-1, block, expansion, taps)
    depthwise = torch.diag_embed(filters_of_input.permute(0, 2, 3, 1), dim1=1, dim2=3)
    depthwise = depthwise.view(-1, block * expansion, block * taps)
    if groups == 1 and not torch.compiler.is_compiling():
        # the transposed result is rows of outputs, which copy faster than blocks of inputs
        grad_pointwise = grad.new_empty(out_channels, in_per_group // block, block * expansion)
        torch.bmm(grad_rows, depthwise.transpose(1, 2), out=grad_pointwise.transpose(0, 1))
    else:
        grad_pointwise = _by_output(torch.bmm(grad_rows, depthwise.transpose(1, 2)), groups).contiguous()
    grad_branches[:, :, direct:first_inner].copy_(grad_pointwise.view(out_channels, in_per_group, expansion))
    del depthwise, grad_pointwise
    weighted = branches[:, :, direct:first_inner] * gains[:, direct, None, None]
    weighted = _by_input(weighted.view(out_channels, -1, block * expansion), groups)
    grad_depthwise = torch.bmm(weighted.transpose(1, 2), grad_rows).view(-1, block, expansion, block, taps)
    return grad_depthwise.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(dw_conv.shape)


def _compose_orepa_backward(
        grad: Tensor,
        branches: Tensor,
        gains: Tensor,
        seq_1x1: Tensor,
        dw_conv: Tensor,
        filters: Tensor,
        groups: int,
) -> Tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor]]:
    """Gradients of branches, gains, seq_1x1 and dw_conv. The order keeps the temporaries that live together small."""
    out_channels, in_per_group, entries = branches.shape
    taps = filters.shape[2]
    expansion = dw_conv.shape[0] // (groups * in_per_group)
    first_inner = entries - seq_1x1.shape[0] // (groups * in_per_group) * taps
    grad_rows = grad.contiguous().view(out_channels, in_per_group, taps)
    # First without the gains: the gradient of the gains needs it so.
    grad_branches = torch.bmm(grad_rows, filters.transpose(1, 2))
    grad_mixer: Optional[Tensor] = None
    grad_depthwise: Optional[Tensor] = None
    if first_inner < entries:
        grad_mixer = _inner_backward(grad, grad_branches, branches, gains, seq_1x1, first_inner, groups)
    if expansion > 0:
        grad_depthwise = _separable_backward(
            grad, grad_rows, grad_branches, branches, gains, dw_conv, first_inner - expansion, groups)
    del grad_rows
    grad_gains = (grad_branches * branches).sum(1)
    grad_branches.mul_(gains.unsqueeze(1))
    return grad_branches, grad_gains, grad_mixer, grad_depthwise


# Older torch does not tell exporting from compiling.
_is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)


def needs_plain_formula(*tensors: Tensor) -> bool:
    """Whether something else than plain autograd must see into the operations on these tensors.

    That is an exporter, a tracer, a transform of ``torch.func``, which all tensors meet while it is active,
    forward-mode differentiation of one of them, or a batched gradient (``is_grads_batched=True``).
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return _is_exporting()
    return torch.jit.is_tracing() or any(
        torch._C._functorch.is_legacy_batchedtensor(t) or forward_ad.unpack_dual(t).tangent is not None
        for t in tensors)


def prefers_channels_last(x: Tensor) -> bool:
    """Whether a convolution of ``x`` wants its kernel in channels-last format, if it is not the plain formula's."""
    if torch.jit.is_scripting():
        return False
    if needs_plain_formula(x):  # under vmap a tensor does not tell
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _plain_gradients(
        ctx: Any,
        saved: Sequence[Tensor],
        formula: Callable[..., Tensor],
        grad: Tensor,
) -> Optional[List[Optional[Tensor]]]:
    """Gradients of the saved tensors through the plain formula, None where the explicit backward will do.

    The formula is for a gradient that will itself be differentiated or that is batched, and for that of the last saved
    tensor, which is a constant to the explicit backward.
    """
    create_graph = torch.is_grad_enabled()
    if not (create_graph or ctx.needs_input_grad[len(saved) - 1] or needs_plain_formula(grad)):
        return None
    with torch.enable_grad():
        kernel = formula(*saved, ctx.groups)
    wanted = [tensor for tensor, needed in zip(saved, ctx.needs_input_grad) if needed]
    found = iter(torch.autograd.grad(kernel, wanted, grad, create_graph=create_graph))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:len(saved)]]


class _ComposeOrepa(torch.autograd.Function):

    @staticmethod
    def forward(ctx, branches, gains, seq_1x1, dw_conv, filters, groups, channels_last):
        ctx.save_for_backward(branches, gains, seq_1x1, dw_conv, filters)
        ctx.groups = groups
        return _compose_orepa_forward(branches, gains, seq_1x1, dw_conv, filters, groups, channels_last)

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # once: checkpointing hands it out no second time
        with without_autocast(grad):
            grads = _plain_gradients(ctx, saved, compose_orepa_plain, grad)
            if grads is None:
                branches, gains, seq_1x1, dw_conv, filters = saved
                own = _compose_orepa_backward(grad, branches, gains, seq_1x1, dw_conv, filters, ctx.groups)
                grads = [*own, None]
        return (*grads, None, None)


def compose_orepa(
        branches: Tensor,
        gains: Tensor,
        seq_1x1: Tensor,
        dw_conv: Tensor,
        filters: Tensor,
        groups: int,
        channels_last: bool = False,
) -> Tensor:
    """The function of :func:`compose_orepa_plain` for plain autograd, with an explicit backward.

    Args:
        branches: ``(o, i/g, l)``, contiguous.
        gains: ``(o, l)``, the same for all entries of one branch, as :func:`spread_scale` gives them.
        seq_1x1: ``(t, i/g, 1, 1)``, contiguous.
        dw_conv: ``(i*e, 1, kh, kw)``, contiguous.
        filters: ``(o, l, k)``.
        groups: Number of groups ``g``.
        channels_last: Memory format of the kernel.

    Returns:
        ``(o, i/g, kh, kw)``.
    """
    return _ComposeOrepa.apply(branches, gains, seq_1x1, dw_conv, filters, groups, channels_last)


def compose_pointwise_plain(
        conv_1x1: Tensor,
        seq_first: Tensor,
        seq_second: Tensor,
        scale: Tensor,
        attach_rate: Tensor,
        groups: int,
) -> Tensor:
    """Rep-1x1 kernel from its parameters: a 1x1 convolution beside a sequence of two (OREPA, Rep-1x1).

    Args:
        conv_1x1: Origin ``(o, i/g, 1, 1)``.
        seq_first: ``(t, i/g, 1, 1)``.
        seq_second: ``(o, t/g, 1, 1)``.
        scale: Origin and sequence, ``(2, o)``.
        attach_rate: Multiplies the sequence; 0-dim, or one for each output channel.
        groups: Number of groups ``g``.

    Returns:
        ``(o, i/g, 1, 1)``.
    """
    second = seq_second * (scale[1] * attach_rate).reshape(-1, 1, 1, 1)
    sequential = torch.matmul(
        second.reshape(groups, -1, second.shape[1]), seq_first.reshape(groups, -1, seq_first.shape[1]))
    return conv_1x1 * scale[0].reshape(-1, 1, 1, 1) + sequential.reshape(conv_1x1.shape)


class _ComposePointwise(torch.autograd.Function):

    @staticmethod
    def forward(ctx, conv_1x1, seq_first, seq_second, scale, attach_rate, groups):
        ctx.save_for_backward(conv_1x1, seq_first, seq_second, scale, attach_rate)
        ctx.groups = groups
        return compose_pointwise_plain(conv_1x1, seq_first, seq_second, scale, attach_rate, groups)

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        with without_autocast(grad):
            grads = _plain_gradients(ctx, saved, compose_pointwise_plain, grad)
            if grads is None:
                conv_1x1, seq_first, seq_second, scale, attach_rate = saved
                own = _compose_pointwise_backward(
                    grad, conv_1x1, seq_first, seq_second, scale, attach_rate, ctx.groups)
                grads = [*own, None]
        return (*grads, None)


def _compose_pointwise_backward(
        grad: Tensor,
        conv_1x1: Tensor,
        seq_first: Tensor,
        seq_second: Tensor,
        scale: Tensor,
        attach_rate: Tensor,
        groups: int,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    out_channels = conv_1x1.shape[0]
    grad = grad.reshape(out_channels, -1)
    by_group = grad.view(groups, out_channels // groups, -1)
    first = seq_first.view(groups, -1, by_group.shape[2])
    second = seq_second.view(out_channels, -1)
    rate = (scale[1] * attach_rate).unsqueeze(1)
    grad_first = torch.bmm((second * rate).view(groups, -1, first.shape[1]).transpose(1, 2), by_group)
    grad_second = torch.bmm(by_group, first.transpose(1, 2)).view(second.shape)
    grad_scale = torch.stack([
        (grad * conv_1x1.view(out_channels, -1)).sum(1),
        (grad_second * second).sum(1) * attach_rate,
    ])
    return (
        (grad * scale[0].unsqueeze(1)).view(conv_1x1.shape),
        grad_first.view(seq_first.shape),
        grad_second.mul_(rate).view(seq_second.shape),
        grad_scale,
    )


def compose_pointwise(
        conv_1x1: Tensor,
        seq_first: Tensor,
        seq_second: Tensor,
        scale: Tensor,
        attach_rate: Tensor,
        groups: int,
) -> Tensor:
    """The function of :func:`compose_pointwise_plain` for plain autograd, with an explicit backward."""
    return _ComposePointwise.apply(conv_1x1, seq_first, seq_second, scale, attach_rate, groups)


# A symbolic trace records these calls as they are: it cannot look into an autograd function.
torch.fx.wrap('compose_orepa')
torch.fx.wrap('compose_pointwise')
