"""Published weights of our models: what ``pretrained=True`` finds, and what it says where there are none."""
import argparse
import json
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, TypeVar

import safetensors
import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import (
    build_model_with_cfg,
    get_pretrained_cfg,
    load_model_config_from_hf,
    load_state_dict,
    resolve_pretrained_cfg,
)

from ..core.errors import UserError
from .files import check_file
from .settings import json_object, settings_beside, usable_settings, with_tuples

__all__ = ['build_model', 'described_weights', 'published_weights', 'with_published']

REGISTRY = Path(__file__).with_name('published.json')

ModelT = TypeVar('ModelT', bound=nn.Module)
Cfgs = Dict[str, Dict[str, Any]]


def published_weights(registry: Path = REGISTRY) -> Cfgs:
    """The weights that are published, by 'architecture.tag' of our models, as `timm-rep publish` prints the entries.

    Args:
        registry: JSON file.

    Returns:
        What differs from the architecture's own settings, above all ``hf_hub_id``, or ``file`` of weights that come
        with the package.
    """
    entries = {name: with_tuples(entry) for name, entry in json.loads(registry.read_text()).items()}
    for entry in entries.values():
        if 'file' in entry:
            entry['file'] = str(registry.parent / entry['file'])
    return entries


def with_published(cfgs: Cfgs, published: Optional[Cfgs] = None) -> Dict[str, Any]:
    """Add the published weights to the settings of the architectures.

    Args:
        cfgs: Settings by architecture, for timm's ``generate_default_cfgs``.
        published: Published weights; by default those of the registry.

    Returns:
        The settings, with one more entry for each published set of weights of these architectures.
    """
    result = dict(cfgs)
    for name, entry in (published_weights() if published is None else published).items():
        architecture = name.partition('.')[0]
        if architecture in cfgs:
            result[name] = {**cfgs[architecture], **entry}
    return result


def _trained_with(args: Any, cfg: Any) -> Dict[str, Any]:
    """Input settings of a run of train.py, as its checkpoint says; nothing of other programs'."""
    if not isinstance(getattr(args, 'model', None), str):
        return {}
    try:
        return resolve_data_config(vars(args), pretrained_cfg=cfg.to_dict())
    except (AssertionError, TypeError, ValueError):
        return {}


def _described_by_file(path: Path, variant: str) -> Dict[str, Any]:
    """Classes that the shape of the classifier in a file tells, and what our own files, checkpoints of train.py and the
    config.json beside one say of their input.
    """
    cfg: Any = get_pretrained_cfg(variant)
    key = f'{cfg.classifier}.weight'
    if path.suffix == '.safetensors':
        with safetensors.safe_open(path, 'pt') as file:
            classes = file.get_slice(key).get_shape()[:1] if key in file.keys() else []
            described = json_object((file.metadata() or {}).get('pretrained_cfg', ''))
    else:
        check_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # train.py puts its arguments into the checkpoint
            content = torch.load(path, map_location='meta', weights_only=True)
            state_dict = load_state_dict(str(path), device='meta', weights_only=True)
        classes = list(state_dict[key].shape[:1]) if key in state_dict else []
        described = _trained_with(content.get('args'), cfg)
    settings = {**settings_beside(path), **usable_settings(described)}  # what it says itself goes first
    known = {key: value for key, value in settings.items() if key != 'num_classes'}
    return {**known, **(dict(num_classes=classes[0]) if classes else {})}


def described_weights(overlay: Mapping[str, Any], variant: str, cache_dir: Any = None) -> Dict[str, Any]:
    """What the repository or file that an overlay takes weights from says of them; no more than there is.

    Args:
        overlay: Fields of a ``pretrained_cfg``: ``hf_hub_id``, or ``file``.
        variant: Name of the architecture.
        cache_dir: Folder of fetched files.

    Returns:
        Fields of a ``pretrained_cfg``: classes and input settings.
    """
    try:
        if overlay.get('hf_hub_id'):
            described = load_model_config_from_hf(overlay['hf_hub_id'], cache_dir=cache_dir)[0]
        else:
            described = _described_by_file(Path(overlay['file']), variant)
    except Exception:  # what is wrong with the weights timm says
        return {}
    return with_tuples(usable_settings(described))


def _check_weights(path: Path) -> None:
    """Refuse a file that is damaged or more than weights, or a folder (``'local-dir:...'``) with one timm may take."""
    suffixes = ('.safetensors', '.pth', '.pt', '.bin')
    for file in sorted(path.iterdir()) if path.is_dir() else (path,):
        if file.is_file() and (file is path or file.suffix in suffixes):
            check_file(file)


def build_model(
        model_cls: Callable[..., ModelT],
        variant: str,
        pretrained: bool,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> ModelT:
    """Call timm's ``build_model_with_cfg``, which says more where ``pretrained=True`` finds no weights.

    Weights that the overlay names have the classes and input settings that the file itself tells, else those of the
    config.json beside it, as they have where timm loads them by ``'hf-hub:ORG/NAME'``, unless the overlay says
    otherwise.

    Args:
        model_cls: Builds the model.
        variant: Name of the architecture.
        pretrained: Load weights.
        pretrained_cfg: As timm's.
        pretrained_cfg_overlay: As timm's.
        **kwargs: More of timm's.

    Returns:
        The model.

    Raises:
        UserError: If weights are asked for and none are published, or a file that they are to come from is damaged or
            holds more than weights.
    """
    if pretrained:
        overlay = pretrained_cfg_overlay or {}
        cfg: Any = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
        if cfg.file:
            _check_weights(Path(cfg.file))
        if not (cfg.has_weights or cfg.state_dict):
            raise UserError(
                f'no weights of {variant} are published yet. There are two ways to get some: import those of the '
                f'authors (`timm-rep import-official FILE --model {variant} --out DIR`), or train it; then pass '
                'pretrained_cfg_overlay=dict(file=...), or dict(hf_hub_id=...) for weights on the Hub'
            )
        pretrained_cfg_overlay = {**described_weights(overlay, variant, kwargs.get('cache_dir')), **overlay}
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        **kwargs,
    )
