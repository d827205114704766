"""How commands end when the stand-in driver fails or somebody presses Ctrl-C: exit code, one line, whole files."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nano import write_nano

from psigraph.bench.report import validate_report
from psigraph.cli import run
from psigraph.runtime import host
from psigraph.runtime.cuda.kernel_cache import MAGIC
from psigraph.runtime.host import driver as stand_in
from psigraph.runtime.host.compile import cache_directory

TINY = Path(__file__).parents[2] / "fixtures" / "tiny" / "tiny-qwen3-q4_k_m.gguf"
OLD_REPORT = '{"old": true}\n'
FEW = ["--prompt-token-ids", "1", "--max-new-tokens", "2"]
ONE_SM = {"PSIGRAPH_HOST_SMS": "1"}
MOST_SECONDS_TO_STOP = 2.0
SECONDS_TO_APPEAR = 60.0


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel cache for all tests of this file."""
    return tmp_path_factory.mktemp("kernels")


def bench_of(model: Path, report: Path) -> list[str]:
    options = "--backend host --ctx 16 --prompt-token-ids 1,2 --max-new-tokens 4 --repeats 2"
    return ["bench", "--model-path", str(model), *options.split(), "--json-out", str(report)]


def environment(kernels: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PSIGRAPH_CACHE_DIR": str(kernels), **more}


@pytest.fixture(scope="module")
def calls(nano: Path, kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The driver calls of a benchmark in which nothing fails; in the cache lie its kernels then."""
    report = tmp_path_factory.mktemp("report") / "report.json"
    host.activate(sms=1)
    host.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSIGRAPH_CACHE_DIR", str(kernels))
        assert run(bench_of(nano, report)) == 0
    made = host.calls()
    host.forget()
    host.activate(sms=4)
    assert validate_report(json.loads(report.read_text())) == []
    return made


# (call, which of its kind, CUresult, exit code): opening, loading, memory, capture, replay, the prompt's copy.
@pytest.mark.parametrize(
    ("name", "which", "code", "ending"),
    [
        ("cuInit", 0, 999, 7),
        ("cuModuleLoadData", 3, 209, 7),
        ("cuMemAlloc", 0, 2, 8),
        ("cuMemHostAlloc", 1, 2, 8),
        ("cuStreamEndCapture", 0, 999, 7),
        ("cuGraphLaunch", 5, 719, 7),
        ("cuEventSynchronize", -1, 700, 7),
    ],
)
def test_a_failed_call_is_one_line_and_leaves_the_old_report(
    name: str, which: int, code: int, ending: int, calls: list[str], nano: Path, kernels: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    report.write_text(OLD_REPORT)
    nth = [number for number, call in enumerate(calls, 1) if call == name][which]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "psigraph", *bench_of(nano, report)],
        capture_output=True,
        text=True,
        env=environment(kernels, **ONE_SM, PSIGRAPH_HOST_FAIL=f"{nth}:{code}"),
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("psigraph: warning: ")]
    assert done.returncode == ending, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("psigraph: ")
    assert name in lines[0]
    assert ("lower --ctx" in lines[0]) == (code == 2)
    assert time.monotonic() - started < 5 + 5  # the interpreter's start, and what is asked for
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert report.read_text() == OLD_REPORT


@pytest.mark.parametrize("name", ["cuMemFree", "cuStreamDestroy", "cuDevicePrimaryCtxRelease"])
def test_what_fails_while_things_are_put_away_costs_nothing(
    name: str, calls: list[str], nano: Path, kernels: Path, tmp_path: Path
) -> None:
    nth = len(calls) - calls[::-1].index(name)
    done = subprocess.run(
        [sys.executable, "-m", "psigraph", *bench_of(nano, tmp_path / "report.json")],
        capture_output=True,
        text=True,
        env=environment(kernels, **ONE_SM, PSIGRAPH_HOST_FAIL=f"{nth}:999"),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert validate_report(json.loads((tmp_path / "report.json").read_text())) == []


@contextlib.contextmanager
def on_a_terminal(arguments: list[str], env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command with its stderr on a terminal, where it shows progress: (process, descriptor to read from)."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "psigraph", *arguments], stdout=subprocess.PIPE, stderr=theirs, env=env
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.communicate()
        os.close(ours)


def read_until(descriptor: int, wanted: str) -> str:
    """What came until `wanted` (a regular expression) stood in it."""
    seen, end = "", time.monotonic() + SECONDS_TO_APPEAR
    while not re.search(wanted, seen):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"{wanted} did not appear in {seen!r}"
        piece = os.read(descriptor, 65536).decode(errors="replace")
        assert piece, f"{wanted} did not appear in {seen!r}"
        seen += piece
    return seen


def interrupted(
    process: subprocess.Popen[bytes], terminal: int, number: signal.Signals = signal.SIGINT
) -> tuple[int, str]:
    """(exit code, what still came) after Ctrl-C, or another signal; AssertionError if it takes too long."""
    started, seen = time.monotonic(), ""
    process.send_signal(number)
    with contextlib.suppress(OSError):  # Linux ends a terminal that no process holds with EIO
        while (left := started + 2 * MOST_SECONDS_TO_STOP - time.monotonic()) > 0:
            if select.select([terminal], [], [], left)[0]:
                piece = os.read(terminal, 65536)
                if not piece:
                    break
                seen += piece.decode(errors="replace")
    code = process.wait(MOST_SECONDS_TO_STOP)
    assert time.monotonic() - started < MOST_SECONDS_TO_STOP
    return code, seen


def assert_whole(folder: Path) -> None:
    """No temporary file in a cache, and no half entry."""
    left = [path for path in folder.rglob("*") if path.name.startswith(".")]
    assert left == []
    for path in folder.rglob("*.kernel"):
        assert json.loads(path.read_bytes().split(b"\n", 2)[1])["magic"] == MAGIC
    for path in folder.rglob("*.so"):
        data = path.read_bytes()[:-32]  # behind it its hash
        sections = int.from_bytes(data[0x28:0x30], "little") + 64 * int.from_bytes(data[0x3C:0x3E], "little")
        assert (data[:4], len(data)) == (b"\x7fELF", sections)


def test_ctrl_c_while_tokens_come(kernels: Path) -> None:
    arguments = ["generate", str(TINY), "--prompt-token-ids", "7", "--max-new-tokens", "2000", "--output", "ids"]
    process = subprocess.Popen(
        [sys.executable, "-m", "psigraph", *arguments, "--backend", "host"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(kernels),
    )
    try:
        assert process.stdout is not None
        read_until(process.stdout.fileno(), r"\d+ \d+ ")
        code, _ = interrupted(process, process.stdout.fileno())
        assert code == 130
    finally:
        process.kill()
        _, told = process.communicate()
    assert all(line.startswith(b"psigraph: warning: ") for line in told.splitlines()), told
    assert_whole(kernels)


def test_ctrl_c_while_it_measures(nano: Path, kernels: Path, tmp_path: Path, calls: list[str]) -> None:
    report = tmp_path / "report.json"
    arguments = [*bench_of(nano, report), "--repeats", "100000"]
    with on_a_terminal(arguments, environment(kernels, **ONE_SM)) as (process, terminal):
        read_until(terminal, "measuring")
        code, told = interrupted(process, terminal)
        assert code == 130
        assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []
    assert_whole(kernels)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_kernels_compile(number: signal.Signals, nano: Path, tmp_path: Path) -> None:
    """The compiler, which here would go on for minutes, ends with the command."""
    cache, images, slow, started = (tmp_path / name for name in ("kernels", "images", "slow-g++", "started"))
    images.mkdir(mode=0o700)
    library = stand_in.build().parent
    shutil.copytree(library, images / library.relative_to(cache_directory()))
    os.mkfifo(started)
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *--version* | *libcuda.cpp*) exec g++ "$@";; esac\n'
        f"echo $$ > {started}\nexec sleep 600\n"
    )
    slow.chmod(0o700)
    env = environment(cache, **ONE_SM, PSIGRAPH_HOST_CACHE=str(images), PSIGRAPH_CXX=str(slow))
    pipe = os.open(started, os.O_RDWR)
    with on_a_terminal(bench_of(nano, tmp_path / "report.json"), env) as (process, terminal):
        compilers = [int(number) for number in read_until(pipe, r"\d+\n").split()]
        code, told = interrupted(process, terminal, number)
        assert code == 128 + number
        assert "Traceback" not in told
    os.close(pipe)
    for compiler in compilers:
        with pytest.raises(ProcessLookupError):
            os.kill(compiler, 0)
    assert_whole(cache)
    assert_whole(images)
    assert not (tmp_path / "report.json").exists()


def test_a_device_that_is_not_there(nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(nano), "--backend", "host", "--device", "5", *FEW]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("psigraph: --device 5: the stand-in driver has one device, number 0")


@pytest.mark.parametrize("command", ["bench", "generate"])
def test_without_libcuda(command: str, nano: Path, tmp_path: Path) -> None:
    """A libcuda that cannot be loaded stands before any other, so that this holds on a machine with a GPU too."""
    (tmp_path / "libcuda.so.1").write_bytes(b"")
    arguments = bench_of(nano, tmp_path / "r.json") if command == "bench" else ["generate", str(nano), "--backend", "x"]
    if command == "generate":
        arguments += FEW
    arguments[arguments.index("--backend") + 1] = "cuda"
    done = subprocess.run(
        [sys.executable, "-m", "psigraph", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("psigraph: warning: ")]
    assert done.returncode == 7, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(
        "psigraph: no NVIDIA driver (libcuda.so.1) on this machine; install it, or use --backend "
    )
    assert not (tmp_path / "r.json").exists()
