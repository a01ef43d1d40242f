"""Take rep layers out of a model again: its stock form."""
import inspect
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List, Mapping, Tuple

import torch
import torch.nn as nn

from .errors import UserError
from .layers import AnnealedModule, FoldedNorm, HostedConv2d
from .sharded import check_whole
from .walk import (
    HOOKS,
    SECOND_PLACE,
    ModelT,
    ancestors_of,
    annealed_modules,
    compiled_parts,
    conv_name,
    copied,
    folded_norms,
    held_elsewhere,
    move_hooks,
    names_of,
    parent_of,
    unwrapped,
    without_compiled_parts,
)

__all__ = ['fuse', 'fuse_before_own_', 'when_fused']

# Methods by which networks fold their own convolutions and norms, and which timm's `reparameterize_model` calls.
OWN_FUSE = ('fuse', 'reparameterize', 'switch_to_deploy')

# A module, and the name of one of its children.
Place = Tuple[nn.Module, str]

CALL = nn.Module._call_impl.__code__

_WHEN_FUSED: List[Callable[[nn.Module], None]] = []


def when_fused(action: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Have a function called with every module of a model that was fused, as a decorator.

    Args:
        action: For example one that lets a model's metadata name what it is now.

    Returns:
        The function.
    """
    _WHEN_FUSED.append(action)
    return action


@dataclass(frozen=True)
class _FusedBefore:
    """Stands in for a module's own method that folds its convolutions, which must be in stock form for that.

    A call that does something else (with more than settings for arguments, while training, or in a forward) goes
    through as it is.
    """

    module: nn.Module
    name: str
    elsewhere: Tuple[Place, ...]  # where else in the model its parts are

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        settings = all(_is_setting(value) for value in (*args, *kwargs.values()))
        folds = settings and not self.module.training and not torch.compiler.is_compiling()
        if folds and not self._is_in_forward():
            _put_in_(self.module, _stock_forms(self.module), self.elsewhere)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    def _is_in_forward(self) -> bool:
        """Whether a module is being called, or the ``forward...`` of this one."""
        frame = inspect.currentframe()
        while frame is not None:
            by_name = frame.f_code.co_name.startswith('forward')
            if frame.f_code is CALL or (by_name and any(value is self.module for value in frame.f_locals.values())):
                return True
            frame = frame.f_back
        return False


def _is_setting(value: Any) -> bool:
    """Whether an argument is a switch, a number, or numbers such as an image size, and no feature map."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(part, (int, float)) for part in value)
    return isinstance(value, (int, float, str, type(None)))


def fuse_before_own_(model: nn.Module, names: Iterable[str]) -> None:
    """Let the modules around rep layers be fused before they fold their convolutions by a method of their own.

    Args:
        model: Model with rep layers.
        names: Names of some.
    """
    parents = {id(parent): parent for name in names for parent in ancestors_of(model, name)}
    for parent in parents.values():
        for method in OWN_FUSE:
            own = inspect.getattr_static(type(parent), method, None)  # a static one folds no module
            taken = method in vars(parent) and not isinstance(vars(parent)[method], _FusedBefore)
            if inspect.isfunction(own) and not taken and not isinstance(parent, AnnealedModule):
                vars(parent)[method] = _FusedBefore(parent, method, _elsewhere(model, parent))


def _elsewhere(model: nn.Module, parent: nn.Module) -> Tuple[Place, ...]:
    """The places in a model, outside a part of it, of what is changed when that part is fused."""
    inside = {id(module) for module in parent.modules()}
    return tuple(
        (holder, child) for holder in model.modules() if id(holder) not in inside
        for child, module in holder._modules.items()
        if id(module) in inside and isinstance(module, (AnnealedModule, FoldedNorm, HostedConv2d))
    )


def _stock_forms(model: nn.Module) -> Dict[str, nn.Module]:
    """What takes the place of rep layers and folded norms, by the name that it has without torch.compile."""
    for _, name, part in compiled_parts(model):
        if any(getattr(part, hooks) for hooks in HOOKS):
            raise UserError(
                f'a hook lies on what torch.compile made of {name}, which fuse takes off; remove the hook before fuse, '
                f'or put it on {name} before torch.compile')
    with without_compiled_parts(model):
        return _stock_forms_by_name(model)


def _stock_forms_by_name(model: nn.Module) -> Dict[str, nn.Module]:
    replacements: Dict[str, nn.Module] = {}
    norms = folded_norms(model)
    for layer_name, module in annealed_modules(model):
        name = conv_name(model, layer_name)
        if name == '':
            raise UserError("fuse needs a model around the layer; for one alone use the layer's own fuse()")
        _refuse_offloaded(name, module)
        norm_name, behind = norms.get(layer_name, ('', None))
        stock, norm = module.stock_form(behind)
        host = model.get_submodule(name)
        replacements[name] = host.stock_conv(stock) if isinstance(host, HostedConv2d) else stock  # type: ignore[arg-type]
        if norm is not None:
            replacements[norm_name] = norm
    held = held_elsewhere(model)
    for name in replacements:
        if id(model.get_submodule(name)) in held:
            raise UserError(f'{name} cannot be fused: it has {SECOND_PLACE}, which would go on with it')
    return replacements


def _refuse_places_without_layer(model: nn.Module, replacements: Iterable[str]) -> None:
    """Raise a UserError for what holds the place of a norm whose layer is gone: there is no norm any more."""
    found = {id(part) for name in replacements for part in model.get_submodule(name).modules()}
    for name, module in model.named_modules():
        if isinstance(module, FoldedNorm) and id(module) not in found:
            raise UserError(
                f'{name or "the module"} holds the place of a batch norm that went into a rep layer, which is not in '
                'front of it any more (replaced, moved, or fused alone). Fuse the whole network as it was expanded, or '
                'put a norm there')


def _refuse_offloaded(name: str, module: nn.Module) -> None:
    """Raise a UserError for weights that accelerate holds elsewhere between the forwards."""
    hooked = any(hasattr(part, '_hf_hook') for part in module.modules())
    if hooked and any(parameter.is_meta for parameter in module.parameters()):
        raise UserError(f'the weights of {name} are offloaded by accelerate; fuse the model first, and offload that')


def _put_in_(model: nn.Module, replacements: Mapping[str, nn.Module], elsewhere: Iterable[Place] = ()) -> None:
    """Replace modules in all their places: a shared one is one module in several."""
    for parent, name, part in compiled_parts(model):
        setattr(parent, name, unwrapped(part))
    places = names_of(model)
    for name, new_module in replacements.items():
        old = model.get_submodule(name)
        for place in places[id(old)]:
            move_hooks(old, new_module)
            setattr(*parent_of(model, place), new_module)
        for holder, child in elsewhere:
            if holder._modules.get(child) is old:
                setattr(holder, child, new_module)
    for part in model.modules():
        for method in OWN_FUSE:
            if isinstance(vars(part).get(method), _FusedBefore):
                del vars(part)[method]
        for action in _WHEN_FUSED:
            action(part)


def fuse(model: ModelT, *, inplace: bool = False) -> ModelT:
    """Turn a rep model into its stock form: plain convolutions, live norms, the module tree and keys of timm's model.

    To fold the norms (and RepVGG's branches) too, call ``timm.utils.reparameterize_model`` on the result.

    Args:
        model: Model with rep layers; without any, it comes back unchanged.
        inplace: Change the model itself instead of a copy.

    Returns:
        The fused model, without the wrappers that it had (DDP, torch.compile; of compiled parts, too). If its
        architecture is one of ours with a stock counterpart, its ``pretrained_cfg`` names that.

    Raises:
        UserError: For layers with norms in their branches in training mode, or with a hook on their outputs, for norms
            that such a layer has taken in and that has been replaced since, for sharded parameters, for layers that
            lie in a list or a bound method, too, and for hooks on what torch.compile made of parts. The model is then
            unchanged.
    """
    model = unwrapped(model)
    check_whole(model)
    replacements = _stock_forms(model)
    _refuse_places_without_layer(model, replacements)
    if not inplace:
        model = copied(model)
    _put_in_(model, replacements)
    return model
