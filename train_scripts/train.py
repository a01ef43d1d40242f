#!/usr/bin/env python3
"""timm's own train.py, unmodified, with the time steps of RepAn around its epochs, in one run.

    python train_scripts/train.py --time-steps 5 --attach-warmup-epochs 5 --model repan_repvgg_a1_cifar --epochs 30 \
        --data-dir images

`--epochs` counts the epochs of one time step. The script sets the restarts of timm's schedule and wraps timm's
`train_one_epoch`: there the attach rate is set and, where a time step begins, every layer is folded, redrawn and
restored (on the averaged weights too) and the optimizer's state is cleared. Weights to start from (`--pretrained`,
`--initial-checkpoint`) are folded in the same way first, at the attach rate of the first epoch and with the same
outputs in eval mode. All of timm's arguments pass through; one default differs: `--lr-cycle-decay`, the factor of the
peak learning rate from one time step to the next, is 1.

At the end of every time step the weights are kept as `time_step-N.safetensors` (training form) and
`time_step-N-stock.safetensors` (fused). `--resume auto` goes on from the newest whole checkpoint of the run's folder
as if it had never stopped: all that is random follows from the seed and the epoch (not with --use-multi-epochs-loader).
Which epoch was the best so far is remembered from timm 1.0.31 on.
"""
import argparse
import copy
import csv
import functools
import importlib.util
import inspect
import logging
import os
import sys
from pathlib import Path

import torch
import yaml
from timm.utils import is_primary, random_seed, unwrap_model

import timm_rep
from timm_rep.core.annealing import set_time_step, time_step_of
from timm_rep.core.walk import annealed_modules
from timm_rep.io.architecture import create_model
from timm_rep.io.checkpoint import read_checkpoint, take_input_settings
from timm_rep.io.runs import complete_rows
from timm_rep.io.weights import load_training_form, save
from timm_rep.train.scripts import find_script

_logger = logging.getLogger('train')

# Schedules of timm that start anew with --lr-cycle-limit.
RESTARTING_SCHEDULES = ('cosine', 'tanh', 'poly')
# What the wrapper must find in timm's script.
SCRIPT_NAMES = ('parser', '_parse_args', 'main', 'train_one_epoch')
EPOCH_PARAMETERS = ('epoch', 'model', 'optimizer', 'args', 'output_dir')
AVERAGE_PARAMETERS = ('model_ema', 'task')  # one of them: the newer scripts have the latter
# Arguments that give a model weights to start from.
START_ARGS = ('pretrained', 'initial_checkpoint', 'pretrained_path')
# A checkpoint can be resumed only by a run that agrees in these.
RUN_SETTINGS = (
    'model', 'time_steps', 'epochs', 'attach_warmup_epochs', 'compensate', 'imply_statistics', 'seed', 'sched',
    'lr_cycle_mul', 'lr_cycle_decay', 'warmup_prefix', 'cooldown_epochs')
# ... and in this, if the warm-up of the learning rate comes before the first time step's descent.
PREFIX_SETTING = 'warmup_epochs'
CHECKPOINT_SUFFIX = '.pth.tar'
DEFAULT_OUTPUT = './output/train'  # timm's
ROW_FILES = ('summary.csv', 'branch_gradients.csv')
# Weights that a run leaves besides the checkpoints to go on from.
KEPT_FILES = (f'model_best{CHECKPOINT_SUFFIX}', 'time_step-*.safetensors')
RUN_FILES = ('args.yaml', 'summary.csv', '*.pth.tar', 'time_step-*.safetensors', 'branch_gradients.csv')
# The epochs' seeds must not meet those of other ranks, which timm counts up from the run's.
EPOCH_SEED_STRIDE = 10_007
MAX_SEED = 2 ** 32


class UsageError(Exception):
    """What the user asked for cannot be done; nothing has been written."""


class DivergedError(Exception):
    """The training has come to weights that cannot be gone on with."""


# Arguments


def add_arguments(parser):
    """Add the wrapper's own options to a parser."""
    group = parser.add_argument_group('Time steps (RepAn)')
    group.add_argument('--time-steps', type=int, default=1, metavar='N',
                       help='Cycles of annealing, each of --epochs epochs (default: 1).')
    group.add_argument('--attach-warmup-epochs', type=int, default=None, metavar='N',
                       help='Epochs at the start of each time step in which the attach rate of the side branches is '
                            'below one (default: a sixth of the epochs; none for a single time step).')
    group.add_argument('--compensate', action='store_true', default=False,
                       help='Take what fresh side branches add off the origin branches, so that the outputs of a model '
                            'with norms in its branches stay the same in eval mode when a time step begins.')
    group.add_argument('--imply-statistics', action='store_true', default=False,
                       help='When a time step begins, give the norms of the origin branches the statistics that all '
                            'branches imply, where RepAn keeps their own: training goes on closer to where it was.')
    group.add_argument('--log-branches', action='store_true', default=False,
                       help='Write the gradient magnitude of every branch to branch_gradients.csv.')
    group.add_argument('--timm-scripts', default=None, metavar='DIR',
                       help="Folder of timm's train.py (default: $TIMM_SCRIPTS, the checkout of an editable timm, the "
                            'user cache).')


def _own_parser():
    parser = argparse.ArgumentParser(
        prog='train.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s [options of this script] [timm's options]", add_help=False)
    parser.add_argument('-h', '--help', action='store_true', help="Show this, then timm's options.")
    add_arguments(parser)
    return parser


def load_script(path):
    """Import timm's script, and check that it has what the wrapper needs.

    Args:
        path: timm's train.py.

    Returns:
        The module.

    Raises:
        UsageError: If names or parameters are missing.
    """
    spec = importlib.util.spec_from_file_location('timm_train_script', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [name for name in SCRIPT_NAMES if not hasattr(module, name)]
    if not missing:
        parameters = inspect.signature(module.train_one_epoch).parameters
        missing = [f'{name} of train_one_epoch' for name in EPOCH_PARAMETERS if name not in parameters]
        if not any(name in parameters for name in AVERAGE_PARAMETERS):
            missing.append(f'{" or ".join(AVERAGE_PARAMETERS)} of train_one_epoch')
    if missing:
        raise UsageError(
            f"{path} is not a train.py of timm's that time steps can be added to (known: 1.0.20 and later); it lacks "
            f'{", ".join(missing)}'
        )
    return module


def _anneals(args):
    """Whether there is anything to do besides timm's own training."""
    return args.time_steps > 1 or args.attach_warmup_epochs > 0


def _check_numbers(args):
    """Numbers from a config file have whatever type they have there."""
    for name in ('time_steps', 'attach_warmup_epochs', 'epochs'):
        value = getattr(args, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise UsageError(f'--{name.replace("_", "-")} takes a whole number, got {value!r}')


def _schedule(args):
    restarting = args.sched in RESTARTING_SCHEDULES
    try:
        schedule = timm_rep.AnnealingSchedule(
            args.time_steps,
            args.epochs,
            args.attach_warmup_epochs,
            epochs_mul=getattr(args, 'lr_cycle_mul', 1.0),
            prefix_epochs=args.warmup_epochs if getattr(args, 'warmup_prefix', False) else 0,
            cooldown_epochs=getattr(args, 'cooldown_epochs', 0) if restarting else 0,
        )
    except ValueError as e:
        raise UsageError(str(e)) from None
    if getattr(args, 'sched_on_updates', False):
        lengths = [args.epochs * schedule.epochs_mul ** step for step in range(args.time_steps)]
        if any(abs(length - round(length)) > 1e-6 for length in lengths):
            raise UsageError(
                f'with --sched-on-updates a time step must be a whole number of epochs, got {args.epochs} times '
                f'--lr-cycle-mul {schedule.epochs_mul}: ' + ', '.join(f'{length:g}' for length in lengths)
            )
        starts = [epoch for epoch in range(schedule.total_epochs) if schedule.position(epoch).begins]
        restarts = [0, *(schedule.prefix_epochs + round(sum(lengths[:n])) for n in range(1, args.time_steps))]
        if starts != restarts:
            raise UsageError(
                f'with --sched-on-updates --epochs {args.epochs} and --lr-cycle-mul {schedule.epochs_mul} the learning '
                f'rate restarts at the epochs {restarts} and the time steps at {starts}, as timm rounds; take others'
            )
    return schedule


def _check_restarts(args):
    if _anneals(args) and args.lr_cycle_limit not in (1, args.time_steps):
        raise UsageError(
            f'--lr-cycle-limit {args.lr_cycle_limit} contradicts --time-steps {args.time_steps}, which sets it')
    if args.time_steps == 1:
        return
    if args.sched not in RESTARTING_SCHEDULES:
        raise UsageError(
            f'--sched {args.sched} cannot restart at a time step; allowed are {", ".join(RESTARTING_SCHEDULES)}')
    if args.warmup_epochs >= args.epochs and not getattr(args, 'warmup_prefix', False):
        raise UsageError(
            f'the warm-up of the learning rate (--warmup-epochs {args.warmup_epochs}) must be shorter than a time step '
            f'of {args.epochs} epochs'
        )


def _check_model(args):
    if not _anneals(args) and not args.log_branches:
        return  # timm's own training of any model
    for option in ('torchscript', 'split_bn'):
        if getattr(args, option, False):
            raise UsageError(f'--{option.replace("_", "-")} takes the rep layers apart; train without it')
    try:
        model = create_model(args.model, **(getattr(args, 'model_kwargs', None) or {}))
    except ValueError as e:
        raise UsageError(str(e)) from None
    if not any(annealed_modules(model)):
        raise UsageError(
            f'{args.model} has no rep layers, so there are no branches to anneal or to log; `timm-rep list` shows the '
            'models that have'
        )


def _output_folder(args):
    """The folder that timm will write to, if it is known beforehand."""
    return Path(args.output or DEFAULT_OUTPUT) / args.experiment if args.experiment else None


def _epoch_of(path):
    """Epoch of a checkpoint of timm's, or None if the file is not whole."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location='cpu', weights_only=True, mmap=True)['epoch']
    except Exception as e:  # the unpickler raises all sorts of errors on arbitrary bytes
        _logger.warning(f'{path} is not a whole checkpoint: {e}')
        return None


def _checkpoints(folder):
    """Checkpoints that timm writes at the end of an epoch, the latest written first."""
    older = folder.glob(f'checkpoint-*{CHECKPOINT_SUFFIX}')
    paths = [folder / f'{name}{CHECKPOINT_SUFFIX}' for name in ('last', 'tmp')]  # tmp becomes last once it is written
    paths += sorted(older, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return [path for path in paths if path.is_file()]


def newest_checkpoint(folder):
    """The newest whole checkpoint at the end of an epoch in a run's folder.

    A process that is killed while it writes leaves a checkpoint that is cut off, or none under its usual name.

    Args:
        folder: Output folder of a run.

    Returns:
        Its path, or None. Recovery checkpoints, from within an epoch, do not count.
    """
    return next((path for path in _checkpoints(folder) if _epoch_of(path) is not None), None)


def _check_same_run(args, settings, where):
    if settings and 'time_steps' not in settings:  # a run without the wrapper
        settings = dict(settings, time_steps=1, attach_warmup_epochs=0)
    names = (*RUN_SETTINGS, PREFIX_SETTING) if getattr(args, 'warmup_prefix', False) else RUN_SETTINGS
    for name in names:
        there, here = settings.get(name), getattr(args, name, None)
        if name in settings and there != here:
            option = f'--{name.replace("_", "-")}'
            raise UsageError(
                f'{where} is of a run with {option} {there}, this one has {option} {here}; to start a new run from its '
                'weights take --initial-checkpoint and another --experiment'
            )


def _read_args_file(path):
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_output(args, schedule):
    """Find the checkpoint to resume, and refuse a folder or a checkpoint of another run."""
    folder = _output_folder(args)
    target = folder or Path(args.output or DEFAULT_OUTPUT)
    in_the_way = next(path for path in (target, *target.absolute().parents) if path.exists())
    if not in_the_way.is_dir():
        raise UsageError(f'no folder can be made at {target}: {in_the_way} is a file')
    if args.resume == 'auto':
        if folder is None:
            raise UsageError('--resume auto looks into the folder of the run: name it with --experiment')
        found = newest_checkpoint(folder)
        if found is None:
            damaged = [path.name for path in _checkpoints(folder) if path.name != f'tmp{CHECKPOINT_SUFFIX}']
            if damaged:
                raise UsageError(f'no checkpoint in {folder} is whole: {", ".join(damaged)}. Nothing was changed')
            kept = [path.name for pattern in KEPT_FILES for path in sorted(folder.glob(pattern))]
            if kept:
                raise UsageError(
                    f'{folder} holds the weights of a run ({", ".join(kept)}) but no checkpoint to go on from; to '
                    'start a new run from them take --initial-checkpoint and another --experiment. Nothing was changed'
                )
            _check_same_run(args, _read_args_file(folder / 'args.yaml'), folder)
        args.resume = '' if found is None else str(found)
        _logger.info(f'--resume auto: {args.resume or "nothing to resume, starting anew"}')
    elif folder is not None and any(any(folder.glob(pattern)) for pattern in RUN_FILES):
        if not args.resume or Path(args.resume).resolve().parent != folder.resolve():
            raise UsageError(
                f'{folder} holds another run; go on with it by --resume auto, or take another --experiment. Nothing '
                'was written'
            )
    if not args.resume:
        return
    if Path(args.resume).is_dir():
        raise UsageError(f'--resume takes a checkpoint file or auto, got the folder {args.resume}')
    try:
        checkpoint = read_checkpoint(args.resume)
    except (OSError, ValueError) as e:
        raise UsageError(f'--resume: {e}') from None
    _check_same_run(args, checkpoint.args, args.resume)
    if not _anneals(args):
        return
    if args.start_epoch is None and checkpoint.epoch is None:
        raise UsageError(f'{args.resume} does not say of which epoch it is; say where to go on with --start-epoch')
    start = checkpoint.epoch + 1 if args.start_epoch is None else args.start_epoch
    time_step = max((int(v) for k, v in checkpoint.state_dict.items() if k.endswith('.time_step')), default=0)
    if start < schedule.total_epochs and schedule.position(start).time_step < time_step:
        raise UsageError(f'epoch {start} lies before time step {time_step}, in which {args.resume} is')


def prepare(args):
    """Check the arguments and complete them for timm, before anything is written.

    Args:
        args: timm's arguments with the wrapper's; changed in place.

    Returns:
        The schedule.

    Raises:
        UsageError: For arguments that do not go together, a folder or checkpoint of another run, or a model without
            rep layers.
    """
    _check_numbers(args)
    if args.attach_warmup_epochs is None:
        args.attach_warmup_epochs = args.epochs // 6 if args.time_steps > 1 else 0
    schedule = _schedule(args)
    _check_restarts(args)
    _check_output(args, schedule)
    _check_model(args)
    if args.time_steps > 1:
        args.lr_cycle_limit = args.time_steps
    del args.timm_scripts  # of this machine; it is not part of a recipe
    return schedule


# The run


class BranchLog:
    """Gradient magnitudes of all branches, averaged over the updates of an epoch.

    Args:
        model: Model with rep layers.
        optimizer: Its optimizer, before whose updates the gradients are read: averaged over ranks, clipped, unscaled
            (but by optimizers that are fused with the scaling of float16 AMP).
    """

    def __init__(self, model, optimizer):
        self.modules = list(annealed_modules(unwrap_model(model)))
        self.sums = {}
        self.updates = 0
        # the optimizer itself, inside timm's Lookahead
        getattr(optimizer, '_base_optimizer', optimizer).register_step_pre_hook(self._read)

    @torch.no_grad()
    def _read(self, *_):
        gradients = {
            (depth, name, branch): gradient
            for depth, (name, module) in enumerate(self.modules)
            for branch, gradient in module.branch_gradients().items()
        }
        norms = torch._foreach_norm(list(gradients.values()))
        for (key, gradient), norm in zip(gradients.items(), norms):
            rms = norm / gradient.numel() ** 0.5
            self.sums[key] = self.sums[key] + rms if key in self.sums else rms
        self.updates += 1

    def write(self, path, epoch):
        """Add the epoch's rows to a csv file and start anew."""
        new = not path.exists()
        with path.open('a', newline='') as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(('epoch', 'depth', 'layer', 'branch', 'rms'))
            for (depth, name, branch), total in self.sums.items():
                writer.writerow((epoch, depth, name, branch, total.item() / self.updates))
        self.clear()

    def clear(self):
        """Start anew."""
        self.sums, self.updates = {}, 0


def drop_rows(path, epoch):
    """Take out of a run's csv file what an interrupted run left: rows from an epoch on, second headers, cut-off rows.

    Args:
        path: File whose first column is the epoch; it need not exist, and goes if no row is left.
        epoch: First epoch to drop.
    """
    if not path.is_file():
        return
    kept, header = [], None
    for row in complete_rows(path):
        if int(row['epoch']) < epoch:
            if list(row) != header:  # the first, or one of other columns
                header = list(row)
                kept.append(header)
            kept.append(list(row.values()))
    if not kept:
        path.unlink()
        return
    temporary = path.with_suffix('.tmp')
    with temporary.open('w', newline='') as file:
        csv.writer(file).writerows(kept)
    if temporary.read_text().splitlines() == path.read_text(errors='replace').splitlines():
        temporary.unlink()
    else:
        os.replace(temporary, path)


def save_snapshots(folder, time_step, forms, args):
    """Keep the weights at the end of a time step.

    Args:
        folder: Output folder of the run.
        time_step: The time step that has ended.
        forms: Models in training form by what goes behind the name: '' and '-ema'.
        args: Arguments of the run: the files say what the models were fed with.

    Raises:
        DivergedError: If the weights are not finite.
    """
    for suffix, model in forms.items():
        model = copy.deepcopy(model).eval()
        take_input_settings(model, vars(args), folder)
        try:
            save(model, folder / f'time_step-{time_step}{suffix}.safetensors', replace=True)
        except timm_rep.VerificationError as e:
            raise DivergedError(f'the training has diverged in time step {time_step} or before: {e}') from None
        fused = timm_rep.fuse(model, inplace=True)
        save(fused, folder / f'time_step-{time_step}{suffix}-stock.safetensors', replace=True)
    _logger.info(f'Snapshot of time step {time_step} in {folder}')


def _restart_workers(loader):
    """Let worker processes that timm keeps through all epochs start anew, from the seed that is set now."""
    loader = getattr(loader, 'loader', loader)  # inside timm's prefetcher
    if isinstance(loader, torch.utils.data.DataLoader) and loader.persistent_workers:
        loader._iterator = None


class AnnealedTraining:
    """What the wrapper does around the epochs of timm's training.

    Args:
        script: timm's script, loaded.
    """

    def __init__(self, script):
        self.script = script
        self.train_one_epoch = script.train_one_epoch
        self.signature = inspect.signature(script.train_one_epoch)
        self.args = None
        self.schedule = None
        self.total_epochs = None  # as timm counts them
        self.output_folder = None
        self.branches = None
        self.forms = None  # the models of the epoch that was trained last
        self.epoch = None

    def run(self):
        """Run timm's main."""
        parse_args, create_scheduler = self.script._parse_args, getattr(self.script, 'create_scheduler_v2', None)

        @functools.wraps(parse_args)
        def parse():
            self.args, _ = parse_args()
            self.schedule = prepare(self.args)
            self.total_epochs = self.schedule.total_epochs
            # timm keeps the text as args.yaml
            return self.args, yaml.safe_dump(vars(self.args), default_flow_style=False)

        @functools.wraps(create_scheduler)
        def schedule(*args, **kwargs):
            scheduler, self.total_epochs = create_scheduler(*args, **kwargs)
            return scheduler, self.total_epochs

        self.script._parse_args = parse
        self.script.train_one_epoch = self.annealed_epoch
        if create_scheduler is not None:
            self.script.create_scheduler_v2 = schedule
        self.script.main()
        if is_primary(self.args):
            self._finish()

    @functools.cached_property
    def annealed_epoch(self):
        """The epoch of timm's with time steps around it."""
        @functools.wraps(self.train_one_epoch)
        def epoch_of_time_step(*args, **kwargs):
            bound = self.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            position = self._begin_epoch(bound.arguments)
            metrics = self.train_one_epoch(*args, **kwargs)
            return self._end_epoch(bound.arguments['epoch'], position, metrics)

        return epoch_of_time_step

    def _forms(self, call):
        """The models to anneal, by what goes behind the name of their snapshots."""
        task = call.get('task')
        model, averaged = call['model'], call.get('model_ema')
        if task is not None:  # from timm 1.0.23 on
            model = task.get_eval_model() if hasattr(task, 'get_eval_model') else model
            averaged = task.get_eval_model(ema=True) if hasattr(task, 'has_ema') and task.has_ema() else averaged
        forms = {'': model} if averaged is None else {'': model, '-ema': averaged}
        return {suffix: unwrap_model(form) for suffix, form in forms.items()}

    def _begin_epoch(self, call):
        """What comes before an epoch of timm's; the epoch's place in the schedule, if there is one."""
        epoch, args = call['epoch'], call['args']
        # All that is random follows from seed and epoch, so that a resumed run goes on as if never stopped.
        random_seed((args.seed + EPOCH_SEED_STRIDE * epoch) % MAX_SEED, getattr(args, 'rank', 0))
        _restart_workers(call.get('loader'))
        if call.get('output_dir') is not None:
            self.output_folder = Path(call['output_dir'])
            for name in ROW_FILES:
                drop_rows(self.output_folder / name, epoch)
        first, self.forms = self.forms is None, self._forms(call)
        if first and args.resume:
            self._recall_best(call.get('saver'))
        if first and args.log_branches:
            self.branches = BranchLog(self.forms[''], call['optimizer'])
        if not _anneals(args):
            return None
        position = self.schedule.position(min(epoch, self.schedule.total_epochs - 1))
        if first and not args.resume:
            self._take_start(position)
        begun = time_step_of(self.forms[''])
        if begun > position.time_step:
            raise RuntimeError(f'epoch {epoch} lies in time step {position.time_step}, the model in {begun}')
        if begun < position.time_step and position.begins and self.output_folder is not None:
            save_snapshots(self.output_folder, begun, self.forms, self.args)
        for time_step in range(begun + 1, position.time_step + 1):
            self._begin_time_step(time_step, position.attach_rate, args.compensate)
            timm_rep.reset_optimizer(call['optimizer'])
        for form in self.forms.values():
            timm_rep.set_attach_rate(form, position.attach_rate)
        if is_primary(args):
            drawn = ', side branches drawn afresh' if begun < position.time_step else ''
            _logger.info(
                f'Time step {position.time_step} of 0-{args.time_steps - 1}, epoch {position.epoch} in it{drawn}; '
                f'attach rate {position.attach_rate:.3g}'
            )
        return position

    def _take_start(self, position):
        """Let the training start from the weights that it was given, if any; fresh ones stay as they were drawn."""
        if any(getattr(self.args, name, None) for name in START_ARGS):
            for form in self.forms.values():  # may be of a time step of another run
                set_time_step(form, 0)
            self._begin_time_step(position.time_step, position.attach_rate, compensate=True)
            _logger.info('The weights to start from are folded, with fresh side branches and the same outputs')
        for form in self.forms.values():
            set_time_step(form, position.time_step)

    def _begin_time_step(self, time_step, attach_rate, compensate):
        for form in self.forms.values():
            generator = torch.Generator().manual_seed(self.args.seed + time_step)  # the same for all forms and ranks
            timm_rep.begin_time_step(
                form, generator, attach_rate=attach_rate, compensate=compensate,
                imply_statistics=self.args.imply_statistics)

    def _recall_best(self, saver):
        """Let timm's saver know which checkpoint of the run was the best, where it can tell."""
        recall = getattr(saver, 'load_state_dict_from_checkpoint', None)
        resumed = Path(self.args.resume)
        if recall is not None and saver.best_metric is None and resumed.parent.samefile(saver.checkpoint_dir):
            recall(resumed)

    def _end_epoch(self, epoch, position, metrics):
        self.epoch = epoch
        if self.branches is not None:
            if self.output_folder is not None:
                self.branches.write(self.output_folder / 'branch_gradients.csv', epoch)
            self.branches.clear()
        if position is not None:
            # timm writes these to summary.csv, and to wandb where it logs there
            metrics.update(time_step=position.time_step, attach_rate=position.attach_rate)
        return metrics

    def _finish(self):
        """Tidy the files, and keep the weights of the last time step if the training came to its end."""
        folder = self.output_folder or _output_folder(self.args)
        if folder is None:
            return
        for name in ROW_FILES:
            drop_rows(folder / name, self.total_epochs)
        if not _anneals(self.args):
            return
        if self.forms is None:  # nothing was left to train: the run ended before, perhaps before it kept the weights
            last = newest_checkpoint(folder)
            if last is None or _epoch_of(last) != self.total_epochs - 1:
                return
            self.forms = {'': load_training_form(last)}
            if getattr(self.args, 'model_ema', False):
                self.forms['-ema'] = load_training_form(last, use_ema=True)
        elif self.epoch != self.total_epochs - 1:  # interrupted by hand
            return
        save_snapshots(folder, self.args.time_steps - 1, self.forms, self.args)


def main():
    own, _ = _own_parser().parse_known_args()
    if own.help:
        _own_parser().print_help()
        print()
    try:
        try:
            path = find_script('train', own.timm_scripts)
        except FileNotFoundError as e:
            raise UsageError(str(e)) from None
        script = load_script(path)
        if not own.help:
            add_arguments(script.parser)
            script.parser.set_defaults(lr_cycle_decay=1.0)
        AnnealedTraining(script).run()
    except (UsageError, DivergedError) as e:
        print(f'train.py: {e}', file=sys.stderr)
        sys.exit(2 if isinstance(e, UsageError) else 1)


if __name__ == '__main__':
    main()
