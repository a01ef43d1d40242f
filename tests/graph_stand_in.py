"""What stands for CUDA graphs where there is no GPU, and networks whose composition is captured."""
import pytest
import torch
import torch.nn as nn
from helpers import TINY_MODELS, randn, randomize_
from torch.utils.checkpoint import checkpoint

import timm_rep
from timm_rep import capture
from timm_rep.core.capture import _GraphedComposition
from timm_rep.core.expand import anneal_repvgg_blocks_
from timm_rep.core.layers.together import compose_side_by_side

GRAPHS = pytest.mark.parametrize('graph', [False, True], ids=['calls', 'graph'])


class Graphs:
    """Stands for CUDA graphs: each is of the tensors that it was captured with, and always writes the same memory."""

    def __init__(self):
        self.captured = 0

    def __call__(self, function, samples, allow_unused_input):
        assert allow_unused_input
        assert not torch.is_autocast_enabled('cuda')
        self.captured += 1
        static_kernels = [kernel.detach().clone() for kernel in function(*samples)]
        taken = [sample for sample in samples if sample.requires_grad]
        static_gradients = [torch.zeros_like(sample) for sample in taken]

        class Graphed(torch.autograd.Function):

            @staticmethod
            def forward(ctx, *arguments):
                assert all(sample.data_ptr() == argument.data_ptr() for sample, argument in zip(samples, arguments))
                for memory, kernel in zip(static_kernels, function(*samples)):
                    memory.data.copy_(kernel)
                return tuple(memory.detach() for memory in static_kernels)

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, *gradients):
                with torch.enable_grad():
                    pairs = [pair for pair in zip(function(*samples), gradients) if pair[0].requires_grad]
                found = torch.autograd.grad(
                    [kernel for kernel, _ in pairs], taken, [gradient for _, gradient in pairs], allow_unused=True)
                for memory, gradient in zip(static_gradients, found):
                    memory.data.copy_(gradient)
                there = iter(static_gradients)
                return tuple(next(there).detach() if sample.requires_grad else None for sample in samples)

        return Graphed.apply


def captured(model, graph):
    handle = capture(model, graph=False)
    if graph:
        handle._together.compose = _GraphedComposition(compose_side_by_side)
    return handle


def network(kind='basic'):
    torch.manual_seed(0)
    model = randomize_(timm_rep.expand(TINY_MODELS[kind]().double()))
    return anneal_repvgg_blocks_(model) if kind == 'repvgg' else model


def images(count=2, size=32, seed=0):
    return randn(count, 3, size, size, seed=seed)


def loss_of(model, seed=0):
    return model(images(seed=seed)).square().mean()


def assert_same_gradients(model, twin, rtol=1e-10):
    largest = max(p.grad.abs().max().item() for p in twin.parameters() if p.grad is not None)
    for (name, one), other in zip(model.named_parameters(), twin.parameters()):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            assert (one.grad - other.grad).abs().max().item() <= rtol * largest, name


class Net(nn.Module):
    """Layers of one shape, some of which are checkpointed."""

    def __init__(self, checkpointing):
        super().__init__()
        self.body = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)))
        self.checkpointing = checkpointing

    def forward(self, x):
        x = x.requires_grad_()
        for number, part in enumerate((self.body[0], self.body[1], self.body[2:])):
            if self.checkpointing is None or (self.checkpointing and number == 0):
                x = part(x)
            else:
                x = checkpoint(part, x, use_reentrant=self.checkpointing)
        return x
