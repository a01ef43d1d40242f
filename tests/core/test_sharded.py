"""Training with fully_shard (FSDP2), in two processes on one CPU."""
import socket
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from helpers import randn

import timm_rep
from timm_rep import UserError, begin_time_step
from timm_rep.core.annealer import Annealer
from timm_rep.core.annealing import AnnealingSchedule

STEPS = 10  # before the time step and after it


def network():
    """A linear layer, a normed one, and a stem that is a part of the root."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()) for _ in range(2)]
    model = nn.Sequential(
        nn.Conv2d(3, 6, 7, padding=3, bias=False), nn.BatchNorm2d(6), *blocks, nn.Flatten(), nn.Linear(6 * 64, 4))
    return timm_rep.expand(model.double(), {'3.*': 'dbb', '*': 'orepa'}, generator=torch.Generator().manual_seed(0))


def train(model, optimizer):
    for step in range(STEPS):
        optimizer.zero_grad()
        model(randn(4, 3, 8, 8, seed=step)).square().mean().backward()
        optimizer.step()


def anneal(model):
    """Train, begin a time step, train on."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-3)
    train(model, optimizer)
    model.eval()
    with torch.no_grad():
        before = model(randn(2, 3, 8, 8, seed=9))  # it leaves whole parameters behind
        begin_time_step(model, torch.Generator().manual_seed(1), compensate=True, attach_rate=0.5)
        after = model(randn(2, 3, 8, 8, seed=9))
    model.train()
    timm_rep.reset_optimizer(optimizer)
    train(model, optimizer)
    return before, after


def refused(model, optimizer):
    """What says that it cannot be."""
    schedule = AnnealingSchedule(2, 2, 1)
    calls = dict(
        fuse=lambda: timm_rep.fuse(model),
        save=lambda: timm_rep.save(model, 'never.safetensors'),
        measured=lambda: begin_time_step(model, restoration='measured', batches=[randn(2, 3, 8, 8)]),
        frozen=lambda: Annealer(model, optimizer, schedule, freeze_origin=True),
        prune=lambda: timm_rep.prune_branches(model, 0.5),
        micro_batch=lambda: timm_rep.micro_batch(model, last=True).__enter__(),
    )
    messages = {}
    for name, call in calls.items():
        with pytest.raises(UserError) as error:
            call()
        messages[name] = str(error.value)
    return messages


def process(rank, port, folder):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    model = network()
    for block in (model[2], model[3]):
        fully_shard(block)
    fully_shard(model)
    before, after = anneal(model)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    result = dict(before=before, after=after, state=whole, refused=refused(model, torch.optim.SGD(model.parameters())))
    torch.save(result, f'{folder}/{rank}.pth')
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != 'linux', reason='gloo shards parameters on Linux only')
@pytest.mark.skipif(torch.__version__.startswith('2.6'), reason='fully_shard of torch 2.6 fails on a CPU')
def test_sharded_training_is_that_of_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, str(tmp_path)), nprocs=2)
    one = network()
    before, after = anneal(one)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    for rank in range(2):
        result = torch.load(tmp_path / f'{rank}.pth')
        torch.testing.assert_close(result['before'], before, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result['after'], after, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result['state'], dict(one.state_dict()), rtol=1e-7, atol=1e-9)
        assert 'get_model_state_dict' in result['refused']['fuse'] == result['refused']['save']
        for call in ('measured', 'frozen', 'prune'):
            assert 'spread over processes' in result['refused'][call]
        assert 'FSDP' in result['refused']['micro_batch']
    model = network()
    model.load_state_dict(result['state'])
    timm_rep.verify(model.eval(), timm_rep.fuse(model), inputs=randn(2, 3, 8, 8))
