import json
import re
from dataclasses import dataclass

import pytest
import timm
from click.testing import CliRunner
from command_line import call

from timm_rep.cli import demo
from timm_rep.cli.main import main
from timm_rep.core import methods


def test_list(monkeypatch):
    @dataclass(frozen=True)
    class Toy(methods.Method):
        name, title, summary = 'toy', 'Toy method', 'A kernel and half of it again.'

    monkeypatch.setattr(methods, '_METHODS', dict(methods.registered_methods()))
    methods.register_method(Toy)
    lines = call('list').splitlines()
    assert 'orepa_resnet18           resnet18' in lines
    assert 'repan_mobilenetv1_100    mobilenetv1_100' in lines
    assert 'repan_repvgg_b0_cifar    own stock form (inference_mode=True)' in lines
    assert 'method toy               Toy method: A kernel and half of it again.' in lines
    assert len(lines) == len(timm.list_models(['orepa_*', 'dbb_*', 'repan_*'])) + len(methods.registered_methods())
    assert all('repvgg' in line for line in call('list', 'repvgg').splitlines())
    found = json.loads(call('list', '*resnet18*cifar', '--json'))
    assert [model['name'] for model in found['models']] == [
        'dbb_resnet18_cifar', 'orepa_resnet18_cifar', 'repan_resnet18_cifar']
    assert found['models'][0]['stock'] == 'dbb_resnet18_cifar'
    toy = dict(name='toy', title='Toy method', summary='A kernel and half of it again.')
    assert toy in json.loads(call('list', '--json'))['methods']
    assert json.loads(call('list', 'nothing', '--json')) == dict(models=[], methods=[])
    assert CliRunner().invoke(main, ['list', 'nothing']).stderr == "no model and no method has 'nothing' in its name\n"


def test_modules_are_imported_first(tmp_path, monkeypatch):
    (tmp_path / 'module_of_a_user.py').write_text('print("here")')
    monkeypatch.syspath_prepend(tmp_path)
    assert call('--import', 'module_of_a_user', 'list', 'resnet18_cifar').splitlines()[0] == 'here'
    result = CliRunner().invoke(main, ['--import', 'no_such_module', 'list'])
    assert result.exit_code == 2
    assert "Error: --import no_such_module: No module named 'no_such_module'; Python's path is [" in result.output


@pytest.mark.parametrize(('text', 'said'), [
    ('x = 1\nx.y', r"AttributeError: 'int' object has no attribute 'y' \(.*broken\.py, line 2\)"),
    ('(', r'SyntaxError: .*\(broken\.py, line 1\)'),
    ('import timm_rep\n\n@timm_rep.register_method\nclass Mine(timm_rep.Method):\n    name = "orepa"',
     r"ValueError: .*'?orepa.* \(.*, line \d+\)"),
], ids=['wrong', 'no Python', 'name taken'])
def test_modules_that_fail_are_wrong_input(text, said, tmp_path, monkeypatch):
    (tmp_path / 'broken.py').write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    result = CliRunner().invoke(main, ['--import', 'broken', 'list'])
    assert result.exit_code == 2
    assert re.search(f'Error: --import broken: {said}', result.output), result.output


def test_demo_is_one_call(monkeypatch):
    outputs = []
    monkeypatch.setattr(demo, 'run_demo', outputs.append)
    call('demo', '--output', 'there')
    assert outputs == ['there']
