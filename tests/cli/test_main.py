import errno
import inspect
import json
import os
import subprocess

import pytest
import torch
from click.testing import CliRunner
from command_line import call, run_console_script

import timm_rep
from timm_rep.cli.main import main
from timm_rep.cli.output import print_json
from timm_rep.hub import forms
from timm_rep.hub.publish import publish
from timm_rep.report.cost import bench_models
from timm_rep.report.ensemble import evaluate_snapshots


@pytest.mark.parametrize(('command', 'function'), [
    ('bench', bench_models), ('ensemble', evaluate_snapshots), ('publish', publish)])
def test_defaults_are_those_of_the_library(command, function):
    """Their constants stand in modules that need torch."""
    known = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    options = {option.name: option.default for option in main.commands[command].params if option.name in known}
    shown = {name: default for name, default in options.items() if isinstance(default, (int, str))}
    assert shown
    assert shown == {name: known[name] for name in shown}


# Start


@pytest.mark.parametrize(('args', 'env', 'printed'), [
    (['--help'], {}, 'Exit codes: 0 all well'),
    (['--version'], {}, f'version {timm_rep.__version__}'),
    (['publish', '--help'], {}, '--include-training-form'),
    ([], dict(_TIMM_REP_COMPLETE='bash_complete', COMP_WORDS='timm-rep ver', COMP_CWORD='1'), 'plain,verify'),
])
def test_help_and_completion_do_not_wait_for_torch(args, env, printed):
    done = run_console_script(*args, env=env)
    assert done.returncode == 0
    assert printed in ' '.join(done.stdout.split())
    assert done.stderr == 'loaded\n'


def test_everything_is_there_for_a_script_that_the_command_runs(tmp_path):
    (tmp_path / 'train.py').write_text(
        'import timm, timm_rep\n'
        'assert "timm_rep._api" not in __import__("sys").modules\n'
        'assert timm.is_model("orepa_resnet18")\n'
        'assert callable(timm_rep.report.ensemble.evaluate_snapshots)\n'
        'assert not hasattr(timm_rep, "nothing")\n'
        'names = {}\n'
        'exec("from timm_rep import *", names)\n'
        'assert {*timm_rep.__all__} <= {*names} and timm_rep.expand is names["expand"]\n'
        'print("all of it")\n')
    done = run_console_script('run', '--timm-scripts', tmp_path, 'train')
    assert done.stdout == 'all of it\n', done.stderr


def test_an_import_registers_the_models_and_has_the_public_names():
    program = 'import timm, timm_rep; print(timm.is_model("orepa_resnet18"), timm_rep.report.ensemble.__name__)'
    assert run_console_script(program=program).stdout == 'True timm_rep.report.ensemble\n'
    assert all(hasattr(timm_rep, name) for name in timm_rep.__all__)


@pytest.mark.parametrize(('script', 'args'), [
    (None, ['--help']),
    ('import sys; print("much"); sys.exit()', ['run', '--timm-scripts', '.', 'train', '--help']),
])
def test_nobody_reads_what_is_printed(script, args, tmp_path):
    if script is not None:
        (tmp_path / 'train.py').write_text(script)
    reader, writer = os.pipe()
    os.close(reader)
    done = run_console_script(*args, capture_output=False, stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path)
    os.close(writer)
    assert done.stderr.startswith('loaded')
    assert done.stderr.count('\n') == 1


# Errors


def wrong_shapes():
    return torch.ones(2, 3) @ torch.ones(2, 3)


def raise_(error):
    raise error


@pytest.mark.parametrize(('error', 'code'), [
    (timm_rep.VerificationError('off'), 1),
    (timm_rep.UserError('wrong'), 2),
    (FileNotFoundError(errno.ENOENT, 'not there', 'x.pth'), 2),
    (OSError(errno.ENOSPC, 'no space left'), 2),
    (timm_rep.PublishError('refused'), 3),
    (KeyboardInterrupt(), 130),
])
def test_what_is_no_defect_is_one_line(error, code, monkeypatch):
    monkeypatch.setattr(forms, 'verify_checkpoint', lambda *args, **kwargs: raise_(error))
    message = str(error) or 'interrupted'
    assert call('verify', 'x.pth', code=code) == f'Error: {message}\n'
    result = CliRunner().invoke(main, ['verify', 'x.pth', '--json'])
    assert result.exit_code == code
    assert json.loads(result.output.splitlines()[0]) == dict(ok=False, error=message)


@pytest.mark.parametrize('defect', [
    wrong_shapes, lambda: int('x'), lambda: raise_(ImportError('mine')), lambda: raise_(AssertionError())])
def test_a_defect_has_its_traceback_and_an_exit_code_of_its_own(defect, monkeypatch):
    monkeypatch.setattr(forms, 'verify_checkpoint', lambda *args, **kwargs: defect())
    result = CliRunner().invoke(main, ['verify', 'x.pth', '--json'])
    assert result.exit_code == 4
    assert 'Traceback (most recent call last)' in result.output
    assert 'in verify\n' in result.output  # where it comes from
    line = next(line for line in result.output.splitlines() if line.startswith('{"ok": false'))
    assert f'Error: {json.loads(line)["error"]}\n' in result.output
    assert 'interrupted' not in result.output


# A terminal acts upon nothing that a name or a file says.

ESCAPES = 'x\x1b[2J\x07\x9b31m\r\u202etxt.pth'
SPELT_OUT = r'x\x1b[2J\x07\x9b31m\r\u202etxt.pth'


@pytest.mark.parametrize('error', [timm_rep.UserError, timm_rep.PublishError, KeyError])
def test_names_in_errors_are_spelt_out(error, monkeypatch):
    monkeypatch.setattr(forms, 'verify_checkpoint', lambda *args, **kwargs: raise_(error(f'no {ESCAPES}')))
    result = CliRunner().invoke(main, ['verify', 'x.pth'])
    assert ESCAPES[2:] not in result.output
    assert 'Error: ' in result.output
    assert not {'\x1b', '\x07', '\x9b', '\r', '\u202e'} & set(result.output)
    told = CliRunner().invoke(main, ['verify', 'x.pth', '--json']).output
    assert not {'\x1b', '\x07', '\x9b', '\r', '\u202e'} & set(told)
    line = next(line for line in told.splitlines() if line.startswith('{'))
    assert 'txt.pth' in json.loads(line)['error']


def test_names_of_files_and_options_are_spelt_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args in (
            ['verify', ESCAPES], ['verify', 'x', f'--{ESCAPES}'], ['bench', 'x', '--batch-size', ESCAPES], [ESCAPES]):
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 2
        assert r'\x1b' in result.output
        assert not {'\x1b', '\x07', '\x9b', '\r', '\u202e'} & set(result.output)
    monkeypatch.setattr(forms, 'fuse_checkpoint', lambda *args, **kwargs: 'outputs agree')
    assert call('fuse', 'x.pth', ESCAPES) == f'{SPELT_OUT}: outputs agree\n'
    assert call('fuse', 'x.pth', '\udcff.pth') == '\\udcff.pth: outputs agree\n'  # bytes that are no text


def test_json_says_what_the_text_spells_out(capsys):
    print_json(dict(name='\x7f' + ESCAPES))
    printed = capsys.readouterr().out
    assert not {'\x7f', '\x1b'} & set(printed)
    assert json.loads(printed) == dict(name='\x7f' + ESCAPES)
