"""``timm-rep`` as tests call it: in this process, or in one of its own."""
import os
import subprocess
import sys

from click.testing import CliRunner

from timm_rep.cli.main import main

# As the console script does it, and then what of the slow packages is there.
CONSOLE_SCRIPT = """
import atexit, sys
sys.argv[0] = 'bin/timm-rep'
slow = {'torch', 'timm', 'huggingface_hub'}
atexit.register(lambda: print('loaded', *sorted(slow & set(sys.modules)), file=sys.stderr))
from timm_rep.cli.main import main
main()
"""


def call(*args, code=0):
    """Run a command and return what it printed; errors are one line without traceback."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    if code:
        assert result.output.startswith('Error: ')
        assert result.output.count('\n') == 1
    return result.output


def run_console_script(*args, program=CONSOLE_SCRIPT, **kwargs):
    """Run a command as the installed console script does; what it prints on stderr ends with what it has loaded."""
    command = [sys.executable, '-c', program, *map(str, args)]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), PYTHONUNBUFFERED='', **kwargs.pop('env', {}))
    return subprocess.run(command, **dict(dict(capture_output=True, text=True, timeout=120, env=env), **kwargs))
