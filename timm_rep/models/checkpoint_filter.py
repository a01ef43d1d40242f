"""Weights into the training form: from a state dict in training form, or from the stock model's."""
from typing import Dict, Iterable, Iterator, Set, Tuple

import torch
import torch.nn as nn
from timm.models import adapt_input_conv
from torch import Tensor

from ..core.errors import UserError
from ..core.layers import NormedRepLayer, RepLayer
from ..core.walk import annealed_modules, conv_name, folded_norms, image_channels, rep_layers

__all__ = ['checkpoint_filter_fn']


def first_names(keys: Iterable[str]) -> str:
    """The first three of the names in order, and how many more there are, for a message."""
    ordered = sorted(keys)
    text = ', '.join(ordered[:3])
    return f'{text} and {len(ordered) - 3} more' if len(ordered) > 3 else text


def _part(state_dict: Dict[str, Tensor], name: str) -> Dict[str, Tensor]:
    return {key[len(name) + 1:]: value for key, value in state_dict.items() if key.startswith(f'{name}.')}


def _adapted(weight: Tensor, in_channels: int) -> Tensor:
    """The kernel of a first convolution for another number of image channels, by timm's rule."""
    if weight.shape[1] == in_channels:
        return weight
    base = weight.shape[1]
    try:
        return adapt_input_conv(in_channels, weight, **({} if base == 3 else dict(base_chans=base)))
    except TypeError:  # older timm
        raise UserError(
            f'this timm adapts weights for 3 image channels only, not from {base} to {in_channels}') from None


def _stock_names(model: nn.Module, layers: Dict[str, RepLayer]) -> Dict[str, Dict[str, str]]:
    """For every rep layer, the stock keys that it takes the place of."""
    stock: Dict[str, Dict[str, str]] = {}
    norms = folded_norms(model)
    for name, layer in layers.items():
        conv = conv_name(model, name)
        keys = dict(weight=f'{conv}.weight')
        if getattr(layer, 'bias', None) is not None or getattr(layer, 'stock_bias', None) is not None:
            keys['bias'] = f'{conv}.bias'
        if name in norms:  # the layer stands for it, too
            for key in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'):
                keys[f'norm_{key}'] = f'{norms[name][0]}.{key}'
        stock[name] = keys
    return stock


def _restore_from_stock(layer: RepLayer, weights: Dict[str, Tensor]) -> None:
    weight = _adapted(weights['weight'], layer.in_channels // layer.groups)
    if weight.shape != torch.Size(layer.weight_shape):  # the rest would be broadcast, or is refused
        raise UserError(f'the kernel must have shape {tuple(layer.weight_shape)}, got {tuple(weight.shape)}')
    if isinstance(layer, NormedRepLayer) and 'norm_weight' in weights:
        norm = layer.norm_kxk
        norm.load_state_dict({key[5:]: value for key, value in weights.items() if key.startswith('norm_')})
        bias = weights.get('bias')
        layer.absorb_norm_(weight.to(norm.weight.device), bias if bias is None else bias.to(norm.weight.device))
    else:
        layer.restore_(weight, weights.get('bias'))


def _readapt_training_form(layer: RepLayer, weights: Dict[str, Tensor], in_channels: int) -> None:
    """Restore a layer from the training form of one with another number of input channels."""
    source = layer.like(in_channels=in_channels).eval()
    source.load_state_dict(weights)
    layer.set_attach_rate_(weights['attach_rate'].item())
    layer.time_step.copy_(weights['time_step'])
    if isinstance(source, NormedRepLayer):
        conv, norm = source.fuse_conv_norm()
        stock = {f'norm_{key}': value for key, value in norm.state_dict().items()}
    else:
        conv, stock = source.fuse(), {}
    _restore_from_stock(layer, dict(conv.state_dict(), **stock))


def _annealing_defaults(model: nn.Module, layers: Dict[str, RepLayer]) -> Iterator[Tuple[str, Tensor]]:
    """What weights that know no annealing have in place of a block's buffers: all branches attached."""
    for name, module in annealed_modules(model):
        if name not in layers:
            yield f'{name}.attach_rate', torch.ones_like(module.attach_rate)
            yield f'{name}.time_step', torch.zeros_like(module.time_step)


class _Fit:
    """How a state dict fits a model: which form it has, and what of it goes where.

    Args:
        state_dict: The weights.
        model: Model in training or stock form.

    Raises:
        UserError: If the weights fit neither form.
    """

    def __init__(self, state_dict: Dict[str, Tensor], model: nn.Module) -> None:
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        classifier = cfg.get('classifier') or ()
        self.heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        self.architecture = cfg.get('architecture', type(model).__name__)
        self.source_chans = (cfg.get('input_size') or (3,))[0]
        self.in_chans = image_channels(model)
        self.own = model.state_dict()
        self.layers = dict(rep_layers(model))
        self.stock = _stock_names(model, self.layers)

        training_keys = {f'{name}.{key}' for name, layer in self.layers.items() for key in layer.state_dict()}
        stock_keys = {key for keys in self.stock.values() for key in keys.values()}
        self.common = set(self.own) - training_keys
        self.is_stock = bool(self.layers) and not (training_keys - stock_keys) & set(state_dict)
        expected = self.common | (stock_keys if self.is_stock else training_keys)
        # Old checkpoints do not count their batches, and stock RepVGG blocks know no annealing.
        counts = {k: self.own.get(k, torch.tensor(0)) for k in expected if k.endswith('num_batches_tracked')}
        defaults = {k: v for k, v in _annealing_defaults(model, self.layers) if k in expected}
        self.weights = {**counts, **defaults, **state_dict}
        self._check_keys(expected, any(annealed_modules(model)))

    def is_head(self, key: str) -> bool:
        """Whether a key is of the classifier, which is left to timm."""
        return any(key.startswith(f'{head}.') for head in self.heads)

    def _check_keys(self, expected: Set[str], has_branches: bool) -> None:
        missing = {key for key in expected - set(self.weights) if not self.is_head(key)}
        unexpected = {key for key in set(self.weights) - expected if not self.is_head(key)}
        if not (missing or unexpected):
            return
        if not has_branches and any(key.endswith('.attach_rate') for key in self.weights):
            raise UserError(
                f'the weights are in training form, but this {self.architecture} is in stock form; load them without '
                'inference_mode=True and fuse, or fuse the weights first (timm-rep fuse)'
            )
        raise UserError(
            f'the weights are neither the training form nor the stock form of {self.architecture}'
            + (f'; missing: {first_names(missing)}' if missing else '')
            + (f'; not expected: {first_names(unexpected)}' if unexpected else '')
        )

    def is_adapted(self, layer: RepLayer, weights: Dict[str, Tensor]) -> bool:
        """Whether weights of a layer in training form are those for another number of image channels."""
        return self.in_chans != self.source_chans and any(
            weights[key].shape != value.shape for key, value in layer.state_dict().items())


@torch.no_grad()
def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Fit weights in training form or stock form to a model, for ``pretrained=True``.

    Stock weights go into the rep layers by ``restore_``: same outputs, ready for fine-tuning. The first convolution is
    adapted to the model's number of image channels. The classifier is left to timm.

    Args:
        state_dict: Weights of this architecture in either form.
        model: Model in training form, or in stock form (``inference_mode=True``).

    Returns:
        A state dict with the model's own keys.

    Raises:
        UserError: If the weights fit neither form.
    """
    fit = _Fit(state_dict, model)
    result = {key: value for key, value in fit.weights.items() if key in fit.common or fit.is_head(key)}
    for key in fit.common & set(result):
        if result[key].ndim == 4 and result[key].shape[1] == fit.source_chans != fit.own[key].shape[1]:
            result[key] = _adapted(result[key], fit.in_chans)
    for name, layer in fit.layers.items():
        weights = _part(fit.weights, name)
        if fit.is_stock:
            _restore_from_stock(layer, {kind: fit.weights[key] for kind, key in fit.stock[name].items()})
        elif fit.is_adapted(layer, weights):
            _readapt_training_form(layer, weights, fit.source_chans)
        else:
            result.update({f'{name}.{key}': value for key, value in weights.items()})
            continue
        result.update({f'{name}.{key}': value for key, value in layer.state_dict().items()})
    return result
