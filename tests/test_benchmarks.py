"""The cost benchmark: a tiny run from end to end, and its two counters against known values.

Of the comparison with the authors' code, which needs clones of theirs: what can be seen without.
"""
import importlib
import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn

import timm_rep

SCRIPT = Path(__file__).parents[1] / 'benchmarks' / 'train_cost.py'
# All that the benchmark uses of the authors' repository.
PEER = """
import torch.nn as nn

def switch_conv_bn_impl(name):
    assert name == 'OREPA'

def build_model(arch):
    assert arch == 'ResNet-18'
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))
"""


@pytest.fixture(scope='module')
def train_cost():
    spec = importlib.util.spec_from_file_location('train_cost', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def official_import(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module('official_import')


@pytest.fixture
def tiny(tmp_path):
    return [
        '--forms', 'plain', 'orepa', 'together', '--batch', '2', '--size', '32', '--rounds', '2', '--warmup', '1',
        '--threads', '1', '--out', str(tmp_path / 'results' / 'tiny'),
    ]


def make_step(train_cost, name):
    target = torch.zeros(2, dtype=torch.long)
    return train_cost.TrainingStep(timm.create_model(name), torch.randn(2, 3, 32, 32), target)


def test_other_methods_are_forms_too(train_cost):
    models = train_cost.build_models('resnet18', ['mobileone'], None)
    assert list(models) == ['plain', 'mobileone']
    assert train_cost.label('resnet18', 'mobileone') == 'MobileOne branches'
    assert timm_rep.expansion_of(models['mobileone']).convs == dict(mobileone=20)
    assert {'doconv', 'expandnet', 'refconv', 'dilated', 'mobileone'} <= set(train_cost.FORMS)


def test_report(train_cost, tiny, tmp_path, capsys):
    (tmp_path / 'convnet_utils.py').write_text(PEER)
    train_cost.main([*tiny, '--peer', str(tmp_path)])
    report = json.loads((tmp_path / 'results' / 'tiny.json').read_text())
    (result,) = report['results']
    assert list(result['forms']) == ['plain', 'orepa', 'together', 'authors']
    for form in result['forms'].values():
        assert len(form['seconds']) == 2
        assert form['to_plain']['min'] <= form['to_plain']['max']
        assert form['peak_bytes'] > 4 * form['parameters']  # the gradients alone
    assert result['forms']['plain']['to_plain'] == dict(of_medians=1.0, min=1.0, max=1.0)
    assert report['versions']['torch'] == torch.__version__
    assert str(tmp_path) not in json.dumps(report)
    table = (tmp_path / 'results' / 'tiny.md').read_text()
    assert table in capsys.readouterr().out
    assert '| resnet18 | OREPA, eager |' in table
    assert result['forms']['plain']['composition'] is None
    counts = result['forms']['orepa']
    assert 0 < counts['composition']['net'] < counts['operations']['net']
    assert 0 < result['forms']['together']['composition']['net'] < counts['composition']['net']

    with pytest.raises(SystemExit):
        train_cost.main(tiny)
    assert 'tiny.json exists' in capsys.readouterr().err


def test_micro_batches(train_cost):
    models = train_cost.build_models('resnet18', ('plain', 'orepa'), None, accum=2)
    assert list(models) == ['plain', 'orepa', 'orepa_each']
    images, targets = torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
    once, each = (
        train_cost.count_operations(train_cost.TrainingStep(
            models[form], images, targets, micro_batches=2, composed_once=form == 'orepa'))['net']
        for form in ('orepa', 'orepa_each'))
    assert each - once > 0.8 * train_cost.count_composition(models['orepa'])['net']


def test_composition_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module('composition_cost')

    def tiny(name):
        layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)]
        net = nn.Sequential(*layers)
        return timm_rep.expand(net, 'orepa') if name == 'orepa_tiny' else net

    monkeypatch.setattr(script.timm, 'create_model', tiny)
    threads = torch.get_num_threads()
    script.main(['--models', 'tiny', '--rounds', '2', '--threads', str(threads), '--out', str(tmp_path / 'cost.cpu')])
    shapes = json.loads((tmp_path / 'cost.cpu.json').read_text())['results'][0]['shapes']
    assert [(row['layers'], row['kernel']) for row in shapes] == [(1, [4, 3, 3, 3]), (2, [4, 4, 3, 3])]
    assert all(row[part]['ms'] > 0 for row in shapes for part in script.PARTS)
    table = (tmp_path / 'cost.cpu.md').read_text()
    assert table in capsys.readouterr().out
    assert '| tiny | 3 | **all** |' in table


def test_operations_of_a_step(train_cost):
    counts = {}
    for name in ('resnet18', 'orepa_resnet18'):
        step = make_step(train_cost, name)
        step()
        counts[name] = train_cost.count_operations(step)['net']
    extra = counts['orepa_resnet18'] - counts['resnet18']
    # 2195 and 415 net operations with the authors' code and without (torch 2.14)
    assert extra <= 0.4 * (2195 - 415)


def test_peak_memory(train_cost):
    class Known(torch.nn.Module):
        """Has two tensors of a megabyte each at once, and one more after they are gone."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1000))

        def forward(self, x):
            megabyte = 2 ** 18
            with torch.no_grad():
                first = torch.empty(megabyte)
                second = torch.empty(megabyte)
                del first, second
                torch.empty(megabyte)
            return self.weight.expand(len(x), -1)

    step = train_cost.TrainingStep(Known(), torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    step()
    assert 2 * train_cost.MIB <= train_cost.peak_memory(step) < 2.2 * train_cost.MIB


def test_plain_repvgg_has_one_convolution_per_block(train_cost):
    models = train_cost.build_models('repvgg_a0', ('plain',), None)
    convs = [m for m in models['plain'].modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 22
    assert all(conv.kernel_size == (3, 3) for conv in convs)


@pytest.mark.parametrize(('dtype', 'difference', 'fused_difference', 'expected'), [
    ('float32', 1e-5, None, False), ('float32', 1e-5, 2e-4, True), ('float64', 1e-5, None, True),
    ('float32', float('nan'), None, True)])
def test_official_import_tolerances(official_import, dtype, difference, fused_difference, expected):
    row = dict(dtype=dtype, difference=difference, fused_difference=fused_difference)
    assert official_import.exceeds(row) is expected


def test_repan_transition_tolerance(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    exceeds = importlib.import_module('repan_transition').exceeds

    def result(loss=1.0, tensors=1e-12, steps=1e-12):
        apart = dict(difference=tensors)
        return dict(
            tensors_before=apart, tensors=apart, eval_difference=0.0, losses=[dict(ours=loss, theirs=1.0)],
            steps={'1.0': dict(difference=steps, tensors=apart)})

    assert not exceeds(result())
    assert all(map(exceeds, (result(loss=1.00001), result(tensors=1e-5), result(steps=float('nan')))))


# The GPU's part


@pytest.fixture
def commands(tmp_path):
    """The commands of the script for GPUs, which are noted instead of run."""
    note = tmp_path / 'python'
    note.write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> "$OUT/commands"\n')
    note.chmod(0o755)

    def run(**environment):
        out = tmp_path / 'out'
        settings = dict(os.environ, OUT=str(out), DEVICE='cpu', PYTHON=str(note), **environment)
        done = subprocess.run(
            ['bash', str(SCRIPT.with_name('gpu.sh'))], env=settings, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert '| checks | ok |' in done.stdout
        return [line.split() for line in (out / 'commands').read_text().splitlines()]

    return run


@pytest.mark.parametrize('toy', ['', '1'])
def test_the_script_for_gpus_calls_what_there_is(commands, train_cost, tmp_path, monkeypatch, toy):
    (tmp_path / 'convnet_utils.py').write_text(PEER)
    for split in ('train', 'test'):
        (tmp_path / 'images' / split).mkdir(parents=True)
    called = commands(TOY=toy, PEER=str(tmp_path), DATA=str(tmp_path / 'images'))
    names = [Path(command[0]).stem for command in called]
    assert names == ['gpu_checks', *['train_cost'] * 5, 'gpu_profile', *['run'] * 4, 'table']
    for name, arguments in zip(names, called):
        if name == 'train_cost':
            assert train_cost.parse_args(arguments[1:]).dtype == 'bf16'
    monkeypatch.syspath_prepend(SCRIPT.parents[1] / 'experiments' / 'cifar10_fast')
    args = importlib.import_module('run').parse(called[-2][1:])
    assert (args.network, args.seeds) == ('speedrun', 50)


def test_the_script_for_gpus_runs_parts_alone(commands, tmp_path, monkeypatch):
    for split in ('train', 'test'):
        (tmp_path / 'images' / split).mkdir(parents=True)
    parts = 'forms_dbb anneal_dbb anneal_teacher anneal_warmup'
    called = commands(PARTS=f'checks {parts}', DATA=str(tmp_path / 'images'))
    scripts = [Path(command[0]).stem for command in called]
    assert scripts == ['gpu_checks', *['run'] * 4, *['anneal'] * 12]
    monkeypatch.syspath_prepend(SCRIPT.parents[1] / 'experiments' / 'cifar10_fast')
    for script, (_, *arguments) in zip(scripts[1:], called[1:]):
        args = importlib.import_module(script).parse(arguments)
        assert script == 'run' or set(args.forms) <= dict(args.start_rates).keys()


def test_checks_for_gpus_run_on_a_cpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('CHECKED_NETWORK', 'test_resnet')
    monkeypatch.delenv('TIMM_SCRIPTS', raising=False)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    checks = importlib.import_module('gpu_checks')
    compiled = 'compiled_steps_are_those_of_eager_ones'  # slow, and tested elsewhere
    monkeypatch.setattr(checks, 'CHECKS', [check for check in checks.CHECKS if check.__name__ != compiled])
    assert checks.main(['--device', 'cpu', '--out', str(tmp_path)]) == 0, capsys.readouterr().out
    outcomes = {row['check']: row['outcome'] for row in json.loads((tmp_path / 'checks.json').read_text())['checks']}
    assert set(outcomes.values()) == {'ok', 'skipped'}

    def fails(device):
        raise AssertionError('too far')

    monkeypatch.setattr(checks, 'CHECKS', [fails])
    assert checks.main(['--device', 'cpu', '--out', str(tmp_path)]) == 1


def test_profile(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    gpu_profile = importlib.import_module('gpu_profile')
    gpu_profile.main([
        '--device', 'cpu', '--model', 'orepa_repvgg_a0_cifar', '--batch', '2', '--size', '32', '--out', str(tmp_path)])
    result = json.loads((tmp_path / 'profile.json').read_text())
    assert 0 < result['busy_ms'] <= result['total_ms']
    spans = [(0, 10, 'a'), (5, 20, 'b'), (40, 50, 'a')]
    assert gpu_profile.summary(spans, 1) == dict(
        launches=1, busy_ms=0.01, total_ms=50 / 3e3, kernels=[dict(name='a', ms=20 / 3e3, launches=2 / 3)])


def test_coverage_of_two_networks(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location('coverage_of_timm', SCRIPT.with_name('coverage.py'))
    coverage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(coverage)
    monkeypatch.setattr(coverage, 'families', lambda: dict(resnet=['test_resnet'], nfnet=['test_nfnet', 'test_vit']))
    for name, file in dict(SCAN='scan.jsonl', SWEEP='sweep.jsonl', TABLE='table.md', DOCS='docs.md').items():
        monkeypatch.setattr(coverage, name, tmp_path / file)
    for step in ('scan', 'scan', 'sweep', 'sweep', 'table'):  # what is there already is not done again
        coverage.main([step])
    rows = {row['name']: row for row in coverage.read(coverage.SCAN)}
    assert len(coverage.read(coverage.SCAN)) == len(rows) == 3
    assert rows['test_vit']['convs'] == 0
    assert rows['test_resnet']['dbb']['convs'] > 0
    assert rows['test_nfnet']['orepa']['kxk_parameters'] == rows['test_nfnet']['kxk_parameters']
    assert 'need a BatchNorm2d' in rows['test_nfnet']['dbb']['why']
    for row in coverage.read(coverage.SWEEP):
        assert row['orepa']['stock_tree']
        assert max(row['orepa'][step] for step in ('expand', 'fuse', 'time_step')) < 1e-10
    table = coverage.TABLE.read_text()
    assert coverage.DOCS.read_text().strip() == table[table.index('| family'):].strip()
    assert '**dbb** takes something in 1 of 2 (50.0 %)' in table
    assert '| nfnet | 1 | 100 % (' in table
