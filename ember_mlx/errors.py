"""The one exception that stands for bad input."""


class InputError(ValueError):
    """Something the caller gave cannot be used: the message says what, what is allowed, and what to do.

    The command line prints it as one line and exits with code 2.
    """
