import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import timm_rep

FAST = Path(timm_rep.__file__).parents[1] / 'experiments' / 'cifar10_fast'
pytestmark = pytest.mark.skipif(not FAST.exists(), reason='the experiments are in a checkout only')
FAST_MODULES = (
    'common', 'data', 'network', 'training', 'teacher', 'arms', 'run', 'table', 'anneal', 'table_anneal',
    'table_teacher', 'figures', 'similarity')
FAST_SETTINGS = ['--epochs', '2', '--batch-size', '8', '--set-aside', '8', '--rates', '0.1', '0.2', '--few']


def load(path):
    return json.loads(path.read_text())


@pytest.fixture(scope='module')
def fast():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FAST)
        for name in FAST_MODULES:
            sys.modules.pop(name, None)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in FAST_MODULES})
        for name in FAST_MODULES:
            del sys.modules[name]


@pytest.fixture(scope='module')
def small_images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('fast') / 'images'
    random = np.random.default_rng(0)
    for split, count in (('train', 12), ('test', 4)):
        for name in ('cat', 'dog'):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / split / name / f'{number}.png')
    return folder


@pytest.fixture
def start(fast, small_images):
    """Start the experiment in a folder."""
    def call(output, *arguments):
        threads = torch.get_num_threads()
        fast.run.main(['--data', str(small_images), '--output', str(output), *FAST_SETTINGS, *arguments])
        torch.set_num_threads(threads)
    return call


def fast_run(form='plain', top1=50.0, seed=0, **changes):
    """What `table.py` reads of a run's file."""
    run = dict(form=form, lr=0.2, epochs=2, seed=seed, grid=False, top1=top1, diverged=False, hardware='h', versions={})
    return dict(run, **changes)


def test_forms_of_a_seed_start_from_one_function_and_end_as_one_network(fast):
    pixels = torch.randint(256, (50, 32, 32, 3), dtype=torch.uint8)
    stem, x = fast.network.whitening(pixels), fast.data.normalized(pixels[:4])
    models = {form: fast.network.build('small', form, 3, stem, 10).eval() for form in fast.network.forms()}
    assert {'plain', 'orepa', 'rep', 'dbb'} <= set(models)
    other = fast.network.build('small', 'plain', 4, stem, 10).eval()
    with torch.no_grad():
        expected = models['plain'](x)
        assert (other(x) - expected).abs().max() > 0.01
        for model in models.values():
            assert (model(x) - expected).abs().max() < 1e-6
            assert str(timm_rep.fuse(model)) == str(models['plain'])
    sizes = [sum(p.numel() for p in model.parameters()) for model in models.values()]
    assert min(sizes) == sizes[0]
    assert sizes[1:].count(sizes[0]) <= 1  # RefConv's maps can have as many as its kernels
    patches = torch.nn.functional.conv2d(fast.data.normalized(pixels[::10]), stem).transpose(0, 1).flatten(1)[:12]
    assert (patches @ patches.T / patches.shape[1] - torch.eye(12)).abs().max() < 0.01


def test_registered_networks_are_expanded_from_one_function(fast):
    plain, rep = (fast.network.build('resnet18_cifar', form, 3, torch.zeros(24, 3, 2, 2), 5).eval()
                  for form in ('plain', 'rep'))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (rep(x) - plain(x)).abs().max() < 1e-6
    assert str(timm_rep.fuse(rep)) == str(plain)
    convolutions = [module for module in plain.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(list(timm_rep.rep_layers(rep))) == len(convolutions) - 3  # 1x1, which have no branches in REP


def test_fast_runs_are_done_once_and_repeat_exactly(fast, small_images, start, tmp_path, capsys):
    output = tmp_path / 'results'
    forms = ['--forms', 'plain', 'rep', '--seeds', '2']
    start(output, *forms, '--timing', '1')
    assert list(load(output / 'timing.json')['ratios']) == ['plain', 'rep']
    timing = load(output / 'timing.json')
    (output / 'timing.json').write_text(json.dumps(dict(timing, ratios=dict(plain=1.0, rep=1.6))))
    start(output, *forms)
    runs = {path.name: load(path) for path in output.glob('*-seed*.json')}
    assert len(runs) == 2 * 2 + 2 * 2 + 2  # grid, equal epochs, equal time
    assert {run['rows'][-1]['steps'] for run in runs.values() if run['grid']} == {4}  # of 16 images, 8 set aside
    assert {run['rows'][-1]['steps'] for run in runs.values() if not run['grid']} == {6, round(2 / 1.6 * 3)}
    assert {run['fused_parameters'] for run in runs.values()} == {126562}
    assert max(run['fused_difference'] for run in runs.values()) < 1e-4
    assert small_images.with_name('images-uint8.npz').exists()

    lost = next(output.glob('rep-*-epochs2-seed1.json'))
    found = load(lost)
    lost.unlink()
    capsys.readouterr()
    start(output, *forms)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(':')[0] for line in printed] == [lost.stem] * 2
    timed = ('seconds', 'wall_seconds')
    rows, expected = [[{k: v for k, v in row.items() if k not in timed} for row in run['rows']]
                      for run in (load(lost), found)]
    assert rows == expected

    fast.table.main([str(output)])
    table = (output / 'results.md').read_text()
    assert '| REP | 2 |' in table
    assert '| REP | 1.25 |' in table
    assert (output / 'results.png').stat().st_size > 1000
    with pytest.raises(SystemExit, match=r'runs of other settings: batch_size is 8 there and 4 here'):
        start(output, *forms, '--batch-size', '4')


@pytest.fixture
def played(fast, start, monkeypatch):
    """Start the experiment with runs that cost nothing; the runs that were done, with the images they saw."""
    done = []

    def train(run, settings, stem, train_images, eval_images, execution):
        done.append((run, len(train_images.targets), len(eval_images.targets)))
        return dict(run._asdict(), top1=run.lr, diverged=run.form == 'rep' and run.lr == 0.2)

    monkeypatch.setattr(fast.run, 'train', train)
    return lambda *arguments: (start(*arguments), done)[1]


def test_rates_are_chosen_on_images_set_aside(played, tmp_path):
    done = played(tmp_path, '--forms', 'plain', 'rep', 'dbb', '--few', 'dbb', '--seeds', '2', '--few-seeds', '1')
    assert [(run.form, run.lr, run.seed) for run, *_ in done if not run.grid] == [
        ('plain', 0.2, 0), ('rep', 0.1, 0), ('plain', 0.2, 1), ('rep', 0.1, 1), ('dbb', 0.2, 0)]
    assert [run.form for run, *_ in done if run.grid] == ['plain', 'rep'] * 2 + ['dbb'] * 2
    assert {(run.grid, *counts) for run, *counts in done} == {(True, 16, 8), (False, 24, 8)}
    (search,) = {run.seed for run, *_ in done if run.grid}
    assert search not in (0, 1)


def test_images_set_aside_are_no_training_images(fast):
    images = fast.data.Images(torch.arange(100), torch.arange(100))
    rest, aside = fast.data.set_aside(images, 20, 8)
    assert (len(rest.targets), len(aside.targets)) == (80, 20)
    assert sorted([*rest.targets.tolist(), *aside.targets.tolist()]) == list(range(100))
    assert torch.equal(fast.data.set_aside(images, 20, 8)[1].targets, aside.targets)
    with pytest.raises(SystemExit, match='20 of 100 training images set aside leave no batch of 81'):
        fast.data.set_aside(images, 20, 81)


def test_a_run_is_claimed_by_a_living_process_only(fast, tmp_path):
    code = (
        f'import sys, time; sys.path.insert(0, {str(FAST)!r}); from pathlib import Path; import common\n'
        f'with common.claimed(Path({str(tmp_path)!r}), "a") as mine: print(mine, flush=True); time.sleep(60)')
    other = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'True\n'
        with fast.common.claimed(tmp_path, 'a') as mine, fast.common.claimed(tmp_path, 'b') as another:
            assert (mine, another) == (False, True)
    finally:
        other.kill()
        other.communicate()
    with fast.common.claimed(tmp_path, 'a') as mine:
        assert mine
    (tmp_path / 'a.json').write_text('{}')
    with fast.common.claimed(tmp_path, 'a') as mine:
        assert not mine


def test_fast_batches_are_crops_and_mirror_images(fast):
    pixels = torch.arange(36 * 3, dtype=torch.uint8).reshape(1, 6, 6, 3)
    images = fast.data.padded(fast.data.Images(pixels.expand(40, -1, -1, -1), torch.arange(40)))
    padding = fast.data.CROP_PADDING
    allowed = {
        crop.numpy().tobytes()
        for top in range(2 * padding + 1) for left in range(2 * padding + 1)
        for image in [fast.data.normalized(images.pixels[:1, top:top + 6, left:left + 6])]
        for crop in (image.contiguous(), image.flip(3).contiguous())
    }
    mean, std = torch.tensor([fast.data.MEAN, fast.data.STD])[..., None, None]
    expected = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    torch.testing.assert_close(fast.data.normalized(pixels), expected)
    batches = list(fast.data.train_batches(images, 12, torch.Generator().manual_seed(0)))
    assert [len(targets) for _, targets in batches] == [12, 12, 12]  # the rest is dropped
    assert len(set(torch.cat([targets for _, targets in batches]).tolist())) == 36
    crops = {image.contiguous().numpy().tobytes() for x, _ in batches for image in x}
    assert crops <= allowed
    assert len(crops) > 10
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in batches)


def test_rate_rises_and_falls(fast):
    factors = [fast.training.rate_factor(step, 100, 0.15) for step in range(100)]
    assert factors[0] == 1 / 16
    assert factors[15] == max(factors) == 1
    assert factors[:16] == sorted(factors[:16])
    assert factors[15:] == sorted(factors[15:], reverse=True)
    assert 0 < factors[-1] < 0.001


def test_table_pairs_by_seed(fast):
    table = fast.table
    assert [table.t975(n) for n in (1, 11, 30)] == [12.706, 2.201, 2.042]
    assert table.t975(49) == pytest.approx(2.0096, abs=2e-3)
    mean, error, half = table.mean_and_error([1.0, 2.0, 3.0])
    assert (mean, error, half) == (2.0, pytest.approx(1 / 3 ** 0.5), pytest.approx(4.303 / 3 ** 0.5))
    settings = dict(
        network='small', epochs=2, batch_size=8, momentum=0.9, weight_decay=0.0, amp=True, set_aside=8,
        data=dict(train=1, test=1))
    grid = [fast_run(form, top1, 1000, lr=lr, grid=True)
            for form in ('plain', 'rep') for lr, top1 in ((0.1, 40.0), (0.2, 60.0), (0.4, 50.0))]
    runs = [
        *grid, *(fast_run(seed=seed, top1=50.0 + seed) for seed in range(3)),
        *(fast_run('rep', seed=seed, top1=51.0 + 2 * seed) for seed in (0, 1, 2, 3)),
        fast_run('rep', seed=0, top1=10.0, lr=0.1), fast_run('rep', seed=0, top1=49.5, epochs=1.25)]
    text = table.markdown(settings, runs, dict(ratios=dict(plain=1.0, rep=1.6)))
    # differences 1, 2, 3 of the three seeds that both have; not of the rate that lost
    assert '| REP | 2 | 0.2 | 4 | 54.00 | 2.58 | +2.00 (3) | 0.58 | -0.48 to +4.48 | 1.60 | 1.60 |' in text
    assert '| REP | 1.25 | 0.2 | 1 | 49.50 |  | -0.50 (1) |  |  | 1.60 | 1.00 |' in text
    assert '| plain | 40.00 | 60.00 | 50.00 | 0.2 |' in text
    assert 'edge of the grid' in table.markdown(settings, [run for run in runs if run['lr'] != 0.4], None)


# cifar10_fast: what annealing adds

ANNEAL_SETTINGS = [
    '--batch-size', '8', '--set-aside', '8', '--rates', '0.1', '0.2', '--start-rates', 'plain=0.1', 'rep=0.1',
    'orepa=0.1', '--start-epochs', '1', '--cycles', '2', '--epochs', '2']


@pytest.fixture
def anneal(fast, small_images):
    """Start the experiment in a folder."""
    def call(output, *arguments):
        threads = torch.get_num_threads()
        fast.anneal.main(['--data', str(small_images), '--output', str(output), *ANNEAL_SETTINGS, *arguments])
        torch.set_num_threads(threads)
    return call


def without_times(run):
    return [{k: v for k, v in row.items() if not k.endswith('seconds')} for row in run['rows']]


def test_arms_go_on_from_one_start_and_repeat_exactly(fast, anneal, small_images, tmp_path, capsys):
    output = tmp_path / 'results'
    arguments = [
        '--forms', 'rep', 'plain', '--seeds', '2', '--arms', 'descent', 'restarts', 'measured0', '--few-seeds', '1',
        '--few-arms', 'authors-frozen', 'measured0-descent', '--grid-arms', 'descent', 'restarts', '--rates', '0.1']
    anneal(output, *arguments)
    runs = {path.stem: load(path) for path in output.glob('*-seed*.json')}
    starts = {name for name in runs if name.startswith('start-')}
    assert starts == {f'start-{name}' for form in ('rep', 'plain') for name in (
        f'grid-{form}-seed1000', f'{form}-seed0', f'{form}-seed1')}
    arms = {name: run for name, run in runs.items() if name not in starts}
    assert len(arms) == 2 * 2 + 2 * 3 + 2 * 2 + 2  # grids, rep, plain, rep with few seeds
    for name, run in arms.items():
        rows, anneals = run['rows'], run['arm'] in ('measured0', 'authors-frozen', 'measured0-descent')
        assert [row['attach_rate'] for row in rows] == (2 * [0.5, 1.0] if anneals else 4 * [1.0])
        assert [len(row.get('first_losses', [])) for row in rows] == [2 if run['grid'] else 3, 0] * 2
        lrs = [row['first_lr'] for row in rows]
        assert (lrs[:2] == lrs[2:]) == (not run['arm'].endswith('descent'))
        assert max(lrs[1:]) <= run['lr']
        assert lrs[-1] < 0.8 * run['lr']
        start = runs[f"start-{'grid-' if run['grid'] else ''}{run['form']}-seed{run['seed']}"]
        assert run['start'] == {key: start[key] for key in ('lr', 'top1', 'last_loss')}
        assert ('branch_gradients' in run) == (run['seed'] == 0 and run['form'] == 'rep'), name
        assert run['fused_parameters'] == 126562
        assert run['fused_difference'] < 1e-4
    logged = next(run for run in arms.values() if run['arm'] == 'measured0' and run['seed'] == 0)
    assert {(row['depth'], len(row['rms'])) for row in logged['branch_gradients']} == {(n, 4) for n in range(6)}
    (frozen,) = (run for run in arms.values() if run['arm'] == 'authors-frozen')
    assert {len(row['rms']) for row in frozen['branch_gradients'] if row['branch'] == 'origin'} == {4}
    assert [row['depth'] for row in logged['branch_similarity']] == list(range(6))
    assert all(-1 <= row['mean'] <= 1 for row in logged['branch_similarity'])

    kept = torch.load(output / '.starts' / 'rep-seed1.pt')['model']
    for arm in ('descent', 'restarts'):  # the first loss is that of the start
        (run,) = (run for run in arms.values() if (run['form'], run['arm'], run['seed']) == ('rep', arm, 1))
        train_images, _, _ = fast.data.read_data(small_images)
        images = fast.data.padded(train_images)
        trainer = fast.training.Trainer(
            fast.anneal.Run('rep', arm, 0.1, 1), run['settings'], fast.network.whitening(train_images.pixels), 'cpu')
        trainer.model.train().load_state_dict(kept)
        x, targets = next(fast.data.train_batches(
            images, 8, torch.Generator().manual_seed(fast.anneal.ORDER_SEED + 1)))
        assert trainer.step(x, targets, 1.0).item() == pytest.approx(run['rows'][0]['first_losses'][0], abs=1e-4)

    lost = next(output.glob('rep-measured0-*-seed1.json'))
    found = load(lost)
    lost.unlink()
    (output / '.starts' / 'rep-seed1.pt').unlink()
    (output / '.starts' / 'plain-seed1.pt').unlink()  # needed by nobody
    capsys.readouterr()
    anneal(output, *arguments)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(':')[0] for line in printed] == ['start-rep-seed1', *[lost.stem] * 4]
    assert without_times(load(lost)) == without_times(found)

    fast.table_anneal.main([str(output)])
    table = (output / 'results.md').read_text()
    assert '| REP | authors-frozen | ' in table
    assert (output / 'results.png').stat().st_size > 1000
    fast.figures.main([str(output), 'authors-frozen'])
    drawn = {path.name for path in output.glob('*.png')}
    assert drawn == {'results.png', 'gradients.png', 'similarity.png', 'gradients-rep-authors-frozen.png'}
    with pytest.raises(SystemExit, match='no run of keep_gain; there are descent, restarts, authors-frozen, measured0'):
        fast.figures.main([str(output), 'keep_gain'])
    with pytest.raises(SystemExit, match=r'start-grid-rep-seed1000.json is a start at learning rate 0.1, not 0.4'):
        anneal(output, *arguments, '--start-rates', 'plain=0.1', 'rep=0.4')
    with pytest.raises(SystemExit, match=r'runs of other settings: cycles is 2 there and 3 here'):
        anneal(output, *arguments, '--cycles', '3')


@pytest.mark.parametrize(('name', 'frozen'), [('authors', False), ('authors-frozen', True), ('restarts', False)])
def test_cycles_begin_with_a_transition(fast, name, frozen):
    settings = dict(
        network='small', cycles=2, epochs=3, warmup_share=0.4, batch_size=4, momentum=0.9, weight_decay=0.1,
        amp=False, data=dict(classes=2))
    images = fast.data.Images(torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8), torch.arange(8) % 2)
    run = fast.anneal.Run('rep', name, 0.1, 0)
    trainer = fast.training.Trainer(run, settings, fast.network.whitening(images.pixels), torch.device('cpu'))
    annealer, offset = fast.anneal.annealer_of(run, trainer, settings, fast.data.padded(images))
    _, layer = next(timm_rep.rep_layers(trainer.model))
    seen = []
    for epoch in range(6):
        kernel = layer.conv_1x1.weight.clone()
        annealer.begin_epoch(offset + epoch)
        redrawn, kernel = not torch.equal(layer.conv_1x1.weight, kernel), layer.conv_kxk.weight.clone()
        trainer.epoch([(fast.data.normalized(images.pixels), images.targets)], [1.0], images)
        seen.append((redrawn, torch.equal(layer.conv_kxk.weight, kernel)))
    transition = name != 'restarts'
    assert seen == 2 * [(transition, frozen), (False, False), (False, False)]


@pytest.fixture
def arms_played(fast, anneal, monkeypatch):
    """Start the experiment with runs that cost nothing; the runs that were done, with the images they saw."""
    done = []

    def make_start(start, settings, stem, train_images, eval_images, args):
        done.append((start, len(train_images.targets), len(eval_images.targets)))
        fast.common.hidden_folder(args.output, '.starts')
        torch.save({}, args.output / start.file)

    def train_arm(run, start, settings, stem, train_images, eval_images, execution, distillation):
        done.append((run, len(train_images.targets), len(eval_images.targets)))
        return dict(run._asdict(), top1=run.lr, diverged=run.arm == 'authors' and run.lr == 0.2)

    monkeypatch.setattr(fast.anneal, 'make_start', make_start)
    monkeypatch.setattr(fast.anneal, 'train_arm', train_arm)
    return lambda *arguments: (anneal(*arguments), done)[1]


def test_arms_are_paired_and_take_their_rate_of_others(arms_played, tmp_path):
    done = arms_played(
        tmp_path, '--forms', 'rep', 'orepa', '--arms', 'restarts', 'authors', 'measured', '--few-arms',
        'authors-frozen', 'measured-w0', '--grid-arms', 'restarts', 'authors', '--seeds', '2', '--few-seeds', '1')
    names = [run.name for run, *_ in done]
    rep = [f'rep-restarts-lr0.2-seed{n} rep-authors-lr0.1-seed{n} rep-measured-lr0.2-seed{n}' for n in (0, 1)]
    orepa = [f'orepa-restarts-lr0.2-seed{n} orepa-authors-lr0.1-seed{n}' for n in (0, 1)]
    assert [name for name in names if name.startswith(('rep', 'orepa'))] == ' '.join([
        *rep, *orepa, 'rep-authors-frozen-lr0.1-seed0 rep-measured-w0-lr0.2-seed0 orepa-authors-frozen-lr0.1-seed0',
    ]).split()
    grids = [name for name in names if name.startswith('grid-')]
    assert grids == [f'grid-{form}-{arm}-lr{lr}-seed1000' for form in ('rep', 'orepa') for lr in (0.1, 0.2)
                     for arm in ('restarts', 'authors')]
    assert {(run.grid, *counts) for run, *counts in done} == {(True, 16, 8), (False, 24, 8)}
    for run, *_ in done:  # after its start
        if hasattr(run, 'arm'):
            start = f"start-{'grid-' if run.grid else ''}{run.form}-seed{run.seed}"
            assert names.index(start) < names.index(run.name)
    assert len(set(names)) == len(names)


def test_a_single_rate_needs_no_grid(fast, arms_played, tmp_path):
    done = arms_played(tmp_path, '--forms', 'rep', '--arms', 'descent', '--few-arms', '--seeds', '2', '--rates', '0.2')
    assert [run.name for run, *_ in done] == [
        'start-rep-seed0', 'rep-descent-lr0.2-seed0', 'start-rep-seed1', 'rep-descent-lr0.2-seed1']
    runs = [dict(form='rep', arm='descent', lr=0.2, seed=seed, grid=False, top1=50.0) for seed in range(2)]
    assert fast.table_anneal.rates(runs) == {('rep', 'descent'): ('descent', 0.2)}
    assert list(fast.table_anneal.groups(runs)['rep', 'descent']) == [0, 1]
    assert fast.table_anneal.rates([*runs, dict(runs[0], lr=0.4)]) == {}
    assert fast.table_anneal.grid_table({}, runs) == []


def test_starts_take_the_rates_of_the_forms(fast, arms_played, start, monkeypatch, tmp_path):
    monkeypatch.setattr(fast.run, 'train', lambda run, settings, *_: dict(
        run._asdict(), top1=-run.lr, diverged=False, settings=settings))
    start(tmp_path / 'forms', '--forms', 'rep', '--seeds', '0')
    arguments = ['--forms', 'rep', '--arms', 'descent', '--few-arms', '--seeds', '1', '--start-rates', 'plain=0.4']
    done = arms_played(tmp_path / 'arms', *arguments, '--rates-from', str(tmp_path / 'forms'))
    assert {run.lr for run, *_ in done if not hasattr(run, 'arm')} == {0.1}
    with pytest.raises(SystemExit, match='learning rate of the start of rep: give --start-rates rep=RATE'):
        arms_played(tmp_path / 'none', *arguments)
    assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize(('arguments', 'named'), [
    (['--arms', 'measured2'], "there is no arm 'measured2'"),
    (['--arms', 'descent-frozen'], "there is no arm 'descent-frozen'"),
    (['--arms', 'authors-w1.5'], "there is no arm 'authors-w1.5'"),
    (['--arms', 'authors', 'authors-w0.5'], 'authors and authors-w0.5 are the same: both warm up for 1 of 2 epochs'),
    (['--warmup-share', '0.9'], 'authors would warm up for 2 of the 2 epochs'),
    (['--grid-arms', 'authors'], 'nobody says the learning rate of descent'),
    (['--start-rates', 'repp=1'], "there is no form 'repp'"),
    (['--teacher', 'medium'], 'nobody says the learning rate of the teacher medium: give --teacher-lr'),
    (['--teacher-lr', '0.1'], '--teacher-lr is that of a teacher: give --teacher, one of small, medium, speedrun'),
    (['--teacher', 'medium', '--teacher-lr', '0.1', '--kd-alpha', '1.5'], '--kd-alpha is 1.5; it is from 0 to 1'),
    (['--kd-temperature', '0'], '--kd-temperature is 0; it is above 0'),
    (['--teacher-epochs', '0'], '--teacher-epochs is 0; it is 1 or more'),
])
def test_arms_that_cannot_be_are_refused(anneal, tmp_path, capsys, arguments, named):
    with pytest.raises(SystemExit):
        anneal(tmp_path / 'out', *arguments)
    assert named in ' '.join(capsys.readouterr().err.split())
    assert not (tmp_path / 'out').exists()


def test_arms_by_name(fast):
    arms = fast.arms
    for name in ('descent', 'measured0', 'authors-frozen', 'measured0-w0.33', 'keep_gain-frozen-w0',
                 'measured0-descent-frozen'):
        assert arms.arm_of(name).name == name
    shares = ('0', '0.17', '0.33', '0.5', '0.67')  # of 6 epochs
    assert [arms.arm_of(f'authors-w{share}').warmup_epochs(6, 0.5) for share in shares] == [0, 1, 2, 3, 4]
    assert arms.arm_of('authors').warmup_epochs(6, 0.5) == 3
    frozen = arms.arm_of('measured0-frozen-w0.33')
    assert arms.rate_source(frozen, {'measured0-frozen', 'measured0-w0.33'}) == 'measured0-frozen'
    assert arms.rate_source(frozen, {'measured0', 'restarts'}) == 'measured0'
    assert arms.rate_source(frozen, {'restarts', 'authors'}) == 'restarts'
    assert arms.rate_source(arms.arm_of('restarts'), {'descent'}) is None
    through = arms.arm_of('measured0-descent-w0')
    assert arms.rate_source(through, {'measured0', 'restarts', 'descent'}) == 'descent'
    assert arms.rate_source(through, {'measured0', 'measured-descent', 'descent'}) == 'measured-descent'
    once = [name for name in ('descent', 'measured0-descent', 'measured0') if arms.arm_of(name).descends_once]
    assert once == ['descent', 'measured0-descent']
    fitting = {form: [name for name in ('restarts', 'authors-frozen', 'measured') if arms.fits(form, arms.arm_of(name))]
               for form in ('plain', 'orepa', 'dbb')}
    assert fitting == dict(plain=['restarts'], orepa=['restarts', 'authors-frozen'],
                           dbb=['restarts', 'authors-frozen', 'measured'])


def arm_run(arm, top1, seed=0, form='rep', **changes):
    """What `table_anneal.py` reads of a run's file."""
    rows = [dict(top1=top1 - 1, last_loss=1.0, first_loss=1.5), dict(top1=top1, last_loss=0.75, first_loss=1.25)]
    run = dict(form=form, arm=arm, lr=0.2, seed=seed, grid=False, top1=top1, diverged=False, rows=rows,
               start=dict(last_loss=1.25), hardware='h', versions={})
    return dict(run, **changes)


def test_table_of_arms_pairs_by_seed(fast):
    settings = dict(
        network='small', start_epochs=1, cycles=2, epochs=1, warmup_share=0.5, batch_size=8, momentum=0.9,
        weight_decay=0.0, amp=True, set_aside=8, data=dict(train=1, test=1))
    grid = [arm_run(arm, top1, 1000, form, lr=lr, grid=True)
            for form, arm in (('rep', 'restarts'), ('rep', 'descent'), ('plain', 'descent'))
            for lr, top1 in ((0.1, 40.0), (0.2, 60.0), (0.4, 50.0))]
    runs = [
        *grid, *(arm_run('restarts', 50.0 + seed, seed) for seed in range(3)),
        *(arm_run('authors', 51.0 + 2 * seed, seed) for seed in range(4)), arm_run('authors', 10.0, lr=0.1),
        *(arm_run('descent', 51.0 + seed, seed) for seed in range(2)), arm_run('descent', 40.0, form='plain')]
    starts = [dict(form='rep', lr=0.4, seed=seed, grid=False, top1=30.0 + seed) for seed in range(2)]
    text = fast.table_anneal.markdown(settings, runs, starts)
    assert '| REP | authors | 0.2 (restarts) | 4 | 53.00 | 54.00 | 2.58 | +0.25 |  |' in text
    # differences 1, 2, 3; 0, 1; 11
    assert ('| REP | authors | +2.00 ± 0.58, -0.48 to +4.48 (3) | +0.50 ± 0.50, -5.85 to +6.85 (2) | +11.00 (1) |'
            in text)
    assert '| REP | descent | **+1.00 ± 0.00, +1.00 to +1.00 (2)** |  | +11.00 (1) |' in text
    assert '| plain | descent |  |  |  |' in text
    assert '| REP | 0.4 | 2 | 30.50 | 0.71 |' in text
    assert '| REP | restarts | 40.00 | 60.00 | 50.00 | 0.2 |' in text
    sweep = [*(arm_run('authors', 50.0, seed) for seed in range(2)),
             *(arm_run('authors-w0.17', 51.0 + 2 * seed, seed) for seed in range(2))]
    text = fast.table_anneal.markdown(settings, sweep, starts)
    assert '| form | arm | minus the usual warm-up |\n' in text
    assert '| REP | authors-w0.17 | +2.00 ± 1.00, -10.71 to +14.71 (2) |' in text


# cifar10_fast: with a teacher

TEACHER = ['--teacher', 'medium', '--teacher-lr', '0.1', '--teacher-epochs', '1']


def test_loss_with_a_teacher(fast):
    torch.manual_seed(0)
    teacher, x, targets = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3)).eval(), *(
        torch.randn(4, 5), torch.tensor([0, 2, 1, 1]))
    output = torch.randn(4, 3, requires_grad=True)
    cross_entropy = torch.nn.functional.cross_entropy(output, targets)
    loss = fast.teacher.Distillation(teacher, 0.3, 2.0)(x, output, cross_entropy)
    p, q = (torch.softmax(logits.detach().double() / 2, 1) for logits in (teacher(x), output))
    expected = 0.3 * 4 * (p * (p / q).log()).sum() / 4 + 0.7 * cross_entropy.item()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert output.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_step_with_a_teacher_notes_the_cross_entropy(fast):
    settings = dict(network='small', momentum=0.9, weight_decay=0.1, amp=True, data=dict(classes=2))
    pixels, targets = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8), torch.arange(8) % 2
    stem, x = fast.network.whitening(pixels), fast.data.normalized(pixels)
    teacher = fast.network.build('medium', 'plain', 1, stem, 2).eval()
    found = {}
    for alpha in (None, 0.0, 1.0):
        distillation = None if alpha is None else fast.teacher.Distillation(teacher, alpha, 4.0)
        trainer = fast.training.Trainer(
            fast.anneal.Run('rep', 'descent', 0.1, 0), settings, stem, torch.device('cpu'), distillation=distillation)
        trainer.model.train()
        found[alpha] = [trainer.step(x, targets, 1.0).item() for _ in range(3)]
    assert found[None] == found[0.0]
    assert found[None][0] == found[1.0][0]  # the same start
    assert found[None][2] != found[1.0][2]


def test_arms_with_a_teacher_go_on_from_the_starts_without(fast, anneal, tmp_path, capsys):
    arguments = ['--forms', 'plain', 'rep', '--seeds', '1', '--arms', 'descent', 'restarts', 'authors', '--few-arms',
                 '--grid-arms', 'descent', 'restarts', '--rates', '0.1', '--epochs', '2', '--cycles', '1']
    taught, alone = tmp_path / 'taught', tmp_path / 'alone'
    anneal(alone, *arguments)
    capsys.readouterr()
    anneal(taught, *arguments, *TEACHER)
    order = list(dict.fromkeys(line.split(':')[0] for line in capsys.readouterr().out.splitlines()))
    assert order[0] == 'teacher-grid-medium-seed2000'
    assert order.index('teacher-medium-seed2000') < order.index('plain-descent-lr0.1-seed0')
    assert 'teacher' not in load(alone / 'settings.json')
    wanted = dict(network='medium', lr=0.1, epochs=1, alpha=0.5, temperature=4.0)
    assert load(taught / 'settings.json') == dict(load(alone / 'settings.json'), teacher=wanted)
    teachers = [load(taught / f'teacher-{name}-seed2000.json') for name in ('medium', 'grid-medium')]
    assert [(run['rows'][-1]['steps'], run['parameters']) for run in teachers] == [(3, 497058), (2, 497058)]
    assert all(run['network'] == 'medium' and 0 <= run['top1'] <= 100 for run in teachers)

    for path in alone.glob('*-seed*.json'):
        one, other = load(path), load(taught / path.name)
        if 'arm' not in one:
            assert without_times(one) == without_times(other)
        else:
            assert one['rows'][0]['first_losses'][0] == other['rows'][0]['first_losses'][0]  # of the start
            assert one['rows'][-1]['train_loss'] != other['rows'][-1]['train_loss']
            assert other['settings']['teacher'] == wanted

    lost = taught / 'plain-descent-lr0.1-seed0.json'
    found = load(lost)
    lost.unlink()
    (taught / '.teachers' / 'medium-seed2000.pt').unlink()
    (taught / '.teachers' / 'grid-medium-seed2000.pt').unlink()  # needed by nobody
    capsys.readouterr()
    anneal(taught, *arguments, *TEACHER)
    assert list(dict.fromkeys(line.split(':')[0] for line in capsys.readouterr().out.splitlines())) == [
        'teacher-medium-seed2000', lost.stem]
    assert without_times(load(lost)) == without_times(found)

    fast.table_anneal.main([str(taught)])
    assert 'trained with a teacher: the plain network medium, 1 epochs' in (taught / 'results.md').read_text()
    fast.table_teacher.main([str(taught), str(alone)])
    assert '| REP | authors | ' in (taught / 'teacher.md').read_text()
    assert (taught / 'teacher.png').stat().st_size > 1000
    with pytest.raises(SystemExit, match=r"alone have no teacher; give the folder with one first"):
        fast.table_teacher.main([str(alone), str(taught)])
    with pytest.raises(SystemExit, match=r"runs of other settings: teacher is None there and \{'network': 'medium'"):
        anneal(alone, *arguments, *TEACHER)
    with pytest.raises(SystemExit, match='runs of other settings: teacher is'):
        anneal(taught, *arguments, *TEACHER, '--kd-alpha', '0.9')


def test_table_of_a_teacher_pairs_by_seed(fast):
    def by_group(**top1s):
        keys = dict(plain=('plain', 'descent'), restarts=('rep', 'restarts'), authors=('rep', 'authors'))
        return {keys[name]: {seed: dict(top1=value) for seed, value in enumerate(values)}
                for name, values in top1s.items()}

    settings = dict(network='small', teacher=dict(network='medium', lr=0.1, epochs=3, alpha=0.3, temperature=4.0))
    teachers = [dict(grid=True, top1=70.0), dict(grid=False, top1=80.0)]
    alone = by_group(plain=[50.0, 51.0], restarts=[52.0, 53.0, 54.0], authors=[53.0, 54.0, 55.0, 56.0])
    taught = by_group(plain=[53.0, 54.0], restarts=[53.0, 54.0, 55.0], authors=[56.0, 58.0, 60.0])
    text = fast.table_teacher.markdown(settings, teachers, taught, alone)
    assert 'network medium, 3 epochs at a learning rate of 0.1, top-1 80.00. Their loss is 0.3 T² KL + 0.7 CE' in text
    # the teacher adds 3, 4, 5 to authors, 1, 1, 1 to restarts
    assert ('| REP | authors | 54.00 | 58.00 | **+4.00 ± 0.58, +1.52 to +6.48 (3)** | '
            '**+3.00 ± 0.58, +0.52 to +5.48 (3)** |') in text
    assert '| REP | restarts | 53.00 | 54.00 | **+1.00 ± 0.00, +1.00 to +1.00 (3)** |  |' in text
    adds = text.split('## What the arm adds')[1]
    assert '| REP | authors | **+1.00 ± 0.00, +1.00 to +1.00 (3)** | **+4.00 ± 0.58, +1.52 to +6.48 (3)** |' in adds
    assert adds.count('(2)') == 4  # of authors and restarts against the plain network's descent


def test_gradients_of_the_figures(fast):
    rows = [dict(depth=0, branch='origin', rms=[1.0, 2.0]), dict(depth=0, branch='a', rms=[2.0, 2.0]),
            dict(depth=0, branch='b', rms=[4.0, 2.0]), dict(depth=1, branch='origin', rms=[1.0, 0.0]),
            dict(depth=1, branch='a', rms=[5.0, 1.0]), dict(depth=2, branch='origin', rms=[1.0, 1.0])]
    run = dict(branch_gradients=rows, arm='restarts', rows=[dict(epoch=0), dict(epoch=1)])
    assert fast.figures.ratios(run) == {0: 4.0, 1: 1.0}
    assert dict(epoch=1, depth=0, branch='b', rms=2.0) in fast.figures.gradient_rows(run)
    assert [row['time_step'] for row in fast.figures.history(run, dict(epochs=1))] == [0, 1]
    assert [row['time_step'] for row in fast.figures.history(dict(run, arm='descent'), dict(epochs=1))] == [0, 0]
    styles = [fast.figures.style(arm)['linestyle'] for arm in ('authors', 'authors-frozen', 'authors-w0')]
    assert styles == ['-', '--', ':']


def test_similarity_of_branches_is_that_of_the_runs_at_the_best_rate(fast, tmp_path):
    layers = [dict(depth=0, mean=0.2), dict(depth=1, mean=None)]
    runs = [fast_run('orepa', 70, grid=True), fast_run('orepa', 60, grid=True, lr=0.4), fast_run('orepa'),
            fast_run('orepa', branch_similarity=layers), fast_run('orepa', seed=1, branch_similarity=layers[:1]),
            fast_run('orepa', lr=0.4, branch_similarity=layers), fast_run('rep', grid=True)]
    assert fast.similarity.by_depth(runs, 'orepa') == {0: [0.2, 0.2]}
    for number, run in enumerate(runs):
        (tmp_path / f'run{number}-seed0.json').write_text(json.dumps(run))
    fast.similarity.main([str(tmp_path), 'orepa'])
    assert (tmp_path / 'similarity.png').stat().st_size > 1000
    with pytest.raises(SystemExit, match=r'no run of rep in .* noted'):
        fast.similarity.main([str(tmp_path), 'orepa', 'rep'])
