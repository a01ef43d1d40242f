"""Put rep layers into a model: which convolutions a method takes, and the swap."""
import logging
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn
from timm.models.byobnet import RepVggBlock
from torch.nn.parameter import is_lazy

from .errors import UserError
from .expansion import expansion_of
from .fuse import fuse_before_own_
from .layers import AnnealedRepVggBlock, FoldedNorm
from .layers.hosted import HOSTS, hosted
from .layers.norms import is_foldable
from .layers.rep import Rep
from .methods import Method, Place
from .selection import KXK_CONV, Methods, Network, Select, assign, repvgg_blocks, what_is_left, why_nothing
from .sharded import check_whole
from .walk import ModelT, check_generator, copied, move_hooks, names_of, next_sibling, parent_of, unwrapped

__all__ = ['Select', 'anneal_repvgg_blocks_', 'expand', 'expand_as_', 'expand_fresh_']

_logger = logging.getLogger(__name__)

BLOCK_ALONE = 'a model around the block is needed; for one alone use AnnealedRepVggBlock(block)'
# Less than this share of the convolutions' parameters is little for a method's own choice.
LITTLE = 0.1


def anneal_repvgg_blocks_(model: ModelT) -> ModelT:
    """Give the RepVGG blocks of a model an attach rate, in place; outputs stay the same.

    Args:
        model: Model with timm's RepVGG blocks, with or without rep layers in their KxK branches.

    Returns:
        The model.

    Raises:
        UserError: For a block alone, or in deploy form. The model is then unchanged.
    """
    if type(model) is RepVggBlock:
        raise UserError(BLOCK_ALONE)
    return _anneal_blocks_(model, [name for name, _ in repvgg_blocks(model)])


def _anneal_blocks_(model: ModelT, names: Iterable[str]) -> ModelT:
    places: List[Tuple[str, Any]] = [(name, model.get_submodule(name)) for name in names]
    annealed = {id(block): AnnealedRepVggBlock(block) for _, block in places}  # a shared block stays shared
    for name, block in places:
        move_hooks(block, annealed[id(block)])
        setattr(*parent_of(model, name), annealed[id(block)])
    return model


def expand(
        model: ModelT,
        method: Methods = 'orepa',
        *,
        select: Select = None,
        example_inputs: Any = None,
        generator: Optional[torch.Generator] = None,
        inplace: bool = False,
) -> ModelT:
    """Swap plain convolutions for rep layers with the same function.

    The outputs stay the same: in eval mode for all methods, in training mode too for linear ones (``'orepa'``). What
    was expanded is logged, and :func:`timm_rep.expansion_of` tells it of the result.

    Methods with norms in their branches (``'dbb'``, ``'acb'``, ``'rep'``) stand for a convolution with the batch
    norm that reads its output, wherever that is declared, if nothing else reads the output. To see it, a copy of the
    model is run on images without data, on the meta device; where it cannot be, and no example is given, the norm is
    the next child of the same module. What is ``'orepa'``'s own choice goes by the next child, too.

    Args:
        model: Any CNN.
        method: Name of a method, or a method with options: ``'orepa'`` (KxK, 1x1 or stem layer, as the kernel asks
            for), ``'dbb'`` (diverse branches), ``'acb'`` (KxK, 1xK and Kx1), ``'rep'`` (KxK, 1x1 and identity), or what
            else is registered. Methods with norms give RepVGG's blocks an attach rate for their own branches, too; for
            ``'rep'`` that is all, since the blocks are that already. Or several: a mapping of patterns of names to
            methods, of which the first that matches decides, None leaves as it is, and a name without wildcards takes
            that convolution whatever the default policy of the method is.
        select: Which convolutions: a function of name and convolution, or names with wildcards. By default those that
            the method takes: for ``'orepa'`` all sizes with a norm right behind them, but of a RepVGG block only the
            KxK branch and not the shortcuts of a ResNet BasicBlock; in networks where those are less than half, all
            KxK, and all 1x1 if they are a quarter or more (of the parameters). For the others 3x3 and 5x5 with their
            batch norms.
        example_inputs: What the model is called with, a tuple of arguments or the only one, for models that take
            something else than images or decide by their values: a copy is run on it, on the model's device.
        generator: Source of the side branches' draw.
        inplace: Change the model itself instead of a copy.

    Returns:
        The model with rep layers.

    Raises:
        UserError: For an unknown method, a pattern that matches or decides nothing, or whose method takes nothing of
            it, if nothing is selected, if a selected convolution is not supported, if the model does not run on the
            example, for a model that is sharded or has lazy modules, or for a seed in place of a generator. The model
            is then unchanged.
    """
    left = what_is_left(Network.of(model))
    if example_inputs is not None and not isinstance(example_inputs, tuple):
        example_inputs = example_inputs,
    expanded = _swap(model, method, select, generator, inplace, same_function=True, example_inputs=example_inputs)
    expansion = expansion_of(expanded)
    is_little = select is None and not isinstance(method, Mapping) and expansion.taken < LITTLE
    _logger.log(
        logging.WARNING if is_little else logging.INFO, 'expanded %s: %s%s%s', type(model).__name__, expansion,
        '; that is little, select= takes more' if is_little else '', f'; cannot be taken: {left}' if left else '')
    return expanded


def expand_fresh_(model: ModelT, method: Methods, generator: Optional[torch.Generator] = None) -> ModelT:
    """Swap the convolutions of a new model for freshly drawn rep layers, in place: the start of a training.

    Args:
        model: Newly built stock model.
        method: As in :func:`expand`.
        generator: Source of the draw.

    Returns:
        The model.
    """
    return _swap(model, method, None, generator, inplace=True, same_function=False)


def expand_as_(model: ModelT, methods: Mapping[str, Method], norms: Optional[Mapping[str, str]] = None) -> ModelT:
    """Expand a stock model as another one of the same network was, in place: to load that one's weights.

    Args:
        model: Stock model.
        methods: The method of every rep layer by its name, as :class:`timm_rep.core.expansion.Expansion` has it.
        norms: As it has them, too. The norms of all other layers are right behind them.

    Returns:
        The model, with freshly drawn layers.

    Raises:
        UserError: If the model has no convolution, or RepVGG block, or norm of such a name. The model is then
            unchanged.
    """
    places = names_of(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    assigned: Dict[str, Method] = {}
    for name, method in methods.items():
        allowed = (nn.Conv2d, *HOSTS, *([RepVggBlock] if isinstance(method, Rep) else []))
        if type(modules.get(name)) not in allowed:
            raise UserError(
                f'the expansion is of another network: {type(model).__name__} has no plain convolution {name!r}')
        assigned.update(dict.fromkeys(places[id(modules[name])], method))
    known = dict.fromkeys(assigned, '')
    for name, norm in (norms or {}).items():
        behind: Any = modules.get(norm)
        if not is_foldable(behind) or behind.num_features != getattr(modules.get(name), 'out_channels', None):
            raise UserError(
                f'the expansion is of another network: {type(model).__name__} has no batch norm {norm!r} for {name!r}')
        known.update(dict.fromkeys(places[id(modules[name])], norm))
    return _expand_assigned(Network.of(model), assigned, None, inplace=True, same_function=False, norms=known)


def _swap(
        model: ModelT,
        method: Methods,
        select: Select,
        generator: Optional[torch.Generator],
        inplace: bool,
        same_function: bool,
        example_inputs: Optional[Tuple[Any, ...]] = None,
) -> ModelT:
    if unwrapped(model) is not model:
        raise UserError(
            f'expand the network before it is wrapped, got {type(model).__name__}: the wrapper goes on with the '
            'parameters and the graph that it knows'
        )
    check_generator(generator)
    check_whole(model)
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise UserError(
            f'{type(model).__name__} has lazy modules, whose shapes are not known yet: run it once before expand')
    network = Network.of(model, example_inputs)
    assigned = assign(network, method, select)
    if not assigned:
        raise UserError(why_nothing(network, method, select))
    return _expand_assigned(network, assigned, generator, inplace, same_function)


def _make_layer(
        method: Method,
        place: Place,
        generator: Optional[torch.Generator],
        same_function: bool,
) -> Tuple[nn.Module, nn.Module]:
    """A layer for a convolution, and what takes the place of the convolution: itself, or its host."""
    if method.takes_norm:
        if place.read_between:
            raise UserError(
                f'{method.name!r} takes the norm in, but something sees the output of {place.name} before the norm: '
                'another operation, a hook, or a feature map; or the parameters of the two are read by others'
            )
        if not is_foldable(place.norm):
            found = 'none' if place.norm is None else f'a {type(place.norm).__name__}'
            raise UserError(
                f'{method.name!r} needs a plain BatchNorm2d right behind the convolution; {place.name} has {found}')
        if place.norm_stays:
            raise UserError(
                f'{method.name!r} takes the norm in, but that of {place.name} cannot go with it: one of the two is '
                'shared by places without the other, or the norm has hooks or state of its own')
    try:
        layer: Any = method.make_layer(place, generator, same_function)
        stands = hosted(place.conv, layer)
    except ValueError as e:
        raise UserError(f'cannot expand {place.name}: {e}') from None
    layer.method = method
    return layer, stands


def _fold(model: nn.Module, place: Place, layer: Any) -> FoldedNorm:
    """What holds the place of the norm that a layer has taken in; the layer remembers it if it is not right behind."""
    assert place.norm is not None
    folded = FoldedNorm(place.norm, is_far=next_sibling(model, place.name)[0] != place.norm_name)
    if folded.is_far:
        layer.far_norm = (folded,)
    return folded


def _expand_assigned(
        network: Network,
        assigned: Mapping[str, Method],
        generator: Optional[torch.Generator],
        inplace: bool,
        same_function: bool,
        norms: Optional[Mapping[str, str]] = None,
) -> Any:
    """Build all layers, then put them in, so that an error leaves the model as it was.

    The norms are looked for where they are not known, as in a file: by name, or '' for the next child.
    """
    model = network.model
    if '' in assigned:
        if isinstance(model, RepVggBlock):
            raise UserError(BLOCK_ALONE)
        raise UserError("expand needs a model around the convolution; for one alone use the layer's from_conv()")
    blocks = [name for name in assigned if isinstance(model.get_submodule(name), RepVggBlock)]
    made: Dict[int, Tuple[nn.Module, Optional[FoldedNorm]]] = {}
    new_modules: Dict[str, nn.Module] = {}
    for name, method in assigned.items():
        if name in blocks:
            continue
        if any(name.startswith(f'{block}.') and name != f'{block}.{KXK_CONV}' for block in blocks):
            raise UserError(f'only the KxK convolution of an annealed RepVGG block can be a rep layer, not {name}')
        norm = None if norms is None else norms.get(name)
        place = network.place(name, method.takes_norm and norm is None, norm)
        if id(place.conv) not in made:
            if method.takes_norm and place.norm_name in new_modules:
                raise UserError(f'{place.name} cannot take in {place.norm_name}, which another convolution does')
            layer, stands = _make_layer(method, place, generator, same_function)
            made[id(place.conv)] = stands, _fold(model, place, layer) if method.takes_norm else None
        stands, folded = made[id(place.conv)]
        new_modules.update(dict.fromkeys(network.names[id(place.conv)], stands))  # a shared one stays shared
        if folded is not None:
            new_modules.update(dict.fromkeys(network.names[id(place.norm)], folded))
    if not inplace:
        model = copied(model)
    for name, module in new_modules.items():
        move_hooks(model.get_submodule(name), module)
        setattr(*parent_of(model, name), module)
    _anneal_blocks_(model, blocks)
    fuse_before_own_(model, assigned)
    return model
