"""Plain data that files hold, such as arguments of runs: a small file is not many values."""
from pathlib import Path
from typing import Any, List

import yaml

from ..core.errors import UserError

__all__ = ['plain', 'read_yaml']

# Many times what arguments of a run take.
MAX_VALUES = 10 ** 5
MAX_DEPTH = 50
MAX_BYTES = 2 ** 17
MAX_INTEGER = 2 ** 63


class _Loader(yaml.SafeLoader):
    """Counts what merge keys (``<<``) take over: through aliases a few of them could take any time and memory."""

    merged = 0

    def flatten_mapping(self, node: Any) -> None:
        """Put what a mapping merges into it."""
        super().flatten_mapping(node)
        self.merged += len(node.value)
        if self.merged > MAX_VALUES:
            raise UserError(f'its merge keys (<<) make more than {MAX_VALUES} values')


def plain(value: Any) -> Any:
    """What a file says as plain numbers, strings, lists and dicts; None for what is none of these.

    A part that stands at several places is as many parts.

    Args:
        value: Anything that was read.

    Returns:
        The data, of which no part is another.

    Raises:
        UserError: If it is more, deeper or larger numbers than arguments of a run are.
    """
    return _plain(value, 0, [MAX_VALUES])


def _plain(value: Any, depth: int, left: List[int]) -> Any:
    left[0] -= 1
    if left[0] < 0 or depth > MAX_DEPTH:
        raise UserError(f'it is more than {MAX_VALUES} values, or deeper than {MAX_DEPTH} levels')
    if isinstance(value, dict):
        return {str(_plain(key, MAX_DEPTH, left)): _plain(part, depth + 1, left) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, depth + 1, left) for part in value]
    if isinstance(value, int) and abs(value) >= MAX_INTEGER:
        raise UserError('it has a number of more than 64 bits')
    return next((kind(value) for kind in (bool, int, float, str) if isinstance(value, kind)), None)


def read_yaml(path: Path) -> Any:
    """Read a YAML file that holds no more than :func:`plain` takes.

    Args:
        path: The file.

    Returns:
        What it holds.

    Raises:
        UserError: If it is not a YAML file, or more than arguments of a run are.
        OSError: If it cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f'{path} has {size} bytes, allowed are at most {MAX_BYTES}; it is not read')
    try:
        content = yaml.load(path.read_bytes(), _Loader)
        plain(content)
        return content
    except OSError:
        raise
    except Exception as e:  # PyYAML raises almost anything for values that are not what their tags say
        raise UserError(f'{path} is not a YAML file of plain data: {" ".join(str(e).split())}') from e
