"""What the wrapper refuses, in one line and before anything is written; its recipes."""
import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import yaml
from interrupted_run import MODEL, arguments, contents, rows, run
from timm.data import resolve_data_config

import timm_rep
from timm_rep.core.walk import annealed_modules
from timm_rep.io.runs import MAY_CHANGE
from timm_rep.train import main
from timm_rep.train.arguments import (
    add_time_step_options,
    check_crops,
    check_data,
    check_model,
    check_names,
    check_start_weights,
    recipe_file,
    recipe_names,
    take_start_settings,
    without_time_steps,
)
from timm_rep.train.resume import find_run
from timm_rep.train.wrapper import load_script

SCRIPT = Path(timm_rep.__file__).parents[1] / 'train_scripts' / 'train.py'


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Run the wrapper in this process, in an empty folder; what it says when it refuses."""
    def refused(argv):
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in argv], prog='train.py')
        assert exit_info.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if 'Warning' not in line]
        assert len(lines) == 1, lines
        assert lines[0].startswith('train.py: ')
        return lines[0]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm.utils, 'setup_default_logging', lambda: None)
    own_argv = sys.argv
    yield refused
    assert sys.argv is own_argv


BAD = [
    (['--attach-warmup-epochs', 3], 'less than the 2 epochs of a time step.*got 3'),
    (['--warmup-epochs', 2], r'warm-up of the learning rate \(--warmup-epochs 2\) must be shorter'),
    (['--model', 'resnet18'], 'resnet18 has no rep layers'),
    (['--sched', 'step'], '--sched step cannot restart at a time step; allowed are cosine, tanh, poly'),
    (['--lr-cycle-limit', 2], 'contradicts --time-steps 3'),
    (['--lr-cycle-mul', 0.5], 'at least 1, got 0.5'),
    (['--torchscript'], '--torchscript takes the rep layers apart'),
    (['--model-kwargs', 'rep_layer=acnet'], "unknown method 'acnet'; allowed are 'orepa', 'dbb', 'acb', 'rep'"),
    (['--sched-on-updates', '--epochs', 3, '--lr-cycle-mul', 1.5],
     'restarts at the epochs 0, 3, 7.5 and the time steps at 0, 3, 8'),
    (['--sched-on-updates', '--epochs', 25, '--lr-cycle-mul', 1.4],
     'restarts at the epochs 0, 25, 60 and the time steps at 0, 25, 61, as timm rounds'),
    (['--crop-padding', -1], r'--crop-padding takes a number of pixels, got -1'),
    (['--resume', '.'], 'takes a checkpoint file or auto, got ., which is none'),
    (['--recipe', 'repan_mnist'], "no recipe 'repan_mnist', .* there are finetune, orepa_cifar10, orepa_imagenet,"),
    (['--recipe', 'finetune', '--config', 'mine.yaml'], 'are both files of options; give one of them'),
    (['--config', 'missing.yaml'], 'missing.yaml cannot be read as a YAML file: .*No such file'),
]


def test_a_file_in_the_place_of_the_output_folder(refusal, scripts, tmp_path):
    (tmp_path / 'output').mkdir()
    (tmp_path / 'output/train').write_text('mine')
    said = refusal(arguments(scripts))
    assert 'no folder can be made at' in said
    assert said.endswith('output/train is a file')


@pytest.mark.parametrize(('more', 'message'), BAD, ids=[' '.join(map(str, more)) for more, _ in BAD])
def test_bad_input_is_one_clear_error_and_nothing_is_written(scripts, tmp_path, refusal, more, message):
    line = refusal(arguments(scripts, *more))
    assert re.search(message, line), line
    assert contents(tmp_path) == {}


@pytest.mark.parametrize('more', [
    dict(no_aug=True), dict(train_crop_mode='rrc'), dict(scale=[0.5, 1.0]), dict(ratio=[1.0, 1.0]), dict(aug_splits=3),
    dict(train_img_sizes=[32]), dict(naflex_loader=True), dict(use_multi_epochs_loader=True)])
def test_crops_of_two_kinds(timm_scripts, more):
    args = load_script(timm_scripts / 'train.py').parser.parse_args([])
    check_crops(argparse.Namespace(**{**vars(args), 'crop_padding': 4}))
    check_crops(argparse.Namespace(**{**vars(args), 'crop_padding': 0, **more}))
    name, = more
    with pytest.raises(timm_rep.UserError, match=f'--crop-padding 4 crops in .* --{name.replace("_", "-")} '):
        check_crops(argparse.Namespace(**{**vars(args), 'crop_padding': 4, **more}))


@pytest.mark.parametrize('log_branches', [True, False])
def test_dbb_is_not_both_compiled_and_checkpointed(log_branches):
    args = argparse.Namespace(
        model='repan_resnet18_cifar', model_kwargs=dict(rep_layer='dbb'), log_branches=log_branches, capture=None,
        torchcompile='inductor', grad_checkpointing=True)
    with pytest.raises(timm_rep.UserError, match='wrong gradients of the DBB layers of repan_resnet18_cifar'):
        check_model(args, timm_rep.AnnealingSchedule(1, 2))
    for changed in (dict(torchcompile=None), dict(grad_checkpointing=False), dict(model_kwargs=dict(rep_layer='acb'))):
        check_model(argparse.Namespace(**{**vars(args), **changed}), timm_rep.AnnealingSchedule(1, 2))


@pytest.mark.parametrize(('content', 'message'), [
    ('time_steps: 2.5\n', '--time-steps takes a whole number, got 2.5'),
    ('experiment: 5\n', '--experiment takes a text, got 5'),
    ('capture: "no"\n', "--capture takes yes or no, got 'no'"),
    ('model: [a]\n', "--model takes a text, got ['a']"),
    ('initial_checkpoint: {a: 1}\n', "--initial-checkpoint takes a text, got {'a': 1}"),
    ('warmup_epochs: [1]\n', '--warmup-epochs takes a number, got [1]'),
    ('seed: 1.5\n', '--seed takes a whole number, got 1.5'),
    ('model_kwargs: 3\n', '--model-kwargs takes names and values, got 3'),
    ('time_steps: [2\n', 'recipe.yaml cannot be read as a YAML file'),
    ('side_gain: [0]\n', '--side-gain takes a number, got [0]'),
    ('side_gain: .inf\n', 'side_gain must be a finite number, got inf'),
    ('restoration: implied\n', "restoration must be one of authors, keep_gain, measured, got 'implied'"),
    ('crop_padding: [4]\n', '--crop-padding takes a number of pixels, got [4]'),
    ('- 2\n', 'recipe.yaml must hold options and their values'),
])
def test_bad_config_files(scripts, tmp_path, refusal, content, message):
    (tmp_path / 'recipe.yaml').write_text(content)
    for option in ('--config', '--recipe'):
        assert message in refusal(['--timm-scripts', scripts, option, 'recipe.yaml'])


def test_weights_to_start_from_are_in_training_form(scripts, tmp_path, refusal):
    model = timm.create_model(MODEL, num_classes=5)
    torch.save(timm_rep.fuse(model.eval()).state_dict(), tmp_path / 'stock.pth')
    before = contents(tmp_path)
    said = refusal(arguments(scripts, '--initial-checkpoint', 'stock.pth'))
    assert 'stock.pth is in stock form, --initial-checkpoint takes the training form of repan_repvgg_a0_cifar.' in said
    assert contents(tmp_path) == before
    recipe, = re.findall(r'To make it: timm_rep\.save\((.*), .training\.safetensors.\)\. With', said)
    made = eval(recipe, dict(timm=timm, N=5))
    assert torch.allclose(made.state_dict()['head.fc.weight'], model.state_dict()['head.fc.weight'])


@pytest.fixture
def copied(finished, tmp_path):
    """The folder of a finished run, to go on in."""
    folder = tmp_path / 'output/train/run'
    folder.mkdir(parents=True)
    for path in finished.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize(('more', 'message'), [
    ([], 'holds another run; go on with it by --resume auto'),
    (['--resume', 'auto', '--time-steps', 4],
     'of a run with --lr-cycle-limit 3 (here 4), --time-steps 3 (here 4); take the same to go on with it, or'),
    (['--resume', 'auto', '--model', 'repan_repvgg_a1_cifar'],
     'of a run with --model repan_repvgg_a0_cifar (here repan_repvgg_a1_cifar);'),
    (['--resume', 'auto', '--lr', 0.5, '--opt', 'adamw', '--weight-decay', 0],
     'of a run with --lr 0.05 (here 0.5), --opt momentum (here adamw), --weight-decay 0.0001 (here 0.0);'),
    (['--resume', 'auto', '--start-epoch', 1], 'is in time step 3, epoch 1 lies before it'),
    (['--resume', 'output/train/run/last.pth.tar', '--experiment', 'other', '--time-steps', 2], '--time-steps 3'),
    (['--resume', 'auto', '--experiment', ''], 'name it with --experiment; output/train holds run'),
    (['--resume', 'auto', '--experiment', '', '--output', 'elsewhere'], 'name it with --experiment; elsewhere holds'),
])
def test_folder_or_checkpoint_of_another_run_is_refused(copied, scripts, tmp_path, refusal, more, message):
    before = contents(tmp_path)
    assert message in refusal(arguments(scripts, *more))
    assert contents(tmp_path) == before


SHAPING = """
    batch_size grad_accum_steps workers lr lr_base opt momentum weight_decay opt_betas clip_grad sched min_lr epochs
    warmup_epochs model_ema model_ema_decay drop_path mixup reprob aa hflip smoothing num_classes img_size bn_momentum
    model_kwargs initial_checkpoint amp sync_bn seed kd_model_name class_map val_interval time_steps compensate
    no_decay_classifier crop_padding restoration side_gain freeze_origin start_from_best
""".split()


@pytest.fixture
def known(timm_scripts):
    """All arguments of timm's script and ours, as nobody gave any."""
    script = load_script(timm_scripts / 'train.py')
    add_time_step_options(script.parser)
    return vars(script.parser.parse_args([]))


@pytest.fixture
def resume(tmp_path):
    """What is said to a run of some arguments that goes on from a checkpoint of others; None if nothing."""
    def resumed(there, here, beside=None):
        path = tmp_path / 'last.pth.tar'
        torch.save(dict(state_dict=dict(x=torch.zeros(1)), epoch=3, args=argparse.Namespace(**there)), path)
        (tmp_path / 'args.yaml').unlink(missing_ok=True)
        if beside is not None:
            (tmp_path / 'args.yaml').write_text(yaml.safe_dump(beside))
        args = argparse.Namespace(**{**here, 'resume': str(path), 'output': str(tmp_path)})
        try:
            find_run(args, timm_rep.AnnealingSchedule(1, 300, 0))
        except timm_rep.UserError as e:
            return str(e)

    return resumed


def test_whatever_shapes_the_training_must_agree(known, resume):
    known = {**known, 'lr': 0.1, 'lr_cycle_limit': 2}  # a rate that nobody left open, and restarts
    for beside in (None, {**known, **dict.fromkeys(known, 'other')}):  # what only args.yaml holds was not trained
        allowed = {name for name in known if resume(known, {**known, name: 'other'}, beside) is None}
        assert allowed == MAY_CHANGE & known.keys()
    assert not allowed & set(SHAPING)
    assert set(SHAPING) <= known.keys()
    said = resume({**known, 'lr': 0.1, 'aa': 'other'}, {**known, 'lr': 0.2})
    assert 'of a run with --aa other (here None), --lr 0.1 (here 0.2); take the same' in said


def test_what_timm_decides_itself_is_taken_over_where_it_is_left_open(known, resume):
    """It puts the learning rate that it takes into the checkpoint, and what it was told into args.yaml."""
    ran = {**known, 'lr': 0.05, 'num_classes': 10, 'lr_base_scale': 'linear', 'rank': 0, 'world_size': 1}
    assert resume(ran, known, beside=known) is None
    assert resume(ran, {**known, 'lr': 0.05}, beside=known) is None
    assert '--lr 0.05 (here 0.1)' in resume(ran, {**known, 'lr': 0.1}, beside=known)
    assert resume(ran, known, beside={**known, 'lr': 0.05}) is None
    assert resume(ran, known) is None
    assert '--num-classes 10 (here 7)' in resume(ran, {**known, 'num_classes': 7})
    for name, value in dict(lr=0.5, lr_base_scale='sqrt', num_classes=7).items():
        assert f' {value})' in resume(ran, {**known, name: value}, beside={**known, name: value})
    assert resume(ran, {**known, 'lr': 0.0}, beside={**known, 'lr': 0.0}) is None  # which is left open, too
    assert '--num-classes 10 (here 0)' in resume(ran, {**known, 'num_classes': 0})


def test_what_does_nothing_need_not_agree(known, resume):
    changes = [
        (dict(grad_accum_steps=1), dict(grad_accum_steps=0)),
        (dict(sync_bn=True, dist_bn=''), dict(sync_bn=True, dist_bn='reduce')),
        (dict(lr_cycle_decay=0.5), dict(lr_cycle_decay=1.0)),  # timm's default and the wrapper's
    ]
    for there, here in changes:
        assert resume({**known, **there}, {**known, **here}) is None
    restarts = dict(lr_cycle_limit=2)
    for there, here in (changes[2], (dict(grad_accum_steps=1), dict(grad_accum_steps=2)), (changes[1][0], {})):
        assert 'is of a run with' in resume({**known, **restarts, **there}, {**known, **restarts, **here})


def test_a_run_without_the_wrapper_goes_on_without_its_options(known, resume):
    plain = {name: value for name, value in known.items() if name not in without_time_steps()}
    here = {**known, 'attach_warmup_epochs': 0}
    assert resume(plain, here) is None
    changed = dict(restoration='measured', side_gain=0.0, freeze_origin=True, start_from_best=True)
    for name, value in dict(**changed, no_decay_classifier=True, crop_padding=4, time_steps=2).items():
        assert f'--{name.replace("_", "-")}' in resume(plain, {**here, name: value})


def test_as_many_processes_must_train_on(known, resume, monkeypatch):
    assert '2 processes (here 1)' in resume({**known, 'world_size': 2}, known)
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert resume({**known, 'world_size': 2}, known) is None
    assert '1 processes (here 2)' in resume({**known, 'world_size': 1}, known)


@pytest.mark.parametrize(('cut_off', 'message'), [
    (True, 'no whole checkpoint to go on from but last.pth.tar, checkpoint-0.pth.tar, '),
    (False, 'no whole checkpoint to go on from but model_best.pth.tar, time_step-1-ema-stock.safetensors, '),
])
def test_what_a_run_left_is_not_started_anew_over(copied, scripts, tmp_path, refusal, cut_off, message):
    for path in [copied / 'last.pth.tar', *copied.glob('checkpoint-*.pth.tar')]:
        content = path.read_bytes()[:1000]
        path.unlink()
        if cut_off:
            path.write_bytes(content)
    before = contents(tmp_path)
    assert message in refusal(arguments(scripts, '--resume', 'auto'))
    assert contents(tmp_path) == before


def test_checkpoint_of_a_run_without_time_steps_is_refused(finished, scripts, tmp_path, refusal):
    checkpoint = torch.load(finished / 'last.pth.tar', weights_only=False)
    for name in ('time_steps', 'attach_warmup_epochs'):
        delattr(checkpoint['args'], name)
    torch.save(checkpoint, tmp_path / 'plain.pth.tar')
    assert '--time-steps 1 (here 3)' in refusal(
        arguments(scripts, '--resume', 'plain.pth.tar'))
    # weights alone do not say of which epoch they are
    torch.save(dict(state_dict=checkpoint['state_dict']), tmp_path / 'weights.pth')
    assert 'weights.pth does not say its epoch' in refusal(arguments(scripts, '--resume', 'weights.pth'))
    assert 'epoch 1 lies before it; say where to go on' in refusal(
        arguments(scripts, '--resume', 'weights.pth', '--start-epoch', 1))


def test_script_that_does_not_fit_is_refused(tmp_path, refusal):
    (tmp_path / 'train.py').write_text('parser = None\n')
    missing = 'config_parser, _parse_args, main, create_dataset, create_loader, create_optimizer_v2, train_one_epoch'
    assert f'it lacks {missing}' in refusal(arguments(tmp_path))


def test_missing_script_says_how_to_get_it(tmp_path, refusal):
    assert 'git clone' in refusal(arguments(tmp_path / 'nowhere'))


@pytest.mark.parametrize('command', [['-m', 'timm_rep.train'], [str(SCRIPT)]], ids=['module', 'script'])
def test_help_shows_own_options_then_those_of_timm(scripts, command):
    if not SCRIPT.exists() and command == [str(SCRIPT)]:
        pytest.skip('the script is in a checkout only')
    command = [sys.executable, *command, '--timm-scripts', str(scripts), '--help']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < done.stdout.index('--attach-warmup-epochs') < done.stdout.index('Stand-in training')
    assert '--checkpoint-hist' in done.stdout


def test_help_may_be_cut_off(scripts):
    """As by `--help | head`, which does not read on."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, '-m', 'timm_rep.train', '--timm-scripts', str(scripts), '--help']
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1
    assert 'BrokenPipe' not in done.stderr


# Recipes


@pytest.fixture(params=recipe_names())
def recipe(request):
    return request.param


def test_recipe_fits_its_model_and_schedule(recipe):
    settings = yaml.safe_load(recipe_file(recipe).read_text())
    model = timm.create_model(settings['model'], device='meta')
    assert any(annealed_modules(model))
    schedule = timm_rep.AnnealingSchedule(
        settings.get('time_steps', 1), settings['epochs'], settings.get('attach_warmup_epochs', 0))
    assert settings['warmup_epochs'] < schedule.epochs
    # --img-size is heard: an input_size would come before it
    assert resolve_data_config(dict(settings, img_size=64), model=model)['input_size'] == (3, 64, 64)


def test_the_promised_recipes_are_there():
    assert recipe_names() == [
        'finetune', 'orepa_cifar10', 'orepa_imagenet', 'repan_cifar10', 'repan_cifar100', 'repan_imagenet']
    for name in recipe_names():
        text = recipe_file(name).read_text()
        assert f'timm-rep train --recipe {name} --experiment ' in text  # --resume auto needs its name


def commands(recipe):
    """The commands in the comment of a recipe, and what is said to go behind them, as lists of words."""
    text = re.sub(r' \\\n#', ' ', recipe_file(recipe).read_text())
    return [shlex.split(line) for line in re.findall(r'^# {3,7}((?:timm-rep train|--).*)', text, re.MULTILINE)]


def test_commands_of_a_recipe_are_understood(timm_scripts, recipe):
    script = load_script(timm_scripts / 'train.py')
    add_time_step_options(script.parser)
    assert len(commands(recipe)) >= dict(repan_cifar10=5, repan_cifar100=5, repan_imagenet=2).get(recipe, 1)
    for words in commands(recipe):
        words = words[2:] if words[0] == 'timm-rep' else words
        if '--recipe' in words:
            place = words.index('--recipe')
            assert words[place + 1] in recipe_names()
            del words[place:place + 2]
        args, unknown = script.parser.parse_known_args(words)
        assert unknown == []
        assert args.data is None  # nothing was taken for the deprecated positional argument


ALPHAS = dict(repan_cifar10=(0.9, 10), repan_cifar100=(0.9, 10), repan_imagenet=(0.1, 1))


@pytest.mark.parametrize('recipe', ALPHAS)
def test_distillation_is_weighted_as_the_authors_do(recipe):
    task = pytest.importorskip('timm.task', reason='this version of timm does not distil')
    alpha, temperature = ALPHAS[recipe]
    settings = yaml.safe_load(recipe_file(recipe).read_text())
    student, teacher = (timm.create_model('test_resnet', num_classes=5).eval() for _ in range(2))
    distil = task.LogitDistillationTask(
        student, teacher, torch.nn.CrossEntropyLoss(), task_loss_weight=settings['task_loss_weight'],
        temperature=settings['kd_temperature'], device=torch.device('cpu'), verbose=False)
    x, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    ours, theirs = student(x) / temperature, teacher(x) / temperature
    divergence = torch.nn.KLDivLoss(reduction='batchmean')(ours.log_softmax(1), theirs.softmax(1))
    expected = alpha * temperature ** 2 * divergence + (1 - alpha) * F.cross_entropy(student(x), target)
    torch.testing.assert_close(distil(x, target)['loss'], expected)


def test_recipe_runs_on_a_few_images(timm_scripts, photos, tmp_path, recipe):
    settings = yaml.safe_load(recipe_file(recipe).read_text())
    known = load_script(timm_scripts / 'train.py').parser.parse_args([])
    assert set(settings) <= {*vars(known), *without_time_steps()}
    steps = min(settings.get('time_steps', 1), 2)
    argv = [
        '--timm-scripts', timm_scripts, '--recipe', recipe, '--data-dir', photos, '--dataset', '', '--val-split',
        'validation', '--epochs', 1, '--time-steps', steps, '--warmup-epochs', 0, '--attach-warmup-epochs', 0,
        '--num-classes', 5, '--img-size', 32, '--batch-size', 8, '--workers', 1, '--device', 'cpu', '--experiment',
        'run',
    ]
    if recipe == 'finetune':
        stock = timm.create_model('resnet18', num_classes=7)
        safetensors.torch.save_file(stock.state_dict(), tmp_path / 'resnet18.safetensors')
        argv += ['--pretrained', '--pretrained-path', tmp_path / 'resnet18.safetensors']
    code, log = run(tmp_path, argv)
    assert code == 0, log
    assert len(rows(tmp_path / 'output/train/run/summary.csv')) == steps


def test_weights_to_start_from_that_are_missing_or_not_looked_at_are_refused():
    args = argparse.Namespace(pretrained=False, pretrained_path='start.safetensors')
    with pytest.raises(timm_rep.UserError, match=r'start\.safetensors is read with --pretrained only'):
        check_start_weights(args)
    with pytest.raises(timm_rep.UserError, match=r'--initial-checkpoint start\.safetensors is not a file'):
        check_start_weights(argparse.Namespace(initial_checkpoint='start.safetensors'))


@pytest.mark.parametrize(('given', 'said'), [
    (dict(torchcompile='inductor'), '--capture and --torchcompile both make graphs'),
    (dict(device='cpu'), 'a CUDA graph, which --device cpu cannot have'),
    (dict(model='resnet18'), 'resnet18 has no layers whose kernels are composed without norms'),
    (dict(model='dbb_resnet18_cifar'), 'dbb_resnet18_cifar has no layers whose kernels'),
])
def test_graphs_that_cannot_be_are_refused(given, said):
    args = dict(model='orepa_resnet18_cifar', log_branches=False, capture=True, device='cuda:0')
    check_model(argparse.Namespace(**args), timm_rep.AnnealingSchedule(1, 2))
    with pytest.raises(timm_rep.UserError, match=said):
        check_model(argparse.Namespace(**dict(args, **given)), timm_rep.AnnealingSchedule(1, 2))


@pytest.mark.parametrize('option', ['torchscript', 'split_bn'])
def test_what_takes_rep_layers_apart_is_refused_without_time_steps_too(option):
    args = argparse.Namespace(model='orepa_resnet18_cifar', log_branches=False, capture=None, **{option: True})
    schedule = timm_rep.AnnealingSchedule(1, 2)
    with pytest.raises(timm_rep.UserError, match=f'--{option.replace("_", "-")} takes the rep layers apart'):
        check_model(args, schedule)
    check_model(argparse.Namespace(**dict(vars(args), model='resnet18')), schedule)


@pytest.mark.parametrize(('given', 'expected'), [
    ({}, dict(input_size=[3, 40, 40], mean=[0.1, 0.2, 0.3], interpolation='bicubic', crop_mode='squash')),
    (dict(img_size=16, mean=[0.5]), dict(input_size=None, mean=[0.5], interpolation='bicubic', crop_mode='squash')),
    (dict(img_size=16), dict(input_size=None, in_chans=3, mean=[0.1, 0.2, 0.3])),
    (dict(in_chans=1), dict(input_size=[1, 40, 40], mean=[0.2])),
    (dict(in_chans=1, img_size=16), dict(input_size=None, mean=[0.2])),
    (dict(input_size=[1, 32, 32]), dict(input_size=[1, 32, 32], mean=[0.2])),
    (dict(pretrained=False), dict(input_size=None, mean=None, interpolation='')),
    (dict(pretrained=False, initial_checkpoint='start.safetensors'),
     dict(input_size=[3, 40, 40], mean=[0.1, 0.2, 0.3], interpolation='bicubic')),
    (dict(pretrained=False, initial_checkpoint='last.pth.tar'),
     dict(input_size=[3, 40, 40], mean=[0.1, 0.2, 0.3], interpolation='bicubic', crop_mode='squash')),
    (dict(model='resnet18'), dict(input_size=None, mean=None, interpolation='')),
], ids=[
    'all open', 'some given', 'size given', 'channels given', 'channels and size', 'input given', 'not asked for',
    'initial checkpoint', 'checkpoint of a run', "timm's own network"])
def test_arguments_say_what_input_the_weights_to_start_from_bring(given, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model('orepa_repvgg_a0_cifar')
    settings = dict(
        input_size=(3, 40, 40), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), interpolation='bicubic', crop_mode='squash')
    model.pretrained_cfg = {**model.pretrained_cfg, **settings}
    timm_rep.save(model, tmp_path / 'start.safetensors')
    run = argparse.Namespace(model='orepa_repvgg_a0_cifar', **settings)
    torch.save(dict(state_dict=model.state_dict(), args=run), tmp_path / 'last.pth.tar')
    args = argparse.Namespace(**{**dict(
        model='orepa_repvgg_a0_cifar', pretrained=True, pretrained_path=str(tmp_path / 'start.safetensors'),
        img_size=None, in_chans=None, input_size=None, mean=None, std=None, interpolation='', crop_pct=None,
        crop_mode=None), **given})
    take_start_settings(args)
    found = {key: getattr(args, key) for key in expected}
    assert found == {**expected, 'mean': pytest.approx(expected['mean'])}
    resolve_data_config(vars(args))  # of which timm asserts that they go together


def test_a_size_leaves_the_channels_of_the_weights_to_start_from(tmp_path):
    model = timm.create_model('orepa_repvgg_a0_cifar', in_chans=1)
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(1, 40, 40), mean=(0.1,), std=(0.2,))
    timm_rep.save(model, tmp_path / 'start.safetensors')
    for given in (dict(img_size=16), {}):
        args = argparse.Namespace(
            model='orepa_repvgg_a0_cifar', pretrained=False, initial_checkpoint=str(tmp_path / 'start.safetensors'),
            **given)
        take_start_settings(args)
        config = resolve_data_config(vars(args), pretrained_cfg=model.pretrained_cfg)
        assert config['input_size'] == ((1, 16, 16) if given else (1, 40, 40))
        assert config['mean'] == (0.1,)


FOLDERS = ('folder', 'ImageFolder', 'imagenet', 'torch/folder', 'Torch/image_folder', 'my/own')  # as timm has it


def check_images(folder, train_split='train', val_split='validation', **kwargs):
    check_data(argparse.Namespace(
        **dict(dict(data_dir=str(folder), dataset='', train_split=train_split, val_split=val_split), **kwargs)))


def test_images_that_are_not_there_are_refused(tmp_path):
    for split in ('train', 'test', 'empty'):
        (tmp_path / split / 'class').mkdir(parents=True)
    (tmp_path / 'train/class/1.JPEG').touch()
    (tmp_path / 'test/class/1.png').touch()
    check_images(tmp_path, val_split='test')
    (tmp_path / 'links').mkdir()
    (tmp_path / 'links/class').symlink_to(tmp_path / 'test/class')
    check_images(tmp_path, val_split='links')
    check_images(tmp_path, val_split='')
    check_images(tmp_path / 'train', val_split='')  # all of a folder without splits
    check_images(tmp_path / 'train', train_split='', val_split='')
    check_images(tmp_path / 'new', dataset='torch/cifar10')
    check_images(tmp_path / 'train/class/1.JPEG')  # timm reads archives
    for kwargs in ({}, dict(data_dir=None, data=str(tmp_path / 'typo'))):
        with pytest.raises(timm_rep.UserError, match=r'there is no folder of images .*typo'):
            check_images(tmp_path / 'typo', **kwargs)
    there = 'there is empty, links, test and 1 more'
    for kwargs, message in [  # timm would validate on all images, the training's, too
        ({}, rf"has no split 'validation'; give the name of a split, {there} \(--val-split; '' trains without"),
        (dict(val_split='tset'), f"has no split 'tset'; give the name of a split, {there}"),
        (dict(train_split='trian', val_split='test'), rf"has no split 'trian'.*{there} \(--train-split\)"),
        (dict(train_split='trian', val_split=''), r"has no split 'trian'"),
        *((dict(val_split='tset', dataset=dataset), "has no split 'tset'") for dataset in FOLDERS),
        (dict(train_split='', val_split='test'), "has no split ''"),  # or would train on those of the test, too
        (dict(data_dir=str(tmp_path / 'empty/class'), val_split='test'), 'has no split .*, there is none'),
        (dict(val_split='empty'), r'empty holds no images that timm reads \(\.png, \.jpg, \.jpeg\)'),
    ]:
        with pytest.raises(timm_rep.UserError, match=message):
            check_images(tmp_path, **kwargs)
    with pytest.raises(timm_rep.UserError, match="train has no split 'validation'"):
        check_images(tmp_path / 'train')


@pytest.mark.parametrize(('args', 'message'), [
    (dict(model='orepa_resnet19'), "unknown model 'orepa_resnet19'; `timm-rep list` shows"),
    (dict(kd_model_name='nope18'), "unknown model 'nope18'"),
    (dict(model='resnet18.nope'), r"unknown model 'resnet18\.nope': .*\(nope\)"),
    (dict(opt='foo'), r"unknown optimizer 'foo' \(--opt\); timm\.optim\.list_optimizers\(\) shows them"),
    (dict(sched='nope'), r"sched nope (cannot be used: Unknown scheduler|makes no schedule)"),
    (dict(sched='none'), "sched none makes no schedule, and timm's train.py does not train without one"),
    (dict(sched='plateau', sched_on_updates=True), 'sched plateau cannot be used: .*only supports step per epoch'),
    (dict(device='gpu'), r"device 'gpu' cannot be used \(--device\): .*cuda"),
    (dict(device='cuda'), r"device 'cuda' cannot be used: there is no NVIDIA GPU\. --device cpu trains"),
], ids=str)
def test_names_that_are_not_known_are_refused(args, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    good = dict(model='resnet18.a1_in1k', opt='lookahead_sgd', device='cpu', kd_model_name=None, sched='cosine')
    check_names(argparse.Namespace(**good))
    check_names(argparse.Namespace(**dict(good, model='hf-hub:org/name', opt='AdamW', sched='tanh')))
    with pytest.raises(timm_rep.UserError, match=message):
        check_names(argparse.Namespace(**dict(good, **args)))
