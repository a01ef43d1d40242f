"""What becomes of the output of each convolution, found by watching the tensors of a model that runs without data."""
import contextlib
import copy
import inspect
import itertools
import logging
import random
import sys
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any, Dict, FrozenSet, Iterator, List, Mapping, Optional, Set, Tuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .errors import UserError
from .layers.norms import is_foldable
from .walk import HOOKS, computed_tensors, copied, image_channels, image_shape

__all__ = ['Flow', 'Flows', 'flows_of']

_logger = logging.getLogger(__name__)

BATCH = 2  # with one image, norms of vectors refuse to train
SIZES = (64, 224, 32, 28, 96, 128, 256)  # of images, for models that do not say theirs or do not take it
# What a model may be asked for besides its outputs, by the first of these: what a user reads, not only a norm reads.
OTHER_WAYS = ('forward_intermediates', 'forward_features')
# Hooks that see the inputs, or the outputs, of a module; those on gradients may see both.
INPUT_HOOKS = ('_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
OUTPUT_HOOKS = ('_forward_hooks', '_backward_hooks', '_backward_pre_hooks')


@dataclass(frozen=True)
class Flow:
    """What becomes of the output of a convolution.

    Attributes:
        norm: Name of the one batch norm that takes it, and that nothing else does; '' if there is no such norm, or
            the parameters of the two are read by others.
        shared: Whether several norms take outputs of the convolution, or the norm takes those of others, too.
        hooked: Whether a hook sees the output on its way into the norm.
    """

    norm: str = ''
    shared: bool = False
    hooked: bool = False


@dataclass(frozen=True)
class Flows:
    """What was seen of a model.

    Attributes:
        convs: By the first name of each convolution that was run, or whose parameters were read.
        norms: First names of the batch norms that were run.
    """

    convs: Mapping[str, Flow]
    norms: FrozenSet[str]


@dataclass
class _Output:
    """One output of a convolution: how often an operation has read it, and the norm that was running at the time."""

    conv: str
    tensor: 'weakref.ref[Tensor]'
    reads: int = 0
    norm: str = ''
    hooked: bool = False
    is_kept: bool = False  # by the model's outputs, or by what it remembers


@dataclass
class _Watch:
    """Notes of one pass, by the names of the model's modules."""

    hooks: Set[Tuple[str, str]]
    originals: FrozenSet[int]  # tensors of the model itself, by id: its copy has others
    owners: Dict[int, str]  # of the parameters of convolutions and batch norms, by id
    outputs: Dict[int, _Output] = field(default_factory=dict)
    done: List[_Output] = field(default_factory=list)
    norms: Dict[str, Set[str]] = field(default_factory=dict)  # the convolutions that a norm takes the outputs of
    running: List[Tuple[str, Any]] = field(default_factory=list)  # norms, with what they were given
    called: List[str] = field(default_factory=list)  # modules that are being called
    looked_at: Set[str] = field(default_factory=set)  # of those with owned parameters, by others

    def find(self, tensor: Any) -> Optional[_Output]:
        output = self.outputs.get(id(tensor)) if isinstance(tensor, Tensor) else None
        return output if output is not None and output.tensor() is tensor else None

    def read(self, arguments: Any) -> None:
        """An operation reads these."""
        for tensor in tree_leaves(arguments):
            if id(tensor) in self.originals:
                raise RuntimeError('the copy runs the model itself')
            owner = self.owners.get(id(tensor))
            if owner is not None and owner not in self.called:
                self.looked_at.add(owner)
            output = self.find(tensor)
            if output is not None:
                output.reads += 1
                name, given = self.running[-1] if self.running else ('', None)
                output.norm = name if given is tensor else ''

    def into(self, name: str, module: nn.Module, arguments: Any) -> None:
        self.called.append(name)
        for output in filter(None, map(self.find, tree_leaves(arguments))):
            output.hooked |= (name, 'in') in self.hooks
            if not is_foldable(module) and not isinstance(module, nn.Identity) and not list(module.children()):
                output.reads += 1  # such as a dropout, which does nothing in eval mode
        if is_foldable(module):
            given = arguments[0][0] if arguments[0] else None
            found = self.find(given)
            self.norms.setdefault(name, set()).add('' if found is None else found.conv)
            self.running.append((name, given))

    def out_of(self, name: str, module: nn.Module, result: Any) -> None:
        self.called.pop()
        if is_foldable(module):
            self.running.pop()
        if isinstance(module, nn.Conv2d) and isinstance(result, Tensor):
            known = self.outputs.get(id(result))
            if known is not None:
                self.done.append(known)
            self.outputs[id(result)] = _Output(name, weakref.ref(result))
        for output in filter(None, map(self.find, tree_leaves(result))):
            output.hooked |= (name, 'out') in self.hooks

    def read_elsewhere(self) -> Set[str]:
        """Convolutions of whose outputs it is known already that something else than one norm reads them."""
        return {o.conv for o in (*self.done, *self.outputs.values()) if o.reads > 1 or (o.reads == 1 and not o.norm)}

    def finish(self) -> List[_Output]:
        for output in self.outputs.values():
            output.is_kept = output.tensor() is not None
        return [*self.done, *self.outputs.values()]


class _Reads(TorchDispatchMode):
    """Tells a watch what each operation reads."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch.read((args, kwargs))
        if func is torch.ops.aten.native_batch_norm.default and args[0].is_meta:  # nearly all of the time otherwise
            return torch.empty_like(args[0]), *(args[0].new_empty(args[0].shape[1]) for _ in range(2))
        return func(*args, **(kwargs or {}))


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without values; the model's own are not copied on the way."""
    memo: Dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers(), computed_tensors(model)):
        empty = torch.empty_like(tensor, device='meta')
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _drop_hooks_(model: nn.Module) -> None:
    for module in model.modules():
        for name in HOOKS:
            hooks = getattr(module, name, None)
            if isinstance(hooks, dict):
                setattr(module, name, type(hooks)())


def _image_sizes(model: nn.Module) -> List[Tuple[int, ...]]:
    own = image_shape(model)
    return [*([own[1:]] if own else []), *((size, size) for size in SIZES)]


@contextlib.contextmanager
def _drawing_nothing(model: nn.Module) -> Iterator[None]:
    """Give the random generators back as they were, and keep what the model's code warns of for its own runs."""
    gpus = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    state, numpy = random.getstate(), sys.modules.get('numpy')
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=gpus), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


@torch.no_grad()
def _watched(
        model: nn.Module,
        hooks: Set[Tuple[str, str]],
        originals: FrozenSet[int],
        way: str,
        inputs: Tuple[Any, ...],
        failures: List[Tuple[Exception, Set[str]]],
) -> Optional[_Watch]:
    """Run a model once, or None if it does not run so; then what it failed of is noted, and what was seen so far."""
    watch = _Watch(hooks, originals, {
        id(parameter): name for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) or is_foldable(module) for parameter in module.parameters()})
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(
            lambda own, args, kwargs, name=name: watch.into(name, own, (args, kwargs)), with_kwargs=True))
        handles.append(module.register_forward_hook(
            lambda own, args, result, name=name: watch.out_of(name, own, result)))
    inputs = tree_map_only(Tensor, Tensor.clone, inputs)  # the model's code may write into them
    try:
        with _Reads(watch):
            result = getattr(model, way)(*inputs) if way else model(*inputs)
        watch.done = watch.finish()
        del result
        return watch
    except Exception as e:  # whatever the model's own code does without data
        failures.append((e, watch.read_elsewhere()))
        return None
    finally:
        for handle in handles:
            handle.remove()


def _images(model: nn.Module) -> Iterator[Tuple[Tensor]]:
    """Inputs without data that the model may take."""
    reference = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    for size in _image_sizes(model):
        yield torch.empty(BATCH, image_channels(model), *size, device='meta', dtype=reference.dtype),


def _passes(
        model: nn.Module,
        example_inputs: Optional[Tuple[Any, ...]],
        failures: List[Tuple[Exception, Set[str]]],
) -> List[_Watch]:
    """The model's ways to run, in eval mode and, where it can, in training mode; empty if it runs in none."""
    hooks = {
        (name, end) for name, module in model.named_modules()
        for end, kinds in (('in', INPUT_HOOKS), ('out', OUTPUT_HOOKS)) if any(getattr(module, k) for k in kinds)}
    originals = frozenset(map(id, itertools.chain(model.parameters(), model.buffers())))
    twin = (_on_meta(model) if example_inputs is None else copied(model)).eval()
    _drop_hooks_(twin)
    for inputs in _images(model) if example_inputs is None else [example_inputs]:
        first = _watched(twin, hooks, originals, '', inputs, failures)
        if first is not None:
            ways = [way for way in OTHER_WAYS if inspect.ismethod(getattr(twin, way, None))][:1]
            others = [_watched(twin, hooks, originals, way, inputs, failures) for way in ways]
            others.append(_watched(twin.train(), hooks, originals, '', inputs, failures))
            return [first, *(watch for watch in others if watch is not None)]
    return []


def flows_of(model: nn.Module, example_inputs: Optional[Tuple[Any, ...]] = None) -> Flows:
    """What becomes of the outputs of the convolutions that a model runs.

    A copy without values runs on the meta device, which takes a moment and draws nothing; the model stays as it is. It
    does not run if there is no batch norm in it.

    Args:
        model: Any model.
        example_inputs: Its arguments, for a copy with values; without them it is tried with images.

    Returns:
        What was seen. Of a model that does not run so, with a warning, no more than which outputs have no norm alone.

    Raises:
        UserError: If it does not run on the example.
    """
    passes: List[_Watch] = []
    failures: List[Tuple[Exception, Set[str]]] = []
    try:
        if any(map(is_foldable, model.modules())):
            with _drawing_nothing(model):
                passes = _passes(model, example_inputs, failures)
    except Exception as e:  # a model that cannot be copied, has no parameters, or takes no images
        failures.append((e, set()))
    if failures and not passes:
        why = failures[0][0]
        because = f'{type(why).__name__}: ' + str(why).partition('\n')[0]
        if example_inputs is not None:
            raise UserError(f'{type(model).__name__} does not run on the example_inputs ({because})') from why
        _logger.warning(
            '%s does not run on images without data (%s), so it is not seen which norm acts on a convolution: the next '
            'child of the same module is taken for it. Give expand example_inputs=, or compare the outputs of the two '
            'networks', type(model).__name__, because)
        return Flows({conv: Flow() for _, found in failures for conv in found}, frozenset())
    outputs: Dict[str, List[_Output]] = {}
    norms: Dict[str, Set[str]] = {}
    looked_at: Set[str] = set()
    for watch in passes:
        looked_at |= watch.looked_at
        for output in watch.done:
            outputs.setdefault(output.conv, []).append(output)
        for name, convs in watch.norms.items():
            norms.setdefault(name, set()).update(convs)
    flows = {conv: _flow(found, norms) for conv, found in outputs.items()}
    flows.update((name, Flow()) for name in looked_at if isinstance(model.get_submodule(name), nn.Conv2d))
    return Flows({n: Flow() if flow.norm in looked_at else flow for n, flow in flows.items()}, frozenset(norms))


def _flow(outputs: List[_Output], norms: Dict[str, Set[str]]) -> Flow:
    taken_by = sorted({output.norm for output in outputs})
    if not all(taken_by) or any(output.reads != 1 or output.is_kept for output in outputs):
        return Flow()
    shared = len(taken_by) > 1 or len(norms[taken_by[0]]) > 1
    return Flow(taken_by[0], shared, any(output.hooked for output in outputs))
