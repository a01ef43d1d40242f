"""What the client of the Hub raises, in words, and without any token."""
import base64
import html
import json
import logging
import re
from contextlib import contextmanager
from typing import Iterator, Optional, Set
from urllib.parse import quote, quote_plus

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from ..core.errors import UserError

__all__ = ['HUB_ERRORS', 'HubError', 'hide_tokens_in_logs', 'hub_errors', 'hub_message', 'without_tokens']

# What looks like a token, as it is or in base64, and whatever is sent to log in.
TOKEN = re.compile(
    r'hf_[a-z0-9]{8,}|aGZf[\w+/-]{8,}=*|(?<=bearer )\S{8,}|(?<=authorization: basic )\S{8,}', re.IGNORECASE)
HIDDEN = '***'
SHORTEST = 4  # of a part of a token by which it is known
LONGEST_MESSAGE = 1000


class HubError(RuntimeError):
    """The Hub could not be reached, or refused."""


# Of the Hub, wherever they come from; most are OSErrors, some are ValueErrors.
HUB_ERRORS = (HubError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)


def _root_cause(error: BaseException) -> BaseException:
    """The error that says most of those that led to one: the Hub's answer, else the first of all."""
    while error.__cause__ is not None and (
            isinstance(error, LocalEntryNotFoundError) or not isinstance(error, HfHubHTTPError)):
        error = error.__cause__
    return error


def _forms(secret: str) -> Set[str]:
    """A secret as it may be sent back: quoted, and in base64, wherever in the encoded text it stands."""
    data = secret.encode()
    forms = {
        secret, quote(secret, safe=''), quote_plus(secret), ''.join(f'%{byte:02x}' for byte in data), data.hex(),
        html.escape(secret), json.dumps(secret)[1:-1], secret[::-1],
    }
    for offset in range(3):
        # digits that hold nothing of what is before or behind
        digits = base64.b64encode(bytes(offset) + data).decode().rstrip('=')
        whole = digits[-(-8 * offset // 6):8 * (offset + len(data)) // 6]
        forms |= {whole, whole.translate(str.maketrans('+/', '-_'))}
    return {form for form in forms if len(form) >= SHORTEST}


def without_tokens(text: str, token: Optional[str] = None) -> str:
    """A text that may be shown, whatever a server wrote into it.

    Args:
        text: Any text.
        token: Access token in use, if it was given.

    Returns:
        The text without it, without the one of the environment, and without all that looks like one.
    """
    for secret in (token, huggingface_hub.get_token()):
        if secret:
            for form in sorted(_forms(secret), key=len, reverse=True):
                text = re.sub(re.escape(form), HIDDEN, text, flags=re.IGNORECASE)
    return TOKEN.sub(HIDDEN, text)


class _WithoutTokens(logging.Filter):
    """Keeps tokens out of what huggingface_hub logs: also warnings of the server's."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_tokens(record.getMessage()), ()
        return True


WITHOUT_TOKENS = _WithoutTokens()


def hide_tokens_in_logs() -> None:
    """Keep tokens out of what huggingface_hub logs from now on."""
    for handler in logging.getLogger('huggingface_hub').handlers:
        handler.addFilter(WITHOUT_TOKENS)  # once


def hub_message(error: BaseException, token: Optional[str] = None) -> str:
    """Say what went wrong on the Hub, and what to do about it.

    Args:
        error: What huggingface_hub raised; its causes are looked at too.
        token: Access token in use, if it was given; it and all that looks like one is left out.

    Returns:
        One line.
    """
    cause = _root_cause(error)
    status = getattr(getattr(cause, 'response', None), 'status_code', None)
    message = without_tokens(' '.join(str(cause).split()), token)[:LONGEST_MESSAGE]
    if status == 401 or isinstance(cause, LocalTokenNotFoundError):
        return f'not logged in, or the token is not valid: run `hf auth login` or set HF_TOKEN ({message})'
    if status == 403:
        return f'the token may not do that ({message})'
    if status in (409, 412):
        return f'it was changed by somebody else in between ({message})'
    return f'{type(cause).__name__}: {message}'


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn what fetching raises into one kind of error; wrong input keeps its own.

    Args:
        what: What is fetched, for the message.

    Raises:
        HubError: If the Hub cannot be reached, or refuses.
        UserError: If that can be no name of a repository.
    """
    hide_tokens_in_logs()
    try:
        yield
    except LocalEntryNotFoundError as e:
        raise HubError(f'{what} is not in the cache, and cannot be fetched: {hub_message(e)}') from None
    except HFValidationError as e:
        raise UserError(f'{what!r} is no name of a repository: {e}') from None
    except HubError:
        raise
    except Exception as e:  # those of the HTTP library of huggingface_hub, which is not always the same one
        if isinstance(e, (FileNotFoundError, ValueError)) and not isinstance(e, (*HUB_ERRORS, json.JSONDecodeError)):
            raise
        raise HubError(f'{what} cannot be fetched: {hub_message(e)}') from None
