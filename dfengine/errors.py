"""Errors that a user can cause. The CLI prints them as one line, never as a traceback (DESIGN, "Bad input")."""

from __future__ import annotations


class DfengineError(Exception):
    """A mistake in the input or its surroundings: the message is one line that names the file and the reason.

    `exit_code` is the process status when the error ends a command: 1 = nothing could be done, 2 = wrong usage.
    """

    exit_code = 1


class UsageError(DfengineError, ValueError):
    """Options that contradict each other or are out of range, and an output that names what is there and no place for
    it."""

    exit_code = 2


class ArgumentTypeError(UsageError, TypeError):
    """An argument of a type that means nothing there."""


class ConfigError(DfengineError):
    """A model or training configuration that cannot be built."""

    exit_code = 2


class ImageError(DfengineError):
    """An image that is refused. `name` says which one, `reason` why; `str(error)` is "name: reason"."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.name, self.reason)


class DataError(DfengineError):
    """A data folder that cannot be used: missing, empty, or without a usable image."""


class CheckpointError(DfengineError):
    """A checkpoint that is damaged, foreign, of another version, or does not fit its own configuration."""
