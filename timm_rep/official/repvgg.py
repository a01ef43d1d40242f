"""RepVGG, of the repositories of RepVGG, OREPA and RepAn."""
from typing import Any, Iterator, Set, Tuple

import torch.nn as nn

from .blocks import fill_block, skip_folded
from .plain import fill_folded, fill_plain, silence_
from .source import Source

__all__ = ['fill_repvgg']


def fill_repvgg(source: Source, model: Any) -> Set[str]:
    """Fill a RepVGG, and return the names of the parts that are filled."""
    is_repan = source.has('stages.')
    names = dict(_block_names(model, is_repan))
    fill = _fill_folded_block if source.is_folded else _fill_repan_block if is_repan else _fill_block
    for name, theirs in names.items():
        block: Any = model.get_submodule(name)
        fill(source, theirs, block)
        if not isinstance(block.attn, nn.Identity):
            for ours, part in ((block.attn.fc1, 'down'), (block.attn.fc2, 'up')):
                source.fill_weight_bias(ours, f'{theirs}.se.{part}')
    return set(names)


def _block_names(model: Any, is_repan: bool) -> Iterator[Tuple[str, str]]:
    """Our name and the authors' of every block."""
    yield 'stem', 'stages.0.sequential.0' if is_repan else 'stage0'
    for stage, blocks in enumerate(model.stages):
        theirs = f'stages.{stage + 1}.sequential' if is_repan else f'stage{stage + 1}'
        for position in range(len(blocks)):
            yield f'stages.{stage}.{position}', f'{theirs}.{position}'


def _fill_block(source: Source, prefix: str, block: Any) -> None:
    for part, name in ((block.conv_kxk, 'rbr_dense'), (block.conv_1x1, 'rbr_1x1')):
        fill_block(source, f'{prefix}.{name}', part.conv, part.bn)
    if block.identity is not None:
        source.fill_norm(block.identity, f'{prefix}.rbr_identity')


def _fill_repan_block(source: Source, prefix: str, block: Any) -> None:
    for part, size in ((block.conv_kxk, 3), (block.conv_1x1, 1)):
        fill_plain(source, f'{prefix}.conv_{size}', f'{prefix}.bn_{size}', part.conv, part.bn)
    skip_folded(source, prefix)
    if not source.has(f'{prefix}.bn_0.'):
        silence_(block.identity)  # RepAn's first block of a stage has no identity branch, whatever its shape
    elif block.identity is not None:
        source.fill_norm(block.identity, f'{prefix}.bn_0')


def _fill_folded_block(source: Source, prefix: str, block: Any) -> None:
    """Put a folded block into the KxK branch; the other branches end in a norm of gain zero and add nothing."""
    fill_folded(source, prefix, block.conv_kxk.conv, block.conv_kxk.bn)
    silence_(block.conv_1x1.bn)
    silence_(block.identity)
