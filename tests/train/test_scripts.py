import importlib.util
import json
import re
import signal
import subprocess
import sys

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from timm_rep.core.errors import UserError
from timm_rep.train.scripts import SCRIPTS, find_script, run_script

# Says what a script sees: its command line, our models, and which timm it gets.
FAKE_SCRIPT = """
import json, sys
import timm
result = dict(
    argv=sys.argv, name=__name__, timm=timm.__version__, registered=timm.is_model('orepa_resnet18'), path=sys.path)
with open(sys.argv[1], 'w') as file:
    json.dump(result, file)
if '--fail' in sys.argv:
    sys.exit(3)
"""


@pytest.fixture(autouse=True)
def _no_scripts_around(monkeypatch, tmp_path):
    monkeypatch.delenv('TIMM_SCRIPTS', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def write_script(folder, name='train'):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{name}.py'
    path.write_text(FAKE_SCRIPT)
    return path


def test_where_a_script_is_looked_for(monkeypatch, tmp_path):
    """A folder that is given, or named by the variable, is the only one; the installed checkout is before the cache."""
    cached = write_script(tmp_path / 'cache' / 'timm_rep' / f'timm-{timm.__version__}')
    assert find_script('train') == cached
    checkout = write_script(tmp_path / 'checkout')
    monkeypatch.setattr(timm, '__file__', str(checkout.parent / 'timm' / '__init__.py'))
    assert find_script('train') == cached
    (checkout.parent / 'pyproject.toml').touch()
    assert find_script('train') == checkout
    variable = write_script(tmp_path / 'variable')
    monkeypatch.setenv('TIMM_SCRIPTS', str(variable.parent))
    assert find_script('train') == variable
    given = write_script(tmp_path / 'given')
    assert find_script('train', given.parent) == given
    with pytest.raises(FileNotFoundError, match='elsewhere'):
        find_script('train', tmp_path / 'elsewhere')


def test_missing_script_says_where_it_looked_and_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        find_script('validate')
    message = str(error.value)
    assert str(tmp_path / 'cache' / 'timm_rep' / f'timm-{timm.__version__}' / 'validate.py') in message
    assert f'git clone --depth 1 --branch v{timm.__version__} https://' in message
    assert 'TIMM_SCRIPTS' in message
    assert not (tmp_path / 'cache').exists()
    with pytest.raises(UserError, match=f'allowed are {", ".join(SCRIPTS)}'):
        find_script('../train')


def test_script_runs_as_main_with_our_models_and_the_installed_timm(tmp_path):
    script = write_script(tmp_path / 'checkout')
    shadow = tmp_path / 'checkout' / 'timm' / '__init__.py'
    shadow.parent.mkdir()
    shadow.write_text('raise ImportError("the wrong timm")')
    own_argv = sys.argv[:]
    run_script(script, [str(tmp_path / 'seen.json'), '--model', 'orepa_resnet18'])
    seen = json.loads((tmp_path / 'seen.json').read_text())
    assert seen['argv'] == [str(script), str(tmp_path / 'seen.json'), '--model', 'orepa_resnet18']
    assert seen['name'] == '__main__'
    assert seen['registered']
    assert seen['timm'] == timm.__version__
    assert str(script.parent) not in seen['path']
    with pytest.raises(SystemExit) as error:
        run_script(script, [str(tmp_path / 'seen.json'), '--fail'])
    assert error.value.code == 3
    assert sys.argv == own_argv


def test_an_interruption_that_a_script_swallows_is_an_error_all_the_same(tmp_path):
    script = tmp_path / 'validate.py'
    script.write_text("""
import os, signal, sys
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    open(sys.argv[1], 'w').write('results so far')
""")
    with pytest.raises(KeyboardInterrupt):
        run_script(script, [str(tmp_path / 'results')])
    assert (tmp_path / 'results').read_text() == 'results so far'
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interruption_that_somebody_else_handles_is_theirs(tmp_path):
    script = tmp_path / 'validate.py'
    script.write_text('import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n')
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it runs in the background
    try:
        run_script(script)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, usual)


@pytest.mark.parametrize(('name', 'args', 'hint'), [
    ('onnx_export', ['x.onnx', '--model=repan_resnet18.tag'], True),
    ('benchmark', ['-m', 'dbb_resnet18', '--model-kwargs', 'a=1'], True),
    ('benchmark', ['-m', 'dbb_resnet18', '--reparam'], False),
    ('benchmark', ['--model-kwargs', 'inference_mode=True', '-m', 'dbb_resnet18'], False),
    ('validate', ['--model', 'resnet18'], False),
    ('train', ['--model', 'orepa_resnet18'], False),
])
def test_scripts_that_keep_the_branches_say_so(name, args, hint, tmp_path, caplog):
    path = tmp_path / f'{name}.py'
    path.write_text('')
    run_script(path, args)
    assert ('--reparam fuses it first' in caplog.text) is hint


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='needs pandas: pip install pandas'):
        run_script(tmp_path / 'inference.py', ['--help'])


@pytest.mark.parametrize('name', ['orepa_repvgg_a0_cifar', 'dbb_resnet18_cifar'])
def test_timm_decays_scales_and_branches_but_no_norms_and_biases(name):
    model = timm.create_model(name)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1, weight_decay=1e-4)
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    decayed = {key for key, parameter in model.named_parameters() if decay[id(parameter)] > 0}
    norms = {
        f'{key}.{kind}' for key, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)
        for kind in ('weight', 'bias')}
    assert decayed.isdisjoint(norms)
    names = {key for key, _ in model.named_parameters()}
    assert names - decayed - norms == {f'{model.pretrained_cfg["classifier"]}.bias'}


@pytest.mark.parametrize('home', ['timm.utils', 'timm.utils.model'])
@pytest.mark.parametrize('name', ['dbb_resnet18_cifar', 'repan_repvgg_a0_cifar', 'repvgg_a0'])
def test_scripts_fuse_in_eval_mode(home, name, tmp_path):
    """timm's do so before they set it."""
    script = tmp_path / 'validate.py'
    script.write_text(f'''
import sys, timm, torch
from {home} import reparameterize_model
model = reparameterize_model(timm.create_model('{name}'))
torch.save(sorted({{type(module).__name__ for module in model.modules()}}), sys.argv[1])
''')
    own = timm.utils.reparameterize_model
    run_script(script, [str(tmp_path / 'kinds.pt'), '--reparam'])
    kinds = torch.load(tmp_path / 'kinds.pt')
    assert 'Conv2d' in kinds
    assert not {'DiverseBranchConv2d', 'AnnealedRepVggBlock'} & set(kinds)
    assert timm.utils.reparameterize_model is timm.utils.model.reparameterize_model is own


@pytest.mark.timeout(600)
def test_real_train_and_validate(timm_scripts, photos, tmp_path):
    common = ['--data-dir', photos, '--model', 'orepa_repvgg_a0_cifar', '--num-classes', 5, '--device', 'cpu', '-j', 0]

    def top1(script, *args):
        code = 'import sys; from timm_rep.train.scripts import run_script; run_script(sys.argv[1], sys.argv[2:])'
        command = [sys.executable, '-c', code, timm_scripts / f'{script}.py', *common, '-b', 4, *args]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return re.search(r'--result[\s\S]*"top1": ([\d.]+)', done.stdout)

    top1('train', '--epochs', 1, '--experiment', 'run', '--output', tmp_path)
    options = ['--split', 'validation', '--checkpoint', tmp_path / 'run' / 'last.pth.tar']
    assert top1('validate', *options)[1] == top1('validate', *options, '--reparam')[1]
