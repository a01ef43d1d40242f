"""Damage in files of weights, found before anything in them is used."""
import json
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Iterable, Mapping

from ..core.errors import UserError

__all__ = ['CHECKSUM', 'ZIP_START', 'check_records', 'check_sum', 'checksum']

CHECKSUM = 'crc32'  # in the metadata of safetensors files of ours

ZIP_START = b'PK\x03\x04'  # by which torch.load tells what torch.save writes today from its older format
# The records with which a zip file ends: of large ones, where that is, and of all.
END_64, LOCATOR, END = struct.Struct('<4sQ2H2L4Q'), struct.Struct('<4sLQL'), struct.Struct('<4s4H2LH')
FOLDER_FLAG = 0x10  # of MS-DOS, in the attributes of a record


def _check_end(file: BinaryIO, size: int) -> None:
    """Refuse a zip file that ends otherwise than torch.save writes it: two readers may find two directories in it."""
    end = size - END.size
    file.seek(end - LOCATOR.size)
    mark, _, end_64, _ = LOCATOR.unpack(file.read(LOCATOR.size))
    end_mark, *_, length, offset, comment = END.unpack(file.read(END.size))
    whole = end_mark == b'PK\5\6' and not comment
    if mark == b'PK\6\7':
        end -= LOCATOR.size + END_64.size
        file.seek(end)
        mark, *_, length, offset = END_64.unpack(file.read(END_64.size))
        whole = whole and mark == b'PK\6\6' and end_64 == end
    if not whole or offset + length != end:
        raise UserError('its directory is damaged')


def check_records(file: BinaryIO) -> None:
    """Compare the records of a file of ``torch.save`` with the sums that it keeps of them, which torch.load does not.

    Compressed records are refused, which torch.save does not write: they may take many times the file's size. Files of
    torch's older format keep no sums, nor do those that were told not to, and pass.

    Args:
        file: The file; it is at its start again afterwards.

    Raises:
        UserError: If a record is damaged or compressed.
        zipfile.BadZipFile: If what is around the records is damaged. Such damage raises other exceptions as well.
    """
    is_zip = file.read(len(ZIP_START)) == ZIP_START
    size = file.seek(0, 2)
    if is_zip:
        _check_end(file, size)
        with zipfile.ZipFile(file) as records:
            entries = records.infolist()
            names = {record.orig_filename.lower() for record in entries}
            if len(names) < len(entries):
                raise UserError('two of its records have one name')
            unpacked = sum(record.file_size for record in entries)
            if unpacked > size:
                raise UserError(f'its records take {unpacked} bytes, more than the file')
            # torch leaves the memory of a tensor as it is, if its record says that it is a folder
            folders = [record.filename for record in entries if record.is_dir() or record.external_attr & FOLDER_FLAG]
            if folders:
                raise UserError(f'its record {folders[0]} is damaged: it is marked as a folder')
            without_sums = not any(record.CRC for record in entries)  # torch can be told so
            damaged = None if without_sums else records.testzip()
            if damaged is not None:
                raise UserError(f'its record {damaged} is damaged')
    file.seek(0)


def checksum(header: Mapping[str, Any], numbers: Iterable[bytes]) -> str:
    """Sum of a safetensors file by which damage is told, over all but itself.

    Args:
        header: Header of the file, as its JSON says.
        numbers: What follows.

    Returns:
        What its metadata hold under :data:`CHECKSUM`.
    """
    metadata = {key: value for key, value in header['__metadata__'].items() if key != CHECKSUM}
    total = zlib.crc32(json.dumps({**header, '__metadata__': metadata}, sort_keys=True).encode())
    for chunk in numbers:
        total = zlib.crc32(chunk, total)
    return f'{total:08x}'


def check_sum(path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse a safetensors file of ours that is no longer what was written.

    Args:
        path: The file.
        metadata: What its header says; without :data:`CHECKSUM` the file passes.

    Raises:
        UserError: If it is damaged.
    """
    if CHECKSUM not in metadata:
        return
    with path.open('rb') as file:
        header = json.loads(file.read(struct.unpack('<Q', file.read(8))[0]))
        if checksum(header, iter(lambda: file.read(2 ** 24), b'')) != metadata[CHECKSUM]:
            raise UserError('it is damaged: it does not hold what was written')
