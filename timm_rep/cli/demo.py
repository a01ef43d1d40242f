"""The whole way on a CPU in minutes: anneal on handwritten digits, fuse, verify, export, reload with stock timm."""
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, List, Optional, Tuple, Union, cast

import timm
import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.utils import random_seed
from torch import Tensor

from ..core.fuse import fuse
from ..core.verify import verify
from ..hub.export import export_folder
from ..report.cost import images_per_second

__all__ = ['DemoResult', 'run_demo']

EXTRA_PACKAGES = dict(sklearn='scikit-learn', matplotlib='matplotlib', tqdm='tqdm')
MODEL = 'orepa_resnet18'
# Digits of 8x8 pixels, scaled up: a ResNet divides its input by 32.
INPUT = dict(input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)
# A mirrored digit is another sign.
AUGMENTATION = dict(scale=(0.7, 1.0), ratio=(0.8, 1.25), hflip=0.0, color_jitter=None)
HELD_OUT = 0.25
PIXEL_MAX = 16  # scikit-learn's digits count dots
TIME_STEPS = 2
EPOCHS = 7  # of a time step
ATTACH_WARMUP_EPOCHS = 2  # of each time step
WARMUP_EPOCHS = 1  # of the learning rate, in the first time step
BATCH_SIZE = 96
LEARNING_RATE = 0.1
TIMING_ROUNDS = 15
TIMING_BATCH = 32

# Runs in a process of its own, where nothing can import this package.
RELOAD_SCRIPT = """
import json
import sys


class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'timm_rep':
            raise ModuleNotFoundError(f'{name} is blocked: this process has stock timm only')


sys.meta_path.insert(0, Block())

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config

folder, images, batch_size = sys.argv[1:]
model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
classes = {name: index for index, name in enumerate(model.pretrained_cfg['label_names'])}
loader = create_loader(
    create_dataset('', root=images, split='test', class_map=classes),
    batch_size=int(batch_size),
    num_workers=0,
    persistent_workers=False,
    use_prefetcher=False,
    device=torch.device('cpu'),
    **resolve_data_config(model=model),
)
with torch.inference_mode():
    correct = sum((model(inputs).argmax(1) == targets).sum().item() for inputs, targets in loader)
assert 'timm_rep' not in sys.modules
print(json.dumps(dict(correct=correct, model=type(model).__module__)))
"""


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        output: Folder with all that it wrote.
        top1: Accuracy on the held-out images in percent, the same for all three forms.
        parameters: Of the training form and of the fused model.
        images_per_second: Of the training form and of the fused model, in eval mode.
        difference: Largest difference of the fused model's outputs, relative to the largest output.
        time_steps: Accuracy at the end of each time step of the training, in percent.
        seconds: Duration of all.
    """

    output: Path
    top1: float
    parameters: Tuple[int, int]
    images_per_second: Tuple[float, float]
    difference: float
    time_steps: Tuple[float, ...]
    seconds: float


def _check_extra() -> None:
    missing = [package for module, package in EXTRA_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f'the demo also needs {", ".join(missing)}: pip install "timm_rep[demo]"')


def _load_own_loop() -> ModuleType:
    """Import examples/own_loop.py, which a wheel holds as timm_rep/cli/own_loop.py."""
    name = f'{__package__}.own_loop'
    path = Path(__file__).resolve().parents[2] / 'examples' / 'own_loop.py'
    spec = importlib.util.find_spec(name) or importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f'neither the module {name} nor the file {path} is there')
    own_loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own_loop)
    return own_loop


def _fresh_folder(path: Union[str, Path]) -> Path:
    """The folder itself if it is new or empty, else the first such of PATH-2, PATH-3 ..."""
    path = Path(path).resolve()
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f'{path.name}-{number}')
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            folder.mkdir(parents=True, exist_ok=True)
            return folder
    raise AssertionError('unreachable')


def _write_digits(folder: Path, seed: int, images: Optional[int]) -> None:
    """Write the digits as PNG files: folder/train/CLASS and folder/test/CLASS."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    chosen = list(range(len(digits.target)))
    if images is not None:
        chosen = train_test_split(chosen, train_size=images, stratify=digits.target, random_state=seed)[0]
    splits = train_test_split(chosen, test_size=HELD_OUT, stratify=digits.target[chosen], random_state=seed)
    for split, indices in zip(('train', 'test'), splits):
        for index in indices:
            path = folder / split / str(digits.target[index]) / f'{index:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[index] * (255 / PIXEL_MAX)).round().astype('uint8')
            Image.fromarray(pixels).save(path)


@torch.inference_mode()
def _predict(model: nn.Module, loader: Any) -> Tuple[Tensor, Tensor]:
    """Predicted and true classes."""
    model.eval()
    batches = [(model(images).argmax(1), targets) for images, targets in loader]
    predicted, targets = (torch.cat(parts) for parts in zip(*batches))
    return predicted, targets


def _reload(folder: Path, images: Path) -> Dict[str, Any]:
    """Evaluate the exported folder in a process with stock timm only."""
    command = [sys.executable, '-I', '-c', RELOAD_SCRIPT, str(folder), str(images), str(BATCH_SIZE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'stock timm does not load {folder}:\n{done.stderr}')
    return json.loads(done.stdout.splitlines()[-1])


def _draw_digits(
        figure: Any,
        files: List[str],
        predicted: Tensor,
        targets: Tensor,
        chosen: List[int],
        rows: int,
) -> None:
    from PIL import Image

    columns = 8
    for axes, index in itertools.zip_longest(figure.subplots(rows, columns).flat, chosen[:rows * columns]):
        axes.axis('off')
        if index is None:
            continue
        guess, truth = int(predicted[index]), int(targets[index])
        axes.imshow(Image.open(files[index]), cmap='gray_r')
        axes.set_title(
            str(guess) if guess == truth else f'{guess}, not {truth}',
            color='tab:green' if guess == truth else 'tab:red', fontsize=12, fontweight='bold', pad=3)


def _draw(
        path: Path,
        history: List[Dict[str, float]],
        files: List[str],
        predicted: Tensor,
        targets: Tensor,
        title: str,
        seed: int,
) -> None:
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure = plt.figure(figsize=(14, 6.8), layout='constrained', dpi=100)
    figure.suptitle(title, fontsize=16, fontweight='bold')
    left, right = cast(Any, figure.subfigures(1, 2, width_ratios=(1.2, 1)))
    sample, mistakes = left.subfigures(2, 1, height_ratios=(3, 1.2))

    generator = torch.Generator().manual_seed(seed)
    heading: Dict[str, Any] = dict(x=0.01, ha='left', fontsize=13)
    sample.suptitle('Held-out digits, drawn at random, with the prediction', **heading)
    _draw_digits(sample, files, predicted, targets, torch.randperm(len(files), generator=generator).tolist(), rows=3)
    wrong = (predicted != targets).nonzero().flatten().tolist()
    shown = ' (the first 8)' if len(wrong) > 8 else ''
    mistakes.suptitle(f'Mistakes: {len(wrong)} of {len(files)}{shown}', **heading)
    _draw_digits(mistakes, files, predicted, targets, wrong, rows=1)

    epochs = range(len(history))  # counted from 0, as by timm
    loss, accuracy, attach = right.subplots(3, 1, sharex=True, height_ratios=(1.2, 1.2, 0.7))
    for key, label in (('train_loss', 'training'), ('eval_loss', 'held-out')):
        loss.plot(epochs, [row[key] for row in history], marker='o', label=label)
    loss.set(ylabel='loss', yscale='log')
    loss.legend(frameon=False, fontsize=12, loc='lower left')
    accuracy.plot(epochs, [row['eval_top1'] for row in history], marker='o', color='tab:orange')
    accuracy.annotate(
        f'{history[-1]["eval_top1"]:.1f}%', (epochs[-1], history[-1]['eval_top1']), xytext=(0, -20),
        textcoords='offset points', ha='right', fontsize=13, fontweight='bold')
    accuracy.set(ylabel='held-out top-1 (%)', ylim=(0, 103))
    attach.plot(epochs, [row['attach_rate'] for row in history], marker='o', color='tab:purple')
    attach.set(xlabel='epoch', ylabel='attach rate', ylim=(0, 1.1))
    attach.xaxis.set_major_locator(MaxNLocator(integer=True))
    starts = [epoch for epoch, row, before in zip(epochs[1:], history[1:], history)
              if row['time_step'] != before['time_step']]
    bounds = [-0.5, *(start - 0.5 for start in starts), epochs[-1] + 0.5]
    attach.set_xlim(bounds[0], bounds[-1])
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        loss.text(
            (begin + end) / 2, 1.03, f'time step {number}', ha='center', va='bottom', fontsize=13,
            transform=loss.get_xaxis_transform())
    for axes in (loss, accuracy, attach):
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
        for bound in bounds[1:-1]:
            axes.axvline(bound, color='black', linestyle='--', linewidth=1.2)
    for bound in bounds[1:-1]:
        accuracy.annotate(
            'branches folded,\nside branches redrawn', (bound, 10), xytext=(8, 0), textcoords='offset points',
            fontsize=12)
    right.align_ylabels()
    figure.savefig(path)
    plt.close(figure)


def _table(rows: List[Tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def run_demo(
        output: Union[str, Path] = 'demo_output',
        *,
        epochs: int = EPOCHS,
        seed: int = 0,
        images: Optional[int] = None,
) -> DemoResult:
    """Train on handwritten digits, fuse, verify, export, reload with stock timm, and draw a picture of it.

    The training has two time steps (RepAn): after the first, all branches are folded and training goes on with fresh
    side branches, whose attach rate warms up again.

    Args:
        output: Folder to write to; if it exists and is not empty, the first free of OUTPUT-2, OUTPUT-3 ... is taken.
        epochs: Length of each of the two time steps.
        seed: Of the split, the initial weights and the order of the images.
        images: Take only so many images, for a quick try; all 1,797 by default.

    Returns:
        The figures that it prints at the end.

    Raises:
        ImportError: If packages of the extra ``demo`` are missing.
        VerificationError: If the fused model is not the function of its training form.
        RuntimeError: If fusing or reloading changes the accuracy.
    """
    _check_extra()
    own_loop = _load_own_loop()
    start = time.perf_counter()
    output = _fresh_folder(output)
    random_seed(seed)
    device = torch.device('cpu')

    print(f'[1/5] Writing the images of scikit-learn\'s handwritten digits to {output / "images"}')
    _write_digits(output / 'images', seed, images)
    train_set, test_set, classes = own_loop.create_datasets(output / 'images')

    print(
        f'[2/5] Training {MODEL} in {TIME_STEPS} time steps of {epochs} epochs on {len(train_set)} images; '
        f'{len(test_set)} are held out')
    model = timm.create_model(MODEL, num_classes=len(classes), pretrained_cfg_overlay=INPUT)
    train_loader, test_loader = own_loop.create_loaders(
        train_set, test_set, resolve_data_config(model=model), BATCH_SIZE, device, **AUGMENTATION)
    history = own_loop.train(
        model, train_loader, test_loader, device, epochs=epochs, time_steps=TIME_STEPS,
        attach_warmup_epochs=min(ATTACH_WARMUP_EPOCHS, epochs - 1), lr=LEARNING_RATE,
        warmup_epochs=min(WARMUP_EPOCHS, epochs - 1))
    ends = tuple(history[(step + 1) * epochs - 1]['eval_top1'] for step in range(TIME_STEPS))
    reached = ', '.join(f'{end:.2f}% after time step {step}' for step, end in enumerate(ends))
    print(f'      Held-out top-1: {reached}; in between, the branches were folded and the side branches drawn afresh')

    print('[3/5] Fusing, and comparing with the training form')
    model.eval()
    fused: Any = fuse(model)
    report = verify(model, fused)
    print(f'      {report}')
    predicted, targets = _predict(model, test_loader)
    predicted_fused, _ = _predict(fused, test_loader)
    correct, correct_fused = ((guess == targets).sum().item() for guess in (predicted, predicted_fused))
    speeds = images_per_second([model, fused], next(iter(test_loader))[0][:TIMING_BATCH], TIMING_ROUNDS)

    top1 = 100 * correct / len(targets)
    folder = output / 'resnet18.orepa_digits'
    print(f'[4/5] Exporting {folder}, and reloading it in a process that has stock timm only')
    export_folder(
        model, folder, dataset='scikit-learn digits', metrics=dict(top1=top1), tag='orepa_digits', label_names=classes)
    reloaded = _reload(folder, output / 'images')
    if not correct == correct_fused == reloaded['correct']:
        raise RuntimeError(
            f'accuracy is not kept: of {len(targets)} images the training form has {correct} right, the fused model '
            f'{correct_fused}, the reloaded one {reloaded["correct"]}'
        )

    picture = output / 'demo.png'
    print(f'[5/5] Drawing {picture}')
    parameters = [sum(p.numel() for p in form.parameters()) for form in (model, fused)]
    _draw(
        picture, history, [test_set.reader[i][0].name for i in range(len(test_set))], predicted_fused, targets,
        f'{MODEL} on handwritten digits: {top1:.1f}% top-1 before and after fusing, '
        f'{parameters[0] / 1e6:.1f} M to {parameters[1] / 1e6:.1f} M parameters', seed)

    seconds = time.perf_counter() - start
    accuracy = f'{top1:.2f}% ({correct}/{len(targets)})'
    print('\n' + _table([
        ('', 'training form', 'fused', 'reloaded by stock timm'),
        ('model', MODEL, fused.pretrained_cfg['architecture'], reloaded['model']),
        ('held-out top-1', accuracy, accuracy, accuracy),
        ('parameters', f'{parameters[0]:,}', f'{parameters[1]:,}', f'{parameters[1]:,}'),
        ('images/s', f'{speeds[0]:,.0f}', f'{speeds[1]:,.0f}', '-'),
        ('largest difference', '-', f'{report.model.relative:.1e}', '-'),
    ]))
    print(f'\nPicture: {picture}\nModel:   {folder}\nTook {seconds:.0f} s')
    return DemoResult(
        output, top1, (parameters[0], parameters[1]), (speeds[0], speeds[1]), report.model.relative, ends, seconds)
