"""What Ctrl-C and SIGTERM do to a command: one line, and the exit status 130 or 143.

Several within `BURST` are one, so that what the first makes a command keep is not cut short by the next.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import NoReturn

from dfengine.stderr import flush_output, print_error

NUMBERS = signal.SIGINT, signal.SIGTERM
WORDS = {128 + signal.SIGINT: "interrupted", 128 + signal.SIGTERM: "terminated"}
"""Exit status -> what is said."""


BURST = 1.0
"""Seconds after a signal in which others say no more than it."""
_answered: float | None = None
_own = False


def own_process() -> None:
    """Nothing runs in this process but the command: it may end by a signal at once, and `leave` is what follows.

    Python gives a signal that it answers back to the system as the process ends, which kills, but not one that is
    ignored: so both are, once threads and what is registered later with `atexit` have ended.
    """
    global _own
    _own = True

    def ignore() -> None:
        for number in NUMBERS:
            signal.signal(number, signal.SIG_IGN)

    atexit.register(ignore)


def counts() -> bool:
    """Whether the signal that just came is to be answered: not one of a burst.

    For handlers. One of another signal may run within it, where both came at once; then both may be answered.
    """
    global _answered
    now = time.monotonic()
    if _answered is not None and now - _answered < BURST:
        return False
    _answered = now
    return True


class Terminated(KeyboardInterrupt):
    """SIGTERM, where `raising` holds: what is cleaned up or kept for Ctrl-C is so for it too."""


_Handler = Callable[[int, FrameType | None], None]


def _handle(act: _Handler) -> dict[int, _Handler | int]:
    """SIGINT and SIGTERM are answered by `act`, where they are not ignored, as under nohup, or answered by other code
    than Python's, which could not be put back. Gives what answered them before."""
    numbers = [n for n in NUMBERS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, act) for number in numbers}


@contextmanager
def handling(act: _Handler, stays: bool = False) -> Iterator[None]:
    """For `with`: `_handle`, as if no signal was answered so far; then what was there before, unless `act` stays.
    Nothing in other threads than the main one, which alone may set handlers."""
    global _answered
    before = {}
    if threading.current_thread() is threading.main_thread():
        _answered = None
        before = _handle(act)
    try:
        yield
    finally:
        for number, former in {} if stays else before.items():
            signal.signal(number, former)


@contextmanager
def ending() -> Iterator[None]:
    """For `with`: the signals end the process at once, where it is the command's own. For imports, which make of an
    exception in their midst an error of their own, or a traceback, and have nothing to lose.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        if counts():
            try:
                os.write(2, f"dfengine: {WORDS[128 + number]}\n".encode())
            finally:  # standard error may be closed
                os._exit(128 + number)

    with handling(end) if _own else nullcontext():
        yield


@contextmanager
def raising() -> Iterator[Callable[[], int]]:
    """For `with`: SIGINT raises KeyboardInterrupt and SIGTERM `Terminated`. Gives a function: the exit status of the
    last signal, 130 or 143.

    In a process of the command's own, the signals do nothing between the block and `leave`.
    """
    status, over = 128 + signal.SIGINT, False

    def raise_it(number: int, _frame: FrameType | None) -> None:
        nonlocal status
        if not over and counts():
            status = 128 + number
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    with handling(raise_it, stays=_own):
        try:
            yield lambda: status
        finally:
            over = _own


def leave(status: int) -> NoReturn:
    """Ends the process with the exit status of what it did. A signal that is not of a burst only makes the end come
    sooner, as where a thread does not end."""

    def end(_number: int, _frame: FrameType | None) -> None:
        if counts():
            os._exit(status)

    _handle(end)
    flush_output()  # of a command that was interrupted; the others' is out
    sys.exit(status)


def say_ended(status: int) -> int:
    """Prints why a signal's exit status it is, and returns it."""
    print_error(WORDS[status])
    return status
