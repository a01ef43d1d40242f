"""What training and running a model cost: times, parameters, multiply-adds."""
import platform
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Callable, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..core.errors import UserError
from ..core.precision import full_float32
from ..io.architecture import create_model
from ..models.names import TRAINING_PREFIXES
from .images import as_device

__all__ = [
    'Benchmark', 'Costs', 'StepTimes', 'TrainingStep', 'bench_models', 'hardware_name', 'images_per_second',
    'measure_costs', 'processor_name', 'ratios', 'seconds_in_turns', 'time_training_steps',
]

TIMING_ROUNDS = 7
WARMUP_STEPS = 2
# Of the papers' recipe, with a rate at which nothing diverges.
TIMING_SGD = dict(lr=1e-3, momentum=0.9, weight_decay=1e-4)
TIMING_BATCH = 8


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
    """

    parameters: Tuple[int, int]
    gmacs: Tuple[float, float]
    images_per_second: Tuple[float, float]
    batch: int
    hardware: str
    torch: str


@dataclass(frozen=True)
class StepTimes:
    """Times of a training step of one network, beside those of a baseline that took turns with it.

    Attributes:
        name: The network.
        parameters: Its number of parameters.
        seconds: Seconds of a step in each round.
        ratio: Of the medians, to the baseline.
        smallest: Smallest ratio within one round.
        largest: Largest ratio within one round.
    """

    name: str
    parameters: int
    seconds: Tuple[float, ...]
    ratio: float
    smallest: float
    largest: float


@dataclass(frozen=True)
class Benchmark:
    """Times of a training step of several networks, and what they were measured with.

    Attributes:
        models: The times; the first are those of the baseline.
        batch: Images in a batch.
        input_size: Channels, height and width of an image.
        dtype: ``'float32'``, or ``'bfloat16'`` under autocast.
        channels_last: Whether images and kernels were channels-last.
        hardware: What it was timed on.
        torch: Version of torch.
    """

    models: Tuple[StepTimes, ...]
    batch: int
    input_size: Tuple[int, ...]
    dtype: str
    channels_last: bool
    hardware: str
    torch: str

    def __str__(self) -> str:
        space = max(len(row.name) for row in self.models)
        lines = [
            f'A training step of {self.batch} images of {"x".join(map(str, self.input_size))}, {self.dtype}, on '
            f'{self.hardware}, torch {self.torch}:',
            f'{"":{space}}  {"ms":>9}  {"ratio":>21}  {"parameters":>10}',
        ]
        for row in self.models:
            ratio = f'{row.ratio:.2f} ({row.smallest:.2f} to {row.largest:.2f})'
            lines.append(
                f'{row.name:{space}}  {1e3 * median(row.seconds):9.1f}  {ratio:>21}  {row.parameters / 1e6:9.2f}M')
        return '\n'.join(lines)


def processor_name() -> str:
    """Name of the processor, as far as the system tells it."""
    info = Path('/proc/cpuinfo')
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(':')
            if key.strip() == 'model name':
                return value.strip()
    return platform.processor() or platform.machine()


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


def _seconds_of(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of one call, the mean of some in a row."""
    synchronize = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeats


def seconds_in_turns(
        calls: Sequence[Callable[[], Any]],
        device: torch.device,
        *,
        rounds: int,
        warmup: int = 1,
        repeats: int = 1,
) -> List[Tuple[float, ...]]:
    """Time calls in turns (A B C A B C ...), so that a slow minute of the machine hits all of them.

    Args:
        calls: What to time.
        device: Where it computes.
        rounds: How often each is timed.
        warmup: Calls of each before that.
        repeats: Calls in a row whose mean is one time.

    Returns:
        For each call its seconds in every round.
    """
    for call in calls:
        _seconds_of(call, device, warmup)
    return list(zip(*([_seconds_of(call, device, repeats) for call in calls] for _ in range(rounds))))


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
    seconds = seconds_in_turns([partial(model, images) for model in models], images.device, rounds=rounds)
    return [len(images) / median(measured) for measured in seconds]


class TrainingStep:
    """One SGD step of a model, always on the same batch: zero the gradients, forward, loss, backward, update.

    Args:
        model: The model; put into training mode, and trained.
        images: The batch, on the model's device.
        targets: Its classes.
        autocast: Compute in this dtype under autocast.
        **sgd: Arguments of ``torch.optim.SGD`` besides those of :data:`TIMING_SGD`.
    """

    def __init__(
            self,
            model: nn.Module,
            images: torch.Tensor,
            targets: torch.Tensor,
            autocast: Optional[torch.dtype] = None,
            **sgd: Any,
    ) -> None:
        self.model = model.train()
        self.images, self.targets, self.autocast = images, targets, autocast
        self.optimizer = torch.optim.SGD(model.parameters(), **dict(TIMING_SGD, **sgd))

    def __call__(self) -> None:
        """Take the step."""
        self.optimizer.zero_grad()
        with torch.autocast(self.images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            loss = F.cross_entropy(self.model(self.images), self.targets)
        loss.backward()
        self.optimizer.step()


def time_training_steps(
        models: Mapping[str, nn.Module],
        input_size: Sequence[int],
        *,
        batch: int = TIMING_BATCH,
        rounds: int = TIMING_ROUNDS,
        repeats: int = 1,
        device: Union[str, torch.device] = 'cpu',
        amp: bool = False,
        channels_last: bool = False,
) -> Benchmark:
    """Time a training step of several classifiers in turns, on random images.

    Args:
        models: The models by name; the first is the baseline. They are moved to the device, and trained.
        input_size: Channels, height and width of an image.
        batch: Images in a batch.
        rounds: How often each takes its turn, after a warm-up.
        repeats: Steps in a row whose mean is one time; take some 10 on a GPU.
        device: Where to time.
        amp: Compute in bfloat16 under autocast.
        channels_last: Keep images and kernels channels-last.

    Returns:
        The times. As text it is a table.

    Raises:
        UserError: If a number is less than one, a model has no classifier, or torch has no such device.
    """
    numbers = (('batch', batch), ('rounds', rounds), ('repeats', repeats), ('input_size', min(input_size)))
    for name, value in numbers:
        if value < 1:
            raise UserError(f'{name} must be at least 1, got {value}')
    device = as_device(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *input_size, generator=generator).to(device, memory_format=layout)
    steps = []
    for name, model in models.items():
        classes = int(getattr(model, 'num_classes', 0))
        if classes < 1:
            raise UserError(f'{name} has no classifier to train')
        targets = torch.randint(classes, (batch,), generator=generator).to(device)
        moved: Any = model.to(device)
        steps.append(TrainingStep(moved.to(memory_format=layout), images, targets, torch.bfloat16 if amp else None))
    seconds = seconds_in_turns(steps, device, rounds=rounds, warmup=WARMUP_STEPS, repeats=repeats)
    times = tuple(
        StepTimes(name, sum(p.numel() for p in model.parameters()), own, *ratios(own, seconds[0]))
        for (name, model), own in zip(models.items(), seconds)
    )
    return Benchmark(
        times, batch, tuple(input_size), 'bfloat16' if amp else 'float32', channels_last, hardware_name(device),
        torch.__version__)


def bench_models(
        architectures: Sequence[str],
        *,
        model_kwargs: Optional[Mapping[str, Any]] = None,
        img_size: Optional[int] = None,
        **timing: Any,
) -> Benchmark:
    """Time a training step of models against the stock form of the first.

    Args:
        architectures: Names of the models; a first one that is not ours is the baseline as it is.
        model_kwargs: Arguments of all of them.
        img_size: Height and width of the images; by default those of the first model.
        **timing: As in :func:`time_training_steps`.

    Returns:
        The times. As text it is a table.

    Raises:
        UserError: For an unknown model, or as in :func:`time_training_steps`.
    """
    first, *_ = architectures
    model_kwargs, own = dict(model_kwargs or {}), first.startswith(TRAINING_PREFIXES)
    baseline: Any = create_model(first, **model_kwargs, **(dict(inference_mode=True) if own else {}))
    models = {f'{first} (stock form)' if own else first: baseline}
    models.update((name, create_model(name, **model_kwargs)) for name in architectures if name not in models)
    channels, height, width = baseline.pretrained_cfg['input_size']
    if img_size is not None:
        height = width = img_size
    return time_training_steps(models, (model_kwargs.get('in_chans', channels), height, width), **timing)


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
    images = torch.randn(batch, *input_size, generator=generator).to(device, next(fused.parameters()).dtype)
    parameters, gmacs = zip(*((sum(p.numel() for p in form.parameters()), _gmacs(form, images[:1])) for form in forms))
    with full_float32():
        speeds = images_per_second(forms, images)
    return Costs(
        (parameters[0], parameters[1]), (gmacs[0], gmacs[1]), (speeds[0], speeds[1]), batch, hardware_name(device),
        torch.__version__)
