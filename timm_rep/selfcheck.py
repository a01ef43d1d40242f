"""Check that an exported model, in a folder or on the Hub, still computes what it did when it was exported."""
import json
from pathlib import Path
from typing import Any, Dict, Optional, Union

import huggingface_hub
import safetensors
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import safe_open

from .hub import CONFIG_FILE, SELF_CHECK_FILE, WEIGHTS_FILE
from .hub_errors import HubError, reason
from .verification import DEFAULT_RTOL, Report, VerificationError, compare_outputs

__all__ = ['HUB_PREFIX', 'check_export', 'is_export']

HUB_PREFIX = 'hf-hub:'
# The only files that are fetched: names come from here, never from what is fetched.
FILES = (CONFIG_FILE, SELF_CHECK_FILE, WEIGHTS_FILE)
# What a file may weigh before it is fetched or read. Weights: twice what the architecture takes in float32, and this.
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


def _check_size(name: str, size: Optional[int], allowed: int) -> None:
    if size is None or size > allowed:
        raise ValueError(f'{name} has {size} bytes, allowed are {allowed}; it is not read')


def _read_config(path: Path) -> Dict[str, Any]:
    _check_size(path.name, path.stat().st_size, MAX_BYTES[CONFIG_FILE])
    try:
        config = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as e:
        raise ValueError(f'{path} is not a JSON file: {e}') from None
    cfg = config.get('pretrained_cfg') if isinstance(config, dict) else None
    architecture = config.get('architecture') if isinstance(cfg, dict) else None
    if not isinstance(cfg, dict) or not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(f'{path} does not describe a timm model; its architecture is {architecture!r}')
    named = [key for key in SOURCE_KEYS if cfg.get(key)]
    if named:
        raise ValueError(f'{path} names another source of weights ({", ".join(named)}); it is not followed')
    return config


def _weights_bytes(config: Dict[str, Any]) -> int:
    """What the weights of an architecture take in float32."""
    args = dict(config.get('model_args') or {}, num_classes=config.get('num_classes'))
    if args['num_classes'] is None:
        del args['num_classes']
    with torch.device('meta'):
        model = timm.create_model(config['architecture'], **args)
    return 4 * sum(value.numel() for value in model.state_dict().values())


def _fetch(repo: str, revision: Optional[str]) -> Path:
    """Fetch the files of one commit into the cache of huggingface_hub, the small ones first."""
    try:
        return _fetch_files(repo, revision)
    except LocalEntryNotFoundError as e:
        raise HubError(f'{repo} is not in the cache, and cannot be fetched: {reason(e)}') from None
    except (FileNotFoundError, ValueError, HubError):
        raise
    except Exception as e:  # those of the HTTP library of huggingface_hub, which is not always the same one
        raise HubError(f'{repo} cannot be fetched: {reason(e)}') from None


def _fetch_files(repo: str, revision: Optional[str]) -> Path:
    api = huggingface_hub.HfApi(library_name='timm_rep')

    def fetch(name: str, commit: Optional[str]) -> Path:
        return Path(api.hf_hub_download(repo, name, revision=commit))

    try:
        info = api.model_info(repo, revision=revision, files_metadata=True)
    except OfflineModeIsEnabled:  # what is in the cache was checked when it came
        paths = [fetch(name, revision) for name in FILES]
        return paths[0].parent
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    for name in FILES:
        if name not in sizes:
            raise FileNotFoundError(f'{repo} holds no {name}, which `timm-rep publish` writes')
        if name in MAX_BYTES:
            _check_size(name, sizes[name], MAX_BYTES[name])
    folder = fetch(CONFIG_FILE, revision).parent  # by its name, so that it is found offline by that name
    if folder.name != info.sha:
        raise HubError(f'{repo} was changed in between; try again')
    allowed = 2 * _weights_bytes(_read_config(folder / CONFIG_FILE)) + WEIGHTS_ALLOWANCE
    _check_size(WEIGHTS_FILE, sizes[WEIGHTS_FILE], allowed)
    for name in FILES[1:]:
        fetch(name, info.sha)
    return folder


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
        ValueError: If a file is too large, or not what an export writes.
        HubError: If the Hub cannot be reached, or refuses.
        VerificationError: If the outputs differ.
        RuntimeError: If the weights are not those of the architecture.
    """
    if str(source).startswith(HUB_PREFIX):
        repo, _, revision = str(source)[len(HUB_PREFIX):].partition('@')
        folder = _fetch(repo, revision or None)
    else:
        folder = Path(source)
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f'{folder} holds no {name}, which an export writes')
    config = _read_config(folder / CONFIG_FILE)
    allowed = 2 * _weights_bytes(config) + WEIGHTS_ALLOWANCE
    _check_size(WEIGHTS_FILE, (folder / WEIGHTS_FILE).stat().st_size, allowed)
    _check_size(SELF_CHECK_FILE, (folder / SELF_CHECK_FILE).stat().st_size, MAX_BYTES[SELF_CHECK_FILE])
    try:
        with safe_open(folder / WEIGHTS_FILE, framework='pt'):
            tensors = safetensors.torch.load_file(folder / SELF_CHECK_FILE)
    except safetensors.SafetensorError as e:
        raise ValueError(f'{source} holds a damaged safetensors file: {e}') from None
    if set(tensors) != {'input', 'output'} or tensors['input'].ndim != 4:
        raise ValueError(f'{SELF_CHECK_FILE} must hold an input (b, c, h, w) and an output, got {sorted(tensors)}')
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval().to(tensors['input'].dtype)
    rtol = DEFAULT_RTOL.get(tensors['input'].dtype, DEFAULT_RTOL[torch.float32])
    with torch.inference_mode():
        output = model(tensors['input'])
    try:
        return Report((), compare_outputs('', tensors['output'], output, rtol), rtol, 0.0)
    except VerificationError as e:
        raise VerificationError(f'{source} does not compute what it was published with: {e}') from None
