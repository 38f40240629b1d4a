"""What signals do while a command is being imported; tests of the commands see to the rest."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from dfengine import cli, signals
from dfengine.__main__ import main

IMPORTING = """
import os, sys
from dfengine import signals
try:
    with signals.ending():
        os.kill(os.getpid(), int(sys.argv[1]))
except BaseException as error:  # as some extensions do with whatever is raised while they are imported
    raise ImportError("cannot be imported") from error
"""


@pytest.mark.parametrize("number, word", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_during_imports_ends_in_one_line(number, word):
    command = [sys.executable, "-c", IMPORTING, str(int(number))]
    done = subprocess.run(command, text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (128 + number, f"dfengine: {word}\n")


EARLY = """
import os, signal, sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "dfengine.signals":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
import dfengine.__main__
"""


def test_a_signal_before_there_is_what_answers_it_ends_in_one_line():
    done = subprocess.run([sys.executable, "-c", EARLY], text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "dfengine: interrupted\n")


def test_a_signal_between_the_imports_and_the_command_ends_in_one_line(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    assert main([]) == 130 and capsys.readouterr().err == "dfengine: interrupted\n"


def test_what_is_ignored_stays_ignored_and_other_threads_leave_signals_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.ending():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as under nohup
    finally:
        signal.signal(signal.SIGINT, before)
    seen = []

    def other():
        with signals.raising():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
