import csv
import importlib.util
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from command_line import call
from helpers import tiny_resnet

import timm_rep
from timm_rep.core.errors import UserError
from timm_rep.core.walk import annealed_modules
from timm_rep.io.runs import read_summary
from timm_rep.io.weights import save_weights
from timm_rep.report import run_pictures
from timm_rep.report.plots import branch_similarities, draw_annealing, draw_branch_gradients, draw_branch_similarity
from timm_rep.report.run_pictures import plot_run, read_branch_gradients

pytest.importorskip('matplotlib')

NAME = 'repan_repvgg_a0_cifar'
FIGURES = ['annealing.png', 'branch_gradients.png', 'branch_similarity.png']
EPOCHS, STEP = 6, 3  # two time steps
LAYERS = ('stem', 'stages.0', 'stages.1')
BRANCHES = ('origin', 'conv_1x1', 'conv_1xk')
TOP1 = (50, 60, 70, 65, 90, 80)


def summary_row(epoch):
    columns = dict(train_time_step=epoch // STEP, train_attach_rate=min((epoch % STEP + 1) / 2, 1))
    return dict(
        epoch=epoch, train_loss=2 - epoch / 10, **columns, eval_loss=1.5 - epoch / 10, eval_top1=TOP1[epoch],
        eval_top5=95, lr=0.1 / (epoch % STEP + 1))


def rms(epoch, depth, branch):
    """Gradients of the side branches: larger than the origin's early in a time step, and in the last layer."""
    if branch == 'origin':
        return 1e-3
    return 1e-3 * (1 + depth) * (4, 1, 0.25)[epoch % STEP] * (0.5 if branch == 'conv_1x1' else 1.5)


def write_csv(path, rows):
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def gradient_rows(epochs):
    return [
        dict(epoch=epoch, depth=depth, layer=layer, branch=branch, rms=rms(epoch, depth, branch))
        for epoch in epochs for depth, layer in enumerate(LAYERS) for branch in BRANCHES
    ]


@pytest.fixture(scope='module')
def snapshot(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'time_step-1.safetensors'
    save_weights(timm.create_model(NAME, num_classes=3), path)
    return path


@pytest.fixture
def run(tmp_path, snapshot):
    """The folder of a run that has everything to draw."""
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'args.yaml').write_text(f'model: {NAME}\nnum_classes: 3\n')
    write_csv(folder / 'summary.csv', [summary_row(epoch) for epoch in range(EPOCHS)])
    write_csv(folder / 'branch_gradients.csv', gradient_rows(range(EPOCHS)))
    (folder / snapshot.name).symlink_to(snapshot)
    return folder


def drawn(axes, label):
    """The values of the line with a label."""
    line = next(line for line in axes.lines if line.get_label() == label)
    return list(line.get_xdata()), list(line.get_ydata())


def panels(figure):
    return {axes.get_ylabel(): axes for axes in figure.axes}


def test_plot_writes_the_figures_and_replaces_own_ones_only(run, tmp_path):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    out = tmp_path / 'new' / 'figures'
    assert call('plot', run, '--out', out).split() == [str(out / name) for name in FIGURES]
    assert sorted(path.name for path in out.iterdir()) == FIGURES
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    first = [(out / name).read_bytes() for name in FIGURES]
    write_csv(run / 'summary.csv', [summary_row(epoch) for epoch in range(2)])
    plot_run(run, out)
    assert [(out / name).read_bytes() == content for name, content in zip(FIGURES, first)] == [False, False, True]
    (out / FIGURES[1]).write_text('mine')
    assert 'is not a figure of timm_rep' in call('plot', run, '--out', out, code=2)
    assert (out / FIGURES[1]).read_text() == 'mine'


def test_annealing_draws_what_the_run_noted(run):
    figure = draw_annealing(read_summary(run / 'summary.csv'), NAME, published=4)
    assert figure.get_suptitle() == f'{NAME}: top-1 80.00% at the end, best 90.00% (epoch 4)'
    axes = panels(figure)
    assert list(axes) == ['accuracy (%)', 'loss', 'learning rate', 'attach rate']
    assert drawn(axes['accuracy (%)'], 'held-out top-1') == (list(range(EPOCHS)), list(TOP1))
    assert drawn(axes['accuracy (%)'], 'published')[0] == [4, 4]
    assert drawn(axes['loss'], 'training')[1] == [2 - epoch / 10 for epoch in range(EPOCHS)]
    assert list(axes['attach rate'].lines[0].get_ydata()) == [0.5, 1, 1, 0.5, 1, 1]
    assert list(axes['learning rate'].lines[0].get_ydata()) == [0.1 / n for n in (1, 2, 3, 1, 2, 3)]
    labels = {text.get_text(): text.get_position()[0] for text in axes['accuracy (%)'].texts}
    assert labels == {'1': 1.0, '2': 4.0, 'time step ': 0}
    band = axes['loss'].patches[0]
    extent = band.get_path().get_extents(band.get_patch_transform())
    assert (extent.x0, extent.x1) == (-0.5, 2.5)


def test_annealing_of_what_there_is():
    """A plain run has no time steps, a loop of one's own no prefixes; what is not a number is left out."""
    axes = panels(draw_annealing([dict(epoch=0, train_loss=2.5, lr=0.1), dict(epoch=1, train_loss=2, lr=0)]))
    assert list(axes) == ['loss', 'learning rate']
    assert not axes['loss'].texts
    rows = [dict(epoch=0, time_step=0, attach_rate=0.5, eval_top1=None), dict(epoch=1, time_step=1, eval_top1=40.0)]
    axes = panels(draw_annealing(rows))
    assert [text.get_text() for text in axes['accuracy (%)'].texts] == ['1', '2', 'time step ']
    assert list(axes['attach rate'].lines[0].get_ydata()) == [0.5]
    with pytest.raises(UserError, match='none of accuracy, loss and learning rate is noted; there is no row'):
        draw_annealing([])


def test_summary_of_a_resumed_run(tmp_path):
    path = tmp_path / 'summary.csv'
    header = 'epoch,train_loss,eval_top1,lr\n'
    path.write_text(
        header + '0,2.0,10,0.1\n1,1.9,20,0.1\n2,1.8,30,0.1\n3,1.7,40,0.1\n4,1.6'  # killed while it wrote epoch 4
        + header  # lost behind the cut line
        + '2,1.5,35,0.1\n'
        + 'epoch,train_loss,train_time_step,eval_top1,lr,note\n'  # resumed once more, with more columns
        + '3,1.4,1,45,0.1,text\n4,1.3,1,55,0.1,\n5,1.2,1,6')
    summary = read_summary(path)
    assert [row['epoch'] for row in summary] == [0, 1, 2, 3, 4]
    assert [row['eval_top1'] for row in summary] == [10, 20, 35, 45, 55]
    assert [row['train_loss'] for row in summary] == [2.0, 1.9, 1.5, 1.4, 1.3]
    assert math.isnan(summary[-1]['note'])
    assert [row.get('train_time_step') for row in summary] == [None, None, None, 1, 1]

    # what came after the checkpoint that a run was resumed from is undone, though not overwritten yet
    path.write_text(header + '0,2.0,10,0.1\n1,1.9,20,0.1\n2,1.8,30,0.1\n' + header + '1,1.7,25,0.1\n')
    assert [(row['epoch'], row['eval_top1']) for row in read_summary(path)] == [(0, 10), (1, 25)]

    path.write_text(header + '0,2.0')
    with pytest.raises(UserError, match=r'summary\.csv holds no complete epoch'):
        read_summary(path)


def test_gradients_of_a_resumed_run(run):
    path = run / 'branch_gradients.csv'
    rows = gradient_rows(range(4))
    write_csv(path, rows)
    with path.open('a', newline='') as file:
        file.write('epoch,depth,layer,branch,rms\r\n')
        for row in gradient_rows([2]):
            file.write(f'2,{row["depth"]},{row["layer"]},{row["branch"]},{row["rms"] * 10}\r\n')
        file.write('3,0,stem,origin,0.0')  # cut off
    assert read_branch_gradients(path) == [*rows[:18], *(dict(row, rms=row['rms'] * 10) for row in gradient_rows([2]))]


def test_gradients_show_where_side_branches_are_ahead(run):
    rows = read_branch_gradients(run / 'branch_gradients.csv')
    assert rows == gradient_rows(range(EPOCHS))
    figure = draw_branch_gradients(rows, NAME, history=read_summary(run / 'summary.csv'))
    by_label = panels(figure)
    over_epochs = by_label['gradient (RMS of elements),\nmedian of the layers']
    assert drawn(over_epochs, 'origin branch')[1] == pytest.approx([1e-3] * EPOCHS)
    assert drawn(over_epochs, 'side branches')[1] == pytest.approx([rms(e, 1, 'mean') / 1.5 for e in range(EPOCHS)])
    assert [text.get_text() for text in over_epochs.get_legend().get_texts()] == ['side branches', 'origin branch']
    colours = by_label['depth (layers from the input)'].collections[0].get_array()
    assert colours.shape == (3, EPOCHS)
    assert colours[2, 0] == pytest.approx(12)  # 4 times (1 + depth)
    assert colours[0, 5] == pytest.approx(1 / 4)
    # ahead in all three layers in the first epochs, in two in the second ones, in none in the last
    assert 'ahead in 56% of all layers and epochs' in figure.get_suptitle()


def test_gradients_without_time_steps_and_with_gaps():
    rows = [row for row in gradient_rows([0]) if row['depth'] or row['branch'] == 'origin']
    heat_map = panels(draw_branch_gradients(rows))['depth (layers from the input)']
    assert heat_map.get_xlim() == (-0.5, 0.5)
    assert heat_map.collections[0].get_coordinates()[0, :, 0].tolist() == [-0.5, 0.5]  # as wide as the axes
    assert heat_map.collections[0].get_array().mask[:, 0].tolist() == [True, False, False]
    for without in ([row for row in rows if row['branch'] == 'origin'], []):
        with pytest.raises(UserError, match='no layer has gradients of both'):
            draw_branch_gradients(without)


def test_a_picture_has_an_end():
    rows = [dict(epoch=n, depth=n, layer='x', branch='origin', rms=1.0) for n in range(2000)]
    with pytest.raises(UserError, match='2000 epochs of 2000 layers are too many for a picture'):
        draw_branch_gradients(rows)
    history = [dict(epoch=n, time_step=n, train_loss=1.0, attach_rate=1.0) for n in range(1000)]
    draw_annealing(history, NAME)


def test_similarities_are_the_mean_over_layers_of_a_kind():
    model = timm_rep.expand(tiny_resnet('bottleneck'), 'orepa', generator=torch.Generator().manual_seed(0))
    similarities = branch_similarities(model)
    assert [similarity.kind for similarity in similarities] == [
        'OrepaPointwiseConv2d', 'OrepaConv2d', 'OrepaStemConv2d']
    layers = dict(timm_rep.rep_layers(model))
    for similarity in similarities:
        assert similarity.layers == [n for n, layer in layers.items() if type(layer).__name__ == similarity.kind]
        kernels = [layers[name].branch_kernels() for name in similarity.layers]
        first, second = similarity.branches[0], similarity.branches[-1]
        expected = [F.cosine_similarity(k[first].flatten(), k[second].flatten(), dim=0).item() for k in kernels]
        assert similarity.cosine[0, -1].item() == pytest.approx(sum(expected) / len(expected), abs=1e-6)
        assert torch.allclose(similarity.cosine, similarity.cosine.T, equal_nan=True)
    prior = similarities[1].branches.index('prior')  # starts with scale zero: no direction to compare
    assert similarities[1].cosine[prior].isnan().all()

    figure = draw_branch_similarity(model, 'model, weights')
    titles = [axes.get_title() for axes in figure.axes[:3]]
    assert [title.partition('\n')[0] for title in titles] == [similarity.kind for similarity in similarities]
    axes = figure.axes[1]
    assert [label.get_text() for label in axes.get_xticklabels()] == similarities[1].branches
    texts = [text.get_text() for text in axes.texts]
    assert texts[0] == '1.00'
    assert texts[prior] == '-'


def test_layers_of_a_kind_may_have_other_branches():
    """Only blocks that keep the size have an identity: one panel, each mean over the layers that have both branches."""
    model = timm.create_model(NAME, num_classes=3)
    (similarity,) = branch_similarities(model)
    kernels = [module.branch_kernels() for _, module in annealed_modules(model)]
    assert len(similarity.layers) == len(kernels)
    assert similarity.branches == ['origin', 'conv_1x1', 'identity']
    cosines = [
        F.cosine_similarity(branches['origin'].flatten(), branches['identity'].flatten(), dim=0).item()
        for branches in kernels if 'identity' in branches
    ]
    assert similarity.cosine[0, 2].item() == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    with pytest.raises(UserError, match='no layer with two branches'):
        branch_similarities(torch.nn.Conv2d(1, 1, 1))


def test_newest_weights_are_taken(run, snapshot, monkeypatch):
    titles = []
    for name in ('time_step-2.safetensors', 'time_step-10.safetensors', 'time_step-11-stock.safetensors',
                 'time_step-x1.safetensors', 'time_step-12-ema.safetensors'):
        (run / name).symlink_to(snapshot)
    for name in ('summary.csv', 'branch_gradients.csv'):
        (run / name).unlink()
    monkeypatch.setattr(
        run_pictures, 'draw_branch_similarity',
        lambda model, title: titles.append(title) or draw_branch_similarity(model, title))
    assert [path.name for path in plot_run(run)] == ['branch_similarity.png']
    assert titles == [f'{NAME} time_step-10.safetensors']


def test_missing_data_are_named(run, tmp_path, caplog, monkeypatch):
    (run / 'branch_gradients.csv').unlink()
    (run / 'time_step-1.safetensors').unlink()
    assert [path.name for path in plot_run(run, tmp_path / 'out')] == ['annealing.png']
    assert [record.getMessage() for record in caplog.records] == [
        f'left out branch_gradients.png: no branch_gradients.csv in {run}',
        f'left out branch_similarity.png: no weights in training form in {run}',
    ]
    missing = tmp_path / 'missing'
    message = call('plot', missing, '--out', tmp_path / 'new', code=2)
    assert message.startswith(f'Error: nothing to draw of {missing}; annealing.png: no summary.csv in {missing}; ')
    assert not (tmp_path / 'new').exists()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name, *args: None if name == 'matplotlib' else find_spec(name, *args))
    assert "drawing also needs matplotlib: pip install 'timm_rep[demo]" in call('plot', run, code=2)
