"""A run that is killed at any moment and resumed ends like one that was not."""
import argparse
import os
import re
import shutil
import signal

import pytest
import timm
import torch
from helpers import assert_same_state
from interrupted_run import EPOCHS, MODEL, TIME_STEPS, arguments, rows, run, states
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

import timm_rep
from timm_rep import UserError
from timm_rep.io.checkpoint import read_checkpoint
from timm_rep.io.runs import read_run_args
from timm_rep.train import main
from timm_rep.train.arguments import check_start_weights
from timm_rep.train.lock import RunLock
from timm_rep.train.resume import drop_rows, find_run, newest_checkpoint, replay_plateau
from timm_rep.train.snapshots import save_snapshots

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
# Ctrl-C, which timm takes for the end of the training, and what torchrun ends its processes with.
INTERRUPTIONS = [
    ('interrupted in training', 8, 130),
    ('interrupted in validation', 2, 130),
    ('interrupted in validation', 6, 130),  # of the last epoch
    ('interrupted in vain', 2, 130),
    ('terminated', 8, -signal.SIGTERM),
]
ENDS = [*((*kill, -signal.SIGKILL) for kill in KILLS), *INTERRUPTIONS]


def assert_ends_alike(folder, finished, point=''):
    """All that a run left is as if nothing had happened to it."""
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


@pytest.mark.parametrize(('point', 'count', 'expected'), ENDS, ids=str)
def test_killed_and_resumed_run_ends_like_one_that_was_not(finished, scripts, tmp_path, point, count, expected):
    code, log = run(tmp_path, arguments(scripts, '--log-branches'), point=point, count=count)
    assert code == expected, log
    if code == 130:
        assert log.endswith('train.py: interrupted\n')
        assert ('Traceback' in log) == (point == 'interrupted in vain')  # by Python, of what it ignored
        assert not (tmp_path / 'output/train/run/time_step-2.safetensors').exists() or count == 6
    code, log = run(tmp_path, arguments(scripts, '--log-branches', '--resume', 'auto'))
    assert code == 0, log
    assert_ends_alike(tmp_path / 'output/train/run', finished, point)


def turn_a_bit(path):
    """Of the weights, somewhere in the middle; in no file that is linked to this one."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over(finished, scripts, tmp_path, caplog):
    folder = tmp_path / 'output/train/run'
    shutil.copytree(finished, folder)
    for name in ('last.pth.tar', 'checkpoint-5.pth.tar'):
        turn_a_bit(folder / name)
    assert newest_checkpoint(folder) == folder / 'checkpoint-4.pth.tar'
    passed_over = [record.getMessage() for record in caplog.records]
    for line, name in zip(passed_over, ('last.pth.tar', 'checkpoint-5.pth.tar'), strict=True):
        assert line.startswith(f'Passed over: {folder / name} is not ')
        assert re.search(r'its record \S+ is damaged', line)
    code, log = run(tmp_path, arguments(scripts, '--log-branches', '--resume', 'output/train/run/last.pth.tar'))
    assert code == 2
    assert re.search(r'train\.py: output/train/run/last\.pth\.tar is not .* its record \S+ is damaged', log)
    code, log = run(tmp_path, arguments(scripts, '--log-branches', '--resume', 'auto'))
    assert code == 0, log
    assert '--resume auto: output/train/run/checkpoint-4.pth.tar' in log
    assert_ends_alike(folder, finished)


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


def test_newest_is_the_last_that_is_whole(finished, tmp_path):
    """A run that went back to an earlier checkpoint and was killed has later epochs in older files."""
    for number, name in enumerate(('checkpoint-5', 'checkpoint-0', 'last', 'tmp')):
        path = tmp_path / f'{name}.pth.tar'
        path.write_bytes((finished / f'checkpoint-{1 if name == "last" else 5}.pth.tar').read_bytes())
        os.utime(path, (number, number))
    (tmp_path / 'tmp.pth.tar').write_bytes(b'cut off')
    assert newest_checkpoint(tmp_path).name == 'last.pth.tar'
    (tmp_path / 'last.pth.tar').unlink()
    assert newest_checkpoint(tmp_path).name == 'checkpoint-5.pth.tar'
    (tmp_path / 'summary.csv').write_text('epoch,loss\n0,1.0\n')
    assert newest_checkpoint(tmp_path).name == 'checkpoint-0.pth.tar'
    # copies have the times of their copying: they do not count as long as there is a last one
    (tmp_path / 'last.pth.tar').write_bytes((finished / 'last.pth.tar').read_bytes())
    os.utime(tmp_path / 'last.pth.tar', (0, 0))
    assert newest_checkpoint(tmp_path).name == 'last.pth.tar'


def test_newest_of_a_copy_is_the_one_of_the_last_epoch(finished, tmp_path):
    for epoch, age in ((5, 0), (0, 2), (1, 1)):
        path = tmp_path / f'checkpoint-{epoch}.pth.tar'
        path.write_bytes((finished / 'checkpoint-5.pth.tar').read_bytes())
        os.utime(path, (age, age))
    (tmp_path / 'summary.csv').write_text('epoch,loss\n0,1.0\n1,0.9\n')
    assert newest_checkpoint(tmp_path).name == 'checkpoint-1.pth.tar'  # the run has not come to epoch 5 again
    (tmp_path / 'summary.csv').write_text('epoch,loss\n0,1.0\n1,0.9\n5,0.8\n')
    assert newest_checkpoint(tmp_path).name == 'checkpoint-5.pth.tar'


def test_newest_is_of_the_epochs_that_a_run_gone_back_has_come_to(finished, tmp_path, caplog):
    for name in ('last.pth.tar', *(f'checkpoint-{epoch}.pth.tar' for epoch in range(6))):
        (tmp_path / name).symlink_to(finished / name)
    (tmp_path / 'tmp.pth.tar').symlink_to(finished / 'last.pth.tar')
    for reached in (0, 3):
        rows = ''.join(f'{epoch},1.0\n' for epoch in range(reached + 1))
        (tmp_path / 'summary.csv').write_text(f'epoch,loss\n{rows}')
        assert newest_checkpoint(tmp_path).name == f'checkpoint-{reached}.pth.tar'
    (tmp_path / 'tmp.pth.tar').unlink()
    (tmp_path / 'tmp.pth.tar').symlink_to(finished / 'checkpoint-3.pth.tar')  # which was to become last
    assert newest_checkpoint(tmp_path).name == 'tmp.pth.tar'
    (tmp_path / 'tmp.pth.tar').unlink()
    for epoch in range(4):
        (tmp_path / f'checkpoint-{epoch}.pth.tar').unlink()
    assert newest_checkpoint(tmp_path).name == 'last.pth.tar'  # better than none


def test_a_run_gone_back_that_is_killed_before_its_first_checkpoint_goes_on_from_where_it_went(
        finished, scripts, tmp_path):
    folder = tmp_path / 'output/train/run'
    shutil.copytree(finished, folder)
    back = ['--resume', 'output/train/run/checkpoint-1.pth.tar']
    code, log = run(tmp_path, arguments(scripts, '--log-branches', *back), point='checkpoint half written')
    assert code == -signal.SIGKILL, log
    assert re.search('output/train/run goes back to epoch 2: its rows to epoch 5 go, and the checkpoints of ', log)
    assert rows(folder / 'summary.csv')[-1]['epoch'] == '2'
    found = newest_checkpoint(folder)
    assert (found.name, read_checkpoint(found).epoch) == ('last.pth.tar', 1)  # not the checkpoint-2 of the run it left
    code, log = run(tmp_path, arguments(scripts, '--log-branches', '--resume', 'auto'))
    assert code == 0, log
    assert_ends_alike(folder, finished)


@pytest.mark.parametrize(('resume', 'start_epoch', 'message'), [
    ('last', 5, r'go back by --resume .*checkpoint-4\.pth\.tar, or take another --experiment'),
    ('checkpoint-1', 0, r'checkpoint-1.pth.tar is of epoch 1: --start-epoch 0 .* before; take another --experiment'),
    ('checkpoint-4', 5, None),
])
def test_epochs_are_not_trained_again_from_weights_that_have_had_them(finished, resume, start_epoch, message):
    args = finished_args(
        finished, resume=str(finished / f'{resume}.pth.tar'), start_epoch=start_epoch,
        output=str(finished.parent), experiment=finished.name)
    schedule = timm_rep.AnnealingSchedule(args.time_steps, args.epochs, args.attach_warmup_epochs)
    if message is None:
        find_run(args, schedule)
        return
    with pytest.raises(UserError, match=message):
        find_run(args, schedule)
    args.output, args.experiment = str(finished), 'another'
    find_run(args, schedule)


def test_rows_of_an_interrupted_run_are_dropped(tmp_path):
    path = tmp_path / 'summary.csv'
    path.write_text('epoch,loss\n0,1.0\n1,0.5\nepoch,loss\n1,0.4\n2,0.3\n3')
    drop_rows(path, 1)
    assert path.read_text().split() == ['epoch,loss', '0,1.0']
    drop_rows(path, 1)
    drop_rows(tmp_path / 'missing.csv', 1)
    # another run's columns may follow: no row is lost
    path.write_text('epoch,loss\n0,1.0\nepoch,loss,rate\n1,0.5,0.1\n2,0.4,0.1\n')
    drop_rows(path, 2)
    assert path.read_text().split() == ['epoch,loss', '0,1.0', 'epoch,loss,rate', '1,0.5,0.1']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['summary.csv']


def test_a_run_with_damaged_rows_goes_on(tmp_path):
    path = tmp_path / 'summary.csv'
    path.write_bytes(b'epoch,loss\n0,1.0\n' + bytes(140_000) + '\n²,0.5\n2,0.4\n'.encode())
    damaged = path.read_bytes()
    drop_rows(path, 2)
    assert path.read_text().split() == ['epoch,loss', '0,1.0']
    assert (tmp_path / 'summary.csv.damaged-1').read_bytes() == damaged


def test_rows_below_a_damaged_header_are_not_lost(tmp_path):
    path = tmp_path / 'summary.csv'
    for number, text in enumerate(('epocl,loss\n0,1.0\n', 'epoch;loss\n0;1.0\n'), 1):
        path.write_text(text)
        drop_rows(path)
        assert not path.exists()
        assert (tmp_path / f'summary.csv.damaged-{number}').read_text() == text
    path.write_text('\ufeffepoch,loss\n0,1.0\n', encoding='utf-8')  # as other programs save it
    drop_rows(path)
    assert path.read_text() == 'epoch,loss\n0,1.0\n'


def finished_args(finished, **changes):
    """Arguments of the finished run as its command gave them, before train.py decided what was left open."""
    told = read_run_args(finished / 'last.pth.tar')
    return argparse.Namespace(**{**told, 'resume': str(finished / 'last.pth.tar'), **changes})


@pytest.mark.parametrize('content', [None, '', 'lr: [0.1'], ids=['gone', 'empty', 'cut off'])
def test_a_run_without_its_args_yaml_goes_on_with_the_same_command(finished, tmp_path, content):
    for name in ('last.pth.tar', 'args.yaml'):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    args = finished_args(tmp_path)
    (tmp_path / 'args.yaml').unlink()
    if content is not None:
        (tmp_path / 'args.yaml').write_text(content)
    there = read_checkpoint(tmp_path / 'last.pth.tar').args
    schedule = timm_rep.AnnealingSchedule(args.time_steps, args.epochs, args.attach_warmup_epochs)
    find_run(args, schedule)
    assert args.lr == there['lr']
    with pytest.raises(UserError, match=r'--lr .*\(here 7.0\)'):
        find_run(finished_args(finished, lr=7.0), schedule)


def test_weights_without_an_epoch_are_not_resumed(finished, tmp_path):
    file = tmp_path / 'weights.pth'
    torch.save(read_checkpoint(finished / 'last.pth.tar').state_dict, file)
    args = finished_args(finished, resume=str(file))
    schedule = timm_rep.AnnealingSchedule(args.time_steps, args.epochs, args.attach_warmup_epochs)
    with pytest.raises(UserError, match=r'weights\.pth does not say its epoch'):
        find_run(args, schedule)


def test_weights_to_start_from_are_whole(finished, tmp_path):
    file = tmp_path / 'last.pth.tar'
    file.write_bytes((finished / 'last.pth.tar').read_bytes())
    saved = tmp_path / 'start.safetensors'
    timm_rep.save(timm.create_model('orepa_repvgg_a0_cifar'), saved)
    for damaged in (file, saved):
        check_start_weights(argparse.Namespace(initial_checkpoint=str(damaged)))
        turn_a_bit(damaged)
        with pytest.raises(UserError, match=r'is not loaded: .*damaged'):
            check_start_weights(argparse.Namespace(pretrained=True, pretrained_path=str(damaged)))


def test_a_run_whose_start_weights_are_gone_says_so(scripts, tmp_path):
    """And not that it was told other input settings than the file had brought."""
    model = timm.create_model(MODEL, num_classes=5)
    model.pretrained_cfg = dict(model.pretrained_cfg, interpolation='nearest')
    timm_rep.save(model, tmp_path / 'start.safetensors')
    command = arguments(scripts, '--initial-checkpoint', 'start.safetensors')
    code, log = run(tmp_path, command, point='update', count=4)
    assert code == -signal.SIGKILL, log
    (tmp_path / 'start.safetensors').unlink()
    code, log = run(tmp_path, [*command, '--resume', 'auto'])
    assert code == 2
    assert log.endswith('train.py: --initial-checkpoint start.safetensors is not a file\n'), log


def test_nothing_stays_of_a_snapshot_that_was_interrupted(tmp_path):
    model = timm.create_model('repan_resnet18_cifar', num_classes=2)
    save_snapshots(tmp_path, 0, {'': model}, argparse.Namespace())
    whole = {path.name for path in tmp_path.iterdir()}
    assert whole == {'time_step-1.safetensors', 'time_step-1-stock.safetensors'}
    (tmp_path / '.tmp-0a1b2c3d.time_step-1.safetensors').write_bytes(b'half')
    (tmp_path / '.0a1b2c3d.mine').touch()
    RunLock().take(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == whole | {'.lock', '.0a1b2c3d.mine'}


@pytest.mark.parametrize('options', [
    {}, dict(warmup_epochs=2, warmup_lr=0.01), dict(lr_noise=[0.3, 0.8]), dict(val_split='', eval_metric='loss'),
], ids=str)
def test_a_plateau_goes_on_where_it_was(tmp_path, options):
    """timm keeps neither the best figure nor the learning rate that it has come to."""
    epochs, column = 9, 'eval_top1' if options.get('val_split', 'validation') else 'train_loss'
    args = argparse.Namespace(**{**dict(
        sched='plateau', epochs=epochs, lr=0.2, min_lr=0.0, warmup_lr=0.0, warmup_epochs=0, cooldown_epochs=0,
        decay_rate=0.5, patience_epochs=1, eval_metric='top1', val_split='validation', seed=42,
        resume=str(tmp_path / 'last.pth.tar')), **options})

    def schedule():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=args.lr)
        return optimizer, create_scheduler_v2(optimizer, **scheduler_kwargs(args))[0]

    figures = {0: 1 / 3, 1: 2 / 3, 2: 0.1, 4: 0.2, 5: 0.3, 6: 0.1, 7: 0.3, 8: 0.1}  # no validation after epoch 3
    optimizer, scheduler = schedule()
    rates, rows = [], [f'epoch,{column}']
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        rows += [f'{epoch},{figures[epoch]!r}'] if epoch in figures else []
        scheduler.step(epoch + 1, figures.get(epoch))
    assert len(set(rates)) > 2
    (tmp_path / 'summary.csv').write_text('\n'.join([*rows, '']))
    for start in range(1, epochs):
        optimizer, scheduler = schedule()
        scheduler.step(start)  # as train.py does
        replay_plateau(scheduler, args, start)
        resumed = []
        for epoch in range(start, epochs):
            resumed.append(optimizer.param_groups[0]['lr'])
            scheduler.step(epoch + 1, figures.get(epoch))
        assert resumed == rates[start:]


def test_a_run_on_a_plateau_ends_like_one_that_was_not_interrupted(scripts, tmp_path, monkeypatch):
    def train(experiment, *more):
        main([str(argument) for argument in (
            '--timm-scripts', scripts, '--model', MODEL, '--epochs', 6, '--warmup-epochs', 0, '--sched', 'plateau',
            '--patience-epochs', 0, '--checkpoint-hist', 20, '--experiment', experiment, *more)])

    monkeypatch.chdir(tmp_path)
    train('whole')
    whole, half = tmp_path / 'output/train/whole', tmp_path / 'output/train/half'
    shutil.copytree(whole, half)
    for name in ('last', 'checkpoint-5', 'checkpoint-4', 'checkpoint-3'):
        (half / f'{name}.pth.tar').unlink()
    train('half', '--resume', 'auto')
    assert rows(half / 'summary.csv') == rows(whole / 'summary.csv')
    assert len({row['lr'] for row in rows(whole / 'summary.csv')}) > 1
    weights = [read_checkpoint(folder / 'last.pth.tar').state_dict for folder in (whole, half)]
    assert_same_state(*weights)

    (half / 'summary.csv').unlink()
    with pytest.raises(SystemExit):
        train('half', '--resume', 'auto')
