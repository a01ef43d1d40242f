"""Checkpoint files of any making are read, or refused in one line; nothing that they hold is run or followed."""
import argparse
import io
import random
import subprocess
import sys
import zipfile
from collections import OrderedDict

import pytest
import safetensors.torch
import timm
import torch
import yaml
from helpers import assert_same_state, randomize_

from timm_rep import UserError, VerificationError, export_folder
from timm_rep.io.checkpoint import model_args_of, read_checkpoint
from timm_rep.io.output import new_output
from timm_rep.io.weights import load_training_form, save_weights

NAME = 'orepa_resnet18_cifar'


def saved(content, path, **kwargs):
    torch.save(content, path, **kwargs)
    return path


@pytest.fixture(scope='module')
def model():
    return randomize_(timm.create_model(NAME, num_classes=3, in_chans=1)).eval()


def run_args(**changes):
    return argparse.Namespace(**dict(dict(model=NAME, num_classes=3, in_chans=1, input_size=[1, 32, 32]), **changes))


@pytest.fixture
def run_of(model, tmp_path):
    """Writes a checkpoint whose run had these arguments."""
    def write(**changes):
        content = dict(arch=NAME, args=run_args(**changes), state_dict=model.state_dict())
        return saved(content, tmp_path / 'last.pth.tar')

    return write


# Files that are no checkpoints, or hostile.


@pytest.mark.parametrize('zipped', [True, False])
def test_damaged_files_are_refused(zipped, tmp_path):
    buffer = io.BytesIO()
    content = dict(arch=NAME, args=run_args(mean=(0.5, 0.4, 0.3)), epoch=1, state_dict=dict(a=torch.ones(3, 4)))
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    path = tmp_path / 'damaged.pth'
    errors = []
    for seed in range(300):
        choose = random.Random(seed)
        data = bytearray(buffer.getvalue())
        for _ in range(choose.choice([1, 2, 8])):
            data[choose.randrange(len(data))] = choose.randrange(256)
        path.write_bytes(data[:choose.choice([len(data), len(data), choose.randrange(len(data))])])
        try:
            read_checkpoint(path)
        except ValueError as e:
            errors.append(str(e))
    assert len(errors) > 50
    assert all(str(path) in error for error in errors)


def test_damaged_safetensors_are_refused(tmp_path):
    path = tmp_path / 'damaged.safetensors'
    data = safetensors.torch.save(dict(a=torch.ones(3, 4)))
    for part in (b'', data[:20], data[:-1], data.replace(b'F32', b'X32'), data + b'0'):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r'damaged\.safetensors is not a safetensors file'):
            read_checkpoint(path)


def test_a_record_that_is_not_what_was_written_is_refused(tmp_path):
    path = saved(dict(weight=torch.full((100,), 0.1234)), tmp_path / 'x.pth')
    content = path.read_bytes()
    path.write_bytes(content.replace(torch.full((2,), 0.1234).numpy().tobytes(), bytes(8), 1))
    assert len(path.read_bytes()) == len(content)
    with pytest.raises(ValueError, match=r'its record x/data/0 is damaged'):
        read_checkpoint(path)


def test_compressed_records_are_refused(tmp_path):
    stored = saved(dict(weight=torch.zeros(10 ** 6)), tmp_path / 'stored.pth')
    packed = tmp_path / 'packed.pth'
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert packed.stat().st_size < 10 ** 5
    with pytest.raises(ValueError, match=r'its records take 4\d{6} bytes, more than the file'):
        read_checkpoint(packed)


@pytest.mark.parametrize('weights', [
    dict(weight=torch.zeros(1).expand(10 ** 5, 10 ** 5)),
    dict(weight=torch.zeros(10 ** 5).as_strided((10 ** 5, 10 ** 3), (0, 1))),
    dict.fromkeys(map(str, range(100)), torch.zeros(10 ** 4)),
], ids=['one number', 'overlapping', 'shared'])
def test_tensors_take_no_more_than_the_file_holds(weights, tmp_path):
    with pytest.raises(ValueError, match='bytes, but its tensors take'):
        read_checkpoint(saved(weights, tmp_path / 'bomb.pth'))


def test_tied_weights_are_read(tmp_path):
    weight = torch.rand(10 ** 4)
    read = read_checkpoint(saved(dict(weight=weight, tied=weight), tmp_path / 'tied.pth')).state_dict
    assert torch.equal(read['weight'], weight)
    assert torch.equal(read['tied'], weight)


@pytest.mark.parametrize(('change', 'kind'), [
    (lambda x: x * 1j, 'complex64'),
    (lambda x: x.to_sparse(), 'sparse'),
    (lambda x: x.to('meta'), 'meta'),
    (lambda x: torch.nested.nested_tensor([x, x]), 'nested'),
    (lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged), 'nested|Nested'),
    (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), 'qint8|qtensor'),
    (lambda x: torch.nn.parameter.UninitializedParameter(), 'UninitializedParameter'),
])
@pytest.mark.parametrize('allow_pickle', [False, True])
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_only_plain_numbers_are_weights(change, kind, allow_pickle, tmp_path):
    path = saved({'fc.weight': change(torch.ones(3, 4))}, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=rf'holds .*({kind})') as error:
        read_checkpoint(path, allow_pickle=allow_pickle)
    assert 'weights are dense tensors of real numbers' in str(error.value) or 'Python objects' in str(error.value)


def test_weights_have_names(tmp_path):
    with pytest.raises(ValueError, match='holds no weights'):
        read_checkpoint(saved({1: torch.ones(1)}, tmp_path / 'x.pth'))


class Lookup:
    """Unpickling it looks up an attribute: with that, any function can be reached."""

    def __reduce__(self):
        return getattr, (OrderedDict, 'fromkeys')


def test_no_attribute_is_looked_up(tmp_path):
    with pytest.raises(ValueError, match=r'holds Python objects \((builtins\.)?getattr\)'):
        read_checkpoint(saved(dict(state_dict=dict(a=torch.ones(1)), x=Lookup()), tmp_path / 'x.pth'))


# What the weights are of.


def test_weights_by_the_names_that_are_common(tmp_path):
    for key in ('state_dict', 'model', 'model_state', 'model_state_dict', 'net'):
        path = saved({key: dict(a=torch.ones(1)), 'epoch': 3, 'optimizer': dict(lr=0.1)}, tmp_path / 'x.pth')
        assert read_checkpoint(path).state_dict == dict(a=torch.ones(1))


def test_averaged_weights_by_both_names(tmp_path):
    for key in ('state_dict_ema', 'model_ema'):
        path = saved({'state_dict': dict(a=torch.ones(1)), key: dict(a=torch.zeros(1))}, tmp_path / 'x.pth')
        assert read_checkpoint(path, use_ema=True).state_dict['a'] == 0
        assert read_checkpoint(path).state_dict['a'] == 1


def test_arguments_of_a_run_are_plain(run_of):
    path = run_of(opt_kwargs=OrderedDict(a=(1, 2)), input_size=torch.Size([1, 24, 24]))
    args = read_checkpoint(path).args
    assert args == dict(model=NAME, num_classes=3, in_chans=1, opt_kwargs=dict(a=[1, 2]), input_size=[1, 24, 24])
    assert yaml.safe_load(yaml.safe_dump(args)) == args


def test_strange_args_yaml(model, tmp_path):
    path = saved(model.state_dict(), tmp_path / 'weights.pth')
    (tmp_path / 'args.yaml').write_text(f'model: {NAME}\nnum_classes: 3\nin_chans: 1\n1: 2\nstart: 2026-01-01\n')
    assert read_checkpoint(path).args == {'model': NAME, 'num_classes': 3, 'in_chans': 1, '1': 2, 'start': None}
    for content in (b'model: \xff\xfe', b'start: 2026-13-45', b'[' * 10 ** 4, b'\x00'):
        (tmp_path / 'args.yaml').write_bytes(content)
        with pytest.raises(ValueError, match=r'args\.yaml is not a YAML file'):
            read_checkpoint(path)


def test_a_run_of_a_model_that_a_folder_describes(model, run_of, tmp_path):
    folder = tmp_path / 'exported.train'
    export_folder(model, tmp_path / 'exported', training_folder=folder)
    for source in ('local-dir:', 'LOCAL-DIR:'):
        path = run_of(model=f'{source}{folder}')
        assert_same_state(load_training_form(path).state_dict(), model.state_dict())
    with pytest.raises(UserError, match=r'local-dir:nowhere cannot be looked up, name its architecture'):
        load_training_form(run_of(model='local-dir:nowhere'))
    for unknown in ('s3:x', 'local-dir', 'no_such_model', 'timm/resnet18'):
        with pytest.raises(UserError, match='unknown model'):
            load_training_form(run_of(model=unknown))


def test_a_run_does_not_say_where_else_weights_come_from(run_of, tmp_path):
    hostile = dict(checkpoint_path='x.pth', pretrained=True, pretrained_cfg_overlay=dict(file='x.pth'), device='meta')
    checkpoint = read_checkpoint(run_of(model_kwargs=dict(hostile, drop_rate=0.1)))
    assert model_args_of(checkpoint, NAME, {}) == dict(num_classes=3, in_chans=1, drop_rate=0.1)


def test_what_a_model_does_not_take_is_told_in_the_users_words(run_of):
    checkpoint = read_checkpoint(run_of(num_classes=None, in_chans=None, model_kwargs=dict(rep_layer='much')))
    with pytest.raises(UserError, match=f"{NAME} cannot be built with rep_layer='much': "):
        model_args_of(checkpoint, NAME, {})


def test_all_that_a_run_gave_its_model_is_kept(run_of):
    """As train.py does: what it then is in training, too."""
    given = dict(drop=0.2, drop_path=0.1, drop_block=0.3, bn_momentum=0.01, bn_eps=2e-3, gp='max')
    kwargs = dict(
        drop_rate=0.2, drop_path_rate=0.1, drop_block_rate=0.3, bn_momentum=0.01, bn_eps=2e-3, global_pool='max')
    checkpoint = read_checkpoint(run_of(**given))
    assert model_args_of(checkpoint, NAME, {}) == dict(num_classes=3, in_chans=1, **kwargs)
    assert model_args_of(checkpoint, NAME, dict(drop_rate=0.5))['drop_rate'] == 0.5


@pytest.mark.parametrize(('name', 'kwargs'), [
    ('resnet18', {}), ('repvgg_a0', {}), ('orepa_resnet18', dict(inference_mode=True)), ('dbb_resnet18', {})])
def test_weights_tell_classes_and_channels(name, kwargs, tmp_path):
    sizes = dict(num_classes=7, in_chans=2)
    weights = timm.create_model(name, **sizes, **kwargs).state_dict()
    checkpoint = read_checkpoint(saved(weights, tmp_path / 'x.pth'))
    assert model_args_of(checkpoint, name, {}) == sizes
    assert model_args_of(checkpoint, name, dict(num_classes=3)) == dict(sizes, num_classes=3)
    assert model_args_of(checkpoint, 'no_such_model', {}) == {}


@pytest.mark.parametrize(('name', 'kwargs'), [
    ('orepa_resnet18_cifar', {}), ('dbb_resnet18_cifar', {}), ('orepa_repvgg_a0_cifar', {}), ('orepa_resnet18', {}),
    ('repan_mobilenetv1_100', {}), *(
        ('repan_resnet18_cifar', dict(rep_layer=layer)) for layer in ('orepa', 'dbb', 'acb', 'rep'))])
@pytest.mark.parametrize('in_chans', [1, 4])
def test_weights_in_training_form_tell_classes_and_channels(name, kwargs, in_chans, tmp_path):
    sizes = dict(num_classes=7, in_chans=in_chans)
    with torch.device('meta'):
        shapes = timm.create_model(name, **sizes, **kwargs).state_dict()
    weights = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in shapes.items()}
    checkpoint = read_checkpoint(saved(weights, tmp_path / 'x.pth'))
    assert model_args_of(checkpoint, name, kwargs) == {**sizes, **kwargs}


def test_channels_of_the_input_size(run_of):
    model = load_training_form(run_of(in_chans=None))
    assert model.conv1.in_channels == 1


def test_another_input_size_has_no_known_pool_size(run_of):
    known = load_training_form(run_of()).pretrained_cfg
    other = load_training_form(run_of(input_size=[1, 64, 64])).pretrained_cfg
    assert (known['input_size'], other['input_size']) == ((1, 32, 32), (1, 64, 64))
    assert timm.get_pretrained_cfg_value(NAME, 'pool_size') is not None
    assert other['pool_size'] is None
    with pytest.raises(ValueError, match=r'input settings of the run of .* cannot be used'):
        load_training_form(run_of(input_size=[1]))


@pytest.mark.parametrize('rate', [7.0, float('nan')])
def test_an_attach_rate_lies_between_0_and_1(rate, model, tmp_path):
    weights = {k: torch.tensor(rate) if k.endswith('attach_rate') else v for k, v in model.state_dict().items()}
    path = saved(weights, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=r'attach_rate must lie in \[0, 1\], got '):
        load_training_form(path, NAME, num_classes=3, in_chans=1)


# Writing.


@pytest.mark.parametrize(('name', 'value', 'message'), [
    ('fc.bias', float('nan'), 'not finite'), ('fc.weight', float('inf'), 'not finite'),
    ('bn1.running_var', -1.0, 'negative'), ('bn1.running_var', float('nan'), 'not finite')])
def test_impossible_values_are_not_written(name, value, message, tmp_path):
    broken = timm.create_model('test_resnet')
    broken.state_dict()[name].flatten()[0] = value
    with pytest.raises(VerificationError, match=rf'{name} has values that are {message}|{name} has {message} values'):
        save_weights(broken, tmp_path / 'x.safetensors')
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, signal, sys
import timm
from pathlib import Path
from timm_rep import export_folder
from timm_rep.io.programs import export_program
from timm_rep.io.weights import save_weights

model = timm.create_model('test_resnet')
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write, name in (
        (save_weights, 'x.safetensors'), (save_weights, 'x.pth'), (export_folder, 'folder'),
        (export_program, 'x.pt2')):
    try:
        write(model, Path(sys.argv[1]) / name)
    except OSError as e:
        print(e)
"""


def test_what_cannot_be_written_in_full_is_not_left(tmp_path):
    pytest.importorskip('resource', reason='limits the size of files')
    done = subprocess.run([sys.executable, '-c', FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line.partition(' cannot be written: ')[0] for line in lines] == [
        str(tmp_path / name) for name in ('x.safetensors', 'x.pth', 'folder', 'x.pt2')], done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(('name', 'allowed'), [
    ('x.safetensors', True), ('resnet18.orepa_in1k', True), ('x.tar', False), ('x.txt', False)])
def test_folders_may_have_dots_in_their_names(name, allowed, tmp_path):
    if allowed:
        assert new_output(tmp_path / name, folder_allowed=True) == tmp_path / name
    else:
        with pytest.raises(ValueError, match=r'must end in \.safetensors or \.pth, or be the name of a Hub folder'):
            new_output(tmp_path / name, folder_allowed=True)
    if not name.startswith('x.'):
        with pytest.raises(ValueError, match=r'must end in \.safetensors or \.pth$'):
            new_output(tmp_path / name, folder_allowed=False)
