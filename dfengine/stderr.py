"""Lines on standard error, and the end of standard output. Their reader may leave early (`2>&1 | head`): training and
detection go on without it."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO


def discard(stream: TextIO) -> None:
    """What is written to `stream` from now on, and what it still holds, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def flush_output() -> None:
    """Standard output is out, or nobody reads it. What else fails Python tries again, and says, as it ends."""
    try:
        if sys.stdout is not None:  # closed from the start
            sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
    except (OSError, ValueError):  # a full disk; closed since
        pass


def print_error(text: str) -> None:
    """One line on what was refused or failed, where there is somebody to read it."""
    if sys.stderr is None:  # closed from the start
        return
    try:
        print(f"dfengine: {text}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        discard(sys.stderr)
    except OSError:  # a full disk, a descriptor that cannot be written
        pass


class WarningLines(logging.Handler):
    """Prints what is logged as warnings, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print_error(f"warning: {record.getMessage()}")
        except Exception:  # as every handler of logging
            self.handleError(record)
