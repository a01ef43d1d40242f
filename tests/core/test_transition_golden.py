"""A time step begins as in the code of RepAn's authors: the same tensors, with the same draw of the side branches."""
import gzip
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import assert_near
from timm.models.byobnet import RepVggBlock

from timm_rep import begin_time_step, set_attach_rate
from timm_rep.core.layers import AnnealedRepVggBlock, AsymmetricConv2d, DiverseBranchConv2d, RepConv2d

GOLDEN = Path(__file__).parents[1] / 'golden'
RTOL = {torch.float64: 1e-12, torch.float32: 1e-6}
BLOCKS = dict(
    repvgg_keep_gain=(lambda: AnnealedRepVggBlock(RepVggBlock(4, 4)), 'keep_gain'),
    repvgg=(lambda: AnnealedRepVggBlock(RepVggBlock(4, 4)), 'authors'),
    dbb=(lambda: DiverseBranchConv2d(4, 6, 3, padding=1), 'authors'),
    acb=(lambda: AsymmetricConv2d(4, 6, 3, padding=1), 'authors'),
    rep=(lambda: RepConv2d(4, 6, 3, padding=1), 'authors'),
)


def golden(name, dtype):
    tensors = safetensors.torch.load(gzip.decompress((GOLDEN / f'transition_{name}.safetensors.gz').read_bytes()))
    tensors = {key: value.to(dtype) for key, value in tensors.items()}

    def part(prefix):
        return {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}

    return tensors, part('before.'), part('drawn.'), part('after.')


def fill_(block, tensors):
    counters = {key: value for key, value in block.state_dict().items() if key in ('attach_rate', 'time_step')}
    unknown = block.load_state_dict({**counters, **tensors}, strict=False).unexpected_keys
    assert not unknown


def transition(name, dtype=torch.float64, **options):
    """Our block after the transition, with the authors' side kernels."""
    _, before, drawn, _ = golden(name, dtype)
    block = BLOCKS[name][0]().to(dtype)
    fill_(block, before)
    begin_time_step(block, torch.Generator().manual_seed(0), **options)
    own = block.state_dict()
    for key, kernel in drawn.items():
        assert not torch.equal(own[key], kernel), key  # ours were drawn, too
        assert own[key].abs().max() <= 0.1 / len(kernel) ** 0.5 >= kernel.abs().max() - 1e-4
    fill_(block, drawn)
    return block


@pytest.mark.parametrize('name', BLOCKS)
@pytest.mark.parametrize('dtype', RTOL)
@torch.no_grad()
def test_same_tensors_and_outputs_as_the_authors_code(name, dtype):
    expected, before, _, after = golden(name, dtype)
    block = transition(name, dtype, restoration=BLOCKS[name][1])
    state = block.state_dict()
    counters = ('attach_rate', 'time_step', 'num_batches_tracked')
    assert before.keys() == after.keys() == {key for key in state if not key.endswith(counters)}
    for key, value in after.items():
        if value.any():
            assert_near(state[key], value, RTOL[dtype])
        else:  # biases of fresh side branches
            assert torch.equal(state[key], value), key
    set_attach_rate(block, 0.5)
    assert_near(block.train()(expected['input']), expected['output'], RTOL[dtype])


@pytest.mark.parametrize('name', BLOCKS)
def test_another_gain_rule_is_not_the_authors(name):
    other = dict(authors='keep_gain', keep_gain='authors')[BLOCKS[name][1]]
    state = transition(name, restoration=other).state_dict()
    after = golden(name, torch.float64)[-1]
    (gain,) = (key for key in after if key in ('norm_kxk.weight', 'conv_kxk.bn.weight'))
    with pytest.raises(AssertionError, match='largest difference'):
        assert_near(state[gain], after[gain], 1e-2)
