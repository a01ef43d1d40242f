"""What the client of the Hub raises, in words, and without any token."""
import re
from contextlib import contextmanager
from typing import Iterator, Optional

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, LocalTokenNotFoundError

__all__ = ['HubError', 'hub_errors', 'hub_message']

TOKEN = re.compile(r'\bhf_\w{4,}')


class HubError(RuntimeError):
    """The Hub could not be reached, or refused."""


def _root_cause(error: BaseException) -> BaseException:
    """The error that says most of those that led to one: the Hub's answer, else the first of all."""
    while error.__cause__ is not None and (
            isinstance(error, LocalEntryNotFoundError) or not isinstance(error, HfHubHTTPError)):
        error = error.__cause__
    return error


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
    message = ' '.join(str(cause).split())
    for secret in (token, huggingface_hub.get_token()):
        if secret:
            message = message.replace(secret, '***')
    message = TOKEN.sub('***', message)
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
    """
    try:
        yield
    except LocalEntryNotFoundError as e:
        raise HubError(f'{what} is not in the cache, and cannot be fetched: {hub_message(e)}') from None
    except (FileNotFoundError, ValueError, HubError):
        raise
    except Exception as e:  # those of the HTTP library of huggingface_hub, which is not always the same one
        raise HubError(f'{what} cannot be fetched: {hub_message(e)}') from None
