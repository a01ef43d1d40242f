"""Which convolutions of a model a method is to take, and what stands around them."""
import fnmatch
import functools
from collections import Counter
from dataclasses import dataclass
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Tuple,
    Union,
)

import torch.nn as nn
from timm.layers import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from timm.models.byobnet import RepVggBlock

from .dataflow import Flows, flows_of
from .errors import UserError
from .layers import RepLayer
from .layers.fixed import own_methods
from .layers.hosted import HOSTS, StandardizedConv2d
from .layers.normed import is_foldable_pair
from .layers.norms import FOLDABLE, is_foldable
from .layers.rep import Rep
from .methods import Method, MethodLike, Place, Shares, as_method
from .walk import (
    SECOND_PLACE,
    ancestors_of,
    check_module,
    held_elsewhere,
    names_of,
    next_sibling,
    norm_behind,
    reads_between,
)

__all__ = ['KXK_CONV', 'Methods', 'Network', 'Select', 'assign', 'repvgg_blocks', 'what_is_left', 'why_nothing']

# The convolution of a RepVGG block that can be a rep layer beside annealed branches.
KXK_CONV = 'conv_kxk.conv'
NORM_BUFFERS = {'running_mean', 'running_var', 'num_batches_tracked'}
CONVS = (nn.Conv2d, *HOSTS)
# Convolutions and norms as their classes make them.
MADE: Dict[type, nn.Module] = {
    **{cls: cls(1, 1, 1, device='meta') for cls in CONVS},
    **{cls: cls(1, device='meta') for cls in (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)},
    SyncBatchNormAct: convert_sync_batchnorm(BatchNormAct2d(1, device='meta')),
}
STATE_HOOKS = (
    '_state_dict_hooks', '_state_dict_pre_hooks', '_load_state_dict_pre_hooks', '_load_state_dict_post_hooks')
NAMES_SHOWN = 3

Select = Union[None, Callable[[str, nn.Conv2d], bool], Iterable[str]]
Methods = Union[MethodLike, Mapping[str, Optional[MethodLike]]]


def repvgg_blocks(model: nn.Module) -> Iterator[Tuple[str, RepVggBlock]]:
    """Walk over timm's RepVGG blocks without attach rate, in all places."""
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is RepVggBlock:
            yield name, module


@dataclass(frozen=True)
class Network:
    """A model, with the names of all its modules, and how many modules have each of its parameters, by id.

    If what it is called with is known, it is watched running on that.
    """

    model: nn.Module
    names: Mapping[int, List[str]]
    owners: Mapping[int, int]
    example_inputs: Optional[Tuple[Any, ...]] = None

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Optional[Tuple[Any, ...]] = None) -> 'Network':
        check_module(model)
        parameters = (parameter for module in model.modules() for parameter in module._parameters.values())
        return cls(model, names_of(model), Counter(map(id, parameters)), example_inputs)

    @functools.cached_property
    def flows(self) -> Flows:
        """What becomes of the convolutions' outputs; the model is run for it, once."""
        return flows_of(self.model, self.example_inputs)

    @functools.cached_property
    def held(self) -> FrozenSet[int]:
        """Modules that other attributes hold too, by id: those would go on with what was swapped."""
        return held_elsewhere(self.model)

    @functools.cached_property
    def shares(self) -> Shares:
        pointwise = paired = larger = 0
        for name, conv in self.convs().items():
            size = conv.weight.numel()
            if conv.kernel_size == (1, 1):
                pointwise += size
            elif _has_a_centre(conv):
                larger += size
                paired += size if norm_behind(self.model, name, conv.out_channels)[1] is not None else 0
        every = sum(module.weight.numel() for module in self.model.modules() if isinstance(module, nn.Conv2d))
        return Shares(paired / larger if larger else 1.0, pointwise / max(every, 1))

    def place(self, name: str, takes_norm: bool, norm_name: Optional[str] = None) -> Place:
        """Where a convolution stands.

        Args:
            name: Its name.
            takes_norm: Whether the norm behind it is to go with it, so that it matters which that is.
            norm_name: Name of that norm if it is known, '' for the next child.
        """
        model, conv = self.model, self.model.get_submodule(name)
        if norm_name:
            known = model.get_submodule(norm_name)
            norm: Optional[nn.Module] = known
            seen, stays = False, not self._is_norm_as_made(known)
        else:
            norm_name, norm, seen, stays = self._norm_of(name, takes_norm)
        read_between = norm is not None and (seen or reads_between(model, name, norm_name))
        return Place(
            name, conv, norm, norm_name, tuple(ancestors_of(model, name)),  # type: ignore[arg-type]
            read_between, norm_stays=stays, shares=self.shares)

    def _norm_of(self, name: str, by_flow: bool) -> Tuple[str, Optional[nn.Module], bool, bool]:
        """A convolution's norm and its name, whether something sees what lies between, and whether the norm stays."""
        conv: Any = self.model.get_submodule(name)
        norm_name, norm = norm_behind(self.model, name, conv.out_channels)
        flow = self.flows.convs.get(self.names[id(conv)][0]) if by_flow else None
        if flow is not None and flow.norm:
            taken = self.model.get_submodule(flow.norm)
            return flow.norm, taken, flow.hooked, flow.shared or not self._is_norm_as_made(taken)
        if norm is None:
            return '', None, False, False
        if flow is not None:
            return norm_name, norm, is_foldable(norm), False
        behind = {next_sibling(self.model, own)[0] for own in self.names[id(conv)]}
        runs_elsewhere = by_flow and self.names[id(norm)][0] in self.flows.norms
        stays = behind != set(self.names[id(norm)]) or runs_elsewhere or not self._is_norm_as_made(norm)
        return norm_name, norm, False, stays

    def convs(self) -> Dict[str, nn.Conv2d]:
        """The convolutions that a layer can stand for, in all places, but those that are parts of rep layers."""
        return {name: conv for name, conv in self._all_convs() if not self.why_not(name, conv)}

    def left(self) -> Iterator[Tuple[str, str]]:
        """Convolutions that no layer can stand for, with the reason."""
        for name, conv in self._all_convs():
            reason = self.why_not(name, conv) or ('' if _has_a_centre(conv) else 'a kernel without a centre')
            if not reason and conv.padding_mode != 'zeros':
                reason = f'padding mode {conv.padding_mode!r}'
            if reason:
                yield name, reason

    def _all_convs(self) -> Iterator[Tuple[str, nn.Conv2d]]:
        for name, module in self.model.named_modules(remove_duplicate=False):
            if isinstance(module, nn.Conv2d) and not any(
                    isinstance(parent, RepLayer) for parent in ancestors_of(self.model, name)):
                yield name, module

    def why_not(self, name: str, conv: nn.Conv2d) -> str:
        """Why no layer can stand for a convolution, whatever its kernel size, or ''."""
        if type(conv) not in CONVS:
            return f'a {type(conv).__name__}, whose rule is not known'
        if type(conv) in HOSTS and any(isinstance(parent, RepVggBlock) for parent in ancestors_of(self.model, name)):
            return f'a {type(conv).__name__} in a RepVGG block'
        if id(conv) in self.held:
            return SECOND_PLACE
        if conv._buffers or not self._is_as_made(conv):
            return 'a kernel that is shared or computed, or hooks or parts that its class does not give it'
        return '' if conv.weight.is_floating_point() else f'kernels of {conv.weight.dtype}'

    def _is_norm_as_made(self, norm: nn.Module) -> bool:
        return set(norm._buffers) <= NORM_BUFFERS and id(norm) not in self.held and self._is_as_made(norm)

    def _is_as_made(self, module: nn.Module) -> bool:
        """Whether a module is no more than its class says.

        It has weight and bias, not computed of others (weight norm, pruning), in no other module, and without hooks on
        their gradients; its methods are its class's, and so are its parts, its attributes, and what it writes to a
        state_dict.
        """
        parameters = {'weight', 'bias'}
        if type(module) in MADE:
            made = MADE[type(module)]
            parameters = set(made._parameters)
            public = {name for name in vars(module) if not name.startswith('_')}
            if not public <= set(vars(made)) or set(module._modules) != set(made._modules):
                return False
        hooks: List[Any] = [getattr(module, name) for name in STATE_HOOKS]
        for parameter in module._parameters.values():
            if parameter is not None:
                hooks += [parameter._backward_hooks, getattr(parameter, '_post_accumulate_grad_hooks', None)]
                hooks += [self.owners[id(parameter)] > 1]
        as_of_class = 'forward' not in vars(module) and not own_methods(module)
        return set(module._parameters) == parameters and as_of_class and not any(hooks)


def _has_a_centre(conv: nn.Conv2d) -> bool:
    return all(size % 2 for size in conv.kernel_size)


def _can_take(method: Method, network: Network, name: str) -> bool:
    conv: Any = network.model.get_submodule(name)
    if conv.padding_mode != 'zeros' or not _has_a_centre(conv):
        return False
    return not (method.takes_norm and HOSTS.get(type(conv)) is StandardizedConv2d)


def _takes(method: Method, network: Network, name: str) -> bool:
    return _can_take(method, network, name) and method.takes(network.place(name, method.takes_norm))



def _check_pattern(network: Network, convs: Iterable[str], pattern: str) -> None:
    if fnmatch.filter(convs, pattern):
        return
    text = f'no nn.Conv2d of {type(network.model).__name__} matches {pattern!r}'
    left = [f'{name} ({reason})' for name, reason in network.left() if fnmatch.fnmatch(name, pattern)]
    raise UserError(f'{text} that a layer can stand for: {_listed(left)}' if left else text)


def _by_selection(network: Network, method: Method, select: Select) -> Dict[str, Method]:
    convs = network.convs()
    if select is None:
        return {name: method for name in convs if _takes(method, network, name)}
    if callable(select):
        return {name: method for name, conv in convs.items() if select(name, conv)}
    patterns = [select] if isinstance(select, str) else list(select)
    for pattern in patterns:
        _check_pattern(network, convs, pattern)
    return {name: method for name in convs if any(fnmatch.fnmatch(name, p) for p in patterns)}


def _by_pattern(network: Network, patterns: Mapping[str, Optional[Method]]) -> Dict[str, Method]:
    """The method of every convolution that it takes; the first pattern that matches a name decides."""
    convs = network.convs()
    first = {name: _first_match(patterns, name) for name in convs}
    for pattern in patterns:
        _check_pattern(network, convs, pattern)
        if pattern not in first.values():
            earlier = sorted({first[name] for name in fnmatch.filter(convs, pattern)})
            raise UserError(
                f'the pattern {pattern!r} decides nothing: the first that matches does, and what it matches goes to '
                f'{_listed(map(repr, earlier))}; put it in front of that'
            )
    found: Dict[str, Method] = {}
    for name in convs:
        method = patterns.get(first[name])
        if method is not None and (first[name] == name or _takes(method, network, name)):
            found[name] = method
    return found


def _first_match(patterns: Iterable[str], name: str) -> str:
    return next((pattern for pattern in patterns if fnmatch.fnmatch(name, pattern)), '')


def assign(network: Network, method: Methods, select: Select) -> Dict[str, Method]:
    """The method of every convolution, and of every RepVGG block, that is to be expanded, by name.

    Args:
        network: The model.
        method: As of ``expand``.
        select: As of ``expand``.

    Raises:
        UserError: For a pattern that matches or decides nothing, or whose method takes nothing of what it matches.
    """
    if isinstance(method, Mapping):
        if select is not None:
            raise UserError('select goes with one method; a mapping of patterns to methods selects by its patterns')
        patterns = {pattern: None if m is None else as_method(m) for pattern, m in method.items()}
        assigned = _by_pattern(network, patterns)
    else:
        patterns = {'*': as_method(method)} if select is None else {}
        assigned = _by_selection(network, as_method(method), select)
    for name, block in repvgg_blocks(network.model):
        kxk = f'{name}.{KXK_CONV}'
        # the block's own branches are those of Rep; layers with norms in the KxK branch want the others annealed too
        own = patterns.get(_first_match(patterns, kxk))
        if block.reparam_conv is None and (isinstance(own, Rep) or (kxk in assigned and assigned[kxk].takes_norm)):
            if id(block) in network.held:
                raise UserError(f'{name} cannot be given an attach rate: it has {SECOND_PLACE}')
            if any(map(own_methods, block.modules())):
                raise UserError(f'{name} cannot be given an attach rate: methods were put on it, or on a part of it')
            assigned[name] = Rep()
    if isinstance(method, Mapping):
        _check_each_takes(network, patterns, assigned)
    return assigned


def _check_each_takes(
        network: Network,
        patterns: Mapping[str, Optional[Method]],
        assigned: Mapping[str, Method],
) -> None:
    blocks = tuple(f'{name}.' for name, _ in repvgg_blocks(network.model) if name in assigned)
    decided: Dict[str, List[str]] = {pattern: [] for pattern in patterns}
    for name in network.convs():
        decided.get(_first_match(patterns, name), []).append(name)
    for pattern, method in patterns.items():
        names = decided[pattern]
        with_block = isinstance(method, Rep) and any(name.startswith(blocks) for name in names)
        if method is None or with_block or any(name in assigned for name in names):
            continue
        reason = _why_none(network, method, names) or 'its own choice leaves that, full names overrule it'
        raise UserError(
            f'{method.name!r} takes nothing of what the pattern {pattern!r} decides: {_listed(names)}; {reason}')


def why_nothing(network: Network, method: Methods, select: Select = None) -> str:
    """Says that a method found nothing to take, and why."""
    wanted = method if isinstance(method, Mapping) else as_method(method).name
    text = f'no convolution of {type(network.model).__name__} to expand with {wanted!r}'
    reason = ''
    if select is not None:
        reason = 'select= takes none'
    elif not isinstance(method, Mapping):
        reason = _why_none(network, as_method(method))
        if not reason and network.convs():
            reason = 'its own choice leaves them all, select= takes more'
    return f'{text}; {reason}' if reason else text


def _why_none(network: Network, method: Method, names: Optional[Collection[str]] = None) -> str:
    """Why a method takes none of these convolutions unasked, or of all; '' for no more than its own choice."""
    if not method.takes_norm:
        left = Counter(reason for name, reason in network.left() if names is None or name in names)
        return f'left: {_counted(left)}' if left else ''
    if not {type(module) for module in network.model.modules()} & set(FOLDABLE):
        behind = {type(norm_behind(network.model, name, c.out_channels)[1]) for name, c in network.convs().items()}
        others = sorted(norm.__name__ for norm in behind - {type(None), *FOLDABLE})
        return f'methods that take the norm in need a BatchNorm2d, here are {", ".join(others) or "none"}'
    text = 'none that it takes unasked has a batch norm that alone reads its output'
    names = network.convs() if names is None else names
    asked = [name for name in names if _takes_if_asked(method, network, name)]
    return f'{text}; it takes by name: {_listed(asked)}' if asked else text


def _takes_if_asked(method: Method, network: Network, name: str) -> bool:
    """Whether only the size of its kernel keeps a convolution out of what a method with norms takes unasked."""
    if not _can_take(method, network, name):
        return False
    place = network.place(name, True)
    return min(place.conv.kernel_size) > 1 and not place.is_inside(RepVggBlock) and is_foldable_pair(place)


def what_is_left(network: Network) -> str:
    """The convolutions that no method can take, by reason, with some names; '' if there are none."""
    names: Dict[str, List[str]] = {}
    for name, reason in network.left():
        names.setdefault(reason, []).append(name)
    return '; '.join(f'{len(found)} with {reason}: {_listed(found)}' for reason, found in names.items())


def _counted(reasons: Mapping[str, int]) -> str:
    return '; '.join(f'{count} with {reason}' for reason, count in reasons.items())


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f' and {len(names) - NAMES_SHOWN} more' if len(names) > NAMES_SHOWN else ''
    return ', '.join(names[:NAMES_SHOWN]) + more
