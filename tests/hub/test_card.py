"""Every figure on the card stands where it belongs, and what the run was is what the card says."""
import dataclasses
from pathlib import Path

import huggingface_hub
import pytest
import timm

import timm_rep
from timm_rep.core.expansion import Expansion
from timm_rep.core.methods import Method
from timm_rep.hub import card
from timm_rep.hub.card import is_generated, model_card
from timm_rep.io.runs import Run
from timm_rep.report.cost import Costs
from timm_rep.report.images import ImageCheck

COSTS = Costs((2_000_000, 1_000_000), (0.5, 0.25), (10.0, 40.0), 8, 'an abacus', '2.6', 'float32')
IMAGES = ImageCheck(12, True, (50.0, 51.0), (90.0, 91.0), 3e-6, tuple('abcdef'), 'the split `test`')
DIFFERENCE = dict(outputs_relative=5e-6, worst_layer_relative=2e-6)
RUN = Run(dict(epochs=3, batch_size=32), (), {}, 1, (), 2, {})
PROVENANCE = dict(
    version='0', timm='1', torch='2', training_architecture='repan_mobilenetv1_100', built_by_name=True,
    time_steps=1, dataset=None, metrics={}, metrics_source=None, fused_difference=None)
NOTHING = Expansion({}, {}, {}, 20, 100)


@pytest.fixture(scope='module')
def model():
    model = timm.create_model('test_resnet', num_classes=6)
    model.pretrained_cfg.update(license='unknown', input_size=(3, 32, 32))
    return model


def text_of(model, repo='me/net', expansion=NOTHING, **kwargs):
    provenance = {key: kwargs.pop(key, value) for key, value in PROVENANCE.items()}
    return model_card('net', model, provenance, expansion, repo=repo, **kwargs)


def training_of(model, **changes):
    return text_of(model, run=dataclasses.replace(RUN, **changes)).split('## Training\n')[1]


def test_figures_stand_where_they_belong(model):
    text = text_of(model, fused_difference=DIFFERENCE, run=RUN, costs=COSTS, images=IMAGES)
    for row in (
            '| | Training form | Stock form (this) |',
            '| Parameters (M) | 2.00 | 1.00 |',
            '| GMACs of an image | 0.500 | 0.250 |',
            '| Images per second, batches of 8, float32 | 10.0 | 40.0 |',
            '| Top-1 accuracy (%) on 12 images | 50.00 | 51.00 |',
            '| Top-5 accuracy (%) on 12 images | 90.00 | 91.00 |',
            'Measured on an abacus, torch 2.6.',
            'differ by 5.0e-06 of the largest, those of the worst layer by 2.0e-06.',
            'On the real images the outputs differ by 3.0e-06 of the largest.',
            '- **Licence:** weights unknown; the code'):
        assert row in text, row
    assert text_of(model).count('not measured') == 2


@pytest.mark.parametrize(('dataset', 'slug'), [('花 1k/Café', '花-1k-café'), ('!', 'unknown')])
def test_data_sets_of_any_name_have_a_type(model, dataset, slug):
    card = huggingface_hub.ModelCard(text_of(model, dataset=dataset, metrics=dict(top1=50.0)))
    assert (card.data.eval_results[0].dataset_name, card.data.eval_results[0].dataset_type) == (dataset, slug)


def test_training_says_what_the_run_was(model):
    text = training_of(model)
    assert '```sh\ntimm-rep train --config args.yaml --data-dir IMAGES\n```' in text
    assert 'Started from random weights.' in text
    assert 'processes' not in text
    text = training_of(model, args=dict(RUN.args, pretrained=True))
    assert 'Started from the pretrained weights of that name.' in text
    start_files = {'--initial-checkpoint': 'start.pth'}
    text = training_of(model, start_files=start_files, processes=8)
    assert '--data-dir IMAGES --initial-checkpoint start.pth\n' in text
    assert 'Started from start.pth.' in text
    assert 'on 8 processes at once, each with batches of `batch_size` images' in text


def test_training_names_the_teacher(model):
    assert 'teacher' not in training_of(model)
    text = training_of(model, teacher='local-dir:big net')
    assert "--data-dir IMAGES --kd-model-name 'local-dir:big net'\n" in text
    assert 'it learnt from, is `local-dir:big net`.' in text
    text = training_of(model, args=dict(RUN.args, kd_model_name='resnet34'), teacher='resnet34')
    assert '--data-dir IMAGES\n' in text  # args.yaml has it
    assert 'is `resnet34`.' in text


def test_training_on_goes_by_the_name_if_that_is_enough(model):
    assert '--model repan_mobilenetv1_100 --num-classes N' in text_of(model)
    text = text_of(model, built_by_name=False)
    assert 'timm_rep.expand' in text
    assert '--num-classes' not in text


def test_training_form_is_named_where_it_is_published(model):
    assert '@train' not in text_of(model)
    text = text_of(model, repo='me/net@v1', train_revision=True)
    assert "timm.create_model('hf-hub:me/net@train', pretrained=True)" in text


def test_a_method_of_somebody_else_is_on_the_card(model):
    @dataclasses.dataclass(frozen=True)
    class Toy(Method):
        name, summary, citation = 'toy_of_cards', 'A kernel and half of it again.', '@misc{toy}'

    text = text_of(model, expansion=Expansion(dict(conv=Toy()), dict(toy_of_cards=1), dict(toy_of_cards=5), 2, 10))
    for part in ('\nA kernel and half of it again.\n', '```bibtex\n@misc{toy}\n```', '; 1 of 2 convolutions, 50.0 %'):
        assert part in text


def test_the_module_of_a_method_of_somebody_else_is_named(model, monkeypatch):
    @dataclasses.dataclass(frozen=True, repr=False)
    class Half(Method):
        name, factor = 'half', 0.5

        def __repr__(self):
            return f'Half(factor={self.factor})'

    monkeypatch.setattr(Half, '__module__', 'somebody.half')
    expansion = Expansion(dict(conv=Half()), dict(half=1), dict(half=5), 2, 10)
    text = text_of(model, expansion=expansion, train_revision=True)
    assert text.count('\nimport somebody.half  # registers a method that is no part of timm_rep\n\nmodel = ') == 2
    assert '--pretrained-path model.safetensors \\\n    --device-modules somebody.half\n```' in text
    monkeypatch.setattr(card, 'as_method', lambda name: Method())
    assert "pretrained=True), somebody.half.Half(factor=0.5))" in text_of(
        model, expansion=expansion, expanding=Half())
    assert 'device-modules' not in text_of(model)


def test_a_changed_card_is_not_ours(model):
    card = text_of(model)
    assert is_generated(card)
    for other in ('', '# Mine', card[:-1], card[1:], card + card, f'{card}\nMine\n', card.rpartition('<!--')[0],
                  card.replace('not measured', '99.9', 1), card.replace('## Citation', '## Mine')):
        assert not is_generated(other)


def example():
    """The card of MODEL_CARD.md: a run of two epochs, its figures as they were measured."""
    model = timm.create_model('resnet18', num_classes=10)
    model.pretrained_cfg.update(license='apache-2.0', input_size=(3, 32, 32))
    expansion = timm_rep.expansion_of(timm.create_model('orepa_resnet18', num_classes=10))
    args = dict(
        epochs=2, batch_size=32, opt='sgd', momentum=0.9, weight_decay=1e-4, lr=0.05, lr_base=0.1, sched='cosine',
        smoothing=0.1, input_size=[3, 32, 32], model_ema=True, model_ema_decay=0.9, seed=42)
    source = 'measured with the fused model on 10000 images, of the split `test`, when it was published'
    provenance = dict(
        version='0.1.0', timm='1.0.31', torch='2.14.1+cu130', training_architecture='orepa_resnet18',
        built_by_name=True, time_steps=1, dataset='CIFAR-10', metrics=dict(top1=12.78, top5=55.24),
        metrics_source=source, fused_difference=dict(outputs_relative=0.0, worst_layer_relative=0.0))
    return model_card(
        'card',
        model,
        provenance,
        expansion,
        timm_rep.Orepa(),
        repo='ORG/resnet18.orepa_cifar10_try',
        run=Run(args, ('data_dir', 'experiment', 'output'), {}, 1, (), 0, {}),
        costs=Costs(
            (37_250_000, 11_180_000), (0.455, 0.037), (25.3, 447.0), 8, 'AMD EPYC, 1 thread', '2.14.1+cu130',
            'float32'),
        images=ImageCheck(10000, True, (12.78, 12.78), (55.24, 55.24), 0.0, (), ''),
        plot='training.png',
        labelled=True,
        train_revision=True,
    )


def test_documented_card_is_one_of_these():
    documented = (Path(__file__).parents[2] / 'MODEL_CARD.md').read_text().split('````markdown\n')[1].split('````')[0]
    own, generated = (card.split('---\n', 2)[2].rpartition('<!--')[0] for card in (documented, example()))
    assert own == generated
