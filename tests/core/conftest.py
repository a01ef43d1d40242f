"""Surroundings of a training: the stand-in for CUDA graphs, a group of processes."""
import pytest
import torch
import torch.distributed as dist
from graph_stand_in import Graphs

from timm_rep.core import capture


@pytest.fixture
def graphs(monkeypatch):
    stand_in = type('Graphs', (Graphs,), {})  # that counts from zero
    monkeypatch.setattr(capture, 'CudaGraphs', stand_in)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device', torch.device)
    monkeypatch.setattr(capture._GraphedComposition, 'device_type', 'cpu')
    return stand_in


@pytest.fixture
def process_group(tmp_path):
    """A group of one process."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()
