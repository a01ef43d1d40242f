"""Times are taken in turns and are of true training steps; accuracies are of the images that they seem to be of."""
import copy
import itertools
import json
import random
from types import SimpleNamespace

import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from timm.data import create_transform, resolve_data_config

import timm_rep.report.cost
from timm_rep.cli.main import main
from timm_rep.core.verify import VerificationError
from timm_rep.report.cost import TrainingStep, measure_costs, seconds_in_turns, time_training_steps
from timm_rep.report.images import compare_on_images

CPU = torch.device('cpu')
SMALL = 'orepa_repvgg_a0_cifar'


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the timed calls put forward."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(timm_rep.report.cost.time, 'perf_counter', lambda: now.seconds)
    return now


def test_calls_take_turns(clock):
    called = []

    def call(name, seconds):
        def run():
            called.append(name)
            clock.seconds += next(seconds)
        return run

    calls = [call('a', itertools.count(1.0)), call('b', itertools.count(10.0))]
    times = seconds_in_turns(calls, CPU, rounds=3, warmup=2, repeats=2)
    assert ''.join(called) == 'aabb' + 'aabb' * 3
    assert times == [(3.5, 5.5, 7.5), (12.5, 14.5, 16.5)]


@pytest.mark.parametrize('autocast', [None, torch.bfloat16])
def test_step_is_that_of_a_training_loop(autocast):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=5).eval()
    other = timm.create_model('test_resnet', num_classes=5)
    other.load_state_dict(model.state_dict())
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    step = TrainingStep(model, images, targets, autocast)
    step()
    step()
    optimizer = torch.optim.SGD(other.train().parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast is not None):
            loss = torch.nn.functional.cross_entropy(other(images), targets)
        loss.backward()
        optimizer.step()
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(value, expected), name


def test_ratios_are_to_the_first_model(clock, monkeypatch):
    seconds = dict(a=iter([1, 1, 2, 4, 3]), b=iter([1, 1, 6, 4, 6]))
    monkeypatch.setattr(TrainingStep, '__call__', lambda step: tick(step.model.name))

    def tick(name):
        clock.seconds += next(seconds[name])

    models = {name: timm.create_model('test_resnet') for name in 'ab'}
    for name, model in models.items():
        model.name = name
    baseline, other = time_training_steps(models, (3, 32, 32), batch=1, rounds=3)
    assert baseline.seconds == (2, 4, 3)
    assert (baseline.ratio, baseline.smallest, baseline.largest) == (1, 1, 1)
    assert (other.ratio, other.smallest, other.largest) == (2, 1, 3)
    assert other.parameters == sum(parameter.numel() for parameter in models['b'].parameters())


def bench(*args, code=0):
    result = CliRunner().invoke(main, ['bench', *args])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize('options', [[], ['--amp', '--channels-last', '--img-size', '16', '--steps', '2']])
def test_bench(options):
    printed = bench(SMALL, '--rounds', '1', '--batch-size', '2', '--json', *options).stdout
    content = json.loads(printed)
    assert [row['name'] for row in content['models']] == [f'{SMALL} (stock form)', SMALL]
    assert all(len(row['seconds']) == 1 and row['seconds'][0] > 0 for row in content['models'])
    stock, training = (row['parameters'] for row in content['models'])
    assert stock == sum(p.numel() for p in timm.create_model(SMALL, inference_mode=True).parameters()) < training
    assert content['input_size'] == ([3, 16, 16] if options else [3, 32, 32])
    assert content['dtype'] == ('bfloat16' if options else 'float32')


def test_bench_table():
    lines = bench(SMALL, 'test_resnet', '--rounds', '1', '--batch-size', '2').stdout.splitlines()
    assert lines[0].startswith('A training step of 2 images of 3x32x32, float32, on ')
    assert [line.partition('  ')[0] for line in lines[2:]] == [f'{SMALL} (stock form)', SMALL, 'test_resnet']
    assert '1.00 (1.00 to 1.00)' in lines[2]
    assert '1.00 (1.00 to 1.00)' not in lines[3]


@pytest.mark.parametrize(('args', 'error'), [
    (['resnet1'], "unknown model 'resnet1'; `timm-rep list` shows the models with rep layers"),
    ([SMALL, '--rounds', '0'], 'rounds must be at least 1, got 0'),
    ([SMALL, '--img-size', '0'], 'input_size must be at least 1, got 0'),
    ([SMALL, '--model-kwargs', 'num_classes=0'], 'has no classifier to train'),
    ([SMALL, '--device', 'abacus'], 'abacus'),
])
def test_bench_with_wrong_input(args, error):
    result = bench(*args, code=2)
    assert error in result.output
    assert 'Traceback' not in result.output


# What the two forms make of real images.

NAMES = [f'class{label}' for label in range(6)]


def write_images(folder, names=NAMES, count=2):
    pixels = random.Random(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            image = Image.frombytes('RGB', (40, 36), pixels.randbytes(3 * 40 * 36))
            image.save(folder / name / f'{index}.png')
    return folder


def classifier(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=6, **kwargs).eval()
    model.pretrained_cfg.update(input_size=(kwargs.get('in_chans', 3), 32, 32))
    return model


def always(label):
    """A model that knows one answer only."""
    model = classifier()
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.nn.functional.one_hot(torch.tensor(label), 6))
    return model


def compare(model, folder, **kwargs):
    return compare_on_images(model, copy.deepcopy(model), folder, **kwargs)


def test_images_go_through_what_the_model_was_trained_with(tmp_path):
    model = classifier()
    model.pretrained_cfg.update(
        crop_pct=0.7, interpolation='nearest', mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=(3, 24, 24))
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    folder = write_images(tmp_path, count=1)
    compare_on_images(model, classifier().train(False), folder)
    transform = create_transform(**resolve_data_config(model=model))
    expected = torch.stack([transform(Image.open(folder / name / '0.png')) for name in NAMES])
    assert expected.shape == (6, 3, 24, 24)
    assert torch.allclose(seen[0], expected, atol=1e-6)


def test_gray_images_for_a_gray_model(tmp_path):
    model = classifier(in_chans=1)
    model.pretrained_cfg.update(mean=(0.5,), std=(0.5,))
    assert compare(model, write_images(tmp_path)).images == 12


def test_the_forms_are_compared_on_the_images(tmp_path):
    model, other = classifier(), classifier()
    with torch.no_grad():
        other.fc.bias[0] += 1
    with pytest.raises(VerificationError, match=r'on the images of .*the model is off'):
        compare_on_images(model, other, write_images(tmp_path))


def test_accuracy_is_of_the_images_that_were_taken(tmp_path):
    folder = write_images(tmp_path)
    checks = [compare(always(label), folder, max_images=1) for label in range(6)]
    assert sorted(check.top1[0] for check in checks) == [0, 0, 0, 0, 0, 100]
    assert all(check.images == 1 and not check.complete for check in checks)
    whole = compare(always(0), folder)
    assert (whole.top1, whole.images, whole.complete) == ((pytest.approx(100 / 6), pytest.approx(100 / 6)), 12, True)


@pytest.mark.parametrize(('splits', 'given', 'split', 'source'), [
    (['train', 'val'], '', 'validation', 'the split `val`'),
    (['train', 'test'], '', 'test', 'the split `test`'),
    (['train', 'test'], 'test', 'validation', 'the split `test`'),
    (['train', 'val'], '', 'train', 'the split `train`'),
    (['train'], 'train', 'train', 'the split `train`'),
    (['joe', 'train'], 'joe', 'validation', 'a folder without splits'),
    (['.'], '', 'validation', 'a folder without splits'),
])
def test_the_split_is_named(tmp_path, splits, given, split, source):
    for count, name in enumerate(splits, 1):
        write_images(tmp_path / 'data' / name, count=count)
    check = compare(classifier(), tmp_path / 'data' / given, split=split)
    assert check.source == source
    assert check.images == 6 * (1 + splits.index(given or next((s for s in splits if s[:3] == split[:3]), splits[0])))


@pytest.mark.parametrize(('splits', 'given', 'split', 'error'), [
    (['train', 'test'], '', 'validation', "has no split 'validation' but test, train; give one of them"),
    (['train2017', 'my_val'], '', 'validation', "has no split 'validation' but my_val, train2017"),
    (['train', 'test'], 'train', 'validation', 'are training images by its name'),
    (['Training_set'], 'Training_set', 'test', 'are training images by its name'),
])
def test_images_of_other_splits_are_not_the_validation(tmp_path, splits, given, split, error):
    for name in splits:
        write_images(tmp_path / name, count=1)
    with pytest.raises(ValueError, match=error):
        compare(classifier(), tmp_path / given, split=split)


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    assert compare(classifier(), write_images(tmp_path, ['train', *NAMES[1:]])).classes == (*NAMES[1:], 'train')


def test_classes_in_the_order_of_the_class_map(tmp_path):
    folder = write_images(tmp_path / 'images')
    for place in (tmp_path, folder):  # timm looks in the folder of the images too
        (place / 'map.txt').write_text('\n'.join(['class1', 'class0', *NAMES[2:]]))
        given = str(place / 'map.txt') if place == tmp_path else 'map.txt'
        check = compare(always(0), folder, class_map=given)
        assert check.classes == ('class1', 'class0', *NAMES[2:])
    for image in (folder / 'class1').iterdir():
        image.unlink()
    assert compare(always(0), folder, class_map='map.txt').top1 == (0, 0)
    with pytest.raises(FileNotFoundError, match=r'the class map gone\.txt, which is not there'):
        compare(always(0), folder, class_map='gone.txt')
    with pytest.raises(ValueError, match=r'not a text file, got map\.pkl'):
        compare(always(0), folder, class_map='map.pkl')


def test_speed_is_measured_in_full_precision(monkeypatch):
    seen = []

    def images_per_second(forms, images):
        seen.append(torch.backends.cudnn.allow_tf32)
        return [1.0, 2.0]

    monkeypatch.setattr(timm_rep.report.cost, 'images_per_second', images_per_second)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    assert measure_costs(classifier(), classifier(), (3, 32, 32)).images_per_second == (1.0, 2.0)
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32
