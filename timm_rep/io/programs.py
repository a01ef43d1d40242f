"""Fused models in the formats of other runtimes, each compared with PyTorch before it gets its name."""
import io
import warnings
from pathlib import Path
from typing import Any, Dict, List, Union

import torch
import torch.nn as nn
from timm.utils import reparameterize_model

from ..core.errors import UserError
from ..core.fuse import fuse
from ..core.verify import Difference, compare_outputs
from ..core.walk import copied, image_shape, unwrapped
from .extras import require_extra
from .output import new_output, written_whole

__all__ = ['ONNX_PACKAGES', 'ONNX_SUFFIX', 'PROGRAM_SUFFIX', 'export_onnx', 'export_program']

ONNX_SUFFIX, PROGRAM_SUFFIX = '.onnx', '.pt2'

# The exporter that builds on torch.export is torch's own choice from 2.9 on; before, it fails on batch norms.
NEW_EXPORTER = tuple(int(part) for part in torch.__version__.split('.')[:2]) >= (2, 9)
ONNX_PACKAGES = ('onnx', 'onnxruntime', *(('onnxscript',) if NEW_EXPORTER else ()))
# The export may fold the norms into the convolutions.
EXPORT_RTOL = 1e-4
# Batches of other sizes than the one that was exported show whether the batch is free.
TRACED_BATCH = 2
CHECKED_BATCHES = (1, 2, 5)


def _deploy_form(model: nn.Module) -> nn.Module:
    """A fused copy; branches that the stock model has itself (RepVGG's) are folded too."""
    fused = reparameterize_model(fuse(copied(unwrapped(model)).eval().cpu()))
    return fused.float().eval()


def _images(model: Any) -> List[torch.Tensor]:
    size = image_shape(model)
    if size is None:
        raise UserError('export: the model has no pretrained_cfg with an input_size')
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, *size, generator=generator, device='cpu') for batch in (TRACED_BATCH, *CHECKED_BATCHES)]


@torch.inference_mode()
def _compare(model: nn.Module, run: Any, images: List[torch.Tensor]) -> Difference:
    found = [compare_outputs('', model(batch), run(batch), EXPORT_RTOL) for batch in images]
    return max(found, key=lambda difference: difference.relative)


@torch.no_grad()
def _trace(model: nn.Module, images: torch.Tensor) -> Any:
    return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch', min=1)},))


def export_program(model: nn.Module, path: Union[str, Path]) -> Difference:
    """Fuse a model and write it as a ``torch.export`` program, with a free batch size.

    Args:
        model: Model in training or stock form; not changed.
        path: New ``.pt2`` file.

    Returns:
        Largest difference of the outputs of the program, read back, over batches of several sizes.

    Raises:
        FileExistsError: If the file exists.
        UserError: For another suffix, or if the model does not say its input size.
        VerificationError: If the program does not compute the same. No file is left then.
    """
    path = new_output(path, suffixes=(PROGRAM_SUFFIX,))
    fused = _deploy_form(model)
    images = _images(fused)
    program = io.BytesIO()  # torch ends the process where it cannot write a file
    torch.export.save(_trace(fused, images[0]), program)
    program.seek(0)
    difference = _compare(fused, torch.export.load(program).module(), images)
    with written_whole(path) as temporary:
        temporary.write_bytes(program.getvalue())
    return difference


def _write_onnx(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    names: Dict[str, Any] = dict(input_names=['images'], output_names=['logits'])
    if NEW_EXPORTER:
        program = _trace(model, images)
        torch.onnx.export(
            program, (images,), str(path), dynamo=True, dynamic_shapes=({0: 'batch'},), external_data=False,
            verbose=False, **names)
    else:
        axes = dict(images={0: 'batch'}, logits={0: 'batch'})
        torch.onnx.export(model, (images,), str(path), dynamo=False, dynamic_axes=axes, **names)


def export_onnx(model: nn.Module, path: Union[str, Path]) -> Difference:
    """Fuse a model and write it as ONNX, with a free batch size, input ``images`` and output ``logits``.

    Args:
        model: Model in training or stock form; not changed.
        path: New ``.onnx`` file.

    Returns:
        Largest difference of the outputs of onnxruntime, over batches of several sizes.

    Raises:
        FileExistsError: If the file exists.
        UserError: If packages of the extra ``export`` are missing, for another suffix, or if the model does not say its
            input size.
        VerificationError: If onnxruntime does not compute the same. No file is left then.
    """
    require_extra('ONNX export', 'export', ONNX_PACKAGES)
    import onnx
    import onnxruntime

    path = new_output(path, suffixes=(ONNX_SUFFIX,))
    fused = _deploy_form(model)
    images = _images(fused)
    with written_whole(path) as temporary:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of the exporter, about its own workings
            _write_onnx(fused, images[0], temporary)
        onnx.checker.check_model(str(temporary))
        session = onnxruntime.InferenceSession(str(temporary), providers=['CPUExecutionProvider'])

        def run(batch: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {'images': batch.numpy()})[0])

        return _compare(fused, run, images)
