"""The teacher of `anneal.py`: a wider network of the same kind, in the plain form, trained once."""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import hidden_folder, save, write
from data import padded
from network import NETWORKS, PLAIN, build
from training import Trainer, descend, result

TEACHER_SEED = 2000  # not among the seeds of a comparison


class Teacher(NamedTuple):
    """What tells one teacher from another. That of the grid has not seen the images set aside."""

    network: str
    lr: float
    epochs: int
    grid: bool = False
    form: str = PLAIN
    seed: int = TEACHER_SEED

    @property
    def name(self):
        return f"teacher-{'grid-' if self.grid else ''}{self.network}-seed{self.seed}"

    @property
    def file(self):
        return f".teachers/{'grid-' if self.grid else ''}{self.network}-seed{self.seed}.pt"


def add_teacher_arguments(parser):
    parser.add_argument('--teacher', choices=list(NETWORKS), help='train all arms with this network as a teacher')
    parser.add_argument('--teacher-epochs', type=int, default=15)
    parser.add_argument('--teacher-lr', type=float, help='needed with --teacher')
    parser.add_argument('--kd-alpha', type=float, default=0.5, help='loss: alpha * T^2 * KL + (1 - alpha) * CE')
    parser.add_argument('--kd-temperature', type=float, default=4.0, help='T')


def check_teacher_arguments(parser, args):
    if args.teacher and args.teacher_lr is None:
        parser.error(f'nobody says the learning rate of the teacher {args.teacher}: give --teacher-lr')
    if args.teacher_lr is not None and not args.teacher:
        parser.error(f'--teacher-lr is that of a teacher: give --teacher, one of {", ".join(NETWORKS)}')
    if args.teacher_epochs < 1:
        parser.error(f'--teacher-epochs is {args.teacher_epochs}; it is 1 or more')
    if not 0 <= args.kd_alpha <= 1:
        parser.error(f'--kd-alpha is {args.kd_alpha:g}; it is from 0 to 1')
    if args.kd_temperature <= 0:
        parser.error(f'--kd-temperature is {args.kd_temperature:g}; it is above 0')


def teacher_settings(args):
    """What `settings.json` says of the teacher; nothing without one."""
    if not args.teacher:
        return {}
    return dict(teacher=dict(
        network=args.teacher, lr=args.teacher_lr, epochs=args.teacher_epochs, alpha=args.kd_alpha,
        temperature=args.kd_temperature))


def make_teacher(teacher, settings, stem, train_images, eval_images, args):
    """Train a teacher; what its files hold."""
    wider = dict(settings, network=teacher.network)
    trainer = Trainer(teacher, wider, stem, train_images.pixels.device, args.execution)
    rows, fused, _ = descend(
        teacher.name, trainer, wider, teacher.epochs, padded(train_images), eval_images,
        torch.Generator().manual_seed(teacher.seed))
    write(args.output / f'{teacher.name}.json', result(teacher, trainer.model, fused, rows, settings, eval_images))
    hidden_folder(args.output, '.teachers')
    save(args.output / teacher.file, trainer.model.state_dict())


class Distillation:
    """The loss with a teacher: alpha * T^2 * KL + (1 - alpha) * CE."""

    def __init__(self, teacher, alpha, temperature):
        self.teacher, self.alpha, self.temperature = teacher, alpha, temperature

    def __call__(self, x, output, cross_entropy):
        """The loss of a batch.

        Args:
            x: Images, as the network sees them.
            output: What the network makes of them.
            cross_entropy: Its loss by the targets.
        """
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher(x).float() / self.temperature, 1)
        said = F.log_softmax(output.float() / self.temperature, 1)
        divergence = F.kl_div(said, wanted, reduction='batchmean', log_target=True)
        return self.alpha * self.temperature ** 2 * divergence + (1 - self.alpha) * cross_entropy


def distillation_of(path, settings, stem, execution='eager'):
    """The loss with the teacher that a file holds, as the settings of a folder say."""
    said = settings['teacher']
    teacher = build(said['network'], PLAIN, TEACHER_SEED, stem, settings['data']['classes']).to(stem.device).eval()
    teacher.load_state_dict(torch.load(path, map_location=stem.device))
    teacher = torch.compile(teacher) if execution == 'compiled' else teacher
    return Distillation(teacher, said['alpha'], said['temperature'])
