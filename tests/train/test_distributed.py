"""Two processes that train together, with timm's own script."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from helpers import assert_same_state
from interrupted_run import MODEL, rows
from two_processes import train

import timm_rep

EPOCHS = 4
UPDATES = 2  # of an epoch, for each process


def model_of(path):
    """The model's part of what a process had: timm's averaged copies start from other weights in every process."""
    return {key: value for key, value in torch.load(path).items() if key.startswith('0.')}


def test_two_processes_stay_the_same_and_resume(timm_scripts, photos, settled, tmp_path):
    argv = [
        '--timm-scripts', timm_scripts, '--model', MODEL, '--time-steps', 2, '--epochs', EPOCHS // 2,
        '--attach-warmup-epochs', 1, '--warmup-epochs', 0, '--lr', 1e-3, '--data-dir', photos, '--batch-size', 5,
        '--workers', 1, '--device', 'cpu', '--img-size', 16, '--num-classes', 5, '--model-ema',
        '--model-ema-decay', 0.9, '--crop-padding', 2, '--initial-checkpoint', settled, '--restoration', 'measured',
        '--side-gain', 0, '--freeze-origin', '--start-from-best', '--experiment', 'run',
    ]
    codes, log, states = train(tmp_path, argv)
    assert codes == [0, 0], log
    assert [int(row['train_time_step']) for row in rows(tmp_path / 'output/train/run/summary.csv')] == [0, 0, 1, 1]
    for epoch in range(EPOCHS):
        assert_same_state(*(model_of(states / f'begin-{epoch}-{rank}.pth') for rank in '01'))
    codes, log, again = train(tmp_path / 'again', argv, 'update', EPOCHS // 2 * UPDATES + 1)
    assert codes[0] == -signal.SIGKILL, log
    codes, log, again = train(tmp_path / 'again', [*argv, '--resume', 'auto'])
    assert codes == [0, 0], log
    last = f'end-{EPOCHS - 1}'
    assert_same_state(*(torch.load(folder / f'{last}-0.pth') for folder in (again, states)))
    assert_same_state(*(model_of(folder / f'{last}-1.pth') for folder in (again, states)))


# Python imports a module of this name when it starts: DDP takes no device ids on a CPU, and timm's script gives it some.
ON_ONE_CPU = """
from torch.nn import parallel


class OnOneCPU(parallel.DistributedDataParallel):
    def __init__(self, module, device_ids=None, **kwargs):
        super().__init__(module, **kwargs)


parallel.DistributedDataParallel = OnOneCPU
"""


def test_torchrun(timm_scripts, photos, tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(ON_ONE_CPU)
    path = os.pathsep.join([str(tmp_path), str(Path(timm_rep.__file__).parents[1]), *sys.path])
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, '-m', 'timm_rep.train',
        '--timm-scripts', timm_scripts, '--model', 'orepa_repvgg_a0_cifar', '--time-steps', 2, '--epochs', 1,
        '--warmup-epochs', 0, '--data-dir', photos, '--batch-size', 5, '--grad-accum-steps', 2, '--workers', 0,
        '--device', 'cpu', '--img-size', 16, '--num-classes', 5, '--experiment', 'run',
    ]
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS='1'),
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 'total 2' in done.stderr + done.stdout
    assert [int(row['train_time_step']) for row in rows(tmp_path / 'output/train/run/summary.csv')] == [0, 1]
