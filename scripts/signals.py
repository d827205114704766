"""Ends commands at random moments by SIGINT, SIGTERM and SIGHUP, and looks at what is left: `make signals`.

Every one must end within MOST_SECONDS with a documented exit code and no traceback, leave no process and no temporary
file, and what it was to write must be whole: as it was before, as it should be, or not there. Moments are drawn between
the one when the process answers signals (before that it is Python that starts) and the command's usual end. A Ctrl-C
while `chat` answers stops the answer; there one more follows for every question. A process that Python is putting away
already dies of the signal itself, which for a shell is the same code. With the same --seed the same moments are drawn.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from psigraph.cli.exit_codes import EXIT_CODES
from psigraph.inspect.sums import SUMS, first_foreign
from psigraph.ir.errors import PsigraphError
from psigraph.runtime.gguf.file import open_gguf

MODEL = Path(__file__).parents[1] / "fixtures" / "tiny" / "tiny-qwen3-q4_k_m.gguf"
MOST_SECONDS = 2.0
QUESTIONS = 2  # for chat
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MARK = "PSIGRAPH_SIGNALS_RUN"  # in the environment of every process of a run

COMMANDS = {
    "generate": ["generate", str(MODEL), "--backend", "host", "--prompt", "The whale", "--max-new-tokens", "24"],
    "generate, numpy": ["generate", str(MODEL), "--prompt", "The whale", "--max-new-tokens", "40", "--backend", "cpu"],
    "chat": ["chat", str(MODEL), "--backend", "cpu", "--seed", "1", "--max-new-tokens", "24"],
    "bench": [
        *("bench", "--model-path", str(MODEL), "--backend", "cpu", "--prompt-token-ids", "1"),
        *("--max-new-tokens", "12", "--repeats", "2", "--json-out", "report.json"),
    ],
    "compile": ["compile", str(MODEL), "--arch", "sm_90a", "--out", "compiled"],
    "synth": ["synth", "synth.gguf", "--size", "0.6b", "--quant", "q4_k_m", "--layers", "2", "--force"],
}  # fmt: skip


@dataclass
class Ended:
    """What a run came to. complaints: what is wrong with it."""

    code: int
    seconds: float
    complaints: list[str]


class Place:
    """A folder with everything that a run reads and writes. Caches are cold in every other run: g++ and NVRTC run."""

    def __init__(self, root: Path, number: int, warm: Path | None) -> None:
        self.mark = f"{os.getpid()}-{number}"
        self.work, self.tmp = root / "work", root / "tmp"
        for folder in (self.work, self.tmp):
            folder.mkdir(parents=True)
        cache = root / "cache" if warm is None else warm
        self.caches = [cache]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PSIGRAPH_")},
            "XDG_CACHE_HOME": str(cache),
            "TMPDIR": str(self.tmp),
            "PYTHONUNBUFFERED": "1",
            MARK: self.mark,
        }

    def start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "psigraph", *arguments],
            cwd=self.work,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=(self.tmp.parent / "stdout").open("wb"),
            stderr=(self.tmp.parent / "stderr").open("wb"),
            start_new_session=True,
        )

    def orphans(self) -> Iterator[str]:
        """Command lines of processes of this run."""
        wanted = f"{MARK}={self.mark}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        yield (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")

    def left(self) -> Iterator[str]:
        """Temporary files."""
        yield from (str(path) for path in self.tmp.rglob("*"))
        for folder in (self.work, *self.caches):
            yield from (str(path) for path in folder.rglob("*") if path.name.startswith("."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", default="psigraph", help="Any text.")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    for number in SIGNALS:  # a job in the background ignores SIGINT, and its children would too
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    names = list(COMMANDS)
    codes: collections.Counter[str] = collections.Counter()
    worst, failures = 0.0, 0
    with tempfile.TemporaryDirectory(prefix="psigraph-signals-") as folder:
        root = Path(folder)
        usual = {name: _usual_end(root / f"usual {name}", name, root / "warm") for name in names}
        for number in range(given.runs):
            name, what = names[number % len(names)], draw.choice(SIGNALS)
            warm = None if draw.random() < 0.5 else root / "warm"
            moment = draw.random() * usual[name]
            place = Place(root / str(number), number, warm)
            found = _run(place, name, what, moment)
            codes[f"{name}: {what.name} {found.code}"] += 1
            worst = max(worst, found.seconds)
            failures += bool(found.complaints)
            for complaint in found.complaints:
                print(f"{number}: {name}, {what.name} after {moment:.3f} s: {complaint}", flush=True)
            if not found.complaints:
                shutil.rmtree(root / str(number))
    for row, count in sorted(codes.items()):
        print(f"{count:4} {row}")
    print(f"seed {given.seed}: {given.runs} signals, {failures} failures, the slowest end took {worst:.2f} s")
    sys.exit(bool(failures))


def _usual_end(root: Path, name: str, warm: Path) -> float:
    """Seconds from the moment when signals are answered to the end, in a second run, whose caches are warm."""
    seconds = 0.0
    for number in range(2):
        place = Place(root / str(number), number, warm)
        process = place.start(COMMANDS[name])
        assert process.stdin is not None
        process.stdin.write(b"Call me Ishmael.\n" * QUESTIONS)
        process.stdin.close()
        began = _listens(process)
        code = process.wait(300)
        seconds = time.monotonic() - began
        if code:
            sys.exit(f"{name}: exit code {code} by itself: {(root / str(number) / 'stderr').read_text()}")
    return seconds


def _listens(process: subprocess.Popen[bytes]) -> float:
    """The moment when the process answers SIGTERM."""
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            break
        time.sleep(0.001)
    return time.monotonic()


def _run(place: Place, name: str, what: signal.Signals, moment: float) -> Ended:
    before = _outputs_before(place.work, name)
    process = place.start(COMMANDS[name])
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(b"Call me Ishmael.\n" * QUESTIONS)
        process.stdin.flush()
    began = _listens(process)
    time.sleep(max(0.0, began + moment - time.monotonic()))
    sent = time.monotonic()
    process.send_signal(what)
    answers = QUESTIONS if name == "chat" and what == signal.SIGINT else 0  # each may be stopped instead
    for _ in range(answers):
        if (code := _wait(process, MOST_SECONDS / 2)) is not None:
            break
        sent = time.monotonic()
        process.send_signal(what)
    else:
        code = _wait(process, 60.0)
    seconds = time.monotonic() - sent
    complaints = []
    if code is None:
        process.kill()
        code = process.wait()
        complaints.append("does not end")
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    code = 128 - code if code < 0 and -code == what else code
    told = (place.tmp.parent / "stderr").read_text(errors="replace")
    if code not in (0, 128 + what) or code not in EXIT_CODES:
        complaints.append(f"exit code {code}: {told[-300:]}")
    if seconds > MOST_SECONDS:
        complaints.append(f"took {seconds:.1f} s to end")
    if "Traceback" in told or "Exception ignored" in told:
        complaints.append(f"traceback: {told[-2000:]}")
    complaints += [f"left running: {line}" for line in place.orphans()]
    complaints += [f"left: {path}" for path in place.left()]
    complaints += _not_whole(place.work, before)
    return Ended(code, seconds, complaints)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


def _outputs_before(work: Path, name: str) -> dict[str, bytes]:
    """What lies there already and must stay, or be replaced as a whole: an old report."""
    if name != "bench":
        return {}
    (work / "report.json").write_bytes(b'{"old": true}\n')
    return {"report.json": b'{"old": true}\n'}


def _not_whole(work: Path, before: dict[str, bytes]) -> Iterator[str]:
    for path in work.iterdir():
        if path.name == "compiled":
            if not (path / SUMS).is_file() or first_foreign(path) is not None:
                yield f"{path.name} is not whole"
        elif path.suffix == ".gguf":
            try:
                open_gguf(path).close()
            except PsigraphError as error:
                yield f"{path.name} is not whole: {error}"
        elif path.suffix == ".json" and path.read_bytes() != before.get(path.name):
            try:
                json.loads(path.read_text())
            except ValueError:
                yield f"{path.name} is not whole"
    yield from (f"{name} is gone" for name in before if not (work / name).exists())


if __name__ == "__main__":
    main()
