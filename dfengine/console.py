"""Where commands print."""

from __future__ import annotations

from rich.console import Console

from dfengine.stderr import discard


class OutputConsole(Console):
    """A console whose reader may leave early (`| head`): the command goes on and says nothing more there."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        discard(self.file)
