"""Where commands print."""

from __future__ import annotations

import os

from rich.console import Console


class OutputConsole(Console):
    """A console whose reader may leave early (`| head`): the command goes on and says nothing more there."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)
