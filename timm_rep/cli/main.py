"""``timm-rep``: the library on the command line. Every command is one library call."""
import ast
import dataclasses
import fnmatch
import json
import logging
import sys
import traceback
from contextlib import contextmanager
from statistics import median
from typing import Any, Callable, Dict, Iterable, Iterator, Optional, Tuple, Type

import click
import timm
import torch

from .._version import __version__
from ..core.errors import UserError
from ..core.methods import registered_methods
from ..core.verify import Report, VerificationError
from ..hub.check import HUB_PREFIX, check_export, is_export
from ..hub.forms import expand_checkpoint, fuse_checkpoint, verify_checkpoint
from ..hub.publish import Published
from ..hub.publish import publish as publish_model
from ..io.architecture import create_model
from ..io.hub_errors import HubError
from ..models.names import TRAINING_PREFIXES, stock_architecture
from ..official.load import import_checkpoint
from ..report.cost import TIMING_BATCH, TIMING_ROUNDS, hardware_name, time_training_steps
from ..report.ensemble import BN_IMAGES, EnsembleResult, evaluate_snapshots
from ..report.plots import plot_run
from ..train.scripts import find_script, run_script

__all__ = ['main']

_logger = logging.getLogger(__name__)


class _Mismatch(click.ClickException):
    exit_code = 1


class _UserError(click.ClickException):
    exit_code = 2


class _HubFailure(click.ClickException):
    exit_code = 3


class _Defect(click.ClickException):
    exit_code = 4


class _Interrupted(click.ClickException):
    exit_code = 130  # as shells have it


# Kinds of errors of the library, the first that fits; other errors are its defects.
FAILURES: Tuple[Tuple[Type[Exception], Type[click.ClickException]], ...] = (
    (VerificationError, _Mismatch),
    (HubError, _HubFailure),
    (ValueError, _UserError),
    (RuntimeError, _UserError),
    (OSError, _UserError),
    (ImportError, _UserError),
    (Exception, _Defect),
)


@contextmanager
def _user_errors(as_json: bool = False) -> Iterator[None]:
    """Turn the errors that the library raises on bad input into one line, in JSON too, and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        if as_json:
            click.echo(json.dumps(dict(ok=False, error='interrupted')))
        raise _Interrupted('interrupted') from None
    except Exception as e:
        failure = next(failure for kind, failure in FAILURES if isinstance(e, kind))
        message = ' '.join(str(e).split())
        if failure is _Defect:
            traceback.print_exc()
            message = f'{type(e).__name__}: {message}'
        _logger.debug('traceback of the error', exc_info=True)
        if as_json:
            click.echo(json.dumps(dict(ok=False, error=message)))
        raise failure(message) from e


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option('--json', 'as_json', is_flag=True, help='Print JSON.')(command)


def _size_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for name, what in (('--in-chans', 'Image channels'), ('--num-classes', 'Classes')):
        command = click.option(name, type=int, metavar='N', help=f'{what}, if the run does not say.')(command)
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


def _model_kwargs_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        '--model-kwargs', metavar='KEY=VALUE', multiple=True, callback=_parse_model_kwargs,
        help='Argument of the model, such as rep_layer=acb; may be given several times.')(command)


def _checkpoint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What it takes to load a checkpoint in training form."""
    help_text = 'Load Python objects in the checkpoint too; they can run any code.'
    command = click.option('--allow-pickle', is_flag=True, help=help_text)(command)
    command = _model_kwargs_option(_size_options(command))
    command = click.option('--use-ema', is_flag=True, help='Take the averaged weights.')(command)
    return click.option('--model', 'architecture', metavar='NAME', help='Model, if the run does not say.')(command)


def _report_content(report: Report) -> Dict[str, Any]:
    def difference(found: Any) -> Dict[str, Any]:
        return dict(dataclasses.asdict(found), relative=found.relative)

    return dict(
        model=difference(report.model),
        layers=[difference(layer) for layer in report.layers],
        rtol=report.rtol,
        atol=report.atol,
    )


def _report_json(report: Report) -> str:
    return json.dumps(dict(_report_content(report), ok=True), indent=2)


def _progress_bar(batches: Iterable[Any], label: str) -> Iterator[Any]:
    with click.progressbar(batches, label=label, file=sys.stderr) as bar:
        yield from bar


def _ensemble_json(result: EnsembleResult) -> str:
    content = dict(
        snapshots=[dataclasses.asdict(score) for score in result.snapshots],
        outputs=dataclasses.asdict(result.outputs),
        weights=dataclasses.asdict(result.weights),
        images=result.images,
        bn_images=result.bn_images,
    )
    return json.dumps(content, indent=2)


@click.group(context_settings=dict(help_option_names=['-h', '--help'], max_content_width=120))
@click.version_option(__version__, prog_name='timm-rep')
def main() -> None:
    """Structural re-parameterization for timm: train with branches, fuse into stock timm models.

    \b
    Example:
      timm-rep run train --model orepa_resnet18 --data-dir images
      timm-rep fuse output/train/run/model_best.pth.tar resnet18.safetensors
      timm-rep publish output/train/run --repo me/resnet18.orepa_images --dry-run

    Exit codes: 0 all well; 1 two forms of a model do not compute the same; 2 wrong input; 3 the Hub could not be
    reached, or refused; 4 a defect of timm-rep, with its traceback; 130 interrupted.
    """


@main.command('list')
@click.argument('pattern', metavar='[FILTER]', default='')
@_json_option
def list_command(pattern: str, as_json: bool) -> None:
    """List the models with rep layers, and what they fuse into.

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
    if not models:
        click.echo(f'no model with rep layers has {pattern!r} in its name', err=True)
    for model in models:
        own = model['stock'] == model['name']
        click.echo(f'{model["name"]:24} {"own stock form (inference_mode=True)" if own else model["stock"]}')


@main.command()
@click.option('--output', metavar='DIR', default='demo_output', show_default=True, help='Folder to write to.')
def demo(output: str) -> None:
    """Train on images that ship in a package, in two time steps, fuse, verify, export and reload: minutes on a CPU.

    \b
    Example:
      timm-rep demo --output demo_output
    """
    from .demo import run_demo  # of use to this command only
    with _user_errors():
        run_demo(output)


@main.command()
@click.argument('checkpoint', type=click.Path())
@click.argument('out', type=click.Path(), required=False)
@click.option('--onnx', metavar='FILE', type=click.Path(), help='Write ONNX, checked with onnxruntime.')
@click.option('--torch-export', 'program', metavar='FILE', type=click.Path(), help='Write a torch.export program.')
@_checkpoint_options
def fuse(checkpoint: str, out: Optional[str], **kwargs: Any) -> None:
    """Fuse a trained CHECKPOINT into the stock timm model, check that its outputs are the same, and write it.

    OUT is a file that ends in .safetensors or .pth, for the weights alone, or the name of a Hub folder.
    CHECKPOINT comes from timm's train.py, which notes the model in it or in args.yaml beside it; the output folder of
    a run stands for its best checkpoint.

    ONNX files and torch.export programs are always of the fused model, take batches of any size, and are compared with
    PyTorch before they are kept. For Core ML, TensorRT, OpenVINO and the like, give the Hub folder to
    the package timmx.

    \b
    Examples:
      timm-rep fuse output/train/run/model_best.pth.tar resnet18.safetensors
      timm-rep fuse output/train/run resnet18_folder --onnx resnet18.onnx
    """
    with _user_errors():
        report = fuse_checkpoint(checkpoint, out, **kwargs)
    written = ', '.join(str(path) for path in (out, kwargs['onnx'], kwargs['program']) if path)
    click.echo(f'{written}: {report}')


@main.command()
@click.argument('checkpoint', metavar='CHECKPOINT_OR_EXPORT', type=click.Path())
@click.argument('fused', type=click.Path(), required=False)
@_checkpoint_options
@_json_option
def verify(checkpoint: str, fused: Optional[str], as_json: bool, **kwargs: Any) -> None:
    """Check that a trained CHECKPOINT and its FUSED form compute the same; exit code 1 if not.

    FUSED is a file of weights or a Hub folder, as `timm-rep fuse` writes them. Without it, CHECKPOINT is fused in
    memory.

    Of an EXPORT, which is a Hub folder or hf-hub:ORG/NAME, the self-check is replayed: timm rebuilds the model, and its
    output for the input in test/rand_tensors.safetensors must be the one that is there too.

    \b
    Examples:
      timm-rep verify output/train/run/model_best.pth.tar resnet18.safetensors
      timm-rep verify hf-hub:me/resnet18.orepa_images
    """
    with _user_errors(as_json):
        if fused is None and is_export(checkpoint):
            if any(kwargs.values()):
                raise UserError(f'{checkpoint} is an export, which says what it is: only --json goes with it')
            report = check_export(checkpoint)
        elif is_export(checkpoint):
            raise UserError(f'{checkpoint} is compared with what is published with it, not with {fused}')
        else:
            report = verify_checkpoint(checkpoint, fused, **kwargs)
    click.echo(_report_json(report) if as_json else str(report))


def _published_json(published: Published) -> str:
    content = dict(
        ok=True,
        folder=str(published.folder),
        files=published.files,
        training_folder=published.training_folder and str(published.training_folder),
        repo=published.repo,
        revision=published.revision,
        commit=published.commit,
        pull_request=published.pull_request,
        verification=_report_content(published.report),
        images=published.images and dataclasses.asdict(published.images),
        registry_entry=published.entry,
    )
    return json.dumps(content, indent=2)


@main.command()
@click.argument('source', metavar='CHECKPOINT_OR_RUN_DIR', type=click.Path())
@click.option('--repo', metavar='ORG/NAME', required=True, help='Repository on the Hub; made if it is not there.')
@click.option('--data', metavar='DIR', type=click.Path(), help='Real images to compare both forms on.')
@click.option('--max-images', metavar='N', type=click.IntRange(min=1), help='Take only so many of them.')
@click.option('--split', metavar='NAME', help="Split of them to take; the run's, else validation, by default.")
@click.option('--dataset', metavar='NAME', help='Data set, if the run does not say.')
@click.option('--tag', metavar='TAG', help='Recipe and data set in timm\'s sense; by default method and data set.')
@click.option('--license', metavar='ID', default='unknown', show_default=True, help='Licence of the weights.')
@click.option('--out', metavar='DIR', type=click.Path(), help='Folder to write; by default NAME, NAME-2 ... here.')
@click.option('--dry-run', is_flag=True, help='Write the folder, send nothing.')
@click.option('--private', is_flag=True, help='Make a new repository private.')
@click.option('--revision', metavar='BRANCH', help='Branch to publish on instead of the main one.')
@click.option('--create-pr', is_flag=True, help='Open a pull request.')
@click.option('--git-tag', metavar='TAG', help='Tag the commit on the Hub, e.g. v1.')
@click.option('--include-training-form', is_flag=True, help='Put the training form on the revision "train".')
@click.option('--replace-card', is_flag=True, help='Replace a model card that was written by hand.')
@click.option('--device', default='cpu', show_default=True, help='Where images are run and speed is measured.')
@_checkpoint_options
@_json_option
def publish(source: str, repo: str, as_json: bool, dry_run: bool, create_pr: bool, **kwargs: Any) -> None:
    """Publish a trained model on the Hugging Face Hub, in stock form: anyone loads it with timm alone.

    CHECKPOINT_OR_RUN_DIR is the output folder of timm's train.py, or a checkpoint in it. It is fused, verified layer
    by layer and end to end, measured, written to a folder, and sent in one commit. Nothing is sent that does not
    verify, and the folder stays. Log in with `hf auth login`, or set HF_TOKEN.

    \b
    Examples:
      timm-rep publish output/train/run --repo me/resnet50.orepa_in1k --data imagenet --dataset ImageNet-1k --dry-run
      timm-rep publish output/train/run --repo me/resnet50.orepa_in1k --data imagenet --dataset ImageNet-1k
      timm-rep publish last.pth.tar --repo me/resnet18.orepa_pets --model orepa_resnet18 --num-classes 37 --private
    """
    with _user_errors(as_json):
        published = publish_model(source, repo, dry_run=dry_run, create_pr=create_pr, progress=True, **kwargs)
    if as_json:
        click.echo(_published_json(published))
        return
    click.echo(f'{published.folder}: {published.report}')
    for name, size in published.files.items():
        click.echo(f'  {size:>12,}  {name}')
    load = f"timm.create_model('{HUB_PREFIX}{published.hub_id}', pretrained=True)"
    if dry_run:
        target = f'{published.repo}@{published.revision}'
        way = 'pull request' if create_pr else 'commit'
        click.echo(f'Dry run, nothing was sent: these {len(published.files)} files would go to {target} in one {way}.')
        if published.training_folder is not None:
            click.echo(f'The training form in {published.training_folder} would go to {published.repo}@train.')
    else:
        click.echo(f'Published: {published.pull_request or published.commit}')
        click.echo(f'Once it is merged, load it with {load}' if create_pr else f'Load it with {load}')
    if published.entry is not None:
        click.echo('To let pretrained=True find the weights, add to timm_rep/pretrained.json:')
        click.echo(json.dumps(published.entry, indent=2))


@main.command()
@click.argument('source', metavar='MODEL_OR_CHECKPOINT')
@click.argument('out', type=click.Path())
@click.option(
    '--layer', type=click.Choice(list(registered_methods())), default='orepa', show_default=True,
    help='Kind of rep layer.')
@click.option('--model', 'architecture', metavar='NAME', help='Stock model that the checkpoint is of.')
@_size_options
def expand(source: str, out: str, **kwargs: Any) -> None:
    """Put stock weights into the training form of the model with rep layers, with the same outputs.

    MODEL_OR_CHECKPOINT is a timm model, whose pretrained weights timm downloads, or a file of weights. OUT ends in
    .safetensors or .pth; train from it with `--model orepa_resnet50 --initial-checkpoint OUT`. Layers acb and rep are
    those of the repan_ models: `--model repan_resnet50 --model-kwargs rep_layer=acb`.

    \b
    Examples:
      timm-rep expand resnet50.a1_in1k orepa_resnet50.safetensors
      timm-rep expand resnet18.pth dbb_resnet18.pth --model resnet18 --layer dbb
    """
    with _user_errors():
        report = expand_checkpoint(source, out, **kwargs)
    click.echo(f'{out}: {report}')


@main.command('import-official')
@click.argument('file', type=click.Path())
@click.option('--model', 'architecture', metavar='NAME', required=True, help='Model that the checkpoint is of.')
@click.option('--out', metavar='PATH', type=click.Path(), required=True, help='Weights file, or folder, to write.')
@click.option('--license', metavar='NAME', default='unknown', show_default=True, help='Licence, for a Hub folder.')
@click.option(
    '--attach-rate', type=float, metavar='RATE', default=1.0, show_default=True,
    help="Attach rate, which RepAn's files do not hold.")


@_model_kwargs_option
@_json_option
def import_official(file: str, out: str, as_json: bool, **kwargs: Any) -> None:
    """Import a checkpoint that the authors of OREPA, DBB, RepVGG or RepAn published, with the outputs of their code.

    PATH is a file that ends in .safetensors or .pth, for the weights as they are: in training form, to train on with
    `--model orepa_resnet50 --initial-checkpoint PATH`, or in stock form if FILE is a deploy file. Any other name
    is that of a Hub folder in stock form, which timm loads alone. An existing PATH is never overwritten.

    \b
    Examples:
      timm-rep import-official ResNet-50.pth.tar --model orepa_resnet50 --out orepa_resnet50.safetensors
      timm-rep import-official RepVGG-A0-train.pth --model repvgg_a0 --out repvgg_a0 --license mit
      timm-rep import-official model_epoch_0120.pyth --model repan_mobilenetv1_100 --out mobilenet.pth \\
          --model-kwargs rep_layer=acb --model-kwargs act_layer=relu
    """
    with _user_errors(as_json):
        imported = import_checkpoint(file, out, **kwargs)
    if as_json:
        report = imported.report
        click.echo(json.dumps(dict(
            output=str(imported.output),
            architecture=imported.architecture,
            form=imported.form,
            num_classes=imported.num_classes,
            model_kwargs=imported.model_kwargs,
            fused=None if report is None else json.loads(_report_json(report)),
        ), indent=2))
        return
    click.echo(f'{imported.output}: {imported}')


@main.command(context_settings=dict(allow_interspersed_args=False))
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
    with _user_errors():
        path = find_script(script, timm_scripts)
    run_script(path, args)


@main.command()
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
    with _user_errors():
        paths = plot_run(run_dir, out)
    for path in paths:
        click.echo(path)


@main.command()
@click.argument('run_dir', type=click.Path())
@click.option('--data-dir', metavar='DIR', type=click.Path(), required=True, help='Images, as for train.py.')
@click.option('--val-split', metavar='NAME', help="Split to evaluate on; the run's by default.")
@click.option('--train-split', metavar='NAME', help="Split to re-estimate batch norms on; the run's by default.")
@click.option('--batch-size', type=int, metavar='N', help="Images a batch; the run's by default.")
@click.option('--workers', type=int, metavar='N', help='Processes that load images; as in the run by default.')
@click.option('--device', metavar='NAME', help='Where to compute; cuda if there is one by default.')
@click.option(
    '--bn-images', type=int, metavar='N', default=BN_IMAGES, show_default=True,
    help='Training images to re-estimate batch norms on.')


@click.option('--use-ema', is_flag=True, help='Take the snapshots of the averaged weights.')
@click.option('--out', 'output', type=click.Path(), metavar='FILE', help="New file for the average of the weights.")
@_json_option
def ensemble(run_dir: str, data_dir: str, as_json: bool, **kwargs: Any) -> None:
    """Evaluate the snapshots of time steps in RUN_DIR, alone and together.

    Together means the average of their outputs, and the average of their weights with the batch norms re-estimated.
    --out writes the latter as stock weights, to a new file that ends in .safetensors or .pth. All settings of the
    images are those of the run.

    \b
    Example:
      timm-rep ensemble output/train/run --data-dir images --out average.safetensors
    """
    with _user_errors(as_json):
        result = evaluate_snapshots(run_dir, data_dir, progress=_progress_bar, **kwargs)
    if as_json:
        click.echo(_ensemble_json(result))
        return
    click.echo(f'{f"on {result.images} images":20}{"top-1 (%)":>10} {"top-5 (%)":>10} {"loss":>9}')
    for score in (*result.snapshots, result.outputs, result.weights):
        click.echo(f'{score.name:20}{score.top1:10.2f} {score.top5:10.2f} {score.loss:9.4f}')


def _baseline(architecture: str, model_kwargs: Dict[str, Any]) -> Tuple[str, Any]:
    """The stock form of one of our models, or a model of timm's as it is."""
    if not architecture.startswith(TRAINING_PREFIXES):
        return architecture, create_model(architecture, **model_kwargs)
    return f'{architecture} (stock form)', create_model(architecture, inference_mode=True, **model_kwargs)


@main.command()
@click.argument('architectures', metavar='MODEL...', nargs=-1, required=True)
@click.option('--batch-size', 'batch', type=int, metavar='N', default=TIMING_BATCH, show_default=True)
@click.option('--img-size', type=int, metavar='N', help="Height and width of the images; the first model's by default.")
@click.option('--rounds', type=int, metavar='N', default=TIMING_ROUNDS, show_default=True, help='Turns of each model.')
@click.option('--steps', 'repeats', type=int, metavar='N', default=1, show_default=True, help='Steps in a turn.')
@click.option('--device', metavar='NAME', default='cpu', show_default=True, help='Where to compute.')
@click.option('--amp', is_flag=True, help='Compute in bfloat16 under autocast.')
@click.option('--channels-last', is_flag=True, help='Keep images and kernels channels-last.')
@_model_kwargs_option
@_json_option
def bench(
        architectures: Tuple[str, ...],
        img_size: Optional[int],
        amp: bool,
        model_kwargs: Dict[str, Any],
        as_json: bool,
        **kwargs: Any,
) -> None:
    """Time a training step of each MODEL against the stock form of the first, in turns, on random images.

    A step is zero_grad, forward, cross-entropy, backward and an SGD update. The ratio is that of the medians; behind it
    stand the smallest and the largest within one round. On a GPU take --steps 10.

    \b
    Example:
      timm-rep bench orepa_resnet18 dbb_resnet18
    """
    with _user_errors(as_json):
        baseline, model = _baseline(architectures[0], model_kwargs)
        models = {baseline: model, **{name: create_model(name, **model_kwargs) for name in architectures}}
        channels, height, width = model.pretrained_cfg['input_size']
        size = (height, width) if img_size is None else (img_size, img_size)
        input_size = (model_kwargs.get('in_chans', channels), *size)
        autocast = torch.bfloat16 if amp else None
        times = time_training_steps(models, input_size, autocast=autocast, **kwargs)
    setting = dict(
        hardware=hardware_name(kwargs['device']), torch=torch.__version__, batch=kwargs['batch'], input_size=input_size,
        dtype='bfloat16' if amp else 'float32', channels_last=kwargs['channels_last'])
    if as_json:
        click.echo(json.dumps(dict(setting, models=[dataclasses.asdict(row) for row in times]), indent=2))
        return
    click.echo(
        f'A training step of {setting["batch"]} images of {"x".join(map(str, input_size))}, {setting["dtype"]}, on '
        f'{setting["hardware"]}, torch {torch.__version__}:')
    space = max(map(len, models))
    click.echo(f'{"":{space}}  {"ms":>9}  {"ratio":>21}  {"parameters":>10}')
    for row in times:
        ratio = f'{row.ratio:.2f} ({row.smallest:.2f} to {row.largest:.2f})'
        click.echo(
            f'{row.name:{space}}  {1e3 * median(row.seconds):9.1f}  {ratio:>21}  {row.parameters / 1e6:9.2f}M')
