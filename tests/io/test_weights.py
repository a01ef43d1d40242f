"""A file says what its model is: the same model comes back, and what the file cannot be is never built or loaded."""
import json
import logging
import stat
import struct
import sys
import types

import pytest
import safetensors.torch
import timm
import tiny_architecture
import torch
from helpers import assert_same_state, own_warnings, randn, randomize_, state_of, with_compiled_parts
from timm.layers import ScaledStdConv2d
from timm.models import ResNet
from timm.models.resnet import BasicBlock
from torch.nn.utils import prune

import timm_rep
from timm_rep import UserError, expand, expansion_of, fuse, load, save, set_attach_rate
from timm_rep.core.annealing import set_time_step, time_step
from timm_rep.core.walk import annealed_modules
from timm_rep.hub.forms import expand_checkpoint, fuse_checkpoint, verify_checkpoint
from timm_rep.io.architecture import create_model  # on older timm, too, the model knows its arguments
from timm_rep.io.weights import load_training_form, save_weights


def hand_made():
    return ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 12, 16), num_classes=5)


def of_timm(**kwargs):
    return create_model('test_resnet', **dict(dict(num_classes=3), **kwargs))


def another_classifier():
    model = expand(create_model('test_resnet'))
    model.reset_classifier(4)
    return model


class Cosine(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.linear(torch.nn.functional.normalize(x), self.weight)


class Standardized(torch.nn.Conv2d):
    pass


def several():
    return expand(of_timm(in_chans=1), {'layer4.*': 'dbb', 'layer3.*': 'acb', 'layer2.*.conv2': 'rep', '*': 'orepa'})


MODELS = dict(
    ours=lambda: create_model(tiny_architecture.NAME, num_classes=3, in_chans=1),
    kind=lambda: create_model('repan_resnet18_cifar', rep_layer='acb', drop_path_rate=0.1),
    annealed_with_layers=lambda: create_model('repan_repvgg_a0_cifar', rep_layer='dbb'),
    another_method=lambda: expand(create_model(tiny_architecture.NAME, inference_mode=True), 'dbb'),
    of_timm=lambda: expand(of_timm(act_layer='gelu'), timm_rep.Orepa(branch_1x1=False)),
    several=several,
    another_classifier=another_classifier,
    features=lambda: create_model(tiny_architecture.NAME, features_only=True, out_indices=(1, 2)),
    double=lambda: expand(of_timm()).double(),
    no_classes=lambda: expand(of_timm(num_classes=0)),
    stock=of_timm,
    own_stock=lambda: fuse(create_model('orepa_resnet18_cifar', num_classes=3).eval()),
)


@torch.no_grad()
@pytest.mark.parametrize('method', [
    timm_rep.Orepa(scaling='scalar'), timm_rep.RepNas(branches='origin')],
    ids=lambda method: method.name)
def test_a_method_with_options_needs_no_arguments_either(method, tmp_path, caplog):
    model = randomize_(create_model('repan_resnet18_cifar', rep_layer=method, num_classes=3)).eval()
    for name in ('once', 'twice'):
        save(model, tmp_path / f'{name}.safetensors')
        loaded = load(tmp_path / f'{name}.safetensors')
        assert_same(loaded, model)
        model = loaded
    assert not own_warnings(caplog)
    assert loaded._model_args['rep_layer'] == method.name


def assert_same(actual, expected):
    assert_same_state(state_of(actual), state_of(expected))
    assert {v.dtype for v in actual.state_dict().values()} == {v.dtype for v in expected.state_dict().values()}
    assert expansion_of(actual) == expansion_of(expected)
    first = next(expected.parameters())
    images = randn(2, timm_rep.core.walk.image_channels(expected), 32, 32, dtype=first.dtype)
    found, wanted = actual.eval()(images), expected.eval()(images)
    for one, other in zip(found, wanted) if isinstance(wanted, list) else [(found, wanted)]:
        assert torch.equal(one, other)


@pytest.mark.parametrize('make', MODELS.values(), ids=MODELS)
def test_round_trip(make, tmp_path, caplog):
    model = randomize_(make()).eval()
    if any(annealed_modules(model)):
        set_attach_rate(model, 0.3)
        set_time_step(model, 2)
    settings = dict(input_size=(1, 40, 40), mean=(0.1,), std=(0.2,), crop_pct=0.5, interpolation='lanczos')
    model.pretrained_cfg = dict(model.pretrained_cfg, pool_size=None, **settings)
    file = tmp_path / 'new' / 'x.safetensors'
    save(model, file)
    assert not own_warnings(caplog)
    loaded = load(file)
    assert_same(loaded, model)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert {key: loaded.pretrained_cfg[key] for key in settings} == settings
    for name in ('architecture', 'classifier', 'pool_size'):
        assert loaded.pretrained_cfg.get(name) == model.pretrained_cfg.get(name)
    assert getattr(loaded, 'num_classes', None) == getattr(model, 'num_classes', None)
    args = {key: list(value) if isinstance(value, tuple) else value for key, value in model._model_args.items()}
    assert args.items() <= loaded._model_args.items()
    if any(annealed_modules(model)):
        assert time_step(loaded) == 2
        assert_same(load_training_form(file), model)


def test_the_commands_ask_nothing_of_such_files(tmp_path):
    file, stock = tmp_path / 'x.safetensors', tmp_path / 'stock.safetensors'
    save(randomize_(create_model('repan_resnet18_cifar', rep_layer='acb', num_classes=3, in_chans=1)), file)
    fuse_checkpoint(file, stock)
    verify_checkpoint(file, stock)
    expand_checkpoint(stock, tmp_path / 'expanded.safetensors', 'dbb')
    assert load(tmp_path / 'expanded.safetensors').pretrained_cfg['architecture'] == 'dbb_resnet18_cifar'
    with pytest.raises(UserError, match='is in stock form: it has no rep layers'):
        load_training_form(stock)
    with pytest.raises(UserError, match=r'in training form; missing'):
        load_training_form(file, model_kwargs=dict(rep_layer='dbb'))
    with pytest.raises(UserError, match=r'fc\.weight has shape \(3, 512\)'):
        load_training_form(file, num_classes=4)


@pytest.mark.parametrize('wrap', [
    torch.compile, torch.nn.DataParallel, timm.utils.ModelEmaV3, torch.optim.swa_utils.AveragedModel,
    lambda model: torch.compile(torch.nn.DataParallel(model)), with_compiled_parts])
def test_wrappers_are_no_part_of_the_model(wrap, tmp_path):
    model = randomize_(expand(of_timm()))
    save(wrap(model), tmp_path / 'x.safetensors')
    assert_same(load(tmp_path / 'x.safetensors'), model)
    save_weights(wrap(model), tmp_path / 'x.pth')
    assert_same_state(torch.load(tmp_path / 'x.pth'), state_of(model))


@pytest.mark.parametrize('change', [
    lambda model: setattr(model, 'act1', torch.nn.Hardswish()),
    lambda model: setattr(model, 'fc', torch.nn.Linear(96, 8)),
    lambda model: setattr(model.layer4[0].conv2, 'dilation', (2, 2)),
    lambda model: setattr(model.conv1[0], 'padding_mode', 'reflect'),
    lambda model: setattr(model.bn1, 'eps', 1e-3),
    lambda model: setattr(model.fc, 'alpha', 0.5),
    lambda model: setattr(model, 'forward_head', lambda x, pre_logits=False: model.fc(x.amax((2, 3)))),
    lambda model: setattr(model, 'fc', Cosine(model.num_features, 3)),
    lambda model: setattr(model.layer4[0].conv2, '__class__', Standardized),
    lambda model: setattr(model.layer4[0], '__class__', type('BasicBlock', (type(model.layer4[0]),), {})),
    lambda model: setattr(model, '__class__', type('ResNet', (ResNet,), {})),
    lambda model: model._model_args.update(act_layer=torch.nn.GELU),
], ids=[
    'activation', 'classifier', 'geometry', 'padding', 'eps', 'number', 'method', 'head class', 'convolution class',
    'block class', 'class', 'argument'])
def test_a_network_that_timm_would_build_otherwise_is_not_said_to_be_timms(change, tmp_path, caplog):
    model = of_timm()
    change(model)
    with caplog.at_level(logging.WARNING):
        save(model, tmp_path / 'x.safetensors')
    assert 'which is not test_resnet as timm builds it' in caplog.text
    with pytest.raises(UserError, match=r'give its stock form: load\(file, into=stock_model\)'):
        load(tmp_path / 'x.safetensors')


def test_the_eps_of_an_expanded_convolution_that_standardises_its_kernel_is_not_lost(tmp_path, caplog):
    model = create_model('test_nfnet', num_classes=3)
    for conv in model.modules():
        if isinstance(conv, ScaledStdConv2d):
            conv.eps = 1e-2
    with caplog.at_level(logging.WARNING):
        save(expand(model, select='stem.*'), tmp_path / 'x.safetensors')
    assert 'which is not test_nfnet as timm builds it' in caplog.text


def test_a_setting_that_was_changed_after_creation_is_not_lost(tmp_path, caplog):
    model = create_model('vit_tiny_r_s16_p8_224', num_classes=3)
    model.reset_classifier(3, 'avg')
    with caplog.at_level(logging.WARNING):
        save(expand(model), tmp_path / 'x.safetensors')
    assert "timm builds it (global_pool of the network is 'avg')" in caplog.text


def test_how_a_network_is_trained_is_no_other_network(tmp_path, caplog):
    model = expand(of_timm(), 'dbb')
    model.set_grad_checkpointing(True)
    model.note = 'of the user'
    synchronized = timm.layers.convert_sync_batchnorm(model)
    with caplog.at_level(logging.WARNING):
        save(synchronized, tmp_path / 'x.safetensors')
    assert not own_warnings(caplog)
    assert_same_state(load(tmp_path / 'x.safetensors').state_dict(), synchronized.state_dict())


def test_a_wrapper_of_the_forward_is_no_other_network(tmp_path):
    model = expand(of_timm())
    model._original_forward = model.forward  # as accelerate does
    model.forward = types.MethodType(torch.autocast('cpu')(type(model).forward), model)
    save(model, tmp_path / 'x.safetensors')
    del model.forward
    assert_same(load(tmp_path / 'x.safetensors'), model)


def test_into_a_model_of_no_registry(tmp_path):
    model = randomize_(expand(hand_made(), {'layer1.*': 'dbb', '*': 'orepa'}))
    set_attach_rate(model, 0.3)
    file = tmp_path / 'x.safetensors'
    save(model, file)
    with pytest.raises(UserError, match='into=stock_model'):
        load(file)
    stock = hand_made().train()
    assert load(file, into=stock) is stock
    assert stock.training
    assert_same(stock, model)
    assert_same(load(file, into=expand(hand_made(), {'layer1.*': 'dbb', '*': 'orepa'})), model)

    pruned = hand_made()
    prune.identity(pruned.fc, 'weight')
    save(expand(pruned, {'layer1.*': 'dbb', '*': 'orepa'}), tmp_path / 'pruned.safetensors')
    assert load(tmp_path / 'pruned.safetensors', into=pruned) is pruned

    others = (
        (ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 12, 20), num_classes=5), 'layer4.* has shape'),
        (torch.nn.Sequential(torch.nn.Conv2d(3, 8, 7)), 'no plain convolution'),
        (expand(hand_made()), 'into must be the stock form, or expanded as'))
    for other, message in others:
        before = state_of(other)
        with pytest.raises(UserError, match=message):
            load(file, into=other)
        assert_same_state(state_of(other), before)
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    with pytest.raises(UserError, match='does not say which layers were expanded'):
        load(tmp_path / 'x.pth', into=hand_made())


class WithExtraState(torch.nn.Conv2d):
    def get_extra_state(self):
        return dict(seen=3)


@pytest.mark.parametrize('write', [save, lambda model, path: save_weights(model, path.with_suffix('.pth'))])
@pytest.mark.parametrize(('add', 'message'), [
    (lambda model: model.add_module('more', WithExtraState(3, 3, 1)), 'more._extra_state is a dict, but files of'),
    (lambda model: model.register_parameter('more', torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))),
     r'more is torch\.complex64, but files that load\(\) reads hold real numbers only'),
])
def test_what_could_not_be_read_is_not_written(add, message, write, tmp_path):
    model = expand(of_timm())
    add(model)
    with pytest.raises(UserError, match=message):
        write(model, tmp_path / 'x.safetensors')
    assert not list(tmp_path.iterdir())


def test_files_without_a_description(tmp_path):
    model = create_model('orepa_resnet18_cifar')
    torch.save(dict(arch='orepa_resnet18_cifar', state_dict=model.state_dict()), tmp_path / 'last.pth.tar')
    assert_same(load(tmp_path), model)
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'x.safetensors')
    with pytest.raises(UserError, match='does not say which model it is of: build that and take its load_state_dict'):
        load(tmp_path / 'x.safetensors')


# Damaged and hostile files.


@pytest.fixture(scope='module')
def content(tmp_path_factory):
    file = tmp_path_factory.mktemp('file') / 'x.safetensors'
    save(randomize_(expand(of_timm(act_layer='gelu'), timm_rep.Orepa(branch_1x1=False))), file)
    return file.read_bytes()


def with_metadata(content, **changes):
    length = struct.unpack('<Q', content[:8])[0]
    header, data = json.loads(content[8:8 + length]), content[8 + length:]
    header['__metadata__'].pop('crc32')  # whoever changes it on purpose would give a right one
    for key, value in changes.items():
        header['__metadata__'][key] = value if isinstance(value, str) else json.dumps(value)
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(architecture='no_such_model'), "'no_such_model' is not registered"),
    (dict(architecture='resnet34'), 'the expansion is of another network'),
    (dict(architecture='test_resnet.r160_in1k', model_args={}), 'does not hold the model that it describes'),
    (dict(model_args=dict(pretrained=True)), 'pretrained are no arguments of a network'),
    (dict(model_args=dict(checkpoint_path='x.pth', pretrained_cfg_overlay={})), 'checkpoint_path, pretrained_cfg_'),
    (dict(model_args=dict(num_classes=10 ** 12)), r'fc\.\w+ has shape'),  # and takes no memory
    (dict(model_args=dict(channels=[10 ** 4] * 4)), 'does not hold the model that it describes'),
    (dict(model_args=dict(layers=[10 ** 9, 1, 1, 1])), 'layers has numbers above 10000'),
    (dict(model_args=dict(layers=[10 ** 4] * 4)), 'more than 30000 modules and parameters'),
    (dict(pretrained_cfg=dict(input_size=[3, 10 ** 6, 10 ** 6])), 'input_size must be channels, height and width'),
    (dict(pretrained_cfg=dict(input_size='images')), 'input_size must be channels, height and width'),
    (dict(model_args=dict(num_classes='many')), 'does not describe its model'),
    (dict(model_args=dict(num_classes=-3)), 'not expected: fc'),
    (dict(model_args=dict(nonsense=1)), 'cannot be built with'),
    (dict(model_args=[]), 'model_args must be a dict'),
    (dict(model_args='{'), 'model_args is not JSON'),
    (dict(model_args='[' * 10 ** 5), 'does not describe its model'),
    (dict(model_args='{"a": ' + '[' * 900 + ']' * 900 + '}'), 'does not describe its model'),
    (dict(expansion=[dict(method='os', layers=[])]), "unknown method 'os'"),
    (dict(expansion=[dict(method='orepa', layers=['fc'])]), "no plain convolution 'fc'"),
    (dict(expansion=[dict(method='orepa', nonsense=1, layers=[])]), 'orepa has the options'),
    (dict(expansion=[dict(method='orepa', negative_slope='x', layers=['layer1.0.conv1'])]), 'does not describe its'),
    (dict(expansion=[dict(method='dbb', layers=['layer1.0.conv1'])]), 'does not hold the model that it describes'),
    (dict(expansion=[]), 'does not hold the model that it describes'),
    (dict(expansion=[5]), 'an expansion is a list of methods'),
    (dict(expansion=dict(method='orepa')), 'expansion must be a list'),
])
def test_no_description_is_followed_blindly(changes, message, content, tmp_path):
    file = tmp_path / 'x.safetensors'
    file.write_bytes(with_metadata(content, **changes))
    with pytest.raises(UserError, match=message) as error:
        load(file)
    assert str(file) in str(error.value)


def test_a_bit_that_is_not_what_was_written_is_found(content, tmp_path):
    file = tmp_path / 'x.safetensors'
    length = struct.unpack('<Q', content[:8])[0]
    for position in (8 + length, (8 + length + len(content)) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[position] ^= 1
        file.write_bytes(changed)
        with pytest.raises(UserError, match=r'x\.safetensors is not loaded: it is damaged'):
            load(file)
    for said in (b'mean', b'pretrained_cfg', b'orepa'):
        changed = bytearray(content)
        changed[content.index(said) + 2] ^= 4
        file.write_bytes(changed)
        with pytest.raises(UserError, match='is not loaded: '):
            load(file)
    header = json.loads(content[8:8 + length])
    del header['__metadata__']['crc32']  # as older files have it
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack('<Q', len(text)) + text + content[8 + length:])
    assert expansion_of(load(file)).methods


def test_settings_say_only_what_the_model_is_fed_with(content, tmp_path):
    (tmp_path / 'x.safetensors').write_bytes(with_metadata(content, pretrained_cfg=dict(
        file='x.pth', hf_hub_id='me/model', architecture='resnet34', classifier='conv1', crop_pct=0.5)))
    loaded = load(tmp_path / 'x.safetensors').pretrained_cfg
    own = of_timm().pretrained_cfg
    assert loaded['crop_pct'] == 0.5
    assert [loaded.get(key) for key in ('file', 'hf_hub_id', 'architecture', 'classifier')] == [
        own.get(key) for key in ('file', 'hf_hub_id', 'architecture', 'classifier')]


# Writing.


def test_a_file_is_replaced_only_if_asked(tmp_path):
    file = tmp_path / 'x.safetensors'
    file.write_text('mine')
    model = of_timm()
    with pytest.raises(FileExistsError, match='exists already'):
        save(model, file)
    assert file.read_text() == 'mine'
    (tmp_path / '.tmp-0123abcd.x.safetensors').write_text('that another process writes just now')
    broken = of_timm()
    torch.nn.init.constant_(broken.fc.bias, float('nan'))
    with pytest.raises(timm_rep.VerificationError, match=r'fc\.bias'):
        save(broken, file, replace=True)
    assert file.read_text() == 'mine'
    save(model, file, replace=True)
    assert_same(load(file), model)
    assert {path.name for path in tmp_path.iterdir()} == {'x.safetensors', '.tmp-0123abcd.x.safetensors'}
    for name, kind in (('x.pth', UserError), ('x', UserError)):
        with pytest.raises(kind, match=r'must end in \.safetensors'):
            save(model, tmp_path / name)
    (tmp_path / 'folder.safetensors').mkdir()
    with pytest.raises(FileExistsError):
        save(model, tmp_path / 'folder.safetensors', replace=True)


@pytest.mark.skipif(sys.platform == 'win32', reason='links')
@pytest.mark.parametrize('name', ['1.safetensors', 'blob'])
@pytest.mark.parametrize('there', [True, False])
def test_a_link_stays_a_link(tmp_path, there, name):
    (tmp_path / 'weights').mkdir()
    target, link = tmp_path / 'weights' / name, tmp_path / 'latest.safetensors'
    if there:
        target.touch()
    link.symlink_to(target)
    model = of_timm()
    save(model, link, replace=there)
    assert link.is_symlink()
    assert not target.is_symlink()
    assert_same(load(link), model)
    with pytest.raises(FileExistsError, match=r'latest\.safetensors exists already'):
        save(model, link)


def test_names_may_be_as_long_as_can_be(tmp_path):
    file = tmp_path / ('x' * 243 + '.safetensors')
    model = of_timm()
    save(model, file)
    assert_same(load(file), model)


@pytest.mark.parametrize('name', ['x.safetensors', 'x.pth', 'a/b/x.pth'])
def test_no_file_lies_in_a_file(tmp_path, name):
    file = tmp_path / 'file'
    file.write_text('mine')
    with pytest.raises(NotADirectoryError, match=f'{name} cannot be written: .*/file is a file'):
        timm_rep.io.weights.save_weights(of_timm(), file / name)
    with pytest.raises(OSError, match='cannot be written'), timm_rep.io.output.written_whole(file / name) as path:
        path.write_text('x')
    assert file.read_text() == 'mine'


def test_others_may_read_as_far_as_they_may_read_new_files(tmp_path):
    (tmp_path / 'new').touch()
    usual = stat.S_IMODE((tmp_path / 'new').stat().st_mode)
    save(of_timm(), tmp_path / 'x.safetensors')
    save_weights(of_timm(), tmp_path / 'x.pth')
    folder = timm_rep.export_folder(of_timm(), tmp_path / 'folder')
    files = [tmp_path / 'x.safetensors', tmp_path / 'x.pth', *(path for path in folder.rglob('*') if path.is_file())]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {usual}


def test_a_model_of_several_precisions_keeps_them(tmp_path):
    model = timm.create_model('orepa_test_resnet').half().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.float()
    model.fc.double()
    save(model, tmp_path / 'x.safetensors')
    loaded = load(tmp_path / 'x.safetensors').state_dict()
    for key, value in model.state_dict().items():
        assert loaded[key].dtype == value.dtype, key
        assert torch.equal(loaded[key], value), key


def test_counts_that_were_averaged_with_the_weights_are_taken(tmp_path):
    """As timm's avg_checkpoints.py writes them."""
    model = timm.create_model('dbb_resnet18_cifar', num_classes=3)
    torch.save({key: value.float() * 1.0 for key, value in model.state_dict().items()}, tmp_path / 'average.pth')
    loaded = load_training_form(tmp_path / 'average.pth', 'dbb_resnet18_cifar')
    assert all(value.dtype == loaded.state_dict()[key].dtype for key, value in model.state_dict().items())
    assert_same_state(loaded.state_dict(), model.state_dict())
