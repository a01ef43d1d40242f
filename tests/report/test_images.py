"""Accuracies are of the images that they seem to be of, and both forms are compared on them."""
import copy
import random
import tarfile

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from timm_rep.core.errors import UserError
from timm_rep.core.verify import VerificationError
from timm_rep.report.images import compare_on_images, evaluate

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
    """Those of a model with the mean of each colour are averaged, as timm's loader does in training."""
    folder, seen = write_images(tmp_path), []
    for mean, std in (((0.5,), (0.4,)), ((0.4, 0.5, 0.6), (0.3, 0.4, 0.5))):
        model = classifier(in_chans=1)
        model.pretrained_cfg.update(mean=mean, std=std)
        model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        assert compare_on_images(model, classifier(in_chans=1), folder).images == 12
    assert torch.allclose(*seen, atol=1e-6)


def test_classes_are_in_the_order_of_the_run(tmp_path):
    names = ['1', '2', '10', '20', 'a', 'B']
    folder = write_images(tmp_path, names)
    for dataset, classes in (('', names), ('torch/folder', ['1', '10', '2', '20', 'B', 'a'])):
        check = compare(always(1), folder, dataset=dataset, max_images=12)
        assert (list(check.classes), check.top1[0]) == (classes, pytest.approx(100 / 6))
    numbers = dict(zip(names, (5, 4, 3, 2, 1, 0)))
    assert compare(always(1), folder, class_map=numbers).classes == tuple(reversed(names))


def test_images_of_the_mode_of_the_run(tmp_path):
    assert compare(classifier(in_chans=4), write_images(tmp_path), img_mode='RGBA').images == 12


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_images_are_numbers_of_the_models_kind(tmp_path, dtype):
    assert compare(classifier().to(dtype), write_images(tmp_path)).images == 12


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
    (['train', 'test'], 'train', 'validation', 'the folder `train`'),  # named by hand; the card says so
])
def test_the_images_that_were_taken_are_named(tmp_path, splits, given, split, source):
    for count, name in enumerate(splits, 1):
        write_images(tmp_path / 'data' / name, count=count)
    check = compare(classifier(), tmp_path / 'data' / given, split=split)
    assert check.source == source
    assert check.images == 6 * (1 + splits.index(source.split('`')[1]))


def test_images_of_several_splits_are_never_taken_as_one(tmp_path):
    for name in ('mine', 'train2017'):
        write_images(tmp_path / name, count=1)
    with pytest.raises(UserError, match="has no split 'validation'; give the name"):
        compare(classifier(), tmp_path)


def test_archives_are_refused(tmp_path):
    with tarfile.open(tmp_path / 'images.tar', 'w') as tar:
        tar.add(write_images(tmp_path / 'images', count=1), '.')
    with pytest.raises(UserError, match=r'images\.tar is a file; images are taken from a folder'):
        compare(classifier(), tmp_path / 'images.tar')


@pytest.mark.parametrize(('names', 'error'), [
    (NAMES[:5], 'holds images of 5 classes, the model knows 6'),
    ([*NAMES, 'more'], 'holds images of 7 classes, the model knows 6'),
    ([], 'holds no images that timm reads'),
])
def test_images_must_be_of_the_classes_of_the_model(tmp_path, names, error):
    with pytest.raises(UserError, match=error):
        compare(classifier(), write_images(tmp_path, names, count=1))


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    assert compare(classifier(), write_images(tmp_path, ['train', *NAMES[1:]])).classes == (*NAMES[1:], 'train')


def test_classes_in_the_order_of_the_class_map(tmp_path):
    folder = write_images(tmp_path / 'images')
    for place in (tmp_path, folder):  # timm looks in the folder of the images too
        (place / 'map.txt').write_text('\n'.join(['class1', 'class0', *NAMES[2:]]))
        given = str(place / 'map.txt') if place == tmp_path else 'map.txt'
        check = compare(always(0), folder, class_map=given)
        assert check.classes == ('class1', 'class0', *NAMES[2:])
    names = [*NAMES, 'more', 'none']  # and an empty line, which is a name for timm
    (folder / 'map.txt').write_text('\n'.join([*names, '', '']))
    assert compare(always(0), folder, class_map='map.txt').classes == tuple(NAMES)
    together = {name: min(number, 5) for number, name in enumerate(reversed(names))}
    check = compare(always(5), folder, class_map=together)
    assert check.classes == ('none', 'more', 'class5', 'class4', 'class3', 'class2 / class1 / class0')
    assert check.top1 == (50, 50)
    (folder / 'map.txt').write_text('\n'.join(['class1', 'class0', *NAMES[2:]]))
    for image in (folder / 'class1').iterdir():
        image.unlink()
    assert compare(always(0), folder, class_map='map.txt').top1 == (0, 0)
    with pytest.raises(UserError, match=r'class map file \(gone\.txt\)'):
        compare(always(0), folder, class_map='gone.txt')
    with pytest.raises(UserError, match=r'not a text file, got map\.pkl'):
        compare(always(0), folder, class_map='map.pkl')


def test_scores_are_those_of_all_images_together_in_full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)

    def forward(logits):
        assert not torch.backends.cudnn.allow_tf32
        return logits, -logits

    batches = [(torch.randn(n, 7, generator=torch.Generator().manual_seed(n)), torch.arange(n) % 7) for n in (5, 2)]
    scores, count = evaluate(forward, ('plus', 'minus'), batches, torch.device('cpu'))
    logits, targets = (torch.cat(parts) for parts in zip(*batches))
    assert [score.name for score in scores] == ['plus', 'minus']
    for score, output in zip(scores, (logits, -logits)):
        ranks = (output > output.gather(1, targets[:, None])).sum(dim=1)
        assert score.top1 == pytest.approx(100 * (ranks == 0).double().mean().item())
        assert score.top5 == pytest.approx(100 * (ranks < 5).double().mean().item())
        assert score.loss == pytest.approx(torch.nn.functional.cross_entropy(output, targets).item(), rel=1e-6)
    assert count == 7
    with pytest.raises(UserError, match='no images'):
        evaluate(forward, ('plus', 'minus'), [], torch.device('cpu'))
