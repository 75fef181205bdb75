"""The one error that means "the user can mend this"; the command line prints it as one line and exits with code 2."""


class UserError(ValueError):
    """A mistake in input, configuration or environment.

    The message is one line: what is wrong, where (file, row, field), and what to do about it.
    """


class MissingError(UserError, FileNotFoundError):
    """Something the user named does not exist; the message says where it was looked for."""
