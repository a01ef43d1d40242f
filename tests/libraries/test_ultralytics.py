"""Ultralytics YOLO: trained with rep layers, resumed, and left behind as the stock network."""
import os
import pickletools
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from helpers import assert_near, randomize_
from library_recipes import PAGE, run
from PIL import Image

import timm_rep
from timm_rep.core.walk import rep_layers

os.environ.setdefault('YOLO_OFFLINE', 'true')
os.environ.setdefault('YOLO_CONFIG_DIR', tempfile.mkdtemp())  # where it keeps its settings
pytest.importorskip('ultralytics', reason='needs Ultralytics')

from ultralytics import YOLO
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.nn.tasks import DetectionModel, torch_safe_load

from timm_rep.integrations.ultralytics import RepTrainer, RepTraining, fuse_checkpoint, rep_trainer


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Six images of 32 pixels, each with one bright box of one of two classes."""
    root = tmp_path_factory.mktemp('boxes')
    generator = torch.Generator().manual_seed(0)
    for folder in ('images', 'labels'):
        (root / folder).mkdir()
    for index in range(6):
        pixels = torch.randint(80, (32, 32, 3), generator=generator, dtype=torch.uint8)
        pixels[8:24, 8:24, index % 2] = 250
        Image.fromarray(pixels.numpy()).save(root / 'images' / f'{index}.png')
        (root / 'labels' / f'{index}.txt').write_text(f'{index % 2} 0.5 0.5 0.5 0.5\n')
    file = root / 'data.yaml'
    file.write_text(f'path: {root}\ntrain: images\nval: images\nnames: [red, green]\n')
    return file


@pytest.fixture
def settings(data, tmp_path):
    return dict(
        data=str(data), epochs=1, imgsz=32, batch=3, workers=0, device='cpu', plots=False, optimizer='SGD', amp=False,
        project=str(tmp_path), name='run', verbose=False, mosaic=0.0, warmup_epochs=0.0, seed=0)


def is_rep(model):
    return next(rep_layers(model), None) is not None


def classes_in(file):
    """Modules that a checkpoint's pickle names."""
    with zipfile.ZipFile(file) as archive:
        name, = [name for name in archive.namelist() if name.endswith('data.pkl')]
        return {arg for _, arg, _ in pickletools.genops(archive.read(name)) if isinstance(arg, str)}


def with_callback(model, event, action):
    model.add_callback(event, action)
    return model


@pytest.mark.skipif(not PAGE.exists(), reason='the docs are in a checkout only')
@pytest.mark.parametrize('network', ['yolov8n', 'yolo11n'])
def test_two_lines_train_and_leave_the_stock_network_behind(network, settings, tmp_path):
    seen = []

    def built(file):
        return with_callback(
            YOLO(f'{network}.yaml'), 'on_fit_epoch_end', lambda trainer: seen.append((trainer.model, trainer.ema.ema)))

    data = settings.pop('data')
    model = run('Ultralytics YOLO', YOLO=built, data=data, settings=settings)['model']

    assert is_rep(seen[0][0])
    assert is_rep(seen[0][1])
    trained = {name: value.clone() for name, value in seen[0][0].named_parameters()}
    assert all(value.isfinite().all() for value in trained.values())
    assert not is_rep(model.model)
    stock = DetectionModel(f'{network}.yaml', nc=2, verbose=False)
    weights = tmp_path / 'run' / 'weights'
    assert {file.name for file in weights.iterdir()} == {'best.pt', 'last.pt'}
    for file in weights.iterdir():
        assert not [name for name in classes_in(file) if name.startswith('timm_rep')]
        loaded, _ = torch_safe_load(file, safe_only=True)  # nothing in it but what Ultralytics allows
        assert loaded['model'].state_dict().keys() == stock.state_dict().keys()
        stock.load_state_dict(loaded['model'].state_dict())

    # what was left behind is the averaged model, to the half precision in which Ultralytics saves
    averaged, fused = timm_rep.fuse(seen[0][1].eval()), YOLO(weights / 'last.pt').model
    for (name, ours), theirs in zip(fused.state_dict().items(), averaged.state_dict().values()):
        if ours.is_floating_point() and theirs.abs().max() > 1e-3:  # smaller ones have fewer digits
            assert_near(ours, theirs, 5e-4), name
    assert model.val(data=data, imgsz=32, plots=False, verbose=False).box is not None
    image = torch.rand(1, 3, 32, 32)
    assert len(model.predict(image, imgsz=32, verbose=False)) == 1


class Stopped(Exception):
    pass


def stop_after_first(trainer):
    if trainer.epoch == 0:
        raise Stopped


def test_resumed_with_its_branches(settings, tmp_path):
    with pytest.raises(Stopped):
        with_callback(YOLO('yolov8n.yaml'), 'on_model_save', stop_after_first).train(
            trainer=RepTrainer, **dict(settings, epochs=2))
    last = tmp_path / 'run' / 'weights' / 'last.pt'
    kept = YOLO(last)
    assert is_rep(kept.model)
    assert len(kept.predict(torch.rand(1, 3, 32, 32), imgsz=32, verbose=False)) == 1  # also in training form
    before = {name: value.clone() for name, value in kept.model.state_dict().items()}

    stopped = fuse_checkpoint(last, tmp_path / 'stopped.pt')
    assert not is_rep(YOLO(stopped).model)
    assert is_rep(YOLO(last).model)  # the file itself stays

    with pytest.raises(ValueError, match='parameter group'):  # and not in silence
        YOLO(last).train(trainer=DetectionTrainer, resume=True)

    starts = []

    def note(trainer):
        starts.append((trainer.epoch, {k: v.clone() for k, v in trainer.model.state_dict().items()}))

    resumed = with_callback(YOLO(last), 'on_train_epoch_start', note)
    resumed.train(trainer=RepTrainer, resume=True)
    (epoch, state), = starts
    assert epoch == 1
    assert state.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    assert not is_rep(resumed.model)


def test_starts_from_weights_with_their_function(settings):
    start = randomize_(DetectionModel('yolov8n.yaml', nc=2, verbose=False)).eval()
    x = torch.rand(2, 3, 32, 32)

    def built(method, weights, nc=2):
        trainer = object.__new__(rep_trainer(method))
        trainer.data = dict(nc=nc, channels=3, names={i: str(i) for i in range(nc)})
        trainer.args = None
        return trainer.get_model('yolov8n.yaml', weights, verbose=False).eval()

    for method in ('orepa', {'model.2*': None, '*': 'dbb'}):
        rep = built(method, start)
        assert is_rep(rep)
        assert_near(rep(x)[0], start(x)[0], 1e-4)
    again = built('orepa', rep)  # the expansion that the weights come with
    assert timm_rep.expansion_of(again).methods == timm_rep.expansion_of(rep).methods
    assert all(torch.equal(value, rep.state_dict()[name]) for name, value in again.state_dict().items())
    for ours, theirs in zip(built('orepa', rep, nc=3).model[:22].parameters(), rep.model[:22].parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(not PAGE.exists(), reason='the docs are in a checkout only')
def test_trainers_of_the_docs():
    made = run('Ultralytics YOLO', 1, SegmentationTrainer=SegmentationTrainer, timm_rep=timm_rep)
    assert made['dbb'].method == 'dbb'
    assert issubclass(made['dbb'], DetectionTrainer)
    rep = timm_rep.expand(DetectionModel('yolov8n.yaml', verbose=False), made['backbone'].method)
    assert {name.split('.')[1] for name, _ in rep_layers(rep)} == set('123456789')
    assert issubclass(made['MySegmentation'], SegmentationTrainer)


def test_orthogonal_steps_leave_branches_alone():
    model = timm_rep.expand(DetectionModel('yolov8n.yaml', nc=2, verbose=False))
    trainer = object.__new__(RepTrainer)
    trainer.data = dict(nc=2)
    optimizer = trainer.build_optimizer(model, name='MuSGD', lr=0.01, momentum=0.9, decay=5e-4)
    branches = {id(parameter) for _, layer in rep_layers(model) for parameter in layer.parameters()}
    muon = [parameter for group in optimizer.param_groups if group['use_muon'] for parameter in group['params']]
    everything = [id(parameter) for group in optimizer.param_groups for parameter in group['params']]
    assert muon
    assert not branches & {id(parameter) for parameter in muon}
    assert sorted(everything) == sorted(id(parameter) for parameter in model.parameters())


def test_other_tasks_and_own_trainers(tmp_path):
    class Small(RepTraining, ClassificationTrainer):
        method = timm_rep.Orepa(branch_1x1=False)
        select = ('model.1.*', 'model.2.*')

    folder = tmp_path / 'images'
    for split in ('train', 'val'):
        for label in 'ab':
            (folder / split / label).mkdir(parents=True)
            for index in range(2):
                Image.new('RGB', (32, 32), (255 * (label == 'a'), 0, 90 * index)).save(
                    folder / split / label / f'{index}.png')
    seen = []
    model = with_callback(
        YOLO('yolov8n-cls.yaml'), 'on_train_start', lambda trainer: seen.append(timm_rep.expansion_of(trainer.model)))
    model.train(
        trainer=Small, data=str(folder), epochs=1, imgsz=32, batch=2, workers=0, device='cpu', plots=False,
        optimizer='SGD', amp=False, project=str(tmp_path), name='run', verbose=False)
    assert set(seen[0].methods.values()) == {Small.method}
    assert all(name.startswith(('model.1.', 'model.2.')) for name in seen[0].methods)
    assert not is_rep(model.model)


def test_export(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='needs onnxruntime')
    for package in ('onnx', 'onnxslim'):
        pytest.importorskip(package, reason=f"Ultralytics' export needs {package}")
    model = YOLO('yolov8n.yaml')
    model.model = timm_rep.expand(randomize_(model.model.eval()), 'dbb')
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        file = model.export(format='onnx', imgsz=32, dynamic=False)
    finally:
        os.chdir(before)
    x = torch.rand(1, 3, 32, 32)
    session = onnxruntime.InferenceSession(tmp_path / file)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert_near(torch.from_numpy(found), model.model.eval()(x)[0], 1e-3)
    assert is_rep(model.model)  # exported from a copy


def test_what_is_no_checkpoint_is_refused(tmp_path):
    torch.save(dict(model=nn.Linear(1, 1).state_dict()), tmp_path / 'no.pt')
    with pytest.raises(timm_rep.UserError, match='holds no network'):
        fuse_checkpoint(tmp_path / 'no.pt')
    with pytest.raises(timm_rep.UserError, match='unknown method'):
        rep_trainer('nonsense')
    with pytest.raises(timm_rep.UserError, match='unknown method'):
        rep_trainer({'model.0.conv': None, '*': 'nonsense'})
