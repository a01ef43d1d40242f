"""Commands about the Hub: ``publish``."""
from typing import Any

import click

from .errors import Command
from .options import checkpoint_options, json_option
from .output import print_json, report_content, say

__all__ = ['publish']


@click.command('publish', cls=Command)
@click.argument('source', metavar='CHECKPOINT_OR_RUN_DIR', type=click.Path())
@click.option('--repo', metavar='ORG/NAME', required=True, help='Repository on the Hub; made if it is not there.')
@click.option('--data', metavar='DIR', type=click.Path(), help='Real images to compare both forms on.')
@click.option('--max-images', metavar='N', type=click.IntRange(min=1), help='Take only so many of them.')
@click.option('--split', metavar='NAME', help="Split of them to take; the run's, else validation, by default.")
@click.option('--dataset', metavar='NAME', help='Data set, if the run does not say.')
@click.option('--tag', metavar='TAG', help='Recipe and data set in timm\'s sense; by default method and data set.')
@click.option('--license', metavar='ID', default='unknown', show_default=True, help='Licence of the weights.')
@click.option('--out', metavar='DIR', type=click.Path(), help='Folder to write; by default NAME, NAME-2 ... here.')
@click.option('--dry-run', is_flag=True, help='Write the folder, send nothing.')
@click.option('--private', is_flag=True, help='Make a new repository private.')
@click.option('--revision', metavar='BRANCH', help='Branch to publish on instead of the main one.')
@click.option('--create-pr', is_flag=True, help='Open a pull request.')
@click.option('--git-tag', metavar='TAG', help='Tag the commit on the Hub, e.g. v1.')
@click.option(
    '--include-training-form', is_flag=True,
    help='Put the training form on the revision "train": timm_rep loads it as hf-hub:ORG/NAME@train.')
@click.option('--replace-card', is_flag=True, help='Replace a model card that was written by hand.')
@click.option('--device', default='cpu', show_default=True, help='Where images are run and speed is measured.')
@checkpoint_options
@json_option
def publish(source: str, repo: str, as_json: bool, dry_run: bool, create_pr: bool, **kwargs: Any) -> None:
    """Publish a trained model on the Hugging Face Hub, in stock form: anyone loads it with timm alone.

    CHECKPOINT_OR_RUN_DIR is the output folder of timm's train.py, or a checkpoint in it. It is fused, verified layer
    by layer and end to end, measured, written to a folder, and sent in one commit. Nothing is sent that does not
    verify, and the folder stays. Log in with `hf auth login`, or set HF_TOKEN.

    \b
    Examples:
      timm-rep publish output/train/run --repo me/resnet50.orepa_in1k --data imagenet --dataset ImageNet-1k --dry-run
      timm-rep publish output/train/run --repo me/resnet50.orepa_in1k --data imagenet --dataset ImageNet-1k
      timm-rep publish last.pth.tar --repo me/resnet18.orepa_pets --model orepa_resnet18 --num-classes 37 --private
    """
    from ..hub.publish import publish as publish_model

    published = publish_model(source, repo, dry_run=dry_run, create_pr=create_pr, progress=True, **kwargs)
    if as_json:
        content = dict(vars(published), ok=True)
        content.update(verification=report_content(content.pop('report')), registry_entry=content.pop('entry'))
        print_json(content)
        return
    say(f'{published.folder}: {published.report}')
    for name, size in published.files.items():
        say(f'  {size:>12,}  {name}')
    if dry_run:
        way = 'pull request' if create_pr else 'commit'
        target = f'{published.repo}@{published.revision}'
        say(f'Dry run, nothing was sent: these {len(published.files)} files would go to {target} in one {way}.')
        if published.training_folder is not None:
            say(f'The training form in {published.training_folder} would go to {published.repo}@train.')
    else:
        load = f"timm.create_model('hf-hub:{published.hub_id}', pretrained=True)"
        say(f'Published: {published.pull_request or published.commit}')
        say(f'Once it is merged, load it with {load}' if create_pr else f'Load it with {load}')
    if published.entry is not None:
        say('To let pretrained=True find the weights, add to timm_rep/models/published.json:')
        print_json(published.entry)
