"""The authors' networks: which block of a checkpoint is which part of the model."""
from typing import Any, Iterable, Iterator, Set, Tuple

import torch
import torch.nn as nn
from timm.models import ByobNet, EfficientNet, ResNet
from timm.models._efficientnet_blocks import DepthwiseSeparableConv
from timm.models.byobnet import RepVggBlock

from ..core.errors import UserError
from ..models.checkpoint_filter import first_names
from .blocks import fill_block
from .plain import fill_folded, fill_plain
from .repvgg import fill_repvgg
from .source import Source, Weights

__all__ = ['HEAD_NAMES', 'fill_from_official_']

# What the authors call the classifier.
HEAD_NAMES = ('linear', 'fc')
# The stem of a ResNet; RepAn's for small images is a plain convolution and norm under two names of their own.
RESNET_STEM, SMALL_STEM = 'stage0.conv1', ('stage0.0', 'stage0.1')


def _resnet_blocks(model: Any) -> Iterator[Tuple[str, str, str]]:
    """The authors' name of every block of a ResNet, and our names of its convolution and norm."""
    yield RESNET_STEM, 'conv1', 'bn1'
    for stage in range(1, 5):
        for position, block in enumerate(getattr(model, f'layer{stage}')):
            theirs, ours = f'stage{stage}.{position}', f'layer{stage}.{position}'
            for number in (1, 2, 3):
                if hasattr(block, f'conv{number}'):
                    yield f'{theirs}.conv{number}', f'{ours}.conv{number}', f'{ours}.bn{number}'
            if block.downsample is not None:
                yield f'{theirs}.shortcut', f'{ours}.downsample.0', f'{ours}.downsample.1'


def _mobilenet_blocks(model: Any) -> Iterator[Tuple[str, str, str]]:
    """The authors' name of every block of a MobileNet-V1, and our names of its convolution and norm."""
    yield 'conv1', 'conv_stem', 'bn1'
    names = (f'blocks.{stage}.{block}' for stage, blocks in enumerate(model.blocks) for block in range(len(blocks)))
    for position, ours in enumerate(names):
        yield f'stem.{position}.depthwise', f'{ours}.conv_dw', f'{ours}.bn1'
        yield f'stem.{position}.pointwise', f'{ours}.conv_pw', f'{ours}.bn2'


def _fill_blocks(source: Source, model: nn.Module, blocks: Iterable[Tuple[str, str, str]]) -> Set[str]:
    """Fill a ResNet or MobileNet, and return the names of the parts that are filled."""
    filled: Set[str] = set()
    for theirs, conv_name, norm_name in blocks:
        layer: Any = model.get_submodule(conv_name)
        norm: Any = model.get_submodule(norm_name)
        if source.is_folded:
            fill_folded(source, theirs, layer, norm)
        elif theirs == RESNET_STEM and source.has(f'{SMALL_STEM[0]}.'):
            fill_plain(source, *SMALL_STEM, layer, norm)
        else:
            fill_block(source, theirs, layer, norm)
        filled |= {conv_name, norm_name}
    return filled


def _fill_body(source: Source, model: Any) -> Set[str]:
    """Fill all but the classifier, and return the names of the parts that are filled."""
    if isinstance(model, ResNet):
        return _fill_blocks(source, model, _resnet_blocks(model))
    if isinstance(model, ByobNet) and isinstance(model.stem, RepVggBlock):
        return fill_repvgg(source, model)
    is_efficient = isinstance(model, EfficientNet)
    if not is_efficient or {type(block) for stage in model.blocks for block in stage} != {DepthwiseSeparableConv}:
        raise UserError(
            'official checkpoints are of ResNets, RepVGGs and MobileNet-V1; '
            f'{source.architecture} is a {type(model).__name__}')
    if type(model.bn1.act) is not nn.ReLU:
        raise UserError(f"the authors' MobileNet has ReLU; build {source.architecture} with act_layer='relu'")
    return _fill_blocks(source, model, _mobilenet_blocks(model))


def _fill_head(source: Source, model: Any) -> str:
    """Fill the classifier, and return its name."""
    head = model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise UserError(f'official checkpoints have a classifier; {source.architecture} was built without')
    theirs = next((name for name in HEAD_NAMES if source.has(f'{name}.')), HEAD_NAMES[0])
    source.fill_weight_bias(head, theirs)
    return next(name for name, module in model.named_modules() if module is head)


@torch.no_grad()
def fill_from_official_(model: Any, tensors: Weights, label: str = 'the state dict') -> None:
    """Fill a model from a state dict in one of the authors' layouts.

    Args:
        model: ResNet, RepVGG or MobileNet-V1; in stock form if the weights are folded. It keeps its attach rate, and is
            half filled if an error is raised.
        tensors: The authors' state dict.
        label: What to call it in messages.

    Raises:
        UserError: If the model is another network, or has another activation than the authors'.
        UserError: If the weights are not those of the model: a tensor is missing, left over, or of another shape.
    """
    architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture', type(model).__name__)
    source = Source(tensors, label, architecture)
    filled = {*_fill_body(source, model), _fill_head(source, model)}
    source.check_all_taken()
    untouched = [key for key in model.state_dict() if not any(key.startswith(f'{name}.') for name in filled)]
    if untouched:
        raise source.refusal(f'it has nothing for {first_names(untouched)} of the model')
