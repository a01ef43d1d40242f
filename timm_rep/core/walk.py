"""Finding things in a model: rep layers, what stands beside and around a module, its image channels."""
import contextlib
import copy
import gc
import itertools
import types
import weakref
from typing import Any, Dict, FrozenSet, Iterator, List, Optional, Set, Tuple, TypeVar

import torch
import torch.nn as nn
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from .errors import UserError
from .layers import AnnealedModule, AnnealedRepVggBlock, FoldedNorm, HostedConv2d, NormedRepLayer, RepLayer
from .layers.annealed import check_attach_rate
from .layers.norms import is_norm

__all__ = [
    'HOOKS', 'SECOND_PLACE', 'ModelT', 'ancestors_of', 'annealed_modules', 'check_generator', 'check_module',
    'compiled_parts', 'computed_tensors', 'conv_name', 'copied', 'folded_norms', 'held_elsewhere', 'image_channels',
    'image_shape', 'move_hooks', 'names_of', 'next_sibling', 'norm_behind', 'parent_of', 'reads_between', 'rep_layers',
    'set_attach_rate', 'unwrapped', 'without_compiled_parts',
]

ModelT = TypeVar('ModelT', bound=nn.Module)

# Modules whose ``module`` is the network.
WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel, ModelEmaV2, ModelEmaV3)

HOOKS = (
    '_forward_hooks', '_forward_hooks_with_kwargs', '_forward_hooks_always_called', '_forward_pre_hooks',
    '_forward_pre_hooks_with_kwargs', '_backward_hooks', '_backward_pre_hooks', '_is_full_backward_hook',
)
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
OWN_PACKAGE = __name__.partition('.')[0]
# An attribute may hold a data set, or all of a trainer.
MAX_OBJECTS = 10_000
WITHOUT_MODULES = (
    str, bytes, int, float, complex, type(None), type, types.ModuleType, types.FrameType, types.CodeType, torch.Tensor)
SECOND_PLACE = 'a second place that is no registered module (a list, an object, a bound method or the like)'


def check_module(model: Any) -> None:
    """Raise a UserError if this is no module."""
    if not isinstance(model, nn.Module):
        got = repr(model) if isinstance(model, str) else f'an object of {type(model).__name__}'
        raise UserError(
            f'a model (torch.nn.Module) is needed, got {got}; timm.create_model makes one of a name, timm_rep.load of '
            'a file')


def check_generator(generator: Any) -> None:
    """Raise a UserError if this is no source of a draw."""
    if not isinstance(generator, (torch.Generator, type(None))):
        raise UserError(
            f'generator takes a torch.Generator, got {generator!r}; with a seed it is torch.Generator().manual_seed(0)')


def unwrapped(model: Any) -> Any:
    """The network inside DDP, DataParallel, torch.compile and averaged copies, however nested.

    Args:
        model: Any module.

    Returns:
        The module itself if it is no such wrapper.

    Raises:
        UserError: If it is no module.
    """
    check_module(model)
    while hasattr(model, '_orig_mod') or isinstance(model, WRAPPERS):
        model = model._orig_mod if hasattr(model, '_orig_mod') else model.module
    return model


def compiled_parts(model: nn.Module) -> List[Tuple[nn.Module, str, nn.Module]]:
    """What stands for parts of a model since ``model.part = torch.compile(model.part)``: parent, name, and that."""
    return [
        (parent, name, part) for parent in model.modules() for name, part in parent._modules.items()
        if part is not None and hasattr(part, '_orig_mod')]


@contextlib.contextmanager
def without_compiled_parts(model: nn.Module) -> Iterator[None]:
    """Let a model have its parts as they were before torch.compile, under their own names."""
    compiled = compiled_parts(model)
    try:
        for parent, name, part in compiled:
            parent._modules[name] = unwrapped(part)
        yield
    finally:
        for parent, name, part in compiled:
            parent._modules[name] = part


def computed_tensors(model: nn.Module) -> List[Tensor]:
    """What hooks compute for the next forward and deepcopy refuses: kernels under pruning or weight norm."""
    attributes = itertools.chain.from_iterable(vars(module).values() for module in model.modules())
    return [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]


def copied(model: ModelT) -> ModelT:
    """A deep copy in the same mode, training or eval; that of a traced graph (torch.fx) would train."""
    twin = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed_tensors(model)})
    for old, new in zip(model.modules(), twin.modules()):
        new.training = old.training
    return twin


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let a module that takes the place of another have its hooks, and those of parts that both have.

    The handles of the hooks go on removing them.
    """
    parts = dict(old.named_modules())
    for name, part in new.named_modules():
        if name in parts:
            for hooks in HOOKS:
                setattr(part, hooks, getattr(parts[name], hooks))


def reads_between(model: nn.Module, name: str, norm_name: str) -> bool:
    """Whether something sees the output of a convolution before the norm behind it takes it.

    That is a hook, a feature map of timm's or torchvision's feature extractors, or another node of a traced graph.

    Args:
        model: Model around both.
        name: Name of the convolution.
        norm_name: Name of the norm.
    """
    conv, norm = model.get_submodule(name), model.get_submodule(norm_name)
    hooks: Any = (conv._forward_hooks, conv._backward_hooks, conv._backward_pre_hooks)
    hooks += (norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks)
    if any(hooks):
        return True
    parents = ancestors_of(model, name)
    if name.rpartition('.')[2] in getattr(parents[-1], 'return_layers', ()):
        return True
    for depth, parent in enumerate(parents):
        if isinstance(parent, torch.fx.GraphModule):
            here, behind = ('.'.join(full.split('.')[depth:]) for full in (name, norm_name))
            users = [user for node in parent.graph.nodes if node.target == here for user in node.users]
            return any(user.target != behind for user in users)
    return False


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
    check_module(model)
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

    Where something stands before that (TResNet folds space into channels), those that the model says. Elsewhere what it
    says may be out of date, and older timm does not keep them on the model.

    Args:
        model: CNN in training or stock form.

    Returns:
        Number of channels.
    """
    before = False
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, RepLayer)):
            said = getattr(model, 'in_chans', None)
            return said if before and isinstance(said, int) else module.in_channels
        before = before or not list(module.children())
    raise UserError(f'{type(model).__name__} has no convolution that could take images')


def image_shape(model: nn.Module) -> Optional[Tuple[int, int, int]]:
    """Channels, height and width of the images that a model of timm was made for; None if it does not say them.

    Of one that was built with another ``img_size`` that, which timm leaves out of its ``pretrained_cfg``.

    Args:
        model: CNN in training or stock form.
    """
    cfg: Any = getattr(model, 'pretrained_cfg', None) or {}
    if 'input_size' not in cfg:
        return None
    built: Any = getattr(model, '_model_args', {}).get('img_size')
    height, width = cfg['input_size'][1:] if built is None else (built, built) if isinstance(built, int) else built
    return image_channels(model), height, width


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


def norm_behind(model: nn.Module, name: str, channels: int) -> Tuple[str, Optional[nn.Module]]:
    norm_name, norm = next_sibling(model, name)
    return (norm_name, norm) if is_norm(norm, channels) else ('', None)


def conv_name(model: nn.Module, name: str) -> str:
    """Name of the convolution that a rep layer stands for: the layer's own, or that of the host around it."""
    parent, _, child = name.rpartition('.')
    return parent if child == 'layer' and isinstance(model.get_submodule(parent), HostedConv2d) else name


def folded_norms(model: nn.Module) -> Dict[str, Tuple[str, FoldedNorm]]:
    """What holds the place of the norm that each rep layer has taken in.

    Args:
        model: Model with rep layers.

    Returns:
        Name and module, by the layer's name; layers without are missing. It is the next child of the same module,
        unless the layer remembers another one.
    """
    names = names_of(model)
    found: Dict[str, Tuple[str, FoldedNorm]] = {}
    for name, layer in rep_layers(model):
        if not isinstance(layer, NormedRepLayer):
            continue
        if layer.far_norm is not None:
            if id(layer.far_norm[0]) in names:  # not outside of the part of a model that this is
                found[name] = names[id(layer.far_norm[0])][0], layer.far_norm[0]
        elif conv_name(model, name):
            sibling, behind = next_sibling(model, conv_name(model, name))
            if isinstance(behind, FoldedNorm) and not behind.is_far:
                found[name] = sibling, behind
    return found


def held_elsewhere(model: nn.Module) -> FrozenSet[int]:
    """Modules that lie in other attributes of a model's modules, by id: where they are swapped, those keep the old one.

    Our own layers and annealers remember modules as well, but know what they are.
    """
    return frozenset(
        id(held) for module in model.modules() if not isinstance(module, AnnealedModule)
        for name, value in vars(module).items() if name not in OF_EVERY_MODULE
        for held in _modules_in(value) if held is not module)


def _modules_in(value: Any) -> Iterator[nn.Module]:
    """Modules that an attribute holds: itself, in lists, objects and the like, or as what a function is bound to."""
    seen: Set[int] = set()
    to_do = [value]
    while to_do and len(seen) < MAX_OBJECTS:
        value = to_do.pop()
        if id(value) in seen or isinstance(value, WITHOUT_MODULES):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            yield unwrapped(value)
        elif isinstance(value, weakref.ref):
            to_do.append(value())
        elif isinstance(value, types.FunctionType):  # beside them it refers to all of its file
            to_do += [*(value.__closure__ or ()), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        elif type(value).__module__.partition('.')[0] != OWN_PACKAGE:
            to_do += gc.get_referents(value)


def names_of(model: nn.Module) -> Dict[int, List[str]]:
    """All names of every module, by its id: a shared one has several."""
    names: Dict[int, List[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def ancestors_of(model: nn.Module, name: str) -> List[nn.Module]:
    parents = name.split('.')[:-1]
    return [model.get_submodule('.'.join(parents[:n])) for n in range(len(parents) + 1)]
