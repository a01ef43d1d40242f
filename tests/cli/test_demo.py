import importlib.util

import pytest

import timm_rep
from timm_rep.cli import demo


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits')
    demo._write_digits(folder, seed=0, images=80)
    return folder


def test_demo_runs(tmp_path, capsys):
    taken = tmp_path / 'demo_output'
    taken.mkdir()
    (taken / 'mine').write_text('mine')
    result = demo.run_demo(taken, epochs=1, images=80)
    assert result.output == tmp_path / 'demo_output-2'
    assert [path.name for path in taken.iterdir()] == ['mine']

    assert sorted(path.name for path in result.output.iterdir()) == [
        'annealing.png', 'digits.png', 'images', 'resnet18.orepa_digits']
    for picture in result.output.glob('*.png'):
        assert picture.read_bytes().startswith(b'\x89PNG')
    assert 0 <= result.top1 <= 100
    assert len(result.time_steps) == 2
    assert result.time_steps[-1] == pytest.approx(result.top1)
    assert result.parameters[1] < result.parameters[0]
    assert result.difference < 1e-5
    printed = capsys.readouterr().out
    assert 'held-out top-1' in printed
    assert 'in 2 time steps of 1 epochs' in printed
    assert 'timm.models.resnet' in printed


def test_digits_are_split_by_class(digits):
    splits = {split: list((digits / split).glob('*/*.png')) for split in ('train', 'test')}
    assert {split: len(files) for split, files in splits.items()} == dict(train=60, test=20)
    assert all({path.parent.name for path in files} == set('0123456789') for files in splits.values())
    assert not {path.name for path in splits['train']} & {path.name for path in splits['test']}


def test_fresh_folder(tmp_path):
    assert demo._fresh_folder(tmp_path / 'out') == tmp_path / 'out'
    assert demo._fresh_folder(tmp_path / 'out') == tmp_path / 'out'  # still empty
    for number in (2, 3):
        (demo._fresh_folder(tmp_path / 'out') / 'file').touch()
        assert demo._fresh_folder(tmp_path / 'out') == tmp_path / f'out-{number}'


def test_missing_packages_are_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name, *args: None if name == 'sklearn' else find_spec(name, *args))
    with pytest.raises(timm_rep.UserError, match=r"the demo also needs sklearn: pip install 'timm_rep\[demo\] "):
        demo.run_demo(tmp_path / 'out')
    assert not list(tmp_path.iterdir())


def test_a_folder_that_stock_timm_does_not_load_is_named(tmp_path, digits):
    with pytest.raises(timm_rep.VerificationError, match='stock timm does not load'):
        demo._reload(tmp_path, digits)
