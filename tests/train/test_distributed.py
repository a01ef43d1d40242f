"""Two processes that train together, with timm's own script."""
import signal

import torch
from helpers import assert_same_state
from interrupted_run import MODEL, rows
from two_processes import train

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
