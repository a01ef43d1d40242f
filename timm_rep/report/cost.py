"""What training and running a model cost: times, parameters, multiply-adds."""
import platform
import re
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.benchmark import timer  # waits for the GPU
from torch.utils.flop_counter import FlopCounterMode

from ..core.capture import capture, linear_layers
from ..core.errors import UserError
from ..core.micro_batch import micro_batch
from ..core.precision import full_float32
from ..io.architecture import create_model
from ..models.names import TRAINING_PREFIXES
from .images import as_device

__all__ = [
    'Costs', 'TrainingStep', 'bench_models', 'hardware_name', 'images_per_second', 'measure_costs', 'processor_name',
    'ratios', 'seconds_in_turns',
]

TIMING_ROUNDS = 7
WARMUP_STEPS = 2
# Of the papers' recipe, with a rate at which nothing diverges.
TIMING_SGD = dict(lr=1e-3, momentum=0.9, weight_decay=1e-4)
TIMING_BATCH, TIMING_PIXELS = 8, 224 * 224
MOST_TIMED = 128


@dataclass(frozen=True)
class Costs:
    """Costs of the training form and of the stock form, each in this order.

    Attributes:
        parameters: Number of parameters.
        gmacs: Billions of multiply-adds of convolutions and matrix products for one image, in eval mode.
        images_per_second: In eval mode, median of several rounds.
        batch: Images in a batch of the timing.
        hardware: What it was timed on.
        torch: Version of torch.
        dtype: What it was timed in.
    """

    parameters: Tuple[int, int]
    gmacs: Tuple[float, float]
    images_per_second: Tuple[float, float]
    batch: int
    hardware: str
    torch: str
    dtype: str


def processor_name() -> str:
    """Name of the processor, as far as the system tells it."""
    info = Path('/proc/cpuinfo')
    named = re.search(r'^model name\s*:\s*(.+)$', info.read_text(), re.MULTILINE) if info.is_file() else None
    return named[1] if named else platform.processor() or platform.machine()


def hardware_name(device: Union[str, torch.device] = 'cpu') -> str:
    """Name of what a device is, for a statement of speed.

    Args:
        device: The device.

    Returns:
        Name of the GPU; or of the processor, with the number of threads that torch uses.
    """
    device = torch.device(device)
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type != 'cpu':
        return device.type
    threads = torch.get_num_threads()
    return f'{processor_name()}, {threads} thread{"s" if threads != 1 else ""}'


def _seconds_of(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of one call, the mean of some in a row."""
    start = timer()
    for _ in range(repeats):
        call()
    return (timer() - start) / repeats


def seconds_in_turns(
        calls: Sequence[Callable[[], Any]],
        *,
        rounds: int,
        warmup: int = 1,
        repeats: int = 1,
) -> List[Tuple[float, ...]]:
    """Time calls in turns (A B C A B C ...), so that a slow minute of the machine hits all of them.

    Args:
        calls: What to time.
        rounds: How often each is timed.
        warmup: Calls of each before that.
        repeats: Calls in a row whose mean is one time.

    Returns:
        For each call its seconds in every round.
    """
    for call in calls:
        _seconds_of(call, warmup)
    return list(zip(*([_seconds_of(call, repeats) for call in calls] for _ in range(rounds))))


def ratios(seconds: Sequence[float], baseline: Sequence[float]) -> Tuple[float, float, float]:
    """Compare times that were taken in turns: ratio of the medians, smallest and largest ratio within one round."""
    by_round = [time / base for time, base in zip(seconds, baseline)]
    return median(seconds) / median(baseline), min(by_round), max(by_round)


@torch.inference_mode()
def images_per_second(models: Sequence[nn.Module], images: torch.Tensor, rounds: int = TIMING_ROUNDS) -> List[float]:
    """Median throughput of each model, in turns, so that a busy machine hits all alike.

    Args:
        models: Models in eval mode.
        images: One batch, on the models' device.
        rounds: How often each model runs; once more before that to warm up.

    Returns:
        Images per second of each.
    """
    seconds = seconds_in_turns([partial(model, images) for model in models], rounds=rounds)
    return [len(images) / median(measured) for measured in seconds]


class TrainingStep:
    """One SGD step of a model, always on the same batch: zero the gradients, forward, loss, backward, update.

    Args:
        model: The model; put into training mode, and trained.
        images: The batch, on the model's device.
        targets: Its classes.
        autocast: Compute in this dtype under autocast.
        micro_batches: Accumulate gradients over this many, each of them this batch.
        composed_once: Whether these share the kernels of linear layers.
        **sgd: Arguments of ``torch.optim.SGD`` besides those of :data:`TIMING_SGD`.
    """

    def __init__(
            self,
            model: nn.Module,
            images: torch.Tensor,
            targets: torch.Tensor,
            autocast: Optional[torch.dtype] = None,
            micro_batches: int = 1,
            composed_once: bool = True,
            **sgd: Any,
    ) -> None:
        self.model = model.train()
        self.images, self.targets, self.autocast = images, targets, autocast
        self.micro_batches, self.composed_once = micro_batches, composed_once and micro_batches > 1
        self.optimizer = torch.optim.SGD(model.parameters(), **dict(TIMING_SGD, **sgd))

    def __call__(self) -> None:
        """Take the step."""
        self.optimizer.zero_grad()
        for number in range(1, self.micro_batches + 1):
            last = number == self.micro_batches
            with micro_batch(self.model, last) if self.composed_once else nullcontext():
                with torch.autocast(self.images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                    loss = F.cross_entropy(self.model(self.images), self.targets)
                (loss / self.micro_batches).backward()
        self.optimizer.step()


def bench_models(
        architectures: Sequence[str],
        *,
        model_kwargs: Optional[Mapping[str, Any]] = None,
        img_size: Optional[int] = None,
        batch: Optional[int] = None,
        rounds: int = TIMING_ROUNDS,
        repeats: int = 1,
        device: Union[str, torch.device] = 'cpu',
        amp: bool = False,
        channels_last: bool = False,
) -> Dict[str, Any]:
    """Time a training step of models against the stock form of the first, in turns, on random images.

    On a GPU the kernels of linear layers are composed as one CUDA graph, as ``timm-rep train`` does it.

    Args:
        architectures: Names of the models; a first one that is not ours is the baseline as it is.
        model_kwargs: Arguments of all of them.
        img_size: Height and width of the images; by default those of the first model.
        batch: Images in a batch; by default as many as have the pixels of 8 images of 224x224, from 8 to 128: what rep
            layers add to a step does not depend on the batch, so a small one of small images shows nothing else.
        rounds: How often each takes its turn, after a warm-up.
        repeats: Steps in a row whose mean is one time; take some 10 on a GPU.
        device: Where to time.
        amp: Compute in bfloat16 under autocast.
        channels_last: Keep images and kernels channels-last.

    Returns:
        ``models``, the baseline first, and what they were timed with. A model has its ``name``, ``parameters``, the
        ``seconds`` of a step in each round and their ``median``, the ``ratio`` of the medians to the baseline, and the
        ``smallest`` and ``largest`` ratio within one round.

    Raises:
        UserError: For an unknown model, one without a classifier or that cannot be trained on such a batch, or if torch
            has no such device.
    """
    device = as_device(device)
    first, *_ = architectures
    model_kwargs, own = dict(model_kwargs or {}), first.startswith(TRAINING_PREFIXES)
    baseline: Any = create_model(first, **model_kwargs, **(dict(inference_mode=True) if own else {}))
    models: Dict[str, Any] = {f'{first} (stock form)' if own else first: baseline}
    models.update((name, create_model(name, **model_kwargs)) for name in architectures if name not in models)
    for name, model in models.items():
        if getattr(model, 'num_classes', 0) < 1:
            raise UserError(f'{name} has no classifier with {model_kwargs}, so there is no loss to train it by')
    channels, height, width = baseline.pretrained_cfg['input_size']
    input_size = (model_kwargs.get('in_chans', channels), img_size or height, img_size or width)

    if batch is None:
        batch = min(max(TIMING_BATCH * TIMING_PIXELS // (input_size[1] * input_size[2]), TIMING_BATCH), MOST_TIMED)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randn(batch, *input_size).to(device, memory_format=layout)
    targets = torch.randint(min(model.num_classes for model in models.values()), (batch,), device=device)
    for model in models.values():
        model.to(device, memory_format=layout)
        if device.type == 'cuda' and linear_layers(model):
            capture(model)
    steps = [TrainingStep(model, images, targets, torch.bfloat16 if amp else None) for model in models.values()]
    for name, step in zip(models, steps):
        try:
            step()
        except (RuntimeError, ValueError) as error:
            size = 'x'.join(map(str, input_size))
            raise UserError(f'{name} cannot be trained on a batch of {batch} images of {size}: {error}') from error
    seconds = seconds_in_turns(steps, rounds=rounds, warmup=WARMUP_STEPS - 1, repeats=repeats)
    rows = []
    for (name, model), own_seconds in zip(models.items(), seconds):
        ratio, smallest, largest = ratios(own_seconds, seconds[0])
        rows.append(dict(
            name=name, parameters=sum(p.numel() for p in model.parameters()), seconds=own_seconds,
            median=median(own_seconds), ratio=ratio, smallest=smallest, largest=largest))
    return dict(
        models=rows, batch=batch, input_size=input_size, dtype='bfloat16' if amp else 'float32',
        channels_last=channels_last, hardware=hardware_name(device), torch=torch.__version__)


@torch.inference_mode()
def _gmacs(model: nn.Module, image: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() / 2e9


def measure_costs(
        model: nn.Module,
        fused: nn.Module,
        input_size: Sequence[int],
        *,
        batch: int = TIMING_BATCH,
        device: Union[str, torch.device] = 'cpu',
) -> Costs:
    """Measure what both forms of a model cost.

    Args:
        model: Training form, in eval mode; moved to the device.
        fused: Stock form, in eval mode; moved to the device.
        input_size: Channels, height and width of an image.
        batch: Images in a batch of the timing.
        device: Where to time.

    Returns:
        The costs.
    """
    device = as_device(device)
    forms = [form.to(device) for form in (model, fused)]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *input_size, generator=generator, device='cpu')
    images = images.to(device, next(fused.parameters()).dtype)
    parameters, gmacs = zip(*((sum(p.numel() for p in form.parameters()), _gmacs(form, images[:1])) for form in forms))
    with full_float32():
        speeds = images_per_second(forms, images)
    return Costs(
        (parameters[0], parameters[1]), (gmacs[0], gmacs[1]), (speeds[0], speeds[1]), batch, hardware_name(device),
        torch.__version__, str(images.dtype).removeprefix('torch.'))
