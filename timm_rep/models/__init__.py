"""Architectures, registered with timm on import."""
from . import dbb_resnet, orepa_repvgg, orepa_resnet, repan

__all__ = ['dbb_resnet', 'orepa_repvgg', 'orepa_resnet', 'repan']
