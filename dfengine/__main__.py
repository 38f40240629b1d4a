"""`python -m dfengine` is the `dfengine` command."""

import sys

from dfengine.cli import main

if __name__ == "__main__":
    sys.exit(main())
