"""Cut the side branches of least importance out of a model while it trains (RepNAS)."""
from typing import Dict, List, Tuple

from torch.nn.parallel import DistributedDataParallel

from .errors import UserError
from .layers import RepNas, RepNasConv2d
from .sharded import check_whole
from .walk import ModelT, rep_layers, unwrapped

__all__ = ['prune_branches']


def prune_branches(model: ModelT, keep: float) -> ModelT:
    """Cut the side branches with the least importance, in place; training goes on with those that stay.

    The function stays the same at the attach rate in force, in training mode too: what the cut branches add goes into
    the origin. The importances are new parameters and the cut branches have none, so make a new optimizer, and wrap the
    network in DistributedDataParallel anew. An averaged copy is pruned by copying the pruned model.

    Args:
        model: Model with ``'repnas'`` layers.
        keep: Share of the side branches there are now, of all these layers together, that stay, in [0, 1]; rounded up.

    Returns:
        The model.

    Raises:
        UserError: For a share outside [0, 1], or a model without such layers, sharded, or in
            DistributedDataParallel. The model is then unchanged.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 <= keep <= 1:
        raise UserError(f'keep must be a share of the side branches in [0, 1], got {keep!r}')
    check_whole(model)
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise UserError(
            'prune the network inside DistributedDataParallel, model.module, and wrap it anew: the wrapper goes on '
            'with the parameters that it knows')
    layers: Dict[str, RepNasConv2d] = {
        name: layer for name, layer in rep_layers(unwrapped(model)) if isinstance(layer, RepNasConv2d)}
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no layers whose branches have an importance; expand it with 'repnas'")
    ranked: List[Tuple[float, str, str]] = sorted(
        (importance, name, branch)
        for name, layer in layers.items() for branch, importance in layer.importances().items())
    cut = ranked[:int(len(ranked) * (1 - keep) + 1e-9)]
    for name, layer in layers.items():
        branches = [branch for _, of, branch in cut if of == name]
        if branches:
            layer.cut_branches_(branches)
            layer.method = RepNas.of_layer(layer)
    return model
