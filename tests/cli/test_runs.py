import pytest
from click.testing import CliRunner
from command_line import call

import timm_rep.train
from timm_rep.cli.main import main
from timm_rep.core.errors import UserError

ARGS = ['--help', '--json', '-b', '4', '-j2', '--model=x', '--', 'x', '--', '-h']


def test_train_hands_everything_to_the_wrapper(monkeypatch):
    calls = []
    monkeypatch.setattr(timm_rep.train, 'main', lambda argv, prog: calls.append((argv, prog)), raising=False)
    call('train', *ARGS)
    call('train')
    assert calls == [(ARGS, 'timm-rep train'), ([], 'timm-rep train')]


@pytest.mark.parametrize(('error', 'code'), [
    (SystemExit(7), 7), (UserError('wrong'), 2), (KeyboardInterrupt(), 130), (RuntimeError('mine'), 4)])
def test_train_ends_as_the_wrapper_does(error, code, monkeypatch):
    def fail(argv, prog):
        raise error

    monkeypatch.setattr(timm_rep.train, 'main', fail, raising=False)
    assert CliRunner().invoke(main, ['train', '--data-dir', 'x']).exit_code == code


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
    assert 'no config file at x.yaml' in call(*script, '--config', 'x.yaml', code=2)


@pytest.mark.parametrize('kind', [ValueError, RuntimeError, KeyError])
def test_errors_of_a_script_keep_their_traceback(kind, scripts):
    result = CliRunner().invoke(main, scripts('train', f'raise {kind.__name__}("mine")'))
    assert isinstance(result.exception, kind)
    assert result.output == ''


def test_a_script_ends_with_its_own_exit_code(scripts):
    assert CliRunner().invoke(main, scripts('train', 'import sys; sys.exit(7)')).exit_code == 7
    assert call(*scripts('train', 'raise KeyboardInterrupt'), code=130) == 'Error: interrupted\n'


def test_what_a_user_can_mend_inside_a_script_is_one_line(scripts):
    script = scripts('train', 'from timm_rep import UserError; raise UserError("wrong")')
    assert call(*script, code=2) == 'Error: wrong\n'
    script = scripts('validate', 'import sys; open(sys.argv[2] + "/val")')
    assert "'nowhere/val'" in call(*script, '--data-dir', 'nowhere', code=2)
