"""What goes wrong in a command: one line and an exit code; what nobody foresaw with its traceback."""
import sys
import traceback
from typing import Any

import click

from ..core.errors import UserError, visible
from .output import print_json, say

__all__ = ['Command', 'Group']

DEFECT = 4
INTERRUPTED = 130  # as shells have it


def _exit_code_of(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    from ..core.verify import VerificationError  # they need torch, which is here by now
    from ..io.hub_errors import HUB_ERRORS

    for kinds, code in ((VerificationError, 1), (HUB_ERRORS, 3), ((UserError, OSError), 2)):
        if isinstance(error, kinds):
            return code
    return DEFECT


def _shown(text: str) -> str:
    from ..io.hub_errors import without_tokens

    return without_tokens(text)


class Group(click.Group):
    """Commands, and what click itself refuses in words that no terminal acts upon."""

    def invoke(self, context: click.Context) -> Any:
        """Run a command.

        Raises:
            click.ClickException: For wrong options and arguments.
        """
        try:
            return super().invoke(context)
        except click.ClickException as e:
            e.message = visible(e.message)  # type: ignore[misc]  # click declares it as final
            raise


class Command(click.Command):
    """A command whose errors are one line, in JSON too if it was asked for, and an exit code."""

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
            message, code = ' '.join(_shown(str(e)).split()), _exit_code_of(e)
            if code == DEFECT:
                say(_shown(traceback.format_exc()), err=True)
                message = f'{type(e).__name__}: {message}' if message else type(e).__name__
            if code == INTERRUPTED:
                message = 'interrupted'
            if context.params.get('as_json'):
                print_json(dict(ok=False, error=message), indent=None)
            failure = click.ClickException(visible(message))
            failure.exit_code = code  # type: ignore[misc]  # click declares it for classes
            raise failure from None
