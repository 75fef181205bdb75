"""Errors that mean something to the command line: what the user can mend (code 2), a run that was told to end (143)."""


class UserError(ValueError):
    """A mistake in input, configuration or environment.

    The message is one line: what is wrong, where (file, row, field), and what to do about it.
    """


class MissingError(UserError, FileNotFoundError):
    """Something the user named does not exist; the message says where it was looked for."""


class StoppedError(Exception):
    """The run was told to end before its end, and did so in good order; its message says how to go on."""
