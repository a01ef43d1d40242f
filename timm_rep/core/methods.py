"""The registry of methods: a kind of rep layer under a name, with its options and the convolutions that it takes.

A method is a frozen dataclass. Its fields are its options; its class attributes say what it is, so that model cards,
plots and the command line know it without a list of their own. A new method is one file with its layer and

>>> from dataclasses import dataclass
>>> from timm_rep.core.methods import Method, register_method
>>> @register_method                                              # doctest: +SKIP
... @dataclass(frozen=True)
... class Toy(Method):
...     name, title, summary = 'toy', 'Toy', 'A kernel and half of it again.'
...     layers = (ToyConv2d,)
"""
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, Mapping, Optional, Tuple, Type, Union

import torch
import torch.nn as nn

from .errors import UserError

__all__ = [
    'Method', 'MethodLike', 'Place', 'Shares', 'as_method', 'method_from_dict', 'method_of_layer', 'register_method',
    'registered_methods',
]


@dataclass(frozen=True)
class Shares:
    """How the kernel parameters of a network's convolutions are divided, each in [0, 1].

    Attributes:
        paired: Of those in KxK convolutions, the share of those that have a norm of any kind right behind them.
        pointwise: Of those in all convolutions, the share of the 1x1 ones.
    """

    paired: float = 1.0
    pointwise: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where a convolution stands in a model: all that a method decides by.

    Attributes:
        name: Its name in the model.
        conv: The convolution, plain or of a class that pads or standardises (``core.layers.hosted.HOSTS``).
        norm: The norm, of any kind, that is the next child of the same module and has its channels, or None. For
            methods that take the norm in, the one that was seen to take the convolution's output.
        norm_name: Name of that norm, '' if there is none.
        parents: The modules around it, the model first.
        read_between: Whether something else than the norm sees the output of the convolution: another operation, a
            hook, a feature map.
        norm_stays: Whether that norm cannot go with the convolution: one of the two is shared by places without the
            other, or the norm has hooks or state of its own.
        shares: How the parameters of the network are divided.
    """

    name: str
    conv: nn.Conv2d
    norm: Optional[nn.Module]
    norm_name: str
    parents: Tuple[nn.Module, ...]
    read_between: bool = False
    norm_stays: bool = False
    shares: Shares = Shares()

    @property
    def is_classifier(self) -> bool:
        """Whether the convolution is, or is part of, what the network says is its classifier."""
        cfg = getattr(self.parents[0], 'pretrained_cfg', None) or {}
        names = cfg.get('classifier') or ()
        return any(f'{self.name}.'.startswith(f'{name}.') for name in ([names] if isinstance(names, str) else names))

    def is_inside(self, kind: Type[nn.Module]) -> bool:
        """Whether one of the modules around the convolution is of a kind."""
        return any(isinstance(module, kind) for module in self.parents)


@dataclass(frozen=True)
class Method:
    """A kind of rep layer with its options, which are the fields of the subclass.

    A subclass says what it is in class attributes and, where the defaults do not fit, which convolutions it takes
    (:meth:`takes`) and which layer stands for one of them (:meth:`layer_for`).

    Attributes:
        name: Name in ``expand(model, 'orepa')``, ``rep_layer=``, ``--method`` and files.
        title: The field's name for it, for cards and figures.
        summary: What it does, in one sentence.
        paper: Identifier as the Hub takes it, such as ``'arXiv:2204.00826'``; '' if there is none.
        citation: BibTeX entry; '' if there is none.
        layers: Classes of its layers.
        takes_norm: Whether a layer stands for a convolution together with the norm behind it.
    """

    name: ClassVar[str] = ''
    title: ClassVar[str] = ''
    summary: ClassVar[str] = ''
    paper: ClassVar[str] = ''
    citation: ClassVar[str] = ''
    layers: ClassVar[Tuple[Type[nn.Module], ...]] = ()
    takes_norm: ClassVar[bool] = False

    def takes(self, place: Place) -> bool:
        """The default policy: which of the convolutions that it could stand for the method takes unasked.

        Unless a subclass says otherwise: all that are larger than 1x1, with a norm behind them if it takes that in.
        """
        return max(place.conv.kernel_size) > 1 and (place.norm is not None or not self.takes_norm)

    def layer_for(self, place: Place) -> Tuple[Type[Any], Dict[str, Any]]:
        """Class of the layer for a convolution, and its constructor's arguments beyond those of a convolution."""
        return self.layers[0], {}

    def make_layer(
            self,
            place: Place,
            generator: Optional[torch.Generator] = None,
            same_function: bool = True,
    ) -> nn.Module:
        """Make the layer that stands for a convolution.

        Args:
            place: The convolution and what is around it.
            generator: Source of the draw.
            same_function: Whether the layer computes what was there, or is freshly drawn for a training from scratch.

        Returns:
            A layer with the convolution's geometry.

        Raises:
            UserError: If no layer of this method can stand for the convolution.
        """
        layer_cls, kwargs = self.layer_for(place)
        if self.takes_norm:
            kwargs = dict(kwargs, norm=place.norm)
        layer: nn.Module = layer_cls.from_conv(place.conv, generator, same_function=same_function, **kwargs)
        return layer

    @classmethod
    def of_layer(cls, layer: nn.Module) -> 'Method':
        """The method, with the options that a layer has which was made by hand; here the default ones."""
        return cls()

    def to_dict(self) -> Dict[str, Any]:
        """Name and options as plain data; :func:`method_from_dict` reads it."""
        return dict(method=self.name, **dataclasses.asdict(self))


MethodLike = Union[str, Method]
_METHODS: Dict[str, Type[Method]] = {}


def register_method(method_cls: Type[Method]) -> Type[Method]:
    """Make a method known by its name, as a class decorator.

    Args:
        method_cls: Frozen dataclass with options that all have defaults.

    Returns:
        The class.

    Raises:
        ValueError: If it has no name, or one that another method has.
    """
    name = method_cls.name
    if not name.isidentifier():
        raise ValueError(f'{method_cls.__name__} needs a name that can be an argument, got {name!r}')
    other = _METHODS.setdefault(name, method_cls)
    names = [(cls.__module__, cls.__qualname__) for cls in (other, method_cls)]
    if names[0] != names[1]:  # a module may be reloaded
        raise ValueError(f'the method {name!r} is {other.__name__} already')
    _METHODS[name] = method_cls
    return method_cls


def registered_methods() -> Dict[str, Type[Method]]:
    """All methods by name, in the order in which they were registered."""
    return dict(_METHODS)


def as_method(method: MethodLike) -> Method:
    """The method that a name stands for, with its default options; a method itself stays.

    Raises:
        UserError: For an unknown name, or what is neither.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str) or method not in _METHODS:
        instead = ''
        if isinstance(method, type) and issubclass(method, Method):
            instead = f', or an object, {method.__name__}()'
        raise UserError(f'unknown method {method!r}; allowed are {", ".join(map(repr, _METHODS))}{instead}')
    return _METHODS[method]()


def method_from_dict(data: Mapping[str, Any]) -> Method:
    """The method of plain data.

    Args:
        data: As :meth:`Method.to_dict` gives it.

    Returns:
        The method with these options.

    Raises:
        UserError: For an unknown method, or options that it does not have.
    """
    options = {key: value for key, value in data.items() if key != 'method'}
    method_cls = type(as_method(data.get('method', '')))
    for key, value in options.items():
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise UserError(f'options of a method are plain values, got {key}={value!r} of {method_cls.name}')
    try:
        return method_cls(**options)
    except TypeError:
        known = [field.name for field in dataclasses.fields(method_cls)]
        raise UserError(f'{method_cls.name} has the options {known}, got {sorted(options)}') from None


def method_of_layer(layer: nn.Module) -> Optional[Method]:
    """The method that a layer was made by; of a layer that was made by hand, the one that has its class.

    Args:
        layer: Any module.

    Returns:
        The method, or None if no registered method has such layers.
    """
    made_by = getattr(layer, 'method', None)
    if isinstance(made_by, Method):
        return made_by
    return next((cls.of_layer(layer) for cls in _METHODS.values() if type(layer) in cls.layers), None)
