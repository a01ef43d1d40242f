"""Find timm's own scripts, which are not part of timm's package, and run one with our models registered."""
import logging
import os
import runpy
import sys
from pathlib import Path
from typing import List, Sequence, Union

import timm

from ..core.errors import UserError

__all__ = ['SCRIPTS', 'find_script', 'run_script', 'script_folders']

_logger = logging.getLogger(__name__)

SCRIPTS = ('train', 'validate', 'benchmark', 'inference', 'onnx_export')
FOLDER_VARIABLE = 'TIMM_SCRIPTS'
TIMM_REPOSITORY = 'https://github.com/huggingface/pytorch-image-models'


def _cache_folder() -> Path:
    cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(cache) / 'timm_rep' / f'timm-{timm.__version__}'


def script_folders(folder: Union[str, Path, None] = None) -> List[Path]:
    """Where timm's scripts are looked for, in this order.

    A folder that is given, or named by ``$TIMM_SCRIPTS``, is the only one: a script from elsewhere would be a surprise.

    Args:
        folder: Folder given by the user.

    Returns:
        The given folder; else that of ``$TIMM_SCRIPTS``; else the timm source checkout that is installed editable, if
        there is one, and the user cache ``<cache>/timm_rep/timm-<version>``.
    """
    given = folder or os.environ.get(FOLDER_VARIABLE)
    if given:
        return [Path(given).expanduser()]
    folders = [_cache_folder()]
    checkout = Path(timm.__file__).resolve().parents[1]
    if (checkout / 'pyproject.toml').is_file():  # no site-packages folder has one
        folders.insert(0, checkout)
    return folders


def find_script(name: str, folder: Union[str, Path, None] = None) -> Path:
    """Find one of timm's scripts. Nothing is ever downloaded.

    Args:
        name: One of ``SCRIPTS``, with or without ``.py``.
        folder: The only folder to look in; see :func:`script_folders` for the default.

    Returns:
        Path of the script.

    Raises:
        UserError: For another name.
        FileNotFoundError: If the script is in none of the folders. The message says how to get it.
    """
    stem = name[:-len('.py')] if name.endswith('.py') else name
    if stem not in SCRIPTS:
        raise UserError(f'unknown timm script {name!r}; allowed are {", ".join(SCRIPTS)}')
    folders = script_folders(folder)
    for place in folders:
        path = place / f'{stem}.py'
        if path.is_file():
            return path
    places = ', '.join(str(place) for place in folders)
    raise FileNotFoundError(
        f"timm's {stem}.py is not in {places}. The scripts ({', '.join(SCRIPTS)}) do not come with timm's package; "
        f'get them with `git clone --depth 1 --branch v{timm.__version__} {TIMM_REPOSITORY} timm-src` and '
        f'`export {FOLDER_VARIABLE}=$PWD/timm-src`'
    )


def run_script(path: Union[str, Path], args: Sequence[str] = ()) -> None:
    """Run a timm script as the main program, with our models registered.

    The script's folder does not get onto ``sys.path``, as it would with ``python train.py``: in a checkout it holds
    another timm, which would take the place of the installed one.

    Args:
        path: The script, as found by :func:`find_script`.
        args: Its command line.

    Raises:
        SystemExit: As the script raises it, e.g. behind its ``--help``.
    """
    path = Path(path)
    _logger.debug('running %s with timm %s from %s', path, timm.__version__, timm.__file__)
    own_argv = sys.argv
    sys.argv = [str(path), *args]
    try:
        runpy.run_path(str(path), run_name='__main__')
    finally:
        sys.argv = own_argv
