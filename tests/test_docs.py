"""The example of a method in the docs works as it stands, in a process of its own."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / 'docs'

USE = """
import timm
stock = timm.create_model('resnet18', num_classes=10, zero_init_last=False).eval()
x = torch.randn(2, 3, 64, 64)
rep = timm_rep.expand(stock, Half(factor=0.25))
assert str(timm_rep.expansion_of(rep)).endswith('are half'), timm_rep.expansion_of(rep)
assert torch.allclose(rep(x), stock(x), rtol=1e-4, atol=1e-4)
exact = timm_rep.expand(stock.double(), Half(factor=0.3))
torch.testing.assert_close(exact(x.double()), stock(x.double()), rtol=0, atol=1e-12)
stock.float()
timm_rep.begin_time_step(rep)
timm_rep.verify(rep, timm_rep.fuse(rep), inputs=x)
trained = timm.create_model('repan_resnet18_cifar', rep_layer='half').train()
timm_rep.Annealer(
    trained, torch.optim.SGD(trained.parameters(), 0.1), timm_rep.AnnealingSchedule(2, 2, 1), freeze_origin=True)
torch.jit.script(rep.layer1)
trained(torch.randn(2, 3, 32, 32)).sum().backward()
assert all(parameter.grad is not None for parameter in trained.parameters())
timm_rep.save(rep, FILE)
"""


@pytest.mark.skipif(not DOCS.is_dir(), reason='the docs are in a checkout only')
def test_own_method_of_the_docs(tmp_path):
    code, = re.findall(r'```python\n(.*?)```', (DOCS / 'methods.md').read_text(), re.S)
    file = tmp_path / 'half.py'  # TorchScript reads the source
    file.write_text(code)
    kept = tmp_path / 'kept.safetensors'
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))

    def run(*arguments):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run('-c', f'from half import *\nFILE = {str(kept)!r}\n{USE}')
    assert 'layers agree' in run('-m', 'timm_rep', '--import', 'half', 'fuse', kept, tmp_path / 'stock.safetensors')
