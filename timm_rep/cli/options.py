"""Options that several commands have."""
import ast
from typing import Any, Callable, Dict, Tuple

import click

__all__ = ['checkpoint_options', 'json_option', 'model_kwargs_option', 'size_options']


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--json``, as ``as_json``."""
    return click.option('--json', 'as_json', is_flag=True, help='Print JSON.')(command)


def size_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--in-chans`` and ``--num-classes``."""
    for name, what, least in (('--in-chans', 'Image channels', 1), ('--num-classes', 'Classes', 0)):
        number = click.IntRange(min=least)
        command = click.option(name, type=number, metavar='N', help=f'{what}, if the run does not say.')(command)
    return command


def _parse_model_kwargs(context: click.Context, option: click.Parameter, given: Tuple[str, ...]) -> Dict[str, Any]:
    """Read KEY=VALUE as timm's own scripts do: a value is a Python literal, else a string."""
    model_kwargs: Dict[str, Any] = {}
    for item in given:
        key, equals, value = item.partition('=')
        if not (key and equals):
            raise click.BadParameter(f'{item!r} is not KEY=VALUE')
        try:
            model_kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            model_kwargs[key] = value
    return model_kwargs


def model_kwargs_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--model-kwargs KEY=VALUE``, as a dict."""
    return click.option(
        '--model-kwargs', metavar='KEY=VALUE', multiple=True, callback=_parse_model_kwargs,
        help='Argument of the model, such as rep_layer=acb; may be given several times.')(command)


def checkpoint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What it takes to load a checkpoint in training form."""
    help_text = 'Load Python objects in the checkpoint too; they can run any code.'
    command = click.option('--allow-pickle', is_flag=True, help=help_text)(command)
    command = model_kwargs_option(size_options(command))
    command = click.option('--use-ema', is_flag=True, help='Take the averaged weights.')(command)
    return click.option('--model', 'architecture', metavar='NAME', help='Model, if the run does not say.')(command)
