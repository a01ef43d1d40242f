"""Check that an exported model, in a folder or on the Hub, still computes what it did when it was exported."""
import json
from pathlib import Path
from typing import Dict, Mapping, Optional, Union

import huggingface_hub
import safetensors
import safetensors.torch
import timm
import torch
import torch.nn as nn
from huggingface_hub.errors import OfflineModeIsEnabled

from ..core.errors import UserError
from ..core.verify import DEFAULT_RTOL, Report, VerificationError, compare_outputs
from ..io.architecture import (
    FACTORY_ARGS,
    HUB_PREFIX,
    check_network_args,
    no_endless_network,
)
from ..io.checkpoint import dtype_fits
from ..io.hub_errors import HubError, hub_errors
from ..models.settings import check_input_size
from .export import CONFIG_FILE, SELF_CHECK_FILE, SELF_CHECK_IMAGES, WEIGHTS_FILE

__all__ = ['check_export', 'is_export', 'load_export']

# The only files that are fetched: names come from here, never from what is fetched.
FILES = (CONFIG_FILE, SELF_CHECK_FILE, WEIGHTS_FILE)
# What a file may weigh before it is fetched or read. Weights: what the architecture takes in half precision, to what it
# takes in double precision, and this.
MAX_BYTES = {CONFIG_FILE: 2 ** 20, SELF_CHECK_FILE: 2 ** 26}
WEIGHTS_ALLOWANCE = 2 ** 24
# Where weights come from is not for a config.json to say.
SOURCE_KEYS = ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'state_dict', 'custom_load', 'source')


def is_export(source: Union[str, Path]) -> bool:
    """Whether something names an exported model: a folder with config.json, or 'hf-hub:ORG/NAME'.

    Args:
        source: What the user gave.

    Returns:
        Whether it does.
    """
    return str(source).startswith(HUB_PREFIX) or (Path(source) / CONFIG_FILE).is_file()


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f'{folder} holds no {name}, which an export writes')
    return path


def _check_size(name: str, size: Optional[int], allowed: int, least: int = 0) -> None:
    if size is None or not least <= size <= allowed:
        expected = f'{least} to {allowed}' if least else f'at most {allowed}'
        raise UserError(f'{name} has {size} bytes, allowed are {expected}; it is not read')


def _check_config(path: Path) -> None:
    """Refuse a config.json that is not of a timm model, or that would make timm read or fetch anything else."""
    _check_size(path.name, path.stat().st_size, MAX_BYTES[CONFIG_FILE])
    try:
        config = json.loads(path.read_text())
        cfg, args = config['pretrained_cfg'], config.get('model_args', {})
        named = [key for key in SOURCE_KEYS if cfg.get(key)] + sorted(FACTORY_ARGS & args.keys())
        known = timm.is_model(config['architecture'])
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f'{path} does not describe a timm model: {type(e).__name__}: {e}') from None
    if not known:
        raise UserError(f'{path} is of an unknown architecture, {config["architecture"]!r}')
    try:
        check_network_args(args)
        check_network_args(cfg)
        if 'input_size' in cfg:
            check_input_size(cfg['input_size'])
    except UserError as e:
        raise UserError(f'{path} does not describe a timm model: {e}') from None
    if named:
        raise UserError(f'{path} names another source of weights ({", ".join(named)}); it is not followed')


def _build(folder: Path, pretrained: bool) -> nn.Module:
    """Let timm rebuild the model of a checked config.json."""
    try:
        with no_endless_network():
            return timm.create_model(f'local-dir:{folder}', pretrained=pretrained)
    except Exception as e:  # whatever the model makes of strange arguments
        what = f'{CONFIG_FILE} and {WEIGHTS_FILE}' if pretrained else CONFIG_FILE
        raise UserError(f'timm cannot rebuild the model from {what} in {folder}: {e}') from e


def _check_weights_size(folder: Path, size: Optional[int]) -> Dict[str, torch.Tensor]:
    """Compare the size of the weights with what the model takes, before that is allocated; gives its tensors."""
    with torch.device('meta'):
        own = _build(folder, pretrained=False).state_dict()
    numbers = sum(value.numel() for value in own.values())
    _check_size(WEIGHTS_FILE, size, 8 * numbers + WEIGHTS_ALLOWANCE, least=2 * numbers)
    return own


def _check_weights(path: Path, own: Mapping[str, torch.Tensor]) -> None:
    """Refuse numbers of other kinds than the model's, which timm would convert; the rest timm compares."""
    try:
        with safetensors.safe_open(path, 'pt') as file:
            given = {key: file.get_tensor(key).dtype for key in own.keys() & set(file.keys())}
    except Exception as e:  # a damaged file makes the reader raise almost anything
        raise UserError(f'timm cannot rebuild the model from {path}: {e}') from e
    for key, dtype in given.items():
        if not dtype_fits(own[key].dtype, dtype):
            raise UserError(f'{path} is not of the model that it describes: {key} is {dtype}')


def _fetch(repo: str, revision: Optional[str]) -> Path:
    """Fetch the files of one commit into the cache of huggingface_hub, the small ones first."""
    api = huggingface_hub.HfApi(library_name='timm_rep')
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True)
    except OfflineModeIsEnabled:  # what is in the cache was checked when it came
        paths = [Path(api.hf_hub_download(repo, name, revision=revision)) for name in FILES]
        return paths[0].parent
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    for name in FILES:
        if name not in sizes:
            raise FileNotFoundError(f'{repo} holds no {name}, which `timm-rep publish` writes')
    for name, allowed in MAX_BYTES.items():
        _check_size(name, sizes[name], allowed)
    # by the revision's name, so that it is found offline by that name
    config = Path(api.hf_hub_download(repo, CONFIG_FILE, revision=revision))
    if config.parent.name != info.sha:
        raise HubError(f'{repo} was changed in between; try again')
    _check_config(config)
    _check_weights_size(config.parent, sizes[WEIGHTS_FILE])
    for name in FILES:
        api.hf_hub_download(repo, name, revision=info.sha)
    return config.parent


def load_export(folder: Path) -> nn.Module:
    """Rebuild an exported model with timm.

    Args:
        folder: Folder of :func:`timm_rep.export_folder`.

    Returns:
        The model, in eval mode.

    Raises:
        FileNotFoundError: If one of the files is missing.
        UserError: If a file is too large, or not what an export writes.
    """
    _check_config(_file(folder, CONFIG_FILE))
    weights = _file(folder, WEIGHTS_FILE)
    _check_weights(weights, _check_weights_size(folder, weights.stat().st_size))
    return _build(folder, pretrained=True).eval()


def check_export(source: Union[str, Path]) -> Report:
    """Rebuild an exported model with timm and compare its output with the one that it was exported with.

    Only ``config.json``, ``model.safetensors`` and ``test/rand_tensors.safetensors`` are fetched and read; their sizes
    are checked before.

    Args:
        source: Folder of :func:`timm_rep.export_folder`, or ``'hf-hub:ORG/NAME'``, with ``'@REVISION'`` if wanted.

    Returns:
        The difference of the outputs.

    Raises:
        FileNotFoundError: If one of the files is missing.
        UserError: If a file is too large, or not what an export writes.
        HubError: If the Hub cannot be reached, or refuses.
        VerificationError: If the outputs differ.
    """
    if str(source).startswith(HUB_PREFIX):
        repo, _, revision = str(source)[len(HUB_PREFIX):].partition('@')
        with hub_errors(repo):
            folder = _fetch(repo, revision or None)
    else:
        folder = Path(source)
    model = load_export(folder)
    path = _file(folder, SELF_CHECK_FILE)
    _check_size(SELF_CHECK_FILE, path.stat().st_size, MAX_BYTES[SELF_CHECK_FILE])
    try:
        tensors = safetensors.torch.load_file(path)
        inputs, expected = tensors['input'], tensors['output']
        if len(inputs) != SELF_CHECK_IMAGES:
            raise UserError(f'an export writes {SELF_CHECK_IMAGES} images, these are {len(inputs)}')
        rtol = DEFAULT_RTOL[inputs.dtype]
        with torch.inference_mode():
            difference = compare_outputs('', expected, model.to(inputs.dtype)(inputs), rtol)
    except VerificationError as e:
        raise VerificationError(f'{source} does not compute what it was published with: {e}') from None
    except Exception as e:  # of a damaged file, or whatever the model makes of strange inputs
        raise UserError(f'{path} does not hold an input of the model and its output: {e}') from e
    return Report((), difference, rtol, 0.0)
