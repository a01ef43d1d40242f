"""The whole way on a CPU in minutes: anneal on handwritten digits, fuse, verify, export, reload with stock timm."""
import importlib.util
import itertools
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Optional, Union

import timm
import torch
from timm.data import resolve_data_config
from timm.utils import random_seed

from ..core.fuse import fuse
from ..core.verify import VerificationError, verify
from ..hub.export import export_folder
from ..io.extras import require_extra
from ..report.cost import images_per_second
from ..report.plots import draw_annealing
from .output import say

__all__ = ['run_demo']

EXTRA_PACKAGES = ('sklearn', 'matplotlib', 'tqdm')
MODEL = 'orepa_resnet18'
# Digits of 8x8 pixels, scaled up: a ResNet divides its input by 32.
INPUT = dict(input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)
# A mirrored digit is another sign.
AUGMENTATION = dict(scale=(0.7, 1.0), ratio=(0.8, 1.25), hflip=0.0, color_jitter=None)
HELD_OUT = 0.25
PIXEL_MAX = 16  # scikit-learn's digits count dots
SEED = 0
TIME_STEPS = 2
EPOCHS = 7  # of a time step
ATTACH_WARMUP_EPOCHS = 2  # of each time step
WARMUP_EPOCHS = 1  # of the learning rate, in the first time step
BATCH_SIZE = 96
LEARNING_RATE = 0.1
TIMING_BATCH = 32

# Runs in a process of its own, where this package cannot be imported.
RELOAD_SCRIPT = """
import sys

sys.modules['timm_rep'] = None

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config

folder, images = sys.argv[1:]
model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
classes = {name: index for index, name in enumerate(model.pretrained_cfg['label_names'])}
loader = create_loader(
    create_dataset('', root=images, split='test', class_map=classes), batch_size=96, num_workers=0,
    persistent_workers=False, use_prefetcher=False, device=torch.device('cpu'), **resolve_data_config(model=model))
with torch.inference_mode():
    print(sum((model(inputs).argmax(1) == targets).sum().item() for inputs, targets in loader))
"""


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


def _write_digits(folder: Path, images: Optional[int]) -> None:
    """Write the digits as PNG files: folder/train/CLASS and folder/test/CLASS."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    chosen = list(range(len(digits.target)))
    if images is not None:
        chosen = train_test_split(chosen, train_size=images, stratify=digits.target, random_state=SEED)[0]
    splits = train_test_split(chosen, test_size=HELD_OUT, stratify=digits.target[chosen], random_state=SEED)
    for split, indices in zip(('train', 'test'), splits):
        for index in indices:
            path = folder / split / str(digits.target[index]) / f'{index:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[index] * (255 / PIXEL_MAX)).round().astype('uint8')
            Image.fromarray(pixels).save(path)


def _reload(folder: Path, images: Path) -> int:
    """How many held-out images the exported folder has right in a process with stock timm only."""
    command = [sys.executable, '-I', '-c', RELOAD_SCRIPT, str(folder), str(images)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise VerificationError(f'stock timm does not load {folder}:\n{done.stderr}')
    return int(done.stdout.splitlines()[-1])


def run_demo(
        output: Union[str, Path] = 'demo_output',
        *,
        epochs: int = EPOCHS,
        images: Optional[int] = None,
) -> Dict[str, Any]:
    """Train on handwritten digits, fuse, verify, export, reload with stock timm, and draw the training.

    The training has two time steps (RepAn): after the first, all branches are folded and training goes on with fresh
    side branches, whose attach rate warms up again.

    Args:
        output: Folder to write to; if it exists and is not empty, the first free of OUTPUT-2, OUTPUT-3 ... is taken.
        epochs: Length of each of the two time steps.
        images: Take only so many images, for a quick try; all 1,797 by default.

    Returns:
        What it measured: ``output``, ``top1`` (the same for all three forms), ``parameters`` and ``images_per_second``
        of the training form and the fused model, and their largest relative ``difference``.

    Raises:
        UserError: If packages of the extra ``demo`` are missing.
        VerificationError: If the fused model is not the function of its training form, or does not keep its accuracy.
    """
    require_extra('the demo', 'demo', EXTRA_PACKAGES)
    own_loop = _load_own_loop()
    start, device = time.perf_counter(), torch.device('cpu')
    output = _fresh_folder(output)
    random_seed(SEED)

    say(f"[1/5] Writing the images of scikit-learn's handwritten digits to {output / 'images'}")
    _write_digits(output / 'images', images)
    train_set, test_set, classes = own_loop.create_datasets(output / 'images')

    say(f'[2/5] Training {MODEL} in {TIME_STEPS} time steps of {epochs} epochs on {len(train_set)} images')
    model: Any = timm.create_model(MODEL, num_classes=len(classes), pretrained_cfg_overlay=INPUT)
    annealer = own_loop.create_annealer(
        model, epochs=epochs, time_steps=TIME_STEPS, attach_warmup_epochs=min(ATTACH_WARMUP_EPOCHS, epochs - 1),
        lr=LEARNING_RATE, seed=SEED)
    train_loader, test_loader = own_loop.create_loaders(
        train_set, test_set, resolve_data_config(model=model), BATCH_SIZE, device, **AUGMENTATION)
    history = own_loop.train(
        model, annealer, train_loader, test_loader, device, warmup_epochs=min(WARMUP_EPOCHS, epochs - 1))
    draw_annealing(history, f'{MODEL} on handwritten digits').savefig(output / 'annealing.png')

    say('[3/5] Fusing, and comparing with the training form')
    fused: Any = fuse(model.eval())
    report = verify(model, fused)
    say(f'      {report}')
    top1, fused_top1 = (own_loop.evaluate(form, test_loader, device)[1] for form in (model, fused))
    parameters = [sum(p.numel() for p in form.parameters()) for form in (model, fused)]
    speeds = images_per_second([model, fused], next(iter(test_loader))[0][:TIMING_BATCH])

    folder = output / 'resnet18.orepa_digits'
    say(f'[4/5] Exporting {folder}')
    export_folder(
        model, folder, dataset='scikit-learn digits', metrics=dict(top1=top1), tag='orepa_digits', label_names=classes)

    say('[5/5] Reloading it in a process that has stock timm only')
    reloaded_top1 = 100 * _reload(folder, output / 'images') / len(test_set)
    top1s = [f'{value:.4f}' for value in (top1, fused_top1, reloaded_top1)]
    if len(set(top1s)) > 1:
        raise VerificationError(f'top-1 of the training form, fused and reloaded is not the same: {", ".join(top1s)}')
    say(
        f'\nHeld-out top-1 of the training form, fused and reloaded by stock timm: {top1:.2f}%\n'
        f'Fused: {parameters[0]:,} -> {parameters[1]:,} parameters, {speeds[0]:,.0f} -> {speeds[1]:,.0f} images/s\n'
        f'Picture: {output / "annealing.png"}\nModel:   {folder}\nTook {time.perf_counter() - start:.0f} s')
    return dict(
        output=output, top1=top1, parameters=parameters, images_per_second=speeds, difference=report.model.relative)
