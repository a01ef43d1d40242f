"""Top-1 accuracy of fused networks in int8: onnxruntime's static quantisation, and torchao's of torch.export programs.

The published RepVGG is quantised as it is. To tell the method from the network, three networks of about the same size
are trained here: RepVGG's blocks (a norm in every branch), the same 3x3 convolutions with one norm behind each, and a
ResNet, with OREPA layers in each; the blocks also as they are, and the convolutions also with RepVGG's branches in
front of the one norm (linear `mobileone` layers).

    python benchmarks/int8.py --data CIFAR10 --out benchmarks/results/int8

CIFAR10 holds `train/CLASS/*` and `test/CLASS/*`. Writes the raw data as .json and a table as .md; networks that the
.json has already are kept. Calibration images are of the training set.
"""
import argparse
import copy
import datetime
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from onnxruntime.quantization import CalibrationDataReader, QuantType, quant_pre_process, quantize_static
from PIL import Image
from timm.models import ByoBlockCfg, ByobNet, ByoModelCfg, ResNet
from timm.models.resnet import BasicBlock
from timm.utils import reparameterize_model
from torch.fx.experimental.optimization import fuse as fuse_norms
from train_cost import output_files

import timm_rep
from timm_rep.io.programs import export_onnx
from timm_rep.report.cost import hardware_name

PUBLISHED = 'orepa_repvgg_a0_cifar'
STAGES = ((24, 2), (48, 3), (96, 2))  # channels and blocks; each stage halves the image
FORMS = ('float', 'per tensor', 'per channel', 'torchao')
NOTES = """\
- "float": the fused network with its norms (and RepVGG's branches) folded, in onnxruntime. "per tensor", "per channel":
  onnxruntime's `quantize_static`, int8 weights with one scale for each kernel or for each of its output channels, int8
  activations with one scale, smallest and largest value of the calibration images.
- "torchao": pt2e with `X86InductorQuantizer` as it is, uint8 activations and int8 weights per channel; empty where
  torchao is not installed.
- "range": of each folded kernel the largest absolute value of a channel over the median one's, and of all kernels the
  largest such ratio. With one scale for a kernel it is what the grid has to span.
- The networks below the published one were trained for this table, for so few epochs that only the drops say something.
  "timm's gains": the norms of RepVGG's blocks start with N(0.1, 0.1), as timm's RepVGG does; the others' with one, as
  those of `orepa_repvgg_*` do. "RepVGG's branches" are a 3x3, a 1x1 and the identity, with scales in place of
  norms: `MobileOne(copies=1)`.
"""


def load_images(folder, count):
    """The same number of images of each class, as normalised tensors, and their labels."""
    images, labels = [], []
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    for label, path in enumerate(classes):
        for file in sorted(path.iterdir())[:count // len(classes)]:
            images.append(np.asarray(Image.open(file).convert('RGB')))
            labels.append(label)
    cfg = timm.create_model(PUBLISHED).pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
    return x, torch.tensor(labels)


def repvgg(method='orepa', gains_of_one=True):
    """RepVGG's blocks, three norms in each; gains start at one as in orepa_repvgg, or as timm draws them."""
    blocks = tuple(ByoBlockCfg(type='rep', d=depth, c=channels, s=2, gs=0) for channels, depth in STAGES)
    net = ByobNet(ByoModelCfg(blocks=blocks, stem_type='rep', stem_chs=16), num_classes=10)
    net.stem.conv_kxk.conv.stride = net.stem.conv_1x1.conv.stride = (1, 1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and gains_of_one:
            module.reset_parameters()
    return timm_rep.expand(net, method) if method else net


def chain(method='orepa'):
    """The same 3x3 convolutions without RepVGG's other branches: one norm, behind the sum of the method's."""
    widths = [16, *(channels for channels, depth in STAGES for _ in range(depth))]
    strides = [1, *(2 if index == 0 else 1 for _, depth in STAGES for index in range(depth))]
    layers = []
    for before, width, stride in zip([3, *widths], widths, strides):
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    return timm_rep.expand(net, method)


def resnet():
    """A ResNet with OREPA layers, whose stem keeps the image's size as the others' do."""
    net = ResNet(
        BasicBlock, (1, 1, 1, 1), channels=(16, 24, 48, 96), stem_width=16, stem_type='deep', num_classes=10)
    net.conv1, net.bn1, net.maxpool = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.Identity()
    net.layer1[0] = BasicBlock(16, 16)
    return timm_rep.expand(net, 'orepa')


NETWORKS = {
    "RepVGG blocks, timm's gains": lambda: repvgg(None, gains_of_one=False),
    "RepVGG blocks, OREPA, timm's gains": lambda: repvgg(gains_of_one=False),
    'RepVGG blocks': lambda: repvgg(None),
    'RepVGG blocks, OREPA': repvgg,
    'one norm, OREPA': chain,
    "one norm, RepVGG's branches": lambda: chain(timm_rep.MobileOne(copies=1)),
    'ResNet, OREPA': resnet,
}


def train(model, images, labels, args):
    """SGD with a linear warm-up, then a cosine; flips and shifts."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = args.epochs * (len(images) // args.batch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2)
    padded = F.pad(images, (4, 4, 4, 4))
    size = images.shape[-1]
    model.train()
    for _ in range(args.epochs):
        for rows in torch.randperm(len(images)).split(args.batch):
            if len(rows) < args.batch:
                break
            top, left = torch.randint(9, (2,)).tolist()
            batch = padded[rows, :, top:top + size, left:left + size]
            batch = batch.flip(3) if torch.rand(()) < 0.5 else batch
            loss = F.cross_entropy(model(batch), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return model.eval()


def deploy_form(model):
    """The fused network; RepVGG's branches are folded, norms are left to the exporters."""
    fused = reparameterize_model(timm_rep.fuse(model.eval())).eval()
    fused.pretrained_cfg = dict(input_size=(3, 32, 32))
    return fused


def channel_range(model):
    """Largest absolute value of a channel's kernel over the median one's, norms folded, the largest of all kernels."""
    ratios = []
    for module in fuse_norms(model).modules():
        if isinstance(module, nn.Conv2d):
            largest = module.weight.detach().abs().flatten(1).amax(1)
            ratios.append((largest.max() / largest.median()).item())
    return max(ratios)


class Calibration(CalibrationDataReader):
    def __init__(self, images):
        self.batches = iter(images.split(50))

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else dict(images=batch.numpy())


def accuracy(run, images, labels):
    found = torch.cat([run(batch).argmax(1) for batch in images.split(100)])
    return round(100 * (found == labels).double().mean().item(), 3)


def onnx_accuracy(file, images, labels, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    return accuracy(lambda batch: torch.from_numpy(session.run(None, dict(images=batch.numpy()))[0]), images, labels)


def with_torchao(model, calibration, images, labels):
    """Accuracy by torchao's pt2e, or None without it."""
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except ImportError:
        return None
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    program = torch.export.export(model, (images[:100],), dynamic_shapes=({0: torch.export.Dim('batch', min=2)},))
    prepared = prepare_pt2e(program.module(), quantizer)
    for batch in calibration.split(100):
        prepared(batch)
    return accuracy(convert_pt2e(prepared), images, labels)


@torch.no_grad()
def quantise(model, calibration, images, labels, args):
    """Top-1 of a trained network in all forms."""
    deployed = deploy_form(model)
    top1 = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        plain = Path(folder) / 'float.onnx'
        export_onnx(deployed, plain)
        top1['float'] = onnx_accuracy(plain, images, labels, args.threads)
        quant_pre_process(str(plain), str(plain), skip_symbolic_shape=True)  # folds the norms
        for form, per_channel in (('per tensor', False), ('per channel', True)):
            file = Path(folder) / f'{per_channel}.onnx'
            quantize_static(
                str(plain), str(file), Calibration(calibration), per_channel=per_channel,
                activation_type=QuantType.QInt8, weight_type=QuantType.QInt8)
            top1[form] = onnx_accuracy(file, images, labels, args.threads)
        top1['torchao'] = with_torchao(deployed, calibration, images, labels)
    return dict(top1=top1, range=channel_range(deployed))


def markdown(report):
    settings = report['arguments']
    lines = [
        '# Fused networks in int8', '',
        f"{report['machine']['hardware']}, " + ' '.join(f'{k} {v}' for k, v in report['versions'].items())
        + f", {report['date'][:10]}.", '',
        f"`{report['command']}`", '',
        f"Top-1 in percent on {settings['test_images']} test images of CIFAR-10, {settings['calibration']} images to "
        'calibrate on.', '',
        '| network | ' + ' | '.join(FORMS) + ' | range |', '|---|' + '--:|' * (len(FORMS) + 1)]
    for name, result in report['results'].items():
        cells = ['' if result['top1'][form] is None else f"{result['top1'][form]:.1f}" for form in FORMS]
        lines.append(f"| {name} | {' | '.join(cells)} | {result['range']:.0f} |")
    return '\n'.join([*lines, '', NOTES])


def package_version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return 'none'


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='image folder with train and test')
    parser.add_argument('--test-images', type=int, default=2000)
    parser.add_argument('--calibration', type=int, default=500, help='images')
    parser.add_argument('--train-images', type=int, default=15000, help='for the networks that are trained here')
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--batch', type=int, default=100)
    parser.add_argument('--only', default='', metavar='PATTERN', help='only networks with this regular expression')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, metavar='FILE', help='write FILE.json and FILE.md')
    args = parser.parse_args(argv)
    for split in ('train', 'test'):
        if not (args.data / split).is_dir():
            parser.error(f'--data: {args.data} must hold the folders train and test')
    return args


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime's advice to do what is done
    test = load_images(args.data / 'test', args.test_images)
    calibration, _ = load_images(args.data / 'train', args.calibration)
    images, labels = load_images(args.data / 'train', args.train_images)
    file, *_ = output_files(args.out) or [None]
    results = json.loads(file.read_text())['results'] if file and file.exists() else {}
    for name in (PUBLISHED, *NETWORKS):
        if name in results or not re.search(args.only, name):
            continue
        start = time.perf_counter()
        if name == PUBLISHED:
            model = timm.create_model(name, pretrained=True).eval()
        else:
            torch.manual_seed(args.seed)
            model = train(NETWORKS[name](), images, labels, args)
        results[name] = quantise(copy.deepcopy(model), calibration, *test, args)
        print(name, results[name], f'{time.perf_counter() - start:.0f} s', flush=True)
    results = {name: results[name] for name in (PUBLISHED, *NETWORKS) if name in results}
    arguments = dict(vars(args), data=args.data.name, out=args.out.name if args.out else None)
    report = dict(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        command=f'python benchmarks/int8.py --data CIFAR10 --epochs {args.epochs} --train-images {args.train_images}',
        arguments=arguments,
        machine=dict(hardware=hardware_name('cpu'), cores=os.cpu_count()),
        versions=dict(
            python=platform.python_version(), torch=torch.__version__, timm=timm.__version__,
            onnxruntime=onnxruntime.__version__, torchao=package_version('torchao'), timm_rep=timm_rep.__version__),
        results=results)
    for file, text in zip(output_files(args.out), (json.dumps(report, indent=1) + '\n', markdown(report))):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


if __name__ == '__main__':
    main()
