"""Golden tensors of one transition of RepAn, of every kind of block, for tests/golden: see repan_transition.py."""
import gzip
import importlib

import safetensors.torch
import torch
import torch.nn as nn
from official_import import Draw, randomize_norms_, randomize_weights_
from repan_procedure import DRAWN
from timm.models.byobnet import RepVggBlock

from timm_rep import layers
from timm_rep.core.layers import AnnealedRepVggBlock
from timm_rep.official.blocks import fill_block
from timm_rep.official.repvgg import fill_repvgg
from timm_rep.official.source import Source

IN_CHANNELS, OUT_CHANNELS = 4, 6
RATE = 0.5


class OneBlock(nn.Module):
    """A RepVGG of nothing but a stem, which is what our import can fill."""

    def __init__(self):
        super().__init__()
        self.stem = AnnealedRepVggBlock(RepVggBlock(IN_CHANNELS, IN_CHANNELS)).double()
        self.stages = nn.ModuleList()


def fill_from_repvgg(state):
    model = OneBlock()
    prefixed = {f'stages.0.sequential.0.{name}': tensor for name, tensor in state.items()}
    fill_repvgg(Source(prefixed, 'the block', 'a block'), model)
    return model.stem


def fill_from(layer_type, state):
    layer = layer_type(IN_CHANNELS, OUT_CHANNELS, 3, padding=1)
    fill_block(Source({f'block.{name}': tensor for name, tensor in state.items()}, 'the block', 'a block'),
               'block', layer, None)
    return layer


def kinds():
    """By name: how to build the authors' block, what folds it, and how ours is made of its state dict."""
    def module(name):
        return importlib.import_module(f'net.{name}')

    sizes = (IN_CHANNELS, OUT_CHANNELS, 3)
    for image_size in ('cifar', 'IMG'):
        name = 'repvgg_keep_gain' if image_size == 'cifar' else 'repvgg'
        yield (name, module(f'repvgg_{image_size}').PostRepVGGBlock(IN_CHANNELS), '_reparam', fill_from_repvgg)
    for name, file, block, layer_type in (
            ('dbb', 'diversebranchblock', 'DiverseBranchBlock', layers.DiverseBranchConv2d),
            ('acb', 'acb', 'ACBlock', layers.AsymmetricConv2d),
            ('rep', 'repblock', 'RepBlock', layers.RepConv2d)):
        build = getattr(module(f'dbb_series.{file}'), block)
        yield name, build(*sizes, padding=1), 'switch_to_deploy', lambda state, kind=layer_type: fill_from(kind, state)


def round_(tensors):
    """Round to half precision, so that files are small and exact."""
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())


def ours_of(block, fill):
    """Tensors by our names."""
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    return {name: tensor.clone() for name, tensor in fill(state).state_dict().items()
            if name not in ('attach_rate', 'time_step') and not name.endswith('num_batches_tracked')}


def drawn_names(block, fill):
    """Our names of the kernels that the authors' code draws: ones among zeros are imported, and found again."""
    marked = {name: torch.full_like(tensor, bool(DRAWN.search(name))) for name, tensor in block.state_dict().items()}
    return [name for name, tensor in fill(marked).state_dict().items() if tensor.ndim == 4 and tensor.all()]


@torch.no_grad()
def golden_tensors(block, fold, fill, seed):
    """Input, tensors before and after the transition, side kernels drawn in it, and outputs in training mode after."""
    draw = Draw(seed)
    x = draw.normal(torch.empty(2, IN_CHANNELS, 6, 6)).half().double()
    randomize_weights_(block, draw)
    randomize_norms_(block, x, draw)
    round_(block.state_dict().values())
    tensors = {f'before.{name}': tensor.half() for name, tensor in ours_of(block, fill).items()}
    getattr(block, fold)()
    block.init_branch_weights()
    round_([tensor for name, tensor in block.state_dict().items() if DRAWN.search(name)])
    block.inversion()
    after = ours_of(block, fill)
    tensors.update({f'drawn.{name}': after[name].half() for name in drawn_names(block, fill)})
    tensors.update({f'after.{name}': tensor for name, tensor in after.items()})
    block.attach_rate = RATE
    return dict(tensors, input=x.half(), output=block.train()(x))


def write_golden(folder, seed):
    """Write a file for every kind of block, and return the files."""
    files = []
    for name, block, fold, fill in kinds():
        tensors = golden_tensors(block, fold, fill, seed)
        files.append(folder / f'transition_{name}.safetensors.gz')
        data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
        files[-1].write_bytes(gzip.compress(data, mtime=0))
    return files
