"""Small files that would take any time or memory, and weights of other kinds of numbers: refused in one line."""
import argparse
import contextlib
import io
import pickle
import struct
import time
import zipfile
from _codecs import encode

import pytest
import safetensors.torch
import timm
import torch
from helpers import randomize_

import timm_rep
from timm_rep import UserError, load
from timm_rep.io import architecture, weights
from timm_rep.io.checkpoint import read_checkpoint
from timm_rep.io.plain_data import plain, read_yaml
from timm_rep.io.weights import load_training_form
from timm_rep.models import pickles
from timm_rep.models.damage import CHECKSUM
from timm_rep.official.source import Source

NAME = 'orepa_resnet18_cifar'
# What torch would tell the user to do.
ADVICE = ('weights_only', 'safe_globals', 'file an issue')


@pytest.fixture(scope='module')
def state():
    return randomize_(timm.create_model(NAME, num_classes=3, in_chans=1)).state_dict()


def refusal(function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    message = str(error.value)
    assert '\n' not in message
    assert len(message) < 1000
    assert not any(words in message for words in ADVICE)
    return message


# Plain data.


def nested(levels, link):
    """Each level is the one before ten times; ``link`` makes it of its number and the names before."""
    lines = ['a0: &a0 {x: 1}'] + [f'a{n}: &a{n} {link([f"*a{n - 1}"] * 10)}' for n in range(1, levels)]
    return '\n'.join(lines) + '\n'


@pytest.mark.parametrize(('text', 'reason'), [
    (nested(7, lambda names: f'[{", ".join(names)}]'), 'more than 100000 values'),
    (nested(40, lambda names: f'[{", ".join(names)}]'), 'more than 100000 values'),
    ('x: &x [*x]\n', 'deeper than 50'),
    ('x: &x {a: *x}\n', 'deeper than 50'),
    ('x: 0x' + 'f' * 10 ** 4, '64 bits'),
    ('x: !!float 1' + ':59' * 10 ** 4, ''),
    ('x: !!timestamp z\n', ''),
    ('x: !!bool z\n', ''),
    ('x: [' + '1, ' * 10 ** 5 + ']', 'bytes, allowed are at most'),
], ids=['lists', 'endless', 'cycle', 'cycle of dicts', 'integer', 'float', 'time', 'bool', 'long'])
def test_yaml_is_no_more_than_arguments_are(text, reason, tmp_path):
    path = tmp_path / 'args.yaml'
    path.write_text(f'model: {NAME}\n{text}')
    assert reason in refusal(read_yaml, path)
    torch.save(dict(a=torch.ones(1)), tmp_path / 'x.pth')
    assert str(path) in refusal(read_checkpoint, tmp_path / 'x.pth')


def test_merge_keys_are_taken_as_long_as_they_are_few(tmp_path):
    path = tmp_path / 'args.yaml'
    path.write_text('defaults: &d {lr: 0.1, opt: sgd}\n<<: *d\nlr: 0.05\n')
    assert read_yaml(path) == dict(defaults=dict(lr=0.1, opt='sgd'), lr=0.05, opt='sgd')
    entries = ', '.join(f'k{n}: 1' for n in range(1000))
    path.write_text(f'a: &a {{{entries}}}\n' + ''.join(f'b{n}: {{<<: *a}}\n' for n in range(200)))
    assert 'its merge keys (<<) make more than 100000 values' in refusal(read_yaml, path)
    path.write_text(nested(9, lambda names: f'{{<<: [{", ".join(names)}]}}'))  # older PyYAML takes all of them over
    start = time.perf_counter()
    with contextlib.suppress(UserError):
        read_yaml(path)
    assert time.perf_counter() - start < 5


def test_a_few_aliases_are_data_as_any(tmp_path):
    (tmp_path / 'args.yaml').write_text('a: &a [1, 2]\nb: {c: *a}\n')
    torch.save(dict(w=torch.ones(1)), tmp_path / 'x.pth')
    assert read_checkpoint(tmp_path / 'x.pth').args == dict(a=[1, 2], b=dict(c=[1, 2]))


@pytest.mark.parametrize('levels', [6, 60])
def test_shared_lists_of_arguments(levels, tmp_path):
    value = [1]
    for _ in range(levels):
        value = [value] * 10
    torch.save(dict(args=argparse.Namespace(x=value), state_dict=dict(a=torch.ones(1))), tmp_path / 'x.pth')
    assert 'holds arguments of no run' in refusal(read_checkpoint, tmp_path / 'x.pth')


def test_cyclic_arguments(tmp_path):
    value = {}
    value['a'] = [value]
    refusal(plain, value)
    torch.save(dict(args=argparse.Namespace(x=value), state_dict=dict(a=torch.ones(1))), tmp_path / 'x.pth')
    assert 'holds arguments of no run' in refusal(read_checkpoint, tmp_path / 'x.pth')


# Pickles.


class Call:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def pairs(levels, behind):
    """A pickle of a pair of a pair ... of one and the same, and what is done with it."""
    steps = b''.join(b'h%c\x86q%c' % (n, n + 1) for n in range(levels))
    return b'\x80\x02}K\x01\x85q\x00' + steps + behind


def zipped(data):
    """A file of torch.save whose pickle is this one."""
    whole, changed = io.BytesIO(), io.BytesIO()
    torch.save({}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(changed, 'w') as target:
        for name in source.namelist():
            target.writestr(name, data if name.endswith('data.pkl') else source.read(name))
    return changed.getvalue()


PICKLES = dict(
    bytearray=(pickle.dumps(Call(bytearray, 2 * 10 ** 9), 2), r'holds Python objects (builtins.bytearray)'),
    tensor=(pickle.dumps(Call(torch.Tensor, 10 ** 10), 2), 'calls torch.Tensor'),
    storage=(pickle.dumps(Call(torch.UntypedStorage, 10 ** 11), 2), 'calls torch.storage.UntypedStorage'),
    codec=(pickle.dumps(Call(encode, 'words', 'punycode'), 2), 'calls _codecs.encode'),
    hashed=(pairs(60, b'K\x01s.'), 'objects'),
    shown=(pairs(60, b')R.'), 'objects'),
    uncalled=(b'\x80\x02K\x01)R.', 'calls what is no function'),
    protocol=(pickle.dumps(dict(a=1), 4), 'is not as torch.save writes it (PROTO 4)'),
    set_of_opcode=(b'\x80\x02\x8f.', 'is not as torch.save writes it (EMPTY_SET'),
    key=(b'\x80\x02})' + b'\x85' * 500 + b'Ns.', 'deeper than 100 levels'),
    set=(b'\x80\x02c__builtin__\nset\n])' + b'\x85' * 500 + b'a\x85R.', 'deeper than 100 levels'),
    many=(b'\x80\x02(' + b'N' * 2000 + b't.', 'objects'),
    cut=(b'\x80\x02]', 'is not a PyTorch checkpoint'),
    empty_stack=(b'\x80\x02t.', 'is not a PyTorch checkpoint'),
)


@pytest.mark.parametrize('name', PICKLES)
@pytest.mark.parametrize('wrap', [bytes, zipped], ids=['alone', 'zipped'])
def test_pickles_are_looked_through_first(name, wrap, tmp_path, monkeypatch):
    data, reason = PICKLES[name]
    monkeypatch.setattr(torch, 'load', None)  # is not called
    monkeypatch.setattr(pickles, 'MAX_OBJECTS', 1000)
    path = tmp_path / 'x.pth'
    path.write_bytes(wrap(data))
    message = refusal(read_checkpoint, path)
    assert reason in message
    assert str(path) in message


@pytest.mark.filterwarnings('ignore')
def test_what_torch_refuses_is_said_in_words_of_our_own(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / 'script.pth')
    assert 'holds Python objects (__torch__' in refusal(read_checkpoint, tmp_path / 'script.pth')
    overlay = dict(file=tmp_path / 'script.pth')
    message = refusal(timm.create_model, NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert message.endswith('not only weights, which could run code')  # and there is no --allow-pickle
    (tmp_path / 'text.pth').write_text('import timm')  # which begins like a pickle of old
    assert 'text.pth is not a PyTorch checkpoint' in refusal(
        timm.create_model, NAME, pretrained=True, pretrained_cfg_overlay=dict(file=tmp_path / 'text.pth'))
    (tmp_path / 'legacy.pth').write_bytes(b'\x80\x02N.' * 5)
    assert 'is not a PyTorch checkpoint' in refusal(read_checkpoint, tmp_path / 'legacy.pth')


@pytest.mark.parametrize('kind', ['key', 'element'])
def test_no_file_ends_the_process(kind, tmp_path):
    deep = b')' + b'\x85' * 200_000
    data = b'}' + deep + b'Ns.' if kind == 'key' else b'c__builtin__\nset\n]' + deep + b'a\x85R.'
    (tmp_path / 'x.pth').write_bytes(zipped(b'\x80\x02' + data))
    assert 'deeper than 100 levels' in refusal(read_checkpoint, tmp_path / 'x.pth')
    overlay = dict(file=tmp_path / 'x.pth')
    assert 'deeper than 100 levels' in refusal(
        timm.create_model, NAME, pretrained=True, pretrained_cfg_overlay=overlay)


def with_two_directories(data):
    end = len(data) - 22
    length, start = struct.unpack('<2L', data[end + 12:end + 20])
    assert start + length == end
    return data[:end] + data[start:end] + data[end:]


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_what_another_reader_may_read_otherwise_is_refused(tmp_path):
    """Python reads the last directory of a zip file, torch the one that the file's end tells."""
    path = tmp_path / 'x.pth'
    path.write_bytes(with_two_directories(zipped(b'\x80\x02}.')))
    assert 'its directory is damaged' in refusal(read_checkpoint, path)
    path.write_bytes(zipped(b'\x80\x02}.') + b' ' * 22)
    assert 'its directory is damaged' in refusal(read_checkpoint, path)
    path.write_bytes(zipped(b'\x80\x02}.'))
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('ARCHIVE/data.pkl', b'\x80\x02N.')
    assert 'two of its records have one name' in refusal(read_checkpoint, path)


class Note:
    def __init__(self, text):
        self.text = text


@pytest.mark.parametrize('zipped', [True, False])
def test_what_the_user_told_torch_to_be_safe_is_read(zipped, tmp_path):
    path = tmp_path / 'x.pth'
    content = dict(state_dict=dict(a=torch.nn.Parameter(torch.ones(2))), data=b'bytes', note=Note('x'),
                   options={'a', 1j}, size=torch.Size([1]), kind=torch.float16, device=torch.device('cpu'))
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert f'holds Python objects ({__name__}.Note)' in refusal(read_checkpoint, path)
    with torch.serialization.safe_globals([Note]):
        assert read_checkpoint(path).state_dict['a'].tolist() == [1, 1]


# Networks.


def run_with(state, folder, **args):
    args = dict(dict(model=NAME, num_classes=3, in_chans=1), **args)
    torch.save(dict(args=argparse.Namespace(**args), state_dict=state), folder / 'x.pth')
    return folder / 'x.pth'


@pytest.mark.parametrize(('args', 'reason'), [
    (dict(model_kwargs=dict(layers=[10 ** 8, 1, 1, 1])), 'layers has numbers above 10000'),
    (dict(model_kwargs=dict(block_args=[dict(x=[1e9])])), 'block_args has numbers above 10000'),
    (dict(model_kwargs=dict(layers=[200, 1, 1, 1])), 'more than 1000 modules and parameters'),
    (dict(model_kwargs=dict(channels=[10 ** 4] * 4)), 'does not hold orepa_resnet18_cifar in training form'),
    (dict(num_classes=10 ** 12), 'fc.weight has shape (3, 512), the model takes (1000000000000, 512)'),
    (dict(num_classes=10 ** 18), 'cannot be built with'),
    (dict(num_classes='many'), 'cannot be built with'),
    (dict(in_chans=10 ** 8), 'in_chans has numbers above 10000'),
    (dict(in_chans=-1), 'cannot be built with'),
], ids=str)
def test_no_network_is_built_that_the_file_does_not_hold(args, reason, state, tmp_path, monkeypatch):
    built = []

    def create_model(*args, **kwargs):
        built.append(torch.empty(0).device.type)
        return architecture.create_model(*args, **kwargs)

    monkeypatch.setattr(weights, 'create_model', create_model)
    monkeypatch.setattr(architecture, 'MAX_PARTS', 1000)
    assert reason in refusal(load_training_form, run_with(state, tmp_path, **args))
    assert built == ['meta']


@pytest.mark.parametrize('settings', [
    dict(input_size=[1, 10 ** 5, 10 ** 5]), dict(img_size=10 ** 5), dict(input_size=[1, -3, 3]),
    dict(input_size=[1, 32, 'x'])], ids=str)
def test_images_are_no_larger_than_images(settings, state, tmp_path):
    assert 'input settings of the run' in refusal(load_training_form, run_with(state, tmp_path, **settings))


# Kinds of numbers.


@pytest.mark.parametrize('dtype', [torch.bool, torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_weights_are_floating_point_numbers_of_16_bits_or_more(dtype, state, tmp_path):
    weights = {**state, 'fc.weight': state['fc.weight'].to(dtype)}
    message = refusal(load_training_form, run_with(weights, tmp_path))
    assert f'fc.weight is {dtype}, allowed are torch.float16, torch.bfloat16, torch.float32, torch.f' in message
    counter = {**state, 'bn1.num_batches_tracked': torch.tensor(float('nan'))}
    assert 'num_batches_tracked is torch.float32, allowed are torch.int64' in refusal(
        load_training_form, run_with(counter, tmp_path))

    model = timm.create_model('test_resnet', num_classes=3)
    timm_rep.save(model, tmp_path / 'own.safetensors')
    with safetensors.safe_open(tmp_path / 'own.safetensors', 'pt') as file:
        metadata = {key: text for key, text in file.metadata().items() if key != CHECKSUM}
    own = {key: value.to(dtype) if value.is_floating_point() else value for key, value in model.state_dict().items()}
    safetensors.torch.save_file(own, tmp_path / 'x.safetensors', metadata)
    assert f'is {dtype}, allowed are' in refusal(load, tmp_path / 'x.safetensors')



def test_authors_weights_are_floating_point_numbers_too():
    for dtype in (torch.int8, torch.bool, torch.float8_e4m3fn):
        source = Source(dict(a=torch.ones(3).to(dtype)), 'x.pth', 'resnet18')
        assert torch.equal(source.take('a', (3,)), torch.zeros(3))
        assert f'a is {dtype}, the model takes torch.float32' in refusal(source.check_all_taken)


def test_other_precisions_are_read(state, tmp_path):
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    model = load_training_form(run_with(half, tmp_path))
    assert torch.equal(model.fc.weight, half['fc.weight'].float())


def test_a_buffer_is_of_its_own_kind(tmp_path):
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4)
            self.register_buffer('mask', torch.ones(4, dtype=torch.bool))

    model = timm_rep.expand(Masked())
    timm_rep.save(model, tmp_path / 'x.safetensors')
    assert load(tmp_path / 'x.safetensors', into=Masked()).mask.dtype == torch.bool
