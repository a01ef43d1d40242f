"""Commands that make one file of weights of another: ``fuse``, ``verify``, ``expand``, ``import-official``."""
from typing import Any, Optional

import click

from .errors import Command
from .options import checkpoint_options, json_option, model_kwargs_option, size_options
from .output import print_json, report_content, say

__all__ = ['expand', 'fuse', 'import_official', 'verify']


@click.command('fuse', cls=Command)
@click.argument('checkpoint', type=click.Path())
@click.argument('out', type=click.Path(), required=False)
@click.option('--onnx', metavar='FILE', type=click.Path(), help='Write ONNX, checked with onnxruntime.')
@click.option('--torch-export', 'program', metavar='FILE', type=click.Path(), help='Write a torch.export program.')
@checkpoint_options
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
    from ..hub.forms import fuse_checkpoint

    report = fuse_checkpoint(checkpoint, out, **kwargs)
    written = ', '.join(str(path) for path in (out, kwargs['onnx'], kwargs['program']) if path)
    say(f'{written}: {report}')


@click.command('verify', cls=Command)
@click.argument('checkpoint', metavar='CHECKPOINT_OR_EXPORT', type=click.Path())
@click.argument('fused', type=click.Path(), required=False)
@checkpoint_options
@json_option
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
    from ..hub.check import check_export, is_export
    from ..hub.forms import verify_checkpoint

    if fused is None and is_export(checkpoint):
        if any(kwargs.values()):
            raise click.UsageError(f'{checkpoint} is an export, which says what it is: only --json goes with it')
        report = check_export(checkpoint)
    else:
        report = verify_checkpoint(checkpoint, fused, **kwargs)
    if as_json:
        print_json(dict(report_content(report), ok=True))
    else:
        say(report)


@click.command('expand', cls=Command)
@click.argument('source', metavar='MODEL_OR_CHECKPOINT')
@click.argument('out', type=click.Path())
@click.option(
    '--method', metavar='NAME', default='orepa', show_default=True,
    help='Kind of rep layer; `timm-rep list` shows them.')
@click.option('--model', 'architecture', metavar='NAME', help='Stock model that the checkpoint is of.')
@size_options
def expand(source: str, out: str, method: str, **kwargs: Any) -> None:
    """Put stock weights into the training form of the model with rep layers, with the same outputs.

    MODEL_OR_CHECKPOINT is one of the stock models that `timm-rep list` shows, whose pretrained weights timm downloads,
    or a file of its weights; other CNNs take timm_rep.expand in Python. OUT ends in .safetensors or .pth; train from it
    with `--model orepa_resnet50 --initial-checkpoint OUT`. Methods that have no models of their name in front are those
    of the repan_ models: `--model repan_resnet50 --model-kwargs rep_layer=acb`.

    \b
    Examples:
      timm-rep expand resnet50.a1_in1k orepa_resnet50.safetensors
      timm-rep expand resnet18.pth dbb_resnet18.pth --model resnet18 --method dbb
    """
    from ..hub.forms import expand_checkpoint

    report = expand_checkpoint(source, out, method, **kwargs)
    say(f'{out}: {report}')


@click.command('import-official', cls=Command)
@click.argument('file', type=click.Path())
@click.option('--model', 'architecture', metavar='NAME', required=True, help='Model that the checkpoint is of.')
@click.option('--out', metavar='PATH', type=click.Path(), required=True, help='Weights file, or folder, to write.')
@click.option('--license', metavar='NAME', default='unknown', show_default=True, help='Licence, for a Hub folder.')
@click.option(
    '--attach-rate', type=float, metavar='RATE', default=1.0, show_default=True,
    help="Attach rate, which RepAn's files do not hold.")
@model_kwargs_option
@json_option
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
    from ..official.load import import_checkpoint

    imported = import_checkpoint(file, out, **kwargs)
    report = imported.pop('report')
    if as_json:
        print_json(dict(imported, fused=None if report is None else dict(report_content(report), ok=True)))
        return
    text = '{output}: {architecture} in {form} form, {num_classes} classes'.format(**imported)
    if imported['model_kwargs']:
        text += ', built with ' + ' '.join(f'{key}={value}' for key, value in imported['model_kwargs'].items())
    say(text if report is None else f'{text}; training form and stock form: {report}')
