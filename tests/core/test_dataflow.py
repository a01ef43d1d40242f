"""Which norm acts on a convolution's output is seen, not guessed from the order in which modules are declared."""
import collections
import copy
import io
import random

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import MODEL_RTOL, assert_near, assert_same_state, own_warnings, randn, randomize_, state_of, tree
from timm.layers import BatchNormAct2d
from timm.utils import reparameterize_model
from torchvision.models import feature_extraction
from torchvision.models._utils import IntermediateLayerGetter

import timm_rep
from timm_rep import UserError, expand, expansion_of, fuse
from timm_rep.core.dataflow import Flow, flows_of
from timm_rep.core.expand import expand_as_
from timm_rep.core.expansion import methods_from_list, norms_from_list

NORMED = pytest.mark.parametrize('method', ['dbb', 'acb', 'rep'])


class Net(nn.Module):
    """A network of these parts, which are declared in this order and run as ``run(self, x)`` says."""

    def __init__(self, run, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def conv(inputs=3, outputs=6, **kwargs):
    return nn.Conv2d(inputs, outputs, 3, **dict(dict(padding=1, bias=False), **kwargs))


def norm(channels=6):
    return nn.BatchNorm2d(channels)


def shuffled():
    """Norms are declared elsewhere than they run, and the next child of a convolution is another one's."""
    return Net(
        lambda m, x: F.relu(m.norms[1](m.second(F.relu(m.norms[0](m.first(x)))))),
        norms=nn.ModuleList([norm(), BatchNormAct2d(6)]), first=conv(), second=conv(6, 6, bias=True))


def crossed():
    """The next child of each convolution is the norm of the other one."""
    return Net(
        lambda m, x: m.norm_b(m.b(F.relu(m.norm_a(m.a(x))))), a=conv(), norm_b=norm(), b=conv(6, 6), norm_a=norm())


def images(size=9):
    return randn(2, 3, size, size)


def ready(model):
    return randomize_(model).double().eval()


# Which norm


@pytest.mark.parametrize(('make', 'norms'), [
    (shuffled, dict(first='norms.0', second='norms.1')), (crossed, dict(a='norm_a', b='norm_b'))])
def test_norms_are_found_where_they_act(make, norms):
    assert {name: flow.norm for name, flow in flows_of(make()).convs.items()} == norms


class Block(nn.Module):
    """Pre-activation: norm, activation, convolution, twice, and a shortcut."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = norm(), conv(6, 6), norm(), conv(6, 6)

    def forward(self, x):
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


def test_pre_activation_takes_only_what_goes_nowhere_else():
    model = nn.Sequential(conv(), Block(), Block(), norm())
    assert {name for name, flow in flows_of(model).convs.items() if flow.norm} == {'1.conv1', '2.conv1'}


def test_timms_networks():
    res2net = flows_of(timm.create_model('res2net50_14w_8s', device='meta')).convs
    assert res2net['layer1.0.convs.3'] == Flow('layer1.0.bns.3')
    repvit = flows_of(timm.create_model('repvit_m0_9', device='meta')).convs
    assert repvit['stages.0.blocks.0.token_mixer.conv1'] == Flow()


def test_what_runs_in_training_mode_only():
    model = Net(
        lambda m, x: [m.norm(m.conv(x)), *([m.late(m.aux(x))] if m.training else [])], conv=conv(), norm=norm(),
        aux=conv(), early=norm(), late=norm())
    assert flows_of(model).convs == dict(conv=Flow('norm'), aux=Flow('late'))


def reads(run):
    return Net(run, conv=conv(), norm=norm(), other=norm(), drop=nn.Dropout(0.5))


@pytest.mark.parametrize('run', [
    lambda m, x: m.norm(F.relu(m.conv(x))),
    lambda m, x: m.norm(F.relu_(m.conv(x))),
    lambda m, x: m.norm(m.drop(m.conv(x))),
    lambda m, x: m.norm(F.dropout(m.conv(x), 0.5, m.training)),
    lambda m, x: m.norm(m.conv(x)[:, :, 1:]),
    lambda m, x: m.norm(m.conv(x).flip(2)),
    lambda m, x: (lambda out: m.norm(out) + out)(m.conv(x)),
    lambda m, x: (lambda out: m.norm(out) + out.mean())(m.conv(x)),
    lambda m, x: (lambda out: (m.norm(out), out))(m.conv(x)),
    lambda m, x: (lambda out: dict(out=m.norm(out), low=[out.view(2, -1)]))(m.conv(x)),
    lambda m, x: (lambda out: [setattr(m, 'kept', out), m.norm(out)][1])(m.conv(x)),
    lambda m, x: F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var),
    lambda m, x: m.conv(x),
    lambda m, x: m.norm(m.conv(x)) if not m.training else m.norm(F.relu(m.conv(x))),
    lambda m, x: m.norm(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1),
    lambda m, x: F.conv_transpose2d(F.relu(m.norm(m.conv(x))), m.conv.weight.flip(2)),
    lambda m, x: m.norm(m.conv(x)) * m.norm.weight.sum(),
])
def test_an_output_that_something_else_reads_has_no_norm(run):
    model = reads(run)
    assert flows_of(model).convs == dict(conv=Flow())
    with pytest.raises(UserError, match='no convolution of Net to expand'):
        expand(model, 'dbb')
    with pytest.raises(UserError, match='something sees the output of conv before the norm: another operation'):
        expand(model, 'dbb', select='conv')


@pytest.mark.parametrize('run', [
    lambda m, x: m.norm(m.conv(x)) + m.other(m.conv(x)),
    lambda m, x: m.norm(m.conv(x)) + m.norm(F.pad(x, [0, 0, 0, 0, 0, 3])),
])
def test_a_norm_that_is_not_the_convolutions_alone_stays(run):
    model = reads(run)
    assert flows_of(model).convs['conv'].shared
    with pytest.raises(UserError, match='that of conv cannot go with it'):
        expand(model, 'dbb', select='conv')


def test_a_convolution_that_runs_twice_with_its_norm():
    model = ready(reads(lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv(x.flip(2)))))
    assert flows_of(model).convs == dict(conv=Flow('norm'))
    assert_near(expand(model, 'dbb')(images()), model(images()), MODEL_RTOL[torch.float64])


# What a user has set


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(conv())
        self.second = nn.Sequential(norm())

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize('hook', [
    lambda m: m.first.register_forward_hook(lambda *args: None),
    lambda m: m.second.register_forward_pre_hook(lambda *args: None),
    lambda m: m.first.register_full_backward_hook(lambda *args: None),
    lambda m: m.second[0].register_forward_pre_hook(lambda *args: None),
])
def test_hooks_around_see_an_output_too(hook):
    model = Outer()
    assert list(expansion_of(expand(model, 'dbb')).methods) == ['first.0']
    hook(model)
    with pytest.raises(UserError, match='something sees the output'):
        expand(model, 'dbb', select='first.0')


@pytest.mark.parametrize('hook', [
    lambda m: m.second.register_forward_hook(lambda *args: None),
    lambda m: m.first.register_forward_pre_hook(lambda *args: None),
])
def test_hooks_that_see_something_else_do_not_matter(hook):
    model = Outer()
    hook(model)
    assert list(expansion_of(expand(model, 'dbb')).methods) == ['first.0']


def test_feature_maps_are_outputs():
    getter = IntermediateLayerGetter(Outer(), dict(first='a', second='b'))
    traced = feature_extraction.create_feature_extractor(Outer(), ['first', 'second'])
    for model in (getter, traced):
        assert [flow.norm for flow in flows_of(model).convs.values()] == ['']


def test_maps_that_timm_gives_by_another_method_are_outputs():
    model = reads(lambda m, x: m.norm(m.conv(x)))
    assert flows_of(model).convs == dict(conv=Flow('norm'))
    type(model).forward_features = lambda self, x: self.conv(x)
    try:
        assert flows_of(model).convs == dict(conv=Flow())
    finally:
        del type(model).forward_features


def test_watching_changes_nothing_and_calls_nothing_of_the_users():
    calls = []
    model = nn.Sequential(conv(), norm(), nn.Dropout(0.5), conv(6, 6), norm()).train()
    model[1].eval()
    model[0].register_forward_hook(lambda *args: calls.append(args))
    model[2].register_forward_pre_hook(lambda *args: calls.append(args))
    before, modes = state_of(model), [module.training for module in model.modules()]
    torch.manual_seed(3)
    random.seed(3)
    drawn = torch.rand(3), random.random()
    torch.manual_seed(3)
    random.seed(3)
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    assert flows_of(model).convs['3'] == Flow('4')
    assert torch.equal(torch.rand(3), drawn[0])
    assert random.random() == drawn[1]
    assert not calls
    assert_same_state(state_of(model), before)
    assert [module.training for module in model.modules()] == modes
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize('training', [False, True])
def test_a_forward_that_is_bound_to_the_model_itself_leaves_it_as_it_is(training):
    model = nn.Sequential(conv(), norm(), conv(6, 6), norm()).train(training)
    forward = model.forward
    model.forward = lambda x: forward(x)  # a copy of the model runs this one's, too
    before = state_of(model)
    assert flows_of(model).convs == {}
    assert_same_state(state_of(model), before)


def test_numpys_draws_are_not_moved():
    numpy = pytest.importorskip('numpy', reason='needs NumPy')
    model = reads(lambda m, x: m.norm(m.conv(x)) * numpy.random.rand())
    numpy.random.seed(3)
    drawn = numpy.random.rand()
    numpy.random.seed(3)
    assert flows_of(model).convs == dict(conv=Flow('norm'))
    assert numpy.random.rand() == drawn


# Where a model does not run so


@pytest.mark.parametrize('run', [
    lambda m, x: m.norm(m.conv(x)) * float(x.sum()),  # needs data
    lambda m, x, y: m.norm(m.conv(x)) + y,
])
def test_the_next_child_is_the_norm_of_a_model_that_does_not_run_without_data(run, caplog):
    model = reads(run)
    model.forward = None  # nothing of it can be called
    assert flows_of(model).convs == {}
    caplog.clear()
    assert list(expansion_of(expand(reads(run), 'dbb')).methods) == ['conv']
    (warned,) = [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']
    assert warned.startswith('Net does not run on images without data (')
    assert 'Give expand example_inputs=, or compare the outputs' in warned


class Gated(nn.Module):
    """Takes a batch of a loader, reads values, writes into its input, and declares norms in another order."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_b, self.b, self.norm_a = conv(), norm(), conv(6, 6), norm()

    def forward(self, batch, gain=1.):
        image = batch['image'].sub_(0.5)
        y = self.norm_b(self.b(F.relu(self.norm_a(self.a(image)))))
        return dict(out=y * gain if y.detach().mean().item() > -1e9 else y)


@NORMED
@pytest.mark.parametrize('as_tuple', [False, True])
def test_models_of_other_inputs_are_watched_on_an_example(method, as_tuple, caplog):
    stock = randomize_(Gated().double())
    batch = dict(image=torch.rand(2, 3, 8, 8).double())
    image, before = batch['image'].clone(), state_of(stock)
    rep = expand(stock, method, example_inputs=(batch, 2.) if as_tuple else batch)
    assert not [record for record in caplog.records if record.levelname == 'WARNING']
    assert sorted(expansion_of(rep).methods) == ['a', 'b']
    assert torch.equal(batch['image'], image)
    assert_same_state(state_of(stock), before)
    expected, actual = (model.eval()(dict(image=image.clone()))['out'] for model in (stock, rep))
    assert_near(actual, expected, MODEL_RTOL[torch.float64])


def test_an_example_moves_no_draws():
    model = reads(lambda m, x: F.dropout(m.norm(m.conv(x))))
    drawn = torch.random.get_rng_state()
    assert flows_of(model, (torch.ones(2, 3, 8, 8),)).convs == dict(conv=Flow('norm'))
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_an_example_that_a_model_does_not_run_on_is_refused():
    with pytest.raises(UserError, match=r"^Gated does not run on the example_inputs \(KeyError: 'image'\)$"):
        expand(Gated(), 'dbb', example_inputs=dict(picture=torch.rand(2, 3, 8, 8)))


@pytest.mark.parametrize('run', [
    lambda m, x: (lambda y: m.norm(y) * float(y.mean()))(m.conv(x)),
    lambda m, x: (lambda y: (m.norm(y) + y).reshape(1, 17))(m.conv(x)),
])
def test_what_is_seen_before_a_model_fails_counts(run):
    with pytest.raises(UserError, match='none that it takes unasked has a batch norm that alone reads its output'):
        expand(reads(run), 'dbb')


@pytest.mark.parametrize('size', [28, 32, 96])
def test_networks_for_images_of_one_size_are_watched(size, caplog):
    def run(m, x):
        return m.head(m.norm(m.conv(x)).flatten(1))

    model = reads(run)
    model.head = nn.Linear(6 * size ** 2, 2)
    model.pretrained_cfg = dict(input_size=(3, 224, 224))  # of the weights, not of this one
    assert flows_of(model).convs == dict(conv=Flow('norm'))
    assert not own_warnings(caplog)


def test_what_is_not_run_keeps_to_the_next_child_unless_that_norm_runs():
    model = Net(lambda m, x: m.norm(m.conv(x)), conv=conv(), unused=conv(), norm=norm(), aux=conv(), aux_norm=norm())
    assert sorted(expansion_of(expand(model, 'dbb')).methods) == ['aux', 'conv']


# The stock form


@NORMED
@pytest.mark.parametrize('make', [shuffled, crossed, lambda: nn.Sequential(conv(), Block(), Block(), norm())])
@torch.no_grad()
def test_round_trip_with_norms_that_are_elsewhere(method, make):
    model = ready(make())
    rep = expand(model, method)
    assert len(expansion_of(rep).methods) == 2
    assert_near(rep(images()), model(images()), MODEL_RTOL[torch.float64])
    randomize_(rep)
    timm_rep.set_attach_rate(rep, 0.6)
    fused = fuse(rep)
    assert tree(fused) == tree(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    timm_rep.verify(rep, fused, inputs=images())
    before = rep(images())
    for form in (fused, reparameterize_model(rep), fuse(nn.Sequential(collections.OrderedDict(net=rep)))):
        assert_near(form(images()), before, MODEL_RTOL[torch.float64])
    timm_rep.begin_time_step(rep, generator=torch.Generator().manual_seed(0), attach_rate=0.0)
    assert_near(rep(images()), before, MODEL_RTOL[torch.float64])


class Crossed(nn.Module):
    """:func:`crossed` in a class, which is copied, pickled and compiled."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_b, self.b, self.norm_a = conv(), norm(), conv(6, 6), norm()

    def forward(self, x):
        return self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))


@NORMED
@torch.no_grad()
def test_copies_pickles_scripts_and_compiles(method):
    rep = expand(ready(Crossed()), method)
    expected, fused = rep(images()), fuse(rep)
    file = io.BytesIO()
    torch.save(rep, file)
    file.seek(0)
    copies = [copy.deepcopy(rep), torch.load(file, weights_only=False)]
    forms = [torch.jit.script(rep), torch.compile(rep, backend='eager', fullgraph=True)]
    for form in (*copies, *forms):
        assert torch.equal(form(images()), expected)
    for twin in copies:
        assert twin.a.far_norm[0] is twin.norm_a
        assert_same_state(state_of(fuse(twin)), state_of(fused))


@NORMED
@torch.no_grad()
def test_the_names_of_norms_that_are_elsewhere_travel_with_the_weights(method, tmp_path):
    rep = expand(ready(crossed()), method)
    expansion = expansion_of(rep)
    assert expansion.norms == dict(a='norm_a', b='norm_b')
    data = expansion.to_list()
    assert (methods_from_list(data), norms_from_list(data)) == (expansion.methods, expansion.norms)
    timm_rep.save(rep, tmp_path / 'net.safetensors')
    again = timm_rep.load(tmp_path / 'net.safetensors', into=crossed().double()).eval()
    assert expansion_of(again) == expansion
    assert torch.equal(again(images()), rep(images()))
    assert tree(fuse(again)) == tree(crossed())


@pytest.mark.parametrize(('norms', 'message'), [
    (dict(a='norm_c'), "no batch norm 'norm_c'"), (dict(a='b'), "no batch norm 'b'"), (dict(c='norm_a'), 'batch norm'),
    (dict(a='norm_a', b='norm_a'), 'which another convolution does'), (dict(a='wide'), "no batch norm 'wide' for 'a'")])
def test_norms_of_another_network_are_refused(norms, message):
    methods = expansion_of(expand(crossed(), 'dbb')).methods
    model = crossed()
    model.wide = norm(12)
    before = tree(model)
    with pytest.raises(UserError, match=message):
        expand_as_(model, methods, norms)
    assert tree(model) == before


@torch.no_grad()
def test_linear_and_normed_layers_side_by_side():
    model = ready(crossed())
    rep = expand(model, dict(a='orepa', b='dbb'))
    assert_near(rep(images()), model(images()), MODEL_RTOL[torch.float64])
    timm_rep.verify(rep, fuse(rep), inputs=images())
    assert tree(fuse(rep)) == tree(model)
    model = ready(crossed())
    rep = expand(model, dict(a='dbb', b='orepa'))
    timm_rep.verify(rep, fuse(rep), inputs=images())


def test_norms_from_a_strange_file():
    with pytest.raises(UserError, match='names the norms of layers'):
        norms_from_list([dict(method='dbb', layers=['a'], norms=['norm_a'])])
