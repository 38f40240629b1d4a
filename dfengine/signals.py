"""What Ctrl-C and SIGTERM do to a command: one line, and the exit status 130 or 143.

Several within `BURST` are one, so that what the first makes a command keep is not cut short by the next.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dfengine.stderr import print_error

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
    """Whether the signal that just came is to be answered: not one of a burst. For handlers, which run one by one."""
    global _answered
    now = time.monotonic()
    if _answered is not None and now - _answered < BURST:
        return False
    _answered = now
    return True


class Terminated(KeyboardInterrupt):
    """SIGTERM, where `raising` holds: what is cleaned up or kept for Ctrl-C is so for it too."""


_Handler = Callable[[int, FrameType | None], None]


@contextmanager
def _handling(handlers: dict[int, _Handler], after: dict[int, signal.Handlers] | None = None) -> Iterator[None]:
    """For `with`: these handlers, in the main thread, which alone may set them, and of signals that are not ignored.
    Then come `after`, or those that were there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: act for number, act in handlers.items() if signal.getsignal(number) is not signal.SIG_IGN}
    before = {number: signal.signal(number, act) for number, act in handlers.items()}
    try:
        yield
    finally:
        for number, act in (before | (after or {})).items():
            signal.signal(number, act)


@contextmanager
def ending(last: bool = False) -> Iterator[None]:
    """For `with`: the signals end the process at once. For imports, which make of an exception in their midst an error
    of their own, or a traceback, and have nothing to lose.

    last: the process ends after the block, and SIGINT no longer interrupts that.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        if counts():
            os.write(2, f"dfengine: {WORDS[128 + number]}\n".encode())
            os._exit(128 + number)

    # Ignored, not answered: at its end Python gives a signal that it answers back to the system, which kills.
    after = {signal.SIGINT: signal.SIG_IGN} if last else {}
    with _handling({signal.SIGINT: end, signal.SIGTERM: end}, after):
        yield


@contextmanager
def raising() -> Iterator[Callable[[], int]]:
    """For `with`: SIGINT raises KeyboardInterrupt and SIGTERM `Terminated`. Gives a function: the exit status of the
    last signal, 130 or 143."""
    status = 128 + signal.SIGINT

    def raise_it(number: int, _frame: FrameType | None) -> None:
        nonlocal status
        if counts():
            status = 128 + number
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    begin()
    with _handling({signal.SIGINT: raise_it, signal.SIGTERM: raise_it}):
        yield lambda: status


def say_ended(status: int) -> int:
    """Prints why a signal's exit status it is, and returns it."""
    print_error(WORDS[status])
    return status
