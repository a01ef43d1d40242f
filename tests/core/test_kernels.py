"""Every identity of the algebra, in float64, against the sequence of real convolutions."""
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, randn

from timm_rep.core import kernels

RTOL = 1e-13
# Kernel size; groups, input, inner and output channels: some depthwise, with one and with two filters per channel.
SHAPES = [
    ((1, 1), 1, 3, 4, 5),
    ((3, 3), 2, 4, 6, 8),
    ((5, 5), 4, 4, 4, 4),
    ((7, 7), 3, 3, 6, 3),
    ((1, 3), 2, 4, 6, 8),
    ((5, 3), 1, 3, 4, 5),
]
SIZES = [shape[0] for shape in SHAPES]

shapes = pytest.mark.parametrize(('size', 'groups', 'c_in', 'inner', 'c_out'), SHAPES, ids=str)
sizes = pytest.mark.parametrize('size', SIZES, ids=str)
# Of four channels.
groups_of_sizes = pytest.mark.parametrize(('size', 'groups'), [*zip(SIZES, [1, 2, 4, 1, 2, 4])], ids=str)


def half(size):
    return size[0] // 2, size[1] // 2


def images(c_in):
    return randn(2, c_in, 14, 15, seed=9)


@shapes
@pytest.mark.parametrize('first_size', [(3, 3), (5, 1)], ids=str)
def test_sequential_merge_equals_two_convolutions(size, first_size, groups, c_in, inner, c_out):
    first = randn(inner, c_in // groups, *first_size, seed=1)
    second = randn(c_out, inner // groups, *size, seed=2)
    bias = randn(inner, seed=3)
    x = images(c_in)
    merged = kernels.merge_sequential(first, second, groups)
    merged_bias = kernels.merge_sequential_bias(bias, second, groups)
    assert merged.shape == (c_out, c_in // groups, first_size[0] + size[0] - 1, first_size[1] + size[1] - 1)
    expected = F.conv2d(F.conv2d(x, first, bias, groups=groups), second, groups=groups)
    assert_near(F.conv2d(x, merged, merged_bias, groups=groups), expected, RTOL)


@shapes
@pytest.mark.parametrize('pointwise', ['first', 'second'])
def test_sequential_merge_with_a_1x1_is_exact_at_a_padded_border(size, groups, c_in, inner, c_out, pointwise):
    first_size, second_size = ((1, 1), size) if pointwise == 'first' else (size, (1, 1))
    first = randn(inner, c_in // groups, *first_size, seed=1)
    second = randn(c_out, inner // groups, *second_size, seed=2)
    x = images(c_in)
    expected = F.conv2d(
        F.conv2d(x, first, groups=groups, padding=half(first_size)), second, groups=groups, padding=half(second_size))
    actual = F.conv2d(x, kernels.merge_sequential(first, second, groups), groups=groups, padding=half(size))
    assert_near(actual, expected, RTOL)


@pytest.mark.parametrize(('stride', 'dilation'), [(2, 2), (3, 1)])
def test_sequential_merge_with_stride_and_dilation(stride, dilation):
    first, second = randn(4, 3, 3, 3, seed=1), randn(5, 4, 5, 3, seed=2)
    x = images(3)
    expected = F.conv2d(F.conv2d(x, first, dilation=dilation), second, stride=stride, dilation=dilation)
    merged = kernels.merge_sequential(first, second)
    assert_near(F.conv2d(x, merged, stride=stride, dilation=dilation), expected, RTOL)


def test_comparison_fails_for_a_cross_correlation_of_kernels():
    first, second = randn(4, 3, 3, 3, seed=1), randn(5, 4, 3, 3, seed=2)
    x = images(3)
    expected = F.conv2d(F.conv2d(x, first), second)
    without_flip = kernels.merge_sequential(first, second.flip([2, 3]))
    with pytest.raises(AssertionError, match='largest difference'):
        assert_near(F.conv2d(x, without_flip), expected, RTOL)


@sizes
def test_padded_kernel_is_the_same_convolution(size):
    kernel, x, target = randn(4, 3, *size), images(3), (7, 9)
    padded = kernels.pad_to_size(kernel, target)
    assert padded.shape == (4, 3, *target)
    expected = F.conv2d(x, kernel, padding=half(size))
    assert_near(F.conv2d(x, padded, padding=half(target)), expected, RTOL)


@groups_of_sizes
def test_parallel_merge_equals_a_sum_of_convolutions(size, groups):
    x = images(4)
    parallel_sizes = [(1, 1), (1, size[1]), (size[0], 1), size]
    parallel = [randn(8, 4 // groups, *size, seed=n) for n, size in enumerate(parallel_sizes)]
    expected = sum(F.conv2d(x, k, groups=groups, padding=half(k.shape[2:])) for k in parallel)
    assert_near(F.conv2d(x, kernels.merge_parallel(parallel), groups=groups, padding=half(size)), expected, RTOL)


@groups_of_sizes
def test_pointwise_then_one_filter_per_channel_or_average(size, groups):
    pointwise, depthwise, x = randn(8, 4 // groups, 1, 1, seed=1), randn(8, 1, *size, seed=2), images(4)
    mixed = F.conv2d(x, pointwise, groups=groups)
    average = kernels.average_kernel(size, dtype=torch.float64)
    for second, expected in (
            (depthwise, F.conv2d(mixed, depthwise, groups=8)), (average, F.avg_pool2d(mixed, size, stride=1))):
        actual = F.conv2d(x, kernels.merge_pointwise_depthwise(pointwise, second), groups=groups)
        assert_near(actual, expected, RTOL)


@groups_of_sizes
def test_grouped_identity_passes_every_channel_through(size, groups):
    x = images(4)
    identity = kernels.grouped_identity(4, groups, size, dtype=torch.float64)
    assert torch.equal(F.conv2d(x, identity, groups=groups, padding=half(size)), x)


@pytest.mark.parametrize(('bias', 'affine', 'groups'), [(True, True, 2), (False, True, 1), (True, False, 1)])
def test_folded_norm_equals_convolution_then_norm(bias, affine, groups):
    x, kernel = images(4), randn(6, 4 // groups, 3, 3, seed=1)
    conv_bias = randn(6, seed=2) if bias else None
    mean, var = randn(6, seed=3), randn(6, seed=4).square() + 0.1
    gamma, beta = (randn(6, seed=5), randn(6, seed=6)) if affine else (None, None)
    eps = 1e-3
    expected = F.batch_norm(F.conv2d(x, kernel, conv_bias, groups=groups), mean, var, gamma, beta, eps=eps)
    folded, folded_bias = kernels.fold_norm(kernel, conv_bias, mean, var, gamma, beta, eps)
    assert_near(F.conv2d(x, folded, folded_bias, groups=groups), expected, RTOL)


@pytest.mark.parametrize('bias', [True, False])
def test_unfolding_a_norm_is_the_inverse_of_folding(bias):
    kernel, mean, var, eps = randn(6, 4, 3, 3, seed=1), randn(6, seed=2), randn(6, seed=3).square(), 1e-3
    conv_bias = randn(6, seed=4) if bias else None
    plain, gamma, beta = kernels.unfold_norm(kernel, conv_bias, mean, var, eps)
    folded, folded_bias = kernels.fold_norm(plain, None, mean, var, gamma, beta, eps)
    assert_near(folded, kernel, RTOL)
    expected = torch.zeros(6, dtype=torch.float64) if conv_bias is None else conv_bias
    torch.testing.assert_close(folded_bias, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(('size', 'out_channels'), [*zip(SIZES, [2, 7, 16, 7, 16, 7])], ids=str)
def test_frequency_prior_is_the_formula(size, out_channels):
    prior = kernels.frequency_prior(out_channels, size, dtype=torch.float64)
    assert prior.shape == (out_channels, 1, *size)
    for o in range(out_channels):
        for h in range(size[0]):
            for w in range(size[1]):
                if o < out_channels / 2:
                    expected = math.cos(math.pi * (h + 0.5) * (o + 1) / size[0])
                else:
                    expected = math.cos(math.pi * (w + 0.5) * (o + 1 - out_channels / 2) / size[1])
                assert prior[o, 0, h, w].item() == pytest.approx(expected, abs=1e-13)


def test_merges_are_differentiable_and_keep_the_dtype():
    first, second = randn(4, 2, 3, 3, seed=1).requires_grad_(), randn(4, 2, 3, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: kernels.merge_sequential(a, b, 2), (first, second))
    assert kernels.merge_sequential(first.half(), second.half(), 2).dtype == torch.float16
    assert kernels.frequency_prior(4, (3, 3)).dtype == torch.get_default_dtype()


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: kernels.pad_to_size(torch.ones(1, 1, 2, 3), (5, 5)), 'only odd kernels .* got 2x3 to 5x5'),
    (lambda: kernels.pad_to_size(torch.ones(1, 1, 3, 3), (5, 4)), 'only odd kernels .* got 3x3 to 5x4'),
    (lambda: kernels.pad_to_size(torch.ones(1, 1, 5, 5), (3, 7)), '5x5 kernel does not fit into 3x7'),
    (lambda: kernels.merge_parallel([]), 'at least one kernel'),
    (lambda: kernels.merge_parallel([torch.ones(4, 2, 1, 1), torch.ones(4, 1, 1, 1)]), 'the same channels'),
    (lambda: kernels.merge_sequential(torch.ones(4, 2, 1, 1), torch.ones(4, 3, 3, 3)), 'inner channels do not match'),
    (lambda: kernels.merge_sequential(torch.ones(4, 2, 1, 1), torch.ones(4, 4, 3, 3), 2), 'inner channels do not'),
    (lambda: kernels.grouped_identity(4, 1, (2, 2)), 'only odd kernels'),
])
def test_bad_input_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()
