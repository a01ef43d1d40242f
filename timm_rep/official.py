"""Checkpoints that the authors of OREPA, DBB, RepVGG and RepAn published, into our models.

The authors' blocks own the norm behind the convolution, so a block of theirs is a pair here, convolution and norm:

=====================  ==================================================  ==================================
block                  tensors, by the start of their names                here
=====================  ==================================================  ==================================
OREPA                  ``weight_orepa_``, in RepVGG ``weight_rbr_``        ``OrepaConv2d`` and norm
OREPA stem             ``weight0.weight_orepa_``, ``weight1. ...``         ``OrepaStemConv2d`` and norm
Rep-1x1                ``weight_or1x1_``                                   ``OrepaPointwiseConv2d`` and norm
DBB                    ``dbb_origin``, ``dbb_avg``, ``dbb_1x1_kxk`` ...    ``DiverseBranchConv2d``
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
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple, Type, Union

import timm
import torch
import torch.nn as nn
from timm.models import ByobNet, ResNet, clean_state_dict
from timm.models.byobnet import RepVggBlock
from torch import Tensor

from . import kernels
from .checkpoints import first_names
from .files import PathLike, read_checkpoint, save_weights
from .hub import export_folder
from .layers import (
    BranchedRepLayer,
    DiverseBranchConv2d,
    LinearRepLayer,
    OrepaConv2d,
    OrepaPointwiseConv2d,
    OrepaStemConv2d,
)
from .layers.base import kaiming_uniform_
from .layers.branched import fold_batch_norm
from .surgery import fuse, rep_layers, set_attach_rate
from .verification import Report, verify

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
# Parts of timm's RepVggBlock, as RepVGG and RepAn call them (official repvgg.py, repvgg_IMG.py).
REPVGG_NAMES = {
    'conv_kxk.conv': 'rbr_dense.conv',
    'conv_kxk.bn': 'rbr_dense.bn',
    'conv_1x1.conv': 'rbr_1x1.conv',
    'conv_1x1.bn': 'rbr_1x1.bn',
    'identity': 'rbr_identity',
}
REPAN_REPVGG_NAMES = {
    'conv_kxk.conv': 'conv_3',
    'conv_kxk.bn': 'bn_3',
    'conv_1x1.conv': 'conv_1',
    'conv_1x1.bn': 'bn_1',
    'identity': 'bn_0',
}
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
# Kinds of blocks in training form, by what the names of their tensors begin with; the first that fits.
BLOCK_KINDS = (
    ('an OREPA stem', 'weight0.'),
    ('an OREPA', OREPA_BLOCK),
    ('an OREPA', OREPA_REPVGG_BLOCK),
    ('a Rep-1x1', 'weight_or1x1_'),
    ('a DBB', 'dbb_avg.'),
    ('a DBB', 'dbb_1x1_kxk.'),
    ('a REP', 'dbb_origin.'),
    ('an ACB', 'square_'),
)
# Classifiers.
HEAD_NAMES = ('linear', 'fc')
# Largest difference of a constant in a file from ours, for full and half precision.
CONSTANT_ATOL = {torch.float64: 1e-6, torch.float32: 1e-6}
HALF_CONSTANT_ATOL = 1e-2

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

    def fill(self, tensor: Tensor, name: str) -> None:
        """Overwrite a tensor of the model."""
        tensor.copy_(self.take(name, tensor.shape))

    def check_constant(self, name: str, expected: Tensor) -> None:
        """A constant that we compute: if the file has it, it must be ours."""
        value = self.take_optional(name)
        if value is None:
            return
        atol = CONSTANT_ATOL.get(value.dtype, HALF_CONSTANT_ATOL)
        if value.shape != expected.shape or not torch.allclose(value.double(), expected.double(), rtol=0.0, atol=atol):
            self._misfits.append(f'the constant {name} is another than that of the published code')

    def skip(self, prefix: str) -> None:
        """Take the tensors of a folded convolution that the block does not compute with."""
        for cache in REPAN_CACHES:
            for kind in ('weight', 'bias'):
                self.take_optional(f'{prefix}.{cache}.{kind}')

    def refuse(self, reason: str) -> RuntimeError:
        """The error for a checkpoint that is not one of the architecture."""
        return RuntimeError(f'{self._label} does not hold official weights of {self._architecture}; {reason}')

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
    count = source.take_optional(f'{name}.num_batches_tracked')  # old checkpoints do not count
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(0 if count is None else int(count))


def _mirror_sign(prior: Tensor) -> Optional[Tensor]:
    """The sign that each prior filter gets by mirroring in both axes, ``(o,)``; None if mirroring does more."""
    mirrored = prior.flip([2, 3])
    sign = torch.where((mirrored - prior).abs().amax([1, 2, 3]) < (mirrored + prior).abs().amax([1, 2, 3]), 1.0, -1.0)
    return sign if torch.allclose(mirrored, prior * sign.reshape(-1, 1, 1, 1), rtol=0.0, atol=1e-9) else None


def _load_orepa_branches(
        source: _Source,
        prefix: str,
        layer: OrepaConv2d,
        block: str = OREPA_BLOCK,
        mirrored: bool = False,
) -> None:
    """Fill an OREPA layer; ``mirrored`` gives it the authors' kernel mirrored in both axes."""
    out_channels, in_per_group = layer.weight_shape[:2]
    groups, size = layer.groups, layer.kernel_size
    views = layer.branch_views()

    def take(name: str, shape: Sequence[int], spatial: bool = False) -> Tensor:
        value = source.take(f'{prefix}.{block}{name}', shape)
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
    source.fill(layer.seq_1x1, f'{prefix}.{block}1x1_kxk_idconv1')
    sequential = take('1x1_kxk_conv2', (out_channels, inner // groups, *size), spatial=True)
    views['sequential'].copy_(sequential.unflatten(1, (-1, in_per_group)).transpose(1, 2))

    layer.dw_conv.copy_(take('gconv_dw', layer.dw_conv.shape, spatial=True))
    # The authors' grouped form lets the group vary fastest over the outputs of this 1x1.
    expansion = views['separable'].shape[2]
    separable = take('gconv_pw', (out_channels, in_per_group * expansion, 1, 1))
    separable = separable.unflatten(0, (-1, groups)).transpose(0, 1)
    views['separable'].copy_(separable.reshape(views['separable'].shape))

    # In RepVGG a block with identity branch has a row more, which nothing sets or uses (official blocks_repvgg.py).
    unused = block == OREPA_REPVGG_BLOCK and layer.in_channels == layer.out_channels and layer.stride == (1, 1)
    rows = [name for name in OREPA_SCALE_ROWS if name in layer.branch_names]
    scale = source.take(f'{prefix}.vector', (len(rows) + unused, out_channels))
    for row, name in enumerate(rows):
        layer.scale[layer.branch_names.index(name)].copy_(scale[row])

    identity = kernels.grouped_identity(in_per_group, **exact).repeat(inner // in_per_group, 1, 1, 1)
    source.check_constant(f'{prefix}.id_tensor', identity)
    source.check_constant(f'{prefix}.{block}avg_avg', kernels.average_kernel(size, **exact)[0, 0])
    source.check_constant(f'{prefix}.{block}prior', prior[:, 0])


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


def _load_dbb(source: _Source, prefix: str, layer: DiverseBranchConv2d, norm: Any) -> None:
    for name, theirs in DBB_NAMES.items():
        part = getattr(layer, name)
        if isinstance(part, nn.Conv2d):
            source.fill(part.weight, f'{prefix}.{theirs}.weight')
        elif part is not None:  # a depthwise block has fewer branches
            _load_norm(source, f'{prefix}.{theirs}', getattr(part, 'norm', part))
    if layer.avg_conv is None:
        first = source.take(f'{prefix}.dbb_1x1_kxk.conv1.weight', layer.seq_1x1.shape)
        layer.seq_1x1.copy_(first.to(layer.seq_1x1) - layer.seq_identity)
    else:
        source.fill(layer.seq_1x1, f'{prefix}.dbb_1x1_kxk.idconv1.weight')
    source.skip(prefix)


def _load_plain(source: _Source, conv_name: str, norm_name: str, layer: nn.Module, norm: Any) -> None:
    """Fill a convolution and its norm; where we have a rep layer, restore it."""
    if isinstance(layer, nn.Conv2d):
        source.fill(layer.weight, f'{conv_name}.weight')
    elif isinstance(layer, LinearRepLayer):
        layer.restore_(source.take(f'{conv_name}.weight', layer.weight_shape))
    elif isinstance(layer, BranchedRepLayer):
        norm = layer.norm_kxk
    _load_norm(source, norm_name, norm)
    if isinstance(layer, BranchedRepLayer):
        weight = source.take(f'{conv_name}.weight', layer.weight_shape).to(norm.weight)
        layer.restore_(*fold_batch_norm(weight, None, norm))


def _load_plain_block(source: _Source, prefix: str, layer: nn.Module, norm: Any) -> None:
    _load_plain(source, f'{prefix}.conv', f'{prefix}.bn', layer, norm)
    source.skip(prefix)


# For each kind of layer, the block that it is filled from and how.
LOADERS: Dict[Type[nn.Module], Tuple[str, Callable[[_Source, str, Any, Any], None]]] = {
    nn.Conv2d: ('a plain', _load_plain_block),
    OrepaConv2d: ('an OREPA', _load_orepa),
    OrepaPointwiseConv2d: ('a Rep-1x1', _load_pointwise),
    OrepaStemConv2d: ('an OREPA stem', _load_stem),
    DiverseBranchConv2d: ('a DBB', _load_dbb),
}


def _block_kind(source: _Source, prefix: str) -> Optional[str]:
    """What kind of block in training form has this prefix; None for a plain one, or none at all."""
    return next((kind for kind, start in BLOCK_KINDS if source.has(f'{prefix}.{start}')), None)


def _load_block(source: _Source, prefix: str, layer: nn.Module, norm: nn.Module) -> None:
    """Fill a convolution or rep layer, and the norm behind it if it has none of its own, from a training form block."""
    kind = _block_kind(source, prefix)
    own_kind, load = LOADERS[type(layer)]
    if kind not in (None, own_kind):
        raise source.refuse(f'{prefix} is {kind} block, where the model has {own_kind} one')
    if kind is None and source.has(f'{prefix}.conv.'):
        load = _load_plain_block
    load(source, prefix, layer, norm)


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
                if name in dict(block.named_children()):
                    yield f'{theirs}.{name}', f'{ours}.{name}', f'{ours}.bn{name[-1]}'
            if block.downsample is not None:
                yield f'{theirs}.shortcut', f'{ours}.downsample.0', f'{ours}.downsample.1'


def _load_resnet(source: _Source, model: nn.Module, folded: bool) -> Set[str]:
    """Fill a ResNet, and return the names of the parts that are filled."""
    filled: Set[str] = set()
    for theirs, conv_name, norm_name in _resnet_blocks(model):
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


def _silence_(norm: Optional[nn.Module]) -> None:
    """Let a branch that ends in this norm add nothing."""
    if isinstance(norm, nn.BatchNorm2d):
        norm.reset_parameters()
        nn.init.zeros_(norm.weight)


def _load_repvgg_block(source: _Source, prefix: str, block: Any, names: Dict[str, str]) -> None:
    dense: nn.Module = block.conv_kxk.conv
    theirs = {ours: f'{prefix}.{name}' for ours, name in names.items()}
    dense_prefix = theirs['conv_kxk.conv'].rpartition('.')[0]
    kind = _block_kind(source, dense_prefix)
    if kind is None:
        _load_plain(source, theirs['conv_kxk.conv'], theirs['conv_kxk.bn'], dense, block.conv_kxk.bn)
    elif isinstance(dense, OrepaConv2d):
        _load_orepa_branches(source, dense_prefix, dense, OREPA_REPVGG_BLOCK)
        _load_norm(source, theirs['conv_kxk.bn'], block.conv_kxk.bn)
    else:
        raise source.refuse(f'{dense_prefix} is {kind} block, where the model has a plain one')

    source.fill(block.conv_1x1.conv.weight, f'{theirs["conv_1x1.conv"]}.weight')
    _load_norm(source, theirs['conv_1x1.bn'], block.conv_1x1.bn)
    if names is REPAN_REPVGG_NAMES and not source.has(f'{theirs["identity"]}.'):
        _silence_(block.identity)  # RepAn's first block of a stage has no identity branch, whatever its shape
    elif block.identity is not None:
        _load_norm(source, theirs['identity'], block.identity)
    source.skip(prefix)


def _load_folded_repvgg_block(source: _Source, prefix: str, block: Any, generator: torch.Generator) -> None:
    """Put a folded block into the KxK branch; the other branches end in a norm of gain zero and add nothing."""
    _load_folded_conv(source, prefix, block.conv_kxk.conv, block.conv_kxk.bn)
    pointwise = block.conv_1x1.conv.weight
    kaiming_uniform_(pointwise, pointwise.shape[1], 5 ** 0.5, generator)  # nn.Conv2d's own draw
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
    generator = torch.Generator().manual_seed(0)  # two imports of a file are the same
    for block, theirs in blocks.values():
        if folded:
            _load_folded_repvgg_block(source, theirs, block, generator)
        else:
            _load_repvgg_block(source, theirs, block, REPAN_REPVGG_NAMES if repan else REPVGG_NAMES)
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
        model: ResNet or RepVGG; in stock form if the weights are folded. It keeps its attach rate, and is half filled
            if an error is raised.
        tensors: The authors' state dict.
        label: What to call it in messages.

    Raises:
        ValueError: If the model is neither a ResNet nor a RepVGG.
        RuntimeError: If the weights are not those of the model: a tensor is missing, left over, or of another shape.
    """
    architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture', type(model).__name__)
    source = _Source(tensors, label, architecture)
    folded = _is_folded(tensors)
    if isinstance(model, ResNet):
        filled = _load_resnet(source, model, folded)
        head, head_name = model.fc, 'fc'
    elif isinstance(model, ByobNet) and isinstance(model.stem, RepVggBlock):
        filled = _load_repvgg(source, model, folded)
        head, head_name = model.head.fc, 'head.fc'
    else:
        raise ValueError(f'official checkpoints are of ResNets and RepVGGs; {architecture} is a {type(model).__name__}')
    theirs = next((name for name in HEAD_NAMES if source.has(f'{name}.')), HEAD_NAMES[0])
    source.fill(head.weight, f'{theirs}.weight')
    source.fill(head.bias, f'{theirs}.bias')
    filled.add(head_name)
    source.check_all_taken()
    untouched = [key for key in model.state_dict() if not any(key.startswith(f'{name}.') for name in filled)]
    if untouched:
        raise source.refuse(f'it has nothing for {first_names(untouched)} of the model')


def _read(source: Union[PathLike, Weights]) -> Tuple[Dict[str, Tensor], str]:
    """Weights and what to call them; prefixes of wrappers are removed."""
    if not isinstance(source, Mapping):
        return read_checkpoint(source).state_dict, str(source)
    if not source or not all(isinstance(value, Tensor) for value in source.values()):
        raise ValueError(f'a state dict holds tensors only, got {", ".join(map(str, list(source)[:5])) or "nothing"}')
    return clean_state_dict(clean_state_dict(dict(source))), 'the state dict'


def load_official_checkpoint(
        source: Union[PathLike, Weights],
        architecture: str,
        *,
        attach_rate: float = 1.0,
        **kwargs: Any,
) -> nn.Module:
    """Load a checkpoint that the authors of OREPA, DBB, RepVGG or RepAn published, with the outputs of their code.

    What comes back depends on the file:

    - Training form (branches and norms): the architecture in training form, with the authors' branches. A plain
      convolution of theirs where the architecture has a rep layer (RepVGG into ``orepa_repvgg_*``) is restored into it:
      same outputs, side branches drawn afresh.
    - Deploy form (folded): the *stock form* of the architecture, as :func:`timm_rep.fuse` makes it, since the branches
      are gone. So are the norms' statistics: they get mean 0 and variance 1, with the same outputs in eval mode; give
      them some batches in training mode before you train on. In a RepVGG the 1x1 and identity branches add nothing.

    Known layouts: OREPA's ResNet-18/34/50/101, wide ResNet-18, ResNeXt-50 and RepVGG; DBB's ResNets; RepVGG's own;
    RepAn's RepVGG and DBB ResNets. The number of classes is the file's.

    Source: the authors' repositories (see :mod:`timm_rep.official`). Outputs agree to 1e-4 of the largest in float32,
    1e-9 in float64.

    Args:
        source: File of ``torch.save`` or ``.safetensors`` (wrapped as ``state_dict``, ``model`` or ``model_state``,
            with prefixes of ``DataParallel`` or without); or a state dict. No code in a file is ever run.
        architecture: Model of ours or of timm with the same network: ``'orepa_resnet50'``, ``'dbb_resnet18'``,
            ``'repvgg_a0'``, ``'orepa_repvgg_a0'``.
        attach_rate: In [0, 1]; of interest for RepAn's files only, which do not hold theirs: it is 1 after the warm-up.
        **kwargs: More arguments of ``timm.create_model``.

    Returns:
        The model on the CPU, in eval mode; in float64 for float64 weights, else in float32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not safe to read, the architecture is unknown or neither a ResNet nor a RepVGG, or
            the attach rate lies outside [0, 1].
        RuntimeError: If the weights are not those of the architecture: a tensor is missing, left over, of another shape
            or of another kind of block.
    """
    tensors, label = _read(source)
    if not timm.is_model(architecture):
        raise ValueError(f'unknown model {architecture!r}; `timm-rep list` shows the models with rep layers')
    for name in HEAD_NAMES:
        if tensors.get(f'{name}.weight') is not None:
            kwargs.setdefault('num_classes', len(tensors[f'{name}.weight']))
    model = timm.create_model(architecture, **kwargs).eval()
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
        report: How far the fused model is from the training form; None for a deploy file.
    """

    output: Path
    architecture: str
    form: str
    num_classes: int
    report: Optional[Report]

    def __str__(self) -> str:
        text = f'{self.architecture} in {self.form} form, {self.num_classes} classes'
        return text if self.report is None else f'{text}; training form and stock form: {self.report}'


def import_checkpoint(
        source: PathLike,
        output: PathLike,
        architecture: str,
        *,
        license: str = 'unknown',
        **kwargs: Any,
) -> ImportedCheckpoint:
    """Turn a checkpoint that authors published into a file or a Hub folder of ours.

    Args:
        source: File, as :func:`load_official_checkpoint` takes it.
        output: New ``.safetensors`` or ``.pth`` file, for the weights in the form that they have: training form, or
            stock form of a deploy file. Without a suffix a Hub folder, in stock form.
        architecture: Model that it is of.
        license: Licence of the weights, for the folder's model card.
        **kwargs: More of :func:`load_official_checkpoint`.

    Returns:
        What was written. Nothing is unless the fused model is the function of the training form.

    Raises:
        FileExistsError: If the output exists.
        ValueError: For another suffix of the output, or as :func:`load_official_checkpoint` does.
        RuntimeError: As :func:`load_official_checkpoint` does.
        VerificationError: If the fused model is not the same function.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f'output {output} exists already; nothing was written')
    model: Any = load_official_checkpoint(source, architecture, **kwargs)
    fused: Any = fuse(model)
    training = any(rep_layers(model))
    report = verify(model, fused) if training else None
    written = model if output.suffix else fused
    if output.suffix:
        save_weights(model, output)
    else:
        export_folder(model, output, license=license)  # takes the training form, to note where the weights come from
    return ImportedCheckpoint(
        output=output,
        architecture=written.pretrained_cfg['architecture'],
        form='training' if training and output.suffix else 'stock',
        num_classes=model.num_classes,
        report=report,
    )
