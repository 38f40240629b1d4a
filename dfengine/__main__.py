"""`python -m dfengine` and the `dfengine` command."""

import sys

try:
    from dfengine import signals
except KeyboardInterrupt:  # Ctrl-C before there is what answers it
    sys.stderr.write("dfengine: interrupted\n")
    sys.exit(130)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    try:
        with signals.ending():
            from dfengine.cli import main as run
        return run(arguments)
    except KeyboardInterrupt:  # between the two, which answer it themselves
        return signals.say_ended(130)


if __name__ == "__main__":
    sys.exit(main())
