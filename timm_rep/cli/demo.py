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
from typing import Any, Dict, List, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.utils import random_seed
from torch import Tensor

from ..core.fuse import fuse
from ..core.verify import VerificationError, verify
from ..hub.export import export_folder
from ..io.extras import require_extra
from ..report.cost import images_per_second
from ..report.plots import draw_annealing

__all__ = ['DemoResult', 'run_demo']

EXTRA_PACKAGES = ('sklearn', 'matplotlib', 'tqdm')
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
        raise VerificationError(f'stock timm does not load {folder}:\n{done.stderr}')
    return json.loads(done.stdout.splitlines()[-1])


def _draw_digits(title: str, files: List[str], predicted: Tensor, targets: Tensor, chosen: List[int]) -> Any:
    """A figure of the first chosen images with their predictions."""
    from matplotlib.figure import Figure  # an extra
    from PIL import Image

    rows, columns = 4, 8
    figure = Figure(figsize=(10, 7), layout='constrained', dpi=100)
    figure.suptitle(title, fontsize=15, fontweight='bold')
    for axes, index in itertools.zip_longest(figure.subplots(rows, columns).flat, chosen[:rows * columns]):
        axes.axis('off')
        if index is None:
            continue
        guess, truth = int(predicted[index]), int(targets[index])
        axes.imshow(Image.open(files[index]), cmap='gray_r')
        axes.set_title(
            str(guess) if guess == truth else f'{guess}, not {truth}',
            color='tab:green' if guess == truth else 'tab:red', fontsize=12, fontweight='bold', pad=3)
    return figure


def _table(rows: List[Tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _train(
        own_loop: ModuleType,
        images: Path,
        epochs: int,
        seed: int,
) -> Tuple[Any, Any, List[str], List[Dict[str, Any]]]:
    """The trained model, its held-out images, the names of the classes, and figures of every epoch."""
    device = torch.device('cpu')
    train_set, test_set, classes = own_loop.create_datasets(images)
    print(
        f'[2/5] Training {MODEL} in {TIME_STEPS} time steps of {epochs} epochs on {len(train_set)} images; '
        f'{len(test_set)} are held out')
    model = timm.create_model(MODEL, num_classes=len(classes), pretrained_cfg_overlay=INPUT)
    annealer = own_loop.create_annealer(
        model, epochs=epochs, time_steps=TIME_STEPS, attach_warmup_epochs=min(ATTACH_WARMUP_EPOCHS, epochs - 1),
        lr=LEARNING_RATE, seed=seed)
    train_loader, test_loader = own_loop.create_loaders(
        train_set, test_set, resolve_data_config(model=model), BATCH_SIZE, device, **AUGMENTATION)
    history = own_loop.train(
        model, annealer, train_loader, test_loader, device, warmup_epochs=min(WARMUP_EPOCHS, epochs - 1))
    return model.eval(), test_loader, classes, history


def _draw(output: Path, history: List[Dict[str, Any]], test_loader: Any, predicted: Tensor, targets: Tensor) -> None:
    reader = test_loader.dataset.reader
    files = [reader[index][0].name for index in range(len(targets))]
    wrong = (predicted != targets).nonzero().flatten().tolist()
    right = (predicted == targets).nonzero().flatten()
    drawn = right[torch.randperm(len(right), generator=torch.Generator().manual_seed(0))].tolist()
    title = f'Held-out digits with the prediction: {len(wrong)} of {len(files)} are wrong'
    _draw_digits(title, files, predicted, targets, [*wrong[:8], *drawn]).savefig(output / 'digits.png')
    draw_annealing(history, f'{MODEL} on handwritten digits').savefig(output / 'annealing.png')


def run_demo(
        output: Union[str, Path] = 'demo_output',
        *,
        epochs: int = EPOCHS,
        seed: int = 0,
        images: Optional[int] = None,
) -> DemoResult:
    """Train on handwritten digits, fuse, verify, export, reload with stock timm, and draw pictures of it.

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
        UserError: If packages of the extra ``demo`` are missing.
        VerificationError: If the fused model is not the function of its training form, or does not keep its accuracy.
    """
    require_extra('the demo', 'demo', EXTRA_PACKAGES)
    own_loop = _load_own_loop()
    start = time.perf_counter()
    output = _fresh_folder(output)
    random_seed(seed)

    print(f'[1/5] Writing the images of scikit-learn\'s handwritten digits to {output / "images"}')
    _write_digits(output / 'images', seed, images)
    model, test_loader, classes, history = _train(own_loop, output / 'images', epochs, seed)
    ends = tuple(history[step * epochs - 1]['eval_top1'] for step in range(1, TIME_STEPS + 1))
    reached = ', '.join(f'{end:.2f}% after time step {step}' for step, end in enumerate(ends, start=1))
    print(f'      Held-out top-1: {reached}; in between, the branches were folded and the side branches drawn afresh')

    print('[3/5] Fusing, and comparing with the training form')
    fused: Any = fuse(model)
    report = verify(model, fused)
    print(f'      {report}')
    predicted, targets = _predict(fused, test_loader)
    fused_correct = (predicted == targets).sum().item()
    correct = (_predict(model, test_loader)[0] == targets).sum().item()
    speeds = images_per_second([model, fused], next(iter(test_loader))[0][:TIMING_BATCH], TIMING_ROUNDS)

    top1 = 100 * correct / len(targets)
    folder = output / 'resnet18.orepa_digits'
    print(f'[4/5] Exporting {folder}, and reloading it in a process that has stock timm only')
    export_folder(
        model, folder, dataset='scikit-learn digits', metrics=dict(top1=top1), tag='orepa_digits', label_names=classes)
    reloaded = _reload(folder, output / 'images')
    if not correct == fused_correct == reloaded['correct']:
        raise VerificationError(
            f'accuracy is not kept: of {len(targets)} images the training form has {correct} right, the fused model '
            f'{fused_correct}, the reloaded one {reloaded["correct"]}'
        )

    print(f'[5/5] Drawing {output / "digits.png"} and {output / "annealing.png"}')
    _draw(output, history, test_loader, predicted, targets)
    parameters = (sum(p.numel() for p in model.parameters()), sum(p.numel() for p in fused.parameters()))
    result = DemoResult(
        output, top1, parameters, (speeds[0], speeds[1]), report.model.relative, ends, time.perf_counter() - start)
    _print_result(result, fused.pretrained_cfg['architecture'], reloaded['model'], f'({correct}/{len(targets)})')
    print(f'\nPictures: {output}\nModel:    {folder}\nTook {result.seconds:.0f} s')
    return result


def _print_result(result: DemoResult, stock: str, reloaded: str, count: str) -> None:
    accuracy = f'{result.top1:.2f}% {count}'
    trained, fused = (f'{number:,}' for number in result.parameters)
    print('\n' + _table([
        ('', 'training form', 'fused', 'reloaded by stock timm'),
        ('model', MODEL, stock, reloaded),
        ('held-out top-1', accuracy, accuracy, accuracy),
        ('parameters', trained, fused, fused),
        ('images/s', *(f'{speed:,.0f}' for speed in result.images_per_second), '-'),
        ('largest difference', '-', f'{result.difference:.1e}', '-'),
    ]))
