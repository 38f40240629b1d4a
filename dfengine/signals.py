"""What Ctrl-C and SIGTERM do to a command: one line, and the exit status 130 or 143."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dfengine.stderr import print_error

WORDS = {128 + signal.SIGINT: "interrupted", 128 + signal.SIGTERM: "terminated"}
"""Exit status -> what is said."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, where `raising` holds: what is cleaned up or kept for Ctrl-C is so for it too."""


@contextmanager
def _handling(handlers: dict[int, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """For `with`: these handlers, in the main thread, which alone may set them, and of signals that are not ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: act for number, act in handlers.items() if signal.getsignal(number) is not signal.SIG_IGN}
    before = {number: signal.signal(number, act) for number, act in handlers.items()}
    try:
        yield
    finally:
        for number, act in before.items():
            signal.signal(number, act)


@contextmanager
def ending() -> Iterator[None]:
    """For `with`: the signals end the process at once. For imports, which make of an exception in their midst an error
    of their own, or a traceback, and have nothing to lose."""

    def end(number: int, _frame: FrameType | None) -> None:
        os.write(2, f"dfengine: {WORDS[128 + number]}\n".encode())
        os._exit(128 + number)

    with _handling({signal.SIGINT: end, signal.SIGTERM: end}):
        yield


@contextmanager
def raising() -> Iterator[Callable[[], int]]:
    """For `with`: SIGTERM raises `Terminated`. Gives a function: the exit status of the last signal, 130 or 143."""
    status = 128 + signal.SIGINT

    def raise_it(_number: int, _frame: FrameType | None) -> None:
        nonlocal status
        status = 128 + signal.SIGTERM
        raise Terminated

    with _handling({signal.SIGTERM: raise_it}):
        yield lambda: status


def say_ended(status: int) -> int:
    """Prints why a signal's exit status it is, and returns it."""
    print_error(WORDS[status])
    return status
