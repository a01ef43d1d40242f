from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from interrupted_run import MODEL, STAND_IN, arguments, run
from torchvision.transforms.functional import to_pil_image

from timm_rep.train.scripts import find_script


@pytest.fixture(scope='session')
def scripts(tmp_path_factory):
    """A folder that holds the stand-in as train.py."""
    folder = tmp_path_factory.mktemp('scripts')
    (folder / 'train.py').symlink_to(STAND_IN)
    return folder


@pytest.fixture(scope='session')
def finished(scripts, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    cwd = tmp_path_factory.mktemp('finished')
    code, log = run(cwd, arguments(scripts, '--log-branches'))
    assert code == 0, log
    return cwd / 'output/train/run'


@pytest.fixture(scope='session')
def timm_scripts():
    """The folder of timm's own train.py."""
    try:
        return Path(find_script('train')).parent
    except (FileNotFoundError, ValueError) as e:
        pytest.skip(f"needs timm's own train.py: {e}")


@pytest.fixture(scope='session')
def settled(tmp_path_factory):
    """Weights whose norms' statistics are those of the network, as after a training."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=5)
    for _ in range(40):
        model(torch.randn(8, 3, 16, 16))
    path = tmp_path_factory.mktemp('settled') / 'start.safetensors'
    safetensors.torch.save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    """Image folders with the names that timm's script looks for by default."""
    folder = tmp_path_factory.mktemp('photos')
    for split, count in (('train', 4), ('validation', 2)):
        for label in range(5):
            for number in range(count):
                path = folder / split / str(label) / f'{number}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(10 * label + number))
                to_pil_image(pixels).save(path)
    return folder
