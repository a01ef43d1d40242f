"""The networks of the authors of OREPA, DBB, RepVGG and RepAn, built by their own code from local clones."""
import contextlib
import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Optional

import torch.nn as nn


@dataclass(frozen=True)
class Repository:
    """Public code to compare with.

    Attributes:
        name: On GitHub.
        marker: A file by which a clone is known.
        networks: Lists what to build, once the clone can be imported from.
    """

    name: str
    marker: str
    networks: Callable[[], list]


@dataclass(frozen=True)
class Network:
    """A network of the authors.

    Attributes:
        name: What to call it.
        build: Makes it.
        models: What to import it into: names of models, behind each the arguments that it is built with.
        fold: Puts it into deploy form; None if no code of theirs writes a deploy file.
        image: Height and width of the input.
        has_attach_rate: Whether its side branches have one.
    """

    name: str
    build: Callable[[], nn.Module]
    models: tuple
    fold: Optional[Callable[[nn.Module], None]] = None
    image: int = 64
    has_attach_rate: bool = False


def fold_every_block(model):
    """Deploy form as the authors' convert.py makes it."""
    for module in model.modules():
        if hasattr(module, 'switch_to_deploy'):
            module.switch_to_deploy()


def build_with_blocks(convnet_utils, blocks, network):
    """A network of the repositories of OREPA and DBB, which keep the kind of block in a global."""
    convnet_utils.switch_conv_bn_impl(blocks)
    convnet_utils.switch_deploy_flag(False)
    return convnet_utils.build_model(network)


def networks_with_blocks(*rows):
    convnet_utils = importlib.import_module('convnet_utils')
    return [
        Network(f'{network} of {blocks}', partial(build_with_blocks, convnet_utils, blocks, network), models,
                fold_every_block)
        for blocks, network, *models in rows
    ]


def orepa_networks():
    if importlib.util.find_spec('imp') is None:  # they import it without need; gone since Python 3.12
        sys.modules['imp'] = types.ModuleType('imp')
    return networks_with_blocks(
        ('OREPA', 'ResNet-18', 'orepa_resnet18'),
        ('OREPA', 'ResNet-34', 'orepa_resnet34'),
        ('OREPA', 'ResNet-50', 'orepa_resnet50'),
        ('OREPA', 'ResNet-101', 'orepa_resnet101'),
        ('OREPA', 'ResNet-18-2x', 'orepa_wide_resnet18_2'),
        ('OREPA', 'ResNeXt-50', 'orepa_resnext50_32x4d'),
        ('OREPA_VGG', 'RepVGG-A0', 'orepa_repvgg_a0'),
        ('OREPA_VGG', 'RepVGG-A1', 'orepa_repvgg_a1'),
        ('OREPA_VGG', 'RepVGG-A2', 'orepa_repvgg_a2'),
        ('DBB', 'ResNet-34', 'dbb_resnet34'),
        ('DBB', 'ResNet-101', 'dbb_resnet101'),
        ('base', 'ResNet-50', 'resnet50'),
    )


def dbb_networks():
    """All kinds of block that this code can build: its ACB cannot be, since it takes no activation."""
    return networks_with_blocks(
        ('DBB', 'ResNet-18', 'dbb_resnet18', 'repan_resnet18'),
        ('DBB', 'ResNet-50', 'dbb_resnet50'),
        ('DBB', 'MobileNet', 'repan_mobilenetv1_100 act_layer=relu'),
        ('base', 'ResNet-18', 'resnet18'),
        ('base', 'MobileNet', 'mobilenetv1_100 act_layer=relu'),
    )


def repvgg_networks():
    build = importlib.import_module('repvgg').func_dict
    more = dict(
        A0=('repan_repvgg_a0', 'orepa_repvgg_a0', 'repan_repvgg_a0 rep_layer=acb'),
        B0=('orepa_repvgg_b0',),
    )
    return [
        Network(f'RepVGG-{variant}', build[f'RepVGG-{variant}'], (f'repvgg_{variant.lower()}', *more.get(variant, ())),
                fold_every_block)
        for variant in ('A0', 'A1', 'A2', 'B0', 'B1g4', 'D2se')
    ]


def build_repan_mobilenet(mobilenet, convnet_utils, blocks):
    mobilenet.conv_bn_relu = partial(convnet_utils.conv_bn_relu, IMPL=blocks)
    return mobilenet.create_MobileNet()


def repan_networks():
    resnet = importlib.import_module('net.dbb_series.resnet')
    convnet_utils = importlib.import_module('net.dbb_series.convnet_utils')
    # their mobilenet.py imports its neighbour from the top level, where it is not
    sys.modules['convnet_utils'] = convnet_utils
    mobilenet = importlib.import_module('net.dbb_series.mobilenet')
    build_mobilenet = partial(build_repan_mobilenet, mobilenet, convnet_utils)
    networks = [Network('MobileNet of base', partial(build_mobilenet, 'base'), ('mobilenetv1_100 act_layer=relu',))]
    for blocks in ('DBB', 'ACB', 'REP'):
        rep_layer = f'rep_layer={blocks.lower()}'
        for depth, create in ((18, resnet.create_Res18), (34, resnet.create_Res34), (50, resnet.create_Res50)):
            networks.append(Network(
                f'ResNet-{depth} of {blocks}', partial(create, IMPL=blocks), (f'repan_resnet{depth} {rep_layer}',),
                has_attach_rate=True))
        small = [f'repan_resnet18_cifar {rep_layer}'] + ['dbb_resnet18_cifar'] * (blocks == 'DBB')
        networks.append(Network(
            f'ResNet-18 of {blocks}, CIFAR-100', partial(resnet.create_Res18, 100, IMPL=blocks), tuple(small),
            image=32, has_attach_rate=True))
        networks.append(Network(
            f'MobileNet of {blocks}', partial(build_mobilenet, blocks),
            (f'repan_mobilenetv1_100 act_layer=relu {rep_layer}',), has_attach_rate=True))
    return networks + repan_repvggs()


def repan_repvggs():
    imagenet = importlib.import_module('net.repvgg_IMG')
    cifar = importlib.import_module('net.repvgg_cifar')
    settings = dict(fold=lambda model: model.deploy_model(), has_attach_rate=True)
    more = dict(A0=('repan_repvgg_a0 rep_layer=orepa', 'repan_repvgg_a0 rep_layer=acb', 'orepa_repvgg_a0'))
    networks, small = [], []
    for variant in ('A0', 'A1', 'A2', 'B0'):
        name = f'repvgg_{variant.lower()}'
        networks.append(Network(
            f'RepVGG-{variant}', getattr(imagenet, f'RepVGG_{variant}'),
            (f'repan_{name}', name, *more.get(variant, ())), **settings))
        small.append(Network(
            f'RepVGG-{variant}, CIFAR-100', partial(getattr(cifar, f'RepVGG_{variant}'), 100),
            (f'repan_{name}_cifar', f'orepa_{name}_cifar'), image=32, **settings))
    return networks + small


REPOSITORIES = dict(
    orepa=Repository('JUGGHM/OREPA_CVPR2022', 'blocks_repvgg.py', orepa_networks),
    dbb=Repository('DingXiaoH/DiverseBranchBlock', 'diversebranchblock.py', dbb_networks),
    repvgg=Repository('DingXiaoH/RepVGG', 'repvggplus.py', repvgg_networks),
    repan=Repository('xfey/RepAn', 'net/repvgg_IMG.py', repan_networks),
)


@contextlib.contextmanager
def importable(clone):
    """Let the modules of a clone be imported, and forget them after: other clones use the same names."""
    clone = clone.resolve()
    before = set(sys.modules)
    sys.path.insert(0, str(clone))
    try:
        yield
    finally:
        sys.path.remove(str(clone))
        for name in set(sys.modules) - before:
            module = sys.modules[name]
            places = [getattr(module, '__file__', None), *getattr(module, '__path__', ())]
            if any(place and Path(place).is_relative_to(clone) for place in places):
                del sys.modules[name]
