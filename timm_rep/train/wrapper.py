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
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, List, NoReturn, Optional, Sequence, Tuple

import yaml
from timm.utils import is_primary

from ..core.errors import UserError
from ..io.hub_errors import HubError
from .arguments import (
    add_time_step_options,
    check_model,
    complete_schedule,
    read_options,
    recipe_file,
    recipe_names,
)
from .epochs import AnnealedEpochs
from .resume import find_run
from .scripts import find_script
from .snapshots import DivergedError

__all__ = ['AnnealedTraining', 'load_script', 'main']

# What the wrapper must find in timm's script.
SCRIPT_NAMES = ('parser', '_parse_args', 'main', 'train_one_epoch')
EPOCH_PARAMETERS = ('epoch', 'model', 'optimizer', 'args', 'output_dir')
AVERAGE_PARAMETERS = ('model_ema', 'task')  # one of them: the newer scripts have the latter


def load_script(path: Path) -> ModuleType:
    """Import timm's script, and check that it has what the wrapper needs.

    Args:
        path: timm's train.py.

    Returns:
        The module.

    Raises:
        UserError: If names or parameters are missing.
    """
    spec = importlib.util.spec_from_file_location('timm_train_script', path)
    if spec is None or spec.loader is None:
        raise UserError(f'{path} is not a Python file')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [name for name in SCRIPT_NAMES if not hasattr(module, name)]
    if not missing:
        parameters = inspect.signature(module.train_one_epoch).parameters
        missing = [f'{name} of train_one_epoch' for name in EPOCH_PARAMETERS if name not in parameters]
        if not any(name in parameters for name in AVERAGE_PARAMETERS):
            missing.append(f'{" or ".join(AVERAGE_PARAMETERS)} of train_one_epoch')
    if missing:
        raise UserError(
            f"{path} is not a train.py of timm's that time steps can be added to (known: 1.0.20 and later); it lacks "
            f'{", ".join(missing)}'
        )
    return module


class AnnealedTraining:
    """timm's training with time steps around its epochs.

    Args:
        script: timm's script, loaded.
    """

    def __init__(self, script: Any) -> None:
        self.script = script
        self.epochs: Optional[AnnealedEpochs] = None  # once the arguments are known

    def run(self) -> None:
        """Run timm's main.

        Raises:
            UserError: For arguments that cannot work. Nothing is written then.
            DivergedError: If the weights are not finite at the end of a time step.
        """
        script = self.script
        script._parse_args = self._with_time_steps(script._parse_args)
        script.train_one_epoch = self.annealed_epoch(script.train_one_epoch)
        if hasattr(script, 'create_scheduler_v2'):
            script.create_scheduler_v2 = self._that_counts_epochs(script.create_scheduler_v2)
        script.main()
        if self.epochs is not None and is_primary(self.epochs.args):
            self.epochs.finish()

    def _with_time_steps(self, parse_args: Callable[[], Tuple[Any, str]]) -> Callable[[], Tuple[Any, str]]:
        @functools.wraps(parse_args)
        def parse() -> Tuple[Any, str]:
            args, _ = parse_args()
            schedule = complete_schedule(args)
            find_run(args, schedule)
            check_model(args, schedule)
            self.epochs = AnnealedEpochs(args, schedule)
            return args, yaml.safe_dump(vars(args), default_flow_style=False)  # timm keeps the text as args.yaml

        return parse

    def _that_counts_epochs(self, create_scheduler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(create_scheduler)
        def create(*args: Any, **kwargs: Any) -> Any:
            scheduler, total_epochs = create_scheduler(*args, **kwargs)
            if self.epochs is not None:
                self.epochs.total_epochs = total_epochs
            return scheduler, total_epochs

        return create

    def annealed_epoch(self, train_one_epoch: Callable[..., Any]) -> Callable[..., Any]:
        """Put time steps around an epoch.

        Args:
            train_one_epoch: timm's.

        Returns:
            A function that takes the same arguments, and gives what timm measured with its place in the schedule.
        """
        signature = inspect.signature(train_one_epoch)

        @functools.wraps(train_one_epoch)
        def epoch_of_time_step(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            if self.epochs is None:
                raise RuntimeError('timm trains an epoch before it has read its arguments')
            position = self.epochs.begin(bound.arguments)
            metrics = train_one_epoch(*args, **kwargs)
            self.epochs.end(bound.arguments['epoch'], position, metrics)
            return metrics

        return epoch_of_time_step


def _own_parser(prog: str, *, with_time_steps: bool) -> argparse.ArgumentParser:
    """What timm's parser does not know; for the help, with what is added to timm's parser."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s [options of the wrapper] [timm's options]", add_help=False)
    parser.add_argument('-h', '--help', action='store_true', help="Show this, then timm's options.")
    parser.add_argument(
        '--recipe', metavar='NAME_OR_FILE', help=f'Options of a recipe: {", ".join(recipe_names())}, or a YAML file.')
    parser.add_argument(
        '--timm-scripts', metavar='DIR',
        help="Folder of timm's train.py (default: $TIMM_SCRIPTS, the checkout of an editable timm, the user cache).")
    if with_time_steps:
        add_time_step_options(parser)
    return parser


def _with_recipe(script: Any, argv: List[str], recipe: Optional[str]) -> List[str]:
    """Hand a recipe to timm as a config file, and check the one that is given, before timm opens it."""
    config = ''
    if hasattr(script, 'config_parser'):
        config = getattr(script.config_parser.parse_known_args(argv)[0], 'config', '')
    if recipe and config:
        raise UserError(f'--recipe {recipe} and --config {config} are both files of options; give one of them')
    if not (recipe or config):
        return argv
    path = recipe_file(recipe) if recipe else Path(config)
    read_options(path)
    return ['--config', str(path), *argv] if recipe else argv


def _train(argv: Sequence[str], prog: str) -> None:
    own, rest = _own_parser(prog, with_time_steps=False).parse_known_args(argv)
    if own.help:
        print(_own_parser(prog, with_time_steps=True).format_help())
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
        AnnealedTraining(script).run()
    finally:
        sys.argv = own_argv
        sys.stdout.flush()


def _exit(prog: str, error: Exception, code: int) -> NoReturn:
    print(f'{prog}: {error}', file=sys.stderr)
    sys.exit(code)


def main(argv: Optional[Sequence[str]] = None, prog: str = 'timm-rep train') -> None:
    """Train as the command line asks.

    Args:
        argv: Arguments of the wrapper and of timm's train.py; those of the process by default.
        prog: What to call the command in messages.

    Raises:
        SystemExit: With code 1 if the training has diverged, 2 for what the user can mend, 3 if the Hub does not give
            the description of the model; else as timm's script raises it.
    """
    try:
        _train(sys.argv[1:] if argv is None else argv, prog)
    except DivergedError as e:
        _exit(prog, e, 1)
    except UserError as e:
        _exit(prog, e, 2)
    except HubError as e:
        _exit(prog, e, 3)
    except BrokenPipeError:  # as in `--help | head`; Python's own last flush must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
