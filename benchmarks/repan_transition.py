"""RepAn's transition from one time step to the next, by its authors' code and by ours, on the same network.

The authors' RepVGG-A1, for small images and for ImageNet, and their ResNet-18 of DBB, ACB and REP blocks are built by
their own code, from a local clone, trained for some steps and imported into our networks. Then both go through one
transition, with the same side kernels, and twenty steps of the authors' optimizer, in float64. What is compared: the
loss in training mode before and after, at three attach rates, every tensor, and the losses and tensors of the steps.

    python benchmarks/repan_transition.py --peer CLONE --output FILE

writes the raw data to FILE.json and tables to FILE.md. Exits with 1 if a difference is above 1e-6 of the largest value,
or if anything could not be compared. `--golden DIR` instead makes the golden tensors of tests/golden. What their code
does otherwise than its text says is listed in repan_procedure.py.
"""
import argparse
import copy
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from official_import import (
    REPOSITORIES,
    check_clone,
    check_output,
    default_dtype,
    origin_lines,
    origin_of,
    relative_difference,
    silently,
    write_report,
)
from official_networks import importable
from repan_golden import write_golden
from repan_procedure import (
    PROCEDURES,
    Batches,
    drop_origin_gradients,
    evaluated,
    imported,
    invert_plain_pairs_,
    names_of_theirs,
    take_drawn_,
    train_start_,
    trainer_of_ours,
    trainer_of_theirs,
    training_loss,
    transition_theirs_,
    without_cuda,
)

import timm_rep

TOLERANCE = 1e-6
RATES = (0.0, 0.5, 1.0)
STEPS, STEPS_AT_FULL_LR = 20, 5
# Other transitions of ours, for their training loss: no rule of the authors is among them.
OTHERS = {
    'measured': dict(restoration='measured'),
    'measured, side gain 0': dict(restoration='measured', side_gain=0.0),
}
NOTES = """\
- Differences are the largest of both networks, over the authors' largest value: of losses one by one, of tensors over
  all parameters and running statistics of a network, each by itself.
- "eval" is how far the authors' outputs in eval mode at attach rate 0 are from those before the transition.
- Steps: SGD without momentum, with the authors' weight decay, groups and clipping, at attach rate 1, where their first
  epoch runs, and at 1/2: the first five at their learning rate, and twenty at theirs times batch / 128 (at theirs the
  loss explodes with such batches, and rounding with it). In RepVGG for small images the origin stands still in them; at
  1/2 our Annealer sees to it, and to the whole transition, in every network.
- Loss in training mode, on one batch that training has not seen. "gain 1" and "gain kept" are the authors' two rules,
  of which each network has one; the others are ours. "plain pairs restored" is the authors' rule with
  `ConvBN.inversion` called as well: their code has this method, folds plain convolutions and norms, and never calls it.
- Images are synthetic, of ten classes. Start: as many steps with momentum as the command says, then 50 batches without
  learning, for the statistics; gains of all norms then lie in the range that is given, "eval" is the loss in eval mode.
"""


def tensor_differences(ours, theirs, names):
    """How far every tensor is from theirs, by their names; all zeros must be zeros."""
    state, differences = theirs.state_dict(), {}
    for name, tensor in ours.state_dict().items():
        if name in names:
            expected = state[names[name]]
            same = torch.equal(tensor, expected)
            differences[names[name]] = 0.0 if same else relative_difference(tensor.double(), expected.double())
    return differences


def largest(differences):
    """The largest difference and what it is of."""
    name = max(differences, key=lambda name: differences[name] if differences[name] == differences[name] else 1e999)
    return dict(of=name, difference=differences[name])


class Transition:
    """One network of the authors, before and after their transition, and ours beside it."""

    def __init__(self, network, procedure, args):
        self.procedure, self.model = procedure, network.models[0]
        self.batches = Batches(procedure.image, procedure.batch, args.seed)
        self.held_out = self.batches(10 ** 6)
        torch.manual_seed(args.seed)
        self.before = silently(network.build)
        train_start_(self.before, self.batches, args.start_steps)
        self.state = {name: tensor.clone() for name, tensor in self.before.state_dict().items()}
        self.names = names_of_theirs(self.state, self.model)
        self.after = copy.deepcopy(self.before)
        transition_theirs_(self.after)

    def ours(self):
        return imported(self.state, self.model)

    def ours_after(self, rate=0.0, **options):
        """Our network after our transition, with their side kernels, and what was drawn before."""
        ours = self.ours()
        options = dict(dict(restoration=self.procedure.restoration), **options)
        timm_rep.begin_time_step(ours, torch.Generator().manual_seed(0), attach_rate=rate, **options)
        return ours, take_drawn_(ours, self.after, self.names)

    def run(self):
        """Raw results."""
        norms = [module for module in self.before.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        gains = torch.cat([norm.weight.detach() for norm in norms])
        ours, drawn = self.ours_after()
        self.after.set_attach_rate(0.0)
        eval_before, eval_after = (evaluated(model, self.held_out) for model in (self.before, self.after))
        result = dict(
            model=self.model,
            restoration=self.procedure.restoration,
            gains=[gains.min().item(), gains.max().item()],
            largest_drawn_over_bound=drawn,
            tensors_before=largest(tensor_differences(self.ours(), self.before, self.names)),
            tensors=largest(tensor_differences(ours, self.after, self.names)),
            eval_loss_before=F.cross_entropy(eval_before, self.held_out[1]).item(),
            eval_of_theirs=relative_difference(eval_after, eval_before),
            eval_difference=relative_difference(evaluated(ours, self.held_out), eval_after),
            losses=self.losses(ours),
            steps=self.all_steps(),
        )
        result['other_losses'] = self.other_losses()
        return result

    def losses(self, ours):
        """Loss in training mode of theirs and ours, before and after."""
        rows = [dict(at='before', theirs=training_loss(self.before, self.held_out),
                     ours=training_loss(self.ours(), self.held_out))]
        for rate in RATES:
            self.after.set_attach_rate(rate)
            timm_rep.set_attach_rate(ours, rate)
            rows.append(dict(at=rate, theirs=training_loss(self.after, self.held_out),
                             ours=training_loss(ours, self.held_out)))
        return rows

    def other_losses(self):
        """The same for other transitions, by name."""
        rules = dict(OTHERS, **{'gain kept': dict(restoration='keep_gain'), 'gain 1': dict(restoration='authors')})
        batches = [self.batches(10 ** 6 + number) for number in range(1, 5)]
        found = {}
        for name, options in rules.items():
            ours, _ = self.ours_after(batches=batches, **options)
            found[name] = []
            for rate in RATES:
                timm_rep.set_attach_rate(ours, rate)
                found[name].append(training_loss(ours, self.held_out))
        twin = copy.deepcopy(self.after)
        invert_plain_pairs_(twin)
        if largest(tensor_differences(imported(twin.state_dict(), self.model), self.after, self.names))['difference']:
            found['plain pairs restored'] = []
            for rate in RATES:
                twin.set_attach_rate(rate)
                found['plain pairs restored'].append(training_loss(twin, self.held_out))
        return found

    def all_steps(self):
        scaled = self.procedure.scaled()
        return {
            'first at 1': self.steps(1.0, self.procedure, STEPS_AT_FULL_LR),
            'at 1': self.steps(1.0, scaled, STEPS),
            'at 1/2': self.steps(0.5, scaled, STEPS),
        }

    def annealed(self, theirs, procedure):
        """Our network in the hands of our Annealer, in an epoch at attach rate one half, and its trainer."""
        ours = self.ours()
        trainer = trainer_of_ours(ours, theirs, self.names, procedure)
        annealer = timm_rep.Annealer(
            ours, trainer.optimizer, timm_rep.AnnealingSchedule(time_steps=2, epochs=2, warmup_epochs=1),
            restoration=procedure.restoration, freeze_origin=procedure.freezes)
        if annealer.begin_epoch(2).attach_rate != 0.5:
            raise ValueError('this epoch should be at half the rate')
        take_drawn_(ours, theirs, self.names)
        return ours, trainer

    def steps(self, rate, procedure, count):
        """Losses of both and how far the tensors are apart after the steps."""
        theirs = copy.deepcopy(self.after)
        theirs.set_attach_rate(rate)
        if rate == 1.0:
            ours, _ = self.ours_after(rate)
            freeze = (lambda: drop_origin_gradients(ours)) if procedure.freezes else None
            our_trainer = trainer_of_ours(ours, theirs, self.names, procedure, freeze)
        else:
            ours, our_trainer = self.annealed(theirs, procedure)
        their_trainer = trainer_of_theirs(theirs, procedure)
        numbers = range(2 * 10 ** 6, 2 * 10 ** 6 + count)
        losses = [[trainer.step(self.batches(n)) for n in numbers] for trainer in (their_trainer, our_trainer)]
        frozen = [name for name, value in theirs.state_dict().items()
                  if re.search(r'conv_3\.weight$', name) and torch.equal(value, self.after.state_dict()[name])]
        return dict(
            lr=procedure.lr,
            theirs=losses[0], ours=losses[1],
            difference=max(abs(a - b) / abs(b) for a, b in zip(losses[1], losses[0])),
            tensors=largest(tensor_differences(ours, theirs, self.names)),
            kernels_that_stood_still=len(frozen),
        )


def differences(result):
    """All that must be within the tolerance."""
    found = [result[key]['difference'] for key in ('tensors_before', 'tensors')] + [result['eval_difference']]
    found += [abs(row['ours'] - row['theirs']) / abs(row['theirs']) for row in result['losses']]
    for steps in result['steps'].values():
        found += [steps['difference'], steps['tensors']['difference']]
    return found


def exceeds(result):
    """Whether a difference is above the tolerance, or none at all (NaN)."""
    return any(not difference <= TOLERANCE for difference in differences(result))


def compare_all(args):
    """Raw results by network, and messages of what failed."""
    results, errors = {}, []
    with importable(args.peer), default_dtype(torch.float64), without_cuda():
        networks = {network.name: network for network in silently(REPOSITORIES['repan'].networks)}
        for name, procedure in PROCEDURES.items():
            if args.only is not None and not args.only.search(name):
                continue
            try:
                result = results[name] = Transition(networks[name], procedure, args).run()
                said = f"{max(differences(result)):.1e}{' TOO LARGE' if exceeds(result) else ''}"
            except Exception as error:  # the other networks are to be compared all the same
                if args.debug:
                    raise
                said = f'{type(error).__name__}: {error}'
                errors.append(f'{name}: {said}')
            print(f'{name}: {said}', file=sys.stderr, flush=True)
    return results, errors


def row_of(cells):
    return '| ' + ' | '.join(cells) + ' |'


def difference_table(results):
    header = ['network of RepAn', 'restoration', 'tensors', 'loss', 'eval']
    for when in next(iter(results.values()))['steps']:
        header += [f'steps {when}: loss', 'tensors']
    lines = [row_of(header), '|---|---|' + '--:|' * (len(header) - 2)]
    for name, result in results.items():
        loss = max(abs(row['ours'] - row['theirs']) / abs(row['theirs']) for row in result['losses'])
        numbers = [result['tensors']['difference'], loss, result['eval_of_theirs']]
        for steps in result['steps'].values():
            numbers += [steps['difference'], steps['tensors']['difference']]
        lines.append(row_of([name, result['restoration'], *(f'{number:.1e}' for number in numbers)]))
    return lines


def loss_table(results):
    lines = [row_of(['network of RepAn', 'gains', 'eval', 'transition', 'before', *(f'at {rate:g}' for rate in RATES)]),
             '|---|---|--:|---|' + '--:|' * (1 + len(RATES))]
    for name, result in results.items():
        before, *after = result['losses']
        rows = {
            "the authors' code": [row['theirs'] for row in after], 'ours': [row['ours'] for row in after],
            **{rule: losses for rule, losses in result['other_losses'].items()
               if rule != dict(authors='gain 1', keep_gain='gain kept')[result['restoration']]},
        }
        gains = '{:.2f} to {:.2f}'.format(*result['gains'])
        in_eval = f"{result['eval_loss_before']:.4f}"
        for rule, losses in rows.items():
            first = before['ours'] if rule == 'ours' else before['theirs']
            lines.append(row_of([name, gains, in_eval, rule, *(f'{loss:.4f}' for loss in (first, *losses))]))
    return lines


def markdown(report):
    results = report['results']
    lines = ["# RepAn's transition and the authors' code", '', *origin_lines(report), '']
    if results:
        worst = max(results, key=lambda name: max(differences(results[name])))
        lines += [
            f'Largest difference: {max(differences(results[worst])):.1e} ({worst}); allowed are {TOLERANCE:.0e}.', '',
            *difference_table(results), '', 'Loss in training mode:', '', *loss_table(results)]
    if report['errors']:
        lines += ['', 'Not compared:', '', *(f'- {error}' for error in report['errors'])]
    return '\n'.join([*lines, '', NOTES])


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--peer', type=Path, metavar='CLONE', required=True,
        help=f"clone of https://github.com/{REPOSITORIES['repan'].name}")
    parser.add_argument('--only', type=re.compile, metavar='PATTERN', help='only networks with this regular expression')
    parser.add_argument('--start-steps', type=int, default=20, help='steps that the networks are trained for before')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of torch')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--debug', action='store_true', help='stop where something fails')
    parser.add_argument('--output', type=Path, metavar='FILE', help='write FILE.json and FILE.md, which must not exist')
    parser.add_argument('--golden', type=Path, metavar='DIR', help='compare nothing; write the golden tensors there')
    args = parser.parse_args(argv)
    check_clone(parser, '--peer', 'repan', args.peer)
    check_output(parser, args.output)
    return args


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.golden is not None:
        with importable(args.peer), default_dtype(torch.float64), without_cuda():
            for file in write_golden(args.golden, args.seed):
                print(f'{file.name}: {file.stat().st_size} bytes')
        return
    results, errors = compare_all(args)
    if not results and not errors:
        sys.exit('--only: no network has this pattern in its name')
    only = f" --only '{args.only.pattern}'" if args.only else ''
    output = f' --output {args.output.name if args.output.is_absolute() else args.output}' if args.output else ''
    command = (f'python benchmarks/repan_transition.py --peer CLONE{only} --start-steps {args.start_steps} '
               f'--threads {args.threads} --seed {args.seed}{output}')
    origin = origin_of(command, args.threads, dict(repan=args.peer))
    report = dict(**origin, tolerance=TOLERANCE, results=results, errors=errors)
    write_report(args.output, report, markdown(report))
    sys.exit(1 if errors or any(exceeds(result) for result in results.values()) else 0)


if __name__ == '__main__':
    main()
