"""One run at a time in a folder; what died holds nothing."""
import argparse
import errno
import os
import signal
import sys
import time
from contextlib import contextmanager

import pytest
import timm
from interrupted_run import CONTEXT, arguments, contents, run

import timm_rep
from timm_rep.train import lock as lock_module
from timm_rep.train.epochs import AnnealedEpochs
from timm_rep.train.lock import RunLock


def hold(folder, event, with_worker):
    lock = RunLock()
    lock.take(folder)
    if with_worker and os.fork() == 0:  # as torch's loader forks workers, which live on for some seconds
        time.sleep(30)
        os._exit(0)
    event.set()
    time.sleep(60)


@contextmanager
def held(folder, with_worker=False):
    """Another process holds a folder; to end it."""
    event = CONTEXT.Event()
    process = CONTEXT.Process(target=hold, args=(folder, event, with_worker))
    process.start()
    try:
        assert event.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


def test_second_run_in_a_folder_is_refused(scripts, tmp_path):
    folder = tmp_path / 'output/train/run'
    with held(folder):
        (folder / 'args.yaml').write_text('model: x\n')
        before = contents(tmp_path)
        for more in ([], ['--resume', 'auto']):
            code, log = run(tmp_path, arguments(scripts, *more))
            assert code == 2
            assert log.splitlines()[-1] == (
                'train.py: another run is at work in output/train/run; wait for its end, or take another --experiment')
        assert contents(tmp_path) == before


@pytest.mark.skipif(sys.platform == 'win32', reason='forks')
def test_what_was_killed_holds_nothing_though_its_workers_live(tmp_path):
    with held(tmp_path / 'run', with_worker=True) as process:
        with pytest.raises(timm_rep.UserError, match='another run is at work in'):
            RunLock().take(tmp_path / 'run')
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        lock = RunLock()
        lock.take(tmp_path / 'run')
        lock.release()


def test_a_folder_that_timm_names_is_locked_before_anything_happens_in_it(tmp_path):
    """Two runs that start in the same second without --experiment get one folder."""
    model = timm.create_model('orepa_resnet18_cifar')
    args = argparse.Namespace(seed=42, rank=0, log_branches=False, capture=None, resume='', output='', experiment='')

    def train_one_epoch(epoch, model, loader, optimizer, args, output_dir=None, model_ema=None):
        raise AssertionError('it trains')

    epochs = AnnealedEpochs(args, timm_rep.AnnealingSchedule(1, 2, 0))
    with held(tmp_path):
        (tmp_path / 'summary.csv').write_text('epoch,loss\n0,1.0\n')
        with pytest.raises(timm_rep.UserError, match='another run is at work in'):
            epochs.around(train_one_epoch)(0, model, None, None, args, output_dir=str(tmp_path))
        assert (tmp_path / 'summary.csv').read_text() == 'epoch,loss\n0,1.0\n'


def test_the_first_of_many_processes_locks_for_all(tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with held(tmp_path):
        monkeypatch.setenv('RANK', '1')
        RunLock().take(tmp_path)
        monkeypatch.setenv('RANK', '0')
        with pytest.raises(timm_rep.UserError, match='another run is at work in'):
            RunLock().take(tmp_path)


def test_without_locks_a_run_is_warned(tmp_path, monkeypatch, caplog):
    def refuse(file):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(lock_module, '_lock', refuse)
    RunLock().take(tmp_path)
    assert 'without locks ([Errno 37] No locks available): let no second run write to it' in caplog.text


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(timm_rep.UserError, match='file/run cannot be written to'):
        RunLock().take(tmp_path / 'file' / 'run')
