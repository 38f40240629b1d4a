"""`python -m dfengine` and the `dfengine` command."""

import os
import sys
from typing import NoReturn

try:
    from dfengine import signals
except KeyboardInterrupt:  # Ctrl-C before there is what answers it
    try:
        os.write(2, b"dfengine: interrupted\n")
    finally:
        os._exit(130)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line, without `arguments` that of the process; returns the exit status."""
    try:
        with signals.ending():
            from dfengine.cli import main as run

        return run(arguments)
    except KeyboardInterrupt:  # before there is what answers it, again
        return signals.say_ended(130)


def command() -> NoReturn:
    """Runs the command line of the process, which ends with its exit status: 1 after an error nobody foresaw."""
    signals.own_process()
    try:
        status = main()
    except KeyboardInterrupt:  # between two places that answer it
        status = signals.say_ended(130)
    except Exception:
        sys.excepthook(*sys.exc_info())
        status = 1
    signals.leave(status)


if __name__ == "__main__":
    command()
