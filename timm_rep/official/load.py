"""Checkpoints that the authors of OREPA, DBB, RepVGG and RepAn published, into our models.

The authors' blocks own the norm behind the convolution, so a block of theirs is a pair here, convolution and norm:

=====================  ==================================================  ==================================
block                  tensors, by the start of their names                here
=====================  ==================================================  ==================================
OREPA                  ``weight_orepa_``, in RepVGG ``weight_rbr_``        ``OrepaConv2d`` and norm
OREPA stem             ``weight0.weight_orepa_``, ``weight1. ...``         ``OrepaStemConv2d`` and norm
Rep-1x1                ``weight_or1x1_``                                   ``OrepaPointwiseConv2d`` and norm
DBB                    ``dbb_origin``, ``dbb_avg``, ``dbb_1x1_kxk`` ...    ``DiverseBranchConv2d``
ACB                    ``square_``, ``hor_``, ``ver_``                     ``AsymmetricConv2d``
REP of RepAn           ``dbb_origin``, ``dbb_1x1``                         ``RepConv2d``, its identity adds nothing
plain                  ``conv``, ``bn``                                    convolution and norm; else restored
RepVGG                 ``rbr_dense``, ``rbr_1x1``, ``rbr_identity``        timm's ``RepVggBlock``
RepVGG of RepAn        ``conv_3``, ``bn_3``, ``conv_1``, ``bn_1`` ...      timm's ``RepVggBlock``
folded, any            ``*_reparam``, ``rep_conv``, ``conv`` with bias     stock form
=====================  ==================================================  ==================================

Sources of the layouts: the repositories that NOTICE names, at commits 3ed037b (OREPA_CVPR2022), 8d2b16b
(DiverseBranchBlock), eae7c52 (RepVGG), 7cb05e9 (RepAn).
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Set, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.models import ByobNet, EfficientNet, ResNet, clean_state_dict
from timm.models._efficientnet_blocks import DepthwiseSeparableConv
from timm.models.byobnet import RepVggBlock
from torch import Tensor

from ..core import kernels
from ..core.errors import UserError
from ..core.fuse import fuse
from ..core.layers import (
    AsymmetricConv2d,
    DiverseBranchConv2d,
    LinearRepLayer,
    NormedRepLayer,
    OrepaConv2d,
    OrepaPointwiseConv2d,
    OrepaStemConv2d,
    RepConv2d,
)
from ..core.verify import Report, verify
from ..core.walk import annealed_modules, set_attach_rate
from ..hub.export import export_folder
from ..io.architecture import create_model
from ..io.checkpoint import read_checkpoint
from ..io.output import PathLike, is_weights_file, new_output
from ..io.weights import save_weights
from ..models.checkpoint_filter import first_names

__all__ = ['ImportedCheckpoint', 'import_checkpoint', 'load_official_checkpoint']

# Rows of the authors' scales, by branch (official blocks.py, blocks_repvgg.py, where there is no conv_1x1).
OREPA_SCALE_ROWS = ('origin', 'average', 'prior', 'sequential', 'conv_1x1', 'separable')
# Names of the tensors of an OREPA block behind its prefix.
OREPA_BLOCK, OREPA_REPVGG_BLOCK = 'weight_orepa_', 'weight_rbr_'
# Parts of DiverseBranchConv2d, as DBB calls them (official diversebranchblock.py).
DBB_NAMES = dict(
    conv_kxk='dbb_origin.conv',
    norm_kxk='dbb_origin.bn',
    conv_1x1='dbb_1x1.conv',
    norm_1x1='dbb_1x1.bn',
    avg_conv='dbb_avg.conv',
    avg_inner_norm='dbb_avg.bn.bn',
    avg_norm='dbb_avg.avgbn',
    seq_inner_norm='dbb_1x1_kxk.bn1.bn',
    seq_kxk='dbb_1x1_kxk.conv2',
    seq_norm='dbb_1x1_kxk.bn2',
)
# Parts of AsymmetricConv2d, as DBB's repository calls them (official acb.py).
ACB_NAMES = dict(
    conv_kxk='square_conv',
    norm_kxk='square_bn',
    conv_1xk='hor_conv',
    norm_1xk='hor_bn',
    conv_kx1='ver_conv',
    norm_kx1='ver_bn',
)
# Parts of RepConv2d, as RepAn calls them (official repblock.py).
REP_NAMES = dict(
    conv_kxk='dbb_origin.conv',
    norm_kxk='dbb_origin.bn',
    conv_1x1='dbb_1x1.conv',
    norm_1x1='dbb_1x1.bn',
)
# What the authors call the convolution of a folded block.
FOLDED_NAMES = (
    'orepa_reparam',
    'or1x1_reparam',
    'or_large_reparam',
    'dbb_reparam',
    'rbr_reparam',
    'rep_conv',
    'fused_conv',
    'conv',
)
# RepAn keeps the folded convolution beside the branches; in training form it is not what the block computes.
REPAN_CACHES = ('rep_conv', 'dbb_reparam', 'fused_conv')
# Classifiers.
HEAD_NAMES = ('linear', 'fc')

Weights = Mapping[str, Tensor]


class _Source:
    """The tensors of a checkpoint, all of which must be taken.

    What is missing, left over or of another shape comes out at the end: until then a tensor that is not there is zeros,
    so that one pass finds all that is wrong.
    """

    def __init__(self, tensors: Weights, label: str, architecture: str) -> None:
        self._tensors = tensors
        self._left = set(tensors)
        self._label = label
        self._architecture = architecture
        self._missing: List[str] = []
        self._misfits: List[str] = []

    def has(self, start: str) -> bool:
        """Whether a name begins so."""
        return any(name.startswith(start) for name in self._tensors)

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor that must be there, of this shape."""
        value = self.take_optional(name)
        if value is None:
            self._missing.append(name)
        elif tuple(value.shape) != tuple(shape):
            self._misfits.append(f'{name} has shape {tuple(value.shape)}, the model takes {tuple(shape)}')
        else:
            return value
        return torch.zeros(tuple(shape))

    def take_optional(self, name: str) -> Optional[Tensor]:
        """A tensor, or None."""
        self._left.discard(name)
        return self._tensors.get(name)

    def take_count(self, name: str) -> int:
        """A number of batches; 0 if it is not there, since old checkpoints do not count."""
        value = self.take_optional(name)
        if value is None:
            return 0
        if value.numel() == 1 and torch.isfinite(value).all() and value >= 0:
            return int(value)
        self._misfits.append(f'{name} is not a number of batches')
        return 0

    def fill(self, tensor: Tensor, name: str) -> None:
        """Overwrite a tensor of the model."""
        tensor.copy_(self.take(name, tensor.shape))

    def check_constant(self, name: str, expected: Tensor) -> None:
        """A constant that we compute: if the file has it, it must be ours."""
        value = self.take_optional(name)
        if value is None:
            return
        atol = 1e-6 if value.dtype in (torch.float32, torch.float64) else 1e-2
        if value.shape != expected.shape or not torch.allclose(value.double(), expected.double(), rtol=0.0, atol=atol):
            self._misfits.append(f'the constant {name} is another than that of the published code')

    def skip_caches(self, prefix: str) -> None:
        """Take what RepAn keeps of the last fold: the block does not compute with it."""
        for cache in REPAN_CACHES:
            for kind in ('weight', 'bias'):
                self.take_optional(f'{prefix}.{cache}.{kind}')

    def refuse(self, reason: str) -> UserError:
        """The error for a checkpoint that is not one of the architecture."""
        return UserError(f'{self._label} does not hold official weights of {self._architecture}; {reason}')

    def check_all_taken(self) -> None:
        """Raise if anything was missing, of another shape, or is left over."""
        if self._missing or self._left:
            raise self.refuse('; '.join(
                f'{what}: {first_names(names)}'
                for what, names in (('missing', self._missing), ('not expected', sorted(self._left))) if names
            ))
        if self._misfits:
            raise self.refuse(self._misfits[0])


def _load_norm(source: _Source, name: str, norm: nn.BatchNorm2d) -> None:
    for kind in ('weight', 'bias', 'running_mean', 'running_var'):
        source.fill(getattr(norm, kind), f'{name}.{kind}')
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(source.take_count(f'{name}.num_batches_tracked'))


def _mirror_sign(prior: Tensor) -> Optional[Tensor]:
    """The sign that each prior filter gets by mirroring in both axes, ``(o,)``; None if mirroring does more."""
    mirrored = prior.flip([2, 3])
    sign = torch.where((mirrored - prior).abs().amax([1, 2, 3]) < (mirrored + prior).abs().amax([1, 2, 3]), 1.0, -1.0)
    return sign if torch.allclose(mirrored, prior * sign.reshape(-1, 1, 1, 1), rtol=0.0, atol=1e-9) else None


def _load_orepa_branches(
        source: _Source,
        prefix: str,
        layer: OrepaConv2d,
        mirrored: bool = False,
) -> None:
    """Fill an OREPA layer; ``mirrored`` gives it the authors' kernel mirrored in both axes."""
    in_repvgg = source.has(f'{prefix}.{OREPA_REPVGG_BLOCK}')
    start = f'{prefix}.{OREPA_REPVGG_BLOCK if in_repvgg else OREPA_BLOCK}'
    out_channels, in_per_group = layer.weight_shape[:2]
    groups, size = layer.groups, layer.kernel_size
    views = layer.branch_views()

    def take(name: str, shape: Sequence[int], spatial: bool = False) -> Tensor:
        value = source.take(start + name, shape)
        return value.flip([2, 3]) if spatial and mirrored else value

    pointwise = (out_channels, in_per_group, 1, 1)
    views['origin'].copy_(take('origin', layer.weight_shape, spatial=True))
    views['average'].copy_(take('avg_conv', pointwise).flatten(1))
    if 'conv_1x1' in views:
        views['conv_1x1'].copy_(take('1x1', pointwise).flatten(1))

    exact: Dict[str, Any] = dict(device=torch.device('cpu'), dtype=torch.float64)
    prior = kernels.frequency_prior(out_channels, size, **exact)
    prior_conv = take('pfir_conv', pointwise).flatten(1)
    if mirrored:
        sign = _mirror_sign(prior)
        if sign is None:
            raise source.refuse(
                f'the prior filters of {prefix} have no mirror image, since {out_channels} channels is an odd number')
        prior_conv = prior_conv * sign.to(prior_conv).reshape(-1, 1)
    views['prior'].copy_(prior_conv)

    inner = layer.seq_1x1.shape[0]
    source.fill(layer.seq_1x1, f'{start}1x1_kxk_idconv1')
    sequential = take('1x1_kxk_conv2', (out_channels, inner // groups, *size), spatial=True)
    views['sequential'].copy_(sequential.unflatten(1, (-1, in_per_group)).transpose(1, 2))

    layer.dw_conv.copy_(take('gconv_dw', layer.dw_conv.shape, spatial=True))
    # The authors' grouped form lets the group vary fastest over the outputs of this 1x1.
    expansion = views['separable'].shape[2]
    separable = take('gconv_pw', (out_channels, in_per_group * expansion, 1, 1))
    separable = separable.unflatten(0, (-1, groups)).transpose(0, 1)
    views['separable'].copy_(separable.reshape(views['separable'].shape))

    # In RepVGG a block with identity branch has a row more, which nothing sets or uses (official blocks_repvgg.py).
    unused = in_repvgg and layer.in_channels == layer.out_channels and layer.stride == (1, 1)
    rows = [name for name in OREPA_SCALE_ROWS if name in layer.branch_names]
    scale = source.take(f'{prefix}.vector', (len(rows) + unused, out_channels))
    for row, name in enumerate(rows):
        layer.scale[layer.branch_names.index(name)].copy_(scale[row])

    identity = kernels.grouped_identity(in_per_group, **exact).repeat(inner // in_per_group, 1, 1, 1)
    source.check_constant(f'{prefix}.id_tensor', identity)
    source.check_constant(f'{start}avg_avg', kernels.average_kernel(size, **exact)[0, 0])
    source.check_constant(f'{start}prior', prior[:, 0])


def _load_orepa(source: _Source, prefix: str, layer: OrepaConv2d, norm: Any) -> None:
    _load_orepa_branches(source, prefix, layer)
    _load_norm(source, f'{prefix}.bn', norm)


def _load_pointwise(source: _Source, prefix: str, layer: OrepaPointwiseConv2d, norm: Any) -> None:
    source.fill(layer.conv_1x1, f'{prefix}.weight_or1x1_origin')
    source.fill(layer.seq_first, f'{prefix}.weight_or1x1_l2i_conv1')
    source.fill(layer.seq_second, f'{prefix}.weight_or1x1_l2i_conv2')
    source.fill(layer.scale, f'{prefix}.vector')
    _load_norm(source, f'{prefix}.bn', norm)


def _load_stem(source: _Source, prefix: str, layer: OrepaStemConv2d, norm: Any) -> None:
    """Fill the stem. The authors squeeze by cross-correlation, so all layers but the first enter it mirrored."""
    for position, part in enumerate(layer.stack):
        assert isinstance(part, OrepaConv2d)
        _load_orepa_branches(source, f'{prefix}.weight{position}', part, mirrored=position > 0)
    _load_norm(source, f'{prefix}.bn', norm)


def _silence_(norm: Optional[nn.BatchNorm2d]) -> None:
    """Let a branch that ends in this norm, if there is one, add nothing."""
    if norm is not None:
        norm.reset_parameters()
        nn.init.zeros_(norm.weight)


def _load_parts(source: _Source, prefix: str, layer: NormedRepLayer, names: Mapping[str, str]) -> None:
    for name, theirs in names.items():
        part = getattr(layer, name)
        if isinstance(part, nn.Conv2d):
            source.fill(part.weight, f'{prefix}.{theirs}.weight')
        elif part is not None:  # a depthwise block has fewer branches
            _load_norm(source, f'{prefix}.{theirs}', getattr(part, 'norm', part))


def _load_dbb(source: _Source, prefix: str, layer: DiverseBranchConv2d, norm: Any) -> None:
    _load_parts(source, prefix, layer, DBB_NAMES)
    if layer.avg_conv is None:
        first = source.take(f'{prefix}.dbb_1x1_kxk.conv1.weight', layer.seq_1x1.shape)
        layer.seq_1x1.copy_(first.to(layer.seq_1x1) - layer.seq_identity)
    else:
        source.fill(layer.seq_1x1, f'{prefix}.dbb_1x1_kxk.idconv1.weight')


def _load_acb(source: _Source, prefix: str, layer: AsymmetricConv2d, norm: Any) -> None:
    _load_parts(source, prefix, layer, ACB_NAMES)


def _load_rep(source: _Source, prefix: str, layer: RepConv2d, norm: Any) -> None:
    """Fill a REP layer. The authors' has no identity branch, and no 1x1 if it is depthwise."""
    depthwise = layer.groups == layer.out_channels
    names = {ours: theirs for ours, theirs in REP_NAMES.items() if not (depthwise and ours.endswith('1x1'))}
    _load_parts(source, prefix, layer, names)
    _silence_(layer.norm_identity)
    if depthwise:
        _silence_(layer.norm_1x1)


def _load_plain(source: _Source, conv_name: str, norm_name: str, layer: Any, norm: Any) -> None:
    """Fill a convolution and its norm; where we have a rep layer, restore it."""
    weight_name = f'{conv_name}.weight'
    if isinstance(layer, NormedRepLayer):  # has the norm in it
        _load_norm(source, norm_name, layer.norm_kxk)
        layer.absorb_norm_(source.take(weight_name, layer.weight_shape).to(layer.norm_kxk.weight))
        return
    if isinstance(layer, LinearRepLayer):
        layer.restore_(source.take(weight_name, layer.weight_shape))
    else:
        source.fill(layer.weight, weight_name)
    _load_norm(source, norm_name, norm)


@dataclass(frozen=True)
class _Block:
    """A kind of block in training form: how it is called, how its tensors' names start, what loads it."""

    label: str
    starts: Tuple[str, ...]
    load: Callable[[_Source, str, Any, Any], None]


# By the layer that stands for the block; of several that fit a checkpoint, the first is meant.
BLOCKS: Dict[Type[nn.Module], _Block] = {
    OrepaStemConv2d: _Block('an OREPA stem', ('weight0.',), _load_stem),
    OrepaConv2d: _Block('an OREPA', (OREPA_BLOCK, OREPA_REPVGG_BLOCK), _load_orepa),
    OrepaPointwiseConv2d: _Block('a Rep-1x1', ('weight_or1x1_',), _load_pointwise),
    DiverseBranchConv2d: _Block('a DBB', ('dbb_avg.', 'dbb_1x1_kxk.'), _load_dbb),
    RepConv2d: _Block('a REP', ('dbb_origin.',), _load_rep),
    AsymmetricConv2d: _Block('an ACB', ('square_',), _load_acb),
}


def _block_for(source: _Source, prefix: str, layer: nn.Module) -> Optional[_Block]:
    """The block in training form that has this prefix and must be the layer's; None for a plain one, or none at all."""
    for layer_type, block in BLOCKS.items():
        if any(source.has(f'{prefix}.{start}') for start in block.starts):
            if type(layer) is layer_type:
                return block
            own = BLOCKS.get(type(layer))
            raise source.refuse(
                f'{prefix} is {block.label} block, where the model has {own.label if own else "a plain"} one')
    return None


def _load_block(source: _Source, prefix: str, layer: nn.Module, norm: nn.Module) -> None:
    """Fill a convolution or rep layer, and the norm behind it if it has none of its own, from a training form block."""
    block = _block_for(source, prefix, layer)
    if block is None:
        _load_plain(source, f'{prefix}.conv', f'{prefix}.bn', layer, norm)
    else:
        block.load(source, prefix, layer, norm)
    source.skip_caches(prefix)


def _load_folded_conv(source: _Source, prefix: str, conv: nn.Conv2d, norm: Any) -> None:
    """Fill a convolution and its norm from a folded block; the norm gets mean 0 and variance 1."""
    name = next((name for name in FOLDED_NAMES if source.has(f'{prefix}.{name}.')), FOLDED_NAMES[-1])
    norm.reset_parameters()
    kernel, gamma, beta = kernels.unfold_norm(
        source.take(f'{prefix}.{name}.weight', conv.weight.shape),
        source.take(f'{prefix}.{name}.bias', norm.bias.shape).to(norm.bias),
        norm.running_mean,
        norm.running_var,
        norm.eps,
    )
    conv.weight.copy_(kernel)
    norm.weight.copy_(gamma)
    norm.bias.copy_(beta)


def _resnet_blocks(model: Any) -> Iterator[Tuple[str, str, str]]:
    """The authors' name of every block of a ResNet, and our names of its convolution and norm."""
    yield 'stage0.conv1', 'conv1', 'bn1'
    for stage in range(1, 5):
        for position, block in enumerate(getattr(model, f'layer{stage}')):
            theirs, ours = f'stage{stage}.{position}', f'layer{stage}.{position}'
            for name in ('conv1', 'conv2', 'conv3'):
                if hasattr(block, name):
                    yield f'{theirs}.{name}', f'{ours}.{name}', f'{ours}.bn{name[-1]}'
            if block.downsample is not None:
                yield f'{theirs}.shortcut', f'{ours}.downsample.0', f'{ours}.downsample.1'


def _mobilenet_blocks(model: Any) -> Iterator[Tuple[str, str, str]]:
    """The authors' name of every block of a MobileNet-V1, and our names of its convolution and norm."""
    yield 'conv1', 'conv_stem', 'bn1'
    names = (f'blocks.{stage}.{block}' for stage, blocks in enumerate(model.blocks) for block in range(len(blocks)))
    for position, ours in enumerate(names):
        yield f'stem.{position}.depthwise', f'{ours}.conv_dw', f'{ours}.bn1'
        yield f'stem.{position}.pointwise', f'{ours}.conv_pw', f'{ours}.bn2'


def _is_mobilenet(model: Any) -> bool:
    """Whether this is a network of MobileNet-V1's blocks and nothing else."""
    if not isinstance(model, EfficientNet):
        return False
    stages: Any = model.blocks
    return all(type(block) is DepthwiseSeparableConv for stage in stages for block in stage)


def _load_blocks(source: _Source, model: nn.Module, blocks: Iterable[Tuple[str, str, str]], folded: bool) -> Set[str]:
    """Fill a ResNet or MobileNet, and return the names of the parts that are filled."""
    filled: Set[str] = set()
    for theirs, conv_name, norm_name in blocks:
        layer: Any = model.get_submodule(conv_name)
        norm: Any = model.get_submodule(norm_name)
        if folded:
            _load_folded_conv(source, theirs, layer, norm)
        elif theirs == 'stage0.conv1' and source.has('stage0.0.'):  # RepAn's stem for small images
            _load_plain(source, 'stage0.0', 'stage0.1', layer, norm)
        else:
            _load_block(source, theirs, layer, norm)
        filled |= {conv_name, norm_name}
    return filled


def _load_repvgg_block(source: _Source, prefix: str, block: Any, repan: bool) -> None:
    if repan:
        for part, size in ((block.conv_kxk, 3), (block.conv_1x1, 1)):
            _load_plain(source, f'{prefix}.conv_{size}', f'{prefix}.bn_{size}', part.conv, part.bn)
        source.skip_caches(prefix)
    else:
        for part, name in ((block.conv_kxk, 'rbr_dense'), (block.conv_1x1, 'rbr_1x1')):
            _load_block(source, f'{prefix}.{name}', part.conv, part.bn)
    identity = f'{prefix}.bn_0' if repan else f'{prefix}.rbr_identity'
    if repan and not source.has(f'{identity}.'):
        _silence_(block.identity)  # RepAn's first block of a stage has no identity branch, whatever its shape
    elif block.identity is not None:
        _load_norm(source, identity, block.identity)


def _load_folded_repvgg_block(source: _Source, prefix: str, block: Any) -> None:
    """Put a folded block into the KxK branch; the other branches end in a norm of gain zero and add nothing."""
    _load_folded_conv(source, prefix, block.conv_kxk.conv, block.conv_kxk.bn)
    _silence_(block.conv_1x1.bn)
    _silence_(block.identity)


def _load_repvgg(source: _Source, model: Any, folded: bool) -> Set[str]:
    """Fill a RepVGG, and return the names of the parts that are filled."""
    repan = source.has('stages.')
    blocks = {'stem': (model.stem, 'stages.0.sequential.0' if repan else 'stage0')}
    for stage, children in enumerate(model.stages):
        for position, block in enumerate(children):
            theirs = f'stages.{stage + 1}.sequential.{position}' if repan else f'stage{stage + 1}.{position}'
            blocks[f'stages.{stage}.{position}'] = (block, theirs)
    for block, theirs in blocks.values():
        if folded:
            _load_folded_repvgg_block(source, theirs, block)
        else:
            _load_repvgg_block(source, theirs, block, repan)
        if not isinstance(block.attn, nn.Identity):
            for ours, name in ((block.attn.fc1, 'down'), (block.attn.fc2, 'up')):
                source.fill(ours.weight, f'{theirs}.se.{name}.weight')
                source.fill(ours.bias, f'{theirs}.se.{name}.bias')
    return set(blocks)


def _is_folded(tensors: Weights) -> bool:
    """Whether this is a deploy file: no norm is left in it."""
    return not any(name.endswith('running_mean') for name in tensors)


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
    source = _Source(tensors, label, architecture)
    folded = _is_folded(tensors)
    if isinstance(model, ResNet):
        filled = _load_blocks(source, model, _resnet_blocks(model), folded)
    elif _is_mobilenet(model):
        activation = type(model.bn1.act)
        if activation is not nn.ReLU:
            raise UserError(
                f"the authors' MobileNet has ReLU, {architecture} has {activation.__name__}; "
                "build it with act_layer='relu'")
        filled = _load_blocks(source, model, _mobilenet_blocks(model), folded)
    elif isinstance(model, ByobNet) and isinstance(model.stem, RepVggBlock):
        filled = _load_repvgg(source, model, folded)
    else:
        raise UserError(
            'official checkpoints are of ResNets, RepVGGs and MobileNet-V1; '
            f'{architecture} is a {type(model).__name__}')
    head = model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise UserError(f'official checkpoints have a classifier; {architecture} was built without')
    theirs = next((name for name in HEAD_NAMES if source.has(f'{name}.')), HEAD_NAMES[0])
    source.fill(head.weight, f'{theirs}.weight')
    source.fill(head.bias, f'{theirs}.bias')
    filled.add(next(name for name, module in model.named_modules() if module is head))
    source.check_all_taken()
    untouched = [key for key in model.state_dict() if not any(key.startswith(f'{name}.') for name in filled)]
    if untouched:
        raise source.refuse(f'it has nothing for {first_names(untouched)} of the model')


def _read(source: Union[PathLike, Weights]) -> Tuple[Dict[str, Tensor], str]:
    """Weights and what to call them; prefixes of wrappers are removed."""
    if not isinstance(source, Mapping):
        return read_checkpoint(source).state_dict, str(source)
    if not source or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in source.items()):
        found = ', '.join(map(str, list(source)[:5])) or 'nothing'
        raise UserError(f'a state dict holds tensors only, by name; got {found}')
    return clean_state_dict(clean_state_dict(dict(source))), 'the state dict'


def load_official_checkpoint(
        source: Union[PathLike, Weights],
        architecture: str,
        /,
        *,
        attach_rate: float = 1.0,
        **kwargs: Any,
) -> nn.Module:
    """Load a checkpoint that the authors of OREPA, DBB, RepVGG or RepAn published, with the outputs of their code.

    What comes back depends on the file:

    - Training form (branches and norms): the architecture in training form, with the authors' branches. A plain
      convolution of theirs where the architecture has a rep layer (RepVGG into ``orepa_repvgg_*``) is restored into it:
      same outputs, side branches drawn afresh. Branches that only ours has (the identity of REP) add nothing.
    - Deploy form (folded): the *stock form* of the architecture, as :func:`timm_rep.fuse` makes it, since the branches
      are gone. So are the norms' statistics: they get mean 0 and variance 1, with the same outputs in eval mode; give
      them some batches in training mode before you train on. In a RepVGG the 1x1 and identity branches add nothing.

    Known layouts: OREPA's ResNet-18/34/50/101, wide ResNet-18, ResNeXt-50 and RepVGG; DBB's ResNets and MobileNet;
    RepVGG's own; RepAn's RepVGG, and its ResNets and MobileNet with DBB, ACB or REP. The number of classes is the
    file's. Two imports of a file are the same.

    Source: the authors' repositories (see :mod:`timm_rep.official`). Outputs agree to 1e-4 of the largest in float32,
    1e-9 in float64.

    Args:
        source: File of ``torch.save`` or ``.safetensors`` (wrapped as ``state_dict``, ``model`` or ``model_state``,
            with prefixes of ``DataParallel`` or without); or a state dict. No code in a file is ever run.
        architecture: Model of ours or of timm with the same network: ``'orepa_resnet50'``, ``'dbb_resnet18'``,
            ``'repan_resnet18'``, ``'repvgg_a0'``, ``'orepa_repvgg_a0'``.
        attach_rate: In [0, 1]; of interest for RepAn's files only, which do not hold theirs: it is 1 after the warm-up.
        **kwargs: More arguments of ``timm.create_model``: ``rep_layer`` of ``repan_*`` models; ``act_layer='relu'`` of
            MobileNet, where timm's own has ReLU6.

    Returns:
        The model on the CPU, in eval mode; in float64 for float64 weights, else in float32.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If the file is not safe to read, the architecture is unknown, is another network than these, has
            another activation or does not take the arguments, or the attach rate lies outside [0, 1].
        UserError: If the weights are not those of the architecture: a tensor is missing, left over, of another shape
            or of another kind of block.
    """
    tensors, label = _read(source)
    for name in HEAD_NAMES:
        if f'{name}.weight' in tensors and tensors[f'{name}.weight'].ndim == 2:
            kwargs.setdefault('num_classes', len(tensors[f'{name}.weight']))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = create_model(architecture, **kwargs).eval()
    if _is_folded(tensors):
        model = fuse(model, inplace=True)
    if any(value.dtype == torch.float64 for value in tensors.values()):
        model = model.double()
    set_attach_rate(model, attach_rate)
    fill_from_official_(model, tensors, label)
    return model


@dataclass(frozen=True)
class ImportedCheckpoint:
    """What :func:`import_checkpoint` wrote.

    Attributes:
        output: File or folder.
        architecture: What the weights are of; for a folder, of its stock form.
        form: ``'training'`` or ``'stock'``.
        num_classes: Of the classifier.
        model_kwargs: What else ``create_model`` needs to build the architecture.
        report: How far the fused model is from the training form; None for a deploy file.
    """

    output: Path
    architecture: str
    form: str
    num_classes: int
    model_kwargs: Dict[str, Any]
    report: Optional[Report]

    def __str__(self) -> str:
        text = f'{self.architecture} in {self.form} form, {self.num_classes} classes'
        if self.model_kwargs:
            text += ', built with ' + ' '.join(f'{key}={value}' for key, value in self.model_kwargs.items())
        return text if self.report is None else f'{text}; training form and stock form: {self.report}'


def import_checkpoint(
        source: PathLike,
        output: PathLike,
        architecture: str,
        *,
        license: str = 'unknown',
        attach_rate: float = 1.0,
        model_kwargs: Optional[Mapping[str, Any]] = None,
) -> ImportedCheckpoint:
    """Turn a checkpoint that authors published into a file or a Hub folder of ours.

    Args:
        source: File, as :func:`load_official_checkpoint` takes it.
        output: New ``.safetensors`` or ``.pth`` file, for the weights in the form that they have: training form, or
            stock form of a deploy file. Any other name is that of a Hub folder, in stock form.
        architecture: Model that it is of.
        license: Licence of the weights, for the folder's model card.
        attach_rate: As in :func:`load_official_checkpoint`.
        model_kwargs: More arguments of ``timm.create_model``, as in :func:`load_official_checkpoint`.

    Returns:
        What was written. Nothing is unless the fused model is the function of the training form.

    Raises:
        FileExistsError: If the output exists.
        UserError: For another suffix of the output, or as :func:`load_official_checkpoint` does.
        RuntimeError: As :func:`load_official_checkpoint` does.
        VerificationError: If the fused model is not the same function, or a value is not finite or not possible.
    """
    output = new_output(output, folder_allowed=True)
    kwargs = dict(model_kwargs or {})
    model: Any = load_official_checkpoint(source, architecture, **{'attach_rate': attach_rate, **kwargs})
    fused: Any = fuse(model)
    training = any(annealed_modules(model))
    report = verify(model, fused) if training else None
    weights_alone = is_weights_file(output)
    written = model if weights_alone else fused
    if weights_alone:
        save_weights(model, output)
    else:
        export_folder(model, output, license=license)  # takes the training form, to note where the weights come from
    in_stock_form = not (training and weights_alone)
    return ImportedCheckpoint(
        output=output,
        architecture=written.pretrained_cfg['architecture'],
        form='stock' if in_stock_form else 'training',
        num_classes=model.num_classes,
        model_kwargs={key: value for key, value in kwargs.items() if not (in_stock_form and key == 'rep_layer')},
        report=report,
    )
