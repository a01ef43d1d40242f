"""One run: a network in one form, trained from one seed at one learning rate."""
import itertools
import math
import platform
import statistics
import time
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from data import normalized, padded, train_batches
from network import build
from timm.optim import create_optimizer_v2

import timm_rep
from timm_rep.report.cost import hardware_name

EVAL_BATCH_SIZE = 500


class Run(NamedTuple):
    """What tells one run from another. Of the grid, it is measured on images set aside, else on the test images."""

    form: str
    lr: float
    epochs: float
    seed: int
    grid: bool = False

    @property
    def name(self):
        return f"{'grid-' if self.grid else ''}{self.form}-lr{self.lr:g}-epochs{self.epochs:g}-seed{self.seed}"

    @property
    def file(self):
        return f'{self.name}.json'


def rate_factor(step, steps, warmup):
    """Share of the highest learning rate: up in a line for a share of all steps, then down in half a cosine to 0."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def seconds_used(device):
    """A clock of what this process computed; with several on one machine, wall time says little."""
    if device.type == 'cuda':
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@torch.inference_mode()
def evaluate(model, images, amp):
    """Mean cross entropy, and top-1 accuracy in percent."""
    model.eval()
    device = images.pixels.device
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        output = torch.cat([model(normalized(part)) for part in images.pixels.split(EVAL_BATCH_SIZE)]).float()
    right = output.argmax(1) == images.targets
    return F.cross_entropy(output, images.targets).item(), 100 * right.float().mean().item()


@torch.inference_mode()
def fused_difference(model, fused, pixels):
    """How far the outputs of two networks are apart in float32, relative to the largest."""
    x = normalized(pixels)
    expected = model.eval()(x)
    return ((fused.eval()(x) - expected).abs().max() / expected.abs().max()).item()


class GraphedGradients:
    """What makes gradients, as a CUDA graph: captured at the second step after :meth:`forget`, replayed from then on.

    Args:
        make: Makes gradients of batches of one size, where there are none, and returns a loss.
        model: Whose parameters have them.
    """

    def __init__(self, make, model):
        self.make, self.parameters = make, list(model.parameters())
        self.stream = torch.cuda.Stream()
        self.forget()

    def forget(self):
        """Let go of the graph: modules or what they do may have changed."""
        self.warm, self.graph = False, None

    def __call__(self, *batch):
        if not self.warm:
            self.warm = True
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.make(*batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.graph is None:
            self.batch = [tensor.clone() for tensor in batch]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.loss = self.make(*self.batch)
            self.made = [parameter.grad for parameter in self.parameters]
        for tensor, new in zip(self.batch, batch):
            tensor.copy_(new)
        for parameter, gradient in zip(self.parameters, self.made):  # a hook may have dropped some
            parameter.grad = gradient
        self.graph.replay()
        return self.loss.clone()


class Trainer:
    """A network in one form with its optimizer; `step` is one step.

    Args:
        distillation: Makes the loss of images, output and cross entropy, with a teacher; None: the cross entropy is it.
    """

    def __init__(self, run, settings, stem, device, execution='eager', distillation=None):
        self.model = build(settings['network'], run.form, run.seed, stem, settings['data']['classes']).to(device)
        self.forward = torch.compile(self.model) if execution == 'compiled' else self.model
        self.optimizer = create_optimizer_v2(
            self.model, opt='sgd', lr=run.lr, momentum=settings['momentum'], weight_decay=settings['weight_decay'])
        self.lr, self.amp, self.distillation = run.lr, settings['amp'], distillation
        self.graphed = GraphedGradients(self.gradients, self.model) if execution == 'graphed' else None

    def gradients(self, x, targets):
        """Make the gradients of a step; its cross entropy."""
        self.optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            output = self.forward(x)
            cross_entropy = F.cross_entropy(output, targets)
            loss = self.distillation(x, output, cross_entropy) if self.distillation else cross_entropy
        loss.backward()
        return cross_entropy.detach()

    def step(self, x, targets, factor):
        """A step at a share of the highest learning rate; its cross entropy, which does not wait for the device."""
        for group in self.optimizer.param_groups:
            group['lr'] = self.lr * factor
        cross_entropy = (self.graphed or self.gradients)(x, targets)
        self.optimizer.step()
        return cross_entropy

    def epoch(self, batches, factors, eval_images):
        """A step with each batch, as long as there are factors, and what the fused network then does.

        Returns:
            A row of the run's file, the losses of the steps, and the fused network.
        """
        device = eval_images.pixels.device
        used, wall = seconds_used(device), time.perf_counter()
        self.model.train()
        if self.graphed:
            self.graphed.forget()
        losses = torch.stack([self.step(x, targets, factor) for factor, (x, targets) in zip(factors, batches)])
        train_loss = losses.mean().item()  # waits for the device
        used, wall = seconds_used(device) - used, time.perf_counter() - wall
        fused = timm_rep.fuse(self.model.eval())
        loss, top1 = evaluate(fused, eval_images, self.amp)
        diverged = not math.isfinite(train_loss)
        row = dict(
            train_loss=None if diverged else train_loss, loss=None if diverged else loss, top1=round(top1, 4),
            seconds=round(used, 2), wall_seconds=round(wall, 2))
        return row, losses.tolist(), fused


def descend(name, trainer, settings, epochs, images, eval_images, generator):
    """One descent of the learning rate: the rows of its epochs, the fused network, the losses of the last epoch."""
    per_epoch = len(images.targets) // settings['batch_size']
    steps, done, rows = round(epochs * per_epoch), 0, []
    while done < steps:
        batches = train_batches(images, settings['batch_size'], generator)
        part = range(done, min(done + per_epoch, steps))
        row, losses, fused = trainer.epoch(
            batches, [rate_factor(step, steps, settings['warmup']) for step in part], eval_images)
        done += len(part)
        rows.append(dict(steps=done, **row))
        tell(name, f'{done}/{steps}', row)
        if row['train_loss'] is None:
            break
    return rows, fused, losses


def tell(name, where, row):
    print(f"{name}: {where}, train loss {row['train_loss'] or math.nan:.3f}, top-1 {row['top1']:.2f}, "
          f"{row['seconds']:.0f} s", flush=True)


@torch.no_grad()
def similarities(model):
    """Cosines between the kernels of each layer's branches, and their mean; kernels of zeros have none."""
    found = []
    for depth, (_, layer) in enumerate(timm_rep.rep_layers(model)):
        kernels = {branch: kernel.flatten().double() for branch, kernel in layer.branch_kernels().items()}
        pairs = {
            f'{a} {b}': round(torch.cosine_similarity(kernels[a], kernels[b], 0).item(), 4)
            for a, b in itertools.combinations([name for name, kernel in kernels.items() if kernel.any()], 2)}
        found.append(dict(depth=depth, pairs=pairs, mean=round(statistics.fmean(pairs.values()), 4) if pairs else None))
    return found


def result(run, model, fused, rows, settings, eval_images):
    """What every run's file holds."""
    return dict(
        run._asdict(), top1=rows[-1]['top1'], diverged=rows[-1]['train_loss'] is None, rows=rows,
        fused_difference=fused_difference(model, fused, eval_images.pixels[:EVAL_BATCH_SIZE]),
        parameters=sum(p.numel() for p in model.parameters()),
        fused_parameters=sum(p.numel() for p in fused.parameters()), branch_similarity=similarities(model),
        settings=settings, hardware=hardware_name(eval_images.pixels.device), versions=versions())


def train(run, settings, stem, train_images, eval_images, execution='eager'):
    """Train, and measure the fused network after every epoch; what the run's file holds."""
    trainer = Trainer(run, settings, stem, train_images.pixels.device, execution)
    rows, fused, _ = descend(
        run.name, trainer, settings, run.epochs, padded(train_images), eval_images,
        torch.Generator().manual_seed(run.seed))
    return result(run, trainer.model, fused, rows, settings, eval_images)


def versions():
    return dict(
        python=platform.python_version(), torch=torch.__version__, timm=timm.__version__, timm_rep=timm_rep.__version__)


def time_forms(forms, settings, stem, images, rounds, execution='eager'):
    """Seconds of a training step of each form, taken in turns: a list for each."""
    device = images.pixels.device
    trainers = {form: Trainer(Run(form, 0.01, 1, 0), settings, stem, device, execution) for form in forms}
    x, targets = next(train_batches(padded(images), settings['batch_size'], torch.Generator().manual_seed(0)))
    seconds = {form: [] for form in forms}
    for turn in range(rounds + 2):
        for form, trainer in trainers.items():
            trainer.model.train()
            start = seconds_used(device)
            trainer.step(x, targets, rate_factor(0, 2, settings['warmup']))
            if turn >= 2:  # the first ones are slow
                seconds[form].append(seconds_used(device) - start)
    return seconds
