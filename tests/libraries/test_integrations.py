"""What other libraries need is imported by name only, and reads without them."""
import subprocess
import sys

CODE = """
import sys
sys.modules['ultralytics'] = None  # as if it were not installed
import timm_rep
assert not [name for name in sys.modules if name.startswith('timm_rep.integrations')]
import timm_rep.integrations.ultralytics as integration
assert issubclass(integration.RepTraining, object)
try:
    integration.RepTrainer
except ModuleNotFoundError as e:
    assert 'ultralytics' in str(e)
else:
    raise SystemExit('made a trainer of nothing')
assert not hasattr(integration, 'nonsense')
"""


def test_integrations_are_asked_for():
    done = subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
