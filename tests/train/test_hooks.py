"""What train.py lacks: no decay of the classifier, padded crops, classes that are looked at."""
import pickle
from argparse import Namespace

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2

from timm_rep import UserError
from timm_rep.train.hooks import apply_hooks


@pytest.fixture
def script():
    return Namespace(
        create_optimizer_v2=create_optimizer_v2, create_dataset=create_dataset, create_loader=create_loader)


def decayed(optimizer, model):
    """Names of the parameters that an optimizer decays."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [group['params'] for group in optimizer.param_groups if group['weight_decay']]
    return {names[id(parameter)] for group in groups for parameter in group}


@pytest.mark.parametrize('options', [{}, dict(layer_decay=0.5), dict(opt='lookahead_adamw')])
def test_the_classifier_is_not_decayed(script, options):
    model = timm.create_model('repan_repvgg_a0_cifar')
    options = dict(dict(opt='momentum', lr=0.1, weight_decay=1e-4), **options)
    usual = decayed(create_optimizer_v2(model, **options), model)
    apply_hooks(script, Namespace(no_decay_classifier=True, crop_padding=0))
    assert decayed(script.create_optimizer_v2(model, **options), model) == usual - {'head.fc.weight'}
    assert 'head.fc.weight' in usual
    pickle.dumps(model)  # it holds nothing of ours
    assert script.create_loader is create_loader


def test_what_the_model_says_is_kept(script):
    model = timm.create_model('test_vit')
    student = torch.nn.Sequential(model)  # as timm's feature distillation has it inside another
    apply_hooks(script, Namespace(no_decay_classifier=True, crop_padding=0))
    assert model.no_weight_decay()
    for holder, prefix in ((model, ''), (student, '0.')):
        found = decayed(script.create_optimizer_v2(holder, 'sgd', weight_decay=1e-4), holder)
        assert f'{prefix}head.weight' not in found
        assert f'{prefix}blocks.0.attn.qkv.weight' in found
        assert (f'{prefix}pos_embed' in found) == (holder is student)  # which says nothing of it


def test_a_network_without_a_classifier_is_refused(script):
    apply_hooks(script, Namespace(no_decay_classifier=True, crop_padding=0))
    with pytest.raises(UserError, match='Linear does not say what its classifier is'):
        script.create_optimizer_v2(torch.nn.Linear(2, 2), 'sgd')


class Images(torch.utils.data.Dataset):
    """The same image again and again; every pixel tells where it is."""

    transform = None

    def __init__(self, height=8, width=8, count=64):
        self.count = count
        pixels = torch.arange(1, height * width + 1, dtype=torch.uint8).reshape(height, width)
        self.image = Image.fromarray(pixels.numpy()).convert('RGB')

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.transform(self.image), index


def loaded(create, *, training=True, images=None, **options):
    """What a loader gives in one epoch, and the loader."""
    torch.manual_seed(0)
    options = dict(dict(use_prefetcher=False, num_workers=0, color_jitter=None, hflip=0.0), **options)
    options['persistent_workers'] = options['num_workers'] > 0  # timm 1.0.26 does not see to it
    loader = create(
        images or Images(), (3, 8, 8), 64, is_training=training, mean=(0, 0, 0), std=(1 / 255,) * 3,
        device=torch.device('cpu'), **options)
    return next(iter(loader))[0], loader


@pytest.mark.parametrize('options', [{}, dict(use_prefetcher=True), dict(num_workers=2, use_prefetcher=True)], ids=str)
def test_padded_crops(script, options):
    apply_hooks(script, Namespace(no_decay_classifier=False, crop_padding=4))
    batch, loader = loaded(script.create_loader, **options)
    padded = torch.zeros(16, 16)
    padded[4:12, 4:12] = torch.arange(1.0, 65).reshape(8, 8)
    windows = padded.unfold(0, 8, 1).unfold(1, 8, 1).reshape(81, 8, 8)
    assert batch.shape == (64, 3, 8, 8)
    matches = (batch[:, :1].round() == windows).all(-1).all(-1)
    assert matches.any(1).all()
    assert matches.any(0).sum() > 20  # of 81 places
    again, _ = loaded(script.create_loader, **options)
    assert torch.equal(again, batch)
    later = next(iter(loader))[0]
    assert not torch.equal(later, batch)


def test_padded_crops_leave_the_rest_of_the_transform(script):
    apply_hooks(script, Namespace(no_decay_classifier=False, crop_padding=4))
    _, theirs = loaded(create_loader, hflip=0.5, color_jitter=0.4, auto_augment='rand-m9')
    _, ours = loaded(script.create_loader, hflip=0.5, color_jitter=0.4, auto_augment='rand-m9')
    assert [str(step) for step in ours.dataset.transform.transforms][2:] == [
        str(step) for step in theirs.dataset.transform.transforms][1:]
    evaluated = [loaded(create, training=False)[0] for create in (create_loader, script.create_loader)]
    assert torch.equal(*evaluated)
    assert script.create_optimizer_v2 is create_optimizer_v2


def test_images_of_another_size_are_made_as_large_first(script):
    apply_hooks(script, Namespace(no_decay_classifier=False, crop_padding=1))
    batch, _ = loaded(script.create_loader, images=Images(5, 10))
    assert batch.shape == (64, 3, 8, 8)


def test_a_transform_without_timms_crop_is_refused(script):
    apply_hooks(script, Namespace(no_decay_classifier=False, crop_padding=4))
    with pytest.raises(UserError, match='its transform has none'):
        loaded(script.create_loader, no_aug=True)


def opened(script, root, classes=3, **maps):
    """The data sets that timm's script opens, of the training and the validation."""
    script = Namespace(**vars(script))  # one is hooked once
    apply_hooks(script, Namespace(no_decay_classifier=False, crop_padding=0, num_classes=classes, train_split='train'))
    return [script.create_dataset('', root=str(root), split=split, **maps) for split in ('train', 'validation')]


def save_images(root, **classes):
    for split, names in classes.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(root / split / name / '0.png')


def test_more_classes_than_the_model_knows_are_refused(script, tmp_path):
    save_images(tmp_path, train='abc', validation='abc')
    assert [len(images) for images in opened(script, tmp_path)] == [3, 3]
    assert opened(script, tmp_path, classes=1000)  # as timm has it
    with pytest.raises(UserError, match="'train' holds images of 3 classes, the model knows 2; --num-classes 3"):
        opened(script, tmp_path, classes=2)


@pytest.mark.parametrize(('names', 'message'), [
    ('bc', "'validation' has other classes than 'train': 'b' is class 0 of it, and class 1 there, .*--class-map FILE"),
    ('abd', "'d' is class 2 of it, and not there"),
])
def test_splits_that_number_the_same_class_differently_are_refused(script, tmp_path, names, message):
    save_images(tmp_path, train='abc', validation=names)
    with pytest.raises(UserError, match=message):
        opened(script, tmp_path)


def test_splits_that_lack_classes_but_number_the_others_alike_are_taken(script, tmp_path):
    save_images(tmp_path / 'first', train='abc', validation='ab')
    assert [len(images) for images in opened(script, tmp_path / 'first')] == [3, 2]
    save_images(tmp_path / 'mapped', train='abc', validation='bc')
    (tmp_path / 'map.txt').write_text('a\nb\nc')
    images = opened(script, tmp_path / 'mapped', class_map=str(tmp_path / 'map.txt'))[1]
    assert [target for _, target in images] == [1, 2]
    (tmp_path / 'map.txt').write_text('a\nb\nc\nd\n\n')  # also names that no image has, for timm the empty line, too
    assert opened(script, tmp_path / 'mapped', class_map=str(tmp_path / 'map.txt'))


def test_data_sets_that_do_not_number_their_classes_are_taken(script, tmp_path):
    images = Images()
    script.create_dataset = lambda *args, **kwargs: images
    assert len(opened(script, tmp_path)) == 2


@pytest.mark.parametrize('targets', [
    torch.tensor([0, 9, 1]),  # as MNIST has them
    [0, 9, 1], torch.zeros(5, 8),  # as QMNIST
    None,  # as readers that know names only
])
def test_classes_are_counted_however_a_data_set_holds_them(script, tmp_path, targets):
    images = Images()
    images.class_to_idx, images.targets = {str(label): label for label in range(10)}, targets
    script.create_dataset = lambda *args, **kwargs: images
    assert len(opened(script, tmp_path, classes=10)) == 2
    with pytest.raises(UserError, match="'train' holds images of 10 classes, the model knows 3; --num-classes 10"):
        opened(script, tmp_path)
