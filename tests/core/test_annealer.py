"""The annealer: one object around the epochs of a loop, on the model and its averaged copies, resumed at any epoch."""
import copy
import gc
from weakref import ref

import pytest
import timm
import torch
import torch.nn as nn
from helpers import (
    MODEL_RTOL,
    assert_near,
    assert_same_state,
    mixed_model,
    randn,
    randomize_,
    state_of,
    tiny_resnet,
)
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.distributed.optim import ZeroRedundancyOptimizer

import timm_rep
from timm_rep import Annealer, AnnealingSchedule, attach_rate
from timm_rep.core.annealing import set_time_step, time_step
from timm_rep.core.freeze import OriginFreeze
from timm_rep.core.optimizers import optimizers_in
from timm_rep.core.walk import annealed_modules

SCHEDULE = AnnealingSchedule(time_steps=3, epochs=2, warmup_epochs=1)


class Loop:
    """A loop of one's own with an averaged model, and what it would save."""

    def __init__(self, **kwargs):
        torch.manual_seed(0)
        self.model = mixed_model().train()
        self.averaged = ModelEmaV3(self.model, decay=0.75)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.annealer = Annealer(self.model, self.optimizer, SCHEDULE, averaged=[self.averaged], seed=3, **kwargs)

    def epoch(self, epoch):
        position = self.annealer.begin_epoch(epoch)
        had_state = bool(self.optimizer.state)
        for step in range(2):
            self.optimizer.zero_grad()
            loss = self.model(randn(4, 3, 16, 16, seed=2 * epoch + step, dtype=torch.float32)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.averaged.update(self.model)
        self.annealer.end_epoch(train_loss=loss.item())
        return position, had_state

    def saved(self):
        holders = self.model, self.averaged, self.optimizer
        return copy.deepcopy([holder.state_dict() for holder in holders])

    def load(self, saved):
        for holder, state in zip((self.model, self.averaged, self.optimizer), saved):
            holder.load_state_dict(state)


@pytest.fixture(scope='module')
def course():
    """A loop that nothing interrupted, and its states after every epoch."""
    loop, saved, seen = Loop(log_branches=True), [], []
    for epoch in range(SCHEDULE.total_epochs):
        position, had_state = loop.epoch(epoch)
        assert time_step(loop.model) == time_step(loop.averaged) == position.time_step
        assert attach_rate(loop.model) == attach_rate(loop.averaged) == position.attach_rate
        seen.append((position.time_step, position.attach_rate, had_state))
        saved.append(loop.saved())
    return loop, saved, seen


def test_course_of_a_training(course):
    loop, _, seen = course
    # no momentum where a time step begins
    assert seen == [(step, rate, rate == 1) for step in range(3) for rate in (0.5, 1.0)]
    assert [(row['epoch'], row['time_step'], row['attach_rate']) for row in loop.annealer.history] == [
        (epoch, epoch // 2, (0.5, 1.0)[epoch % 2]) for epoch in range(6)]
    assert {row['lr'] for row in loop.annealer.history} == {0.01}
    assert all(row['train_loss'] > 0 for row in loop.annealer.history)
    model = loop.model.eval()
    x = randn(2, 3, 16, 16, dtype=torch.float32)
    with torch.no_grad():
        assert_near(timm_rep.fuse(model)(x), model(x), 1e-4)


@pytest.mark.parametrize('epoch', [0, 1, 3])
def test_resumed_training_ends_in_the_same_weights(course, epoch):
    _, saved, _ = course
    loop = Loop()
    loop.load(saved[epoch])
    for later in range(epoch + 1, SCHEDULE.total_epochs):
        loop.epoch(later)
    for state, expected in zip(loop.saved()[:2], saved[-1]):
        assert_same_state(state, expected)


def test_transition_is_that_of_begin_time_step_with_one_draw(course):
    _, saved, _ = course
    batches = [randn(4, 3, 16, 16, dtype=torch.float32)]
    options = dict(restoration='measured', compensate=True, side_gain=0.5, batches=batches)
    loop, other = Loop(**options), Loop()
    for each in (loop, other):
        each.load(saved[1])
    loop.annealer.begin_epoch(2)
    for form, expected in ((loop.model, other.model), (loop.averaged, other.averaged)):
        timm_rep.begin_time_step(
            expected, torch.Generator().manual_seed(3 + 1), attach_rate=0.5, **options)
        assert_same_state(form.state_dict(), expected.state_dict())


@pytest.mark.parametrize('rep_layer', ['rep', 'orepa'])
@torch.no_grad()
def test_weights_to_start_from_keep_their_outputs(rep_layer):
    forms = [timm.create_model('repan_repvgg_a0_cifar', num_classes=5, rep_layer=rep_layer) for _ in range(2)]
    x = randn(2, 3, 16, 16, dtype=torch.float32)
    before = [(state_of(randomize_(form, seed).eval()), form(x)) for seed, form in enumerate(forms)]
    set_time_step(forms[0], 7)  # of another training
    optimizer = torch.optim.SGD(forms[0].parameters(), lr=0.1)
    annealer = Annealer(forms[0], optimizer, SCHEDULE, averaged=forms[1:], start_weights=True)
    annealer.begin_epoch(0)
    for form, (state, outputs) in zip(forms, before):
        assert_near(form(x), outputs, MODEL_RTOL[torch.float32])
        assert (attach_rate(form), time_step(form)) == (0.5, 0)
        after = form.state_dict()
        assert {int(after[key]) for key in after if key.endswith('time_step')} == {0}  # inside of blocks, too
        assert not any(torch.equal(after[key], state[key]) for key in after if key.endswith('conv_1x1.conv.weight'))
    # once
    again = state_of(forms[0])
    annealer.begin_epoch(0)
    assert_same_state(forms[0].state_dict(), again)


@pytest.mark.parametrize(('start_weights', 'epoch'), [(False, 0), (True, 3)])
def test_fresh_and_resumed_weights_are_left_alone(course, start_weights, epoch):
    _, saved, _ = course
    loop = Loop(start_weights=start_weights)
    if epoch > 0:
        loop.load(saved[epoch - 1])
    before = [state_of(form) for form in (loop.model, loop.averaged)]
    rate = loop.annealer.begin_epoch(epoch).attach_rate
    for form, state in zip((loop.model, loop.averaged), before):
        expected = {key: torch.full_like(v, rate) if key.endswith('attach_rate') else v for key, v in state.items()}
        assert_same_state(form.state_dict(), expected)


def test_time_steps_that_do_not_fit_raise_and_change_nothing():
    loop = Loop()
    before = loop.saved()
    for number, averaged_number, message in (
            (2, 2, 'epoch 3 lies in time step 2, the model is in 3 already; .* start_weights=True'),
            (0, 1, r'model and its averaged copies are in different time steps: \[0, 1\]'),
    ):
        set_time_step(loop.model, number)
        set_time_step(loop.averaged, averaged_number)
        with pytest.raises(timm_rep.UserError, match=message):
            loop.annealer.begin_epoch(3)
    for form in (loop.model, loop.averaged):
        set_time_step(form, 0)
    assert_same_state(loop.model.state_dict(), before[0])


def test_plain_models_are_for_schedules_without_annealing():
    model = tiny_resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for schedule in (AnnealingSchedule(2, 1), AnnealingSchedule(1, 2, 1)):
        with pytest.raises(timm_rep.UserError, match='ResNet has no rep layers, so no side branches to anneal'):
            Annealer(model, optimizer, schedule)
    before = state_of(model)
    annealer = Annealer(model, optimizer, AnnealingSchedule(1, 2))
    for epoch in range(2):
        annealer.begin_epoch(epoch)
        assert annealer.end_epoch() == dict(epoch=epoch, time_step=0, attach_rate=1.0, lr=0.1)
    assert_same_state(model.state_dict(), before)
    loop = Loop()
    timm_rep.set_attach_rate(loop.model, 0.4)  # it stays
    Annealer(loop.model, loop.optimizer, AnnealingSchedule(1, 2)).begin_epoch(0)
    assert attach_rate(loop.model) == pytest.approx(0.4)


def test_history_holds_every_epoch_once():
    loop = Loop(log_branches=True)
    with pytest.raises(timm_rep.UserError, match='no epoch has begun'):
        loop.annealer.end_epoch()
    for epoch in (0, 1, 0, 1):
        loop.epoch(epoch)
    assert [row['epoch'] for row in loop.annealer.history] == [0, 1]
    keys = [(row['epoch'], row['depth'], row['branch']) for row in loop.annealer.branch_rows]
    assert len(set(keys)) == len(keys)
    with pytest.raises(timm_rep.UserError, match='no epoch has begun'):
        loop.annealer.end_epoch()


# Gradients of branches


def test_there_are_no_rows_of_layers_that_are_not_trained():
    model = timm_rep.expand(nn.Sequential(nn.Conv2d(3, 4, 3).requires_grad_(False), nn.BatchNorm2d(4)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    annealer = Annealer(model, optimizer, AnnealingSchedule(1, 2), log_branches=True)
    annealer.begin_epoch(0)
    model(randn(2, 3, 8, 8, dtype=torch.float32)).square().sum().backward()
    optimizer.step()
    annealer.end_epoch()
    assert annealer.branch_rows == []


@pytest.mark.parametrize('opt', ['momentum', 'lookahead_momentum'])
def test_branch_rows_are_the_root_mean_square_of_the_gradients(opt):
    model = timm.create_model('repan_resnet18_cifar', rep_layer='orepa', num_classes=5)
    optimizer = create_optimizer_v2(model, opt=opt, lr=0.0)
    annealer = Annealer(nn.DataParallel(model), optimizer, AnnealingSchedule(1, 2), log_branches=True)
    for epoch in range(2):
        annealer.begin_epoch(epoch)
        expected = {}
        for seed in (0, 1):
            optimizer.zero_grad()
            model(randn(4, 3, 8, 8, seed=2 * epoch + seed, dtype=torch.float32)).square().sum().backward()
            optimizer.step()
            for depth, (name, module) in enumerate(annealed_modules(model)):
                for branch, gradient in module.branch_gradients().items():
                    key = epoch, depth, name, branch
                    expected[key] = expected.get(key, 0) + gradient.square().mean().sqrt().item() / 2
        annealer.end_epoch()
        rows = [row for row in annealer.branch_rows if row['epoch'] == epoch]
        # the log sums millions of squares in float32
        assert {tuple(row.values())[:4]: row['rms'] for row in rows} == pytest.approx(expected, rel=5e-3)
        assert list(rows[0]) == ['epoch', 'depth', 'layer', 'branch', 'rms']


def test_gradients_of_closures_are_logged_in_their_own_update():
    def rows(with_closure):
        model = timm.create_model('repan_repvgg_a0_cifar', num_classes=5)
        model.load_state_dict(started)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        annealer = Annealer(model, optimizer, SCHEDULE, log_branches=True, start_weights=True, freeze_origin=True)
        for epoch in range(2):
            annealer.begin_epoch(epoch)
            for seed in range(2):
                def closure(seed=seed):
                    optimizer.zero_grad()
                    model(randn(4, 3, 8, 8, seed=seed, dtype=torch.float32)).square().mean().backward()
                if with_closure:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
            annealer.end_epoch()
        return annealer.branch_rows

    started = timm.create_model('repan_repvgg_a0_cifar', num_classes=5).state_dict()
    assert len(rows(True)) > 0
    assert rows(True) == rows(False)


# What a model says of itself


def test_attach_rate_and_time_step_read_what_is_set():
    model = mixed_model()
    timm_rep.set_attach_rate(model, 0.25)
    set_time_step(model, 2)
    for form in (model, nn.DataParallel(model), ModelEmaV3(model)):
        assert (attach_rate(form), time_step(form)) == (0.25, 2)
    next(iter(annealed_modules(model)))[1].set_attach_rate_(0.5)
    with pytest.raises(timm_rep.UserError, match=r'in different attach rates: \[0.25, 0.5\]'):
        attach_rate(model)
    with pytest.raises(timm_rep.UserError, match='has no rep layers'):
        attach_rate(tiny_resnet())


# Origin branches that stand still


def origin_values(model):
    return [
        parameter[index].detach().clone()
        for _, module in annealed_modules(model) for parameter, index in module.origin_parameters()]


def test_optimizers_that_hold_another_freeze_like_that(process_group):
    def trained(wrap):
        model = timm.create_model('repan_repvgg_a0_cifar', num_classes=5, rep_layer='orepa')
        model.load_state_dict(started)
        optimizer = wrap(model.parameters())
        annealer = Annealer(model, optimizer, AnnealingSchedule(2, 3, warmup_epochs=2), freeze_origin=True)
        for epoch in range(6):
            annealer.begin_epoch(epoch)
            optimizer.zero_grad()
            model(randn(4, 3, 8, 8, seed=epoch, dtype=torch.float32)).square().mean().backward()
            optimizer.step()
        return model.state_dict()

    started = timm.create_model('repan_repvgg_a0_cifar', num_classes=5, rep_layer='orepa').state_dict()
    kwargs = dict(lr=0.01, weight_decay=0.1)
    expected = trained(lambda parameters: torch.optim.AdamW(parameters, **kwargs))
    assert_same_state(trained(lambda p: ZeroRedundancyOptimizer(p, torch.optim.AdamW, **kwargs)), expected)


@pytest.mark.parametrize('optimizer', ['momentum', 'adamw', 'lookahead_momentum'])
@pytest.mark.parametrize('rep_layer', ['rep', 'dbb', 'orepa'])
def test_frozen_origins_stand_still_while_the_attach_rate_warms_up(rep_layer, optimizer):
    """In time steps after the first; with weight decay and momentum, which must not be there afterwards either."""
    model = timm.create_model('repan_repvgg_a0_cifar', num_classes=5, rep_layer=rep_layer)
    optimizer = create_optimizer_v2(model, opt=optimizer, lr=0.05, weight_decay=0.1)
    annealer = Annealer(model, optimizer, AnnealingSchedule(2, 3, warmup_epochs=2), freeze_origin=True)
    stood_still = []
    for epoch in range(6):
        annealer.begin_epoch(epoch)
        before = origin_values(model)
        for seed in range(2):
            optimizer.zero_grad()
            model(randn(4, 3, 8, 8, seed=seed, dtype=torch.float32)).square().mean().backward()
            before_step = {key: value.detach().clone() for key, value in model.named_parameters()}
            optimizer.step()
            assert any(not torch.equal(value, before_step[key]) for key, value in model.named_parameters())
        stood_still.append(all(map(torch.equal, origin_values(model), before)))
        if not stood_still[-1]:
            assert not any(map(torch.equal, origin_values(model), before))
    assert stood_still == [False, False, False, True, True, False]


def test_origins_of_trained_weights_are_frozen_from_the_first_time_step_on():
    model = timm.create_model('repan_repvgg_a0_cifar', num_classes=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    annealer = Annealer(model, optimizer, SCHEDULE, start_weights=True, freeze_origin=True)
    for epoch, frozen in enumerate(SCHEDULE.position(epoch).attach_rate < 1 for epoch in range(2)):
        annealer.begin_epoch(epoch)
        before = origin_values(model)
        model(randn(4, 3, 8, 8, dtype=torch.float32)).square().mean().backward()
        optimizer.step()
        assert all(map(torch.equal, origin_values(model), before)) == frozen


def test_measured_restoration_needs_batches():
    model = timm.create_model('repan_repvgg_a0_cifar', num_classes=5)
    with pytest.raises(timm_rep.UserError, match="needs batches of images, such as batches=train_loader"):
        Annealer(model, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE, restoration='measured')


def test_frozen_origins_and_an_optimizer_that_cannot_take_them_up_again():
    model = timm.create_model('repan_repvgg_a0_cifar', num_classes=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    with pytest.raises(timm_rep.UserError, match='fused SGD with momentum; take SGD'):
        Annealer(model, optimizer, SCHEDULE, freeze_origin=True)


class Momentum(torch.optim.Optimizer):
    """SGD with momentum for the first of its parameters, and another optimizer for the others, as many a Muon."""

    def __init__(self, parameters, hold):
        first, *others = parameters
        super().__init__([first], dict(lr=0.1))
        self.held = hold(torch.optim.AdamW(others, lr=0.1))

    @torch.no_grad()
    def step(self, closure=None):
        (parameter,) = self.param_groups[0]['params']
        if parameter.grad is not None:
            buffer = self.state[parameter].setdefault('momentum_buffer', torch.zeros_like(parameter))
            parameter.sub_(buffer.mul_(0.9).add_(parameter.grad), alpha=0.1)
        optimizers_in(self)[1].step()


@pytest.mark.parametrize('hold', [lambda o: o, lambda o: [o], lambda o: dict(adamw=o)], ids=['itself', 'list', 'dict'])
@pytest.mark.parametrize('rep_layer', ['rep', 'orepa'])
def test_origins_are_frozen_whichever_of_several_optimizers_moves_them(rep_layer, hold):
    model = timm.create_model('repan_repvgg_a0_cifar', num_classes=5, rep_layer=rep_layer)
    (first, _), *_ = (part for _, module in annealed_modules(model) for part in module.origin_parameters())
    optimizer = Momentum([first, *(p for p in model.parameters() if p is not first)], hold)
    optimizer.itself = optimizer
    annealer = Annealer(
        model, optimizer, AnnealingSchedule(2, 3, warmup_epochs=2), freeze_origin=True, log_branches=True)
    stood_still = []
    for epoch in range(6):
        annealer.begin_epoch(epoch)
        if epoch == 3:
            assert not any(one.state for one in optimizers_in(optimizer))
        before = origin_values(model)
        for seed in range(2):
            for parameter in model.parameters():
                parameter.grad = None
            model(randn(4, 3, 8, 8, seed=seed, dtype=torch.float32)).square().mean().backward()
            optimizer.step()
        stood_still.append(all(map(torch.equal, origin_values(model), before)))
        annealer.end_epoch()
    assert stood_still == [False, False, False, True, True, False]
    assert all(row['rms'] > 0 for row in annealer.branch_rows if row['branch'] == 'origin')


def test_lookahead_does_not_pull_frozen_origins_to_zero():
    model = timm.create_model('repan_repvgg_a0_cifar', num_classes=5, rep_layer='orepa')
    optimizer = create_optimizer_v2(model, opt='lookahead_momentum', lr=0.01, weight_decay=0.1)
    schedule = AnnealingSchedule(2, 3, warmup_epochs=2)
    annealer = Annealer(model, optimizer, schedule, freeze_origin=True)
    annealer.begin_epoch(0)
    annealer.begin_epoch(3)
    before = origin_values(model)
    for seed in range(13):  # two synchronizations, of six steps each
        optimizer.zero_grad()
        model(randn(2, 3, 8, 8, seed=seed, dtype=torch.float32)).square().mean().backward()
        optimizer.step()
    assert all(torch.allclose(now, then, rtol=1e-6) for now, then in zip(origin_values(model), before))


def test_batches_may_come_from_a_loader_that_does_not_know_its_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(randn(6, 3, 8, 8, dtype=torch.float32))

    model = timm.create_model('repan_repvgg_a0_cifar', num_classes=5)
    loader = torch.utils.data.DataLoader(Stream(), batch_size=2)
    annealer = Annealer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE, restoration='measured', batches=loader)
    annealer.begin_epoch(2)
    assert time_step(model) == 1


@pytest.mark.parametrize('rep_layer', ['rep', 'orepa'])
@pytest.mark.parametrize('call', [
    lambda optimizer, closure: optimizer.step(closure), lambda optimizer, closure: optimizer.step(closure=closure)])
def test_closures_leave_frozen_origins_alone(call, rep_layer):
    model = timm.create_model('repan_repvgg_a0_cifar', num_classes=5, rep_layer=rep_layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    annealer = Annealer(model, optimizer, SCHEDULE, start_weights=True, freeze_origin=True)
    annealer.begin_epoch(0)
    before, everything = origin_values(model), state_of(model)

    def closure():
        optimizer.zero_grad()
        loss = model(randn(4, 3, 8, 8, dtype=torch.float32)).square().mean()
        loss.backward()
        return loss

    assert call(optimizer, closure) > 0
    assert all(map(torch.equal, origin_values(model), before))
    assert any(not torch.equal(model.state_dict()[name], value) for name, value in everything.items())
    optimizer.step(None)
    assert all(map(torch.equal, origin_values(model), before))


FROZEN_STEPS = 40


def steps_of_origins(model, optimizer, seeds):
    """How far the origin branch of each parameter moves in each step, by synthetic gradients."""
    parts = [part for _, module in annealed_modules(model) for part in module.origin_parameters()]
    moves = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) + 0.5
        before = [parameter[index].detach().clone() for parameter, index in parts]
        optimizer.step()
        moves.append([parameter[index].detach() - value for (parameter, index), value in zip(parts, before)])
    return moves


def frozen_then_thawed(opt, weight_decay):
    """A model and its optimizer at the first epoch with moving origins, and a new optimizer for a copy of it."""
    model = nn.Sequential(timm_rep.OrepaConv2d(3, 4, 3, padding=1), timm_rep.OrepaPointwiseConv2d(4, 4, 1))

    def make(model):
        if opt == 'rprop':
            return torch.optim.Rprop(model.parameters(), lr=1e-3)
        return create_optimizer_v2(model, opt=opt, lr=1e-3, weight_decay=weight_decay)

    optimizer = make(model)
    annealer = Annealer(model, optimizer, AnnealingSchedule(1, 3, 2), freeze_origin=True, start_weights=True)
    for epoch in range(2):
        annealer.begin_epoch(epoch)
        seeds = range(FROZEN_STEPS * epoch, FROZEN_STEPS * (epoch + 1))
        assert not any(move.any() for moves in steps_of_origins(model, optimizer, seeds) for move in moves)
    annealer.begin_epoch(2)
    twin = copy.deepcopy(model)
    return model, optimizer, twin, make(twin)


@pytest.mark.parametrize('opt', [
    'sgd', 'adam', 'adamw', 'nadamw', 'radam', 'adamax', 'adabelief', 'lamb', 'adanw', 'lion', 'rprop', 'rmsprop',
    'adagrad', 'adadelta', 'madgrad', 'lookahead_adamw'])
def test_thawed_origins_step_as_with_a_new_optimizer(opt):
    model, optimizer, twin, new = frozen_then_thawed(opt, weight_decay=0.0)
    expected = steps_of_origins(twin, new, range(1000, 1008))
    for moves, expected_moves in zip(steps_of_origins(model, optimizer, range(1000, 1008)), expected):
        for move, expected_move in zip(moves, expected_moves):
            assert expected_move.any()
            assert torch.allclose(move, expected_move, rtol=1e-3, atol=1e-8)


def test_thawed_origins_have_what_an_optimizer_makes_before_its_first_step():
    """AdaHessian does not step without it."""
    model = nn.Sequential(timm_rep.OrepaConv2d(3, 4, 3, padding=1), timm_rep.OrepaPointwiseConv2d(4, 4, 1))
    optimizer = create_optimizer_v2(model, 'adahessian', lr=1e-3)
    annealer = Annealer(model, optimizer, AnnealingSchedule(2, 2, 1), freeze_origin=True)
    for epoch in range(4):
        annealer.begin_epoch(epoch)
        optimizer.zero_grad()
        model(randn(2, 3, 8, 8, dtype=torch.float32)).square().sum().backward(create_graph=True)
        optimizer.step()
        annealer.end_epoch()
    assert all('exp_hessian_diag_sq' in optimizer.state[parameter] for parameter in model.parameters())


def test_thawed_origins_have_no_momentum_of_weight_decay():
    model, optimizer, _, _ = frozen_then_thawed('momentum', weight_decay=0.1)
    for _, module in annealed_modules(model):
        for parameter, index in module.origin_parameters():
            if index is not ...:
                assert not optimizer.state[parameter]['momentum_buffer'][index].any()
                assert optimizer.state[parameter]['momentum_buffer'].any()


@pytest.mark.parametrize('opt', [torch.optim.SGD, torch.optim.Adam, torch.optim.ASGD, torch.optim.Rprop])
def test_what_the_optimizer_held_of_frozen_parts_comes_back(opt):
    model = nn.Sequential(timm_rep.OrepaConv2d(3, 4, 3, padding=1))
    optimizer = opt(model.parameters(), **dict(momentum=0.9, weight_decay=0.1) if opt is torch.optim.SGD else {})
    freeze = OriginFreeze(model, optimizer)
    steps_of_origins(model, optimizer, range(3))

    def held():
        return [
            (name, state[index].clone()) for parameter, index in model[0].origin_parameters()
            for name, state in optimizer.state[parameter].items() if state.shape == parameter.shape
        ]

    before = held()
    assert any(state.any() for _, state in before)
    freeze.active = True
    steps_of_origins(model, optimizer, range(3, 6))
    assert all(name == other and torch.equal(state, now) for (name, state), (other, now) in zip(before, held()))


def test_a_resumed_loop_thaws_as_one_that_was_not_interrupted():
    def loop():
        torch.manual_seed(0)
        model = nn.Sequential(timm_rep.OrepaConv2d(3, 4, 3, padding=1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        schedule = AnnealingSchedule(1, 3, warmup_epochs=2)
        return model, optimizer, Annealer(model, optimizer, schedule, freeze_origin=True, start_weights=True)

    model, optimizer, annealer = loop()
    for epoch in range(3):
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        annealer.begin_epoch(epoch)
        steps_of_origins(model, optimizer, range(3 * epoch, 3 * epoch + 3))
    other, optimizer, annealer = loop()
    for holder, state in zip((other, optimizer), saved):
        holder.load_state_dict(state)
    annealer.begin_epoch(2)
    steps_of_origins(other, optimizer, range(6, 9))
    assert_same_state(other.state_dict(), model.state_dict())


def test_several_optimizers_are_refused_before_anything_is_changed():
    model = mixed_model()
    optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()]
    with pytest.raises(timm_rep.UserError, match=r'takes one optimizer .* got a list; where there are several'):
        Annealer(model, optimizers, SCHEDULE)


def test_an_optimizer_without_the_origins_cannot_freeze_them():
    model = mixed_model()
    optimizer = torch.optim.SGD(list(model.parameters())[-2:], lr=0.1)  # the rest has one of its own
    with pytest.raises(timm_rep.UserError, match='does not have all of them: another one would move them'):
        Annealer(model, optimizer, SCHEDULE, freeze_origin=True)
    for parameter in list(model.parameters())[:-2]:
        parameter.requires_grad_(False)
    Annealer(model, optimizer, SCHEDULE, freeze_origin=True)


def assert_moves_like(thawed, usual):
    """As with a new optimizer, not in steps as large as after many without them."""
    assert thawed.moved(steps=3) == pytest.approx(usual.moved(steps=3), rel=1e-5)


class Frozen:
    """A model whose origins an annealer has frozen for some updates of Adam."""

    def __init__(self, rep_layer='orepa'):
        torch.manual_seed(0)
        self.model = timm.create_model('repan_repvgg_a0_cifar', num_classes=5, rep_layer=rep_layer)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.annealer = Annealer(
            self.model, self.optimizer, SCHEDULE, start_weights=True, freeze_origin=True, log_branches=True)
        self.annealer.begin_epoch(0)
        assert self.moved(steps=5) == 0

    def moved(self, steps):
        """How far some updates move the origins, root mean square."""
        before = origin_values(self.model)
        for seed in range(steps):
            self.optimizer.zero_grad()
            self.model(randn(4, 3, 8, 8, seed=seed, dtype=torch.float32)).square().mean().backward()
            self.optimizer.step()
        moved = [(value - first).flatten() for value, first in zip(origin_values(self.model), before)]
        return torch.cat(moved).square().mean().sqrt().item()


@pytest.mark.parametrize('rep_layer', ['rep', 'orepa'])
@pytest.mark.parametrize('again', [True, False], ids=['another', 'none'])
def test_an_annealer_that_was_given_up_leaves_nothing_frozen(rep_layer, again, caplog):
    """As by a cell of a notebook that is interrupted while the rate warms up; a loop that begins anew may keep it."""
    frozen, usual = Frozen(rep_layer), Frozen(rep_layer)
    if again:
        other = Annealer(frozen.model, frozen.optimizer, AnnealingSchedule(1, 6, warmup_epochs=1))
        other.begin_epoch(0)
    else:
        del frozen.annealer
    usual.annealer._freeze.active = False
    usual.annealer._freeze.thaw()
    timm_rep.set_attach_rate(usual.model, attach_rate(frozen.model))
    assert 'kept origin branches frozen: they are trained until another one freezes them' in caplog.text
    assert not frozen.optimizer._optimizer_step_pre_hooks
    assert_moves_like(frozen, usual)


@pytest.mark.parametrize('rep_layer', ['rep', 'orepa'])
@pytest.mark.parametrize(('schedule', 'options'), [
    (SCHEDULE, {}),  # fresh weights, as it is told
    (AnnealingSchedule(2, 6), dict(start_weights=True)),
], ids=['fresh', 'no warm-up'])
def test_an_annealer_thaws_what_one_before_froze_and_it_does_not(rep_layer, schedule, options):
    frozen, usual = Frozen(rep_layer), Frozen(rep_layer)
    other = Annealer(frozen.model, frozen.optimizer, schedule, freeze_origin=True, **options)
    other.begin_epoch(0)
    usual.annealer._freeze.active = False
    usual.annealer._freeze.thaw()
    usual.model.load_state_dict(frozen.model.state_dict())
    assert_moves_like(frozen, usual)


def test_an_annealer_goes_on_with_what_one_before_froze(caplog):
    """As where a loop is resumed with the same objects: nothing of the optimizer's state is lost."""
    frozen = Frozen()
    state = copy.deepcopy(frozen.optimizer.state_dict()['state'])
    annealer = Annealer(frozen.model, frozen.optimizer, SCHEDULE, freeze_origin=True)
    annealer._starts_trained = True  # as it said before
    annealer.begin_epoch(0)
    assert_same_state(
        {f'{n}.{k}': v for n, of in frozen.optimizer.state_dict()['state'].items() for k, v in of.items()},
        {f'{n}.{k}': v for n, of in state.items() for k, v in of.items()})
    assert frozen.moved(steps=1) == 0
    assert not caplog.text


def test_annealers_of_several_optimizers_do_not_disturb_each_other():
    model = timm.create_model('repan_repvgg_a0_cifar', num_classes=5)
    options = dict(start_weights=True, freeze_origin=True, log_branches=True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    first, _ = [Annealer(model, optimizer, SCHEDULE, **options) for optimizer in optimizers]
    first.begin_epoch(0)
    before = origin_values(model)
    model(randn(4, 3, 8, 8, dtype=torch.float32)).square().mean().backward()
    optimizers[0].step()
    first.end_epoch()
    assert all(map(torch.equal, origin_values(model), before))
    assert first.branch_rows


def test_an_annealer_whose_place_was_taken_says_so():
    model = timm.create_model('repan_repvgg_a0_cifar', num_classes=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = (Annealer(model, optimizer, SCHEDULE, log_branches=True) for _ in range(2))
    first.begin_epoch(0)
    second.begin_epoch(1)
    second.begin_epoch(2)
    with pytest.raises(timm_rep.UserError, match=r'another annealer of the same model and optimizer .* took the place'):
        first.begin_epoch(3)
    copy.deepcopy(second).begin_epoch(3)  # of its own model and optimizer


def test_an_annealer_whose_epoch_is_refused_leaves_the_one_before():
    frozen = Frozen()
    set_time_step(frozen.model, 2)
    other = Annealer(frozen.model, frozen.optimizer, SCHEDULE, freeze_origin=True)
    with pytest.raises(timm_rep.UserError, match='epoch 0 lies in time step 1, the model is in 3 already'):
        other.begin_epoch(0)
    assert frozen.moved(steps=1) == 0
    set_time_step(frozen.model, 0)
    frozen.annealer.begin_epoch(1)


@pytest.mark.parametrize('rep_layer', ['rep', 'orepa'])
def test_weights_to_start_from_are_left_alone_where_their_epoch_is_refused(rep_layer):
    model = timm.create_model('repan_repvgg_a0_cifar', num_classes=5, rep_layer=rep_layer)
    set_time_step(model, 2)
    before = state_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    annealer = Annealer(model, optimizer, SCHEDULE, start_weights=True, restoration='measured', batches=[])
    with pytest.raises(timm_rep.UserError, match='batches'):
        annealer.begin_epoch(0)
    assert_same_state(state_of(model), before)


def test_an_annealer_that_is_refused_leaves_the_one_before():
    model = timm.create_model('repan_repvgg_a0_cifar', num_classes=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    annealer = Annealer(model, optimizer, SCHEDULE, freeze_origin=True)
    with pytest.raises(timm_rep.UserError, match=r'come in a list, got a ModelEmaV3; .*\[ema\.module\]'):
        Annealer(model, optimizer, SCHEDULE, averaged=ModelEmaV3(model))
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    annealer.begin_epoch(0)


def test_an_annealer_does_not_outlive_the_optimizer_that_holds_it():
    frozen = Frozen()
    frozen.optimizer.annealer = frozen.annealer
    held = ref(frozen.optimizer)
    del frozen
    gc.collect()
    assert held() is None


def test_a_seed_is_no_generator():
    model = timm.create_model('repan_repvgg_a0_cifar', num_classes=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for call in (
            lambda: timm_rep.begin_time_step(model, 3),
            lambda: timm_rep.expand(timm.create_model('test_resnet'), 'orepa', generator=3)):
        with pytest.raises(timm_rep.UserError, match=r'takes a torch\.Generator, got 3; .*manual_seed'):
            call()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
