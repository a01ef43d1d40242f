"""One run at a time in an output folder: a lock that the kernel takes back when the process dies, however it does."""
import logging
import sys
from pathlib import Path
from typing import Any, Optional

from timm.utils.distributed import is_distributed_env, world_info_from_env

from ..core.errors import UserError
from ..io.output import clear_left_behind

if sys.platform == 'win32':
    import msvcrt
else:
    import fcntl

__all__ = ['RunLock', 'processes']

_logger = logging.getLogger('train')  # timm's

LOCK_FILE = '.lock'


def processes() -> int:
    """How many processes train together, as timm sees it."""
    return int(world_info_from_env()[2]) if is_distributed_env() else 1


def _is_first() -> bool:
    """Whether this is the one of them that writes."""
    return processes() == 1 or world_info_from_env()[1] == 0


def _lock(file: Any) -> None:
    if sys.platform == 'win32':
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        # not flock: workers that were forked would hold it for a while after this process is killed
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class RunLock:
    """Holds one folder for the process that writes to it, until it is released. Readers do not ask for it."""

    def __init__(self) -> None:
        self._file: Optional[Any] = None

    def take(self, folder: Path, *, make: bool = True) -> None:
        """Lock a folder, unless one is held already, or another of the processes that train together does so.

        Half-written files of a run that was killed are removed.

        Args:
            folder: The output folder of a run.
            make: Make the folder, and the file in it that is locked. Else a folder that no run has locked is left as
                it is.

        Raises:
            UserError: If another run has locked it, or it cannot be written to.
        """
        path = folder / LOCK_FILE
        if self._file is not None or not _is_first() or not (make or path.is_file()):
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open('a')
        except OSError as e:
            raise UserError(f'the output folder {folder} cannot be written to: {e}') from e
        try:
            _lock(self._file)
        except (BlockingIOError, PermissionError):
            self.release()
            raise UserError(
                f'another run is at work in {folder}; wait for its end, or take another --experiment') from None
        except OSError as e:
            _logger.warning(f'{folder} is on a file system without locks ({e}): let no second run write to it')
        else:
            clear_left_behind(folder)

    def release(self) -> None:
        """Give the folder free."""
        if self._file is not None:
            self._file.close()
            self._file = None
