"""RepAn's transition and steps as its authors' code runs them, and the same with ours: see repan_transition.py.

What their code does otherwise than its text says, and how it is met here:

- The fold ignores the attach rate, and the first epoch of a time step runs at rate one: the fold is made at rate one,
  as at the end of a time step, and the steps behind it run at rate one and at one half.
- Their RepVGG for small images keeps the learnt gain of the origin's norm and holds the origin still for the first
  epochs; all others set the gain to one and hold nothing still.
- `reparam` of their ResNets folds plain convolutions and norms as well, and `ConvBN.inversion` would restore them with
  gain one; but `inversion_all` never calls it, and a folded `ConvBN` is not what its forward computes. So plain pairs
  stay as they are, which is compared; what calling it would do to the training loss is measured beside.
- Weight decay and clipping leave out what has "bn" in its name: the norm of the ResNets' stem, which has not, is
  decayed. Which parameters of ours are meant comes from the import: see `names_of_theirs`.
- The REP of their ResNets has no identity branch, nor has the first block of a stage of their RepVGG, and the stem of
  their ResNets for small images is plain. Ours has branches where the shapes allow it; `imported` leaves these out.
- Their learning rates are for batches of 128 and well trained networks. With the small batches of this comparison the
  loss explodes at them, and rounding grows by a factor of three or so in every step. So twenty steps are made at rates
  that are scaled by the batch, and five at the rates themselves.
- Their folds end in a tensor on the GPU that nothing reads: `without_cuda` keeps it here.
"""
import contextlib
import copy
import dataclasses
import re
from dataclasses import dataclass

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_rep
from timm_rep.core.walk import annealed_modules
from timm_rep.official.networks import fill_from_official_

# The kernels that their `init_branch_weights` draws; all else that it writes is a constant.
DRAWN = re.compile(r'(conv_1|dbb_1x1\.conv|dbb_avg\.conv|dbb_1x1_kxk\.conv2|ver_conv|hor_conv)\.weight$')
DRAW_BOUND = 0.1  # over the root of the output channels
GRAD_CLIP = 10.0
SETTLING = 50  # batches


@dataclass(frozen=True)
class Procedure:
    """How the authors anneal a network.

    Attributes:
        restoration: What our library calls their rule.
        lr: From their configuration, as the weight decay.
        weight_decay: Of what is decayed at all.
        freezes: Whether the origin branches stand still for the first epochs.
        image: Height and width of the inputs here.
        batch: Their number.
    """

    restoration: str
    lr: float
    weight_decay: float
    image: int
    batch: int
    freezes: bool = False

    def scaled(self):
        """The same with the learning rate for the batch of this comparison."""
        return dataclasses.replace(self, lr=self.lr * self.batch / 128)


# By the names of official_networks.py. With REP ResNets they have a configuration for ImageNet only.
PROCEDURES = {
    'RepVGG-A1, CIFAR-100': Procedure('keep_gain', 0.75, 2e-4, image=32, batch=16, freezes=True),
    'ResNet-18 of DBB, CIFAR-100': Procedure('authors', 0.2, 1e-4, image=24, batch=8),
    'ResNet-18 of ACB, CIFAR-100': Procedure('authors', 0.2, 1e-4, image=24, batch=8),
    'ResNet-18 of REP, CIFAR-100': Procedure('authors', 0.1, 3e-5, image=24, batch=8),
    'RepVGG-A1': Procedure('authors', 0.1, 3e-5, image=64, batch=8),
}


@contextlib.contextmanager
def without_cuda():
    """Let tensors and modules that are sent to a GPU stay where they are."""
    before = torch.Tensor.cuda, nn.Module.cuda
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *args, **kwargs: self
    try:
        yield
    finally:
        torch.Tensor.cuda, nn.Module.cuda = before


class Batches:
    """Images of ten classes, each a pattern of its own under noise: batch `n` is always the same."""

    classes = 10

    def __init__(self, image, batch, seed):
        self.image, self.batch, self.seed = image, batch, seed
        coarse = torch.randn(self.classes, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.patterns = F.interpolate(coarse, image, mode='bilinear')

    def __call__(self, number):
        generator = torch.Generator().manual_seed(1000 * self.seed + number + 1)
        target = torch.randint(self.classes, (self.batch,), generator=generator)
        noise = torch.randn(self.batch, 3, self.image, self.image, generator=generator, dtype=torch.float64)
        return 1.2 * self.patterns[target] + noise, target


def training_loss(model, batch):
    """Loss in training mode; the model, whose statistics would move, is left as it was."""
    with torch.no_grad():
        return F.cross_entropy(copy.deepcopy(model).train()(batch[0]), batch[1]).item()


def evaluated(model, batch):
    """Outputs in eval mode."""
    with torch.no_grad():
        return model.eval()(batch[0])


def train_start_(theirs, batches, steps):
    """Train a while, so that gains, biases and statistics are no longer what they start as."""
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    theirs.train()
    for number in range(steps):
        x, target = batches(number)
        optimizer.zero_grad()
        F.cross_entropy(theirs(x), target).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), GRAD_CLIP)
        optimizer.step()
    with torch.no_grad():  # a descent ends at a learning rate near zero, so statistics are up to date
        for number in range(SETTLING):
            theirs(batches(steps + number)[0])


def imported(state, model):
    """A network of ours with these weights of theirs, without the branches that theirs lacks."""
    name, _, rep_layer = model.partition(' rep_layer=')
    ours = timm.create_model(name, num_classes=classes_of(state), inference_mode=True).double().eval()
    layers = {'conv1': None, '*': rep_layer} if rep_layer else 'rep'
    fill_from_official_(timm_rep.expand(ours, layers, inplace=True), state)
    for module in ours.modules():
        for branch in ('identity', 'norm_identity'):  # the import has silenced those that the file lacks
            norm = getattr(module, branch, None)
            if norm is not None and not norm.weight.any():
                setattr(module, branch, None)
    return ours


def classes_of(state):
    return next(len(state[name]) for name in ('fc.bias', 'linear.bias') if name in state)


def names_of_theirs(state, model):
    """What the authors call each tensor of ours: numbers are imported in place of their weights, and read back."""
    names = list(state)
    numbers = {name: torch.full_like(value, place + 1) for place, (name, value) in enumerate(state.items())}
    found = {}
    for ours, tensor in imported(numbers, model).state_dict().items():
        if ours.rpartition('.')[2] not in ('attach_rate', 'time_step'):  # theirs are in no file
            (number,) = tensor.unique().tolist()
            found[ours] = names[int(number) - 1]
    if len(set(found.values())) != len(found):
        raise ValueError('the import takes a tensor of theirs twice')
    return found


def transition_theirs_(theirs):
    """Rep, expansion and restoration by their code, as their cycles call it."""
    (theirs._reparam if hasattr(theirs, '_reparam') else theirs.reparam)()  # RepVGG, ResNet
    theirs.inverse_turn_all(1.0)


def take_drawn_(ours, theirs, names):
    """Give our side branches the kernels that theirs have drawn.

    Returns:
        The largest kernel of ours and of theirs before, over the bound of the draw.
    """
    state, largest = theirs.state_dict(), dict(ours=0.0, theirs=0.0)
    for name, tensor in ours.state_dict().items():
        if DRAWN.search(names.get(name, '')):
            drawn = state[names[name]]
            for whose, kernel in (('ours', tensor), ('theirs', drawn)):
                bound = DRAW_BOUND / len(kernel) ** 0.5
                largest[whose] = max(largest[whose], kernel.abs().max().item() / bound)
            tensor.copy_(drawn)
    return largest


def invert_plain_pairs_(theirs):
    """Do with plain convolutions and norms what their code has a method for and never does."""
    for module in theirs.modules():
        if type(module).__name__ == 'ConvBN':
            module.inversion()


class Trainer:
    """Trains one network, step by step, with the authors' optimizer, groups and clipping.

    Args:
        model: Theirs or ours.
        decayed: Its parameters with weight decay, which are those that are clipped.
        others: The rest that is trained.
        procedure: Theirs.
        freeze: Drops the gradients of the origin branches, after clipping; None if nothing has to.
    """

    def __init__(self, model, decayed, others, procedure, freeze=None):
        self.model, self.decayed, self.freeze = model.train(), decayed, freeze
        self.optimizer = torch.optim.SGD(
            [dict(params=decayed, weight_decay=procedure.weight_decay), dict(params=others, weight_decay=0)],
            lr=procedure.lr)

    def step(self, batch):
        """The loss before the step."""
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.decayed, GRAD_CLIP)
        if self.freeze is not None:
            self.freeze()
        self.optimizer.step()
        return loss.item()


def trainer_of_theirs(theirs, procedure):
    decayed, others = ([p for p in theirs.weights(rep=rep) if p.requires_grad] for rep in (False, True))
    return Trainer(theirs, decayed, others, procedure, theirs.freeze_conv3_grad if procedure.freezes else None)


def trainer_of_ours(ours, theirs, names, procedure, freeze=None):
    is_decayed = {id(parameter) for parameter in theirs.weights(rep=False)}
    parameters = dict(theirs.named_parameters())
    groups = {True: [], False: []}
    for name, parameter in ours.named_parameters():
        groups[id(parameters[names[name]]) in is_decayed].append(parameter)
    return Trainer(ours, groups[True], groups[False], procedure, freeze)


def drop_origin_gradients(ours):
    """What our Annealer does below rate one, by hand: the authors do it in their first epoch too, at rate one."""
    for _, module in annealed_modules(ours):
        for parameter in (*module.conv_kxk.conv.parameters(), *module.conv_kxk.bn.parameters()):
            parameter.grad = None
