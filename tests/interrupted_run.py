"""Run the wrapper around timm's train.py in a process of its own that kills or interrupts itself at a chosen point."""
import contextlib
import csv
import io
import multiprocessing
import os
import signal
import time
from pathlib import Path

STAND_IN = Path(__file__).with_name('small_train.py')
# Children are forked from a server process that has imported the libraries and started no threads.
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['torch', 'timm', 'timm_rep.train'])
TIMEOUT = 120

MODEL = 'repan_repvgg_a0_cifar'
TIME_STEPS, EPOCHS = 3, 2
COMMON = [
    '--time-steps', TIME_STEPS, '--epochs', EPOCHS, '--attach-warmup-epochs', 1, '--warmup-epochs', 0,
    '--checkpoint-hist', 20, '--experiment', 'run', '--model-ema',
]


def arguments(scripts, *more, model=MODEL):
    """Command line of a run in time steps."""
    return [*COMMON, '--timm-scripts', scripts, '--model', model, *more]


def rows(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def states(path):
    """All that a checkpoint holds of model, averaged model and optimizer."""
    import torch
    checkpoint = torch.load(path, weights_only=False)
    momentum = checkpoint['optimizer']['state']
    return dict(
        **{f'model.{key}': value for key, value in checkpoint['state_dict'].items()},
        **{f'ema.{key}': value for key, value in checkpoint['state_dict_ema'].items()},
        **{f'momentum.{key}': value['momentum_buffer'] for key, value in momentum.items()},
    )


def contents(folder):
    """Every file in a folder but the log of a run."""
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file() and path.name != 'log.txt'}


def _die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def _interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)


class _Shutdown:
    """As workers of a loader are shut down: what is raised there is printed and forgotten."""

    def __del__(self):
        _interrupt()
        time.sleep(0)  # here it is raised


def _terminate(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def _patch(owner, name, count, before=None, after=None, only=lambda *args: True):
    """At the so-and-so-many-th call that counts, do something before or after it."""
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        due = only(*args) and (calls.append(1) or len(calls) == count)
        if due and before is not None:
            before(*args)
        result = function(*args, **kwargs)
        if due and after is not None:
            after(*args)
        return result
    setattr(owner, name, counted)


def _write_half(content, path):
    data = io.BytesIO()
    import torch
    torch.save(content, data)
    Path(path).write_bytes(data.getvalue()[:len(data.getvalue()) // 2])
    _die()


def _write_half_a_row(epoch, *args, **kwargs):
    _write_half_a_row.path.open('a').write(f'{epoch},2.')
    _die()


def _arm(point, count, folder, optimizer):
    """Let the process die at a point."""
    import timm.utils
    import torch

    from timm_rep.core import annealer
    from timm_rep.core.layers import AnnealedModule
    from timm_rep.train import snapshots
    from timm_rep.train.epochs import AnnealedEpochs

    last = Path(folder) / 'last.pth.tar'
    _write_half_a_row.path = Path(folder) / 'summary.csv'
    points = {
        'start': (timm.utils, 'CheckpointSaver', dict(before=_die)),
        'update': (getattr(torch.optim, optimizer), 'step', dict(before=_die)),
        'checkpoint half written': (torch, 'save', dict(before=_write_half)),
        'last unlinked': (os, 'unlink', dict(after=_die, only=lambda path, *args: Path(path) == last)),
        'checkpoint linked': (os, 'link', dict(after=_die)),
        'transition': (AnnealedModule, 'begin_time_step_', dict(after=_die)),
        'transition of the averaged weights': (annealer, 'begin_time_step', dict(after=_die)),
        'rate set': (annealer, 'set_attach_rate', dict(after=_die)),
        'snapshot half written': (snapshots, 'save', dict(before=lambda model, path, **kwargs: (
            path.with_name(f'.tmp-01234567.{path.name}').write_bytes(b'half'), _die()))),
        'snapshot not yet in place': (
            os, 'replace', dict(before=_die, only=lambda src, dst: 'time_step-' in str(dst))),
        'validation': (timm.utils, 'accuracy', dict(before=_die)),
        'summary half written': (timm.utils, 'update_summary', dict(before=_write_half_a_row)),
        'interrupted in training': (getattr(torch.optim, optimizer), 'step', dict(before=_interrupt)),
        'interrupted in validation': (timm.utils, 'accuracy', dict(before=_interrupt)),
        'interrupted in vain': (timm.utils, 'accuracy', dict(before=lambda *_: _Shutdown())),
        'terminated': (getattr(torch.optim, optimizer), 'step', dict(before=_terminate)),
        'last snapshot': (AnnealedEpochs, 'finish', dict(before=_die)),
    }
    owner, name, when = points[point]
    _patch(owner, name, count, **when)


def _child(argv, cwd, point, count, folder, optimizer, prepare):
    os.setsid()  # a group of its own, with all that it starts
    os.chdir(cwd)
    log = os.open('log.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from timm_rep.train import main
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    if point is not None:
        _arm(point, count, folder, optimizer)
    main(argv, prog='train.py')


def start(cwd, argv, point=None, count=1, folder='output/train/run', optimizer='SGD', prepare=None):
    """Start the wrapper in a process that will go to its end, or to the point where it dies; ``finish`` waits for it.

    Args:
        prepare: Called first, in that process.
    """
    process = CONTEXT.Process(
        target=_child, args=([str(a) for a in argv], str(cwd), point, count, folder, optimizer, prepare))
    process.start()
    return process


def finish(process, cwd):
    """Exit code of a process, and what was printed."""
    process.join(TIMEOUT)
    timed_out = process.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # workers that would wait for a killed process forever
    log = Path(cwd) / 'log.txt'
    said = log.read_text() if log.exists() else ''
    if timed_out:
        raise TimeoutError(f'the run did not end in {TIMEOUT} s: {said[-2000:]}')
    return process.exitcode, said


def run(cwd, argv, point=None, count=1, folder='output/train/run', optimizer='SGD'):
    """Run the wrapper to its end, or to the point where it dies.

    Returns:
        Exit code, and what was printed.
    """
    return finish(start(cwd, argv, point, count, folder, optimizer), cwd)
