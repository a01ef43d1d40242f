"""A run to publish, and how: shared by the tests of publishing."""
import argparse
import json
import os
import subprocess
import sys

import huggingface_hub
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import constants
from packaging.version import Version

import timm_rep
from timm_rep.cli.main import main

ARCHITECTURE, STOCK = 'orepa_test_resnet', 'test_resnet'
REPO = 'me/test_resnet.orepa_pets'
CLASSES = 6
SECRET = 'hf_' + 'S3cret' * 5

OLD_CLIENT = Version(huggingface_hub.__version__) < Version('1.0')

RUN_ARGS = dict(
    model=ARCHITECTURE, num_classes=CLASSES, in_chans=None, epochs=3, batch_size=4, opt='sgd', lr=0.1, sched='cosine',
    weight_decay=1e-4, seed=42, model_ema=False, val_split='test', dataset='', data_dir='/home/someone/images',
    data=None, output='/home/someone/output', experiment='secret project', initial_checkpoint='/home/someone/start.pth',
    class_map='', wandb_project='mine', opt_kwargs={}, model_kwargs={}, kd_token_distill_type='soft',
    hub_token=SECRET, note=f'push with {SECRET}', input_size=[3, 32, 32], mean=[0.5, 0.5, 0.5], interpolation='bicubic')
SUMMARY = """epoch,train_loss,eval_loss,eval_top1,eval_top5,lr
0,1.9,1.8,20.0,90.0,0.1
1,1.7,1.6,41.5,97.25,0.05
2,1.6,1.7,40.0,96.0,0.01
"""


def call(*args, code=0):
    """Run a command; what it printed, and of a failure the one line of its error."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    if code:
        errors = [line for line in result.output.splitlines() if line.startswith('Error: ')]
        assert len(errors) == 1, result.output
        return errors[0]
    return result.output


def publish_json(*args):
    output = call('publish', *args, '--json')
    return json.loads(output[output.index('{\n'):])


def in_own_process(code, *args, **env):
    """Run code with nothing of this package; the environment names the Hub."""
    env = dict(os.environ, HF_HUB_CACHE=constants.HF_HUB_CACHE, HF_ENDPOINT=constants.ENDPOINT,
               HF_HUB_DISABLE_XET='1', OMP_NUM_THREADS='1', **env)
    env.pop('PYTHONPATH', None)
    done = subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def card_of(server, revision='main'):
    return server.files(REPO, revision)['README.md'].decode()


def cached_files(tmp_path):
    return [path for path in (tmp_path / 'cache').rglob('*') if path.is_file() and path.suffix == '.safetensors']


def put_card(card, revision='main'):
    api = huggingface_hub.HfApi()
    api.create_repo(REPO, exist_ok=True)
    api.upload_file(path_or_fileobj=card.encode(), path_in_repo='README.md', repo_id=REPO, revision=revision)


def exported(run_folder, tmp_path, **kwargs):
    """Publish without sending; config.json's provenance, and the card."""
    folder = timm_rep.publish(run_folder, REPO, dry_run=True, out=tmp_path / 'out', **kwargs).folder
    return json.loads((folder / 'config.json').read_text()), (folder / 'README.md').read_text()


def other_run(run_folder, folder, summary=False, **args):
    """A run of the same weights with other arguments."""
    content = torch.load(run_folder / 'model_best.pth.tar', weights_only=False)
    folder.mkdir()
    args = dict(RUN_ARGS, **args)
    torch.save(dict(content, args=argparse.Namespace(**args), metric=41.5), folder / 'model_best.pth.tar')
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    if summary:
        (folder / 'summary.csv').write_text(SUMMARY)
    return folder


def fused_wrongly(fuse, model):
    fused = fuse(model)
    with torch.no_grad():
        fused.layer2[0].conv1.weight[0] *= 1.01
    return fused
