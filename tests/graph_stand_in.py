"""What stands for CUDA graphs where there is no GPU, and networks whose composition is captured."""
import math

import pytest
import torch
import torch.nn as nn
from helpers import TINY_MODELS, randn, randomize_
from torch.utils.checkpoint import checkpoint

import timm_rep
from timm_rep import capture
from timm_rep.core.capture import _GraphedComposition
from timm_rep.core.expand import anneal_repvgg_blocks_

GRAPHS = pytest.mark.parametrize('graph', [False, True], ids=['calls', 'graph'])


class Graphs:
    """Stands for CUDA graphs: of the tensors that they were captured with; they always write the same memory, and the
    backward also that of what the forward has kept for it."""

    captured = 0

    def __init__(self, function, parameters, memory_format):
        assert not torch.is_autocast_enabled('cuda')
        assert not torch.is_anomaly_enabled()
        type(self).captured += 1
        self._function, self._parameters = function, parameters
        self.is_spent = True
        self._addresses = [parameter.data_ptr() for parameter in parameters]
        results = function(*parameters)
        self.results = [torch.full_like(result, math.nan, requires_grad=False) for result in results]
        self.result_gradients = [
            torch.full_like(result, math.nan, memory_format=memory_format, requires_grad=False) for result in results]
        found = self._differentiate()
        self.gradients = [
            None if gradient is None else torch.full_like(gradient, math.nan) for gradient in found]

    def _differentiate(self):
        assert [parameter.data_ptr() for parameter in self._parameters] == self._addresses
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        if not trained:
            return [None] * len(self._parameters)
        with torch.enable_grad():
            pairs = [pair for pair in zip(self._function(*self._parameters), self.result_gradients)
                     if pair[0].requires_grad]
        found = iter(torch.autograd.grad(
            [result for result, _ in pairs], trained, [gradient for _, gradient in pairs], allow_unused=True))
        return [next(found) if parameter.requires_grad else None for parameter in self._parameters]

    def forward(self):
        for memory, result in zip(self.results, self._function(*self._parameters)):
            memory.data.copy_(result)
        self.is_spent = False

    def backward(self):
        for memory, gradient in zip(self.gradients, self._differentiate()):
            if memory is not None:
                memory.data.copy_(torch.full_like(gradient, math.nan) if self.is_spent else gradient)
        self.is_spent = True


def captured(model, graph):
    handle = capture(model, graph=False)
    if graph:
        handle._together.compose = _GraphedComposition()
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
