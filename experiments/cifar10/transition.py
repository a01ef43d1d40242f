"""What the step between two time steps does to a network in training mode, where RepAn goes on with it.

Trains an annealed RepVGG for one short time step, folds, redraws and restores, and measures the loss on training images
in eval mode (kept statistics) and in training mode (batch statistics), at several attach rates: as the library restores
(the norm of the main branch keeps its statistics, as in RepAn), and with the statistics of the restored main branch
measured on one batch, the kernels and the function in eval mode being the same.

    python experiments/cifar10/transition.py --data DIR --images 1500 --epochs 3 --output FILE
"""
import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from images import read_data, train_batches
from run import METHODS, versions
from timm.scheduler import CosineLRScheduler

import timm_rep
from timm_rep.core.layers import AnnealedRepVggBlock

BATCH_SIZE = 32
EVAL_BATCH_SIZE = 250
RATES = (0.0, 1 / 6, 0.5, 1.0)


def train(model, images, epochs, lr, generator):
    steps = len(images.targets) // BATCH_SIZE
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs * steps, t_in_epochs=False)
    model.train()
    for epoch in range(epochs):
        for step, (x, targets) in enumerate(train_batches(images, BATCH_SIZE, generator, True), start=1):
            loss = F.cross_entropy(model(x), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(epoch * steps + step)
        print(f'epoch {epoch + 1}/{epochs}: loss of the last batch {loss.item():.3f}', flush=True)


@torch.no_grad()
def measure_statistics_(model, x):
    """Give the norms of the main branches the statistics of one batch; in eval mode the function stays the same."""
    def measure(norm, output):
        var, mean = torch.var_mean(output, (0, 2, 3), unbiased=False)
        norm.bias.add_(mean - norm.running_mean)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.weight.copy_(torch.sqrt(var + norm.eps))

    hooks = [
        block.conv_kxk.conv.register_forward_hook(lambda _, __, output, norm=block.conv_kxk.bn: measure(norm, output))
        for block in model.modules() if isinstance(block, AnnealedRepVggBlock)
    ]
    model.eval()(x)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def losses(model, rate, batches):
    """Mean loss in eval and in training mode at an attach rate."""
    result = []
    for training in (False, True):
        copied = copy.deepcopy(model).train(training)
        timm_rep.set_attach_rate(copied, rate)
        result.append(sum(F.cross_entropy(copied(x), targets).item() for x, targets in batches) / len(batches))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, metavar='DIR', help='image folder')
    parser.add_argument('--images', type=int, help='training images; all by default')
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--lr', type=float, default=0.05)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', type=Path, required=True, metavar='FILE', help='markdown file to write')
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, _, data = read_data(args.data, args.images)
    lines = [
        '# Loss across the step from one time step to the next', '',
        f"repan_repvgg_a1_cifar, {data['train']} training images, one time step of {args.epochs} epochs before, "
        f"{', '.join(f'{name} {version}' for name, version in versions().items())}.", '',
        '| branches | state | attach rate | loss, eval mode | loss, training mode |', '|---|---|--:|--:|--:|']
    for method in ('repan_rep', 'repan_orepa'):
        model = timm_rep.models.repan.repan_repvgg_a1_cifar(
            rep_layer=METHODS[method].branches, num_classes=data['classes']).to(memory_format=torch.channels_last)
        train(model, images, args.epochs, args.lr, generator)
        batches = list(train_batches(images, EVAL_BATCH_SIZE, generator, True))[:3]
        states = {'before': (model, [1.0])}
        restored = copy.deepcopy(model)
        timm_rep.begin_time_step(restored, torch.Generator().manual_seed(args.seed))
        states['after, statistics kept (RepAn)'] = (restored, RATES)
        implied = copy.deepcopy(model)
        timm_rep.begin_time_step(implied, torch.Generator().manual_seed(args.seed), imply_statistics=True)
        states['after, statistics implied by the branches'] = (implied, RATES)
        measured = copy.deepcopy(restored)
        measure_statistics_(measured, batches.pop()[0])
        states['after, statistics measured'] = (measured, RATES)
        for state, (form, rates) in states.items():
            for rate in rates:
                row = [METHODS[method].label, state, f'{rate:.2f}', *(f'{v:.3f}' for v in losses(form, rate, batches))]
                lines.append('| ' + ' | '.join(row) + ' |')
                print(lines[-1], flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open('x') as stream:
        stream.write('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
