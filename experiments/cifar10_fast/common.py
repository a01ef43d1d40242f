"""What the scripts share: arguments, files that are written whole, runs that several processes share out."""
import argparse
import contextlib
import fcntl
import json
import os
import sys
import time
from pathlib import Path

import torch

SET_ASIDE = 5000
GRID_SEED = 1000  # of the choice of learning rates; not among the seeds of a comparison
WAIT_SECONDS = 3
EXECUTIONS = ('eager', 'compiled', 'graphed')
SETTINGS = ('network', 'batch_size', 'momentum', 'weight_decay', 'warmup', 'amp', 'set_aside')


def add_arguments(parser, networks):
    """Arguments of both scripts."""
    parser.add_argument('--data', type=Path, required=True, metavar='DIR')
    parser.add_argument('--output', type=Path, required=True, metavar='DIR')
    parser.add_argument('--network', choices=list(networks), default='small')
    parser.add_argument('--seeds', type=int, default=12)
    parser.add_argument('--few-seeds', type=int, default=4, help='seeds of the few')
    parser.add_argument('--batch-size', type=int, default=500)
    parser.add_argument('--momentum', type=float, default=0.9, help="Nesterov's")
    parser.add_argument('--weight-decay', type=float, default=5e-4, help='not of norms, scales and biases')
    parser.add_argument('--warmup', type=float, default=0.15, help='of the learning rate, share of the steps')
    parser.add_argument('--amp', action=argparse.BooleanOptionalAction, default=True, help='bfloat16')
    parser.add_argument('--set-aside', type=int, default=SET_ASIDE, help='training images to choose the rate by')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--execution', choices=EXECUTIONS, default='eager', help='of a step; graphed is a CUDA graph')
    parser.add_argument('--threads', type=int, default=1)


def check_arguments(parser, args):
    if not (args.data / 'train').is_dir() or not (args.data / 'test').is_dir():
        parser.error(f'{args.data} has no folders train and test')


# Files


@contextlib.contextmanager
def at_once(path):
    """Where to write a file that is then there at once or not at all."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    yield temporary
    temporary.replace(path)


def write(path, content):
    with at_once(path) as temporary:
        temporary.write_text(json.dumps(content) + '\n')


def save(path, tensors):
    with at_once(path) as temporary:
        torch.save(tensors, temporary)


def read(path):
    return json.loads(path.read_text()) if path.exists() else None


def hidden_folder(output, name):
    """A folder in the output that is nobody's result."""
    folder = output / name
    folder.mkdir(exist_ok=True)
    (folder / '.gitignore').write_text('*\n')
    return folder


@contextlib.contextmanager
def claimed(output, name, file=None):
    """Whether this process may do a run: nobody else is about it, and it is not done. A dead process claims nothing.

    Args:
        output: Folder of the runs.
        name: Name of the run.
        file: The file that it leaves there, if that is not NAME.json.
    """
    with (hidden_folder(output, '.claims') / name).open('w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not (output / (file or f'{name}.json')).exists()
        # The lock goes with the file, by whatever way the process ends.


def claim_folder(output, settings):
    """Make the output folder, or check that it holds runs of the same settings."""
    output.mkdir(parents=True, exist_ok=True)
    found = read(output / 'settings.json')
    if found is None:
        write(output / 'settings.json', settings)
    elif found != settings:
        other = [f'{key} is {found.get(key)!r} there and {settings.get(key)!r} here'
                 for key in {**found, **settings} if found.get(key) != settings.get(key)]
        sys.exit(f'error: {output} holds runs of other settings: {"; ".join(other)}. Take another --output')


# Runs


def best_rate(found):
    """The learning rate of the run with the best accuracy on the images set aside, or None as long as runs are missing.

    Args:
        found: What the files of all runs of a grid hold, None for one that is missing.
    """
    return None if None in found else max(found, key=lambda run: (not run['diverged'], run['top1']))['lr']


def share_out(output, plan, do):
    """Do all runs that are missing; wait for those that others are about.

    Args:
        output: Folder of the runs.
        plan: Gives the runs that can be told today, in order, and whether these are all. A run has a `name`, and a
            `file` that it leaves in the folder.
        do: Does a run and writes its file.
    """
    while True:
        runs, all_told = plan()
        missing = [run for run in runs if not (output / run.file).exists()]
        if not missing and all_told:
            return
        for run in missing:
            with claimed(output, run.name, run.file) as mine:
                if mine:
                    do(run)
                    break  # and plan anew
        else:
            time.sleep(WAIT_SECONDS)
