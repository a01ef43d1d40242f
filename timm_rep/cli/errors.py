"""What goes wrong in a command: one line and an exit code; a defect of ours with its traceback."""
import errno
import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Iterable, Iterator, Type

import click

from ..core.errors import UserError

__all__ = ['Command', 'ScriptCommand']

_logger = logging.getLogger(__name__)

FILE_ERRORS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
# Of the disk, whatever file is being written.
DISK_ERRORS = (errno.ENOSPC, errno.EROFS, getattr(errno, 'EDQUOT', errno.ENOSPC))


class Mismatch(click.ClickException):
    """Two forms of a model do not compute the same."""

    exit_code = 1


class WrongInput(click.ClickException):
    """Something that the user can mend."""

    exit_code = 2  # click's own too


class HubFailed(click.ClickException):
    """The Hub could not be reached, or refused."""

    exit_code = 3


class Defect(click.ClickException):
    """Everything else."""

    exit_code = 4


class Interrupted(click.ClickException):
    """By the keyboard."""

    exit_code = 130  # as shells have it


def _paths_in(value: Any) -> Iterator[Path]:
    """What may be a path in the values of a command's parameters, also behind the = of --option=PATH."""
    if isinstance(value, (str, Path)):
        yield Path(os.path.abspath(os.path.expanduser(str(value).rpartition('=')[2])))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _paths_in(item)


def _is_of_a_named_path(error: OSError, values: Iterable[Any]) -> bool:
    """Whether a file could not be read or written that the user named, or that is in, around or beside one that was.

    Errors without a file name are worded by the library, about what the user gave; but for those of connections.
    """
    if error.errno in DISK_ERRORS:
        return True
    if error.filename is None:
        return error.errno is None and (isinstance(error, FILE_ERRORS) or type(error) is OSError)
    if not isinstance(error.filename, (str, os.PathLike)):
        return False
    path = Path(os.path.abspath(error.filename))
    for named in _paths_in(list(values)):
        around = path in named.parents
        beside = any(
            place.parent == named.parent and (place == path or named.name in place.name)
            for place in (path, *path.parents))
        if around or beside:
            return True
    return Path.cwd() in path.parents  # where outputs without a name go


def _failure_of(error: BaseException, values: Iterable[Any]) -> Type[click.ClickException]:
    if isinstance(error, KeyboardInterrupt):
        return Interrupted
    if isinstance(error, UserError) or (isinstance(error, OSError) and _is_of_a_named_path(error, values)):
        return WrongInput
    from ..core.verify import VerificationError  # they need torch, which is here by now
    from ..io.hub_errors import HubError

    if isinstance(error, VerificationError):
        return Mismatch
    return HubFailed if isinstance(error, HubError) else Defect


class Command(click.Command):
    """A command whose errors are one line, in JSON too if it was asked for, and an exit code.

    Attributes:
        is_ours: Whether an error that nobody foresaw is a defect of ours; else it passes as it is.
    """

    is_ours = True

    def invoke(self, context: click.Context) -> Any:
        """Run the command.

        Raises:
            click.ClickException: For whatever the library raised.
        """
        try:
            return super().invoke(context)
        except SystemExit:
            sys.stdout.flush()  # finds out if nobody reads what was printed, while click can still take it
            raise
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own business
        except (Exception, KeyboardInterrupt) as e:
            failure = _failure_of(e, context.params.values())
            if failure is Defect and not self.is_ours:
                raise
            message = 'interrupted' if failure is Interrupted else ' '.join(str(e).split())
            if failure is Defect:
                traceback.print_exc()
                message = f'{type(e).__name__}: {message}'
            _logger.debug('traceback of the error', exc_info=True)
            if context.params.get('as_json'):
                click.echo(json.dumps(dict(ok=False, error=message)))
            raise failure(message) from e


class ScriptCommand(Command):
    """A command that runs a script of others."""

    is_ours = False
