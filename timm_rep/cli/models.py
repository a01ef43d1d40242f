"""Commands about models: ``list``, ``demo``, ``bench``."""
import fnmatch
from typing import Any, Tuple

import click

from .errors import Command
from .options import json_option, model_kwargs_option
from .output import print_json, say

__all__ = ['bench', 'demo', 'list_models']

NUMBER = click.IntRange(min=1)


@click.command('list', cls=Command)
@click.argument('pattern', metavar='[FILTER]', default='')
@json_option
def list_models(pattern: str, as_json: bool) -> None:
    """List the models with rep layers, with what they fuse into, and the methods: the kinds of rep layers.

    FILTER is a part of the name; * and ? are wildcards.

    \b
    Example:
      timm-rep list resnet
    """
    import timm

    from ..core.methods import registered_methods
    from ..models.names import TRAINING_PREFIXES, stock_architecture

    names = fnmatch.filter(timm.list_models([f'{prefix}*' for prefix in TRAINING_PREFIXES]), f'*{pattern}*')
    models = [dict(name=name, stock=stock_architecture(name)) for name in names]
    methods = [
        dict(name=name, title=method.title, summary=method.summary)
        for name, method in registered_methods().items() if fnmatch.fnmatch(name, f'*{pattern}*')
    ]
    if as_json:
        print_json(dict(models=models, methods=methods))
        return
    if not models and not methods:
        say(f'no model and no method has {pattern!r} in its name', err=True)
    for model in models:
        own = model['stock'] == model['name']
        say(f'{model["name"]:24} {"own stock form (inference_mode=True)" if own else model["stock"]}')
    for method in methods:
        say(f'method {method["name"]:17} {method["title"]}: {method["summary"]}')


@click.command('demo', cls=Command)
@click.option('--output', metavar='DIR', default='demo_output', show_default=True, help='Folder to write to.')
def demo(output: str) -> None:
    """Train on images that ship in a package, in two time steps, fuse, verify, export and reload: minutes on a CPU.

    \b
    Example:
      timm-rep demo --output demo_output
    """
    from .demo import run_demo

    run_demo(output)


@click.command('bench', cls=Command)
@click.argument('architectures', metavar='MODEL...', nargs=-1, required=True)
@click.option(
    '--batch-size', 'batch', type=NUMBER, metavar='N',
    help='Images in a batch; by default 8 at 224 px, more of smaller ones, up to 128.')
@click.option(
    '--img-size', type=NUMBER, metavar='N', help="Height and width of the images; the first model's by default.")
@click.option('--rounds', type=NUMBER, metavar='N', default=7, show_default=True, help='Turns of each model.')
@click.option('--steps', 'repeats', type=NUMBER, metavar='N', default=1, show_default=True, help='Steps in a turn.')
@click.option('--device', metavar='NAME', default='cpu', show_default=True, help='Where to compute.')
@click.option('--amp', is_flag=True, help='Compute in bfloat16 under autocast.')
@click.option('--channels-last', is_flag=True, help='Keep images and kernels channels-last.')
@model_kwargs_option
@json_option
def bench(architectures: Tuple[str, ...], as_json: bool, **kwargs: Any) -> None:
    """Time a training step of each MODEL against the stock form of the first, in turns, on random images.

    A step is zero_grad, forward, cross-entropy, backward and an SGD update. The ratio is that of the medians; behind it
    stand the smallest and the largest within one round. On a GPU take --steps 10.

    \b
    Example:
      timm-rep bench orepa_resnet18 dbb_resnet18
    """
    from ..report.cost import bench_models

    result = bench_models(architectures, **kwargs)
    if as_json:
        print_json(result)
        return
    size = 'x'.join(map(str, result['input_size']))
    say(
        f'A training step of {result["batch"]} images of {size}, {result["dtype"]}, on {result["hardware"]}, '
        f'torch {result["torch"]}:')
    for row in result['models']:
        ratio = f'{row["ratio"]:.2f} ({row["smallest"]:.2f} to {row["largest"]:.2f})'
        million = row['parameters'] / 1e6
        say(f'{row["name"]:40} {1e3 * row["median"]:9.1f} ms  x {ratio:20} {million:8.2f}M parameters')
