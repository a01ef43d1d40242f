"""Data-parallel training that exchanges gradients of kernels, in two processes on one CPU."""
import copy
import datetime
import inspect
import itertools
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from helpers import TINY_MODELS, assert_same_state, randn, randomize_
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import timm_rep
from timm_rep import RepDistributedDataParallel, UserError, capture, micro_batch
from timm_rep.core.expand import anneal_repvgg_blocks_
from timm_rep.core.layers import LinearRepLayer

PARTS = 2


class Net(nn.Module):
    """Two networks behind a layer in two places and one that stands still."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.still = nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)
        self.resnet, self.repvgg = TINY_MODELS['bottleneck'](), TINY_MODELS['repvgg']()
        self.reentrant = None
        self.skip = False

    def forward(self, x):
        if not self.skip:
            x = self.shared(self.still(self.shared(x)))
        if self.reentrant is None:
            return self.resnet(x) + self.repvgg(x)
        return self.resnet(x) + checkpoint(self.repvgg, x, use_reentrant=self.reentrant)


class Tied(nn.Module):
    """A decoder with the kernels of its encoder."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.stem, self.conv = timm_rep.OrepaConv2d(3, 4, 3), timm_rep.OrepaConv2d(4, 4, 3)
        self.checkpointed = checkpointed

    def decode(self, x):
        return F.conv_transpose2d(F.conv_transpose2d(x, self.conv.weight), self.stem.weight)

    def forward(self, x):
        x = self.conv(self.stem(x).relu()).relu()
        return checkpoint(self.decode, x, use_reentrant=False) if self.checkpointed else self.decode(x)


def tied(checkpointed=False):
    torch.manual_seed(0)
    return Tied(checkpointed).double()


def network(seed=0):
    torch.manual_seed(seed)
    model = timm_rep.expand(Net().double(), select=lambda name, conv: 'conv_1x1' not in name)
    return anneal_repvgg_blocks_(randomize_(model, seed))


def loss_of(model, step, part):
    return model(randn(2, 3, 32, 32, seed=4 * step + 2 * part + dist.get_rank())).square().mean() / PARTS


def train_step(model, optimizer, step, shared):
    """An update of two micro-batches, that share kernels or compose their own."""
    optimizer.zero_grad()
    for part in range(PARTS):
        last = part == PARTS - 1
        with micro_batch(model, last=last) if shared else nullcontext() if last else model.no_sync():
            loss_of(model, step, part).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


class Counted:
    """How many numbers are exchanged: by DistributedDataParallel's hook, and for kernels."""

    def __init__(self, model):
        self.buckets = self.kernels = 0
        model.register_comm_hook(None, self.hook)

    def hook(self, state, bucket):
        self.buckets += bucket.buffer().numel()
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    def __enter__(self):
        self.all_reduce = dist.all_reduce

        def counted(tensor, *args, **kwargs):
            if 'group' in kwargs:
                self.kernels += tensor.numel()
            return self.all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *error):
        dist.all_reduce = self.all_reduce


def both(model, steps, shared, options):
    """A model in both, and what they exchange in an update; whether the other one shares kernels, too."""
    twin = copy.deepcopy(model)
    forms = RepDistributedDataParallel(model, **options), DistributedDataParallel(twin, **options)
    optimizers = [torch.optim.SGD(form.parameters(), 1e-3, momentum=0.9, weight_decay=1e-3) for form in forms]
    counts = [Counted(form) for form in forms]
    for step in range(steps):
        for form, optimizer, counted in zip(forms, optimizers, counts):
            counted.buckets = counted.kernels = 0
            with counted:
                train_step(form, optimizer, step, shared or form is forms[0])
            if step == 1:
                timm_rep.begin_time_step(form, torch.Generator().manual_seed(0), attach_rate=0.5)
        if step == 2:
            capture(forms[0], graph=False)
    for (name, one), other in zip(model.state_dict().items(), twin.state_dict().values()):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, msg=name)
    return counts


def messages_of(model):
    """What is refused."""
    said = {}

    def refused(name, call):
        with pytest.raises(UserError) as error:
            call()
        said[name] = str(error.value)

    refused('unused', lambda: RepDistributedDataParallel(model, find_unused_parameters=True))
    options = list(inspect.signature(DistributedDataParallel).parameters.values())[1:]
    before = [option.default for option in itertools.takewhile(lambda o: o.name != 'find_unused_parameters', options)]
    refused('by_position', lambda: RepDistributedDataParallel(model, *before, True))
    refused('norms', lambda: RepDistributedDataParallel(timm_rep.expand(TINY_MODELS['basic'](), 'dbb')))
    parallel = RepDistributedDataParallel(model)
    refused('join', lambda: parallel.join())
    refused('part', lambda: capture(model.resnet, graph=False))
    with parallel.no_sync():
        refused('no_sync', lambda: loss_of(parallel, 0, 0))
    model.reentrant = True
    refused('reentrant', lambda: loss_of(parallel, 0, 0).backward())
    model.reentrant, model.skip = None, True
    parallel = RepDistributedDataParallel(model)
    refused('skipped', lambda: loss_of(parallel, 0, 0).backward())
    parallel = RepDistributedDataParallel(tied())
    outputs = parallel(randn(2, 3, 8, 8))
    refused('outside', lambda: (outputs.square().mean() + parallel.module.stem(outputs).square().mean()).backward())
    return said


def compiled():
    torch.manual_seed(0)
    model = nn.Sequential(timm_rep.OrepaConv2d(3, 4, 3), nn.ReLU(), timm_rep.OrepaConv2d(4, 4, 3)).double()
    expected = copy.deepcopy(model)
    images = randn(2, 3, 8, 8, seed=dist.get_rank())
    parallel = DistributedDataParallel(expected)
    parallel(images).square().mean().backward()
    for compile_ in (
        lambda twin: torch.compile(RepDistributedDataParallel(twin), backend='eager'),
        lambda twin: RepDistributedDataParallel(torch.compile(twin, backend='eager')),
    ):
        twin = copy.deepcopy(model)
        parallel = compile_(twin)
        parallel(images).square().mean().backward()
        for one, other in zip(twin.parameters(), expected.parameters()):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-11)


def checkpointed(model):
    model.reentrant = False
    twin = copy.deepcopy(model)
    twin.reentrant = None
    for form in (RepDistributedDataParallel(model), RepDistributedDataParallel(twin)):
        loss_of(form, 0, 0).backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-11, msg=name)


def same_gradients(one, other, model=network):
    """Whether two ways to wrap a model, and to go a step with it, give the same gradients."""
    model = model()
    twin = copy.deepcopy(model)
    forms = one(model), other(twin)
    for form in forms:
        loss_of(form, 0, 0).backward()
    ours, theirs = (form.module for form in forms)
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-9, atol=1e-11, msg=name)


def copied():
    same_gradients(lambda model: copy.deepcopy(RepDistributedDataParallel(model)), DistributedDataParallel)


def nothing_else_is_trained():
    def convs():
        torch.manual_seed(0)
        block = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, bias=False))
        block[1].requires_grad_(False)
        return timm_rep.expand(block.double(), select='*')

    same_gradients(RepDistributedDataParallel, DistributedDataParallel, convs)


def of_one_process():
    """A backward of the module itself, which the other process knows nothing of."""
    def alone_first(model):
        parallel = RepDistributedDataParallel(model)
        capture(parallel, graph=False)
        if dist.get_rank() == 0:
            loss_of(model.eval(), 1, 0).backward()
            model.zero_grad()
        model.train()
        return parallel

    same_gradients(alone_first, DistributedDataParallel)


def without_gradients_between():
    def wrapped(wrapper):
        def wrap(model):
            model.reentrant = False
            model.eval()
            parallel = wrapper(model, broadcast_buffers=False)  # older torch writes them in the forward between
            loss = loss_of(parallel, 0, 0)
            with torch.no_grad():
                loss_of(parallel, 1, 0)
            loss.backward()
            return parallel
        return wrap

    same_gradients(wrapped(RepDistributedDataParallel), wrapped(DistributedDataParallel))


def sent_during_the_backward():
    """What happens in a backward, in order: layers by number, and exchanges."""
    torch.manual_seed(0)
    model = nn.Sequential(*(timm_rep.OrepaConv2d(4, 4, 3) for _ in range(3)))
    parallel = RepDistributedDataParallel(model)
    happened = []
    for number, layer in enumerate(model):
        layer.register_full_backward_hook(lambda *_, number=number: happened.append(number))
    with pytest.MonkeyPatch.context() as patch:
        send = dist.all_reduce
        patch.setattr(dist, 'all_reduce', lambda tensor, **kw: (happened.append('sent'), send(tensor, **kw))[1])
        parallel(randn(2, 4, 9, 9, dtype=torch.float32).requires_grad_()).square().mean().backward()
    return happened


def sent_with_a_layer_that_had_no_part():
    """How many gradients are sent, of three layers, if the one in the middle gets none."""
    model = nn.ModuleList(timm_rep.OrepaConv2d(4, 4, 3) for _ in range(3))
    model.forward = lambda x: model[0](model[2](x))
    parallel, sent = RepDistributedDataParallel(model), []
    with pytest.MonkeyPatch.context() as patch:
        send = dist.all_reduce
        patch.setattr(dist, 'all_reduce', lambda tensor, **kw: (sent.append(tensor), send(tensor, **kw))[1])
        with pytest.raises(UserError, match='had no part in the loss'):
            parallel(randn(2, 4, 9, 9, dtype=torch.float32)).square().mean().backward()
    return len(sent)


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    result = dict(numbers=[])
    for steps, shared, options in ((20, False, {}), (4, True, dict(gradient_as_bucket_view=True))):
        model = network(seed=rank)  # weights of the first process are taken
        ours, theirs = both(model, steps, shared, options)
        result['numbers'].append((ours.kernels, ours.buckets, theirs.buckets))
    result['state'] = model.state_dict()
    checkpointed(network())
    compiled()
    copied()
    nothing_else_is_trained()
    of_one_process()
    without_gradients_between()
    same_gradients(RepDistributedDataParallel, DistributedDataParallel, tied)
    same_gradients(RepDistributedDataParallel, DistributedDataParallel, lambda: tied(checkpointed=True))
    result['sent'] = sent_with_a_layer_that_had_no_part()
    result['happened'] = sent_during_the_backward()
    result['messages'] = messages_of(network())
    torch.save(result, f'{folder}/{rank}.pth')
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != 'linux', reason='the processes meet by a file, on Linux only')
def test_training_is_that_of_exchanging_all_gradients(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f'{rank}.pth') for rank in range(2))
    norms = [name for name in one['state'] if 'running' in name or 'num_batches' in name]  # each has its own
    assert_same_state(*({k: v for k, v in result['state'].items() if k not in norms} for result in (one, other)))

    model = network()
    layers = [layer for _, layer in timm_rep.rep_layers(model) if isinstance(layer, LinearRepLayer)]
    trained = [layer for layer in layers if layer is not model.still]
    kernels = sum(layer.weight.numel() for layer in trained)
    branches = sum(p.numel() for layer in trained for p in layer.parameters() if p is not layer.bias)
    for numbers in one['numbers']:
        assert numbers[0] == kernels  # once for an update
        assert numbers[2] - numbers[1] == branches > 2 * kernels

    for result in (one, other):
        happened = result['happened']
        assert happened.count('sent') == 3
        assert happened.index('sent') < happened.index(1) < happened.index(0)

        assert result['sent'] == 1  # the first one waits for the second

    for messages in (one['messages'], other['messages']):
        assert 'find_unused_parameters' in messages['unused']
        assert 'find_unused_parameters' in messages['by_position']
        assert 'join()' in messages['join']
        assert 'capture that model as a whole' in messages['part']
        assert 'composed without norms' in messages['norms']
        assert 'micro_batch' in messages['no_sync']
        assert 'use_reentrant=True' in messages['reentrant']
        assert 'had no part in the loss' in messages['skipped']
        assert 'outside of the forward' in messages['outside']
