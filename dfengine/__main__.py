"""`python -m dfengine` and the `dfengine` command."""

import atexit
import os
from typing import NoReturn

try:
    from dfengine import signals
except KeyboardInterrupt:  # Ctrl-C before there is what answers it
    os.write(2, b"dfengine: interrupted\n")
    os._exit(130)


def main(arguments: list[str] | None = None, last: bool = False) -> int:
    """Runs the command line, without `arguments` that of the process; returns the exit status.

    last: nothing but the end of the process comes after; signals no longer change the status then.
    """
    try:
        with signals.ending():
            from dfengine.cli import main as run

        return run(arguments, last)
    except KeyboardInterrupt:  # before there is what answers it, again
        return signals.say_ended(130)


def command() -> NoReturn:
    """Runs the command line of the process, which ends with its exit status."""
    atexit.register(signals.ignore_interrupts)  # the first to be registered, and so the last to be called
    signals.leave(main(last=True))


if __name__ == "__main__":
    command()
