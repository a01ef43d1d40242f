"""A training loop of your own, made of timm's public parts: train any timm model on a folder of images.

    python examples/own_loop.py DATA --model orepa_resnet18 --epochs 3 --output my_model

DATA holds `train/CLASS/*` and `val/CLASS/*` (or `validation`, `test`). All that the plugin asks of a loop is
`import timm_rep`, which registers its models, and `timm_rep.fuse` when the training is over. Annealing in time steps
(RepAn) is an `Annealer` with a call before and after each epoch; it is for models with rep layers, at `--epochs` for
each time step:

    python examples/own_loop.py DATA --model repan_resnet18 --time-steps 2 --epochs 10 --attach-warmup-epochs 3

With `--output my_model` every epoch is kept in my_model.pth; the same command with `--resume` goes on from there.
"""
import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, random_seed
from tqdm import tqdm

import timm_rep

EVAL_SPLITS = ('val', 'validation', 'test')


def create_datasets(data):
    """The training and the held-out images of an image folder, and the names of its classes."""
    splits = [split for split in EVAL_SPLITS if (Path(data) / split).is_dir()]
    if not splits or not (Path(data) / 'train').is_dir():
        raise FileNotFoundError(f'{data} must hold the folders train and {" or ".join(EVAL_SPLITS)}')
    train_set = create_dataset('', root=data, split='train', is_training=True)
    classes = train_set.reader.class_to_idx
    eval_set = create_dataset('', root=data, split=splits[0], class_map=classes)
    return train_set, eval_set, sorted(classes, key=classes.get)


def create_loaders(train_set, eval_set, data_config, batch_size, device, workers=0, **augmentation):
    """timm's loaders, with timm's names for the augmentation (scale, ratio, hflip, color_jitter, auto_augment ...)."""
    common = dict(data_config, num_workers=workers, persistent_workers=workers > 0, device=device, use_prefetcher=False)
    batch_size = min(batch_size, len(train_set))
    train_loader = create_loader(train_set, batch_size=batch_size, is_training=True, **common, **augmentation)
    return train_loader, create_loader(eval_set, batch_size=batch_size, **common)


def create_annealer(model, *, epochs, time_steps=1, attach_warmup_epochs=0, lr=0.1, weight_decay=1e-4, **options):
    """An optimizer, and the annealer around it; of a single time step without warm-up it leaves any model alone."""
    optimizer = create_optimizer_v2(model, opt='sgd', lr=lr, momentum=0.9, weight_decay=weight_decay)
    schedule = timm_rep.AnnealingSchedule(time_steps, epochs, attach_warmup_epochs)
    return timm_rep.Annealer(model, optimizer, schedule, **options)


@torch.no_grad()
def evaluate(model, loader, device):
    """Mean loss and top-1 accuracy in percent."""
    model.eval()
    losses, top1 = AverageMeter(), AverageMeter()
    for images, targets in loader:
        images, targets = images.to(device), targets.to(device)
        output = model(images)
        losses.update(F.cross_entropy(output, targets).item(), len(targets))
        top1.update(accuracy(output, targets)[0].item(), len(targets))
    return losses.avg, top1.avg


def save(checkpoint, model, annealer):
    """Keep an epoch; an interruption leaves the one before."""
    temporary = checkpoint.with_name(f'{checkpoint.name}.tmp')
    torch.save(
        dict(state_dict=model.state_dict(), optimizer=annealer.optimizer.state_dict(), history=annealer.history),
        temporary)
    temporary.replace(checkpoint)


def load(checkpoint, model, annealer):
    """Go back to the epoch that was kept last."""
    state = torch.load(checkpoint, map_location='cpu', weights_only=True)
    model.load_state_dict(state['state_dict'])
    annealer.optimizer.load_state_dict(state['optimizer'])
    annealer.history = state['history']


def train(model, annealer, train_loader, eval_loader, device, *, warmup_epochs=0, checkpoint=None):
    """Train with a cosine schedule that restarts with each time step; returns one dict of figures per epoch."""
    schedule, optimizer, steps = annealer.schedule, annealer.optimizer, len(train_loader)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=schedule.epochs, cycle_limit=schedule.time_steps, cycle_decay=1.0,
        warmup_epochs=warmup_epochs, step_on_epochs=False, updates_per_epoch=steps)
    first = len(annealer.history)
    if first > 0:
        scheduler.step_update(first * steps)
    with tqdm(total=schedule.total_epochs * steps, initial=first * steps, unit='batch', dynamic_ncols=True) as progress:
        for epoch in range(first, schedule.total_epochs):
            random_seed(annealer.seed + epoch)  # the order of the images follows from the epoch
            annealer.begin_epoch(epoch)  # where a time step begins: fold all branches, go on with fresh side branches
            model.train()
            losses = AverageMeter()
            for step, (images, targets) in enumerate(train_loader, start=1):
                images, targets = images.to(device), targets.to(device)
                loss = F.cross_entropy(model(images), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step_update(epoch * steps + step)
                losses.update(loss.item(), len(targets))
                progress.update()
            eval_loss, top1 = evaluate(model, eval_loader, device)
            annealer.end_epoch(train_loss=losses.avg, eval_loss=eval_loss, eval_top1=top1)
            if checkpoint:
                save(checkpoint, model, annealer)
            progress.set_description(
                f'epoch {epoch + 1}/{schedule.total_epochs}, loss {losses.avg:.3f}, top-1 {top1:.1f}%')
    return annealer.history


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', help='image folder')
    parser.add_argument('--model', default='orepa_resnet18', help='any timm model')
    parser.add_argument('--img-size', type=int, help="side of the images in pixels; the model's own by default")
    parser.add_argument('--epochs', type=int, default=3, help='epochs of a time step')
    parser.add_argument('--time-steps', type=int, default=1, help='more than one is for models with rep layers')
    parser.add_argument(
        '--attach-warmup-epochs', type=int, default=0, help='of each time step, until side branches count in full')
    parser.add_argument(
        '--freeze-origin', action='store_true', help='folded kernels stand still until side branches count in full')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--lr', type=float, default=0.05)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', type=Path, help='folder to export the fused model to, in the format of the Hub')
    parser.add_argument('--resume', action='store_true', help='go on from the epoch in OUTPUT.pth')
    args = parser.parse_args()
    args.checkpoint = args.output and args.output.with_name(f'{args.output.name}.pth')
    if not timm.is_model(args.model):
        parser.error(f'--model: timm knows no {args.model}')
    if args.resume and not (args.output and args.checkpoint.is_file()):
        parser.error(f'--resume: no checkpoint at {args.checkpoint or "OUTPUT.pth: name OUTPUT with --output"}')
    if args.output and args.output.exists():
        parser.error(f'--output: {args.output} exists already; name another folder')
    if args.output and args.checkpoint.exists() and not args.resume:
        parser.error(f'--output: {args.checkpoint} exists already; go on with --resume, or name another folder')
    return parser, args


def main():
    parser, args = parse_args()
    random_seed(args.seed)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        train_set, eval_set, classes = create_datasets(args.data)
        model = timm.create_model(args.model, num_classes=len(classes)).to(device)
        annealer = create_annealer(
            model, epochs=args.epochs, time_steps=args.time_steps, attach_warmup_epochs=args.attach_warmup_epochs,
            lr=args.lr, seed=args.seed, freeze_origin=args.freeze_origin)
    except (FileNotFoundError, timm_rep.UserError) as e:
        parser.error(str(e))
    if args.resume:
        load(args.checkpoint, model, annealer)
    data_config = resolve_data_config(dict(img_size=args.img_size), model=model)
    train_loader, eval_loader = create_loaders(
        train_set, eval_set, data_config, args.batch_size, device, workers=args.workers)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    train(model, annealer, train_loader, eval_loader, device, checkpoint=args.checkpoint)

    model.eval()
    fused = timm_rep.fuse(model)  # a stock timm model from here on
    for name, form in (('training form', model), ('fused', fused)):
        print(f'{name}: top-1 {evaluate(form, eval_loader, device)[1]:.2f}%')
    if args.output:
        print('exported to', timm_rep.export_folder(
            model, args.output, label_names=classes, data_config=data_config, dataset=Path(args.data).name))


if __name__ == '__main__':
    main()
