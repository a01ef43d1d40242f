"""Parameters that fully_shard (FSDP2) has spread over processes."""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Tuple

import torch
import torch.nn as nn

from .errors import UserError

__all__ = ['check_whole', 'is_sharded', 'reshard', 'whole_parameters']


def _sharded(module: nn.Module) -> List[Tuple[nn.Module, str, Any]]:
    """Owner, name and tensor of all parameters that are spread over processes."""
    return [
        (owner, name, parameter) for owner in module.modules() for name, parameter in owner._parameters.items()
        if hasattr(parameter, 'full_tensor')
    ]


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of a model are spread over processes."""
    return bool(_sharded(model))


def check_whole(model: nn.Module) -> None:
    """Raise a UserError if parameters of a model are spread over processes."""
    if is_sharded(model):
        raise UserError(
            'the parameters are spread over processes (fully_shard). Take the whole weights, on all processes, with '
            'torch.distributed.checkpoint.state_dict.get_model_state_dict(model, '
            'options=StateDictOptions(full_state_dict=True, cpu_offload=True)), and load them into a model made anew')


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that a forward has left behind: what is written to them would be lost."""
    module: Any
    for module in model.modules():
        if hasattr(module, 'set_requires_gradient_sync') and hasattr(module, 'reshard'):
            module.reshard()


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Context in which the parameters of a module are whole; what is written to them goes into the shards at its end.

    All processes enter it together. Modules that are not sharded stay as they are.

    Args:
        module: The module, with what it holds.
    """
    sharded = _sharded(module)
    whole: Dict[int, nn.Parameter] = {}
    for owner, name, parameter in sharded:
        if id(parameter) not in whole:
            whole[id(parameter)] = nn.Parameter(parameter.full_tensor().detach(), parameter.requires_grad)
        owner._parameters[name] = whole[id(parameter)]
    try:
        yield
    finally:
        for owner, name, parameter in sharded:
            owner._parameters[name] = parameter
    if sharded:
        from torch.distributed.tensor import distribute_tensor  # slow to import
        with torch.no_grad():
            for parameter in {id(parameter): parameter for _, _, parameter in sharded}.values():
                written = distribute_tensor(whole[id(parameter)].detach(), parameter.device_mesh, parameter.placements)
                parameter.copy_(written)
