"""Errors that a person can act on."""


class UserError(Exception):
    """Something outside Tandem is wrong: a path, a row, a key, a reward function.

    The message is one line that says what was wrong, where (file, line, key or sample) and what to do.
    The command line prints it without a traceback and exits with code 2.
    """


class NonFiniteError(UserError):
    """A loss or a gradient is not finite. Raised before any parameter is touched by it."""
