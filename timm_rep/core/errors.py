"""What the package raises where its user can mend it."""

__all__ = ['UserError']


class UserError(ValueError):
    """Something that the user gave or asked for cannot be used; the message says what came and what is allowed.

    Every other exception of this package, but an ``OSError`` of a path that the user named and a failure of the Hub,
    is a defect of its own.
    """
