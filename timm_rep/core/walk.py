"""Finding things in a model: rep layers, what stands beside and around a module, its image channels."""
from typing import Iterator, List, Optional, Set, Tuple

import torch.nn as nn

from .errors import UserError
from .layers import AnnealedModule, AnnealedRepVggBlock, RepLayer
from .layers.base import check_attach_rate

__all__ = [
    'ancestors_of', 'annealed_modules', 'image_channels', 'next_sibling', 'norm_behind', 'parent_of', 'rep_layers',
    'set_attach_rate',
]


def rep_layers(model: nn.Module) -> Iterator[Tuple[str, RepLayer]]:
    """Walk over the rep layers of a model; the blocks inside a stem's stack are part of the stem.

    Args:
        model: Any module.

    Yields:
        Name and layer, in the model's order; a shared layer once.
    """
    for name, module in annealed_modules(model):
        if isinstance(module, RepLayer):
            yield name, module
        elif isinstance(module, AnnealedRepVggBlock) and isinstance(module.conv_kxk.conv, RepLayer):
            yield f'{name}.conv_kxk.conv' if name else 'conv_kxk.conv', module.conv_kxk.conv


def annealed_modules(model: nn.Module) -> Iterator[Tuple[str, AnnealedModule]]:
    """Walk over all that has side branches: rep layers, and RepVGG blocks with an attach rate as a whole.

    Args:
        model: Any module.

    Yields:
        Name and module, in the model's order; a shared module once.
    """
    yield from _walk(model, '', set())


def _walk(module: nn.Module, name: str, seen: Set[int]) -> Iterator[Tuple[str, AnnealedModule]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, AnnealedModule):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _walk(child, f'{name}.{child_name}' if name else child_name, seen)


def set_attach_rate(model: nn.Module, rate: float) -> None:
    """Set the attach rate of all side branches.

    Args:
        model: Model with rep layers.
        rate: Factor of the side branches, in [0, 1].

    Raises:
        UserError: For a rate outside [0, 1].
    """
    check_attach_rate(rate)
    for _, module in annealed_modules(model):
        module.set_attach_rate_(rate)


def image_channels(model: nn.Module) -> int:
    """Channels of the images that a CNN takes: the input channels of its first convolution.

    Older timm does not keep them on the model.

    Args:
        model: CNN in training or stock form.

    Returns:
        Number of channels.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, RepLayer)):
            return module.in_channels
    raise UserError(f'{type(model).__name__} has no convolution that could take images')


def parent_of(model: nn.Module, name: str) -> Tuple[nn.Module, str]:
    parent, _, child = name.rpartition('.')
    return model.get_submodule(parent), child


def next_sibling(model: nn.Module, name: str) -> Tuple[str, Optional[nn.Module]]:
    parent_name, _, child = name.rpartition('.')
    # not named_children(), which leaves out what it has named already: a shared activation lies between all the same
    modules = model.get_submodule(parent_name)._modules
    siblings = [(sibling, module) for sibling, module in modules.items() if module is not None]
    position = [sibling for sibling, _ in siblings].index(child) + 1
    if position >= len(siblings):
        return '', None
    sibling, module = siblings[position]
    return f'{parent_name}.{sibling}' if parent_name else sibling, module


def norm_behind(model: nn.Module, name: str, channels: int) -> Tuple[str, Optional[nn.BatchNorm2d]]:
    norm_name, norm = next_sibling(model, name)
    if isinstance(norm, nn.BatchNorm2d) and norm.num_features == channels:
        return norm_name, norm
    return '', None


def ancestors_of(model: nn.Module, name: str) -> List[nn.Module]:
    parents = name.split('.')[:-1]
    return [model.get_submodule('.'.join(parents[:n])) for n in range(len(parents) + 1)]
