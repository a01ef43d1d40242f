"""Where the time of a training step goes on a GPU: its longest kernels, launches, and gaps in which the GPU waits.

    python benchmarks/gpu_profile.py --model orepa_resnet50 --batch 64 --device cuda --out DIR

writes DIR/profile.json and DIR/profile.md.
"""
import argparse
import json
from pathlib import Path

import timm
import torch
from torch.profiler import ProfilerActivity, profile

import timm_rep
from timm_rep.report.cost import TrainingStep, hardware_name

STEPS = 3


def kernels_of(profiler, device):
    """Start, end and name of what ran on the device, in microseconds, in order."""
    on_gpu = torch.device(device).type == 'cuda'
    spans = []
    for event in profiler.events():
        if on_gpu == (event.device_type == torch.autograd.DeviceType.CUDA) and event.time_range.end:
            spans.append((event.time_range.start, event.time_range.end, event.name))
    return sorted(spans)


def summary(spans, top):
    """Longest kernels by name, launches, time in which something ran, and time in between."""
    totals, busy, end = {}, 0.0, spans[0][0]
    for start, stop, name in spans:
        time, count = totals.get(name, (0.0, 0))
        totals[name] = (time + stop - start, count + 1)
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    longest = sorted(totals.items(), key=lambda item: -item[1][0])[:top]
    return dict(
        launches=len(spans) / STEPS, busy_ms=busy / STEPS / 1e3, total_ms=(end - spans[0][0]) / STEPS / 1e3,
        kernels=[dict(name=name, ms=time / STEPS / 1e3, launches=count / STEPS) for name, (time, count) in longest])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='orepa_resnet50')
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--captured', action='store_true', help='with the composition as one CUDA graph')
    parser.add_argument('--top', type=int, default=20)
    parser.add_argument('--out', type=Path, required=True, metavar='DIR')
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True  # as timm's train.py does
    device = torch.device(args.device)
    images = torch.randn(args.batch, 3, args.size, args.size, device=device).to(memory_format=torch.channels_last)
    model = timm.create_model(args.model).to(device, memory_format=torch.channels_last)
    if args.captured:
        timm_rep.capture(model)
    step = TrainingStep(model, images, torch.zeros(args.batch, dtype=torch.long, device=device), torch.bfloat16)
    for _ in range(STEPS):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == 'cuda')
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        if device.type == 'cuda':
            torch.cuda.synchronize()
    result = dict(
        model=args.model, captured=args.captured, batch=args.batch, size=args.size, hardware=hardware_name(device),
        torch=torch.__version__,
        **summary(kernels_of(profiler, device), args.top))
    (args.out / 'profile.json').write_text(json.dumps(result, indent=1) + '\n')
    name = f'{args.model}, captured' if args.captured else args.model
    lines = [
        f'{name}, batch {args.batch}, {result["hardware"]}: {result["launches"]:.0f} launches a step, '
        f'{result["busy_ms"]:.2f} ms at work of {result["total_ms"]:.2f} ms', '',
        '| kernel | ms a step | launches |', '|---|--:|--:|']
    lines += [f'| {row["name"][:90]} | {row["ms"]:.3f} | {row["launches"]:.0f} |' for row in result['kernels']]
    (args.out / 'profile.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
