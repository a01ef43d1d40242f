"""What the client of the Hub raises, in words, and without any token."""
import re
from contextlib import contextmanager
from typing import Iterator, Optional

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, LocalTokenNotFoundError

__all__ = ['HubError', 'hub_errors', 'reason']

TOKEN = re.compile(r'\bhf_\w{4,}')


class HubError(RuntimeError):
    """The Hub could not be reached, or refused."""


def reason(error: BaseException, token: Optional[str] = None) -> str:
    """Say what went wrong on the Hub.

    Args:
        error: What huggingface_hub raised; its causes are looked at too.
        token: Access token in use, if it was given; it and all that looks like one is left out.

    Returns:
        One line.
    """
    found = error
    while found.__cause__ is not None and (
            isinstance(found, LocalEntryNotFoundError) or not isinstance(found, HfHubHTTPError)):
        found = found.__cause__
    status = getattr(getattr(found, 'response', None), 'status_code', None)
    message = ' '.join(str(found).split())
    for secret in (token, huggingface_hub.get_token()):
        if secret:
            message = message.replace(secret, '***')
    message = TOKEN.sub('***', message)
    if status == 401 or isinstance(found, LocalTokenNotFoundError):
        return f'not logged in, or the token is not valid: run `hf auth login` or set HF_TOKEN ({message})'
    if status == 403:
        return f'the token may not do that ({message})'
    if status in (409, 412):
        return f'it was changed by somebody else in between, try again ({message})'
    return f'{type(found).__name__}: {message}'


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
        raise HubError(f'{what} is not in the cache, and cannot be fetched: {reason(e)}') from None
    except (FileNotFoundError, ValueError, HubError):
        raise
    except Exception as e:  # those of the HTTP library of huggingface_hub, which is not always the same one
        raise HubError(f'{what} cannot be fetched: {reason(e)}') from None
