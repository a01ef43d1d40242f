import sys

import pytest
from click.testing import CliRunner
from command_line import call

import timm_rep.train
from timm_rep.cli.main import main

ARGS = ['--help', '--json', '-b', '4', '-j2', '--model=x', '--', 'x', '--', '-h']


def test_train_hands_everything_to_the_wrapper(monkeypatch):
    calls = []
    monkeypatch.setattr(timm_rep.train, 'main', lambda argv, prog: calls.append((argv, prog)), raising=False)
    call('train', *ARGS)
    call('train')
    assert calls == [(ARGS, 'timm-rep train'), ([], 'timm-rep train')]
    monkeypatch.setattr(timm_rep.train, 'main', lambda argv, prog: sys.exit(7))
    assert CliRunner().invoke(main, ['train']).exit_code == 7


@pytest.fixture
def scripts(tmp_path):
    """Makes one of timm's scripts, and gives what runs it."""
    def make(name, content):
        (tmp_path / f'{name}.py').write_text(content)
        return ['run', '--timm-scripts', str(tmp_path), name]

    return make


def test_run_passes_all_arguments_on(scripts):
    script = scripts('train', "import sys; print('script got', sys.argv[1:])")
    assert f'script got {ARGS}' in call(*script, *ARGS)
    assert 'Run one of timm' in call('run', '--help')
    assert 'unknown timm script' in call(*script[:-1], 'publish', code=2)
    assert 'git clone' in call(*script[:-1], 'validate', code=2)


def test_a_script_ends_with_its_own_exit_code_or_that_of_its_error(scripts):
    assert CliRunner().invoke(main, scripts('train', 'import sys; sys.exit(7)')).exit_code == 7
    assert call(*scripts('train', 'raise KeyboardInterrupt'), code=130) == 'Error: interrupted\n'
    script = scripts('train', 'from timm_rep import UserError; raise UserError("wrong")')
    assert call(*script, code=2) == 'Error: wrong\n'
    script = scripts('validate', 'import sys; open(sys.argv[2] + "/val")')
    assert "'nowhere/val'" in call(*script, '--data-dir', 'nowhere', code=2)
    result = CliRunner().invoke(main, scripts('train', 'raise RuntimeError("mine")'))
    assert result.exit_code == 4
    assert 'train.py", line 1' in result.output
