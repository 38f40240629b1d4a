"""`python -m dfengine` and the `dfengine` command."""

import os
import sys

try:
    from dfengine import signals
except KeyboardInterrupt:  # Ctrl-C before there is what answers it
    os.write(2, b"dfengine: interrupted\n")
    os._exit(130)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line, without `arguments` that of the process, which ends then; returns the exit status."""
    try:
        with signals.ending(last=arguments is None):
            from dfengine.cli import main as run

            return run(arguments)
    except KeyboardInterrupt:  # before there is what answers it, again
        return signals.say_ended(130)


if __name__ == "__main__":
    sys.exit(main())
