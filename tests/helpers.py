"""Shared by all tests: comparison with a stated tolerance, random values for everything that starts constant."""
import copy
import logging

import timm
import torch
import torch.nn as nn
from timm.models import ByoBlockCfg, ByobNet, ByoModelCfg, ResNet
from timm.models.byobnet import RepVggBlock
from timm.models.resnet import BasicBlock, Bottleneck
from torch.utils._python_dispatch import TorchDispatchMode

from timm_rep.core.expand import anneal_repvgg_blocks_, expand
from timm_rep.core.layers import RepLayer
from timm_rep.core.walk import rep_layers

# Older timm does not keep the arguments of a model, and adapts weights for 3 image channels only.
OLD_TIMM = not hasattr(timm.create_model('test_resnet'), '_model_args')
# Relative to the largest expected value: one linear layer, a whole model, a model whose norms are folded too.
LINEAR_RTOL = {torch.float64: 1e-12, torch.float32: 1e-6}
MODEL_RTOL = {torch.float64: 1e-10, torch.float32: 1e-5}
DEPLOY_RTOL = {torch.float64: 1e-9, torch.float32: 1e-4}


def assert_near(actual, expected, rtol):
    """The largest difference is at most ``rtol`` of the largest expected value; fails on NaN and on zeros only."""
    assert actual.shape == expected.shape, f'shapes differ: {tuple(actual.shape)}, {tuple(expected.shape)}'
    largest = expected.abs().max().item()
    difference = (actual - expected).abs().max().item()
    assert largest > 0, 'all expected values are zero'
    assert difference <= rtol * largest, f'largest difference {difference:.3e} of {largest:.3e}, allowed {rtol:.0e}'


@torch.no_grad()
def randomize_(model, seed=0):
    """Give all fields of batch norms, all scales and all that starts at zero wide random values."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.25, 4, generator=generator)
            module.weight.uniform_(0.25, 2, generator=generator)
            module.bias.normal_(0, 0.5, generator=generator)
        if isinstance(module, RepLayer):
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if name == 'scale' and isinstance(tensor, nn.Parameter):
                    tensor.uniform_(-1.5, 1.5, generator=generator)
                elif name in ('seq_1x1', 'kernel_offset', 'residual'):
                    tensor.normal_(0, 0.3, generator=generator)
    return model


def state_of(module):
    """A copy of the state_dict's values, to compare with later ones."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def with_compiled_parts(model):
    """A copy whose children are compiled one by one, not in place."""
    twin = copy.deepcopy(model)
    for name, child in list(twin.named_children()):
        setattr(twin, name, torch.compile(child, backend='eager'))
    return twin


def own_warnings(caplog):
    """What timm_rep and timm have warned of; libraries speak of the machine when they are first loaded."""
    return [
        record for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.partition('.')[0] in ('timm_rep', 'timm', 'train')]


def tree(model):
    """Names and classes of all modules."""
    return [(name, type(module)) for name, module in model.named_modules()]


def layer_types(model):
    """Classes of the rep layers by name."""
    return {name: type(layer) for name, layer in rep_layers(model)}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class EmulatedTF32(TorchDispatchMode):
    """A GPU on which products may run in TF32: while that is allowed, they see ten bits of the mantissa."""

    products = ('mm', 'addmm', 'bmm', 'baddbmm', 'baddbmm_')

    def __enter__(self):
        self.before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True  # as timm's train.py and validate.py do
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.backends.cuda.matmul.allow_tf32 = self.before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.products and torch.backends.cuda.matmul.allow_tf32:
            first = 0 if name in ('mm', 'bmm') else 1
            args = (*args[:first], *map(self.rounded, args[first:]))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(tensor):
        if tensor.dtype != torch.float32:
            return tensor
        bits = tensor.contiguous().view(torch.int32)
        return ((bits + (1 << 12)) & -(1 << 13)).view(torch.float32)


def tiny_resnet(block='basic', **kwargs):
    """timm's ResNet with a 7x7 stem and one narrow block for each stage."""
    block = dict(basic=BasicBlock, bottleneck=Bottleneck)[block]
    return ResNet(block, (1, 1, 1, 1), channels=(8, 8, 12, 16), num_classes=5, **kwargs)


def tiny_repvgg(**kwargs):
    """timm's RepVGG with five blocks, of which some are grouped and some have an identity branch."""
    cfg = ByoModelCfg(
        blocks=(
            ByoBlockCfg(type='rep', d=2, c=8, s=2, gs=0),
            ByoBlockCfg(type='rep', d=2, c=16, s=2, gs=4),
        ),
        stem_type='rep',
        stem_chs=8,
    )
    return ByobNet(cfg, num_classes=5, **kwargs)


TINY_MODELS = dict(
    basic=tiny_resnet,
    bottleneck=lambda **kwargs: tiny_resnet('bottleneck', **kwargs),
    repvgg=tiny_repvgg,
)


def mixed_model():
    """A small network with a layer of every kind."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6),
        nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6),
        RepVggBlock(6, 6), RepVggBlock(6, 8, stride=2),
    )
    for layer, select in dict(orepa=['0', '2', '4', '14.conv_kxk.conv'], dbb='7', acb='9', rep='12').items():
        expand(model, layer, select=select, inplace=True)
    return anneal_repvgg_blocks_(model)
