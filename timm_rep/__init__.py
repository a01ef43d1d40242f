"""timm_rep: structural re-parameterization for timm. Importing it registers the models with timm.

The command ``timm-rep`` alone puts that off until something is asked for: its help need not wait for torch.
"""
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__  # noqa: F401

if TYPE_CHECKING or [Path(program).stem for program in sys.argv[:1]] != ['timm-rep']:
    from ._api import *  # noqa: F403
    if not TYPE_CHECKING:  # mypy would take no name for public
        from ._api import __all__  # noqa: F401
else:
    def __getattr__(name: str) -> Any:
        """Load all of it when a script that the command runs asks for a part."""
        home = f'{__name__}._api'
        if home not in sys.modules and (name == '__all__' or not name.startswith('__')):
            api = importlib.import_module(home)
            globals().update({public: getattr(api, public) for public in ('__all__', *api.__all__)})
            if name in globals():
                return globals()[name]
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
