import copy
import importlib.util

import pytest
import timm
import torch
from click.testing import CliRunner
from helpers import randn, randomize_

import timm_rep
from timm_rep.cli.main import main
from timm_rep.core.verify import VerificationError
from timm_rep.io import programs as exporting
from timm_rep.io.extras import install_command
from timm_rep.io.programs import ONNX_PACKAGES, export_onnx, export_program

MISSING = [package for package in ONNX_PACKAGES if importlib.util.find_spec(package) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f'the extra "export" is not installed: {", ".join(MISSING)}')


@pytest.fixture(scope='module')
def model():
    stock = timm.create_model('test_resnet', num_classes=5)
    stock.pretrained_cfg = dict(stock.pretrained_cfg, input_size=(3, 32, 32))
    return randomize_(timm_rep.expand(stock, 'orepa'), seed=1).train()


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('run') / 'last.pth.tar'
    model = timm.create_model('orepa_resnet18_cifar', num_classes=3)
    torch.save(dict(arch='orepa_resnet18_cifar', state_dict=model.state_dict()), path)
    return path


def test_program_is_the_fused_model_for_any_batch(model, tmp_path):
    path = tmp_path / 'new' / 'model.pt2'
    assert export_program(model, path).relative <= 1e-4
    assert model.training
    assert [file.name for file in path.parent.iterdir()] == ['model.pt2']
    program = torch.export.load(path)
    assert len(program.state_dict) == len(timm_rep.fuse(model.eval()).state_dict())
    inputs = randn(7, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        assert program.module()(inputs).shape == (7, 5)


@needs_onnx
def test_onnx_is_the_fused_model_for_any_batch(model, tmp_path):
    import onnx
    import onnxruntime
    path = tmp_path / 'model.onnx'
    assert export_onnx(model, path).relative <= 1e-4
    assert [file.name for file in tmp_path.iterdir()] == ['model.onnx']
    convolutions = [node for node in onnx.load(path).graph.node if node.op_type == 'Conv']
    assert len(convolutions) == sum(isinstance(m, torch.nn.Conv2d) for m in timm_rep.fuse(model.eval()).modules())
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    assert session.run(['logits'], {'images': randn(7, 3, 32, 32, dtype=torch.float32).numpy()})[0].shape == (7, 5)


@needs_onnx
def test_both_from_the_command_line(checkpoint, tmp_path):
    args = ['fuse', str(checkpoint), '--num-classes', '3']
    outputs = [str(tmp_path / name) for name in ('m.onnx', 'm.pt2')]
    result = CliRunner().invoke(main, [*args, '--onnx', outputs[0], '--torch-export', outputs[1]])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ['m.onnx', 'm.pt2']
    assert all(f'{output} agrees to ' in result.output for output in outputs)
    for more, message in ((['--onnx', outputs[0]], 'exists already'), ([], 'no output is given')):
        result = CliRunner().invoke(main, [*args, *more])
        assert result.exit_code == 2
        assert message in result.output


def test_a_program_that_differs_is_not_kept(model, tmp_path, monkeypatch):
    deploy_form = exporting._deploy_form
    trace = exporting._trace

    def wrong(fused, images):
        other = deploy_form(fused)
        with torch.no_grad():
            other.fc.weight.mul_(1.001)
        return trace(other, images)

    monkeypatch.setattr(exporting, '_trace', wrong)
    with pytest.raises(VerificationError, match='the model is off'):
        export_program(model, tmp_path / 'model.pt2')
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_an_onnx_file_that_differs_is_not_kept(model, tmp_path, monkeypatch):
    write = exporting._write_onnx

    def wrong(fused, images, path):
        other = copy.deepcopy(fused)
        with torch.no_grad():
            other.fc.weight.mul_(1.001)
        write(other, images, path)

    monkeypatch.setattr(exporting, '_write_onnx', wrong)
    with pytest.raises(VerificationError, match='the model is off'):
        export_onnx(model, tmp_path / 'model.onnx')
    assert list(tmp_path.iterdir()) == []


def test_a_program_of_one_batch_size_is_not_kept(model, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, '_trace', lambda fused, images: torch.export.export(fused, (images,)))
    with pytest.raises((RuntimeError, AssertionError), match=r'(?i)shape|size|guard'):
        export_program(model, tmp_path / 'model.pt2')
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_the_error_names_it(checkpoint, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'onnxruntime' else find_spec(name))
    out = str(tmp_path / 'm.onnx')
    result = CliRunner().invoke(main, ['fuse', str(checkpoint), '--num-classes', '3', '--onnx', out])
    assert result.exit_code == 2
    assert install_command('export') in result.output
    assert 'onnxruntime' in result.output
    assert list(tmp_path.iterdir()) == []
