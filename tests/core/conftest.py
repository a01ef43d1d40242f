"""The stand-in for CUDA graphs, as a fixture."""
import pytest
import torch
from graph_stand_in import Graphs

from timm_rep.core.capture import _GraphedComposition


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', Graphs())
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device', torch.device)
    monkeypatch.setattr(_GraphedComposition, 'device_type', 'cpu')
    return torch.cuda.make_graphed_callables
