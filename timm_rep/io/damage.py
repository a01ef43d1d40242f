"""Damage in checkpoint files, found before anything in them is used."""
import zipfile
from typing import BinaryIO

from ..core.errors import UserError

__all__ = ['ZIP_START', 'check_records']

ZIP_START = b'PK\x03\x04'  # by which torch.load tells what torch.save writes today from its older format
FOLDER_FLAG = 0x10  # of MS-DOS, in the attributes of a record


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
        with zipfile.ZipFile(file) as records:
            entries = records.infolist()
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
