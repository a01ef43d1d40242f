"""Commands about training runs: ``train``, ``run``, ``plot``, ``ensemble``."""
from typing import Any, Optional, Tuple

import click

from .errors import Command
from .options import json_option
from .output import print_json, say

__all__ = ['ensemble', 'plot', 'run', 'train']


@click.command(
    'train', cls=Command, add_help_option=False,
    context_settings=dict(ignore_unknown_options=True, allow_interspersed_args=False))
@click.argument('args', nargs=-1, type=click.UNPROCESSED)
def train(args: Tuple[str, ...]) -> None:
    """Train as timm's train.py does, with all its arguments, and anneal: --time-steps, --recipe. See train --help."""
    from ..train import main

    main(list(args), prog='timm-rep train')


@click.command('run', cls=Command, context_settings=dict(allow_interspersed_args=False))
@click.option('--timm-scripts', metavar='DIR', type=click.Path(file_okay=False), help='Folder of the scripts.')
@click.argument('script', metavar='SCRIPT')
@click.argument('args', metavar='[ARGS...]', nargs=-1, type=click.UNPROCESSED)
def run(timm_scripts: Optional[str], script: str, args: Tuple[str, ...]) -> None:
    """Run one of timm's scripts with our models registered: train, validate, benchmark, inference or onnx_export.

    All arguments after SCRIPT are the script's own, also --help. The scripts are not in timm's package: they are taken
    from --timm-scripts, else $TIMM_SCRIPTS, else the timm checkout that is installed, else the user's cache.

    \b
    Example:
      timm-rep run validate --model orepa_resnet18 --checkpoint model_best.pth.tar --data-dir images --reparam
    """
    from ..train.scripts import find_script, run_script

    run_script(find_script(script, timm_scripts), args)


@click.command('plot', cls=Command)
@click.argument('run_dir', type=click.Path())
@click.option('--out', metavar='DIR', type=click.Path(), help='Folder to write to; that of the run by default.')
def plot(run_dir: str, out: Optional[str]) -> None:
    """Draw the training run in RUN_DIR, the folder that timm's train.py writes to.

    \b
    annealing.png          accuracy, loss, learning rate and attach rate over epochs and time steps
    branch_gradients.png   gradients of origin and side branches by depth and epoch (of runs with --log-branches)
    branch_similarity.png  cosine similarity between the branches' kernels, newest weights

    A figure without data is left out. Earlier figures of the same names are replaced; nothing else is touched.

    \b
    Example:
      timm-rep plot output/train/run
    """
    from ..report.run_pictures import plot_run

    for path in plot_run(run_dir, out):
        say(path)


@click.command('ensemble', cls=Command)
@click.argument('run_dir', type=click.Path())
@click.option('--data-dir', metavar='DIR', type=click.Path(), required=True, help='Images, as for train.py.')
@click.option('--val-split', metavar='NAME', help="Split to evaluate on; the run's by default.")
@click.option('--train-split', metavar='NAME', help="Split to re-estimate batch norms on; the run's by default.")
@click.option('--batch-size', type=click.IntRange(min=1), metavar='N', help="Images a batch; the run's by default.")
@click.option(
    '--workers', type=click.IntRange(min=0), metavar='N',
    help='Processes that load images; as in the run by default.')
@click.option('--device', metavar='NAME', help='Where to compute; cuda if there is one by default.')
@click.option(
    '--bn-images', type=click.IntRange(min=2), metavar='N', default=2048, show_default=True,
    help='Training images to re-estimate batch norms on.')
@click.option('--use-ema', is_flag=True, help='Take the snapshots of the averaged weights.')
@click.option('--out', 'output', type=click.Path(), metavar='FILE', help='New file for the average of the weights.')
@json_option
def ensemble(run_dir: str, data_dir: str, as_json: bool, **kwargs: Any) -> None:
    """Evaluate the snapshots of time steps in RUN_DIR, alone and together.

    Together means the average of their outputs, and the average of their weights with the batch norms re-estimated.
    --out writes the latter as stock weights, to a new file that ends in .safetensors or .pth. All settings of the
    images are those of the run.

    \b
    Example:
      timm-rep ensemble output/train/run --data-dir images --out average.safetensors
    """
    from ..report.ensemble import evaluate_snapshots

    result = evaluate_snapshots(run_dir, data_dir, progress=True, **kwargs)
    if as_json:
        print_json(result)
        return
    say(f'on {result.images} images: top-1 (%), top-5 (%), loss')
    for score in (*result.snapshots, result.outputs, result.weights):
        say(f'{score.name:20}{score.top1:8.2f}{score.top5:8.2f} {score.loss:8.4f}')
