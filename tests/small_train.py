"""A stand-in for timm's train.py in tests: the same names, arguments and order of events, on random images.

Its train_one_epoch has the older signature (``loss_fn``, ``model_ema``, no ``task``); timm's real script, where there
is one, covers the newer.
"""
import argparse
import os
from collections import OrderedDict
from contextlib import suppress

import torch
import torch.nn.functional as F
import yaml
from timm import utils
from timm.models import create_model, load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument('-c', '--config', default='')
parser = argparse.ArgumentParser(description='Stand-in training')
for option, default in dict(
        model='resnet50', resume='', output='', experiment='', initial_checkpoint='', sched='cosine', opt='momentum',
        dataset='', train_split='train', val_split='validation', eval_metric='top1', interpolation='',
).items():
    parser.add_argument(f'--{option.replace("_", "-")}', default=default)
for option, default in dict(
        start_epoch=None, epochs=300, warmup_epochs=5, cooldown_epochs=0, lr_cycle_limit=1, seed=42, checkpoint_hist=10,
        num_classes=5, patience_epochs=10,
).items():
    parser.add_argument(f'--{option.replace("_", "-")}', type=int, default=default)
for option, default in dict(
        lr=0.05, momentum=0.9, weight_decay=1e-4, lr_cycle_mul=1.0, lr_cycle_decay=0.5, model_ema_decay=0.9,
).items():
    parser.add_argument(f'--{option.replace("_", "-")}', type=float, default=default)
for option in ('model_ema', 'warmup_prefix', 'torchscript', 'sched_on_updates', 'pretrained'):
    parser.add_argument(f'--{option.replace("_", "-")}', action='store_true')
parser.add_argument('--device-modules', nargs='+', default=None)
parser.add_argument('--model-kwargs', nargs='*', default={}, action=utils.ParseKwargs)


def _parse_args():
    config, remaining = config_parser.parse_known_args()
    if config.config:
        with open(config.config) as file:
            parser.set_defaults(**yaml.safe_load(file))
    args = parser.parse_args(remaining)
    return args, yaml.safe_dump(vars(args))


def create_dataset(name, split):
    count = 20 if split == 'train' else 10
    generator = torch.Generator().manual_seed(count)
    targets = torch.arange(count) % 5
    return torch.utils.data.TensorDataset(
        torch.randn(count, 3, 8, 8, generator=generator) + targets.reshape(-1, 1, 1, 1), targets)


def create_loader(dataset, batch_size, is_training=False):
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size, shuffle=is_training)


def main():
    utils.setup_default_logging()
    args, args_text = _parse_args()
    args.rank, args.distributed = 0, False
    utils.random_seed(args.seed, args.rank)
    model = create_model(args.model, num_classes=args.num_classes, **args.model_kwargs)
    if args.initial_checkpoint:
        load_checkpoint(model, args.initial_checkpoint)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    resume_epoch = resume_checkpoint(model, args.resume, optimizer=optimizer) if args.resume else None
    model_ema = None
    if args.model_ema:
        model_ema = utils.ModelEmaV3(model, decay=args.model_ema_decay)
        if args.resume:
            load_checkpoint(model_ema.module, args.resume, use_ema=True)
    loader = create_loader(create_dataset(args.dataset, split='train'), batch_size=8, is_training=True)
    eval_loader = create_loader(create_dataset(args.dataset, split=args.val_split), batch_size=10)

    output_dir = utils.get_outdir(args.output or './output/train', args.experiment or 'unnamed')
    saver = utils.CheckpointSaver(
        model, optimizer, args=args, model_ema=model_ema, checkpoint_dir=output_dir, recovery_dir=output_dir,
        max_history=args.checkpoint_hist)
    with open(os.path.join(output_dir, 'args.yaml'), 'w') as file:
        file.write(args_text)
    scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=len(loader))
    start_epoch = args.start_epoch if args.start_epoch is not None else resume_epoch or 0
    if start_epoch > 0:
        scheduler.step(start_epoch)
    best_metric = None
    with suppress(KeyboardInterrupt):  # as the original
        for epoch in range(start_epoch, num_epochs):
            train_metrics = train_one_epoch(
                epoch, model, loader, optimizer, F.cross_entropy, args, lr_scheduler=scheduler, saver=saver,
                output_dir=output_dir, model_ema=model_ema)
            eval_metrics = validate(model, eval_loader)
            utils.update_summary(
                epoch, train_metrics, eval_metrics, filename=os.path.join(output_dir, 'summary.csv'),
                lr=optimizer.param_groups[0]['lr'], write_header=best_metric is None)
            best_metric, _ = saver.save_checkpoint(epoch, metric=eval_metrics['top1'])
            scheduler.step(epoch + 1, eval_metrics['top1'])


def train_one_epoch(
        epoch,
        model,
        loader,
        optimizer,
        loss_fn,
        args,
        device=None,
        lr_scheduler=None,
        saver=None,
        output_dir=None,
        amp_autocast=suppress,
        model_ema=None,
):
    model.train()
    losses = utils.AverageMeter()
    for step, (inputs, targets) in enumerate(loader):
        loss = loss_fn(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if model_ema is not None:
            model_ema.update(model, step=epoch * len(loader) + step + 1)
        losses.update(loss.item(), len(targets))
    return OrderedDict([('loss', losses.avg)])


@torch.no_grad()
def validate(model, loader):
    model.eval()
    top1 = utils.AverageMeter()
    for inputs, targets in loader:
        top1.update(utils.accuracy(model(inputs), targets)[0].item(), len(targets))
    return OrderedDict([('top1', top1.avg)])


if __name__ == '__main__':
    main()
