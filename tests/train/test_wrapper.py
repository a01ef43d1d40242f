"""timm's training in time steps: what a run leaves, what happens around an epoch, and timm's own script."""
import argparse
import os
import re
import signal
import threading

import pytest
import safetensors.torch
import timm
import torch
import yaml
from helpers import MODEL_RTOL, assert_near, assert_same_state, randn, randomize_
from interrupted_run import EPOCHS, MODEL, TIME_STEPS, arguments, rows, run

import timm_rep
from timm_rep.core.walk import annealed_modules
from timm_rep.io.checkpoint import read_checkpoint
from timm_rep.io.weights import load_training_form
from timm_rep.train.epochs import AnnealedEpochs, _is_captured


def weights_of(path):
    return read_checkpoint(path).state_dict


# One run


def test_summary_tells_time_step_and_attach_rate(finished):
    table = rows(finished / 'summary.csv')
    assert [int(row['epoch']) for row in table] == list(range(TIME_STEPS * EPOCHS))
    assert [int(row['train_time_step']) for row in table] == [0, 0, 1, 1, 2, 2]
    assert [float(row['train_attach_rate']) for row in table] == [0.5, 1.0] * TIME_STEPS
    # timm's cosine starts anew with each time step, at the same peak
    assert [float(row['lr']) for row in table] == pytest.approx([0.05, 0.025] * TIME_STEPS)


def test_checkpoints_say_in_which_time_step_they_are(finished):
    for epoch in range(TIME_STEPS * EPOCHS):
        checkpoint = read_checkpoint(finished / f'checkpoint-{epoch}.pth.tar')
        steps = {int(v) for k, v in checkpoint.state_dict.items() if k.endswith('time_step')}
        rates = {float(v) for k, v in checkpoint.state_dict.items() if k.endswith('attach_rate')}
        assert (steps, rates) == ({epoch // EPOCHS}, {(0.5, 1.0)[epoch % EPOCHS]})
    args = yaml.safe_load((finished / 'args.yaml').read_text())
    assert (args['time_steps'], args['attach_warmup_epochs'], args['lr_cycle_limit']) == (TIME_STEPS, 1, TIME_STEPS)


@pytest.mark.parametrize('kind', ['', '-ema'])
def test_snapshots_are_the_weights_at_the_end_of_each_time_step(finished, kind):
    x = randn(2, 3, 16, 16, dtype=torch.float32)
    for step in range(1, TIME_STEPS + 1):
        model = load_training_form(finished / f'time_step-{step}{kind}.safetensors')
        checkpoint = finished / f'checkpoint-{step * EPOCHS - 1}.pth.tar'
        assert_same_state(model.state_dict(), load_training_form(checkpoint, use_ema=bool(kind)).state_dict())
        stock = timm.create_model(MODEL, num_classes=5, inference_mode=True).eval()
        stock.load_state_dict(safetensors.torch.load_file(finished / f'time_step-{step}{kind}-stock.safetensors'))
        assert_near(stock(x), model(x), MODEL_RTOL[torch.float32])


def test_branch_log_has_every_branch_of_every_layer_and_epoch(finished):
    table = rows(finished / 'branch_gradients.csv')
    model = timm.create_model(MODEL, num_classes=5)
    layers = [name for name, _ in annealed_modules(model)]
    expected = {
        (epoch, depth, name, branch)
        for epoch in range(TIME_STEPS * EPOCHS)
        for depth, name in enumerate(layers)
        for branch in ('origin', 'conv_1x1')
    }
    assert {(int(r['epoch']), int(r['depth']), r['layer'], r['branch']) for r in table} == expected
    assert len(table) == len(expected)
    assert all(float(row['rms']) > 0 for row in table)


def test_linear_layers_and_plain_models(scripts, tmp_path):
    code, log = run(tmp_path, arguments(scripts, '--model-kwargs', 'rep_layer=orepa', '--experiment', 'orepa'))
    assert code == 0, log
    assert (tmp_path / 'output/train/orepa/time_step-3-stock.safetensors').is_file()
    # a model without branches, and timm's own restarts
    plain = ['--timm-scripts', scripts, '--model', 'test_resnet', '--epochs', 1, '--warmup-epochs', 0]
    code, log = run(tmp_path, [*plain, '--lr-cycle-limit', 3, '--experiment', 'p'])
    assert code == 0, log
    assert [float(row['lr']) for row in rows(tmp_path / 'output/train/p/summary.csv')] == [0.05] * 3
    assert not list((tmp_path / 'output/train/p').glob('time_step-*'))


def test_restarts_may_grow_and_decay(scripts, tmp_path):
    more = ['--lr-cycle-mul', 2, '--lr-cycle-decay', 0.5, '--time-steps', 2]
    code, log = run(tmp_path, arguments(scripts, *more))
    assert code == 0, log
    table = rows(tmp_path / 'output/train/run/summary.csv')
    assert [int(row['train_time_step']) for row in table] == [0, 0, 1, 1, 1, 1]
    assert float(table[2]['lr']) == pytest.approx(0.025)


def test_diverged_training_ends_with_its_time_step(scripts, tmp_path):
    code, log = run(tmp_path, arguments(scripts, '--lr', 1e20))
    assert code == 1, log
    assert re.search(r'train\.py: the training has diverged in time step 1 or before: \S+ has values', log)
    assert 'Traceback' not in log
    folder = tmp_path / 'output/train/run'
    assert not list(folder.glob('time_step-*'))
    assert (folder / 'last.pth.tar').is_file()


def test_options_come_from_a_file(scripts, tmp_path):
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(dict(
        model=MODEL, time_steps=2, epochs=1, attach_warmup_epochs=0, warmup_epochs=0, experiment='run')))
    code, log = run(tmp_path, ['--timm-scripts', scripts, '--recipe', 'recipe.yaml'])
    assert code == 0, log
    assert len(rows(tmp_path / 'output/train/run/summary.csv')) == 2
    # args.yaml of a run is a config file itself, without what is of this machine
    args = yaml.safe_load((tmp_path / 'output/train/run/args.yaml').read_text())
    assert not {'recipe', 'timm_scripts', 'config'} & set(args)
    again = ['--timm-scripts', scripts, '--config', 'output/train/run/args.yaml', '--experiment', 'again']
    code, log = run(tmp_path, again)
    assert code == 0, log
    last = [weights_of(tmp_path / f'output/train/{name}/last.pth.tar') for name in ('run', 'again')]
    assert_same_state(*last)


def test_options_come_from_a_pipe(scripts, tmp_path):
    """As by `--config <(...)`, which can be read once."""
    options = dict(model='test_resnet', epochs=2, warmup_epochs=0, experiment='run', lr=0.02)
    os.mkfifo(tmp_path / 'pipe')
    threading.Thread(target=(tmp_path / 'pipe').write_text, args=[yaml.safe_dump(options)], daemon=True).start()
    code, log = run(tmp_path, ['--timm-scripts', scripts, '--config', 'pipe', '--epochs', 1])
    assert code == 0, log
    assert [float(row['lr']) for row in rows(tmp_path / 'output/train/run/summary.csv')] == [0.02]


# Epoch by epoch, in this process


def test_modules_that_timm_imports_are_there_before_the_model_is_looked_at(scripts, tmp_path, monkeypatch):
    """They may register methods."""
    (tmp_path / 'own_module.py').write_text('print("imported")')
    monkeypatch.syspath_prepend(tmp_path)  # of the process that is forked, too
    argv = ['--timm-scripts', scripts, '--model', 'nothing', '--time-steps', 2, '--epochs', 2, '--warmup-epochs', 0]
    code, log = run(tmp_path, [*argv, '--device-modules', 'own_module'])
    assert code == 2
    assert log.startswith("imported\ntrain.py: unknown model 'nothing'"), log


class Epochs:
    """Runs epochs of a training that learns nothing, with two time steps of two epochs, and keeps what they see."""

    def __init__(self, model, averaged=None, folder=None, loader=None, **args):
        self.model, self.averaged, self.folder, self.loader = model, averaged, folder, loader
        self.draws = {}
        defaults = dict(
            seed=42, rank=0, log_branches=False, capture=None, resume='', initial_checkpoint='', compensate=False,
            restoration='authors', side_gain=1.0, freeze_origin=False, start_from_best=False, output='', experiment='')
        self.args = argparse.Namespace(**dict(defaults, **args))
        self.epochs = AnnealedEpochs(self.args, timm_rep.AnnealingSchedule(2, 2, 1))
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def train_one_epoch(self, epoch, model, loader, optimizer, args, output_dir=None, model_ema=None):
        self.draws[epoch] = torch.rand(()).item()
        return {}

    def __call__(self, epoch):
        return self.epochs.around(self.train_one_epoch)(
            epoch, self.model, self.loader, self.optimizer, self.args, output_dir=self.folder, model_ema=self.averaged)


def two_forms():
    """A model and an averaged one, with weights of their own; the same at every call."""
    torch.manual_seed(0)
    models = [timm.create_model(MODEL, num_classes=5) for _ in range(2)]
    for seed, model in enumerate(models):
        randomize_(model, seed).eval()
    return models


class OnGpu(torch.nn.Module):
    """A model that says its parameters were on a GPU."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def parameters(self, recurse=True):
        return iter([argparse.Namespace(device=torch.device('cuda'))])


@pytest.mark.parametrize(('model', 'settings', 'expected'), [
    ('orepa_resnet18_cifar', {}, True),
    ('orepa_resnet18_cifar', dict(distributed=True), False),
    ('orepa_resnet18_cifar', dict(torchcompile='inductor'), False),
    ('orepa_resnet18_cifar', dict(capture=False), False),
    ('dbb_resnet18_cifar', {}, False),
    ('dbb_resnet18_cifar', dict(capture=True), True),  # and capture() says why not
])
def test_compositions_are_captured_where_that_wins(model, settings, expected, monkeypatch):
    monkeypatch.setattr(torch.version, 'hip', None)
    args = argparse.Namespace(**dict(dict(capture=None, distributed=False, torchcompile=None), **settings))
    model = timm.create_model(model)
    assert _is_captured(args, OnGpu(model), None) is expected
    if args.capture is None:
        assert not _is_captured(args, model, None)
        assert not _is_captured(args, OnGpu(model), argparse.Namespace(is_second_order=True))
        monkeypatch.setattr(torch.version, 'hip', '7.0')
        assert not _is_captured(args, OnGpu(model), None)


def test_kernels_that_are_captured_are_those_of_the_run(monkeypatch, tmp_path):
    captured = []
    monkeypatch.setattr('timm_rep.train.epochs.capture', captured.append)
    model = timm.create_model(MODEL, num_classes=5)
    epochs = Epochs(model, capture=True, folder=tmp_path)
    epochs(0)
    epochs(1)
    assert captured == [model]


@pytest.mark.parametrize(('start', 'epoch'), [('pretrained', 0), ('initial_checkpoint', 2)])
@torch.no_grad()
def test_weights_to_start_from_keep_their_outputs(start, epoch):
    """Also where a new run starts late, by --start-epoch."""
    x = randn(2, 3, 16, 16, dtype=torch.float32)
    forms = two_forms()
    timm_rep.begin_time_step(forms[0])  # of another run
    before = [form(x) for form in forms]
    result = Epochs(*forms, **{start: True})(epoch)
    assert result == dict(time_step=epoch // 2, attach_rate=0.5)
    for form, outputs in zip(forms, before):
        assert_near(form(x), outputs, MODEL_RTOL[torch.float32])


def test_resumed_weights_are_not_those_to_start_from():
    resumed = Epochs(*two_forms(), resume='last.pth.tar', pretrained=True)
    states = [{key: value.clone() for key, value in form.state_dict().items()} for form in two_forms()]
    resumed(1)
    for form, state in zip((resumed.model, resumed.averaged), states):
        assert_same_state(form.state_dict(), state)


@pytest.mark.parametrize('options', [
    {}, dict(compensate=True), dict(restoration='keep_gain'), dict(side_gain=0.5), dict(restoration='measured'),
], ids=str)
def test_options_of_the_transition_reach_both_models(options):
    loader = [(randn(4, 3, 16, 16, dtype=torch.float32) + batch, None) for batch in range(5)]
    run_epoch = Epochs(*two_forms(), loader=loader, **options)
    run_epoch(1)
    run_epoch(2)
    if 'restoration' in options:
        options = dict(options, batches=loader[:4])
    for form, other in zip((run_epoch.model, run_epoch.averaged), two_forms()):
        generator = torch.Generator().manual_seed(42 + 1)
        timm_rep.begin_time_step(other, generator, attach_rate=0.5, **options)
        assert_same_state(form.state_dict(), other.state_dict())
    run_epoch(3)
    assert timm_rep.attach_rate(run_epoch.model) == timm_rep.attach_rate(run_epoch.averaged) == 1


@pytest.mark.parametrize(('start', 'resume', 'frozen'), [
    (None, '', [False, False, True, False]),
    ('initial_checkpoint', '', [True, False, True, False]),
    ('pretrained', 'last.pth.tar', [True, False, True, False]),
])
def test_restored_origin_branches_stand_still_while_the_rate_warms_up(start, resume, frozen):
    """In a run that goes on, too, which must not fold its weights as those to start from."""
    model = timm.create_model(MODEL, num_classes=5)
    epochs = Epochs(model, resume=resume, freeze_origin=True, **({start: True} if start else {}))
    epochs.optimizer.param_groups[0]['lr'] = 0.01
    origin, side = model.stages[0][0].conv_kxk.conv.weight, model.stages[0][0].conv_1x1.conv.weight
    if resume:
        before = origin.clone()
    moved = []

    def train_one_epoch(epoch, model, loader, optimizer, args, output_dir=None, model_ema=None):
        if epoch == 0 and resume:
            assert torch.equal(origin, before)
        kept = [part.clone() for part in (origin, side)]
        optimizer.zero_grad()
        model(randn(2, 3, 16, 16, dtype=torch.float32)).logsumexp(1).mean().backward()
        optimizer.step()
        moved.append(not torch.equal(origin, kept[0]))
        assert not torch.equal(side, kept[1])
        return {}

    epochs.train_one_epoch = train_one_epoch
    for epoch in range(4):
        epochs(epoch)
    assert moved == [not still for still in frozen]


def test_random_numbers_follow_from_the_epoch():
    model = timm.create_model('orepa_resnet18_cifar')
    run_epochs, resumed = Epochs(model), Epochs(model, resume='last.pth.tar')
    for epoch in range(4):
        run_epochs(epoch)
    resumed(3)
    assert len(set(run_epochs.draws.values())) == 4
    assert resumed.draws[3] == run_epochs.draws[3]


def test_random_numbers_of_the_optimizer_follow_from_the_epoch():
    """AdaHessian has a generator of its own, which no checkpoint holds."""
    def draw(*epochs):
        training = Epochs(timm.create_model('orepa_resnet18_cifar'))
        training.optimizer = timm.optim.create_optimizer_v2(training.model, 'adahessian', lr=0.0)
        for epoch in epochs:
            training(epoch)
        return torch.rand((), generator=training.optimizer.generator).item(), training.optimizer.seed

    assert draw(0, 1) == draw(1) != draw(0)


@pytest.mark.parametrize('owner', ['lookahead', 'averaged'])
def test_random_numbers_of_others_follow_from_the_epoch(owner):
    """Averages in bfloat16 are rounded by a generator of their own (timm 1.0.31)."""
    def draw(*epochs):
        averaged, generator = torch.nn.Module(), torch.Generator()
        training = Epochs(timm.create_model('orepa_resnet18_cifar'))
        if owner == 'lookahead':
            training.optimizer = timm.optim.create_optimizer_v2(training.model, 'lookahead_adahessian', lr=0.0)
            training.optimizer._base_optimizer.generator = generator
        else:
            averaged.part, training.averaged = torch.nn.Module(), averaged
            averaged.module, averaged.part._rounding = training.model, generator
        for epoch in epochs:
            training(epoch)
        return torch.rand((), generator=generator).item()

    assert draw(0, 1) == draw(1) != draw(0)


class RandomBatches:
    """A loader whose batches come from torch's random numbers."""

    def __iter__(self):
        for _ in range(5):
            yield torch.randn(4, 3, 16, 16), None


def test_what_is_measured_leaves_no_trace_in_the_random_numbers():
    draws = []
    for restoration in ('authors', 'measured'):
        run_epochs = Epochs(timm.create_model(MODEL, num_classes=5), loader=RandomBatches(), restoration=restoration)
        for epoch in (1, 2):
            run_epochs(epoch)
        draws.append(run_epochs.draws)
    assert draws[0] == draws[1]
    assert len(set(draws[0].values())) == 2


def test_snapshots_are_of_whole_time_steps(tmp_path):
    model = timm.create_model('orepa_resnet18_cifar')
    interrupted = Epochs(model, folder=tmp_path)
    interrupted(0)
    interrupted.epochs.finish()  # timm's main returns when it is interrupted by hand
    Epochs(model, folder=tmp_path, resume='last.pth.tar')(3)  # in the middle of a time step, at its --start-epoch
    assert list(tmp_path.glob('time_step-*')) == []


# timm's own script


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp('teacher') / 'test_resnet'
    return f'local-dir:{timm_rep.export_folder(timm.create_model("test_resnet", num_classes=5), folder)}'


VARIANTS = dict(
    augmented=[  # and measured on such images
        '--model-ema', '--model-ema-decay', 0.9, '--workers', 2, '--drop', 0.2, '--mixup', 0.2, '--mixup-off-epoch', 1,
        '--reprob', 0.2, '--crop-padding', 2, '--restoration', 'measured', '--side-gain', 0, '--freeze-origin',
        '--initial-checkpoint', 'START', '--lr', 1e-3, '--no-decay-classifier'],
    mixed_precision=['--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--grad-accum-steps', 2],
    compiled=['--torchcompile', 'aot_eager', '--model-ema', '--log-branches'],
    distilled=['--kd-model-name', 'TEACHER'],
    features_distilled=['--kd-model-name', 'TEACHER', '--kd-distill-type', 'feature', '--start-from-best'],
    linear=[
        '--model-kwargs', 'rep_layer=orepa', '--sched-on-updates', '--opt', 'adamw', '--lr', 1e-3,
        '--grad-accum-steps', 2],
    lookahead=['--opt', 'lookahead_momentum', '--log-branches'],
    half_weights=['--model-dtype', 'bfloat16', '--model-ema', '--model-ema-decay', 0.5, '--lr', 1e-3],
)


@pytest.mark.parametrize('variant', VARIANTS)
def test_timms_own_script_trains_in_time_steps_and_resumes(timm_scripts, photos, teacher, settled, tmp_path, variant):
    argv = [
        '--timm-scripts', timm_scripts, '--model', MODEL, '--time-steps', 2, '--epochs', 2, '--attach-warmup-epochs', 1,
        '--warmup-epochs', 0, '--lr', 0.05, '--data-dir', photos, '--batch-size', 8, '--workers', 1, '--device', 'cpu',
        '--img-size', 16, '--num-classes', 5, '--experiment', 'run', *VARIANTS[variant],
    ]
    if variant != 'augmented':
        argv.append('--no-aug')
    files = dict(TEACHER=teacher, START=settled)
    argv = [files.get(argument, argument) for argument in argv]
    code, log = run(tmp_path, argv)
    if 'kd-' in str(argv) and 'unrecognized arguments' in log:
        pytest.skip('this version of the script does not distil')
    assert code == 0, log
    folder = tmp_path / 'output/train/run'
    table = rows(folder / 'summary.csv')
    assert [int(row['train_time_step']) for row in table] == [0, 0, 1, 1]
    assert [float(row['train_attach_rate']) for row in table] == [0.5, 1.0, 0.5, 1.0]
    model = load_training_form(folder / 'time_step-2.safetensors')
    stock = timm.create_model(MODEL, num_classes=5, inference_mode=True).eval()
    stock.load_state_dict(safetensors.torch.load_file(folder / 'time_step-2-stock.safetensors'))
    dtype = next(model.parameters()).dtype
    x = randn(2, 3, 16, 16, dtype=dtype)
    assert_near(stock.to(dtype)(x), model(x), MODEL_RTOL.get(dtype, 0.05))

    # what is read of a checkpoint is what the run ended with: dropout, momentum of norms
    timm_rep.save(load_training_form(folder / 'last.pth.tar'), tmp_path / 'last.safetensors')
    if '--start-from-best' not in argv:  # which keeps the best epoch of a time step, not its last
        timm_rep.save(model.float(), tmp_path / 'ended.safetensors')
        assert (tmp_path / 'last.safetensors').read_bytes() == (tmp_path / 'ended.safetensors').read_bytes()

    updates = 1 if '--grad-accum-steps' in argv else 2  # of an epoch
    (tmp_path / 'again').mkdir()
    optimizer = dict(linear='AdamW').get(variant, 'SGD')
    code, log = run(tmp_path / 'again', argv, point='update', count=2 * updates + 1, optimizer=optimizer)
    assert code == -signal.SIGKILL, log
    code, log = run(tmp_path / 'again', [*argv, '--resume', 'auto'])
    assert code == 0, log
    for use_ema in (False, True) if '--model-ema' in argv else (False,):
        resumed, whole = (
            read_checkpoint(path / 'last.pth.tar', use_ema=use_ema).state_dict
            for path in (tmp_path / 'again/output/train/run', folder))
        assert_same_state(resumed, whole)
