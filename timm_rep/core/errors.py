"""What the package raises where its user can mend it, and its words as a terminal may show them."""
import re

__all__ = ['UserError', 'visible']

# What a terminal would act upon, or could not show: control characters but tab and newline, those that turn the
# direction of text, and bytes of file names that are no text.
UNSEEN = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]')


class UserError(ValueError):
    """Something that the user gave or asked for cannot be used; the message says what came and what is allowed.

    Every other exception of this package, but an ``OSError`` of a path that the user named and a failure of the Hub,
    is a defect of its own.
    """


def visible(text: str) -> str:
    r"""A text with names of files and of what they hold, as a terminal may show it: ``\x1b`` for an escape.

    Args:
        text: Any text.

    Returns:
        The text with such characters spelt out.
    """
    return UNSEEN.sub(lambda match: repr(match[0])[1:-1], text)
