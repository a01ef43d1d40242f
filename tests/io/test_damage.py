"""A damaged checkpoint is never read as whole: every record of it has a sum."""
import argparse
import random
import re

import pytest
import torch
from helpers import assert_same_state
from torch.serialization import safe_globals

from timm_rep.core.errors import UserError
from timm_rep.io.checkpoint import read_checkpoint


def save_small(path, **options):
    torch.manual_seed(0)
    state = dict(weight=torch.randn(5, 4), bias=torch.randn(5), tracked=torch.tensor(7))
    optimizer = dict(state={0: dict(momentum_buffer=torch.randn(5, 4))})
    args = argparse.Namespace(model='resnet18', lr=0.1)
    torch.save(dict(state_dict=state, optimizer=optimizer, epoch=3, metric=41.5, args=args), path, **options)
    return path


def test_any_bit_that_turns_is_noticed_or_says_nothing(tmp_path):
    """What says nothing are times, spaces between the records and the like."""
    whole = read_checkpoint(save_small(tmp_path / 'last.pth.tar'))
    content = (tmp_path / 'last.pth.tar').read_bytes()
    refused = 0
    draw = random.Random(0)
    places = range(0, len(content), 11)
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        (tmp_path / 'last.pth.tar').write_bytes(damaged)
        try:
            found = read_checkpoint(tmp_path / 'last.pth.tar')
        except UserError:
            refused += 1
        else:
            assert_same_state(found.state_dict, whole.state_dict)
            assert (found.epoch, found.metric, found.args) == (3, 41.5, dict(model='resnet18', lr=0.1))
    assert refused > len(places) / 3


def test_the_optimizer_counts_too(tmp_path):
    """It is not taken here, but by a run that goes on."""
    path = save_small(tmp_path / 'last.pth.tar')
    with safe_globals([argparse.Namespace]):
        momentum = torch.load(path, weights_only=True)['optimizer']['state'][0]['momentum_buffer']
    content = path.read_bytes()
    values = momentum.numpy().tobytes()
    assert content.count(values) == 1
    path.write_bytes(content.replace(values, bytes([values[0] ^ 1]) + values[1:]))
    with pytest.raises(ValueError, match=r'its record last\.pth/data/3 is damaged'):
        read_checkpoint(path)


def test_a_record_that_claims_to_be_a_folder(tmp_path):
    """torch hands out memory that nobody has written to for it."""
    path = save_small(tmp_path / 'last.pth.tar')
    content = bytearray(path.read_bytes())
    for place in [found.start() for found in re.finditer(b'PK\x01\x02', content)]:
        damaged = bytearray(content)
        damaged[place + 38] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r'its record last\.pth/\S+ is damaged: it is marked as a folder'):
            read_checkpoint(path)


@pytest.mark.parametrize('kind', ['without sums', 'older format'])
def test_files_without_sums_are_read(tmp_path, kind):
    if kind == 'older format':
        path = save_small(tmp_path / 'x.pth', _use_new_zipfile_serialization=False)
    else:
        torch.serialization.set_crc32_options(False)
        try:
            path = save_small(tmp_path / 'x.pth')
        finally:
            torch.serialization.set_crc32_options(True)
    assert read_checkpoint(path).epoch == 3
