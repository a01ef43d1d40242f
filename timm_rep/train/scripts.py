"""Find timm's own scripts, which are not part of timm's package, and run one with our models registered."""
import argparse
import importlib.util
import logging
import os
import runpy
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List, Sequence, Union

import timm
import torch.nn as nn

from ..core.errors import UserError
from ..models.names import TRAINING_PREFIXES  # with which our models are registered

__all__ = ['SCRIPTS', 'find_script', 'interruption_noted', 'run_script']

_logger = logging.getLogger(__name__)

SCRIPTS = ('train', 'validate', 'benchmark', 'inference', 'onnx_export')
FOLDER_VARIABLE = 'TIMM_SCRIPTS'
TIMM_REPOSITORY = 'https://github.com/huggingface/pytorch-image-models'
# Scripts that run a model, or write it, as it is, unless they are told to fuse it.
REPARAM_SCRIPTS = ('validate', 'benchmark', 'onnx_export')


def _script_folders(folder: Union[str, Path, None]) -> List[Path]:
    given = folder or os.environ.get(FOLDER_VARIABLE)
    if given:
        return [Path(given).expanduser()]
    cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    folders = [Path(cache) / 'timm_rep' / f'timm-{timm.__version__}']
    checkout = Path(timm.__file__).resolve().parents[1]
    if (checkout / 'pyproject.toml').is_file():  # no site-packages folder has one
        folders.insert(0, checkout)
    return folders


def find_script(name: str, folder: Union[str, Path, None] = None) -> Path:
    """Find one of timm's scripts. Nothing is ever downloaded.

    A folder that is given, or named by ``$TIMM_SCRIPTS``, is the only one to look in: a script from elsewhere would be
    a surprise. Else it is the timm source checkout that is installed editable, if there is one, and then the user cache
    ``<cache>/timm_rep/timm-<version>``.

    Args:
        name: One of ``SCRIPTS``.
        folder: Folder given by the user.

    Returns:
        Path of the script.

    Raises:
        UserError: For another name.
        FileNotFoundError: If the script is in none of the folders. The message says how to get it.
    """
    if name not in SCRIPTS:
        raise UserError(f'unknown timm script {name!r}; allowed are {", ".join(SCRIPTS)}')
    paths = [place / f'{name}.py' for place in _script_folders(folder)]
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"timm's scripts ({', '.join(SCRIPTS)}) do not come with its package, and there is no "
        f'{" nor ".join(map(str, paths))}; get them with `git clone --depth 1 --branch v{timm.__version__} '
        f'{TIMM_REPOSITORY} timm-src` and `export {FOLDER_VARIABLE}=$PWD/timm-src`'
    )


def _check_arguments(script: str, args: Sequence[str]) -> None:
    """Say before a script runs what it would say by a traceback, or not at all.

    Raises:
        UserError: If a package that the script needs is missing.
    """
    if script == 'inference' and importlib.util.find_spec('pandas') is None:
        raise UserError("timm's inference.py needs pandas: pip install pandas")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--model', '-m', nargs='?')
    parser.add_argument('--reparam', action='store_true')
    parser.add_argument('--model-kwargs', nargs='*', default=[])
    given, _ = parser.parse_known_args(args)
    model = given.model or ''
    stock = any(item.startswith('inference_mode=') for item in given.model_kwargs)
    if script in REPARAM_SCRIPTS and model.startswith(TRAINING_PREFIXES) and not (given.reparam or stock):
        _logger.warning('%s keeps all its branches in %s; --reparam fuses it first', model, script)


@contextmanager
def interruption_noted() -> Iterator[List[int]]:
    """Let Ctrl-C end the process as an error where a script of timm's takes it for the end of its work.

    Yields:
        The signals that have come, as they come.

    Raises:
        KeyboardInterrupt: At the end, if it was raised before and nothing became of it.
    """
    noted: List[int] = []

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_usual or threading.current_thread() is not threading.main_thread():  # somebody else decides
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if noted:
        raise KeyboardInterrupt


@contextmanager
def _fused_in_eval_mode() -> Iterator[None]:
    """Let timm's scripts fuse models in eval mode: they do so before they set it, and norms cannot be fused earlier."""
    reparameterize_model = timm.utils.reparameterize_model

    def evaluated_first(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return reparameterize_model(model.eval(), *args, **kwargs)

    homes: List[Any] = [timm.utils, timm.utils.model]
    for module in homes:
        module.reparameterize_model = evaluated_first
    try:
        yield
    finally:
        for module in homes:
            module.reparameterize_model = reparameterize_model


def run_script(path: Union[str, Path], args: Sequence[str] = ()) -> None:
    """Run a timm script as the main program, with our models registered.

    The script's folder does not get onto ``sys.path``, as it would with ``python train.py``: in a checkout it holds
    another timm, which would take the place of the installed one.

    Args:
        path: The script, as found by :func:`find_script`.
        args: Its command line.

    Raises:
        UserError: If a package that the script needs is missing.
        SystemExit: As the script raises it, e.g. behind its ``--help``.
        KeyboardInterrupt: If the script was interrupted, even if it swallows that.
    """
    path = Path(path)
    _check_arguments(path.stem, args)
    _logger.debug('running %s with timm %s from %s', path, timm.__version__, timm.__file__)
    own_argv = sys.argv
    sys.argv = [str(path), *args]
    try:
        with interruption_noted(), _fused_in_eval_mode():
            runpy.run_path(str(path), run_name='__main__')
    finally:
        sys.argv = own_argv
