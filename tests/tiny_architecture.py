"""A small architecture of ours whose stock form is timm's own test_resnet. Importing it registers it."""
import timm
from timm.models import generate_default_cfgs, register_model

from timm_rep.core.expand import expand_fresh_
from timm_rep.models.checkpoint_filter import checkpoint_filter_fn
from timm_rep.models.published import build_model
from timm_rep.models.stock import imagenet_cfg

NAME = 'orepa_test_resnet'
default_cfgs = generate_default_cfgs({NAME: imagenet_cfg(input_size=(3, 32, 32), pool_size=(1, 1))})


def _build(inference_mode=False, **kwargs):
    kwargs.pop('pretrained_cfg', None)
    model = timm.create_model('test_resnet', **kwargs)
    return model if inference_mode else expand_fresh_(model, 'orepa')


@register_model
def orepa_test_resnet(pretrained=False, **kwargs):
    return build_model(_build, NAME, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


orepa_test_resnet.__module__ = 'timm_rep.models.tiny'  # as one of ours
