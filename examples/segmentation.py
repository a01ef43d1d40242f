"""Fine-tune a small segmentation net with plain, DBB and OREPA backbones on drawn shapes; step time and memory.

    python examples/segmentation.py
    python examples/segmentation.py --backbone resnet50 --size 256 --batch 16 --pretrained --device cuda

Table 5 of the OREPA paper (arXiv 2204.00826) in small. All forms start as the same function, see the same images, and
fold into the same network: what differs is how they train and what a step costs. They take turns, step by step, so that
a slow minute of the machine hits all of them.
"""
import argparse
import copy
import statistics
import time

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_rep
from timm_rep.report.cost import hardware_name

FORMS = dict(plain=None, DBB='dbb', OREPA='orepa')
CLASSES = ('background', 'box', 'disc')


def draw_shapes(count, size, generator):
    """Images with a box and a disc of changing colours on noise, and the class of every pixel."""
    images = 0.3 * torch.randn(count, 3, size, size, generator=generator)
    masks = torch.zeros(count, size, size, dtype=torch.long)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing='ij')
    for image, mask in zip(images, masks):
        for label in (1, 2):
            y, x = torch.randint(size // 4, 3 * size // 4, (2,), generator=generator)
            radius = torch.randint(size // 10, size // 4, (), generator=generator)
            dy, dx = (rows - y).abs(), (columns - x).abs()
            inside = torch.maximum(dy, dx) < radius if label == 1 else dy ** 2 + dx ** 2 < radius ** 2
            image[:, inside] += torch.randn(3, 1, generator=generator)
            mask[inside] = label
    return images, masks


class Segmenter(nn.Module):
    """A timm backbone at an output stride of 8, and a 3x3 head on its last map."""

    def __init__(self, backbone, pretrained=False):
        super().__init__()
        self.backbone = timm.create_model(
            backbone, pretrained=pretrained, features_only=True, output_stride=8, out_indices=(4,))
        channels = self.backbone.feature_info.channels()[-1]
        self.head = nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, len(CLASSES), 1))

    def forward(self, x):
        maps = self.head(self.backbone(x)[-1])
        return F.interpolate(maps, size=x.shape[-2:], mode='bilinear', align_corners=False)


class Trainee:
    """A form of the network with its optimizer; its steps are timed."""

    def __init__(self, model, lr, device):
        self.model, self.device = model.to(device).train(), device
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
        self.times, self.losses = [], []

    def step(self, images, masks):
        images, masks = images.to(self.device), masks.to(self.device)
        wait(self.device)
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(images), masks)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        wait(self.device)
        self.times.append(time.perf_counter() - start)

    def memory(self, images):
        """MiB that the forward pass keeps for the backward pass, weights apart."""
        own = {tensor.untyped_storage().data_ptr() for tensor in self.model.state_dict().values()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = self.model(images.to(self.device))  # holds the graph, so that no address is used twice
        total = sum(kept.values()) / 2 ** 20
        del output
        return total


def wait(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()


@torch.no_grad()
def mean_iou(model, images, masks, device):
    """Mean intersection over union of the classes, in percent."""
    found = torch.cat([model(batch.to(device)).argmax(1).cpu() for batch in images.split(8)])
    scores = []
    for label in range(len(CLASSES)):
        both, either = ((found == label) & (masks == label)).sum(), ((found == label) | (masks == label)).sum()
        scores.append((both / either.clamp(min=1)).item())
    return 100 * sum(scores) / len(scores)


def compare(args):
    """Train all forms in turns; a row of figures for each, by its name."""
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    stock = Segmenter(args.backbone, args.pretrained)
    forms = {
        name: Trainee(timm_rep.expand(stock, method) if method else copy.deepcopy(stock), args.lr, device)
        for name, method in FORMS.items()}
    images, masks = draw_shapes(args.images, args.size, generator)
    test_images, test_masks = draw_shapes(args.test_images, args.size, generator)
    for step in range(args.steps):
        for trainee in forms.values():
            for group in trainee.optimizer.param_groups:
                group['lr'] = args.lr * (1 - step / args.steps) ** 0.9
            rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(step))[:args.batch]
            trainee.step(images[rows], masks[rows])
    rows = {}
    for name, trainee in forms.items():
        memory = trainee.memory(images[:args.batch])
        fused = timm_rep.fuse(trainee.model.eval())
        timm_rep.verify(trainee.model, fused, inputs=test_images[:2].to(device), rtol=1e-4)
        rows[name] = dict(
            parameters=sum(p.numel() for p in trainee.model.parameters()) / 1e6,
            seconds=statistics.median(trainee.times[1:]), memory=memory, loss=trainee.losses[-1],
            iou=mean_iou(fused, test_images, test_masks, device))
    return rows


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbone', default='resnet18', help='any timm CNN that takes an output stride')
    parser.add_argument('--pretrained', action='store_true', help="timm's weights for it")
    parser.add_argument('--size', type=int, default=64, help='of the images, in pixels')
    parser.add_argument('--images', type=int, default=256)
    parser.add_argument('--test-images', type=int, default=64)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--steps', type=int, default=40)
    parser.add_argument('--lr', type=float, default=0.05)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error('--steps: at least two, since the first is not timed')
    if not timm.is_model(args.backbone):
        parser.error(f'--backbone: timm knows no {args.backbone}')
    return args


def main(argv=None):
    args = parse_args(argv)
    rows = compare(args)
    plain = rows['plain']
    print(f'{args.backbone} at {args.size}x{args.size}, batch {args.batch}, {hardware_name(args.device)}')
    print(f'{"":8}{"parameters":>12}{"step":>10}{"/ plain":>9}{"memory":>12}{"/ plain":>9}{"last loss":>11}{"mIoU":>8}')
    for name, row in rows.items():
        print(
            f'{name:8}{row["parameters"]:10.2f} M{row["seconds"] * 1000:7.0f} ms'
            f'{row["seconds"] / plain["seconds"]:9.2f}{row["memory"]:8.1f} MiB{row["memory"] / plain["memory"]:9.2f}'
            f'{row["loss"]:11.3f}{row["iou"]:7.1f}%')


if __name__ == '__main__':
    main()
