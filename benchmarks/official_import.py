"""Differences of imported checkpoints from the code of the authors of OREPA, DBB, RepVGG and RepAn.

The authors' networks are built by their own code, from local clones, and get random weights, statistics, scales, gains
and biases. Their state dicts go into files, those through `timm_rep.load_official_checkpoint`, and the outputs are
compared: in training form, fused, at an attach rate of 0.3 where their code has one, and in deploy form where it can
write one, each in float32 and in float64.

    python benchmarks/official_import.py --orepa DIR --dbb DIR --repvgg DIR --repan DIR --output FILE

writes the raw data to FILE.json and a table to FILE.md. Each clone may be left out. Exits with 1 if a difference is
above 1e-4 (float32) or 1e-9 (float64) of the largest output, or if anything could not be compared.
"""
import argparse
import contextlib
import copy
import datetime
import gc
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
import torch.nn as nn
from official_networks import REPOSITORIES, importable
from train_cost import output_files

import timm_rep
from timm_rep.core.walk import annealed_modules
from timm_rep.report.cost import processor_name

BATCH = 4
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}
LOW_RATE = 0.3
# Networks in which the attach rate is that of our side branches (in orepa_repvgg_* those are others than RepAn's).
ANNEALED_MODELS = ('repan_', 'dbb_')
TRAINING_FORM_MODELS = (*ANNEALED_MODELS, 'orepa_')
NOTES = """\
- Cells are float32 / float64: the largest difference from the output of the authors' code, over the largest output.
- "training form" is the import of a file with branches, "fused" what `timm_rep.fuse` makes of it, both against the
  authors' training form; "at 0.3" is the larger of the two at an attach rate of 0.3. "deploy form" is the import of the
  file that the authors' own conversion writes, against their deploy form; empty where their code cannot write one.
- "authors' rounding" is how far the authors' training form in float32 is from itself in float64.
- Random: convolutions and classifiers as the authors draw them; scales of either sign in [0.2, 1.2], also of branches
  that start at zero; weights that start at zero or as an identity; biases; gains in [0.3, 1.5] and biases of norms;
  running statistics of a batch, shifted by about 0.2 deviations and scaled by [0.4, 2].
- Networks with squeeze-and-excitation get gains of at most 0.8 and statistics nearer to the batch's: with the others'
  the authors' own output in float32 is mostly rounding.
- No released checkpoint took part: these are files that the authors' code writes.
"""


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Draw:
    """Random tensors, the same in every dtype."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, like, std=1.0):
        return (torch.randn(like.shape, generator=self.generator, dtype=torch.float64) * std).to(like)

    def uniform(self, like, low, high):
        draw = torch.rand(like.shape, generator=self.generator, dtype=torch.float64)
        return (draw * (high - low) + low).to(like)


def randomize_weights_(model, draw):
    """Give every weight that the authors start at zero, at one or as an identity a value of its own."""
    for name, parameter in model.named_parameters():
        if name.endswith('vector'):  # OREPA's scales
            magnitude = draw.uniform(parameter, 0.2, 1.2)
            parameter.copy_(torch.where(draw.uniform(parameter, 0.0, 1.0) < 0.3, -magnitude, magnitude))
        elif 'idconv1' in name:  # the 1x1 before the KxK of DBB and OREPA, to which an identity is added
            parameter.copy_(draw.normal(parameter, 0.3 / parameter.shape[1] ** 0.5))
        elif 'l2i' in name:  # the two 1x1 in a row of Rep-1x1, which start as identities
            parameter.add_(draw.normal(parameter, 0.3 / parameter.shape[1] ** 0.5))
        elif name in ('linear.bias', 'fc.bias'):
            parameter.copy_(draw.normal(parameter, 0.5))


def randomize_norms_(model, x, draw):
    """Give norms random gains, biases and statistics; statistics near those of a batch, lest the outputs explode."""
    mild = any('se.down' in name for name, _ in model.named_parameters())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.copy_(draw.uniform(norm.weight, 0.3, 0.8 if mild else 1.5))
        norm.bias.copy_(draw.normal(norm.bias, 0.5))
    model.train()(x)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        norm.running_mean.add_(draw.normal(norm.running_mean, 0.02 if mild else 0.2) * norm.running_var.sqrt())
        norm.running_var.mul_(draw.uniform(norm.running_var, 1.0 if mild else 0.4, 2.0))


def silently(function):
    """Call it without what it prints; the authors' constructors print a lot."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function()


def build_random(network, dtype, seed):
    """The authors' network in eval mode, and an input."""
    torch.manual_seed(seed)
    with default_dtype(dtype):
        model = silently(network.build)
        x = torch.randn(BATCH, 3, network.image, network.image)
        draw = Draw(seed)
        randomize_weights_(model, draw)
        randomize_norms_(model, x, draw)
    return model.eval(), x


def relative_difference(output, expected):
    """Largest difference over the largest expected value."""
    return ((output - expected).abs().max() / expected.abs().max()).item()


class Comparison:
    """Compares the imports of one network, in one dtype, with what the authors' code computes."""

    def __init__(self, repository, network, dtype, seed, file):
        self.repository, self.network, self.dtype, self.file = repository, network, dtype, file
        self.theirs, self.x = build_random(network, dtype, seed)
        self.rows = []

    def run(self):
        """Rows of raw results."""
        expected = self.run_theirs()
        rounding = None
        if self.dtype == torch.float32:
            exact = copy.deepcopy(self.theirs).double()(self.x.double())
            rounding = relative_difference(expected.double(), exact)
        self.save_training_form()
        for model in self.network.models:
            self.compare('training', model, expected, authors_rounding=rounding)
        if self.network.has_attach_rate:  # not in the file: the one given to the import counts
            self.theirs.set_attach_rate(LOW_RATE)
            expected_low = self.run_theirs()
            if relative_difference(expected_low, expected) < 1e-3:
                raise ValueError('the attach rate does not show in the outputs')
            for model in self.network.models:
                if model.startswith(ANNEALED_MODELS):
                    self.compare('training', model, expected_low, attach_rate=LOW_RATE)
            self.theirs.set_attach_rate(1.0)
        if self.network.fold:
            with default_dtype(self.dtype):
                self.network.fold(self.theirs)
            expected_folded = self.run_theirs()
            torch.save(self.theirs.state_dict(), self.file)
            for model in self.network.models:
                self.compare(
                    'deploy', model, expected_folded,
                    authors_fold=relative_difference(expected_folded, expected))
        return self.rows

    def run_theirs(self):
        with default_dtype(self.dtype):
            output = self.theirs(self.x)
        if not torch.isfinite(output).all():
            raise ValueError("the authors' output is not finite")
        return output

    def save_training_form(self):
        """Wrapped as the authors' training scripts do."""
        state = self.theirs.state_dict()
        if self.repository == 'repan':
            torch.save(dict(epoch=1, model_state=state), self.file)
        else:
            torch.save(dict(epoch=1, state_dict={f'module.{key}': value for key, value in state.items()}), self.file)

    def compare(self, form, model, expected, attach_rate=1.0, **more):
        """Import the file into one of our models, and add a row."""
        name, *arguments = model.split()
        kwargs = dict(argument.split('=') for argument in arguments)
        ours = timm_rep.load_official_checkpoint(self.file, name, attach_rate=attach_rate, **kwargs)
        in_training_form = any(annealed_modules(ours))
        if in_training_form != (form == 'training' and name.startswith(TRAINING_FORM_MODELS)):
            raise ValueError(f'{name} came back in the wrong form')
        output = ours(self.x)
        if output.dtype != self.dtype:
            raise ValueError(f'{name} came back in {output.dtype}')
        fused = relative_difference(timm_rep.fuse(ours)(self.x), expected) if in_training_form else None
        self.rows.append(dict(
            repository=self.repository,
            network=self.network.name,
            model=name,
            model_kwargs=kwargs,
            form=form,
            attach_rate=attach_rate,
            dtype=dtype_name(self.dtype),
            difference=relative_difference(output, expected),
            fused_difference=fused,
            largest_output=expected.abs().max().item(),
            **more,
        ))


def dtype_name(dtype):
    return str(dtype).removeprefix('torch.')


def differences(row):
    return [row[key] for key in ('difference', 'fused_difference') if row[key] is not None]


def exceeds(row):
    """Whether a difference is above the tolerance, or none at all (NaN)."""
    tolerance = TOLERANCES[getattr(torch, row['dtype'])]
    return any(not difference <= tolerance for difference in differences(row))


@torch.no_grad()
def compare_network(repository, network, seed):
    """Rows of raw results and messages of what failed."""
    rows, errors = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'authors.pth.tar')
        for dtype in TOLERANCES:
            try:
                found = Comparison(repository, network, dtype, seed, file).run()
            except Exception as error:  # the other networks are to be compared all the same
                message = str(error).replace(str(file), 'the file')
                errors.append(f'{repository}, {network.name}, {dtype_name(dtype)}: {type(error).__name__}: {message}')
                print(errors[-1], file=sys.stderr, flush=True)
                continue
            rows += found
            for row in found:
                print(
                    f"{repository}: {row['network']} to {row['model']} {row['model_kwargs'] or ''}, {row['form']} "
                    f"at {row['attach_rate']}, {row['dtype']}: {max(differences(row)):.1e}"
                    f"{' TOO LARGE' if exceeds(row) else ''}",
                    file=sys.stderr, flush=True)
            gc.collect()
    return rows, errors


def compare_all(clones, only, seed):
    rows, errors = [], []
    for key, clone in clones.items():
        with importable(clone):
            for network in silently(REPOSITORIES[key].networks):
                if only is None or only.search(f'{key} {network.name}'):
                    more_rows, more_errors = compare_network(key, network, seed)
                    rows += more_rows
                    errors += more_errors
    return rows, errors


def describe_largest(rows):
    """The largest difference, in words."""
    row = max(rows, key=lambda row: max(differences(row)))
    largest = max(differences(row))
    form = f"{row['form']} form" if row['difference'] == largest else 'fused'
    return (
        f"Largest in {row['dtype']}: {largest:.1e} ({row['repository']}, {row['network']} into "
        f"{describe_model(row)}, {form}, attach rate {row['attach_rate']}); "
        f"allowed are {TOLERANCES[getattr(torch, row['dtype'])]:.0e}.")


def cell(rows, form, attach_rate, read):
    """What is read off the rows of one form, float32 / float64; empty where there is none."""
    numbers = [read(row) for row in rows if (row['form'], row['attach_rate']) == (form, attach_rate)]
    return ' / '.join(f'{number:.1e}' for number in numbers if number is not None)


def describe_model(row):
    return ' '.join([row['model'], *(f'{key}={value}' for key, value in row['model_kwargs'].items())])


def table(rows):
    header = ['code of', 'network', 'imported into', 'training form', 'fused', 'at 0.3', 'deploy form',
              "authors' rounding"]
    lines = ['| ' + ' | '.join(header) + ' |', '|---' * 3 + '|--:' * (len(header) - 3) + '|']
    groups = {}
    for row in rows:
        groups.setdefault((row['repository'], row['network'], describe_model(row)), []).append(row)
    for (repository, network, model), group in groups.items():
        lines.append('| ' + ' | '.join([
            repository,
            network,
            model,
            cell(group, 'training', 1.0, lambda row: row['difference']),
            cell(group, 'training', 1.0, lambda row: row['fused_difference']),
            cell(group, 'training', LOW_RATE, lambda row: max(differences(row))),
            cell(group, 'deploy', 1.0, lambda row: row['difference']),
            cell(group, 'training', 1.0, lambda row: row['authors_rounding']),
        ]) + ' |')
    return lines


def markdown(report):
    rows = report['rows']
    lines = ["# Imported checkpoints and the authors' code", '', *origin_lines(report), '']
    for dtype in map(dtype_name, TOLERANCES):
        chosen = [row for row in rows if row['dtype'] == dtype]
        if chosen:
            lines += [describe_largest(chosen), '']
    lines += table(rows)
    if report['errors']:
        lines += ['', 'Not compared:', '', *(f'- {error}' for error in report['errors'])]
    return '\n'.join([*lines, '', NOTES])


def origin_lines(report):
    """Where a report comes from: machine, versions, command and the repositories that took part."""
    machine = report['machine']
    return [', '.join([
        f"{machine['cpu']}, threads: {machine['threads']}, cores: {machine['cores']}",
        ' '.join(f'{package} {version}' for package, version in report['versions'].items()),
        report['date'][:10],
    ]) + '.', '', f"`{report['command']}`", '', *(
        f"- {key}: {repository['name']} at {repository['commit']}"
        for key, repository in report['repositories'].items())]


def origin_of(command, threads, clones):
    """Where a report comes from, as raw data."""
    return dict(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        command=command,
        machine=dict(cpu=processor_name(), cores=os.cpu_count(), threads=threads),
        versions=dict(
            python=platform.python_version(),
            torch=torch.__version__,
            timm=timm.__version__,
            timm_rep=timm_rep.__version__,
        ),
        repositories={
            key: dict(name=REPOSITORIES[key].name, commit=commit_of(clone)) for key, clone in clones.items()
        },
    )


def check_clone(parser, option, key, clone):
    """Refuse a folder that is no clone of a repository."""
    repository = REPOSITORIES[key]
    if not (clone / repository.marker).is_file():
        parser.error(f'{option}: {clone} is no clone of {repository.name}: it has no {repository.marker}')


def check_output(parser, output):
    """Refuse to overwrite a report."""
    for file in output_files(output):
        if file.exists():
            parser.error(f'--output: {file} exists; name another file or remove it')


def write_report(output, report, text):
    """Print the text; write it and the raw data, if there is where to."""
    print(text)
    for file, content in zip(output_files(output), (json.dumps(report, indent=1) + '\n', text)):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open('x') as stream:
            stream.write(content)


def commit_of(clone):
    """Commit that is checked out, with a word if files differ from it."""
    def git(*command):
        return subprocess.run(
            ['git', '-C', str(clone), *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git('rev-parse', 'HEAD') + (', modified' if git('status', '--porcelain', '-uno') else '')
    except (OSError, subprocess.CalledProcessError):
        return 'an unknown commit'


def describe_command(args):
    """The command without the paths of this machine."""
    parts = ['python benchmarks/official_import.py', *(f'--{key} DIR' for key in args.clones)]
    if args.only:
        parts.append(f"--only '{args.only.pattern}'")
    parts += [f'--threads {args.threads}', f'--seed {args.seed}']
    if args.output:
        parts.append(f'--output {args.output.name if args.output.is_absolute() else args.output}')
    return ' '.join(parts)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, repository in REPOSITORIES.items():
        parser.add_argument(
            f'--{key}', type=Path, metavar='DIR', help=f'clone of https://github.com/{repository.name}')
    parser.add_argument(
        '--only', type=re.compile, metavar='PATTERN',
        help="only networks with this regular expression in '<repository> <network>', as in 'repan ResNet-18 of'")
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of torch')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', type=Path, metavar='FILE', help='write FILE.json and FILE.md, which must not exist')
    args = parser.parse_args(argv)
    args.clones = {key: getattr(args, key) for key in REPOSITORIES if getattr(args, key)}
    if not args.clones:
        parser.error(f'give at least one clone: {", ".join(f"--{key}" for key in REPOSITORIES)}')
    for key, clone in args.clones.items():
        check_clone(parser, f'--{key}', key, clone)
    check_output(parser, args.output)
    return args


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    rows, errors = compare_all(args.clones, args.only, args.seed)
    if not rows and not errors:
        sys.exit('--only: no network has this pattern in its name')
    report = dict(
        **origin_of(describe_command(args), args.threads, args.clones),
        tolerances={dtype_name(dtype): tolerance for dtype, tolerance in TOLERANCES.items()},
        rows=rows,
        errors=errors,
    )
    write_report(args.output, report, markdown(report))
    sys.exit(1 if errors or any(exceeds(row) for row in rows) else 0)


if __name__ == '__main__':
    main()
