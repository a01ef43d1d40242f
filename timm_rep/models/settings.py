"""What files say of a model's images and classes: only what timm can use."""
import json
import math
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Sequence, Union

from ..core.errors import UserError

__all__ = ['INPUT_SETTINGS', 'check_input_size', 'json_object', 'settings_beside', 'usable_settings', 'with_tuples']

# What a model must be fed with, as timm's resolve_data_config names it.
INPUT_SETTINGS = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
MAX_IMAGE_SIDE = 4096


def _is_size(value: Any, numbers: int) -> bool:
    known = isinstance(value, (list, tuple)) and len(value) == numbers and all(type(n) is int for n in value)
    return known and all(0 < number <= MAX_IMAGE_SIDE for number in value)


def check_input_size(size: Sequence[Any]) -> None:
    """Refuse what cannot be the size of images.

    Args:
        size: Channels, height and width.

    Raises:
        UserError: If it is none, or too large to compute anything with.
    """
    if not _is_size(size, 3):
        raise UserError(f'input_size must be channels, height and width, at most {MAX_IMAGE_SIDE}, got {size!r}')


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_of_channels(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_number, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


USABLE: Dict[str, Callable[[Any], bool]] = dict(
    num_classes=lambda value: type(value) is int and value >= 0,
    label_names=lambda value: isinstance(value, (list, tuple)),
    label_descriptions=lambda value: isinstance(value, (list, tuple, Mapping)),
    input_size=lambda value: _is_size(value, 3),
    pool_size=lambda value: _is_size(value, 2),
    interpolation=_is_text,
    mean=_are_of_channels,
    std=_are_of_channels,
    crop_pct=_is_number,
    crop_mode=_is_text,
)


def usable_settings(given: Mapping[str, Any]) -> Dict[str, Any]:
    """Classes and input settings that a file gives, as timm takes them over from a config.json of a repository.

    Files of other libraries say other things by the same names.

    Args:
        given: Plain data by name.

    Returns:
        Fields of a ``pretrained_cfg``: those that are what timm expects.
    """
    return {key: given[key] for key, is_usable in USABLE.items() if key in given and is_usable(given[key])}


def with_tuples(entry: Mapping[str, Any]) -> Dict[str, Any]:
    """The values with tuples where JSON has lists.

    Args:
        entry: Values by name.
    """
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def json_object(source: Union[str, Path]) -> Dict[str, Any]:
    """What a text or file says; nothing if it cannot be read, or is no JSON object.

    Args:
        source: The text, or where the file is.
    """
    try:
        value = json.loads(source.read_text('utf-8') if isinstance(source, Path) else source)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def settings_beside(weights: Path) -> Dict[str, Any]:
    """Classes and input settings of the config.json beside weights: timm's folders and repositories have one.

    Args:
        weights: The file of weights.

    Returns:
        As :func:`usable_settings`; nothing if there is no such file.
    """
    config_file = weights.with_name('config.json')
    config = json_object(config_file) if config_file.is_file() else {}
    beside = config.get('pretrained_cfg')
    return {**usable_settings(beside if isinstance(beside, dict) else {}), **usable_settings(config)}
