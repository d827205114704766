"""SIGINT, SIGTERM and SIGHUP end a command wherever they find it: its exit code, no traceback, nothing left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from psigraph import ending
from psigraph.cli.exit_codes import EXIT_CODES

MOST_SECONDS = 20  # with the start of Python on a busy machine; what is asleep would take 60

BEGIN = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
from psigraph import ending
from psigraph.runtime.whole_files import whole_file
ending.listen()
folder, number = Path(sys.argv[1]), int(sys.argv[2])
def send(): os.kill(os.getpid(), number)
"""
END = """
try:
    work()
finally:
    ending.leave_if_asked()
print("went on")
"""

WORK = {
    # In order: the exception is raised, and what is under way removes its file.
    "in order": """
def work():
    with whole_file(folder / "out") as file:
        file.write(b"half"); send(); time.sleep(60)
""",
    # An exception here can leave the module's lock taken for ever.
    "in an import": """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "colorsys":
            try: send(); time.sleep(60)
            except BaseException: print("raised")
sys.meta_path.insert(0, Finder())
def work():
    with whole_file(folder / "out"): import colorsys
""",
    "where exceptions are swallowed": """
class Deaf:
    def __del__(self): send(); time.sleep(60)
def work():
    with whole_file(folder / "out"):
        Deaf(); time.sleep(60)
""",
    "where nothing is heard": """
lock = threading.Lock()
def work():
    with whole_file(folder / "out"):
        lock.acquire()
        threading.Timer(0.1, send).start()
        while True:
            try: lock.acquire()
            except BaseException: pass
""",
    "with children that end only when killed": """
def work():
    with whole_file(folder / "out"):
        deaf = "trap '' TERM INT HUP; echo ready; while :; do sleep 1; done"
        child = subprocess.Popen(["sh", "-c", deaf], stdout=subprocess.PIPE, process_group=0)
        child.stdout.readline()
        (folder / "child").write_text(str(child.pid)); send(); time.sleep(60)
""",
}


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("in order", signal.SIGHUP),
        ("in an import", signal.SIGINT),
        ("where exceptions are swallowed", signal.SIGTERM),
        ("where nothing is heard", signal.SIGTERM),
        ("with children that end only when killed", signal.SIGTERM),
    ],
)
def test_a_signal_ends_it(where: str, number: signal.Signals, tmp_path: Path) -> None:
    code = BEGIN + WORK[where] + END
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(int(number))],
        capture_output=True, text=True, timeout=30, check=False, preexec_fn=heard,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")
    assert done.returncode in EXIT_CODES
    assert time.monotonic() - began < MOST_SECONDS
    child = tmp_path / "child"
    if child.exists():
        assert is_gone(int(child.read_text()))
        child.unlink()
    assert list(tmp_path.iterdir()) == []


def is_gone(process: int) -> bool:
    """Whether it has ended; whose child it is now may take a moment to notice."""
    for _ in range(500):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def heard() -> None:
    """A job in the background, as a test run may be, ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """Under nohup, and in a background job of a shell."""
    code = BEGIN + "def work(): send(); time.sleep(0.05)\n" + END
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(int(signal.SIGHUP))],
        capture_output=True, text=True, timeout=30, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


def test_a_chat_may_go_on_after_ctrl_c() -> None:
    """While it does, Ctrl-C is an exception that asks nothing of the process; before and after, it ends it."""
    before = signal.signal(signal.SIGINT, ending._answer)
    try:
        with ending.own_interrupts():
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
                assert ending.asked() is None
        assert signal.getsignal(signal.SIGINT) is ending._answer
    finally:
        signal.signal(signal.SIGINT, before)
