"""What may go wrong on the way from a file to a file, each with the code that the command ends by."""

from __future__ import annotations

from diveq_core.commands.terminal import UsageError


class DataError(UsageError):
    """An option or a file that cannot be used as asked for."""

    code = 2


class RunError(DataError):
    """What failed although all that was asked for was right: a full disk, a file that went away."""

    code = 1


class NotFiniteError(DataError):
    """A vector with NaN or infinity, which no token stands for."""

    code = 3


INTERRUPTED = 130
"""The code of a command that Ctrl-C ended, as shells have it."""
