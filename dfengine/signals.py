"""What Ctrl-C and SIGTERM do to a command: one line, and the exit status 130 or 143.

Several within `BURST` are one, so that what the first makes a command keep is not cut short by the next.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from dfengine.stderr import flush_output, print_error

WORDS = {128 + signal.SIGINT: "interrupted", 128 + signal.SIGTERM: "terminated"}
"""Exit status -> what is said."""


BURST = 1.0
"""Seconds after a signal in which others say no more than it."""
_answered: float | None = None


def begin() -> None:
    """No signal was answered so far."""
    global _answered
    _answered = None


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


def _in_main_thread() -> bool:
    """It alone may set handlers."""
    return threading.current_thread() is threading.main_thread()


def _handle(act: _Handler) -> dict[int, _Handler | int | None]:
    """SIGINT and SIGTERM are answered by `act`, where they are not ignored. Gives what answered them before."""
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, act) for number in numbers}


@contextmanager
def _handling(act: _Handler, stays: bool = False) -> Iterator[None]:
    """For `with`: `_handle`, in the main thread; then what was there before, unless `act` stays."""
    before = _handle(act) if _in_main_thread() else {}
    try:
        yield
    finally:
        for number, former in {} if stays else before.items():
            signal.signal(number, former)


@contextmanager
def ending() -> Iterator[None]:
    """For `with`: the signals end the process at once. For imports, which make of an exception in their midst an error
    of their own, or a traceback, and have nothing to lose.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        if counts():
            os.write(2, f"dfengine: {WORDS[128 + number]}\n".encode())
            os._exit(128 + number)

    with _handling(end):
        yield


@contextmanager
def raising(last: bool = False) -> Iterator[Callable[[], int]]:
    """For `with`: SIGINT raises KeyboardInterrupt and SIGTERM `Terminated`. Gives a function: the exit status of the
    last signal, 130 or 143.

    last: the process is about to `leave` after the block, and until it does the signals do nothing.
    """
    status, over = 128 + signal.SIGINT, False

    def raise_it(number: int, _frame: FrameType | None) -> None:
        nonlocal status
        if not over and counts():
            status = 128 + number
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    if _in_main_thread():
        begin()
    with _handling(raise_it, stays=last):
        try:
            yield lambda: status
        finally:
            over = last


def leave(status: int) -> NoReturn:
    """Ends the process with the exit status of what it did. A signal that is not of a burst only makes the end come
    sooner, as where a thread does not end."""

    def end(_number: int, _frame: FrameType | None) -> None:
        if counts():
            os._exit(status)

    _handle(end)
    flush_output()  # of a command that was interrupted; the others' is out
    sys.exit(status)


def ignore_interrupts() -> None:
    """For the last that is called at the end of the process: Python gives a signal that it answers back to the system
    then, which kills, but not one that is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def say_ended(status: int) -> int:
    """Prints why a signal's exit status it is, and returns it."""
    print_error(WORDS[status])
    return status
