"""benchmarks/int8.py: a tiny run from end to end."""
import importlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).parents[2] / 'benchmarks' / 'int8.py'
for package in ('onnx', 'onnxruntime', 'onnxscript'):
    pytest.importorskip(package, reason=f'the benchmark needs {package}')


@pytest.fixture
def int8(monkeypatch):
    if not SCRIPT.exists():
        pytest.skip('the benchmarks are in a checkout only')
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module('int8')


def test_report(int8, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', 10), ('test', 4)):
        for label in range(10):
            folder = tmp_path / 'images' / split / str(label)
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f'{index}.png')
    monkeypatch.setattr(int8, 'NETWORKS', {'one norm, OREPA': int8.chain})
    out = tmp_path / 'int8'
    int8.main([
        '--data', str(tmp_path / 'images'), '--test-images', '40', '--calibration', '20', '--train-images', '40',
        '--epochs', '1', '--batch', '20', '--out', str(out)])
    report = json.loads(out.with_suffix('.json').read_text())
    assert list(report['results']) == [int8.PUBLISHED, 'one norm, OREPA']
    for result in report['results'].values():
        assert all(0 <= result['top1'][form] <= 100 for form in ('float', 'per tensor', 'per channel'))
        assert result['range'] >= 1
    table = out.with_suffix('.md').read_text()
    assert f'| {int8.PUBLISHED} | ' in table


def test_range_sees_a_channel_that_stands_out(int8):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].weight[0] = 8.0
    assert int8.channel_range(model) == pytest.approx(8, rel=1e-3)
