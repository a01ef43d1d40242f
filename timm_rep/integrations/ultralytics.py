"""Ultralytics YOLO: trainers that put rep layers into the network they build, and leave stock weights behind."""
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Union

import torch
import torch.nn as nn

from ..core.errors import UserError
from ..core.expand import Select, expand
from ..core.expansion import expansion_of
from ..core.fuse import fuse
from ..core.methods import MethodLike, as_method
from ..core.walk import rep_layers

__all__ = ['RepTraining', 'fuse_checkpoint', 'rep_trainer']
if TYPE_CHECKING:
    from ultralytics.models.yolo.detect import DetectionTrainer as _DetectionTrainer

    class RepTrainer(_DetectionTrainer):
        """Ultralytics' detection trainer with OREPA layers."""


class RepTraining:
    """What makes a trainer of Ultralytics train with rep layers, to be put before it: ``class Mine(RepTraining, ...)``.

    The network is expanded where the trainer builds it, so weights to start from keep their function, averaging (EMA)
    and several GPUs work as ever, and a run that was interrupted is resumed with its branches. While a run lasts its
    checkpoints are in training form. Before the final evaluation best.pt and last.pt are fused: what is evaluated,
    returned and left behind is the stock network, which needs no plugin.

    Attributes:
        method: As in :func:`timm_rep.expand`.
        select: As in :func:`timm_rep.expand`.
    """

    method: Union[MethodLike, Mapping[str, Optional[MethodLike]]] = 'orepa'
    select: Select = None

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        """Build the trainer's network, with rep layers.

        Args:
            cfg: As Ultralytics has it.
            weights: Network to start from. If it has rep layers, the new one has the same, with their branches.
            verbose: As Ultralytics has it.

        Returns:
            The network in training form.
        """
        build = super().get_model  # type: ignore[misc]
        given = dict(expansion_of(weights).methods) if isinstance(weights, nn.Module) else {}
        if not given:
            select = type(self).select  # not bound, if it is a function
            return expand(build(cfg=cfg, weights=weights, verbose=verbose), self.method, select=select, inplace=True)
        model = build(cfg=cfg, weights=_stock_form(weights), verbose=verbose)
        model = expand(model, given, inplace=True)
        for name, layer in rep_layers(weights):
            _take_branches_(model.get_submodule(name), layer)
        return model

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Build the trainer's optimizer; MuSGD's orthogonal steps are for kernels, so branches take those of SGD.

        Args:
            model: Network, also in wrappers.
            *args: As Ultralytics has them.
            **kwargs: As Ultralytics has them.

        Returns:
            The optimizer.
        """
        optimizer = super().build_optimizer(model, *args, **kwargs)  # type: ignore[misc]
        branches = {id(parameter) for _, layer in rep_layers(model) for parameter in layer.parameters()}
        for group in [group for group in optimizer.param_groups if group.get('use_muon')]:
            to = next(
                other for other in optimizer.param_groups
                if other.get('param_group') == 'weight' and other['lr'] == group['lr'])
            parts: List[List[Any]] = [[], []]
            for parameter in group['params']:
                parts[id(parameter) in branches].append(parameter)
            group['params'] = parts[0]
            to['params'] = [*to['params'], *parts[1]]
        return optimizer

    def save_model(self) -> Any:
        """Save as Ultralytics does, but for the precision: a kernel of branches in half would be off by ten times more.

        Returns:
            What Ultralytics returns.
        """
        from ultralytics.utils.patches import torch_load

        saved = super().save_model()  # type: ignore[misc]
        last: Path = self.last  # type: ignore[attr-defined]
        checkpoint = torch_load(last, map_location='cpu')
        checkpoint['ema'].float().load_state_dict(self.ema.ema.state_dict())  # type: ignore[attr-defined]
        written = last.stat().st_mtime_ns
        for file in last.parent.glob('*.pt'):
            if file.stat().st_mtime_ns >= written:  # those of this epoch: last, and best if it is
                _write(checkpoint, file)
        return saved

    def final_eval(self) -> None:
        """Fuse best.pt and last.pt, then evaluate as Ultralytics does."""
        from ultralytics.utils import RANK

        if RANK in (-1, 0):
            for file in (self.last, self.best):  # type: ignore[attr-defined]
                if file.exists():
                    fuse_checkpoint(file)
        super().final_eval()  # type: ignore[misc]


def _stock_form(model: nn.Module) -> nn.Module:
    """The fused copy of a network, whatever mode that is in."""
    modes = [module.training for module in model.modules()]
    try:
        return fuse(model.eval())
    finally:
        for module, mode in zip(model.modules(), modes):
            module.training = mode


def _take_branches_(layer: nn.Module, other: nn.Module) -> None:
    """Take over the branches of another layer, if they fit: a head for other classes has other channels."""
    own, theirs = layer.state_dict(), other.state_dict()
    if {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in theirs.items()}:
        layer.load_state_dict(theirs)


def fuse_checkpoint(file: Union[str, Path], output: Union[str, Path, None] = None) -> Path:
    """Turn a checkpoint of Ultralytics in training form into one of the stock network; its optimizer is dropped.

    A training does it by itself when it ends. For one that was stopped before, or for the epochs that it has saved.

    Args:
        file: Checkpoint, of one's own making: it is unpickled.
        output: Where to write; the file itself if None.

    Returns:
        The file that was written.

    Raises:
        UserError: If there is no network in it.
    """
    from ultralytics.utils.patches import torch_load

    checkpoint: Dict[str, Any] = torch_load(file, map_location='cpu')
    networks = [key for key in ('ema', 'model') if isinstance(checkpoint.get(key), nn.Module)]
    if not networks:
        raise UserError(f'{file} holds no network of Ultralytics')
    for key in networks:
        model = checkpoint[key]
        dtype = next(model.parameters()).dtype
        checkpoint[key] = _stock_form(model.float()).to(dtype)  # composed in full precision
    checkpoint['optimizer'] = None
    return _write(checkpoint, Path(output or file))


def _write(checkpoint: Dict[str, Any], file: Path) -> Path:
    temporary = file.with_name(f'{file.name}.tmp')
    torch.save(checkpoint, temporary)
    os.replace(temporary, file)
    return file


def rep_trainer(
        method: Union[MethodLike, Mapping[str, Optional[MethodLike]]] = 'orepa',
        *,
        select: Select = None,
        trainer: Optional[type] = None,
) -> type:
    """A trainer with rep layers: ``YOLO('yolov8n.yaml').train(trainer=rep_trainer('dbb'), data=...)``.

    Args:
        method: As in :func:`timm_rep.expand`.
        select: As in :func:`timm_rep.expand`.
        trainer: Ultralytics' trainer of the task, or one of your own; the one for detection if None.

    Returns:
        A subclass of it.

    Raises:
        UserError: For an unknown method.
    """
    for one in method.values() if isinstance(method, Mapping) else [method]:
        if one is not None:
            as_method(one)
    if trainer is None:
        from ultralytics.models.yolo.detect import DetectionTrainer

        trainer = DetectionTrainer
    bases: Any = (RepTraining, trainer)
    return type('RepTrainer', bases, dict(method=method, select=select, __module__=__name__))


def __getattr__(name: str) -> Any:
    """Make the trainer for detection when it is asked for: reading this file needs no Ultralytics."""
    if name == 'RepTrainer':
        globals()[name] = rep_trainer()
        return globals()[name]
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
