import importlib.util

import pytest

import timm_rep
from timm_rep.cli import demo


def test_demo_runs(tmp_path, capsys):
    taken = tmp_path / 'demo_output'
    taken.mkdir()
    (taken / 'mine').write_text('mine')
    result = demo.run_demo(taken, epochs=1, images=80)
    output = tmp_path / 'demo_output-2'
    assert result['output'] == output
    assert [path.name for path in taken.iterdir()] == ['mine']
    assert sorted(path.name for path in output.iterdir()) == ['annealing.png', 'images', 'resnet18.orepa_digits']
    assert (output / 'annealing.png').read_bytes().startswith(b'\x89PNG')
    assert 0 <= result['top1'] <= 100
    assert result['parameters'][1] < result['parameters'][0]
    assert result['difference'] < 1e-5
    printed = capsys.readouterr().out
    assert 'in 2 time steps of 1 epochs' in printed
    assert f'reloaded by stock timm: {result["top1"]:.2f}%' in printed
    # digits are split by class
    splits = {split: list((output / 'images' / split).glob('*/*.png')) for split in ('train', 'test')}
    assert {split: len(files) for split, files in splits.items()} == dict(train=60, test=20)
    assert all({path.parent.name for path in files} == set('0123456789') for files in splits.values())
    with pytest.raises(timm_rep.VerificationError, match='stock timm does not load'):
        demo._reload(taken, output / 'images')


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
