"""`python -m dfengine` and the `dfengine` command."""

import sys

from dfengine import signals


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    with signals.ending():
        from dfengine.cli import main as run
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
