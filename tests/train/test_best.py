"""Time steps that begin with the best epoch of the one before."""
import argparse
import signal

import pytest
import torch
from helpers import assert_same_state
from interrupted_run import arguments, rows, run, states

import timm_rep
from timm_rep.io.checkpoint import read_checkpoint
from timm_rep.io.weights import load_training_form
from timm_rep.train.best import check_best, keep_resumed, take_best

EPOCHS, TIME_STEPS = 3, 2
BEST = ['--start-from-best', '--epochs', EPOCHS, '--time-steps', TIME_STEPS, '--lr', 0.5]


@pytest.fixture(scope='module')
def best(scripts, tmp_path_factory):
    """The folder of a run that nothing interrupted, and the best epoch of each of its time steps."""
    cwd = tmp_path_factory.mktemp('best')
    code, log = run(cwd, arguments(scripts, *BEST))
    assert code == 0, log
    folder = cwd / 'output/train/run'
    top1 = [float(row['eval_top1']) for row in rows(folder / 'summary.csv')]
    return folder, [top1.index(max(top1[step:step + EPOCHS]), step) for step in range(0, len(top1), EPOCHS)]


@pytest.mark.parametrize('use_ema', [False, True])
def test_a_time_step_begins_with_the_best_epoch(best, use_ema):
    folder, epochs = best
    assert any(epoch % EPOCHS < EPOCHS - 1 for epoch in epochs), epochs  # else it would be the last anyway
    for number, epoch in enumerate(epochs):
        snapshot = load_training_form(folder / f'time_step-{number + 1}{"-ema" if use_ema else ""}.safetensors')
        checkpoint = load_training_form(folder / f'checkpoint-{epoch}.pth.tar', use_ema=use_ema)
        assert_same_state(snapshot.state_dict(), checkpoint.state_dict())


def test_killed_and_resumed(best, scripts, tmp_path):
    code, log = run(tmp_path, arguments(scripts, *BEST), point='transition', count=3)
    assert code == -signal.SIGKILL, log
    code, log = run(tmp_path, arguments(scripts, *BEST, '--resume', 'auto'))
    assert code == 0, log
    folder = tmp_path / 'output/train/run'
    assert_same_state(states(folder / 'last.pth.tar'), states(best[0] / 'last.pth.tar'))
    for number in range(TIME_STEPS):
        name = f'time_step-{number + 1}.safetensors'
        assert (folder / name).read_bytes() == (best[0] / name).read_bytes()


@pytest.fixture
def folder(tmp_path):
    """The folder of a run of six epochs, with a weight that is their number."""
    table = ['epoch,eval_loss,eval_top1', '0,1,90', '1,3,50', '2,2,60', '3,nan,nan', '4,2,60', '5,0.5,99', '']
    (tmp_path / 'summary.csv').write_text('\n'.join(table))
    for epoch in range(6):
        one, other = (dict(x=torch.tensor([number])) for number in (epoch, epoch + 10.0))
        torch.save(dict(state_dict=one, state_dict_ema=other, epoch=epoch), tmp_path / f'checkpoint-{epoch}.pth.tar')
    return tmp_path


class Number(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('x', torch.full((1,), -1.0))


@pytest.mark.parametrize(('first', 'end', 'metric', 'expected'), [
    (0, 6, 'top1', 5), (1, 5, 'top1', 2), (0, 5, 'loss', 0), (1, 5, 'loss', 2), (3, 4, 'top1', -1), (1, 5, 'top5', -1)])
def test_the_first_of_the_best_is_taken(folder, first, end, metric, expected):
    forms = {'': Number(), '-ema': Number()}
    take_best(forms, folder, first, end, metric)
    assert [form.x.item() for form in forms.values()] == [expected, expected + 10 if expected >= 0 else -1]


def test_a_checkpoint_without_its_name_is_kept(folder):
    """A run was killed between the two names of the checkpoint of epoch 2, after it went back from a later one."""
    (folder / 'last.pth.tar').write_bytes((folder / 'checkpoint-2.pth.tar').read_bytes())
    (folder / 'checkpoint-2.pth.tar').unlink()
    for stale in (False, True):
        if stale:
            (folder / 'checkpoint-2.pth.tar').write_bytes((folder / 'checkpoint-3.pth.tar').read_bytes())
        keep_resumed(folder / 'last.pth.tar')
        assert read_checkpoint(folder / 'checkpoint-2.pth.tar').epoch == 2
    keep_resumed(folder / 'checkpoint-2.pth.tar')
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f'checkpoint-{epoch}.pth.tar' for epoch in range(6)), 'last.pth.tar', 'summary.csv']


@pytest.mark.parametrize(('options', 'message'), [
    (dict(val_split='test'), '--val-split test of tfds/cifar10 are not such; hold some'),
    (dict(val_split=''), r'--val-split \(none\) of tfds/cifar10'),
    (dict(dataset='torch/cifar10'), '--val-split validation of torch/cifar10 are not such'),
    (dict(dataset='', val_split='test'), '--val-split test of the folder are not such'),
    (dict(checkpoint_hist=10), 'checkpoints of all 12 epochs: --checkpoint-hist 12, got 10'),
    (dict(resume='other/last.pth.tar'), 'goes on in the folder of its run, other, only'),
    (dict(resume='output/train/run/last.pth.tar', experiment=''), 'goes on in the folder of its run, output/train/run'),
])
def test_what_cannot_choose_is_refused(options, message):
    good = dict(start_from_best=True, val_split='validation', dataset='tfds/cifar10', checkpoint_hist=12, output='',
                experiment='run', resume='')
    schedule = timm_rep.AnnealingSchedule(3, 4)
    resumed = dict(resume='output/train/run/last.pth.tar')
    for allowed in ({}, resumed, dict(val_split='train[45000:]'), dict(dataset='')):
        check_best(argparse.Namespace(**{**good, **allowed}), schedule)
    check_best(argparse.Namespace(**{**good, **options, 'start_from_best': False}), schedule)
    with pytest.raises(timm_rep.UserError, match=message):
        check_best(argparse.Namespace(**{**good, **options}), schedule)
