"""Lightning, transformers and Accelerate: trained and annealed by the recipes of the docs, resumed, fused, saved."""
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_near, assert_same_state, tiny_resnet
from library_recipes import PAGE, run
from torch.utils.data import DataLoader, TensorDataset

import timm_rep
from timm_rep.core.walk import rep_layers

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason='the docs are in a checkout only')
SCHEDULE = timm_rep.AnnealingSchedule(2, 2, 1)


def network():
    torch.manual_seed(0)
    return timm_rep.expand(tiny_resnet(), 'dbb', generator=torch.Generator().manual_seed(0))


def images(count=8):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.rand(count, 3, 32, 32, generator=generator), torch.arange(count) % 5)


def rates(model):
    return {(round(layer.attach_rate.item(), 4), int(layer.time_step)) for _, layer in rep_layers(model)}


def test_lightning(tmp_path):
    lightning = pytest.importorskip('lightning', reason='needs Lightning')
    annealing = run('Lightning', lightning=lightning, timm_rep=timm_rep)['Annealing']

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.seen = network(), []

        def training_step(self, batch, index):
            self.seen.append(rates(self.net))
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def trained(epochs, checkpoint=None, **options):
        module = Module()
        kept = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, '{step}', save_top_k=-1, **options)
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator='cpu', logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[annealing(SCHEDULE), kept])
        trainer.fit(module, DataLoader(images(), 4), ckpt_path=checkpoint, weights_only=False)
        return trainer, module

    _, whole = trained(4, every_n_train_steps=1)
    assert whole.seen == [at for at in ({(0.5, 0)}, {(1.0, 0)}, {(0.5, 1)}, {(1.0, 1)}) for _ in range(2)]
    for step in range(1, 8):  # in the middle of an epoch and at its end
        _, resumed = trained(4, tmp_path / f'step={step}.ckpt')
        assert resumed.seen == whole.seen[step:]
        if step % 2 == 0:  # Lightning itself does not go on with the same images elsewhere
            assert_same_state(resumed.net.state_dict(), whole.net.state_dict())
    trainer, _ = trained(3)
    trainer.save_checkpoint(tmp_path / 'third.ckpt')
    _, resumed = trained(4, tmp_path / 'third.ckpt')
    assert resumed.seen == whole.seen[6:]
    assert_same_state(resumed.net.state_dict(), whole.net.state_dict())
    fused = timm_rep.fuse(whole.eval())
    assert fused.net.state_dict().keys() == tiny_resnet().state_dict().keys()
    timm_rep.verify(whole.net, fused.net, inputs=images()[:2][0])


class Images(torch.utils.data.Dataset):
    """As transformers' Trainer wants them."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image, label = images()[index]
        return dict(pixel_values=image, labels=label)


LOAD = """
import sys, torch
from transformers import TimmWrapperForImageClassification
model = TimmWrapperForImageClassification.from_pretrained(sys.argv[1])
assert 'timm_rep' not in sys.modules
torch.save(model.eval()(torch.ones(1, 3, 32, 32)).logits, sys.argv[2])
"""


@pytest.mark.parametrize('architecture', ['orepa_resnet18', 'resnet18'])
def test_transformers(architecture, tmp_path):
    transformers = pytest.importorskip('transformers', reason='needs transformers')
    pytest.importorskip('accelerate', reason="transformers' Trainer needs Accelerate")
    annealing = run('transformers', transformers=transformers, timm_rep=timm_rep)['Annealing']
    save_stock = run('transformers', 1, timm_rep=timm_rep)['save_stock']
    narrow = dict(channels=[8, 8, 12, 16], layers=[1, 1, 1, 1])

    def made():
        torch.manual_seed(0)
        config = transformers.TimmWrapperConfig(
            architecture=architecture, num_labels=5, model_args=narrow if architecture == 'resnet18' else None)
        model = transformers.TimmWrapperForImageClassification(config)
        return model if architecture.startswith('orepa') else timm_rep.expand(
            model, 'dbb', generator=torch.Generator().manual_seed(0))

    seen = []

    class Note(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append(rates(model))

    def trained(epochs, resume=None):
        model = made()
        arguments = transformers.TrainingArguments(
            str(tmp_path / 'run'), num_train_epochs=epochs, per_device_train_batch_size=2, use_cpu=True, report_to=[],
            save_strategy='steps', save_steps=1, learning_rate=0.01, disable_tqdm=True, optim='sgd', seed=0,
            lr_scheduler_type='constant')
        trainer = transformers.Trainer(
            model, arguments, train_dataset=Images(), callbacks=[annealing(SCHEDULE), Note()])
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = trained(4)
    expected = [at for at in ({(0.5, 0)}, {(1.0, 0)}, {(0.5, 1)}, {(1.0, 1)}) for _ in range(4)]
    assert seen == expected
    for step in (3, 7, 12, 15):
        seen.clear()
        resumed = trained(4, str(tmp_path / 'run' / f'checkpoint-{step}'))
        assert seen == expected[step:]
        assert_same_state(resumed.state_dict(), whole.state_dict())

    save_stock(whole, tmp_path / 'stock')
    command = [sys.executable, '-c', LOAD, str(tmp_path / 'stock'), str(tmp_path / 'logits.pt')]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = whole.eval()(torch.ones(1, 3, 32, 32)).logits
    assert_near(torch.load(tmp_path / 'logits.pt'), expected, 1e-5)


def test_transformers_backbone():
    transformers = pytest.importorskip('transformers', reason='needs transformers')

    def made(name):
        config = transformers.TimmBackboneConfig(backbone=name, use_pretrained_backbone=False, out_indices=(1, 4))
        return transformers.TimmBackbone(config)

    backbone = made('orepa_resnet18').train()
    assert len(list(rep_layers(backbone))) == 17
    x = images()[:2][0]
    sum(map_.sum() for map_ in backbone(x).feature_maps).backward()
    fused = timm_rep.fuse(backbone.eval())
    stock = made('resnet18').eval()
    stock.load_state_dict(fused.state_dict())
    for ours, theirs in zip(backbone(x).feature_maps, stock(x).feature_maps):
        assert_near(theirs, ours, 1e-5)


@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_accelerate(precision, tmp_path):
    accelerate = pytest.importorskip('accelerate', reason='needs Accelerate')
    accelerate.state.AcceleratorState._reset_state(True)  # which has one precision in a process

    def trained(schedule):
        model = network()
        names = dict(
            accelerator=accelerate.Accelerator(cpu=True, mixed_precision=precision), model=model,
            loader=DataLoader(images(), 8),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), schedule=schedule,
            folder=str(tmp_path / 'state'), torch=torch, timm_rep=timm_rep)
        return run('Accelerate', **names)

    done = trained(SCHEDULE)
    assert rates(done['model']) == {(1.0, 1)}
    timm_rep.verify(done['model'], done['fused'], inputs=images()[:2][0])
    assert done['fused'].state_dict().keys() == tiny_resnet().state_dict().keys()
    again = network()
    optimizer = torch.optim.SGD(again.parameters(), lr=0.01, momentum=0.9)
    accelerator = accelerate.Accelerator(cpu=True)
    again, _ = accelerator.prepare(again, optimizer)
    accelerator.load_state(tmp_path / 'state')
    states = [accelerator.unwrap_model(model).state_dict() for model in (again, done['model'])]
    assert_same_state(*states)
    assert isinstance(done['fused'].conv1, nn.Conv2d)
