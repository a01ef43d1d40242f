"""The networks, and the forms in which they are trained."""
import timm
import torch
import torch.nn as nn
from data import normalized

import timm_rep

# Widths of the three groups; all have a stem of 24 filters.
WIDTHS = dict(small=(16, 64, 64), medium=(32, 128, 128), speedrun=(64, 256, 256))
NETWORKS = (*WIDTHS, 'resnet18_cifar')
PLAIN = 'plain'
# Methods with other options than their own.
VARIANTS = dict(orepa_unscaled=timm_rep.Orepa(scaling='none'))
WHITENING_STEP = 10  # each tenth image tells enough; images come class by class
WHITENING_EPS = 5e-4


def forms():
    """Names of what a network can be trained as: plain, or with the layers of a method."""
    # those of large depthwise kernels have nothing to take here
    return [PLAIN, *(name for name in timm_rep.methods.registered_methods() if name != 'dilated'), *VARIANTS]


def whitening(pixels):
    """Kernel ``(24, 3, 2, 2)`` whose outputs on 2x2 patches of images are uncorrelated, each with its negative."""
    patches = nn.functional.unfold(normalized(pixels[::WHITENING_STEP]), 2).transpose(1, 2).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    kernel = (vectors / (values + WHITENING_EPS).sqrt()).T.reshape(12, 3, 2, 2).float()
    return torch.cat([kernel, -kernel])


def conv_norm(channels, width):
    return [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]


def build_plain(network, stem, num_classes):
    """The plain network: a stem that whitens and stands still, three groups, a linear classifier; for 32x32 images.

    Or a registered one, which has no such stem.
    """
    if network not in WIDTHS:
        return timm.create_model(f'orepa_{network}', inference_mode=True, num_classes=num_classes)
    layers = [nn.Conv2d(3, len(stem), 2, bias=False), nn.GELU()]
    layers[0].weight = nn.Parameter(stem.clone(), requires_grad=False)
    channels = len(stem)
    for width in WIDTHS[network]:
        layers += [*conv_norm(channels, width), nn.MaxPool2d(2), nn.GELU(), *conv_norm(width, width), nn.GELU()]
        channels = width
    return nn.Sequential(*layers, nn.MaxPool2d(3), nn.Flatten(), nn.Linear(channels, num_classes))


def build(network, form, seed, stem, num_classes):
    """A new network in a form. In eval mode all forms of one seed compute the same: that of the plain network drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_plain(network, stem.cpu(), num_classes)
    if form != PLAIN:
        model = timm_rep.expand(model.eval(), VARIANTS.get(form, form), generator=torch.Generator().manual_seed(seed))
    return model.to(memory_format=torch.channels_last)
