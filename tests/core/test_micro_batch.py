"""Micro-batches that share what was composed for the first of them."""
import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn as nn
from helpers import LINEAR_RTOL, TINY_MODELS, assert_near, randn, randomize_
from timm.utils import ModelEmaV3
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils.checkpoint import checkpoint

import timm_rep
from timm_rep import UserError, micro_batch
from timm_rep.core.expand import anneal_repvgg_blocks_
from timm_rep.core.layers import LinearRepLayer, OrepaConv2d

COUNT = 3
class Net(nn.Module):
    """Layers of every linear kind: bias, stem, pointwise, a layer in two places, and one that stands still."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=2, padding=3)
        self.norm = nn.BatchNorm2d(8)
        self.shared = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.still = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
        self.point = nn.Conv2d(8, 16, 1)
        self.fc = nn.Linear(16, 4)
        self.skip = False
        self.checkpointing = None

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        if self.checkpointing is None:
            x = self.body(x)
        else:
            x = checkpoint(self.body, x, use_reentrant=self.checkpointing)
        return self.fc(x.mean((2, 3)))

    def body(self, x):
        x = self.shared(x).relu()
        if not self.skip:
            x = self.shared(x).relu()
        return self.point(self.still(x)).relu()


def expanded(dtype=torch.float64):
    torch.manual_seed(0)
    model = timm_rep.expand(Net().to(dtype), select=lambda name, conv: True)
    assert isinstance(model.stem, timm_rep.OrepaStemConv2d)
    return randomize_(model)


def batches(size=16, count=COUNT, dtype=torch.float64):
    return [randn(3, 3, size, size, seed=number, dtype=dtype) for number in range(count)]


def loss_of(model, images):
    return model(images).square().mean() / COUNT


def accumulate(model, images, once, loss_of=loss_of):
    for number, batch in enumerate(images, 1):
        if once:
            with micro_batch(model, last=number == len(images)):
                loss_of(model, batch).backward()
        else:
            loss_of(model, batch).backward()


def assert_same_gradients(actual, expected, rtol=1e-10):
    """Relative to the largest of all: a bias before a norm has a gradient of rounding only."""
    expected = {name: p.grad for name, p in expected.named_parameters() if p.grad is not None}
    actual = {name: p.grad for name, p in actual.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max().item() <= rtol * max(largest, gradient.abs().max().item()), name
        assert gradient.any() or not actual[name].any(), name


def compositions(model):
    """Counts how often layers compose, from now on."""
    counted = []
    for _, layer in timm_rep.rep_layers(model):
        def compose(channels_last, layer=layer, compose=layer._compose):
            counted.append(layer)
            return compose(channels_last)
        layer._compose = compose
    return counted


@pytest.mark.parametrize('kind', TINY_MODELS)
def test_gradients_are_those_of_composing_at_every_micro_batch(kind):
    torch.manual_seed(0)
    model = TINY_MODELS[kind]()
    model = randomize_(timm_rep.expand(model.double()))
    if kind == 'repvgg':
        anneal_repvgg_blocks_(model)
    twin = copy.deepcopy(model)
    accumulate(twin, batches(64), once=False)
    counted = compositions(model)
    accumulate(model, batches(64), once=True)
    assert_same_gradients(model, twin)
    assert len(counted) == sum(isinstance(layer, LinearRepLayer) for _, layer in timm_rep.rep_layers(model)) > 0


@pytest.mark.parametrize('checkpointing', [None, False])
def test_all_kinds_of_layers(checkpointing):
    model = expanded()
    model.checkpointing = checkpointing
    twin = copy.deepcopy(model)
    accumulate(twin, batches(), once=False)
    counted = compositions(model)
    accumulate(model, batches(), once=True)
    assert_same_gradients(model, twin)
    assert len(counted) == 4
    assert model.still.branches.grad is None


def test_reentrant_checkpoints():
    model = expanded()
    model.skip = model.checkpointing = True
    twin = copy.deepcopy(model)
    accumulate(twin, batches(), once=False)
    accumulate(model, batches(), once=True)
    assert_same_gradients(model, twin)


def test_trainings_are_the_same():
    torch.manual_seed(0)
    model = randomize_(timm_rep.expand(TINY_MODELS['repvgg']().double()))
    keys, twin = model.state_dict().keys(), copy.deepcopy(model)
    for form, once in ((model, True), (twin, False)):
        optimizer = torch.optim.SGD(form.parameters(), 0.01, momentum=0.9, weight_decay=1e-3)
        for step in range(4):
            accumulate(form, [batch + 0.1 * step for batch in batches(32)], once)
            nn.utils.clip_grad_norm_(form.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                timm_rep.begin_time_step(form, torch.Generator().manual_seed(0), attach_rate=0.5)
    for (name, one), other in zip(model.state_dict().items(), twin.state_dict().values()):
        if other.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8, msg=name)
    assert model.state_dict().keys() == keys


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_mixed_precision_with_a_scaler(dtype):
    model = expanded(torch.float32)
    twin = copy.deepcopy(model)
    for form, once in ((model, True), (twin, False)):
        scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 8)
        optimizer = torch.optim.SGD(form.parameters(), 0.0)

        def scaled_loss(form, batch, scaler=scaler):
            with torch.autocast('cpu', dtype):
                return scaler.scale(loss_of(form, batch))

        accumulate(form, [batch.to(memory_format=torch.channels_last) for batch in batches(dtype=torch.float32)], once,
                   scaled_loss)
        scaler.unscale_(optimizer)
    largest = max(parameter.grad.abs().max() for parameter in twin.parameters() if parameter.grad is not None)
    for one, other in zip(model.parameters(), twin.parameters()):
        if other.grad is not None:
            assert (one.grad - other.grad).abs().max() <= 0.02 * largest
    assert model.shared.branches.grad.any()


def test_two_forwards_before_one_backward_and_evaluation_in_between():
    model = expanded()
    twin = copy.deepcopy(model)
    ema = ModelEmaV3(model, decay=0.5)

    def twice(form, batch):
        return loss_of(form, batch) + loss_of(form, batch.flip(0) + 1)

    for form, once in ((model, True), (twin, False)):
        for number, batch in enumerate(batches(), 1):
            with micro_batch(form, last=number == COUNT) if once else torch.enable_grad():
                twice(form, batch).backward()
                if once:
                    with torch.no_grad():
                        inside = form(batch)
                    with torch.inference_mode():
                        assert_near(form(batch), inside, 1e-10)
                else:
                    with torch.no_grad():
                        form(batch)
                    with torch.inference_mode():
                        form(batch)
            ema.update(form)
            form.eval()
            with torch.no_grad():
                outside = form(batch)
            assert_near(timm_rep.fuse(form)(batch), outside, 1e-10)
            form.train()
    assert_same_gradients(model, twin)


def test_in_the_middle_of_an_update_models_can_be_copied_and_called_functionally():
    model = expanded()
    first, *rest = batches()
    with micro_batch(model, last=False):
        loss_of(model, first).backward()
        others = {name: tensor.detach() + 1 for name, tensor in model.named_parameters()}
        shifted = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in shifted.parameters():
                parameter += 1
        called = torch.func.functional_call(model, others, (first,))
    assert_near(called, shifted(first), 1e-10)
    assert b'UpdateKernels' not in pickle.dumps(model)
    assert copy.deepcopy(model).shared._update is None
    with micro_batch(model, last=True):
        loss_of(model, rest[0]).backward()
    twin = expanded()
    accumulate(twin, [first, rest[0]], once=False)
    assert_same_gradients(model, twin)


def test_a_layer_that_the_last_micro_batch_does_not_use():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = OrepaConv2d(2, 2, 3, padding=1)
            self.other = OrepaConv2d(2, 2, 3, padding=1)
            self.both = True

        def forward(self, x):
            return self.other(self.one(x)) if self.both else self.one(x)

    model = Half().double()
    twin = copy.deepcopy(model)
    x = randn(1, 2, 5, 5)
    for form, once in ((model, True), (twin, False)):
        for last in (False, True):
            form.both = not last
            with micro_batch(form, last) if once else torch.enable_grad():
                form(x).square().mean().backward()
    assert_same_gradients(model, twin)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.both = True
    with micro_batch(model, last=False):
        model(x).square().mean().backward()
    model.both = False

    def take_a_step_inside():
        with micro_batch(model, last=True):
            model(x).square().mean().backward()
            optimizer.step()

    with pytest.raises(UserError, match='has to use every layer'):
        take_a_step_inside()


@pytest.mark.parametrize('method', ['orepa', 'doconv'])
def test_a_layer_that_no_loss_depends_on_has_no_gradient(method):
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.aux = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))

        def forward(self, x):
            return self.one(x), self.aux(x)

    model = timm_rep.expand(Forked().double(), method, select='*')
    twin = copy.deepcopy(model)
    for form, once in ((model, True), (twin, False)):
        accumulate(form, randn(COUNT, 1, 2, 5, 5), once, lambda m, x: m(x)[0].square().mean())
    assert all(parameter.grad is None for parameter in model.aux.parameters())
    assert_same_gradients(model, twin)


def test_cleared_gradients_begin_the_update_anew():
    model, images = expanded(), batches()
    with micro_batch(model, last=False):
        loss_of(model, images[0]).backward()
    model.zero_grad()
    accumulate(model, images[1:], once=True)
    twin = expanded()
    accumulate(twin, images[1:], once=False)
    assert_same_gradients(model, twin)
    with micro_batch(model, last=False):
        loss_of(model, images[0]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(UserError, match='gradients were written to in the middle'), micro_batch(model, last=True):
        pass


def test_an_error_ends_the_update():
    model, images = expanded(), batches()
    for last in (False, True):
        with micro_batch(model, last=False):
            loss_of(model, images[0]).backward()
        with pytest.raises(RuntimeError, match='expected input'), micro_batch(model, last=last):
            model(images[0][:, :1])
        with pytest.raises(UserError, match=r'ended in an error; clear the gradients with zero_grad\(\)'):
            accumulate(model, images, once=True)
        model.zero_grad()
        accumulate(model, images, once=True)
        twin = expanded()
        accumulate(twin, images, once=False)
        assert_same_gradients(model, twin)
        model.zero_grad()


@pytest.mark.parametrize('options', [{}, dict(fused=True), dict(foreach=True)])
def test_a_step_in_the_middle_of_an_update_is_refused(options):
    model, images = expanded(), batches()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, **options)
    others = torch.optim.SGD(model.fc.parameters(), 0.1)
    for batch in images:
        with micro_batch(model, last=False):
            loss_of(model, batch).backward()
    with pytest.raises(UserError, match='needs last=True'):
        optimizer.step()
    others.step()
    optimizer.zero_grad()
    optimizer.step()
    accumulate(model, images, once=True)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    accumulate(twin, images, once=False)
    assert_same_gradients(model, twin)
    optimizer.step()


def test_weights_that_change_in_the_middle_of_an_update():
    model, images = expanded(), batches()
    with micro_batch(model, last=False):
        loss_of(model, images[0]).backward()
    with torch.no_grad():
        model.shared.branches.mul_(2)
    with pytest.raises(UserError, match='the weights were changed'):
        accumulate(model, images, once=True)
    model.zero_grad()
    accumulate(model, images, once=True)


def test_parameters_that_are_trained_for_a_part_of_the_update():
    """As a discriminator that stands still for the loss of the generator."""
    model = expanded()
    twin = copy.deepcopy(model)
    for form, once in ((model, True), (twin, False)):
        for number, batch in enumerate(batches(), 1):
            with micro_batch(form, last=number == COUNT) if once else torch.enable_grad():
                form.shared.requires_grad_(False)
                (-loss_of(form, batch)).backward()
                form.shared.requires_grad_(True)
                form.point.requires_grad_(number != 2)
                loss_of(form, batch).backward()
    assert_same_gradients(model, twin)


def test_gradients_that_are_looked_at():
    model = expanded()
    twin = copy.deepcopy(model)
    for form, once in ((model, True), (twin, False)):
        for number, batch in enumerate(batches(), 1):
            last = number == COUNT
            with micro_batch(form, last=last) if once else torch.enable_grad():
                loss = loss_of(form, batch)
                if last:
                    (looked,) = torch.autograd.grad(loss, [form.shared.branches], retain_graph=True)
                    torch.autograd.grad(loss, [batch.requires_grad_()], allow_unused=True, retain_graph=True)
                loss.backward(retain_graph=last)
                if last:
                    loss.backward()
        form.looked = looked
    torch.testing.assert_close(model.looked, twin.looked)
    assert_same_gradients(model, twin)
    with micro_batch(model, last=False):
        loss_of(model, batches()[0]).backward()
    with micro_batch(model, last=True):
        loss = loss_of(model, batches()[0])
        with pytest.raises(UserError, match=r'no backward\(inputs=...\)'):
            loss.backward(inputs=[model.shared.branches, model.shared.scale])
        loss_of(model, batches()[0]).backward()


@pytest.mark.parametrize('when', ['first', 'middle', 'before'])
@pytest.mark.parametrize('set_to_none', [True, False])
def test_gradients_cleared_inside_a_micro_batch(when, set_to_none):
    model = expanded()
    twin = copy.deepcopy(model)

    def train(form, once):
        for number, batch in enumerate(batches(), 1):
            with micro_batch(form, last=number == COUNT) if once else torch.enable_grad():
                if when == 'before' and number == COUNT:
                    form.zero_grad(set_to_none)
                loss_of(form, batch).backward()
                if number == dict(first=1, middle=2).get(when):
                    form.zero_grad(set_to_none)

    train(twin, once=False)
    if set_to_none:
        train(model, once=True)
        assert_same_gradients(model, twin)
    else:
        with pytest.raises(UserError, match=r'zero_grad\(set_to_none=True\)'):
            train(model, once=True)


def test_gradients_of_two_optimizers_are_cleared_one_by_one():
    model = expanded()
    twin = copy.deepcopy(model)
    for form, once in ((model, True), (twin, False)):
        stem, shared = (torch.optim.SGD(part.parameters(), 0.1) for part in (form.stem, form.shared))
        for number, batch in enumerate(batches(), 1):
            with micro_batch(form, last=number == COUNT) if once else torch.enable_grad():
                loss_of(form, batch).backward()
            (stem if number == 1 else shared).zero_grad() if number < COUNT else None
    assert_same_gradients(model, twin)


@pytest.mark.parametrize('written', ['branches', 'attach_rate'])
def test_what_a_kernel_is_composed_of_written_inside_a_micro_batch(written):
    model, images = expanded(), batches()
    with micro_batch(model, last=False):
        loss_of(model, images[0]).backward()
        with torch.no_grad():
            getattr(model.shared, written).mul_(2)  # as sharpness-aware minimization
        with pytest.raises(UserError, match='the weights were changed'):
            model(images[0])


def test_nothing_is_kept(monkeypatch):
    model, images = expanded(), batches()
    kept = []

    def noted(layer, channels_last, compose=OrepaConv2d._compose):
        kernel = compose(layer, channels_last)
        if layer.groups == 2:  # the shared one
            kept.append(weakref.ref(kernel))
        return kernel

    monkeypatch.setattr(OrepaConv2d, '_compose', noted)
    accumulate(model, images, once=True)
    model.zero_grad()
    with micro_batch(model, last=False):
        loss_of(model, images[0]).backward()
    model.zero_grad()
    with pytest.raises(RuntimeError), micro_batch(model, last=False):
        model(images[0][:, :1])
    model.zero_grad()
    accumulate(model, images, once=True)
    with micro_batch(model, last=False):
        loss_of(model, images[0]).backward()
    assert len(kept) == 4
    del model
    gc.collect()
    assert [kernel() for kernel in kept] == [None] * 4
    assert not _global_optimizer_pre_hooks


def test_an_update_that_was_given_up_locks_nothing():
    model = expanded()
    with micro_batch(model, last=False):
        loss_of(model, batches()[0]).backward()
    model.zero_grad()
    timm_rep.begin_time_step(model)
    model.load_state_dict(model.state_dict())
    model.float()


@pytest.mark.parametrize('change', [
    lambda model: timm_rep.begin_time_step(model),
    lambda model: timm_rep.set_attach_rate(model, 0.5),
    lambda model: model.load_state_dict(expanded().state_dict()),
    lambda model: model.float(),
])
def test_changes_in_the_middle_of_an_update_are_refused(change):
    model, images = expanded(), batches()
    with micro_batch(model, last=False):
        loss_of(model, images[0]).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match='in the middle of an update'):
        change(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.zero_grad()
    change(model)


def test_what_cannot_be_shared_is_refused():
    model, images = expanded(), batches()
    with micro_batch(model, last=False):
        loss_of(model, images[0]).backward(create_graph=True)
    with pytest.raises(UserError, match='create_graph=True'), micro_batch(model, last=True):
        loss_of(model, images[0]).backward(create_graph=True)
    model = expanded()
    with pytest.raises(UserError, match='cannot begin inside another'):
        with micro_batch(model, last=False), micro_batch(model, last=True):
            pass
    with pytest.raises(UserError, match='DataParallel copies the layers'), micro_batch(nn.DataParallel(model), True):
        pass
    model = expanded()
    with micro_batch(model.stem, last=False):
        model.stem(images[0]).sum().backward()
    with pytest.raises(UserError, match='some layers of the model are in the middle of an update'):
        accumulate(model, images, once=True)


def test_compiled_layers_compose_at_every_micro_batch_and_say_so():
    torch.compiler.reset()
    model = nn.Sequential(OrepaConv2d(3, 2, 3)).double()
    twin = copy.deepcopy(model)
    accumulate(twin, batches(), once=False)
    compiled = torch.compile(model, backend='aot_eager')
    with warnings.catch_warnings(record=True) as caught, torch._dynamo.config.patch(error_on_recompile=True):
        warnings.simplefilter('always')
        for _ in range(2):
            model.zero_grad()
            accumulate(compiled, batches(), once=True)
    assert any('compiled layers compose at every micro-batch' in str(warning.message) for warning in caught)
    assert_same_gradients(model, twin)


@pytest.mark.parametrize('method', timm_rep.methods.registered_methods())
def test_layers_can_be_scripted_after_an_update(method):
    size = 5 if method == 'dilated' else 3
    conv = nn.Conv2d(3, 4, size, padding=size // 2, bias=False)
    model = timm_rep.expand(nn.Sequential(conv, nn.BatchNorm2d(4)), method, select='*')
    with micro_batch(model, last=True):
        model(randn(2, 3, 8, 8, dtype=torch.float32)).sum().backward()
    x = randn(2, 3, 8, 8, seed=1, dtype=torch.float32)
    assert_near(torch.jit.script(model.eval())(x), model(x), 1e-6)


def test_a_module_that_holds_distributed_ones(process_group):
    pair = nn.ModuleList([nn.parallel.DistributedDataParallel(expanded()) for _ in range(2)])
    twin = copy.deepcopy(nn.ModuleList([form.module for form in pair]))
    for number, batch in enumerate(batches(), 1):
        with micro_batch(pair, last=number == COUNT):
            sum(loss_of(form, batch) for form in pair).backward()
        sum(loss_of(form, batch) for form in twin).backward()
    assert_same_gradients(nn.ModuleList([form.module for form in pair]), twin)


@pytest.mark.parametrize('options', [{}, dict(gradient_as_bucket_view=True), dict(find_unused_parameters=True)])
def test_distributed_training_exchanges_gradients_once(process_group, options):
    model = expanded()
    twin = copy.deepcopy(model)
    parallel = nn.parallel.DistributedDataParallel(model, **options)
    exchanged = []

    def count(state, bucket):
        exchanged.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    parallel.register_comm_hook(None, count)
    for _ in range(2):
        for form in (model, twin):
            form.zero_grad()
        accumulate(parallel, batches(), once=True)
        accumulate(twin, batches(), once=False)
        assert_same_gradients(model, twin)
    assert sum(exchanged) == 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_models_without_linear_layers_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    twin = copy.deepcopy(model)
    accumulate(model, batches(), once=True)
    accumulate(twin, batches(), once=False)
    assert_same_gradients(model, twin, LINEAR_RTOL[torch.float64])
