"""What was done to a model: which of its layers are which method, as plain data that travels with the weights."""
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping

import torch.nn as nn

from .errors import UserError
from .layers import AnnealedRepVggBlock, RepLayer
from .methods import Method, method_from_dict, method_of_layer
from .walk import annealed_modules, conv_name, folded_norms

__all__ = ['Expansion', 'expansion_of', 'methods_from_list', 'norms_from_list']


@dataclass(frozen=True)
class Expansion:
    """Which layers of a model are which method.

    Attributes:
        methods: The method of every rep layer, and of every RepVGG block with an attach rate, by its name.
        convs: Convolutions in the stock form that each method, by its name, has taken.
        parameters: Kernel parameters of these convolutions in the stock form, by method.
        all_convs: Convolutions of the stock form, taken or not.
        all_parameters: Their kernel parameters.
        norms: Of layers that have taken a norm in which is not right behind them, the name of that norm.
    """

    methods: Dict[str, Method]
    convs: Dict[str, int]
    parameters: Dict[str, int]
    all_convs: int
    all_parameters: int
    norms: Dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        taken, parameters = sum(self.convs.values()), sum(self.parameters.values())
        text = f'{taken} of {self.all_convs} convolutions, {self._share(parameters)} of their parameters'
        if len(self.convs) > 1:
            text += ' ('
            text += '; '.join(
                f'{name}: {count}, {self._share(self.parameters[name])}' for name, count in self.convs.items()) + ')'
        elif self.convs:
            text += f', are {next(iter(self.convs))}'
        return text

    @property
    def taken(self) -> float:
        """The share of the convolutions' parameters that was taken, in [0, 1]."""
        return sum(self.parameters.values()) / max(self.all_parameters, 1)

    def _share(self, parameters: int) -> str:
        return f'{100 * parameters / max(self.all_parameters, 1):.1f} %'

    def to_list(self) -> List[Dict[str, Any]]:
        """Plain data, one entry for each method with its options: ``dict(method=, options ..., layers=[names])``.

        Where norms are not right behind their layers, the entry has their names, too: ``norms={layer: norm}``.
        """
        names: Dict[Method, List[str]] = {}
        for name, method in self.methods.items():
            names.setdefault(method, []).append(name)
        entries = []
        for method, layers in names.items():
            norms = {name: self.norms[name] for name in layers if name in self.norms}
            entries.append(dict(method.to_dict(), layers=layers, **(dict(norms=norms) if norms else {})))
        return entries


def methods_from_list(data: Any) -> Dict[str, Method]:
    """The method of every layer, from what :meth:`Expansion.to_list` gave.

    Args:
        data: Plain data.

    Returns:
        Methods by the layers' names.

    Raises:
        UserError: If it is not such data, or names a method that is not registered.
    """
    if not isinstance(data, list) or not all(isinstance(entry, Mapping) for entry in data):
        raise UserError(f'an expansion is a list of methods with their layers, got {data!r}')
    methods: Dict[str, Method] = {}
    for entry in data:
        options = {key: value for key, value in entry.items() if key not in ('layers', 'norms')}
        layers = entry.get('layers')
        if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
            raise UserError(f'an expansion names the layers of each method, got {layers!r}')
        methods.update(dict.fromkeys(layers, method_from_dict(options)))
    return methods


def norms_from_list(data: Any) -> Dict[str, str]:
    """The norms that are not right behind their layers, from what :meth:`Expansion.to_list` gave.

    Args:
        data: Plain data that :func:`methods_from_list` accepts.

    Returns:
        Names of norms by the layers' names.

    Raises:
        UserError: If they are not such names.
    """
    norms: Dict[str, str] = {}
    for entry in data:
        named = entry.get('norms', {})
        if not isinstance(named, Mapping) or not all(isinstance(norm, str) for norm in named.values()):
            raise UserError(f'an expansion names the norms of layers, got {named!r}')
        norms.update(named)
    return norms


def expansion_of(model: nn.Module) -> Expansion:
    """What was expanded in a model.

    Args:
        model: Any model.

    Returns:
        The methods of its layers, and how much of its convolutions they have taken.
    """
    methods: Dict[str, Method] = {}
    convs: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    all_convs = all_parameters = 0
    inside: set[int] = set()  # modules of rep layers, which are no convolutions of the stock form

    def note(name: str, module: nn.Module, *sizes: int) -> None:
        nonlocal all_convs, all_parameters
        method = method_of_layer(module)
        all_convs += len(sizes)
        all_parameters += sum(sizes)
        if method is not None:
            methods[name] = method
            convs[method.name] += len(sizes)
            parameters[method.name] += sum(sizes)

    def note_layer(name: str, layer: RepLayer) -> None:
        inside.update(id(part) for part in layer.modules())
        out_channels, in_per_group, height, width = layer.weight_shape
        note(name, layer, out_channels * in_per_group * height * width)

    for layer_name, module in annealed_modules(model):
        name = conv_name(model, layer_name)
        if isinstance(module, AnnealedRepVggBlock):
            own = [module.conv_1x1.conv]
            kxk = module.conv_kxk.conv
            if isinstance(kxk, RepLayer):
                note_layer(f'{name}.conv_kxk.conv' if name else 'conv_kxk.conv', kxk)
            else:
                own.append(kxk)
            note(name, module, *(conv.weight.numel() for conv in own))
            inside.update(id(part) for part in module.modules())
        elif isinstance(module, RepLayer):
            note_layer(name, module)
    for plain in model.modules():
        if isinstance(plain, nn.Conv2d) and id(plain) not in inside:
            all_convs += 1
            all_parameters += plain.weight.numel()
    norms = {
        conv_name(model, name): norm_name for name, (norm_name, norm) in folded_norms(model).items() if norm.is_far}
    return Expansion(methods, dict(convs), dict(parameters), all_convs, all_parameters, norms)
