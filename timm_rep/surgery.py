"""The one module walker: put rep layers into a model, and take them out again."""
import copy
import fnmatch
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple, Type, TypeVar, Union

import timm
import torch
import torch.nn as nn
from timm.models.byobnet import RepVggBlock
from timm.models.resnet import BasicBlock

from .layers import (
    AnnealedModule,
    AnnealedRepVggBlock,
    AsymmetricConv2d,
    BranchedRepLayer,
    DiverseBranchConv2d,
    FoldedNorm,
    LinearRepLayer,
    OrepaConv2d,
    OrepaPointwiseConv2d,
    OrepaStemConv2d,
    RepConv2d,
    RepLayer,
)
from .layers.base import check_attach_rate

__all__ = [
    'BRANCHED_LAYERS',
    'LAYERS',
    'Select',
    'anneal_repvgg_blocks_',
    'annealed_modules',
    'check_layer',
    'expand',
    'expand_fresh_',
    'fuse',
    'image_channels',
    'next_sibling',
    'rep_layers',
    'set_attach_rate',
    'stock_architecture',
]

# Kinds of layers with a norm in every branch.
BRANCHED_LAYERS: Dict[str, Type[BranchedRepLayer]] = dict(dbb=DiverseBranchConv2d, acb=AsymmetricConv2d, rep=RepConv2d)
LAYERS = ('orepa', *BRANCHED_LAYERS)
# Kernels of this size and larger become a stack of 3x3 blocks in ungrouped stems (official code).
STEM_KERNEL_SIZE = 7
# Prefixes of our architectures whose stock form is the timm architecture named behind it.
TRAINING_PREFIXES = ('orepa_', 'dbb_', 'repan_')

ModelT = TypeVar('ModelT', bound=nn.Module)


def check_layer(layer: str) -> None:
    """Raise a ValueError if this is no kind of rep layer."""
    if layer not in LAYERS:
        raise ValueError(f'unknown layer {layer!r}; allowed are {", ".join(map(repr, LAYERS))}')
Select = Union[None, Callable[[str, nn.Conv2d], bool], Iterable[str]]


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
        ValueError: For a rate outside [0, 1].
    """
    check_attach_rate(rate)
    for _, module in annealed_modules(model):
        module.set_attach_rate_(rate)


def anneal_repvgg_blocks_(model: ModelT) -> ModelT:
    """Give the RepVGG blocks of a model an attach rate, in place; outputs stay the same.

    Args:
        model: Model with timm's RepVGG blocks, with or without rep layers in their KxK branches.

    Returns:
        The model.

    Raises:
        ValueError: For a block alone, or in deploy form. The model is then unchanged.
    """
    if type(model) is RepVggBlock:
        raise ValueError('a model around the block is needed; for one alone use AnnealedRepVggBlock(block)')
    modules = model.named_modules(remove_duplicate=False)
    places = [(name, module) for name, module in modules if type(module) is RepVggBlock]
    annealed = {id(block): AnnealedRepVggBlock(block) for _, block in places}  # a shared block stays shared
    for name, block in places:
        setattr(*_parent(model, name), annealed[id(block)])
    return model


def image_channels(model: nn.Module) -> int:
    """Channels of the images that a CNN takes: the input channels of its first convolution.

    Older timm does not keep them on the model.

    Args:
        model: CNN in training or stock form.

    Returns:
        Number of channels.
    """
    return next(m.in_channels for m in model.modules() if isinstance(m, (nn.Conv2d, RepLayer)))


def stock_architecture(architecture: str) -> str:
    """Name of the timm architecture that a fused model of ours is.

    Args:
        architecture: Name of a registered architecture.

    Returns:
        The name without our prefix if timm has that architecture, else the name itself.
    """
    for prefix in TRAINING_PREFIXES:
        if architecture.startswith(prefix) and timm.is_model(architecture[len(prefix):]):
            return architecture[len(prefix):]
    return architecture


def _parent(model: nn.Module, name: str) -> Tuple[nn.Module, str]:
    parent, _, child = name.rpartition('.')
    return model.get_submodule(parent), child


def next_sibling(model: nn.Module, name: str) -> Tuple[str, Optional[nn.Module]]:
    parent_name, _, child = name.rpartition('.')
    siblings = list(model.get_submodule(parent_name).named_children())
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


def _ancestors(model: nn.Module, name: str) -> List[nn.Module]:
    parents = name.split('.')[:-1]
    return [model.get_submodule('.'.join(parents[:n])) for n in range(len(parents) + 1)]


def _orepa_layer(model: nn.Module, name: str, conv: nn.Conv2d) -> Tuple[Type[LinearRepLayer], Dict[str, Any]]:
    if _in_repvgg_block(model, name) and conv.kernel_size != (1, 1):
        return OrepaConv2d, dict(branch_1x1=False, negative_slope=1.0)
    height, width = conv.kernel_size
    if conv.kernel_size == (1, 1):
        return OrepaPointwiseConv2d, {}
    if height == width and height >= STEM_KERNEL_SIZE and conv.groups == 1:
        return OrepaStemConv2d, {}
    return OrepaConv2d, {}


def _select_orepa(model: nn.Module, name: str, conv: nn.Conv2d) -> bool:
    """OREPA's policy: convolutions before a batch norm; only the KxK of RepVGG blocks; no BasicBlock shortcuts."""
    if norm_behind(model, name, conv.out_channels)[1] is None:
        return False
    if _in_repvgg_block(model, name):
        return name.endswith('conv_kxk.conv')
    if any(isinstance(module, BasicBlock) for module in _ancestors(model, name)):
        return 'downsample' not in name.split('.')
    return True


def _in_repvgg_block(model: nn.Module, name: str) -> bool:
    return any(isinstance(module, RepVggBlock) for module in _ancestors(model, name))


def _select_branched(model: nn.Module, name: str, conv: nn.Conv2d) -> bool:
    """Policy for layers with norms (DBB's): 3x3 to 5x5 convolutions with a batch norm behind them."""
    if not FoldedNorm.accepts(norm_behind(model, name, conv.out_channels)[1]):
        return False
    return 1 < min(conv.kernel_size) and max(conv.kernel_size) < STEM_KERNEL_SIZE


def _supported(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == 'zeros' and all(size % 2 for size in conv.kernel_size)


def _selected(model: nn.Module, layer: str, select: Select) -> Dict[str, nn.Conv2d]:
    convs = {
        name: module for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Conv2d and not any(isinstance(m, RepLayer) for m in _ancestors(model, name))
    }
    if select is None:
        policy = _select_orepa if layer == 'orepa' else _select_branched
        return {
            name: conv for name, conv in convs.items()
            if _supported(conv) and policy(model, name, conv) and not (layer == 'rep' and _in_repvgg_block(model, name))
        }
    if callable(select):
        return {name: conv for name, conv in convs.items() if select(name, conv)}
    patterns = [select] if isinstance(select, str) else list(select)
    for pattern in patterns:
        if not fnmatch.filter(convs, pattern):
            raise ValueError(f'select: no nn.Conv2d of {type(model).__name__} matches {pattern!r}')
    return {name: conv for name, conv in convs.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}


def expand(
        model: ModelT,
        layer: str = 'orepa',
        *,
        select: Select = None,
        generator: Optional[torch.Generator] = None,
        inplace: bool = False,
) -> ModelT:
    """Swap plain convolutions for rep layers with the same function.

    The outputs stay the same: in eval mode for all layers, in training mode too for linear ones (``'orepa'``).

    A norm counts as right behind a convolution if it is the next child of the same module. Layers other than
    ``'orepa'`` take that norm in, so in a network that declares its modules in another order than it runs them, select
    by hand.

    Args:
        model: Any CNN.
        layer: ``'orepa'`` (KxK, 1x1 or stem layer, as the kernel asks for), ``'dbb'`` (diverse branches), ``'acb'``
            (KxK, 1xK and Kx1) or ``'rep'`` (KxK, 1x1 and identity). All but the first give RepVGG's blocks an attach
            rate for their own branches, too; for ``'rep'`` that is all, since the blocks are that already.
        select: Which convolutions: a function of name and convolution, or names with wildcards. By default those with
            a batch norm right behind them: for ``'orepa'`` all sizes, but of a RepVGG block only the KxK branch and not
            the shortcuts of a ResNet BasicBlock; for the others 3x3 and 5x5.
        generator: Source of the side branches' draw.
        inplace: Change the model itself instead of a copy.

    Returns:
        The model with rep layers.

    Raises:
        ValueError: For an unknown layer, if nothing is selected, or if a selected convolution is not supported. The
            model is then unchanged.
    """
    return _swap(model, layer, select, generator, inplace, same_function=True)


def expand_fresh_(model: ModelT, layer: str, generator: Optional[torch.Generator] = None) -> ModelT:
    """Swap the convolutions of a new model for freshly drawn rep layers, in place: the start of a training.

    Args:
        model: Newly built stock model.
        layer: As in :func:`expand`.
        generator: Source of the draw.

    Returns:
        The model.
    """
    return _swap(model, layer, None, generator, inplace=True, same_function=False)


def _swap(
        model: ModelT,
        layer: str,
        select: Select,
        generator: Optional[torch.Generator],
        inplace: bool,
        same_function: bool,
) -> ModelT:
    check_layer(layer)
    selected = _selected(model, layer, select)
    whole_blocks = layer in BRANCHED_LAYERS and (
        any(_in_repvgg_block(model, name) for name in selected)
        or (layer == 'rep' and select is None and any(type(m) is RepVggBlock for m in model.modules()))
    )
    if not selected and not whole_blocks:
        raise ValueError(f'no convolution of {type(model).__name__} to expand with {layer!r}')
    if '' in selected:
        raise ValueError("expand needs a model around the convolution; for one alone use the layer's from_conv()")

    # Build all layers before the first is put in, so that an error leaves the model as it was.
    built: Dict[int, RepLayer] = {}
    norms: Dict[int, Tuple[nn.BatchNorm2d, FoldedNorm]] = {}
    folded: Dict[str, FoldedNorm] = {}
    for name, conv in selected.items():
        layer_cls: Type[RepLayer]
        if layer in BRANCHED_LAYERS:
            norm_name, norm = norm_behind(model, name, conv.out_channels)
            if norm is None or not FoldedNorm.accepts(norm):
                raise ValueError(f'{layer!r} needs a plain BatchNorm2d right behind the convolution; {name} has none')
            if conv.bias is not None:
                raise ValueError(f'{layer!r} needs a convolution without bias; {name} has one')
            first_norm, folded[norm_name] = norms.setdefault(id(conv), (norm, FoldedNorm(norm)))
            if norm is not first_norm:
                raise ValueError(f'{layer!r} takes the norm in; {name} is shared by places with other norms')
            layer_cls, kwargs = BRANCHED_LAYERS[layer], dict(norm=norm)
        else:
            layer_cls, kwargs = _orepa_layer(model, name, conv)
        if id(conv) not in built:
            build = layer_cls.from_conv if same_function else layer_cls.for_conv
            try:
                built[id(conv)] = build(conv, generator=generator, **kwargs)
            except ValueError as e:
                raise ValueError(f'cannot expand {name}: {e}') from None
    replacements = {name: built[id(conv)] for name, conv in selected.items()}

    if not inplace:
        model = copy.deepcopy(model)
    for name, new_layer in replacements.items():
        setattr(*_parent(model, name), new_layer)
    for name, placeholder in folded.items():
        setattr(*_parent(model, name), placeholder)
    return anneal_repvgg_blocks_(model) if whole_blocks else model


def fuse(model: ModelT, *, inplace: bool = False) -> ModelT:
    """Turn a rep model into its stock form: plain convolutions, live norms, the module tree and keys of timm's model.

    To fold the norms (and RepVGG's branches) too, call ``timm.utils.reparameterize_model`` on the result.

    Args:
        model: Model with rep layers; without any, it comes back unchanged.
        inplace: Change the model itself instead of a copy.

    Returns:
        The fused model. If its architecture is one of ours with a stock counterpart, its ``pretrained_cfg`` names that.

    Raises:
        RuntimeError: For layers with norms in their branches in training mode. The model is then unchanged.
    """
    replacements: Dict[str, nn.Module] = {}
    for name, module in annealed_modules(model):
        if name == '':
            raise ValueError("fuse needs a model around the layer; for one alone use the layer's own fuse()")
        if isinstance(module, AnnealedRepVggBlock):
            replacements[name] = module.stock_block()
            continue
        assert isinstance(module, RepLayer)
        if isinstance(module, BranchedRepLayer):
            norm_name, folded = next_sibling(model, name)
            if isinstance(folded, FoldedNorm):
                replacements[name], norm = module.fuse_conv_norm()
                replacements[norm_name] = folded.unfolded(norm)
                continue
        replacements[name] = module.fuse()
    if not inplace:
        model = copy.deepcopy(model)
    # A shared layer is one module in several places.
    places: Dict[int, List[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    for name, new_module in replacements.items():
        for place in places[id(model.get_submodule(name))]:
            setattr(*_parent(model, place), new_module)
    _name_stock_architecture(model)
    return model


def _name_stock_architecture(model: Any) -> None:
    """Let the model's own metadata, which exports and reloads go by, name what it is now."""
    cfg = getattr(model, 'pretrained_cfg', None)
    architecture = cfg.get('architecture', '') if isinstance(cfg, dict) else ''
    if not isinstance(cfg, dict) or not architecture.startswith(TRAINING_PREFIXES):
        return
    own_args = ('inference_mode', 'rep_layer')
    args = {key: value for key, value in getattr(model, '_model_args', {}).items() if key not in own_args}
    stock = stock_architecture(architecture)
    if stock == architecture:  # timm has no such network: ours, in stock form
        model._model_args = dict(args, inference_mode=True)
        return
    model._model_args = args
    stock_cfg = timm.get_pretrained_cfg(stock)
    first_conv = stock_cfg.first_conv if stock_cfg else cfg.get('first_conv')
    model.pretrained_cfg = model.default_cfg = dict(cfg, architecture=stock, first_conv=first_conv)
    model._traits = dict(getattr(model, '_traits', {}), first_conv=first_conv)
