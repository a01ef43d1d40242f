"""Packages that are not ours: the one message where an optional one is missing or a module of the user's fails."""
import importlib.util
import sys
import traceback
from typing import Iterable, Sequence

from .._version import REPOSITORY
from ..core.errors import UserError

__all__ = ['has_packages', 'import_modules', 'install_command', 'require_extra']


def install_command(extra: str = '') -> str:
    """How to install this package, with an extra if one is named."""
    return f"pip install 'timm_rep{f'[{extra}]' if extra else ''} @ git+{REPOSITORY}'"


def has_packages(packages: Sequence[str]) -> bool:
    """Whether all these packages are installed."""
    return not _missing(packages)


def _missing(packages: Sequence[str]) -> Sequence[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def import_modules(names: Iterable[str], option: str) -> None:
    """Import modules of the user's, which may register methods.

    Args:
        names: Of the modules.
        option: Where they are named, the first word of the message.

    Raises:
        UserError: If one cannot be imported. The message says why and where.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as e:
            raise UserError(f"{option} {name}: {e}; Python's path is {sys.path}") from e
        except Exception as e:
            frames = [frame for frame in traceback.extract_tb(e.__traceback__)[1:] if frame.filename[0] != '<']
            place = ''.join(f' ({frame.filename}, line {frame.lineno})' for frame in frames[-1:])
            raise UserError(f'{option} {name}: {type(e).__name__}: {e}{place}') from e


def require_extra(what: str, extra: str, packages: Sequence[str]) -> None:
    """Check that optional packages are there.

    Args:
        what: What needs them, the first word of the message.
        extra: The extra that brings them.
        packages: Names to import them by.

    Raises:
        UserError: If one is missing. The message says how to install it.
    """
    missing = _missing(packages)
    if missing:
        raise UserError(f'{what} also needs {", ".join(missing)}: {install_command(extra)}')
