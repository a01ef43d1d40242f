"""Train with timm's own script in two processes on one CPU, as torchrun starts them, and keep what each of them has."""
import functools
import os
import socket

from interrupted_run import finish, start


def _prepare(environment, folder):
    """Become one process of two."""
    import torch
    from torch.nn import parallel

    from timm_rep.core.annealer import Annealer
    from timm_rep.train.epochs import AnnealedEpochs

    os.environ.update(environment)

    class OnOneCPU(parallel.DistributedDataParallel):
        """DDP takes no device ids on a CPU; timm's script gives it some on any device."""

        def __init__(self, module, device_ids=None, **kwargs):
            super().__init__(module, **kwargs)

    parallel.DistributedDataParallel = OnOneCPU
    begin_epoch = Annealer.begin_epoch
    around = AnnealedEpochs.around

    def keep(annealer, when):
        state = {f'{number}.{key}': value for number, form in enumerate(annealer._forms)
                 for key, value in form.state_dict().items()}
        torch.save(state, f'{folder}/{when}-{environment["RANK"]}.pth')

    def begin(annealer, epoch):
        position = begin_epoch(annealer, epoch)
        keep(annealer, f'begin-{epoch}')
        return position

    def with_end(epochs, train_one_epoch):
        epoch_of = around(epochs, train_one_epoch)

        @functools.wraps(epoch_of)
        def epoch(*args, **kwargs):
            metrics = epoch_of(*args, **kwargs)
            keep(epochs._annealer, f'end-{args[0]}')
            return metrics

        return epoch

    Annealer.begin_epoch = begin
    AnnealedEpochs.around = with_end


def train(cwd, argv, point=None, count=1):
    """Run the wrapper in two processes.

    Returns:
        Their exit codes, what was printed, and the folder with what they had when epochs began and ended.
    """
    states = cwd / 'states'
    states.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    together = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    processes = []
    for rank in '01':
        prepare = functools.partial(_prepare, dict(together, RANK=rank, LOCAL_RANK=rank), str(states))
        processes.append(start(cwd, argv, point, count, prepare=prepare))
    ends = [finish(process, cwd) for process in processes]
    return [code for code, _ in ends], ends[-1][1], states
