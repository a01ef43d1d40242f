"""What train.py lacks, put in through what it calls to make the optimizer, its images and their loader."""
import argparse
import functools
from typing import Any, Callable, Dict

import torch.nn as nn
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from ..core.errors import UserError
from ..io.folders import check_classes, class_indices, number_of_classes

__all__ = ['apply_hooks']


def _without_decay_of_classifier(create_optimizer: Callable[..., Any]) -> Callable[..., Any]:
    """Add the parameters of the classifier to those that the model says are not decayed."""
    @functools.wraps(create_optimizer)
    def create(model: Any, *args: Any, **kwargs: Any) -> Any:
        network: Any = next((module for module in model.modules() if hasattr(module, 'get_classifier')), None)
        if network is None:
            raise UserError(f'--no-decay-classifier: {type(model).__name__} does not say what its classifier is')
        classifiers = network.get_classifier()
        classifiers = classifiers if isinstance(classifiers, (list, tuple)) else (classifiers,)
        kept = {parameter for classifier in classifiers for parameter in classifier.parameters()}
        names = {name for name, parameter in model.named_parameters() if parameter in kept}
        others = getattr(model, 'no_weight_decay', set)
        model.no_weight_decay = lambda: {*others(), *names}
        try:
            return create_optimizer(model, *args, **kwargs)
        finally:
            del model.no_weight_decay

    return create


def _padded_crop(transform: Any, padding: int) -> nn.Module:
    """A transform of timm's with a crop of the image and a black border around it in the place of timm's crop."""
    steps = list(getattr(transform, 'transforms', ()))
    if not (steps and isinstance(steps[0], RandomResizedCropAndInterpolation)):
        raise UserError("--crop-padding takes the place of timm's random resized crop, and its transform has none")
    height, width = steps[0].size
    crop = [
        transforms.Resize(max(height, width)),  # leaves an image of that size as it is
        transforms.RandomCrop((height, width), padding=padding),
    ]
    return transforms.Compose([*crop, *steps[1:]])


def _with_padded_crops(create_loader: Callable[..., Any], padding: int) -> Callable[..., Any]:
    @functools.wraps(create_loader)
    def create(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        loader = create_loader(dataset, *args, **kwargs)
        if kwargs.get('is_training'):  # no worker has a copy yet
            dataset.transform = _padded_crop(dataset.transform, padding)
        return loader

    return create


def _with_checked_classes(create_dataset: Callable[..., Any], args: argparse.Namespace) -> Callable[..., Any]:
    """Refuse images of more classes than the model knows, and splits that number the same class differently."""
    trained: Dict[str, int] = {}  # timm opens the training's split first

    @functools.wraps(create_dataset)
    def create(*positional: Any, **kwargs: Any) -> Any:
        images = create_dataset(*positional, **kwargs)
        indices, split = class_indices(images), kwargs['split']
        classes = number_of_classes(images)
        if classes > args.num_classes:
            raise UserError(
                f'the split {split!r} holds images of {classes} classes, the model knows {args.num_classes}; '
                f'--num-classes {classes}')
        check_classes(trained, indices, args.train_split, split)
        trained.update(indices)
        return images

    return create


def apply_hooks(script: Any, args: argparse.Namespace) -> None:
    """Let timm's script do what is asked of its optimizer and its images.

    Args:
        script: timm's train.py, as a module.
        args: timm's arguments with the wrapper's.
    """
    script.create_dataset = _with_checked_classes(script.create_dataset, args)
    if args.no_decay_classifier:
        script.create_optimizer_v2 = _without_decay_of_classifier(script.create_optimizer_v2)
    if args.crop_padding:
        script.create_loader = _with_padded_crops(script.create_loader, args.crop_padding)
