"""train_scripts/train.py: timm's training in time steps, killed at any moment, and refused where it cannot work."""
import argparse
import copy
import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import interrupted_run
import pytest
import safetensors.torch
import timm
import torch
import yaml
from helpers import MODEL_RTOL, assert_near, assert_same_state, randn, randomize_
from interrupted_run import STAND_IN, TRAIN_SCRIPT, load_wrapper
from torchvision.transforms.functional import to_pil_image

import timm_rep
from timm_rep.core.annealing import set_time_step
from timm_rep.core.walk import annealed_modules
from timm_rep.io.checkpoint import read_checkpoint
from timm_rep.io.weights import load_training_form
from timm_rep.train.scripts import find_script

MODEL = 'repan_repvgg_a0_cifar'
TIME_STEPS, EPOCHS = 3, 2
COMMON = [
    '--time-steps', TIME_STEPS, '--epochs', EPOCHS, '--attach-warmup-epochs', 1, '--warmup-epochs', 0,
    '--checkpoint-hist', 20, '--experiment', 'run', '--model-ema',
]


@pytest.fixture(scope='module')
def scripts(tmp_path_factory):
    """A folder that holds the stand-in as train.py."""
    folder = tmp_path_factory.mktemp('scripts')
    (folder / 'train.py').symlink_to(STAND_IN)
    return folder


def arguments(scripts, *more, model=MODEL):
    return [*COMMON, '--timm-scripts', scripts, '--model', model, *more]


def run(cwd, argv, **kwargs):
    return interrupted_run.run(argv, cwd, **kwargs)


@pytest.fixture(scope='module')
def finished(scripts, tmp_path_factory):
    """A run that nothing interrupted."""
    cwd = tmp_path_factory.mktemp('finished')
    code, log = run(cwd, arguments(scripts, '--log-branches'))
    assert code == 0, log
    return cwd / 'output/train/run'


def rows(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def states(path):
    checkpoint = torch.load(path, weights_only=False)
    momentum = checkpoint['optimizer']['state']
    return dict(
        **{f'model.{key}': value for key, value in checkpoint['state_dict'].items()},
        **{f'ema.{key}': value for key, value in checkpoint['state_dict_ema'].items()},
        **{f'momentum.{key}': value['momentum_buffer'] for key, value in momentum.items()},
    )


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
    for step in range(TIME_STEPS):
        model = load_training_form(finished / f'time_step-{step}{kind}.safetensors')
        checkpoint = finished / f'checkpoint-{step * EPOCHS + EPOCHS - 1}.pth.tar'
        assert_same_state(model.state_dict(), load_training_form(checkpoint, use_ema=bool(kind)).state_dict())
        stock = timm.create_model(MODEL, num_classes=5, inference_mode=True).eval()
        stock.load_state_dict(safetensors.torch.load_file(finished / f'time_step-{step}{kind}-stock.safetensors'))
        assert_near(stock(x), model(x), MODEL_RTOL[torch.float32])


@pytest.mark.parametrize('use_ema', [False, True])
def test_transition_is_that_of_the_library_on_both_models(scripts, tmp_path, use_ema):
    """A run that learns nothing: only the transition changes the kernels."""
    code, log = run(tmp_path, arguments(scripts, '--lr', 0))
    assert code == 0, log
    folder = tmp_path / 'output/train/run'
    model = load_training_form(folder / 'checkpoint-1.pth.tar', use_ema=use_ema)
    timm_rep.begin_time_step(model, torch.Generator().manual_seed(42 + 1), attach_rate=0.5)
    after = load_training_form(folder / 'checkpoint-2.pth.tar', use_ema=use_ema).state_dict()
    # the averaged origin branches move on towards the model's; the draw of the side branches is the same
    kernels = [key for key, value in after.items() if value.ndim == 4 and not (use_ema and 'conv_kxk' in key)]
    assert len(kernels) > 20
    for key in kernels:
        assert torch.equal(after[key], model.state_dict()[key]), key


def test_optimizer_starts_each_time_step_without_a_past(scripts, tmp_path):
    for update, empty in ((EPOCHS * 3, False), (EPOCHS * 3 + 1, True)):
        (tmp_path / str(update)).mkdir()
        code, log = run(tmp_path / str(update), arguments(scripts), point='update', count=update)
        assert code == -signal.SIGKILL, log
        assert ('State: 0' in log) == empty


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


def test_branch_log_is_the_root_mean_square_of_the_gradients():
    wrapper = load_wrapper()
    model = timm.create_model('repan_resnet18_cifar', rep_layer='orepa', num_classes=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    log = wrapper.BranchLog(model, optimizer)
    expected = {}
    for seed in (0, 1):
        optimizer.zero_grad()
        model(randn(4, 3, 8, 8, seed=seed, dtype=torch.float32)).square().sum().backward()
        optimizer.step()
        for depth, (name, module) in enumerate(annealed_modules(model)):
            for branch, gradient in module.branch_gradients().items():
                key = depth, name, branch
                expected[key] = expected.get(key, 0) + gradient.square().mean().sqrt().item() / 2
    assert {key: total.item() / log.updates for key, total in log.sums.items()} == pytest.approx(expected, rel=1e-4)


def test_linear_layers_and_plain_models(scripts, tmp_path):
    code, log = run(tmp_path, arguments(scripts, '--model-kwargs', 'rep_layer=orepa', '--experiment', 'orepa'))
    assert code == 0, log
    assert (tmp_path / 'output/train/orepa/time_step-2-stock.safetensors').is_file()
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


def test_weights_of_an_annealed_run_start_a_new_one(finished, scripts, tmp_path):
    start = finished / 'time_step-2.safetensors'
    code, log = run(tmp_path, arguments(scripts, '--initial-checkpoint', start))
    assert code == 0, log
    steps = [int(row['train_time_step']) for row in rows(tmp_path / 'output/train/run/summary.csv')]
    assert steps == [0, 0, 1, 1, 2, 2]


# Epoch by epoch, in this process


class Epochs:
    """Runs epochs of a training that learns nothing, with two time steps of two epochs, and keeps what they see."""

    def __init__(self, model, averaged=None, folder=None, **args):
        self.model, self.averaged, self.folder = model, averaged, folder
        self.draws = {}
        self.training = load_wrapper().AnnealedTraining(SimpleNamespace(train_one_epoch=self.train_one_epoch))
        defaults = dict(
            seed=42, rank=0, log_branches=False, resume='', initial_checkpoint='', compensate=False,
            imply_statistics=False, time_steps=2, attach_warmup_epochs=1)
        self.training.args = argparse.Namespace(**dict(defaults, **args))
        self.training.schedule = timm_rep.AnnealingSchedule(2, 2, 1)
        self.training.total_epochs = 4
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def train_one_epoch(self, epoch, model, loader, optimizer, args, output_dir=None, model_ema=None):
        self.draws[epoch] = torch.rand(()).item()
        return {}

    def __call__(self, epoch):
        return self.training.annealed_epoch(
            epoch, self.model, None, self.optimizer, self.training.args, output_dir=self.folder,
            model_ema=self.averaged)


def two_forms(rep_layer):
    """A model and an averaged one, with weights of their own."""
    models = [timm.create_model(MODEL, num_classes=5, rep_layer=rep_layer) for _ in range(2)]
    for seed, model in enumerate(models):
        randomize_(model, seed).eval()
    return models


@pytest.mark.parametrize('start', ['pretrained', 'initial_checkpoint'])
@pytest.mark.parametrize('rep_layer', ['rep', 'orepa'])
@torch.no_grad()
def test_weights_to_start_from_keep_their_outputs(rep_layer, start):
    x = randn(2, 3, 16, 16, dtype=torch.float32)
    forms = two_forms(rep_layer)
    before = [(copy.deepcopy(form.state_dict()), form(x)) for form in forms]
    set_time_step(forms[0], 7)  # of another run
    result = Epochs(*forms, **{start: True})(0)
    assert result == dict(time_step=0, attach_rate=0.5)
    for form, (state, outputs) in zip(forms, before):
        assert_near(form(x), outputs, MODEL_RTOL[torch.float32])
        after = form.state_dict()
        assert {float(after[key]) for key in after if key.endswith('attach_rate')} == {0.5}
        assert {int(after[key]) for key in after if key.endswith('time_step')} == {0}
        assert not any(torch.equal(after[key], state[key]) for key in after if key.endswith('conv_1x1.conv.weight'))


def test_fresh_weights_start_as_they_were_drawn():
    forms = two_forms('rep')
    before = [copy.deepcopy(form.state_dict()) for form in forms]
    Epochs(*forms)(0)
    for form, state in zip(forms, before):
        expected = {key: torch.full_like(v, 0.5) if key.endswith('attach_rate') else v for key, v in state.items()}
        assert_same_state(form.state_dict(), expected)


@pytest.mark.parametrize('option', ['', 'compensate', 'imply_statistics'])
def test_options_of_the_transition_reach_both_models(option):
    options = {option: True} if option else {}
    forms = two_forms('rep')
    expected = copy.deepcopy(forms)
    run_epoch = Epochs(*forms, **options)
    run_epoch(1)
    run_epoch(2)
    for form, other in zip(forms, expected):
        generator = torch.Generator().manual_seed(42 + 1)
        timm_rep.begin_time_step(other, generator, attach_rate=0.5, **options)
        assert_same_state(form.state_dict(), other.state_dict())
    run_epoch(3)
    assert all({float(m.attach_rate) for _, m in annealed_modules(form)} == {1.0} for form in forms)


def test_random_numbers_follow_from_the_epoch():
    model = timm.create_model('orepa_resnet18_cifar')
    run_epochs, resumed = Epochs(model), Epochs(model, resume='last.pth.tar')
    for epoch in range(4):
        run_epochs(epoch)
    resumed(3)
    assert len(set(run_epochs.draws.values())) == 4
    assert resumed.draws[3] == run_epochs.draws[3]


def test_nothing_stays_of_a_snapshot_that_was_interrupted(tmp_path):
    wrapper, path = load_wrapper(), tmp_path / 'time_step-0.safetensors'
    (tmp_path / f'.0a1b2c3d.{path.name}').write_bytes(b'half')
    wrapper.save_snapshots(tmp_path, 0, {'': timm.create_model('orepa_resnet18_cifar')}, argparse.Namespace())
    assert sorted(tmp_path.iterdir()) == [tmp_path / 'time_step-0-stock.safetensors', path]


def test_snapshots_are_of_whole_time_steps(tmp_path):
    model = timm.create_model('orepa_resnet18_cifar')
    interrupted = Epochs(model, folder=tmp_path)
    interrupted(0)
    interrupted.training._finish()  # timm's main returns when it is interrupted by hand
    Epochs(model, folder=tmp_path, resume='last.pth.tar')(3)  # in the middle of a time step, at its --start-epoch
    assert list(tmp_path.glob('time_step-*')) == []


def test_diverged_training_ends_with_its_time_step(scripts, tmp_path):
    code, log = run(tmp_path, arguments(scripts, '--lr', 1e20))
    assert code == 1, log
    assert re.search(r'train\.py: the training has diverged in time step 0 or before: \S+ has values', log)
    assert 'Traceback' not in log
    folder = tmp_path / 'output/train/run'
    assert not list(folder.glob('time_step-*'))
    assert (folder / 'last.pth.tar').is_file()


# Killed and resumed

KILLS = [
    ('start', 1),
    ('update', 2),
    ('update', 8),  # in the first epoch of the second time step
    ('update', 12),
    ('update', 17),  # in the last epoch
    ('validation', 2),
    ('summary half written', 3),
    ('checkpoint half written', 1),
    ('checkpoint half written', 2),  # the last epoch of a time step
    ('checkpoint half written', 4),
    ('last unlinked', 1),
    ('last unlinked', 3),
    ('checkpoint linked', 2),
    ('transition', 5),
    ('transition of the averaged weights', 2),
    ('rate set', 5),
    ('snapshot half written', 2),
    ('snapshot not yet in place', 3),
    ('last snapshot', 1),
]


@pytest.mark.parametrize(('point', 'count'), KILLS, ids=str)
def test_killed_and_resumed_run_ends_like_one_that_was_not(finished, scripts, tmp_path, point, count):
    code, log = run(tmp_path, arguments(scripts, '--log-branches'), point=point, count=count)
    assert code == -signal.SIGKILL, log
    code, log = run(tmp_path, arguments(scripts, '--log-branches', '--resume', 'auto'))
    assert code == 0, log
    folder = tmp_path / 'output/train/run'
    for epoch in range(TIME_STEPS * EPOCHS):
        checkpoint = f'checkpoint-{epoch}.pth.tar'
        if (folder / checkpoint).is_file():  # one that was to be linked when the process died stays away
            assert_same_state(states(folder / checkpoint), states(finished / checkpoint))
    assert_same_state(states(folder / 'last.pth.tar'), states(finished / 'last.pth.tar'))
    # from timm 1.0.31 on, and not of an epoch whose checkpoint got no place in the ranking before the process died
    if hasattr(timm.utils.CheckpointSaver, 'load_state_dict_from_checkpoint') and point != 'last unlinked':
        assert_same_state(states(folder / 'model_best.pth.tar'), states(finished / 'model_best.pth.tar'))
    snapshots = sorted(path.name for path in finished.glob('time_step-*'))
    assert sorted(path.name for path in folder.glob('time_step-*')) == snapshots
    for name in snapshots:
        assert (folder / name).read_bytes() == (finished / name).read_bytes()
    for name in ('summary.csv', 'branch_gradients.csv'):
        assert rows(folder / name) == rows(finished / name)


def test_resuming_from_a_checkpoint_in_another_folder_ends_in_the_same_weights(finished, scripts, tmp_path):
    for epoch in (0, 1, 3):
        checkpoint = finished / f'checkpoint-{epoch}.pth.tar'
        more = ['--resume', checkpoint, '--experiment', f'from_{epoch}']
        code, log = run(tmp_path, arguments(scripts, *more), folder='')
        assert code == 0, log
        last = tmp_path / f'output/train/from_{epoch}/last.pth.tar'
        assert_same_state(states(last), states(finished / 'last.pth.tar'))


def test_resuming_a_finished_run_changes_nothing(scripts, tmp_path):
    code, log = run(tmp_path, arguments(scripts))
    assert code == 0, log
    folder = tmp_path / 'output/train/run'
    before = states(folder / 'last.pth.tar')
    code, log = run(tmp_path, arguments(scripts, '--resume', 'auto'))
    assert code == 0, log
    assert_same_state(states(folder / 'last.pth.tar'), before)


# Refused


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file() and path.name != 'log.txt'}


BAD = [
    (['--time-steps', 0], 'time_steps must be at least 1, got 0'),
    (['--attach-warmup-epochs', 3], 'less than the 2 epochs of a time step.*got 3'),
    (['--attach-warmup-epochs', -1], 'got -1'),
    (['--warmup-epochs', 2], r'warm-up of the learning rate \(--warmup-epochs 2\) must be shorter'),
    (['--model', 'resnet18'], 'resnet18 has no rep layers'),
    (['--sched', 'step'], '--sched step cannot restart at a time step; allowed are cosine, tanh, poly'),
    (['--lr-cycle-limit', 2], 'contradicts --time-steps 3'),
    (['--lr-cycle-mul', 0.5], 'at least 1, got 0.5'),
    (['--torchscript'], '--torchscript takes the rep layers apart'),
    (['--model', 'resnet19'], "unknown model 'resnet19'"),
    (['--model-kwargs', 'rep_layer=acnet'], "unknown method 'acnet'; allowed are 'orepa', 'dbb', 'acb', 'rep'"),
    (['--time-steps', 1, '--lr-cycle-limit', 3], 'contradicts --time-steps 1'),
    (['--sched-on-updates', '--epochs', 3, '--lr-cycle-mul', 1.5], 'whole number of epochs.*: 3, 4.5, 6.75'),
    (['--sched-on-updates', '--epochs', 25, '--lr-cycle-mul', 1.4],
     r'restarts at the epochs \[0, 25, 60\] and the time steps at \[0, 25, 61\], as timm rounds'),
    (['--lr-cycle-mul', 'nan'], 'a number of at least 1, got nan'),
    (['--resume', '.'], 'takes a checkpoint file or auto, got the folder'),
    (['--resume', 'missing.pth.tar'], 'no checkpoint file at missing.pth.tar'),
    (['--experiment', '', '--resume', 'auto'], 'name it with --experiment'),
]


@pytest.mark.parametrize(('more', 'message'), BAD, ids=[' '.join(map(str, more)) for more, _ in BAD])
def test_bad_input_is_one_clear_error_and_nothing_is_written(scripts, tmp_path, more, message):
    code, log = run(tmp_path, arguments(scripts, *more))
    assert code == 2, log
    lines = [line for line in log.splitlines() if 'Warning' not in line]
    assert len(lines) == 1
    assert lines[0].startswith('train.py: ')
    assert re.search(message, lines[0]), lines[0]
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(('more', 'message'), [
    ([], 'holds another run; go on with it by --resume auto'),
    (['--resume', 'auto', '--time-steps', 4], 'of a run with --time-steps 3, this one has --time-steps 4'),
    (['--resume', 'auto', '--epochs', 3], 'of a run with --epochs 2, this one has --epochs 3'),
    (['--resume', 'auto', '--attach-warmup-epochs', 0], 'of a run with --attach-warmup-epochs 1'),
    (['--resume', 'auto', '--model', 'repan_repvgg_a1_cifar'], 'of a run with --model repan_repvgg_a0_cifar'),
    (['--resume', 'auto', '--seed', 7], 'of a run with --seed 42, this one has --seed 7'),
    (['--resume', 'auto', '--compensate'], 'of a run with --compensate False, this one has --compensate True'),
    (['--resume', 'auto', '--start-epoch', 1], 'epoch 1 lies before time step 2'),
    (['--resume', 'output/train/run/last.pth.tar', '--experiment', 'other', '--time-steps', 2], '--time-steps 3'),
])
def test_folder_or_checkpoint_of_another_run_is_refused(finished, scripts, tmp_path, more, message):
    folder = tmp_path / 'output/train/run'
    folder.mkdir(parents=True)
    for path in finished.iterdir():
        (folder / path.name).symlink_to(path)
    before = contents(tmp_path)
    code, log = run(tmp_path, arguments(scripts, *more))
    assert code == 2, log
    assert message in log
    assert contents(tmp_path) == before


def test_checkpoint_of_a_run_without_time_steps_is_refused(scripts, tmp_path):
    plain = ['--timm-scripts', scripts, '--model', MODEL, '--epochs', 2, '--warmup-epochs', 0, '--experiment', 'run']
    code, log = run(tmp_path, plain)
    assert code == 0, log
    before = contents(tmp_path)
    code, log = run(tmp_path, arguments(scripts, '--resume', 'auto'))
    assert code == 2
    assert 'of a run with --time-steps 1, this one has --time-steps 3' in log
    assert contents(tmp_path) == before


@pytest.mark.parametrize(('source', 'message'), [
    ('parser = None\n', 'it lacks _parse_args, main, train_one_epoch'),
    ('parser = _parse_args = main = None\ndef train_one_epoch(epoch, net, optimizer, args): pass\n',
     'it lacks model of train_one_epoch, output_dir of train_one_epoch, model_ema or task of train_one_epoch'),
])
def test_script_that_does_not_fit_is_refused(tmp_path, source, message):
    (tmp_path / 'train.py').write_text(source)
    code, log = run(tmp_path, arguments(tmp_path))
    assert code == 2
    assert message in log
    assert not (tmp_path / 'output').exists()


def test_missing_script_says_how_to_get_it(tmp_path):
    code, log = run(tmp_path, arguments(tmp_path / 'nowhere'))
    assert code == 2
    assert 'git clone' in log


def test_help_shows_own_options_then_those_of_timm(scripts):
    command = [sys.executable, str(TRAIN_SCRIPT), '--timm-scripts', str(scripts), '--help']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < done.stdout.index('--attach-warmup-epochs') < done.stdout.index('Stand-in training')
    assert '--checkpoint-hist' in done.stdout


def test_options_come_from_a_config_file(scripts, tmp_path):
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(dict(
        model=MODEL, time_steps=2, epochs=1, attach_warmup_epochs=0, warmup_epochs=0, experiment='run')))
    code, log = run(tmp_path, ['--timm-scripts', scripts, '--config', 'recipe.yaml'])
    assert code == 0, log
    assert len(rows(tmp_path / 'output/train/run/summary.csv')) == 2
    # args.yaml of a run is a config file itself
    again = ['--timm-scripts', scripts, '--config', 'output/train/run/args.yaml', '--experiment', 'again']
    code, log = run(tmp_path, again)
    assert code == 0, log
    last = [states_without_ema(tmp_path / f'output/train/{name}/last.pth.tar') for name in ('run', 'again')]
    assert_same_state(*last)


def states_without_ema(path):
    return read_checkpoint(path).state_dict


def test_newest_is_the_last_that_is_whole(finished, tmp_path):
    """A run that went back to an earlier checkpoint and was killed has later epochs in older files."""
    for number, name in enumerate(('checkpoint-5', 'checkpoint-0', 'last', 'tmp')):
        path = tmp_path / f'{name}.pth.tar'
        path.write_bytes((finished / f'checkpoint-{1 if name == "last" else 5}.pth.tar').read_bytes())
        os.utime(path, (number, number))
    wrapper = load_wrapper()
    (tmp_path / 'tmp.pth.tar').write_bytes(b'cut off')
    assert wrapper.newest_checkpoint(tmp_path).name == 'last.pth.tar'
    (tmp_path / 'last.pth.tar').unlink()
    assert wrapper.newest_checkpoint(tmp_path).name == 'checkpoint-0.pth.tar'
    # copies have the times of their copying: they do not count as long as there is a last one
    (tmp_path / 'last.pth.tar').write_bytes((finished / 'last.pth.tar').read_bytes())
    os.utime(tmp_path / 'last.pth.tar', (0, 0))
    assert wrapper.newest_checkpoint(tmp_path).name == 'last.pth.tar'


def test_weights_that_a_run_kept_are_not_started_anew_over(scripts, tmp_path):
    code, log = run(tmp_path, arguments(scripts, '--time-steps', 1))
    assert code == 0, log
    folder = tmp_path / 'output/train/run'
    for name in ('last', 'checkpoint-0', 'checkpoint-1'):
        (folder / f'{name}.pth.tar').unlink()
    before = contents(tmp_path)
    code, log = run(tmp_path, arguments(scripts, '--time-steps', 1, '--resume', 'auto'))
    assert code == 2
    assert 'holds the weights of a run (model_best.pth.tar, time_step-0-ema-stock.safetensors, ' in log
    assert contents(tmp_path) == before


def test_file_in_the_place_of_the_output_folder(scripts, tmp_path):
    (tmp_path / 'output').mkdir()
    (tmp_path / 'output/train').write_text('mine')
    code, log = run(tmp_path, arguments(scripts))
    assert code == 2, log
    assert 'no folder can be made at output/train/run: ' in log
    assert log.rstrip().endswith('output/train is a file')


def test_numbers_in_a_config_file_must_be_whole(scripts, tmp_path):
    (tmp_path / 'recipe.yaml').write_text('time_steps: 2.5\n')
    code, log = run(tmp_path, arguments(scripts, '--config', 'recipe.yaml')[2:])
    assert code == 2, log
    assert '--time-steps takes a whole number, got 2.5' in log


def test_damaged_checkpoints_are_no_reason_to_start_anew(scripts, tmp_path):
    code, log = run(tmp_path, arguments(scripts))
    assert code == 0, log
    folder = tmp_path / 'output/train/run'
    for path in folder.glob('*.pth.tar'):
        path.write_bytes(path.read_bytes()[:1000])
    before = contents(tmp_path)
    code, log = run(tmp_path, arguments(scripts, '--resume', 'auto'))
    assert code == 2
    assert 'no checkpoint in output/train/run is whole: ' in log
    assert contents(tmp_path) == before


def test_checkpoint_without_an_epoch_is_refused(finished, scripts, tmp_path):
    weights = dict(state_dict=torch.load(finished / 'last.pth.tar', weights_only=False)['state_dict'])
    torch.save(weights, tmp_path / 'weights.pth')
    (tmp_path / 'args.yaml').write_text((finished / 'args.yaml').read_text())
    code, log = run(tmp_path, arguments(scripts, '--resume', 'weights.pth'))
    assert code == 2, log
    assert 'does not say of which epoch it is' in log


def test_time_step_of_weights_to_start_from_is_forgotten_in_all_blocks(scripts, tmp_path):
    model = timm.create_model('repan_resnet18', rep_layer='orepa', num_classes=5)
    timm_rep.begin_time_step(model)
    torch.save(model.state_dict(), tmp_path / 'start.pth')
    more = ['--model-kwargs', 'rep_layer=orepa', '--initial-checkpoint', 'start.pth', '--time-steps', 2, '--epochs', 1,
            '--attach-warmup-epochs', 0]
    code, log = run(tmp_path, arguments(scripts, *more, model='repan_resnet18'))
    assert code == 0, log
    state = read_checkpoint(tmp_path / 'output/train/run/last.pth.tar').state_dict
    assert {int(value) for key, value in state.items() if key.endswith('time_step')} == {1}


def test_rows_of_an_interrupted_run_are_dropped(tmp_path):
    wrapper = load_wrapper()
    path = tmp_path / 'summary.csv'
    path.write_text('epoch,loss\n0,1.0\n1,0.5\nepoch,loss\n1,0.4\n2,0.3\n3\n')
    wrapper.drop_rows(path, 1)
    assert path.read_text().split() == ['epoch,loss', '0,1.0']
    wrapper.drop_rows(path, 1)
    wrapper.drop_rows(tmp_path / 'missing.csv', 1)
    # another run's columns may follow: no row is lost
    path.write_text('epoch,loss\n0,1.0\nepoch,loss,rate\n1,0.5,0.1\n2,0.4,0.1\n')
    wrapper.drop_rows(path, 2)
    assert path.read_text().split() == ['epoch,loss', '0,1.0', 'epoch,loss,rate', '1,0.5,0.1']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['summary.csv']


# timm's own script


@pytest.fixture(scope='module')
def timm_scripts():
    try:
        return Path(find_script('train')).parent
    except FileNotFoundError as e:
        pytest.skip(f"needs timm's own train.py: {e}")


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Image folders with the names that timm's script looks for by default."""
    folder = tmp_path_factory.mktemp('photos')
    for split, count in (('train', 4), ('validation', 2)):
        for label in range(5):
            for number in range(count):
                path = folder / split / str(label) / f'{number}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(10 * label + number))
                to_pil_image(pixels).save(path)
    return folder


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp('teacher') / 'test_resnet'
    return f'local-dir:{timm_rep.export_folder(timm.create_model("test_resnet", num_classes=5), folder)}'


VARIANTS = dict(
    augmented=['--model-ema', '--model-ema-decay', 0.9, '--workers', 2, '--drop', 0.2, '--mixup', 0.2, '--reprob', 0.2],
    mixed_precision=['--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--grad-accum-steps', 2],
    compiled=['--torchcompile', 'aot_eager', '--model-ema', '--log-branches'],
    distilled=['--kd-model-name', 'TEACHER'],
    features_distilled=['--kd-model-name', 'TEACHER', '--kd-distill-type', 'feature'],
    linear=['--model-kwargs', 'rep_layer=orepa', '--sched-on-updates', '--opt', 'adamw', '--lr', 1e-3],
    lookahead=['--opt', 'lookahead_momentum', '--log-branches'],
)


@pytest.mark.parametrize('variant', VARIANTS)
def test_timms_own_script_trains_in_time_steps_and_resumes(timm_scripts, photos, teacher, tmp_path, variant):
    argv = [
        '--timm-scripts', timm_scripts, '--model', MODEL, '--time-steps', 2, '--epochs', 2, '--attach-warmup-epochs', 1,
        '--warmup-epochs', 0, '--lr', 0.05, '--data-dir', photos, '--batch-size', 8, '--workers', 1, '--device', 'cpu',
        '--img-size', 16, '--num-classes', 5, '--experiment', 'run', *VARIANTS[variant],
    ]
    if variant != 'augmented':
        argv.append('--no-aug')
    argv = [teacher if argument == 'TEACHER' else argument for argument in argv]
    code, log = run(tmp_path, argv)
    if 'kd-' in str(argv) and 'unrecognized arguments' in log:
        pytest.skip('this version of the script does not distil')
    assert code == 0, log
    folder = tmp_path / 'output/train/run'
    table = rows(folder / 'summary.csv')
    assert [int(row['train_time_step']) for row in table] == [0, 0, 1, 1]
    assert [float(row['train_attach_rate']) for row in table] == [0.5, 1.0, 0.5, 1.0]
    model = load_training_form(folder / 'time_step-1.safetensors')
    stock = timm.create_model(MODEL, num_classes=5, inference_mode=True).eval()
    stock.load_state_dict(safetensors.torch.load_file(folder / 'time_step-1-stock.safetensors'))
    x = randn(2, 3, 16, 16, dtype=torch.float32)
    assert_near(stock(x), model(x), MODEL_RTOL[torch.float32])

    updates = 1 if variant == 'mixed_precision' else 2  # of an epoch
    (tmp_path / 'again').mkdir()
    optimizer = dict(linear='AdamW').get(variant, 'SGD')
    code, log = run(tmp_path / 'again', argv, point='update', count=2 * updates + 1, optimizer=optimizer)
    assert code == -signal.SIGKILL, log
    code, log = run(tmp_path / 'again', [*argv, '--resume', 'auto'])
    assert code == 0, log
    expected = read_checkpoint(folder / 'last.pth.tar').state_dict
    assert_same_state(read_checkpoint(tmp_path / 'again/output/train/run/last.pth.tar').state_dict, expected)


# Recipes

RECIPES = sorted((TRAIN_SCRIPT.parent / 'recipes').glob('*.yaml'))


def test_the_promised_recipes_are_there():
    names = {path.stem for path in RECIPES}
    assert names >= {'orepa_imagenet', 'repan_imagenet', 'repan_cifar10', 'repan_cifar100', 'finetune'}


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: path.stem)
def test_recipe_fits_its_model_and_schedule(recipe):
    settings = yaml.safe_load(recipe.read_text())
    assert any(annealed_modules(timm.create_model(settings['model'], device='meta')))
    schedule = timm_rep.AnnealingSchedule(
        settings.get('time_steps', 1), settings['epochs'], settings.get('attach_warmup_epochs', 0))
    assert schedule.warmup_epochs < schedule.epochs / 2
    assert settings['warmup_epochs'] < schedule.epochs


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_on_a_few_images(timm_scripts, photos, tmp_path, recipe):
    settings = yaml.safe_load(recipe.read_text())
    known = load_wrapper().load_script(timm_scripts / 'train.py').parser.parse_args([])
    own = {'time_steps', 'attach_warmup_epochs'}
    assert set(settings) <= set(vars(known)) | own
    steps = min(settings.get('time_steps', 1), 2)
    argv = [
        '--timm-scripts', timm_scripts, '--config', recipe, '--data-dir', photos, '--dataset', '', '--val-split',
        'validation', '--epochs', 1, '--time-steps', steps, '--warmup-epochs', 0, '--attach-warmup-epochs', 0,
        '--num-classes', 5, '--input-size', 3, 32, 32, '--batch-size', 8, '--workers', 1, '--device', 'cpu',
        '--experiment', 'run',
    ]
    if recipe.stem == 'finetune':
        stock = timm.create_model('resnet18', num_classes=7)
        safetensors.torch.save_file(stock.state_dict(), tmp_path / 'resnet18.safetensors')
        argv += ['--pretrained', '--pretrained-path', tmp_path / 'resnet18.safetensors']
    code, log = run(tmp_path, argv)
    assert code == 0, log
    assert len(rows(tmp_path / 'output/train/run/summary.csv')) == steps
