"""Weights into the training form: from a state dict in training form, or from the stock model's."""
from typing import Dict, Iterable, Iterator, Optional, Set, Tuple

import torch
import torch.nn as nn
from timm.models import adapt_input_conv
from torch import Tensor

from ..core.errors import UserError
from ..core.layers import FoldedNorm, NormedRepLayer, RepLayer
from ..core.walk import annealed_modules, image_channels, next_sibling, rep_layers

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
    return adapt_input_conv(in_channels, weight, **({} if base == 3 else dict(base_chans=base)))  # older timm: 3 only


def _stock_norm(model: nn.Module, name: str) -> Optional[str]:
    """Name of the norm that a branched layer stands for besides its convolution."""
    norm_name, norm = next_sibling(model, name)
    return norm_name if isinstance(norm, FoldedNorm) else None


def _stock_names(model: nn.Module, layers: Dict[str, RepLayer]) -> Dict[str, Dict[str, str]]:
    """For every rep layer, the stock keys that it takes the place of."""
    stock: Dict[str, Dict[str, str]] = {}
    for name, layer in layers.items():
        keys = dict(weight=f'{name}.weight')
        if getattr(layer, 'bias', None) is not None:
            keys['bias'] = f'{name}.bias'
        norm = _stock_norm(model, name)
        if norm is not None:
            for key in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'):
                keys[f'norm_{key}'] = f'{norm}.{key}'
        stock[name] = keys
    return stock


def _same_shapes(layer: RepLayer, weights: Dict[str, Tensor]) -> bool:
    return all(weights[key].shape == value.shape for key, value in layer.state_dict().items())


def _restore_from_stock(layer: RepLayer, weights: Dict[str, Tensor]) -> None:
    weight = _adapted(weights['weight'], layer.in_channels // layer.groups)
    if isinstance(layer, NormedRepLayer) and 'norm_weight' in weights:
        norm = layer.norm_kxk
        norm.load_state_dict({key[5:]: value for key, value in weights.items() if key.startswith('norm_')})
        layer.absorb_norm_(weight.to(norm.weight.device))
    else:
        layer.restore_(weight, weights.get('bias'))


def _readapt_training_form(layer: RepLayer, weights: Dict[str, Tensor], in_channels: int) -> None:
    """Restore a layer from the training form of one with another number of input channels."""
    source = layer.like(in_channels=in_channels).eval()
    source.load_state_dict(weights)
    layer.set_attach_rate_(weights['attach_rate'].item())
    layer.time_step.copy_(weights['time_step'])
    fused = source.fuse()
    layer.restore_(_adapted(fused.weight, layer.in_channels // layer.groups), fused.bias)


def _annealing_defaults(model: nn.Module, layers: Dict[str, RepLayer]) -> Iterator[Tuple[str, Tensor]]:
    """What weights that know no annealing have in place of a block's buffers: all branches attached."""
    for name, module in annealed_modules(model):
        if name not in layers:
            yield f'{name}.attach_rate', torch.ones_like(module.attach_rate)
            yield f'{name}.time_step', torch.zeros_like(module.time_step)


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
        UserError: If the weights fit neither form. No layer is left half loaded.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    architecture = cfg.get('architecture', type(model).__name__)
    classifier = cfg.get('classifier') or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    source_chans = (cfg.get('input_size') or (3,))[0]
    in_chans = image_channels(model)

    own = model.state_dict()
    layers = dict(rep_layers(model))
    stock = _stock_names(model, layers)
    training_keys = {f'{name}.{key}' for name, layer in layers.items() for key in layer.state_dict()}
    stock_keys = {key for keys in stock.values() for key in keys.values()}
    common = set(own) - training_keys
    is_stock = bool(layers) and not (training_keys - stock_keys) & set(state_dict)
    expected = common | (stock_keys if is_stock else training_keys)

    def is_head(key: str) -> bool:
        return any(key.startswith(f'{head}.') for head in heads)

    # Old checkpoints do not count their batches, and stock RepVGG blocks know no annealing.
    state_dict = {k: own.get(k, torch.tensor(0)) for k in expected if k.endswith('num_batches_tracked')} | state_dict
    state_dict = {k: v for k, v in _annealing_defaults(model, layers) if k in expected} | state_dict
    missing = {k for k in expected - set(state_dict) if not is_head(k)}
    unexpected = {k for k in set(state_dict) - expected if not is_head(k)}
    has_branches = any(annealed_modules(model))
    if (missing or unexpected) and not has_branches and any(k.endswith('.attach_rate') for k in state_dict):
        raise UserError(
            f'the weights are in training form, but this {architecture} is in stock form; load them without '
            'inference_mode=True and fuse, or fuse the weights first (timm-rep fuse)'
        )
    if missing or unexpected:
        raise UserError(
            f'the weights are neither the training form nor the stock form of {architecture}'
            + (f'; missing: {first_names(missing)}' if missing else '')
            + (f'; not expected: {first_names(unexpected)}' if unexpected else '')
        )

    def fits(key: str, value: Tensor, shape: torch.Size) -> bool:
        if value.shape == shape or is_head(key):
            return True
        first_conv = value.ndim == 4 and value.shape[1] == source_chans and shape[1] == in_chans
        return first_conv and value.shape[0] == shape[0] and value.shape[2:] == shape[2:]

    adapt: Set[str] = set()  # layers in training form for another number of image channels
    shapes = {key: own[key].shape for key in common}
    for name, layer in layers.items():
        if is_stock:
            channels = torch.Size([layer.out_channels])
            shapes.update({
                key: torch.Size(layer.weight_shape) if kind == 'weight' else channels
                for kind, key in stock[name].items() if kind != 'norm_num_batches_tracked'
            })
        else:
            source = layer
            if in_chans != source_chans and not _same_shapes(layer, _part(state_dict, name)):
                source = layer.like(in_channels=source_chans, device='meta')
                adapt.add(name)
            shapes.update({f'{name}.{key}': value.shape for key, value in source.state_dict().items()})
    for key, shape in shapes.items():
        if key in state_dict and not fits(key, state_dict[key], shape):
            raise UserError(
                f'the weights are of another architecture than {architecture}: {key} has shape '
                f'{tuple(state_dict[key].shape)}, the model takes {tuple(shape)}'
            )

    result = {key: value for key, value in state_dict.items() if key in common or is_head(key)}
    for key in common & set(result):
        if result[key].ndim == 4 and result[key].shape != own[key].shape:
            result[key] = _adapted(result[key], in_chans)
    for name, layer in layers.items():
        weights = _part(state_dict, name)
        if is_stock:
            _restore_from_stock(layer, {kind: state_dict[key] for kind, key in stock[name].items()})
        elif name in adapt:
            _readapt_training_form(layer, weights, source_chans)
        else:
            result.update({f'{name}.{key}': value for key, value in weights.items()})
            continue
        result.update({f'{name}.{key}': value for key, value in layer.state_dict().items()})
    return result
