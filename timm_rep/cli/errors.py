"""What goes wrong in a command: one line and an exit code; what nobody foresaw with its traceback."""
import json
import sys
import traceback
from typing import Any

import click

from ..core.errors import UserError

__all__ = ['Command']

DEFECT = 4
INTERRUPTED = 130  # as shells have it


def _exit_code_of(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    from ..core.verify import VerificationError  # they need torch, which is here by now
    from ..io.hub_errors import HubError

    for kinds, code in ((VerificationError, 1), ((UserError, OSError), 2), (HubError, 3)):
        if isinstance(error, kinds):
            return code
    return DEFECT


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
            message, code = ' '.join(str(e).split()) or 'interrupted', _exit_code_of(e)
            if code == DEFECT:
                traceback.print_exc()
                message = f'{type(e).__name__}: {message}'
            if context.params.get('as_json'):
                click.echo(json.dumps(dict(ok=False, error=message)))
            failure = click.ClickException(message)
            failure.exit_code = code  # type: ignore[misc]  # click declares it for classes
            raise failure from e
