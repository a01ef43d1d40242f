"""``timm-rep``: the library on the command line. Every command is one library call."""
import dataclasses
import fnmatch
import json
import logging
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Optional, Tuple

import click
import timm

from . import __version__
from .files import expand_checkpoint, fuse_checkpoint, verify_checkpoint
from .surgery import LAYERS, TRAINING_PREFIXES, stock_architecture
from .timm_scripts import find_script, run_script
from .verification import Report, VerificationError

__all__ = ['main']

_logger = logging.getLogger(__name__)


class _Mismatch(click.ClickException):
    exit_code = 1


class _UserError(click.ClickException):
    exit_code = 2


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn the errors that the library raises on bad input into one line and an exit code."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, ImportError) as e:
        _logger.debug('traceback of the error', exc_info=True)
        error = _Mismatch if isinstance(e, VerificationError) else _UserError
        raise error(' '.join(str(e).split())) from e


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option('--json', 'as_json', is_flag=True, help='Print JSON.')(command)


def _size_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for name, what in (('--in-chans', 'Image channels'), ('--num-classes', 'Classes')):
        command = click.option(name, type=int, metavar='N', help=f'{what}, if the run does not say.')(command)
    return command


def _checkpoint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What it takes to load a checkpoint in training form."""
    command = click.option('--use-ema', is_flag=True, help='Take the averaged weights.')(_size_options(command))
    return click.option('--model', 'architecture', metavar='NAME', help='Model, if the run does not say.')(command)


def _report_json(report: Report) -> str:
    def difference(found: Any) -> dict:
        return dict(dataclasses.asdict(found), relative=found.relative)

    content = dict(
        ok=True,
        model=difference(report.model),
        layers=[difference(layer) for layer in report.layers],
        rtol=report.rtol,
        atol=report.atol,
    )
    return json.dumps(content, indent=2)


@click.group(context_settings=dict(help_option_names=['-h', '--help'], max_content_width=120))
@click.version_option(__version__, prog_name='timm-rep')
def main() -> None:
    r"""Structural re-parameterization for timm: train with branches, fuse into stock timm models.

    \b
    Example:
      timm-rep run train --model orepa_resnet18 --data-dir images
      timm-rep fuse output/train/run/model_best.pth.tar resnet18.safetensors
    """


@main.command('list')
@click.argument('pattern', metavar='[FILTER]', default='')
@_json_option
def list_command(pattern: str, as_json: bool) -> None:
    r"""List the models with rep layers, and what they fuse into.

    FILTER is a part of the name; * and ? are wildcards.

    \b
    Example:
      timm-rep list resnet
    """
    models = []
    for name in fnmatch.filter(timm.list_models([f'{prefix}*' for prefix in TRAINING_PREFIXES]), f'*{pattern}*'):
        fields = {key: timm.get_pretrained_cfg_value(name, key) for key in ('input_size', 'num_classes')}
        models.append(dict(name=name, stock=stock_architecture(name), **fields))
    if as_json:
        click.echo(json.dumps(models, indent=2))
        return
    for model in models:
        own = model['stock'] == model['name']
        click.echo(f'{model["name"]:24} {"own stock form (inference_mode=True)" if own else model["stock"]}')


@main.command()
@click.option('--output', metavar='DIR', default='demo_output', show_default=True, help='Folder to write to.')
def demo(output: str) -> None:
    r"""Train on images that ship in a package, in two time steps, fuse, verify, export and reload: minutes on a CPU.

    \b
    Example:
      timm-rep demo --output demo_output
    """
    from .demo import run_demo  # of use to this command only
    with _user_errors():
        run_demo(output)


@main.command()
@click.argument('checkpoint', type=click.Path())
@click.argument('out', type=click.Path())
@_checkpoint_options
def fuse(checkpoint: str, out: str, **kwargs: Any) -> None:
    r"""Fuse a trained CHECKPOINT into the stock timm model, check that its outputs are the same, and write it to OUT.

    OUT is a file that ends in .safetensors or .pth, for the weights alone; without a suffix it becomes a Hub folder.
    CHECKPOINT comes from timm's train.py, which notes the model in it or in args.yaml beside it.

    \b
    Example:
      timm-rep fuse output/train/run/model_best.pth.tar resnet18.safetensors
    """
    with _user_errors():
        report = fuse_checkpoint(checkpoint, out, **kwargs)
    click.echo(f'{out}: {report}')


@main.command()
@click.argument('checkpoint', type=click.Path())
@click.argument('fused', type=click.Path(), required=False)
@_checkpoint_options
@_json_option
def verify(checkpoint: str, fused: Optional[str], as_json: bool, **kwargs: Any) -> None:
    r"""Check that a trained CHECKPOINT and its FUSED form compute the same; exit code 1 if not.

    FUSED is a file of weights or a Hub folder, as `timm-rep fuse` writes them. Without it, CHECKPOINT is fused in
    memory.

    \b
    Example:
      timm-rep verify output/train/run/model_best.pth.tar resnet18.safetensors
    """
    with _user_errors():
        try:
            report = verify_checkpoint(checkpoint, fused, **kwargs)
        except VerificationError as e:
            if as_json:
                click.echo(json.dumps(dict(ok=False, error=str(e))))
            raise
    click.echo(_report_json(report) if as_json else str(report))


@main.command()
@click.argument('source', metavar='MODEL_OR_CHECKPOINT')
@click.argument('out', type=click.Path())
@click.option('--layer', type=click.Choice(LAYERS), default=LAYERS[0], show_default=True, help='Kind of rep layer.')
@click.option('--model', 'architecture', metavar='NAME', help='Stock model that the checkpoint is of.')
@_size_options
def expand(source: str, out: str, **kwargs: Any) -> None:
    r"""Put stock weights into the training form of the model with rep layers, with the same outputs.

    MODEL_OR_CHECKPOINT is a timm model, whose pretrained weights timm downloads, or a file of weights. OUT ends in
    .safetensors or .pth; train from it with `--model orepa_resnet50 --initial-checkpoint OUT`.

    \b
    Examples:
      timm-rep expand resnet50.a1_in1k orepa_resnet50.safetensors
      timm-rep expand resnet18.pth dbb_resnet18.pth --model resnet18 --layer dbb
    """
    with _user_errors():
        report = expand_checkpoint(source, out, **kwargs)
    click.echo(f'{out}: {report}')


@main.command(context_settings=dict(allow_interspersed_args=False))
@click.option('--timm-scripts', metavar='DIR', type=click.Path(file_okay=False), help='Folder of the scripts.')
@click.argument('script', metavar='SCRIPT')
@click.argument('args', metavar='[ARGS...]', nargs=-1, type=click.UNPROCESSED)
def run(timm_scripts: Optional[str], script: str, args: Tuple[str, ...]) -> None:
    r"""Run one of timm's scripts with our models registered: train, validate, benchmark, inference or onnx_export.

    All arguments after SCRIPT are the script's own, also --help. The scripts are not in timm's package: they are taken
    from --timm-scripts, else $TIMM_SCRIPTS, else the timm checkout that is installed, else the user's cache.

    \b
    Example:
      timm-rep run validate --model orepa_resnet18 --checkpoint model_best.pth.tar --data-dir images --reparam
    """
    with _user_errors():
        path = find_script(script, timm_scripts)
    run_script(path, args)
