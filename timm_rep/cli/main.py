"""``timm-rep``: the library on the command line. Every command is one library call.

What the commands call is imported when they run: the help must not wait for torch.
"""
from typing import Tuple

import click

from .._version import __version__
from ..core.errors import UserError
from . import hub, models, runs, weights
from .errors import Group

__all__ = ['main']


@click.group(cls=Group, context_settings=dict(help_option_names=['-h', '--help'], max_content_width=120))
@click.version_option(__version__, prog_name='timm-rep')
@click.option(
    '--import', 'modules', metavar='MODULE', multiple=True,
    help="Import a module of yours first, one that registers methods; it must be on Python's path.")
def main(modules: Tuple[str, ...]) -> None:
    """Structural re-parameterization for timm: train with branches, fuse into stock timm models.

    \b
    Example:
      timm-rep train --model orepa_resnet18 --data-dir images
      timm-rep fuse output/train/run/model_best.pth.tar resnet18.safetensors
      timm-rep publish output/train/run --repo me/resnet18.orepa_images --dry-run

    Exit codes: 0 all well; 1 two forms of a model do not compute the same; 2 wrong input; 3 the Hub could not be
    reached, or refused; 4 what nobody foresaw, with its traceback; 130 interrupted.
    """
    if modules:
        from ..io.extras import import_modules  # imports torch

        try:
            import_modules(modules, '--import')
        except UserError as e:
            raise click.UsageError(str(e)) from e


for command in (
        models.list_models, models.demo, models.bench,
        weights.fuse, weights.verify, weights.expand, weights.import_official,
        hub.publish,
        runs.train, runs.run, runs.plot, runs.ensemble,
):
    main.add_command(command)
