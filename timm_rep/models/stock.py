"""Stock networks that timm has, and the few shapes of the papers that it has not."""
import copy
from typing import Any, Dict, List, Tuple

import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import ByoBlockCfg, ByobNet, ByoModelCfg, ResNet, named_apply
from timm.models.byobnet import RepVggBlock, _init_weights
from timm.models.byobnet import model_cfgs as byobnet_cfgs
from timm.models.resnet import BasicBlock, Bottleneck

__all__ = [
    'RESNETS', 'build_repvgg', 'build_resnet', 'imagenet_cfg', 'repvgg_cifar_cfg', 'repvgg_kwargs',
    'reset_repvgg_norms_', 'small_image_cfg', 'start_as_torch_',
]

# Arguments of build_resnet by name of the stock network.
RESNETS: Dict[str, Dict[str, Any]] = dict(
    resnet18=dict(block=BasicBlock, layers=(2, 2, 2, 2)),
    resnet34=dict(block=BasicBlock, layers=(3, 4, 6, 3)),
    resnet50=dict(block=Bottleneck, layers=(3, 4, 6, 3)),
    resnet101=dict(block=Bottleneck, layers=(3, 4, 23, 3)),
    resnext50_32x4d=dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4),
    wide_resnet18_2=dict(block=BasicBlock, layers=(2, 2, 2, 2), width_factor=2),
    resnet18_cifar=dict(block=BasicBlock, layers=(2, 2, 2, 2), small_images=True),
)
RESNET_CHANNELS = (64, 128, 256, 512)
# CIFAR RepVGG: widths of stem and stages before the multipliers, strides of the stages (RepAn).
REPVGG_CIFAR_STEM = 16
REPVGG_CIFAR_CHANNELS = (16, 32, 64, 64)
REPVGG_CIFAR_STRIDES = (1, 2, 2, 1)


def imagenet_cfg(**kwargs: Any) -> Dict[str, Any]:
    """Input settings of the papers' ImageNet models.

    ``first_conv`` is empty: a composed kernel has no weight that timm could adapt to other image channels, so
    :func:`~timm_rep.models.checkpoint_filter.checkpoint_filter_fn` does that.
    """
    return {
        'url': '', 'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': (), 'classifier': 'fc', 'license': 'apache-2.0',
        **kwargs,
    }


def small_image_cfg(**kwargs: Any) -> Dict[str, Any]:
    """Input settings of the ``_cifar`` models: whole images of 32x32 pixels, ten classes."""
    return imagenet_cfg(**{
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (4, 4), 'crop_pct': 1.0,
        'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2470, 0.2435, 0.2616),
        **kwargs,
    })


def build_resnet(width_factor: int = 1, small_images: bool = False, **kwargs: Any) -> ResNet:
    """Build timm's ResNet, optionally with all widths multiplied or with a stem for small images.

    Args:
        width_factor: Multiplies all widths, the stem's too (timm's ``channels`` leaves the stem at 64).
        small_images: Take a 3x3 stride-1 stem and no max-pooling.
        **kwargs: Arguments of ``timm.models.ResNet``.

    Returns:
        The network.
    """
    in_chans = kwargs.get('in_chans', 3)
    dd = {key: kwargs[key] for key in ('device', 'dtype') if key in kwargs}  # older timm takes neither
    if width_factor != 1:
        kwargs['channels'] = tuple(width_factor * c for c in RESNET_CHANNELS)
    model: Any = ResNet(**kwargs)
    if width_factor != 1:
        # The second block of the first stage has the shape that the first needs behind a wide stem.
        first = copy.deepcopy(model.layer1[1])
        first.drop_path = model.layer1[0].drop_path
        model.layer1[0] = first
        model.bn1 = copy.deepcopy(first.bn1)
        width = first.conv1.out_channels
        model.conv1 = nn.Conv2d(in_chans, width, kernel_size=7, stride=2, padding=3, bias=False, **dd)
        model.feature_info[0]['num_chs'] = width
    if small_images:
        model.conv1 = nn.Conv2d(in_chans, model.conv1.out_channels, kernel_size=3, padding=1, bias=False, **dd)
        model.maxpool = nn.Identity()
        for info in model.feature_info:
            info['reduction'] = max(info['reduction'] // 4, 1)
    if width_factor != 1 or small_images:
        model.init_weights(zero_init_last=kwargs.get('zero_init_last', True))
    return model


def repvgg_cifar_cfg(depths: Tuple[int, ...], width_factors: Tuple[float, ...]) -> ByoModelCfg:
    """Configuration of a CIFAR RepVGG: widths 16, 16, 32, 64, 64 times the multipliers, strides 1, 1, 2, 2, 1 (RepAn).

    Args:
        depths: Blocks of each stage.
        width_factors: Multiplier of each stage, as in RepVGG's A and B variants.

    Returns:
        Configuration for :func:`build_repvgg` with ``small_images=True``.
    """
    stages = zip(depths, REPVGG_CIFAR_CHANNELS, REPVGG_CIFAR_STRIDES, width_factors)
    return ByoModelCfg(
        blocks=tuple(ByoBlockCfg(type='rep', d=d, c=round(c * w), s=s, gs=0) for d, c, s, w in stages),
        stem_type='rep',
        stem_chs=round(REPVGG_CIFAR_STEM * min(1.0, width_factors[0])),
    )


# Depths and width factors of the variants (RepVGG, Table 2).
CIFAR_CFGS = dict(
    repvgg_a0_cifar=repvgg_cifar_cfg((2, 4, 14, 1), (0.75, 0.75, 0.75, 2.5)),
    repvgg_a1_cifar=repvgg_cifar_cfg((2, 4, 14, 1), (1.0, 1.0, 1.0, 2.5)),
    repvgg_a2_cifar=repvgg_cifar_cfg((2, 4, 14, 1), (1.5, 1.5, 1.5, 2.75)),
    repvgg_b0_cifar=repvgg_cifar_cfg((4, 6, 16, 1), (1.0, 1.0, 1.0, 2.5)),
)


def repvgg_kwargs(stock: str) -> Dict[str, Any]:
    """What ``build_model_with_cfg`` needs to know of a RepVGG.

    Args:
        stock: timm's name of the network, or that of a ``_cifar`` one.

    Returns:
        Its configuration, the taps of its feature maps, and whether it is for small images.
    """
    small_images = stock in CIFAR_CFGS
    feature_cfg: Dict[str, Any] = dict(flatten_sequential=True)
    if small_images:  # fewer reductions than timm's default of five
        feature_cfg['out_indices'] = (0, 1, 2)
    model_cfg = CIFAR_CFGS[stock] if small_images else byobnet_cfgs[stock]
    return dict(model_cfg=model_cfg, feature_cfg=feature_cfg, small_images=small_images)


def reset_repvgg_norms_(model: ByobNet) -> ByobNet:
    """Start the norms of RepVGG blocks at weight one and bias zero, where timm draws them from N(0.1, 0.1).

    Args:
        model: RepVGG.

    Returns:
        The model.
    """
    for block in model.modules():
        if isinstance(block, RepVggBlock):
            for norm in block.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.reset_parameters()
    return model


def start_as_torch_(model: nn.Module) -> None:
    """Start convolutions and classifier with torch's own values, where timm draws them from normal distributions.

    Args:
        model: Newly built network.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()


def build_repvgg(cfg: ByoModelCfg, small_images: bool = False, **kwargs: Any) -> ByobNet:
    """Build timm's RepVGG, optionally with a stride-1 stem.

    Args:
        cfg: timm's configuration.
        small_images: Take a stem of stride 1, where timm's builder knows only 2, and stages of exactly the widths of
            the configuration, where it rounds them to multiples of 8.
        **kwargs: Arguments of ``timm.models.ByobNet``.

    Returns:
        The network.
    """
    model: Any = ByobNet(cfg, **kwargs)
    if small_images:
        # older timm takes neither
        dd: Dict[str, Any] = {key: kwargs[key] for key in ('device', 'dtype') if key in kwargs}
        width = model.stem.conv_kxk.conv.out_channels
        stem = RepVggBlock(kwargs.get('in_chans', 3), width, stride=1, **dd)
        stem.load_state_dict(model.stem.state_dict(), strict=False)  # a new identity branch keeps its own start
        model.stem = stem
        for info in model.feature_info:
            info['reduction'] //= 2
        blocks: Any = cfg.blocks
        for stage, block_cfg in zip(model.stages, blocks):
            width = _set_width_(stage, width, block_cfg.c, model.feature_info, dd)
    return model


def _set_width_(stage: Any, in_chs: int, width: int, feature_info: List[Dict[str, Any]], dd: Dict[str, Any]) -> int:
    """Give the blocks of a stage the channels that they should have, where timm made them multiples of 8."""
    rounded = stage[-1].conv_kxk.conv.out_channels
    for position, block in enumerate(stage):
        conv = block.conv_kxk.conv
        if (conv.in_channels, conv.out_channels) != (in_chs, width):
            stage[position] = RepVggBlock(in_chs, width, stride=conv.stride[0], **dd)
            stage[position].drop_path, stage[position].act = block.drop_path, block.act
            named_apply(_init_weights, stage[position], include_root=True)
        in_chs = width
    for info in feature_info:
        if info['num_chs'] == rounded:
            info['num_chs'] = width
    return width
