"""timm's own train.py, unmodified, with the time steps of RepAn around its epochs, in one run.

    timm-rep train --recipe repan_cifar10 --data-dir data --experiment run
    timm-rep train --model repan_repvgg_a1_cifar --time-steps 5 --epochs 30 --data-dir images --experiment run

`--epochs` counts the epochs of one time step. The wrapper sets the restarts of timm's schedule and wraps timm's
`train_one_epoch`: there the attach rate is set and, where a time step begins, every layer is folded, redrawn and
restored (on the averaged weights too) and the optimizer's state is cleared. Weights to start from (`--pretrained`,
`--initial-checkpoint`) are folded in the same way first, at the attach rate of the first epoch and with the same
outputs in eval mode. All of timm's arguments pass through; one default differs: `--lr-cycle-decay`, the factor of the
peak learning rate from one time step to the next, is 1.

At the end of every time step the weights are kept as `time_step-N.safetensors` (training form) and
`time_step-N-stock.safetensors` (fused). `--resume auto` goes on from the newest whole checkpoint of the run's folder,
which `--experiment` names, as if it had never stopped: all that is random follows from the seed and the epoch (not
with --use-multi-epochs-loader). Which epoch was the best so far is remembered from timm 1.0.31 on.

On several GPUs: torchrun --nproc-per-node 4 -m timm_rep.train ...
"""
import argparse
import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, List, Optional, Sequence, Tuple

import yaml
from timm.utils import is_primary

from ..core.errors import UserError, visible
from ..io.extras import import_modules
from ..io.hub_errors import HubError
from .arguments import (
    add_time_step_options,
    check_crops,
    check_data,
    check_model,
    check_names,
    check_start_weights,
    complete_schedule,
    output_folder,
    read_options,
    recipe_file,
    recipe_names,
    take_start_settings,
)
from .best import check_best
from .epochs import AnnealedEpochs
from .hooks import apply_hooks
from .lock import RunLock
from .resume import find_run
from .scripts import find_script, interruption_noted
from .snapshots import DivergedError

__all__ = ['load_script', 'main']

# What the wrapper must find in timm's script.
SCRIPT_NAMES = (
    'config_parser', 'parser', '_parse_args', 'main', 'create_dataset', 'create_loader', 'create_optimizer_v2',
    'train_one_epoch')


def load_script(path: Path) -> ModuleType:
    """Import timm's script, and check that it has what the wrapper needs.

    Args:
        path: timm's train.py.

    Returns:
        The module.

    Raises:
        UserError: If names are missing.
    """
    spec: Any = importlib.util.spec_from_file_location('timm_train_script', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [name for name in SCRIPT_NAMES if not hasattr(module, name)]
    if missing:
        raise UserError(
            f"{path} is not a train.py of timm's that time steps can be added to (known: 1.0.20 and later); it lacks "
            f'{", ".join(missing)}'
        )
    return module


def _unless_interrupted(train_one_epoch: Callable[..., Any], noted: Sequence[int]) -> Callable[..., Any]:
    """An epoch that does not begin after Ctrl-C, which Python forgets if it comes while workers are shut down."""
    @functools.wraps(train_one_epoch)
    def epoch(*args: Any, **kwargs: Any) -> Any:
        if noted:
            raise KeyboardInterrupt
        return train_one_epoch(*args, **kwargs)

    return epoch


def _train_in_time_steps(script: Any) -> None:
    """Run timm's main with time steps around its epochs. Arguments that cannot work are refused before it writes."""
    parse_args = script._parse_args
    runs: List[AnnealedEpochs] = []
    lock = RunLock()

    def parse() -> Tuple[Any, str]:
        args, _ = parse_args()
        import_modules(getattr(args, 'device_modules', None) or (), '--device-modules')  # as timm is about to
        schedule = complete_schedule(args)
        check_names(args)
        folder = output_folder(args)
        if folder is not None:
            lock.take(folder, make=False)  # before its files are read
        check_start_weights(args)
        take_start_settings(args)
        find_run(args, schedule)
        check_crops(args)
        check_best(args, schedule)
        check_data(args)
        check_model(args, schedule)
        if folder is not None:
            lock.take(folder)
        apply_hooks(script, args)
        runs.append(AnnealedEpochs(args, schedule, lock))
        script.train_one_epoch = runs[0].around(_unless_interrupted(script.train_one_epoch, noted))
        return args, yaml.safe_dump(vars(args), default_flow_style=False)  # timm keeps the text as args.yaml

    script._parse_args = parse
    try:
        with interruption_noted() as noted:
            script.main()
            if is_primary(runs[0].args):
                runs[0].finish()
    finally:
        lock.release()


def _own_parser(prog: str) -> argparse.ArgumentParser:
    """What timm's parser does not know."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s [options of the wrapper] [timm's options]", add_help=False)
    parser.add_argument('-h', '--help', action='store_true', help="Show this, then timm's options.")
    parser.add_argument(
        '--recipe', metavar='NAME_OR_FILE', help=f'Options of a recipe: {", ".join(recipe_names())}, or a YAML file.')
    parser.add_argument(
        '--timm-scripts', metavar='DIR',
        help="Folder of timm's train.py (default: $TIMM_SCRIPTS, the checkout of an editable timm, the user cache).")
    return parser


def _with_recipe(script: Any, argv: List[str], recipe: Optional[str]) -> List[str]:
    """Give timm's parser the options of a recipe or a config file, which is read once: it may be a pipe."""
    config = script.config_parser.parse_known_args(argv)[0].config
    if recipe and config:
        raise UserError(f'--recipe {recipe} and --config {config} are both files of options; give one of them')
    if not (recipe or config):
        return argv
    script.parser.set_defaults(**read_options(recipe_file(recipe) if recipe else Path(config)))
    return [*argv, '--config', '']


def _train(argv: Sequence[str], prog: str) -> None:
    parser = _own_parser(prog)
    own, rest = parser.parse_known_args(argv)
    if own.help:
        add_time_step_options(parser)
        print(parser.format_help())
        rest = ['--help']
    try:
        path = find_script('train', own.timm_scripts)
    except FileNotFoundError as e:
        raise UserError(str(e)) from None
    script: Any = load_script(path)
    if not own.help:
        add_time_step_options(script.parser)
        script.parser.set_defaults(lr_cycle_decay=1.0)
        rest = _with_recipe(script, rest, own.recipe)
    script.parser.prog = prog
    own_argv = sys.argv
    sys.argv = [prog, *rest]
    try:
        _train_in_time_steps(script)
    finally:
        sys.argv = own_argv
        sys.stdout.flush()


def main(argv: Optional[Sequence[str]] = None, prog: str = 'timm-rep train') -> None:
    """Train as the command line asks.

    Args:
        argv: Arguments of the wrapper and of timm's train.py; those of the process by default.
        prog: What to call the command in messages.

    Raises:
        SystemExit: With code 1 if the training has diverged, 2 for what the user can mend, 3 if the Hub does not give
            the description of the model, 130 if it was interrupted; else as timm's script raises it.
    """
    try:
        _train(sys.argv[1:] if argv is None else argv, prog)
    except (DivergedError, UserError, HubError) as e:
        print(f'{prog}: {visible(str(e))}', file=sys.stderr)
        sys.exit(1 if isinstance(e, DivergedError) else 3 if isinstance(e, HubError) else 2)
    except KeyboardInterrupt:
        print(f'{prog}: interrupted', file=sys.stderr)
        sys.exit(130)  # as shells have it
    except BrokenPipeError:  # as in `--help | head`; Python's own last flush must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
