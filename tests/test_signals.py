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
signals.own_process()
if sys.argv[2:]:
    os.close(2)
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
    done = subprocess.run([*command, "closed"], text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (128 + number, "")  # nobody can be told


EARLY = """
import os, signal, sys
if sys.argv[1:]:
    os.close(2)

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
    done = subprocess.run([sys.executable, "-c", EARLY, "closed"], text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")


HOST = """
import os, signal, sys
from dfengine import __main__, cli

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "dfengine.commands.roofline":
            os.kill(os.getpid(), int(sys.argv[1]))

sys.meta_path.insert(0, Interrupts())
try:
    for main in (cli.main, __main__.main):
        print(main(["roofline", "model.safetensors", "--out", "a.png"]))
finally:
    print("the host goes on")
"""


@pytest.mark.parametrize("number, word", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_who_calls_the_command_line_goes_on_after_a_signal_during_imports(number, word):
    command = [sys.executable, "-c", HOST, str(int(number))]
    done = subprocess.run(command, text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, f"dfengine: {word}\n" * 2)
    assert done.stdout == f"{128 + number}\n" * 2 + "the host goes on\n"


BURST = """
import atexit, os, signal, sys
from dfengine import __main__, cli

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

class Late:
    def __del__(self):  # when the interpreter has given back the signals that it answers
        interrupt()

def command(**_):
    atexit.register(interrupt)
    sys.modules["late"] = Late()
    try:
        interrupt()
    except KeyboardInterrupt:
        interrupt()
        print("kept", flush=True)
        raise

cli._command = lambda *_: command
sys.argv = ["dfengine", "roofline", "model.safetensors", "--out", "a.png"]
__main__.command()
"""


def test_a_burst_of_signals_is_one_until_the_process_is_gone():
    done = subprocess.run([sys.executable, "-c", BURST], text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "kept\n", "dfengine: interrupted\n")


LATE = """
import logging, os, sys, threading, time
from dfengine import __main__, cli

number, where = int(sys.argv[1]), sys.argv[2]

def signal():
    os.kill(os.getpid(), number)

def hang():
    threading.main_thread().join()  # it waits for this thread then, as the process ends
    while True:  # one that comes just before it waits is seen with the next
        signal()
        time.sleep(0.1)

class Late:
    def __del__(self):  # when the interpreter has given back the signals that it answers
        signal()

def command(**_):
    print("kept", flush=True)
    if where == "late":
        sys.modules["late"] = Late()
    elif where in ("thread", "error"):
        threading.Thread(target=hang).start()
        if where == "error":
            raise RuntimeError("a mistake of dfengine's")
    else:
        remove = logging.Logger.removeHandler
        logging.Logger.removeHandler = lambda *of: (signal(), remove(*of))

cli._command = lambda *_: command
sys.argv = ["dfengine", "roofline", "model.safetensors", "--out", "a.png"]
__main__.command()
"""


@pytest.mark.parametrize("where", ["command", "thread", "late"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_command_changes_neither_status_nor_output(number, where):
    """Not even one that comes while a thread hangs, which it puts an end to."""
    command = [sys.executable, "-c", LATE, str(int(number)), where]
    done = subprocess.run(command, text=True, capture_output=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "kept\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_thread_that_hangs_after_an_error_nobody_foresaw(number):
    command = [sys.executable, "-c", LATE, str(int(number)), "error"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, "kept\n")
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("RuntimeError: a mistake of dfengine's\n")


def test_who_calls_the_command_line_keeps_its_handlers(monkeypatch, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(sys, "argv", ["dfengine", "--version"])
    assert main() == 0 and capsys.readouterr().out
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_later_signals_are_answered_again(monkeypatch):
    with signals.raising() as status:
        for number, error in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, signals.Terminated)):
            with pytest.raises(error):
                signal.raise_signal(number)
            signal.raise_signal(number)
            assert status() == 128 + number
            monkeypatch.setattr(signals, "_answered", signals._answered - signals.BURST)


def test_a_signal_between_the_imports_and_the_command_ends_in_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    assert main([]) == 130 and capsys.readouterr().err == "dfengine: interrupted\n"


def test_what_is_ignored_stays_ignored_and_other_threads_leave_signals_alone(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.raising():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as under nohup
    finally:
        signal.signal(signal.SIGINT, before)
    with monkeypatch.context() as patch:
        patch.setattr(signals.signal, "getsignal", lambda number: None)  # of a host that is no Python program
        with signals.raising():
            patch.undo()
            assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(signals, "_answered", 1.0)
    seen = []

    def other():
        with signals.raising():
            seen.append((signal.getsignal(signal.SIGTERM), signals._answered))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [(signal.getsignal(signal.SIGTERM), 1.0)]
