"""Where commands print, and what happens when nobody reads it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from dfengine.console import OutputConsole
console = OutputConsole(file=getattr(sys, sys.argv[1]))
for number in range(20000):
    console.print(number)
open(sys.argv[2], "w").write("done")
"""

ERRORS = """
import logging, sys
from dfengine.stderr import WarningLines, print_error
logging.getLogger("dfengine").addHandler(WarningLines())
for number in range(20000):
    print_error(str(number))
    logging.getLogger("dfengine").warning("%s again", number)
open(sys.argv[1], "w").write("done")
"""


def test_a_command_whose_warnings_nobody_reads_goes_on(tmp_path):
    done = tmp_path / "done"
    process = subprocess.Popen([sys.executable, "-c", ERRORS, str(done)], stderr=subprocess.PIPE, text=True)
    assert [process.stderr.readline() for _ in range(2)] == ["dfengine: 0\n", "dfengine: warning: 0 again\n"]
    process.stderr.close()
    assert process.wait(60) == 0
    assert done.read_text() == "done"


def test_a_command_whose_output_nobody_reads_goes_on(tmp_path):
    for name in ("stdout", "stderr"):
        done = tmp_path / name
        pipe = {name: subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, name, str(done)], **pipe)
        getattr(process, name).readline()
        getattr(process, name).close()
        assert process.wait(60) == 0
        assert done.read_text() == "done"
