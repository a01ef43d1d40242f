"""The wrapper's options, its recipes, and the refusal of what cannot work before anything is written."""
import argparse
import os
from pathlib import Path
from typing import Any, Dict, List, Optional

import timm
import torch
import torch.nn as nn
from timm.data.dataset_factory import _search_split
from timm.data.readers.img_extensions import get_img_extensions
from timm.models import split_model_name_tag
from timm.optim import list_optimizers
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from ..core.annealing import RESTORATIONS, AnnealingSchedule, check_restoration
from ..core.capture import linear_layers
from ..core.errors import UserError
from ..core.layers.dbb import NormPad2d
from ..core.walk import annealed_modules
from ..io.architecture import check_known, create_model, per_channel
from ..io.checkpoint import read_checkpoint
from ..io.folders import check_folder, is_folder, no_split
from ..io.plain_data import read_yaml
from ..io.runs import START_ARGS
from ..models.files import check_file
from ..models.names import is_training_form
from ..models.published import described_weights
from ..models.settings import INPUT_SETTINGS

__all__ = [
    'add_time_step_options', 'check_crops', 'check_data', 'check_model', 'check_names', 'check_start_weights',
    'complete_schedule', 'output_folder', 'output_root', 'read_options', 'recipe_file', 'recipe_names',
    'take_start_settings', 'without_time_steps',
]

# Schedules of timm that start anew with --lr-cycle-limit.
RESTARTING_SCHEDULES = ('cosine', 'tanh', 'poly')
# Options of timm that break up rep layers.
UNFIT_OPTIONS = ('torchscript', 'split_bn')
# Options of timm that say how else to crop, with what they are if they say nothing.
OTHER_CROPS = dict(
    no_aug=False, train_crop_mode=None, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3], aug_splits=0, train_img_sizes=None,
    naflex_loader=False, use_multi_epochs_loader=False)
ALL_IMAGES = ('train', '')  # splits for training that nobody misspelled: timm's default, and none
KINDS = (
    ('time_steps attach_warmup_epochs epochs start_epoch seed lr_cycle_limit', (int,), 'a whole number'),
    ('warmup_epochs cooldown_epochs lr_cycle_mul lr_cycle_decay side_gain', (int, float), 'a number'),
    ('model experiment output resume sched opt device kd_model_name train_split val_split', (str,), 'a text'),
    ('initial_checkpoint pretrained_path', (str,), 'a text'),
    ('model_kwargs', (dict,), 'names and values'),
    ('compensate freeze_origin start_from_best no_decay_classifier capture log_branches', (bool,), 'yes or no'),
)
DEFAULT_OUTPUT = './output/train'  # timm's
RECIPES = Path(__file__).with_name('recipes')


def recipe_names() -> List[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob('*.yaml'))


def recipe_file(recipe: str) -> Path:
    """The file of a recipe.

    Args:
        recipe: Name of one that comes with the package, or path of a file.

    Returns:
        Its path.

    Raises:
        UserError: If there is none.
    """
    if recipe in recipe_names():
        return RECIPES / f'{recipe}.yaml'
    if not Path(recipe).is_file():
        raise UserError(f'no recipe {recipe!r}, nor a file of that name; there are {", ".join(recipe_names())}')
    return Path(recipe)


def read_options(path: Path) -> Dict[str, Any]:
    """Options of a config file.

    Args:
        path: YAML file.

    Returns:
        Values by the names of the options.

    Raises:
        UserError: If there is no such file, or it is something else.
    """
    try:
        options = read_yaml(path)
    except (OSError, UserError) as e:
        raise UserError(f'{path} cannot be read as a YAML file: {" ".join(str(e).split())}') from None
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise UserError(f'{path} must hold options and their values, as in "epochs: 30"')
    return options


def add_time_step_options(parser: argparse.ArgumentParser) -> None:
    """Add what is asked about time steps to a parser, timm's own or one that shows help.

    Args:
        parser: The parser.
    """
    group = parser.add_argument_group('Time steps (RepAn)')
    group.add_argument('--time-steps', type=int, default=1, metavar='N',
                       help='Cycles of annealing, each of --epochs epochs (default: 1).')
    group.add_argument('--attach-warmup-epochs', type=int, default=None, metavar='N',
                       help='Epochs at the start of each time step in which the attach rate of the side branches is '
                            'below one (default: a sixth of the epochs; none for a single time step).')
    group.add_argument('--compensate', action='store_true', default=False,
                       help='Take what fresh side branches add off the origin branches, so that the outputs of a model '
                            'with norms in its branches stay the same in eval mode when a time step begins.')
    group.add_argument('--restoration', choices=RESTORATIONS, default='authors',
                       help='How a folded kernel gets back into an origin branch with a norm: whose gain is then 1 '
                            '(authors, default), or as it was learnt (keep_gain), or such that training goes on as '
                            'before, by what is measured on a few batches of the training (measured).')
    group.add_argument('--side-gain', type=float, default=1.0, metavar='GAIN',
                       help='Gain with which the norms of fresh side branches start (default: 1; at 0 a time step '
                            'begins without a jump in training, too).')
    group.add_argument('--freeze-origin', action=argparse.BooleanOptionalAction, default=False,
                       help='Let origin branches that were restored stand still while the attach rate warms up.')
    group.add_argument('--start-from-best', action='store_true', default=False,
                       help='Begin a time step with the best epoch of the one before by --eval-metric, not the last; '
                            'takes a validation split that is not the test set.')
    group.add_argument('--no-decay-classifier', action='store_true', default=False,
                       help='No weight decay on the classifier, as timm has none on norms and biases.')
    group.add_argument('--crop-padding', type=int, default=0, metavar='N',
                       help='Train on random crops of the image size from images with a black border of N pixels, in '
                            "place of timm's random resized crops.")
    group.add_argument('--capture', action=argparse.BooleanOptionalAction, default=None,
                       help='Compose all kernels of layers without norms (OREPA) at once, as a CUDA graph, as '
                            'timm_rep.capture does (default: on one NVIDIA GPU, unless the model is compiled).')
    group.add_argument('--log-branches', action='store_true', default=False,
                       help='Write the gradient magnitude of every branch to branch_gradients.csv.')


def without_time_steps() -> Dict[str, Any]:
    """What the options of the wrapper are in a run of timm's train.py alone."""
    parser = argparse.ArgumentParser()
    add_time_step_options(parser)
    return dict(vars(parser.parse_args([])), attach_warmup_epochs=0)


def _check_restarts(args: argparse.Namespace, schedule: AnnealingSchedule) -> None:
    """The learning rate must restart where the time steps begin."""
    if schedule.anneals and args.lr_cycle_limit not in (1, args.time_steps):
        raise UserError(
            f'--lr-cycle-limit {args.lr_cycle_limit} contradicts --time-steps {args.time_steps}, which sets it')
    if args.time_steps == 1:
        return
    if args.sched not in RESTARTING_SCHEDULES:
        raise UserError(
            f'--sched {args.sched} cannot restart at a time step; allowed are {", ".join(RESTARTING_SCHEDULES)}')
    if args.warmup_epochs >= args.epochs and not schedule.prefix_epochs:
        raise UserError(
            f'the warm-up of the learning rate (--warmup-epochs {args.warmup_epochs}) must be shorter than a time step '
            f'of {args.epochs} epochs'
        )
    if getattr(args, 'sched_on_updates', False):  # timm's restarts then need not fall on epochs
        lengths = [args.epochs * schedule.epochs_mul ** step for step in range(args.time_steps)]
        restarts = [0, *(schedule.prefix_epochs + round(sum(lengths[:step]), 6) for step in range(1, args.time_steps))]
        starts = [epoch for epoch in range(schedule.total_epochs) if schedule.position(epoch).begins]
        if starts != restarts:
            theirs, ours = (', '.join(f'{epoch:g}' for epoch in epochs) for epochs in (restarts, starts))
            raise UserError(
                f'with --sched-on-updates the learning rate restarts at the epochs {theirs} and the time steps at '
                f'{ours}, as timm rounds; take other --epochs or --lr-cycle-mul'
            )


def _check_kinds(args: argparse.Namespace) -> None:
    """Refuse values that are no kind of what is worked with here: a config file may hold anything."""
    for names, kinds, words in KINDS:
        for name in names.split():
            value = getattr(args, name, None)
            if not isinstance(value, (*kinds, type(None))):
                raise UserError(f'--{name.replace("_", "-")} takes {words}, got {value!r}')


def complete_schedule(args: argparse.Namespace) -> AnnealingSchedule:
    """The time steps that the arguments ask for; timm's restarts are set to them.

    Args:
        args: timm's arguments with the wrapper's; what is left open is filled in.

    Returns:
        The schedule.

    Raises:
        UserError: For arguments that do not go together.
    """
    _check_kinds(args)
    check_restoration(args.restoration, args.side_gain)
    if args.attach_warmup_epochs is None:
        args.attach_warmup_epochs = args.epochs // 6 if args.time_steps > 1 else 0
    schedule = AnnealingSchedule(
        args.time_steps,
        args.epochs,
        args.attach_warmup_epochs,
        epochs_mul=getattr(args, 'lr_cycle_mul', 1.0),
        prefix_epochs=args.warmup_epochs if getattr(args, 'warmup_prefix', False) else 0,
        cooldown_epochs=getattr(args, 'cooldown_epochs', 0) if args.sched in RESTARTING_SCHEDULES else 0,
    )
    _check_restarts(args, schedule)
    if args.time_steps > 1:
        args.lr_cycle_limit = args.time_steps
    return schedule


def check_crops(args: argparse.Namespace) -> None:
    """Refuse options of timm's that contradict padded crops.

    Args:
        args: timm's arguments with the wrapper's.

    Raises:
        UserError: If there are some, or the padding is no number of pixels.
    """
    if not isinstance(args.crop_padding, int) or args.crop_padding < 0:
        raise UserError(f'--crop-padding takes a number of pixels, got {args.crop_padding!r}')
    if not args.crop_padding:
        return
    for name, default in OTHER_CROPS.items():
        given = getattr(args, name, default)
        if given != default:
            raise UserError(
                f'--crop-padding {args.crop_padding} crops in its own way: it goes without --{name.replace("_", "-")} '
                f'{given}')


def check_data(args: argparse.Namespace) -> None:
    """Refuse a folder of images, or a split of it, that is not there: timm would take all images instead.

    Args:
        args: timm's arguments.

    Raises:
        UserError: If there is none, or no image in it; what a named ``--dataset`` makes of its folder is its own
            business. A folder without splits trains, but validates nothing.
    """
    given = getattr(args, 'data_dir', None) or getattr(args, 'data', None)
    if not given or not is_folder(getattr(args, 'dataset', None)):
        return
    folder = Path(given)
    check_folder(folder)
    if not folder.is_dir():
        return  # an archive
    train = Path(_search_split(given, args.train_split))
    validation = Path(_search_split(given, args.val_split)) if args.val_split else None
    if validation == folder:
        raise UserError(f"{no_split(folder, args.val_split)} (--val-split; '' trains without validation)")
    if train == folder and (validation or args.train_split not in ALL_IMAGES):
        raise UserError(f'{no_split(folder, args.train_split)} (--train-split)')
    for part in filter(None, (train, validation)):
        files = (file for _, _, names in os.walk(part, followlinks=True) for file in names)  # as timm does
        if part.is_dir() and not any(Path(file).suffix.lower() in get_img_extensions() for file in files):
            raise UserError(f'{part} holds no images that timm reads ({", ".join(get_img_extensions())})')


def check_names(args: argparse.Namespace) -> None:
    """Refuse names that timm's script would end at with a traceback: of models, optimizer, schedule and device.

    Args:
        args: timm's arguments.

    Raises:
        UserError: If one is not known, the schedule does not go with its own options, or torch cannot compute there.
    """
    for name in filter(None, (args.model, getattr(args, 'kd_model_name', None))):
        check_known(name)
    optimizer = getattr(args, 'opt', None)
    if optimizer and optimizer.lower().removeprefix('lookahead_') not in list_optimizers():
        raise UserError(f'unknown optimizer {optimizer!r} (--opt); timm.optim.list_optimizers() shows them')
    _check_schedule(args)
    device = getattr(args, 'device', 'cpu')
    try:
        kind = torch.device(device).type
    except RuntimeError as e:
        raise UserError(f'device {device!r} cannot be used (--device): {str(e).splitlines()[0]}') from None
    if kind == 'cuda' and not torch.cuda.is_available():
        raise UserError(f'device {device!r} cannot be used: there is no NVIDIA GPU. --device cpu trains without one')


def _check_schedule(args: argparse.Namespace) -> None:
    """Refuse a schedule of the learning rate that timm does not make."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    updates = 100  # of an epoch; no matter here
    try:
        scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
    except (ValueError, TypeError, AssertionError) as e:
        raise UserError(f'--sched {args.sched} cannot be used: {e}') from None
    if scheduler is None:  # also of an unknown name, in older timm
        raise UserError(f"--sched {args.sched} makes no schedule, and timm's train.py does not train without one")


def check_start_weights(args: argparse.Namespace) -> None:
    """Refuse weights to start from that are missing, damaged or more than weights, or not looked at by timm.

    Args:
        args: timm's arguments.

    Raises:
        UserError: If a file that they name is missing or damaged, or for ``--pretrained-path`` alone.
    """
    path = getattr(args, 'pretrained_path', None)
    if path and not args.pretrained:
        raise UserError(
            f'--pretrained-path {path} is read with --pretrained only: without, timm starts from random weights. Add '
            '--pretrained, or leave the path out')
    for name in START_ARGS:
        file = getattr(args, name, None)
        if file and not Path(file).is_file():
            raise UserError(f'--{name.replace("_", "-")} {file} is not a file')
        if file:
            check_file(Path(file))


def take_start_settings(args: argparse.Namespace) -> None:
    """Note the input settings that the file says which a model of ours starts from.

    Those of ``--pretrained-path`` timm trains with, of ``--initial-checkpoint`` it takes the weights alone; and what
    reads the run goes by its arguments, and may not have the file.

    Args:
        args: timm's arguments; what is left open is filled in.
    """
    name, pretrained = split_model_name_tag(args.model)[0], getattr(args, 'pretrained_path', None)
    file = pretrained if args.pretrained and pretrained else getattr(args, 'initial_checkpoint', None)
    if not (file and is_training_form(name) and timm.is_model(name)):
        return
    described = described_weights(dict(file=file), name)
    channels = (getattr(args, 'input_size', None) or [getattr(args, 'in_chans', None)])[0]
    if 'input_size' in described and getattr(args, 'img_size', None) is not None:
        file_channels = described.pop('input_size')[0]
        if channels is None:
            args.in_chans = channels = file_channels
    if 'input_size' in described:
        described['input_size'] = (channels or described['input_size'][0], *described['input_size'][1:])
    channels = channels or described.get('input_size', (3,))[0]  # as train.py has it
    described.update({key: per_channel(described[key], channels) for key in ('mean', 'std') if key in described})
    for key in INPUT_SETTINGS:
        if key in described and not getattr(args, key, None):
            value = described[key]
            setattr(args, key, list(value) if isinstance(value, tuple) else value)


def check_model(args: argparse.Namespace, schedule: AnnealingSchedule) -> None:
    """Refuse a model without branches, where something is to be done with them, and options that do them harm.

    Args:
        args: timm's arguments with the wrapper's.
        schedule: The time steps.

    Raises:
        UserError: If the model is not known or has no rep layers, an option of timm's takes them apart, two of them
            make their gradients wrong, the weights to start from have no branches, or for ``--capture`` where there
            can be no graph.
        HubError: If the model is on the Hub and its description cannot be had.
    """
    unfit = [option for option in UNFIT_OPTIONS if getattr(args, option, False)]
    recomputes = getattr(args, 'torchcompile', None) is not None and getattr(args, 'grad_checkpointing', False)
    worked_with = schedule.anneals or args.log_branches
    if not (worked_with or unfit or recomputes or args.capture):
        return  # timm's own training of any model
    model = create_model(args.model, **(getattr(args, 'model_kwargs', None) or {}))
    if args.capture:
        _check_capture(args, model)
    has_branches = any(annealed_modules(model))
    if unfit and has_branches:
        raise UserError(f'--{unfit[0].replace("_", "-")} takes the rep layers apart; train without it')
    if recomputes and any(isinstance(module, NormPad2d) for module in model.modules()):
        raise UserError(
            f'--torchcompile together with --grad-checkpointing gives wrong gradients of the DBB layers of '
            f'{args.model}; train with one of the two')
    if not worked_with:
        return
    if not has_branches:
        raise UserError(
            f'{args.model} has no rep layers, so there are no branches to anneal or to log; `timm-rep list` shows the '
            'models that have'
        )
    _check_form(args)


def _check_capture(args: argparse.Namespace, model: nn.Module) -> None:
    """Refuse a CUDA graph where there can be none."""
    if getattr(args, 'torchcompile', None) is not None:
        raise UserError('--capture and --torchcompile both make graphs of the kernels; train with one of the two')
    if torch.device(args.device).type != 'cuda':
        raise UserError(f'--capture makes a CUDA graph, which --device {args.device} cannot have; train without it')
    if not linear_layers(model):
        raise UserError(
            f'{args.model} has no layers whose kernels are composed without norms, such as those of orepa, so there is '
            'nothing to --capture')


def _check_form(args: argparse.Namespace) -> None:
    """Refuse weights in stock form for a model with branches, where timm takes its own form only."""
    file = getattr(args, 'initial_checkpoint', None)
    if not file or not Path(file).is_file():
        return
    if not any(key.endswith('.attach_rate') for key in read_checkpoint(file).state_dict):
        raise UserError(
            f'{file} is in stock form, --initial-checkpoint takes the training form of {args.model}. To make it: '
            f"timm_rep.save(timm.create_model('{args.model}', pretrained=True, pretrained_cfg_overlay=dict("
            f"file='{file}', num_classes=N)), 'training.safetensors'). With a new classifier --pretrained "
            f'--pretrained-path {file} takes it as it is')


def output_root(args: argparse.Namespace) -> Path:
    """The folder that timm puts the folders of its runs into."""
    return Path(args.output or DEFAULT_OUTPUT)


def output_folder(args: argparse.Namespace) -> Optional[Path]:
    """The folder that timm will write to, if it is known beforehand."""
    return output_root(args) / args.experiment if args.experiment else None
