"""Put rep layers into a model: which convolutions a method takes, and the swap."""
import fnmatch
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from timm.models.byobnet import RepVggBlock

from .errors import UserError
from .expansion import expansion_of
from .fuse import fuse_before_own_
from .layers import AnnealedRepVggBlock, FoldedNorm, RepLayer
from .layers.norms import FOLDABLE, is_foldable
from .layers.rep import Rep
from .methods import Method, MethodLike, Place, as_method
from .walk import (
    ModelT,
    ancestors_of,
    copied,
    move_hooks,
    names_of,
    next_sibling,
    norm_behind,
    parent_of,
    reads_between,
    unwrapped,
)

__all__ = ['Select', 'anneal_repvgg_blocks_', 'expand', 'expand_as_', 'expand_fresh_']

_logger = logging.getLogger(__name__)

# The convolution of a RepVGG block that can be a rep layer beside annealed branches.
KXK_CONV = 'conv_kxk.conv'
NORM_BUFFERS = {'running_mean', 'running_var', 'num_batches_tracked'}
# Convolutions and norms as their classes make them.
MADE: Dict[type, nn.Module] = {
    nn.Conv2d: nn.Conv2d(1, 1, 1, device='meta'),
    **{cls: cls(1, device='meta') for cls in (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)},
    SyncBatchNormAct: convert_sync_batchnorm(BatchNormAct2d(1, device='meta')),
}
STATE_HOOKS = (
    '_state_dict_hooks', '_state_dict_pre_hooks', '_load_state_dict_pre_hooks', '_load_state_dict_post_hooks')
BLOCK_ALONE = 'a model around the block is needed; for one alone use AnnealedRepVggBlock(block)'

Select = Union[None, Callable[[str, nn.Conv2d], bool], Iterable[str]]
Methods = Union[MethodLike, Mapping[str, Optional[MethodLike]]]


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
    return _anneal_blocks_(model, [name for name, _ in _repvgg_blocks(model)])


def _repvgg_blocks(model: nn.Module) -> Iterator[Tuple[str, RepVggBlock]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is RepVggBlock:
            yield name, module


def _anneal_blocks_(model: ModelT, names: Iterable[str]) -> ModelT:
    places: List[Tuple[str, Any]] = [(name, model.get_submodule(name)) for name in names]
    annealed = {id(block): AnnealedRepVggBlock(block) for _, block in places}  # a shared block stays shared
    for name, block in places:
        move_hooks(block, annealed[id(block)])
        setattr(*parent_of(model, name), annealed[id(block)])
    return model


@dataclass(frozen=True)
class _Network:
    """A model, with the names of all its modules, and how many modules have each of its parameters, by id."""

    model: nn.Module
    names: Mapping[int, List[str]]
    owners: Mapping[int, int]

    @classmethod
    def of(cls, model: nn.Module) -> '_Network':
        parameters = (parameter for module in model.modules() for parameter in module._parameters.values())
        return cls(model, names_of(model), Counter(map(id, parameters)))

    def place(self, name: str) -> Place:
        model, conv = self.model, self.model.get_submodule(name)
        norm_name, norm = norm_behind(model, name, conv.out_channels)  # type: ignore[arg-type]
        read_between = norm is not None and reads_between(model, name, norm_name)
        behind = {next_sibling(model, own)[0] for own in self.names[id(conv)]}
        norm_stays = norm is not None and (
            behind != set(self.names[id(norm)]) or not set(norm._buffers) <= NORM_BUFFERS or not self._is_as_made(norm))
        return Place(
            name, conv, norm, norm_name, tuple(ancestors_of(model, name)), read_between, norm_stays)  # type: ignore[arg-type]

    def convs(self) -> Dict[str, nn.Conv2d]:
        """The plain convolutions of a model, in all places, but those that are parts of rep layers."""
        return {
            name: module for name, module in self.model.named_modules(remove_duplicate=False)
            if type(module) is nn.Conv2d and not module._buffers and self._is_as_made(module)
            and module.weight.is_floating_point()
            and not any(isinstance(parent, RepLayer) for parent in ancestors_of(self.model, name))
        }

    def _is_as_made(self, module: nn.Module) -> bool:
        """Whether a module is no more than its class says.

        It has weight and bias, not computed of others (weight norm, pruning), in no other module, and without hooks on
        their gradients; its forward is its class's, and so are its parts, its attributes, and what it writes to a
        state_dict.
        """
        if type(module) in MADE:
            made = MADE[type(module)]
            public = {name for name in vars(module) if not name.startswith('_')}
            if not public <= set(vars(made)) or set(module._modules) != set(made._modules):
                return False
        hooks: List[Any] = [getattr(module, name) for name in STATE_HOOKS]
        for parameter in module._parameters.values():
            if parameter is not None:
                hooks += [parameter._backward_hooks, getattr(parameter, '_post_accumulate_grad_hooks', None)]
                hooks += [self.owners[id(parameter)] > 1]
        return set(module._parameters) == {'weight', 'bias'} and 'forward' not in vars(module) and not any(hooks)


def _takes(method: Method, place: Place) -> bool:
    supported = place.conv.padding_mode == 'zeros' and all(size % 2 for size in place.conv.kernel_size)
    return supported and method.takes(place)


def _check_pattern(model: nn.Module, convs: Iterable[str], pattern: str) -> None:
    if not fnmatch.filter(convs, pattern):
        raise UserError(f'no nn.Conv2d of {type(model).__name__} matches {pattern!r}')


def _by_selection(model: nn.Module, method: Method, select: Select) -> Dict[str, Method]:
    network = _Network.of(model)
    convs = network.convs()
    if select is None:
        return {name: method for name in convs if _takes(method, network.place(name))}
    if callable(select):
        return {name: method for name, conv in convs.items() if select(name, conv)}
    patterns = [select] if isinstance(select, str) else list(select)
    for pattern in patterns:
        _check_pattern(model, convs, pattern)
    return {name: method for name in convs if any(fnmatch.fnmatch(name, p) for p in patterns)}


def _by_pattern(model: nn.Module, patterns: Mapping[str, Optional[Method]]) -> Dict[str, Method]:
    """The method of every convolution that it takes; the first pattern that matches a name decides."""
    network = _Network.of(model)
    convs = network.convs()
    for pattern in patterns:
        _check_pattern(model, convs, pattern)
    found: Dict[str, Method] = {}
    for name in convs:
        first = _first_match(patterns, name)
        method = patterns.get(first)
        if method is not None and (first == name or _takes(method, network.place(name))):
            found[name] = method
    return found


def _first_match(patterns: Iterable[str], name: str) -> str:
    return next((pattern for pattern in patterns if fnmatch.fnmatch(name, pattern)), '')


def _assign(model: nn.Module, method: Methods, select: Select) -> Dict[str, Method]:
    """The method of every convolution, and of every RepVGG block, that is to be expanded, by name."""
    if isinstance(method, Mapping):
        if select is not None:
            raise UserError('select goes with one method; a mapping of patterns to methods selects by its patterns')
        patterns = {pattern: None if m is None else as_method(m) for pattern, m in method.items()}
        assigned = _by_pattern(model, patterns)
    else:
        patterns = {'*': as_method(method)} if select is None else {}
        assigned = _by_selection(model, as_method(method), select)
    for name, block in _repvgg_blocks(model):
        kxk = f'{name}.{KXK_CONV}'
        # the block's own branches are those of Rep; layers with norms in the KxK branch want the others annealed too
        own = patterns.get(_first_match(patterns, kxk))
        if block.reparam_conv is None and (isinstance(own, Rep) or (kxk in assigned and assigned[kxk].takes_norm)):
            assigned[name] = Rep()
    return assigned


def expand(
        model: ModelT,
        method: Methods = 'orepa',
        *,
        select: Select = None,
        generator: Optional[torch.Generator] = None,
        inplace: bool = False,
) -> ModelT:
    """Swap plain convolutions for rep layers with the same function.

    The outputs stay the same: in eval mode for all methods, in training mode too for linear ones (``'orepa'``). What
    was expanded is logged, and :func:`timm_rep.expansion_of` tells it of the result.

    A norm counts as right behind a convolution if it is the next child of the same module. Methods that take the norm
    in (all but ``'orepa'``) need it there, so in a network that declares its modules in another order than it runs
    them, select by hand.

    Args:
        model: Any CNN.
        method: Name of a method, or a method with options: ``'orepa'`` (KxK, 1x1 or stem layer, as the kernel asks
            for), ``'dbb'`` (diverse branches), ``'acb'`` (KxK, 1xK and Kx1), ``'rep'`` (KxK, 1x1 and identity), or what
            else is registered. Methods with norms give RepVGG's blocks an attach rate for their own branches, too; for
            ``'rep'`` that is all, since the blocks are that already. Or several: a mapping of patterns of names to
            methods, of which the first that matches decides, None leaves as it is, and a name without wildcards takes
            that convolution whatever the default policy of the method is.
        select: Which convolutions: a function of name and convolution, or names with wildcards. By default those that
            the method takes: usually those with a norm right behind them; for ``'orepa'`` all sizes, but of a
            RepVGG block only the KxK branch and not the shortcuts of a ResNet BasicBlock; for the others 3x3 and 5x5.
        generator: Source of the side branches' draw.
        inplace: Change the model itself instead of a copy.

    Returns:
        The model with rep layers.

    Raises:
        UserError: For an unknown method, if nothing is selected, or if a selected convolution is not supported. The
            model is then unchanged.
    """
    expanded = _swap(model, method, select, generator, inplace, same_function=True)
    _logger.info('expanded %s: %s', type(model).__name__, expansion_of(expanded))
    return expanded


def expand_fresh_(model: ModelT, method: MethodLike, generator: Optional[torch.Generator] = None) -> ModelT:
    """Swap the convolutions of a new model for freshly drawn rep layers, in place: the start of a training.

    Args:
        model: Newly built stock model.
        method: As in :func:`expand`.
        generator: Source of the draw.

    Returns:
        The model.
    """
    return _swap(model, method, None, generator, inplace=True, same_function=False)


def expand_as_(model: ModelT, methods: Mapping[str, Method]) -> ModelT:
    """Expand a stock model as another one of the same network was, in place: to load that one's weights.

    Args:
        model: Stock model.
        methods: The method of every rep layer by its name, as :class:`timm_rep.core.expansion.Expansion` has it.

    Returns:
        The model, with freshly drawn layers.

    Raises:
        UserError: If the model has no convolution, or RepVGG block, of such a name. The model is then unchanged.
    """
    places = names_of(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    assigned: Dict[str, Method] = {}
    for name, method in methods.items():
        allowed = (nn.Conv2d, RepVggBlock) if isinstance(method, Rep) else (nn.Conv2d,)
        if type(modules.get(name)) not in allowed:
            raise UserError(
                f'the expansion is of another network: {type(model).__name__} has no plain convolution {name!r}')
        assigned.update(dict.fromkeys(places[id(modules[name])], method))
    return _expand_assigned(model, assigned, None, inplace=True, same_function=False)


def _swap(
        model: ModelT,
        method: Methods,
        select: Select,
        generator: Optional[torch.Generator],
        inplace: bool,
        same_function: bool,
) -> ModelT:
    if unwrapped(model) is not model:
        raise UserError(
            f'expand the network before it is wrapped, got {type(model).__name__}: the wrapper goes on with the '
            'parameters and the graph that it knows'
        )
    assigned = _assign(model, method, select)
    if not assigned:
        raise UserError(_nothing_to_expand(model, method))
    return _expand_assigned(model, assigned, generator, inplace, same_function)


def _nothing_to_expand(model: nn.Module, method: Methods) -> str:
    wanted = method if isinstance(method, Mapping) else as_method(method).name
    norms = {type(norm_behind(model, name, conv.out_channels)[1]) for name, conv in _Network.of(model).convs().items()}
    others = sorted(norm.__name__ for norm in norms - {type(None), *FOLDABLE})
    text = f'no convolution of {type(model).__name__} to expand with {wanted!r}'
    return f'{text}; methods that take the norm in need a BatchNorm2d, here are {", ".join(others)}' if others else text


def _make_layer(method: Method, place: Place, generator: Optional[torch.Generator], same_function: bool) -> nn.Module:
    if method.takes_norm:
        if place.read_between:
            raise UserError(
                f'{method.name!r} takes the norm in, but something sees the output of {place.name} before the norm: a '
                'hook, or a feature map'
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
    except ValueError as e:
        raise UserError(f'cannot expand {place.name}: {e}') from None
    layer.method = method
    return layer


def _expand_assigned(
        model: ModelT,
        assigned: Mapping[str, Method],
        generator: Optional[torch.Generator],
        inplace: bool,
        same_function: bool,
) -> ModelT:
    """Build all layers, then put them in, so that an error leaves the model as it was."""
    if '' in assigned:
        if isinstance(model, RepVggBlock):
            raise UserError(BLOCK_ALONE)
        raise UserError("expand needs a model around the convolution; for one alone use the layer's from_conv()")
    blocks = [name for name in assigned if isinstance(model.get_submodule(name), RepVggBlock)]
    network = _Network.of(model)
    made: Dict[int, Tuple[nn.Module, Optional[FoldedNorm]]] = {}
    new_modules: Dict[str, nn.Module] = {}
    for name, method in assigned.items():
        if name in blocks:
            continue
        if any(name.startswith(f'{block}.') and name != f'{block}.{KXK_CONV}' for block in blocks):
            raise UserError(f'only the KxK convolution of an annealed RepVGG block can be a rep layer, not {name}')
        place = network.place(name)
        if id(place.conv) not in made:
            made[id(place.conv)] = (
                _make_layer(method, place, generator, same_function),
                FoldedNorm(place.norm) if method.takes_norm and place.norm else None)
        layer, folded = made[id(place.conv)]
        new_modules.update(dict.fromkeys(network.names[id(place.conv)], layer))  # a shared one stays shared
        if folded is not None:
            new_modules[place.norm_name] = folded
    if not inplace:
        model = copied(model)
    for name, module in new_modules.items():
        move_hooks(model.get_submodule(name), module)
        setattr(*parent_of(model, name), module)
    _anneal_blocks_(model, blocks)
    fuse_before_own_(model, assigned)
    return model
