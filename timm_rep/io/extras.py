"""Optional packages: the one message where they are missing."""
import importlib.util
from typing import Sequence

from .._version import REPOSITORY
from ..core.errors import UserError

__all__ = ['has_packages', 'install_command', 'require_extra']


def install_command(extra: str = '') -> str:
    """How to install this package, with an extra if one is named."""
    return f"pip install 'timm_rep{f'[{extra}]' if extra else ''} @ git+{REPOSITORY}'"


def has_packages(packages: Sequence[str]) -> bool:
    """Whether all these packages are installed."""
    return not _missing(packages)


def _missing(packages: Sequence[str]) -> Sequence[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


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
