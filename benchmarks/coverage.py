"""Does it work with my network? What the default policies take of every CNN of timm, and whether it is exact.

    python benchmarks/coverage.py scan     # all CNNs with more than three convolutions, on the meta device
    python benchmarks/coverage.py sweep    # the smallest of each family in float64: expand, fuse, a time step
    python benchmarks/coverage.py table    # benchmarks/results/coverage.md, and the same table in docs/networks.md

Both append to a file of JSON lines under benchmarks/results/ and go on where they were stopped.
"""
import argparse
import collections
import json
import math
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn as nn

import timm_rep
from timm_rep.core.selection import Network, assign, why_nothing

RESULTS = Path(__file__).parent / 'results'
SCAN, SWEEP, TABLE = (RESULTS / f'coverage{end}' for end in ('_scan.jsonl', '_sweep.jsonl', '.md'))
DOCS = Path(__file__).parents[1] / 'docs' / 'networks.md'
METHODS = ('orepa', 'dbb')
LEAST_CONVS = 4
RATE = 0.4
# Small images where the network takes them, else its own size.
SIZE = 64
NOTES = """\
- A network is one that `timm.list_models()` names and that has more than three convolutions. The share is that of the
  parameters in convolutions larger than 1x1, even kernels (patches) included; in brackets of those of all convolutions.
  Shares are medians over the family; "none" counts the networks in which the default policy takes nothing.
- Exactness: the smallest network of the family in float64, with random values for statistics and parameters that are
  constants at first, on images of 64x64 (or of its own size where it takes no others). The largest difference of the
  outputs in eval mode, relative to the largest output, of three: after `expand`, after `fuse`, and after a time step
  begins (from attach rate 0.4 to 0). The fused network has the stock module tree and keys in every row. That the layers
  matter is seen by the attach rate: setting it moves the outputs, in no row by less than {least}.
- Methods with norms in their branches (`dbb`; `acb` and `rep` alike) need a batch norm on the output of a 3x3 or 5x5
  convolution that nothing else reads: networks with other norms, or none, have nothing for them.
"""


def families():
    """Names of timm's networks, without ours, by the module that has them."""
    return {module: timm.list_models(module=module) for module in timm.list_modules() if hasattr(timm.models, module)}


def measure(name, family):
    """What the default policies take of a network, or None if it is no CNN."""
    with torch.device('meta'):
        model = timm.create_model(name)
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if len(convs) < LEAST_CONVS:
        return None
    larger = {n: m.weight.numel() for n, m in convs.items() if max(m.kernel_size) > 1}
    centred = [m.weight.numel() for n, m in convs.items() if n in larger and all(size % 2 for size in m.kernel_size)]
    network = Network.of(model)
    row = dict(
        name=name, family=family, convs=len(convs), kxk=len(larger), kxk_parameters=sum(larger.values()),
        odd_parameters=sum(centred),
        parameters=sum(m.weight.numel() for m in convs.values()),
        norms=sorted({type(m).__name__ for m in model.modules() if 'Norm' in type(m).__name__}),
        model_parameters=sum(p.numel() for p in model.parameters()))
    for method in METHODS:
        started = time.perf_counter()
        taken = {n for n in assign(network, method, None) if n in convs}
        row[method] = dict(
            convs=len(taken), kxk_parameters=sum(larger.get(n, 0) for n in taken),
            parameters=sum(convs[n].weight.numel() for n in taken), seconds=round(time.perf_counter() - started, 2),
            why='' if taken else why_nothing(network, method))
    return row


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path, row):
    with path.open('a') as file:
        file.write(json.dumps(row) + '\n')


def scan(only=()):
    seen = {row['name'] for row in read(SCAN)}
    for family, names in families().items():
        for name in names:
            if name not in seen and (not only or family in only):
                append(SCAN, measure(name, family) or dict(name=name, family=family, convs=0))


@torch.no_grad()
def shake(model):
    """Give statistics and parameters that are constants other values, so that no branch is hidden or without effect."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        low, high = parameter.aminmax() if parameter.numel() else (0, 0)
        if low == high:  # biases, gains, scales of layers, heads of zeros
            least, most = (-0.1, 0.1) if low == 0 else (0.3, 0.6) if abs(low) < 0.1 else (0.7 * low, 1.3 * low)
            parameter.uniform_(*sorted((float(least), float(most))), generator=generator)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, low, high in (
                    ('running_mean', -0.2, 0.2), ('running_var', 0.5, 1.5), ('weight', 0.7, 1.3), ('bias', -0.2, 0.2)):
                if getattr(module, name, None) is not None:
                    getattr(module, name).uniform_(low, high, generator=generator)


def runs(model, images):
    try:
        return model(images)
    except Exception:  # of a network that takes images of its own size only
        return None


def difference(actual, expected):
    relative = ((actual - expected).abs().max() / expected.abs().max()).item()
    if not math.isfinite(relative):
        raise ValueError(f'outputs that are not finite, or zeros: nothing can be compared, got {relative}')
    return relative


def tree(model):
    return [(name, type(module)) for name, module in model.named_modules()]


@torch.no_grad()
def check(name, family):
    """Errors of a network's forms, relative to the largest output, by method."""
    torch.manual_seed(0)
    model = timm.create_model(name).double().eval()
    shake(model)
    own = model.pretrained_cfg['input_size']
    images = torch.randn(1, own[0], SIZE, SIZE, dtype=torch.float64)
    expected = runs(model, images)
    if expected is None:
        images = torch.randn(1, *own, dtype=torch.float64)
        expected = model(images)
    row = dict(name=name, family=family, size=images.shape[-1])
    for method in METHODS:
        try:
            rep = timm_rep.expand(model, method, generator=torch.Generator().manual_seed(0))
        except timm_rep.UserError as e:
            row[method] = dict(error=str(e))
            continue
        fused = timm_rep.fuse(rep)
        errors = dict(expand=difference(rep(images), expected), fuse=difference(fused(images), expected))
        is_stock = tree(fused) == tree(model) and list(fused.state_dict()) == list(model.state_dict())
        timm_rep.set_attach_rate(rep, RATE)
        before = rep(images)
        timm_rep.begin_time_step(rep, generator=torch.Generator().manual_seed(1))
        errors.update(time_step=difference(rep(images), before), moved_by_rate=difference(before, expected))
        expansion = timm_rep.expansion_of(rep)
        row[method] = dict(errors, stock_tree=is_stock, expansion=str(expansion), far_norms=len(expansion.norms))
    return row


def sweep(only=()):
    rows = [row for row in read(SCAN) if row['convs']]
    seen = {row['family'] for row in read(SWEEP)}
    for family in sorted({row['family'] for row in rows} - seen):
        if not only or family in only:
            smallest = min((row for row in rows if row['family'] == family), key=lambda row: row['model_parameters'])
            append(SWEEP, check(smallest['name'], family))


def share(row, method, key):
    return row[method][key] / max(row[key], 1)


def half(rows, method, key):
    """In how many networks a method takes at least half as many KxK parameters as there are of a kind."""
    return sum(2 * row[method]['kxk_parameters'] >= row[key] for row in rows)


def percent(values):
    return f'{100 * statistics.median(values):.0f} %' if values else ''


def exactness(row):
    errors = [row[method][step] for method in METHODS if 'expand' in row[method]
              for step in ('expand', 'fuse', 'time_step')]
    return f'{max(errors):.0e} at {row["size"]}' if errors else 'nothing to expand'


def least_move(rows):
    return min(row[method]['moved_by_rate'] for row in rows for method in METHODS if 'expand' in row[method])


def table():
    rows = [row for row in read(SCAN) if row['convs']]
    checked = {row['family']: row for row in read(SWEEP)}
    every = len(rows)
    lines = [
        '# Coverage', '',
        f'timm {timm.__version__}, torch {torch.__version__}; {every} networks. `python benchmarks/coverage.py scan`, '
        '`sweep`, `table`.', '', NOTES.replace('{least}', f'{least_move(checked.values()):.0e}')]
    for method in METHODS:
        some = sum(row[method]['convs'] > 0 for row in rows)
        odd, larger = half(rows, method, 'odd_parameters'), half(rows, method, 'kxk_parameters')
        lines.append(
            f'- **{method}** takes something in {some} of {every} ({100 * some / every:.1f} %). It takes at least half '
            f'of the parameters of odd KxK convolutions in {odd} ({100 * odd / every:.1f} %), of all KxK in {larger} '
            f'({100 * larger / every:.1f} %).')
    normless = sum('need a BatchNorm2d' in row['dbb']['why'] for row in rows)
    by_name = sum('it takes by name' in row['dbb']['why'] for row in rows)
    lines.append(
        f'- Of the networks in which **dbb** takes nothing {normless} have no batch norm; its error says so. In '
        f'{by_name} one reads the output of a stem larger than 5x5, which it takes by name only.')
    head = ['family', 'networks', *(f'{method}: share, none' for method in METHODS), 'smallest network', 'exact to']
    lines.append('')
    beginning = len(lines)
    lines += ['| ' + ' | '.join(head) + ' |', '|' + ' --- |' * len(head)]
    by_family = collections.defaultdict(list)
    for row in rows:
        by_family[row['family']].append(row)
    for family, members in sorted(by_family.items()):
        cells = [family, str(len(members))]
        for method in METHODS:
            taken = [row for row in members if row[method]['convs']]
            none = len(members) - len(taken)
            text = f'{percent([share(row, method, "kxk_parameters") for row in taken])} ' \
                f'({percent([share(row, method, "parameters") for row in taken])})' if taken else ''
            cells.append(', '.join(filter(None, [text, f'none in {none}' if none else ''])))
        row = checked.get(family)
        cells += [row['name'], exactness(row)] if row else ['', '']
        lines.append('| ' + ' | '.join(cells) + ' |')
    TABLE.write_text('\n'.join(lines) + '\n')
    docs = DOCS.read_text() if DOCS.exists() else ''
    DOCS.write_text('\n'.join([docs.partition('| family')[0].rstrip('\n'), '', *lines[beginning:]]) + '\n')


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('step', choices=['scan', 'sweep', 'table'])
    parser.add_argument('--family', nargs='*', default=(), help='only these')
    parsed = parser.parse_args(args)
    torch.set_num_threads(1)
    if parsed.step == 'table':
        table()
    else:
        dict(scan=scan, sweep=sweep)[parsed.step](parsed.family)


if __name__ == '__main__':
    sys.exit(main())
