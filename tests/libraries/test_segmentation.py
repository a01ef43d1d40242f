"""examples/segmentation.py: a run in small, and what it measures."""
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import timm_rep

EXAMPLE = Path(timm_rep.__file__).parents[1] / 'examples' / 'segmentation.py'
pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason='the examples are in a checkout only')


@pytest.fixture(scope='module')
def segmentation():
    spec = importlib.util.spec_from_file_location('segmentation', EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_forms_side_by_side(segmentation, capsys):
    segmentation.main([
        '--backbone', 'test_resnet', '--size', '32', '--images', '8', '--test-images', '4', '--batch', '4',
        '--steps', '2'])
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert set(lines) == {'plain', 'DBB', 'OREPA'}
    parameters, memory = ({name: float(line[column]) for name, line in lines.items()} for column in (1, 6))
    assert parameters['plain'] < parameters['DBB']
    assert memory['plain'] < memory['OREPA']
    assert memory['plain'] < memory['DBB']


def test_memory_is_what_is_kept(segmentation):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(inplace=True))
    trainee = segmentation.Trainee(model, 0.1, torch.device('cpu'))
    images = torch.randn(2, 3, 64, 64)
    assert trainee.memory(images) == 4 * 2 * (3 + 4) * 64 * 64 / 2 ** 20  # input and output of the two


def test_drawn_shapes(segmentation):
    images, masks = segmentation.draw_shapes(4, 32, torch.Generator().manual_seed(0))
    assert images.shape == (4, 3, 32, 32)
    assert set(masks.unique().tolist()) <= {0, 1, 2}
    assert (masks == 2).any()
    perfect = lambda x: nn.functional.one_hot(masks, 3).permute(0, 3, 1, 2).float()  # noqa: E731
    assert segmentation.mean_iou(perfect, images, masks, torch.device('cpu')) == pytest.approx(100)


def test_what_cannot_work_is_refused(segmentation, capsys):
    for arguments, message in ((['--steps', '1'], 'at least two'), (['--backbone', 'resnet19'], 'knows no resnet19')):
        with pytest.raises(SystemExit):
            segmentation.main(arguments)
        assert message in capsys.readouterr().err
