"""The arms of `anneal.py`: what goes on from one trained start, by name."""
import re
from typing import NamedTuple, Optional

import timm_rep

DESCENT, RESTARTS = 'descent', 'restarts'
# How a transition is made: arguments of timm_rep.Annealer.
TRANSITIONS = dict(
    authors=dict(restoration='authors'),
    keep_gain=dict(restoration='keep_gain'),
    measured=dict(restoration='measured'),
    measured0=dict(restoration='measured', side_gain=0.0),
    compensated=dict(restoration='measured', compensate=True),
)
# Whose learning rate an arm takes that has no grid of its own.
LIKE = dict(keep_gain='authors', authors=RESTARTS, measured=RESTARTS, measured0='measured', compensated='measured')
NAME = re.compile(r'(?P<base>[a-z0-9_]+)(?P<through>-descent)?(?P<frozen>-frozen)?(-w(?P<share>0|0?\.\d+))?')


class Arm(NamedTuple):
    """One way to go on.

    Attributes:
        base: `descent`, `restarts`, or a transition.
        through: Whether the learning rate descends through the cycles, once, and starts anew in none.
        frozen: Whether the origin stands still while the attach rate warms up.
        share: Of a cycle in which the attach rate warms up; None for the one of all arms.
    """

    base: str
    through: bool = False
    frozen: bool = False
    share: Optional[str] = None

    @property
    def name(self):
        parts = (
            self.base, '-descent' if self.through else '', '-frozen' if self.frozen else '',
            '' if self.share is None else f'-w{self.share}')
        return ''.join(parts)

    @property
    def descends_once(self):
        return self.through or self.base == DESCENT

    @property
    def anneals(self):
        return self.base in TRANSITIONS

    def warmup_epochs(self, epochs, share):
        """Whole epochs of a cycle in which the attach rate is below one."""
        if not self.anneals:
            return 0
        return int(epochs * float(share if self.share is None else self.share) + 0.5)

    def rate_sources(self):
        """Names of the arms whose learning rate is the right one, the best first."""
        arms = [self, self._replace(share=None), self._replace(frozen=False), Arm(self.base, self.through)]
        while arms[-1].base in LIKE:
            base = LIKE[arms[-1].base]
            arms.append(Arm(base, self.through) if base != RESTARTS else Arm(DESCENT if self.through else RESTARTS))
        return list(dict.fromkeys(arm.name for arm in arms))


def arm_of(name):
    """The arm of a name, such as measured0-frozen-w0.33.

    Raises:
        ValueError: If there is none.
    """
    match = NAME.fullmatch(name)
    arm = match and Arm(match['base'], bool(match['through']), bool(match['frozen']), match['share'])
    if not arm or arm.base not in (DESCENT, RESTARTS, *TRANSITIONS) or (not arm.anneals and arm != Arm(arm.base)):
        raise ValueError(
            f'there is no arm {name!r}; there are {DESCENT}, {RESTARTS}, and {", ".join(TRANSITIONS)}, these also with '
            '-descent, -frozen, -w0.33 (share of a cycle in which the attach rate warms up), in this order')
    return arm


def fits(form, arm):
    """Whether an arm makes a difference in a form: nothing anneals in the plain network, and a layer without norms
    has one kind of transition only."""
    if not arm.anneals:
        return True
    if form not in timm_rep.methods.registered_methods():
        return False
    return arm.base == 'authors' or timm_rep.methods.as_method(form).takes_norm


def rate_source(arm, tuned):
    """Name of the arm whose learning rate an arm takes, of those that have a grid; None if there is none."""
    return next((name for name in arm.rate_sources() if name in tuned), None)
