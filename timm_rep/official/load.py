"""Load an authors' checkpoint into a model, or turn it into a file or a Hub folder of ours."""
from typing import Any, Dict, Mapping, Optional, Union

import torch
import torch.nn as nn
from timm.models import clean_state_dict
from torch import Tensor

from ..core.errors import UserError
from ..core.fuse import fuse
from ..core.verify import verify
from ..core.walk import annealed_modules, set_attach_rate
from ..hub.export import export_folder
from ..io.architecture import create_model
from ..io.checkpoint import read_checkpoint
from ..io.output import PathLike, is_weights_file, new_output
from ..io.weights import save_weights
from .networks import HEAD_NAMES, fill_from_official_
from .source import Weights, is_folded

__all__ = ['import_checkpoint', 'load_official_checkpoint']


def load_official_checkpoint(
        source: Union[PathLike, Weights],
        architecture: str,
        /,
        *,
        attach_rate: float = 1.0,
        **kwargs: Any,
) -> nn.Module:
    """Load a checkpoint that the authors of OREPA, DBB, RepVGG or RepAn published, with the outputs of their code.

    What comes back depends on the file:

    - Training form (branches and norms): the architecture in training form, with the authors' branches. A plain
      convolution of theirs where the architecture has a rep layer (RepVGG into ``orepa_repvgg_*``) is restored into it:
      same outputs, side branches drawn afresh. Branches that only ours has (the identity of REP) add nothing.
    - Deploy form (folded): the *stock form* of the architecture, as :func:`timm_rep.fuse` makes it, since the branches
      are gone. So are the norms' statistics: they get mean 0 and variance 1, with the same outputs in eval mode; give
      them some batches in training mode before you train on. In a RepVGG the 1x1 and identity branches add nothing.

    Known layouts: OREPA's ResNet-18/34/50/101, wide ResNet-18, ResNeXt-50 and RepVGG; DBB's ResNets and MobileNet;
    RepVGG's own; RepAn's RepVGG, and its ResNets and MobileNet with DBB, ACB or REP. The number of classes is the
    file's. Two imports of a file are the same.

    Source: the authors' repositories (see :mod:`timm_rep.official`). Outputs agree to 1e-4 of the largest in float32,
    1e-9 in float64.

    Args:
        source: File of ``torch.save`` or ``.safetensors`` (wrapped as ``state_dict``, ``model`` or ``model_state``,
            with prefixes of ``DataParallel`` or without); or a state dict. No code in a file is ever run.
        architecture: Model of ours or of timm with the same network: ``'orepa_resnet50'``, ``'dbb_resnet18'``,
            ``'repan_resnet18'``, ``'repvgg_a0'``, ``'orepa_repvgg_a0'``.
        attach_rate: In [0, 1]; of interest for RepAn's files only, which do not hold theirs: it is 1 after the warm-up.
        **kwargs: More arguments of ``timm.create_model``: ``rep_layer`` of ``repan_*`` models; ``act_layer='relu'`` of
            MobileNet, where timm's own has ReLU6.

    Returns:
        The model on the CPU, in eval mode; in float64 for float64 weights, else in float32.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If the file is not safe to read, the architecture is unknown, is another network than these, has
            another activation or does not take the arguments, or the attach rate lies outside [0, 1].
        UserError: If the weights are not those of the architecture: a tensor is missing, left over, of another shape
            or of another kind of block.
    """
    if isinstance(source, Mapping):
        if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in source.items()):
            raise UserError(f'a state dict holds tensors only, by name; got {", ".join(map(str, list(source)[:5]))}')
        tensors, label = clean_state_dict(clean_state_dict(dict(source))), 'the state dict'
    else:
        tensors, label = read_checkpoint(source).state_dict, str(source)
    for name in HEAD_NAMES:
        if f'{name}.weight' in tensors and tensors[f'{name}.weight'].ndim == 2:
            kwargs.setdefault('num_classes', len(tensors[f'{name}.weight']))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = create_model(architecture, **kwargs).eval()
    if is_folded(tensors):
        model = fuse(model, inplace=True)
    if any(value.dtype == torch.float64 for value in tensors.values()):
        model = model.double()
    set_attach_rate(model, attach_rate)
    fill_from_official_(model, tensors, label)
    return model


def import_checkpoint(
        source: PathLike,
        output: PathLike,
        architecture: str,
        *,
        license: str = 'unknown',
        attach_rate: float = 1.0,
        model_kwargs: Optional[Mapping[str, Any]] = None,
) -> Dict[str, Any]:
    """Turn a checkpoint that authors published into a file or a Hub folder of ours.

    Args:
        source: File, as :func:`load_official_checkpoint` takes it.
        output: New ``.safetensors`` or ``.pth`` file, for the weights in the form that they have: training form, or
            stock form of a deploy file. Any other name is that of a Hub folder, in stock form.
        architecture: Model that it is of.
        license: Licence of the weights, for the folder's model card.
        attach_rate: As in :func:`load_official_checkpoint`.
        model_kwargs: More arguments of ``timm.create_model``, as in :func:`load_official_checkpoint`.

    Returns:
        What was written, unless the fused model is not the function of the training form: ``output``, its
        ``architecture``, its ``form`` (``'training'`` or ``'stock'``), ``num_classes``, what else ``create_model``
        needs to build it (``model_kwargs``), and the ``report`` of the comparison, None for a deploy file.

    Raises:
        FileExistsError: If the output exists.
        UserError: For another suffix of the output, or as :func:`load_official_checkpoint` does.
        VerificationError: If the fused model is not the same function, or a value is not finite or not possible.
    """
    output = new_output(output, folder_allowed=True)
    kwargs = dict(model_kwargs or {})
    model: Any = load_official_checkpoint(source, architecture, **{'attach_rate': attach_rate, **kwargs})
    fused: Any = fuse(model)
    report = verify(model, fused) if any(annealed_modules(model)) else None
    if is_weights_file(output):
        written = model
        save_weights(model, output)
    else:
        written = fused
        export_folder(model, output, license=license)  # takes the training form, to note where the weights come from
    in_training_form = any(annealed_modules(written))
    if not in_training_form:
        kwargs.pop('rep_layer', None)
    return dict(
        output=str(output),
        architecture=written.pretrained_cfg['architecture'],
        form='training' if in_training_form else 'stock',
        num_classes=model.num_classes,
        model_kwargs=kwargs,
        report=report,
    )
