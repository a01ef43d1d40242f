"""Pickles of torch.save, looked through before anything of them is made: plain data and tensors, and not too many."""
import io
import pickletools
import zipfile
from typing import IO, Any, Dict, List, NamedTuple

import torch

from ..core.errors import UserError
from .damage import ZIP_START

__all__ = ['UnsafePickleError', 'check_pickles']

LEGACY_PICKLES = 5  # that torch reads of its older files, before the numbers
# What torch.save writes. A state dict with its averages and its optimizer takes some kilobytes for a layer.
OPCODES = frozenset("""
    APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPERSID BINPUT BINUNICODE BUILD EMPTY_DICT EMPTY_LIST
    EMPTY_TUPLE GLOBAL LONG1 LONG_BINGET LONG_BINPUT MARK NEWFALSE NEWOBJ NEWTRUE NONE PROTO REDUCE SETITEM SETITEMS
    SHORT_BINSTRING STOP TUPLE TUPLE1 TUPLE2 TUPLE3
""".split())
MAX_BYTES = 2 ** 26
# Opcodes, and objects as often as they stand anywhere: a pair of one pair, again and again, is hashed for ever.
MAX_OBJECTS = 2 * 10 ** 6
# A tuple in tuples is hashed by as many calls in C, which end the process if they are too many.
MAX_DEPTH = 100
# What may be called.
FUNCTIONS = frozenset((
    '_codecs.encode', 'builtins.complex', 'builtins.set', 'collections.Counter', 'collections.OrderedDict',
    'torch.Size', 'torch.device', 'torch._tensor._rebuild_from_type_v2', 'torch.nn.parameter.Parameter', *(
        f'torch._utils._rebuild_{kind}'
        for kind in ('tensor', 'tensor_v2', 'tensor_v3', 'parameter', 'parameter_with_state')),
))
# What may be named besides: kinds of numbers.
NAMES = frozenset(('torch.Tensor', *(
    f'torch.{name}' for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) or name.endswith('Storage')
), *(f'torch.storage.{name}' for name in ('TypedStorage', 'UntypedStorage'))))
OTHER_TENSORS = ('torch._utils._rebuild_', 'torch.serialization._get_layout')
PROTOCOL = 2
PICKLE_START = b'\x80'
BYTES_CODEC = 'latin1'  # in which bytes are written; some codecs take for ever
MARK = 'MARK'


class UnsafePickleError(UserError):
    """A pickle that is more than weights and plain data: reading it could run code."""


class _Object(NamedTuple):
    """How many objects one stands for, and in how many levels, as far as it does not change any more (tuples do not);
    its name, if it is a global or the codec; that of a pair is its second's.
    """

    objects: int
    name: str = ''
    depth: int = 1


def _functions() -> frozenset:
    """Names of all that may be called: also what the user has told torch to be safe."""
    told = (entry if isinstance(entry, tuple) else (entry, '') for entry in torch.serialization.get_safe_globals())
    return FUNCTIONS | {name or f'{entry.__module__}.{entry.__qualname__}' for entry, name in told}


def _check_name(name: str, functions: frozenset) -> None:
    if name in functions or name in NAMES:
        return
    if name.startswith(OTHER_TENSORS):
        kind = name.rpartition('._')[2].removeprefix('rebuild_')
        raise UserError(f'it holds tensors of another kind ({kind}); weights are dense tensors of real numbers')
    raise UnsafePickleError(f'it holds Python objects ({name}), not only weights, which could run code')


def _check_call(arguments: _Object, function: _Object, functions: frozenset) -> None:
    known = function.name in functions
    if not known or (function.name == '_codecs.encode' and arguments.name != BYTES_CODEC):
        raise UnsafePickleError(f'its pickle calls {function.name or "what is no function"}, which could run code')


def _popped(stack: List[Any], before: List[Any]) -> List[_Object]:
    """Take off the stack what an opcode takes off."""
    taken: List[_Object] = []
    if pickletools.markobject in before:
        while stack[-1] is not MARK:
            taken.append(stack.pop())
        stack.pop()
        before = before[:before.index(pickletools.markobject)]
    for _ in before:
        taken.append(stack.pop())
    return taken


def _scan(file: IO[bytes], functions: frozenset) -> None:
    """Follow a pickle without making what it says: only how many objects each object stands for, and names."""
    stack: List[Any] = []
    memo: Dict[int, _Object] = {}
    total, start = 0, file.tell()
    argument: Any
    for opcode, argument, position in pickletools.genops(file):
        total += 1
        if opcode.name not in OPCODES or (opcode.name == 'PROTO' and argument != PROTOCOL):
            raise UnsafePickleError(
                f'its pickle is not as torch.save writes it ({opcode.name} {argument}), which could run code')
        if opcode.name == 'MARK':
            stack.append(MARK)
        elif opcode.name == 'GLOBAL':
            name = argument.replace(' ', '.').replace('__builtin__.', 'builtins.')
            _check_name(name, functions)
            stack.append(_Object(1, name))
        elif opcode.name in ('BINPUT', 'LONG_BINPUT'):
            memo[argument] = stack[-1]
        elif opcode.name in ('BINGET', 'LONG_BINGET'):
            stack.append(memo[argument])
            total += stack[-1].objects
        elif opcode.name not in ('PROTO', 'STOP'):
            taken = _popped(stack, opcode.stack_before)
            if opcode.name in ('REDUCE', 'NEWOBJ'):
                _check_call(taken[0], taken[1], functions)
            name = argument if argument == BYTES_CODEC else taken[0].name if opcode.name == 'TUPLE2' else ''
            depth = 1 + max((part.depth for part in taken), default=0)
            if depth > MAX_DEPTH:
                raise UserError(f'its pickle is deeper than {MAX_DEPTH} levels')
            stack.append(_Object(1 + sum(part.objects for part in taken), name, depth))
        if total > MAX_OBJECTS or (position or 0) - start > MAX_BYTES:
            raise UserError(f'its pickle is more than {MAX_BYTES} bytes or {MAX_OBJECTS} objects')


def check_pickles(file: IO[bytes]) -> None:
    """Refuse a file of torch.save that is more than weights and plain data, before any of it is unpickled.

    Args:
        file: The file; it is at its start again afterwards.

    Raises:
        UnsafePickleError: If it names other things.
        UserError: If it would take any time or memory.
        Exception: Whatever a damaged file leads to.
    """
    functions = _functions()
    start = file.read(len(ZIP_START))
    is_zip = start == ZIP_START
    if not is_zip and start[:1] != PICKLE_START:
        raise ValueError('torch.save writes no such file')
    file.seek(0)
    if is_zip:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.filename.lower().endswith('/data.pkl'):
                    record.CRC = None  # type: ignore[assignment]  # a file may keep no sums
                    _scan(io.BytesIO(archive.read(record)), functions)
    else:
        for _ in range(LEGACY_PICKLES):
            _scan(file, functions)
    file.seek(0)
