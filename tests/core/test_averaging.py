"""Averaged copies (EMA, SWA) of a model whose attach rate changes: they take it over, and never average it."""
import copy
import gc
import pickle

import pytest
import torch
from helpers import assert_near, randn, randomize_, tiny_repvgg
from timm.models.byobnet import RepVggBlock
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import timm_rep
from timm_rep.core.annealing import set_time_step, time_step

AVERAGES = {
    'v3': lambda model: ModelEmaV3(model, decay=0.9998),
    'v3-one-by-one': lambda model: ModelEmaV3(model, decay=0.9998, foreach=False),
    'v3-no-buffers': lambda model: ModelEmaV3(model, decay=0.9998, exclude_buffers=True),
    'v2': lambda model: ModelEmaV2(model, decay=0.9998),
    'swa': lambda model: AveragedModel(model),
    'swa-buffers': lambda model: AveragedModel(model, use_buffers=True),
    'ema-buffers': lambda model: AveragedModel(
        model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.999)),
}


def annealed(rate, kind='orepa'):
    model = randomize_(timm_rep.expand(tiny_repvgg(), kind)).double().eval()
    timm_rep.set_attach_rate(model, rate)
    return model


def update(average, model, times):
    for _ in range(times):
        (average.update if hasattr(average, 'update') else average.update_parameters)(model)
    return average.module.eval()


@torch.no_grad()
@pytest.mark.parametrize('kind', ['orepa', 'dbb'])
@pytest.mark.parametrize('average', AVERAGES)
def test_an_averaged_copy_has_the_rate_and_time_step_of_its_model(average, kind):
    model = annealed(1 / 3, kind)
    averaged = AVERAGES[average](model)
    set_time_step(model, 3)
    timm_rep.set_attach_rate(model, 1.0)
    copied = update(averaged, model, 3)
    assert (timm_rep.attach_rate(copied), time_step(copied)) == (1.0, 3)
    x = randn(2, 3, 32, 32)
    assert_near(copied(x), model(x), 1e-9)  # no weight has changed
    timm_rep.set_attach_rate(model, 0.5)
    assert {value.item() for key, value in update(averaged, model, 1).state_dict().items() if key.endswith(
        'attach_rate')} == {0.5}


def test_a_copy_that_nobody_averages_keeps_its_rate_and_can_have_one_of_its_own():
    model = annealed(0.25)
    snapshot = copy.deepcopy(model)
    timm_rep.set_attach_rate(model, 1.0)
    assert timm_rep.attach_rate(snapshot) == 0.25
    timm_rep.set_attach_rate(snapshot, 0.5)
    set_time_step(snapshot, 2)
    assert (timm_rep.attach_rate(snapshot.float()), time_step(snapshot)) == (0.5, 2)
    snapshot.load_state_dict(annealed(0.75).state_dict())
    assert timm_rep.attach_rate(snapshot) == 0.75
    assert timm_rep.attach_rate(pickle.loads(pickle.dumps(snapshot))) == 0.75
    assert timm_rep.attach_rate(model) == 1.0


def test_writing_the_same_values_again_as_ddp_does_is_not_averaging():
    model = annealed(0.25)
    trained = copy.deepcopy(model)
    timm_rep.set_attach_rate(trained, 0.5)
    for buffer in trained.buffers():
        buffer.copy_(buffer.clone())
    assert timm_rep.attach_rate(trained) == 0.5


def test_a_rate_that_is_written_again_in_place_is_not_averaged():
    """As a broadcast of one's own does it; a mean would show."""
    model = annealed(1.0).float()
    twin = copy.deepcopy(model)
    timm_rep.set_attach_rate(model, 0.5)
    for buffer in twin.buffers():
        buffer.copy_(buffer.clone())
    assert timm_rep.attach_rate(twin) == timm_rep.attach_rate(twin.eval()) == 1.0
    averaged = ModelEmaV3(model, decay=0.99999)
    timm_rep.set_attach_rate(model, 0.4)
    assert timm_rep.attach_rate(update(averaged, model, 1)) == timm_rep.attach_rate(model)


@pytest.mark.parametrize('order', [1, -1])
def test_a_model_and_its_average_that_are_pickled_together(order):
    model = annealed(0.25)
    averaged = ModelEmaV3(model, decay=0.9998)
    both = pickle.loads(pickle.dumps((model, averaged)[::order]))
    own, average = both[::order]
    for rate in (1.0, 0.5):
        timm_rep.set_attach_rate(own, rate)
        assert timm_rep.attach_rate(update(average, own, 2)) == rate
    assert timm_rep.attach_rate(model) == timm_rep.attach_rate(averaged.module) == 0.25
    timm_rep.set_attach_rate(model, 1.0)
    assert timm_rep.attach_rate(update(averaged, model, 2)) == 1.0


def test_pickles_hold_nothing_but_what_is_pickled():
    model = annealed(0.25)
    alone = len(pickle.dumps(model))
    averaged = copy.deepcopy(model)
    for part in (model, averaged):
        assert len(pickle.dumps(part)) < 1.2 * alone
    loaded = pickle.loads(pickle.dumps(averaged))
    timm_rep.set_attach_rate(model, 1.0)
    assert timm_rep.attach_rate(update(ModelEmaV3(loaded), loaded, 1)) == 0.25


def test_a_shallow_copy_does_not_take_the_place_of_its_original():
    model = annealed(0.5)
    averaged = ModelEmaV3(model, decay=0.9)
    for _, layer in timm_rep.rep_layers(model):
        copy.copy(layer)
    timm_rep.set_attach_rate(model, 0.75)
    assert timm_rep.attach_rate(update(averaged, model, 2)) == 0.75


def test_copies_of_copies_and_copies_whose_model_is_gone():
    model = annealed(0.25)
    first = ModelEmaV3(model, decay=0.9)
    second = ModelEmaV3(first.module, decay=0.9)
    timm_rep.set_attach_rate(model, 1.0)
    first.update(model)
    second.update(first.module)
    assert timm_rep.attach_rate(second.module) == 1.0
    del model
    assert timm_rep.attach_rate(first.module) == 1.0
    timm_rep.set_attach_rate(first.module, 0.5)
    assert timm_rep.attach_rate(copy.deepcopy(first).module) == 0.5


@torch.no_grad()
@pytest.mark.parametrize('after', ['model gone', 'pickled', 'time step', 'saved'])
def test_a_mean_is_never_stored(after):
    model = annealed(0.25)
    averaged = ModelEmaV3(model, decay=0.9998)
    timm_rep.set_attach_rate(model, 1.0)
    x = randn(2, 3, 32, 32)
    expected = model(x)
    averaged.update(model)
    copied = averaged.module
    if after == 'model gone':
        del model
        gc.collect()
    elif after == 'pickled':
        copied = pickle.loads(pickle.dumps(copied))
    elif after == 'time step':
        for form in (model, copied):
            timm_rep.begin_time_step(form, torch.Generator().manual_seed(1), attach_rate=0.0)
        assert_near(copied(x), model(x), 1e-9)
    else:
        other = annealed(0.5)
        other.load_state_dict(copied.state_dict())
        copied = other
    assert_near(copied(x), expected, 1e-9)


@torch.no_grad()
def test_values_that_are_no_mean_of_the_two_are_kept():
    base = annealed(1.0)
    query, key = copy.deepcopy(base), copy.deepcopy(base)
    timm_rep.set_attach_rate(query, 0.25)
    for own, theirs in zip(key.state_dict().values(), query.state_dict().values()):
        own.copy_(theirs)
    assert timm_rep.attach_rate(key) == 0.25


@torch.no_grad()
def test_a_model_and_its_average_that_are_copied_together():
    model = annealed(0.25)
    for pair in ((model, ModelEmaV3(model, decay=0.9)), (ModelEmaV3(model, decay=0.9), model)):
        both = copy.deepcopy(pair)
        averaged, own = sorted(both, key=lambda part: not isinstance(part, ModelEmaV3))
        timm_rep.set_attach_rate(own, 1.0)
        assert timm_rep.attach_rate(update(averaged, own, 2)) == 1.0


@torch.no_grad()
def test_a_rate_that_was_written_by_hand_is_taken_over():
    model = annealed(0.25)
    averaged = ModelEmaV3(model, decay=0.9)
    for name, buffer in model.named_buffers():
        if name.endswith('attach_rate'):
            buffer.fill_(1.0)
    assert timm_rep.attach_rate(update(averaged, model, 2)) == 1.0


@torch.no_grad()
def test_a_time_step_that_is_copied_on_purpose_is_kept():
    base = annealed(1.0)
    query, key = copy.deepcopy(base), copy.deepcopy(base)
    set_time_step(query, 1)
    for own, theirs in zip(key.state_dict().values(), query.state_dict().values()):
        own.copy_(theirs)
    assert time_step(key) == 1


@pytest.mark.parametrize('average', ['v3', 'v2'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_means_in_half_precision_may_round_to_what_was_there(dtype, average):
    model = annealed(1.0).to(dtype)
    averaged = AVERAGES[average](model)
    timm_rep.set_attach_rate(model, 1 / 3)
    assert timm_rep.attach_rate(update(averaged, model, 2)) == timm_rep.attach_rate(model)


def test_copies_in_inference_mode():
    model = annealed(0.25)
    with torch.inference_mode():
        twin = copy.deepcopy(model).float()
        timm_rep.verify(model, timm_rep.fuse(model), inputs=randn(1, 3, 32, 32))
        assert timm_rep.attach_rate(twin) == 0.25
        timm_rep.set_attach_rate(twin, 0.5)
    assert (timm_rep.attach_rate(twin), timm_rep.attach_rate(model)) == (0.5, 0.25)


def test_a_compiled_copy_takes_the_rate_over_when_it_is_put_into_eval_mode():
    model = annealed(0.25)
    averaged = ModelEmaV3(model, decay=0.9)
    compiled = torch.compile(averaged.module, backend='eager')
    timm_rep.set_attach_rate(model, 1.0)
    averaged.update(model)
    x = randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_near(compiled.eval()(x), model(x), 1e-10)


@torch.no_grad()
@pytest.mark.parametrize('how', ['data', 'new data', 'new buffer'])
def test_means_that_move_no_version_are_found_in_eval_mode(how):
    """Averages written by way of `.data`, as the library ema_pytorch does."""
    model = annealed(1 / 3)
    averaged = copy.deepcopy(model)
    timm_rep.set_attach_rate(model, 1.0)
    for _ in range(3):
        for (name, mine), theirs in zip(list(averaged.named_buffers()), model.buffers()):
            if not mine.is_floating_point():
                continue
            mean = torch.lerp(mine, theirs, 2e-4)
            if how == 'data':
                mine.data.copy_(mean)
            elif how == 'new data':
                mine.data = mean
            else:
                owner, _, key = name.rpartition('.')
                setattr(averaged.get_submodule(owner), key, mean)
    assert timm_rep.attach_rate(averaged.eval()) == 1.0
    x = randn(2, 3, 32, 32)
    assert_near(averaged(x), model(x), 1e-9)


@torch.no_grad()
def test_a_model_that_was_written_in_place_and_then_averaged():
    """As a distributed checkpoint is read; the copy is used at once, without eval()."""
    model = annealed(1.0)
    averaged = ModelEmaV3(model, decay=0.9998)
    for key, value in model.state_dict().items():
        if key.endswith('attach_rate'):
            value.fill_(0.25)
    for _ in range(3):
        averaged.update(model)
    x = randn(2, 3, 32, 32)
    assert_near(averaged.module(x), model(x), 1e-9)


@torch.no_grad()
def test_a_copy_that_was_loaded_with_what_its_model_holds_has_no_rate_of_its_own():
    model = torch.nn.Sequential(timm_rep.OrepaConv2d(4, 4, 3, padding=1)).bfloat16()
    averaged = ModelEmaV2(model, decay=0.9998)
    averaged.module.load_state_dict(model.state_dict())
    timm_rep.set_attach_rate(model, 1 / 3)
    assert timm_rep.attach_rate(update(averaged, model, 4)) == timm_rep.attach_rate(model)


@pytest.mark.parametrize('kind', ['orepa', 'dbb'])
@torch.no_grad()
def test_copies_of_modules_that_were_compiled_in_place_have_weights_of_their_own(kind):
    model = annealed(1.0, kind)
    for _, module in timm_rep.core.walk.annealed_modules(model):
        module.compile(backend='eager')
    x = randn(2, 3, 32, 32)
    expected = model(x)
    copied, fused = copy.deepcopy(model), timm_rep.fuse(model)
    pickle.dumps(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert_near(copied(x), expected, 1e-9)
    assert_near(fused(x), expected, 1e-9)


@torch.no_grad()
def test_blocks_that_were_compiled_in_place_are_expanded_and_fused():
    model = randomize_(tiny_repvgg()).double().eval()
    for block in model.modules():
        if isinstance(block, RepVggBlock):
            block.compile(backend='eager')
    x = randn(2, 3, 32, 32)
    expected = model(x)
    rep = timm_rep.expand(model, 'rep')
    timm_rep.set_attach_rate(rep, 0.5)
    fused = timm_rep.fuse(rep)
    assert (rep(x) - expected).abs().max() > 1e-3
    assert_near(fused(x), rep(x), 1e-9)
