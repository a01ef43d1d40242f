"""Kernels composed once per update in timm's loop over a loader."""
import copy

import pytest
import torch
from helpers import randn

from timm_rep import OrepaConv2d
from timm_rep.train.accumulate import MicroBatches


class Loader(list):
    mixup_enabled = True


def train(model, loader, steps):
    """As timm's train_one_epoch accumulates; kernels after every update."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kernels = []
    for index, batch in enumerate(loader):
        model(batch).square().mean().backward()
        if (index + 1) % steps == 0 or index == len(loader) - 1:
            optimizer.step()
            optimizer.zero_grad()
            kernels.append(model.compose_weight().detach())
    return kernels


@pytest.mark.parametrize('count', [4, 5, 6, 3, 0])
def test_updates_are_the_same_and_composed_once(count, monkeypatch):
    composed = []
    model = OrepaConv2d(2, 2, 3).double()
    twin = copy.deepcopy(model)
    batches = Loader(randn(2, 2, 5, 5, seed=number) for number in range(count))
    loader = MicroBatches(batches, model, 3)
    assert len(loader) == count
    assert loader.mixup_enabled
    expected = train(twin, batches, 3)
    monkeypatch.setattr(model, '_compose', lambda last, compose=model._compose: composed.append(last) or compose(last))
    for kernel, other in zip(train(model, loader, 3), expected, strict=True):
        torch.testing.assert_close(kernel, other, rtol=1e-10, atol=1e-10)
    assert len(composed) - len(expected) == count // 3 + count % 3  # less those that were looked at
    assert model._update is None


def test_an_interrupted_epoch_leaves_nothing_behind():
    model = OrepaConv2d(2, 2, 3).double()
    batches = Loader(randn(2, 2, 5, 5, seed=number) for number in range(6))

    def interrupted():
        for index, batch in enumerate(MicroBatches(batches, model, 3)):
            model(batch).sum().backward()
            if index == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    model.zero_grad()  # as timm's epochs begin
    assert len(train(model, MicroBatches(batches, model, 3), 3)) == 2
