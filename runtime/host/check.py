"""Run one kernel under checks that only a CPU makes possible.

Three builds of the same text: `address` (AddressSanitizer: out of bounds in global and shared memory, misaligned
vector loads), `watch` (every load and store judged: races, reads and writes before the programmatic wait, stale
reads, writes to inputs) and `fast` (in three orders of threads and blocks, whose results must be the same bits).
All of them find divergent barriers, collectives of partial warps and blocks that skip the wait, and poison shared
memory with NaN. Each run is a process of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...ir.errors import PsigraphError
from .compile import BUILDS, HERE, NO_HEADERS, build_kernel, build_library

ORDERS = ("forward", "reverse", "shuffle")
RUN_SECONDS = 120  # a kernel that spins on memory never ends by itself
_MAGIC = 0x70736967
_LINE = re.compile(r"(/\S+\.cuh?):(\d+)")  # of a kernel's text or of a device header
_SANITIZERS = {
    # No leak check: the runner's memory lives as long as the process. Handled or not, a fault is the kernel's.
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=99:detect_stack_use_after_return=0:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=98",
}

Argument = np.ndarray[Any, Any] | int | float | np.generic


class HostCheckError(PsigraphError):
    """A kernel that breaks a rule.

    kind: `out of bounds`, `misaligned`, `race`, `early read`, `early write`, `stale read`, `write to input`,
    `missing wait`, `divergent barrier`, `partial warp`, `stack overflow`, `order`, `hang`, `crash`, `launch` or `trap`.
    message: names kernel and, where known, line and source text.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


@dataclass(frozen=True)
class KernelCall:
    """One launch: the text, its entry, its shape and arguments.

    args: arrays are copied to buffers of exactly their size; ints are 32-bit, floats float32, NumPy scalars as they
    are. produced: places of arguments that an earlier kernel of the step writes. writes: places that this kernel
    may write (None: every array). programmatic: launched with a programmatic edge. together: blocks that run side by
    side (a cluster, or the whole grid for a cooperative launch). headers: texts by the names that the text includes.
    """

    source: str
    name: str
    grid: int | tuple[int, int, int]
    block: int | tuple[int, int, int]
    shared_bytes: int
    args: Sequence[Argument]
    produced: tuple[int, ...] = ()
    writes: tuple[int, ...] | None = None
    programmatic: bool = False
    together: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)

    def writable(self) -> tuple[int, ...]:
        arrays = tuple(index for index, arg in enumerate(self.args) if isinstance(arg, np.ndarray))
        return arrays if self.writes is None else tuple(index for index in arrays if index in self.writes)


def run_kernel(
    source: str,
    name: str,
    grid: int | tuple[int, int, int],
    block: int | tuple[int, int, int],
    shared_bytes: int,
    args: Sequence[Argument],
    order: str = "forward",
    checks: bool = True,
    produced: tuple[int, ...] = (),
    writes: tuple[int, ...] | None = None,
    programmatic: bool = False,
    together: int = 1,
    seed: int = 1,
    headers: Mapping[str, str] = NO_HEADERS,
) -> dict[int, np.ndarray[Any, Any]]:
    """Run a kernel once; the arrays that it may write, by their place in args.

    order: of threads and blocks, one of ORDERS. checks: run the `address` and the `watch` build (the result is the
    latter's) instead of the `fast` one. The rest: see KernelCall.
    Raises HostCheckError if the kernel breaks a rule, CompileError if it does not compile.
    """
    call = KernelCall(source, name, grid, block, shared_bytes, args, produced, writes, programmatic, together, headers)
    if not checks:
        return run_build(call, "fast", order, seed)
    build_all(call, ("address", "watch"))
    run_build(call, "address", order, seed)
    return run_build(call, "watch", order, seed)


def check_kernel(call: KernelCall, seed: int = 1) -> dict[int, np.ndarray[Any, Any]]:
    """Every check of one launch: `address` and `watch` once, `fast` in three orders with the same bits.

    Returns the arrays that it may write, from the `fast` build. Raises HostCheckError.
    """
    build_all(call, ("address", "watch", "fast"))
    run_build(call, "address", "forward", seed)
    run_build(call, "watch", "forward", seed)
    return compare_orders(call, seed)


def compare_orders(call: KernelCall, seed: int = 1) -> dict[int, np.ndarray[Any, Any]]:
    """The `fast` build in three orders; HostCheckError (`order`) if the bits differ."""
    results = {order: run_build(call, "fast", order, seed) for order in ORDERS}
    first = results[ORDERS[0]]
    for order in ORDERS[1:]:
        for index, array in results[order].items():
            differ = np.flatnonzero(array.view(np.uint8).ravel() != first[index].view(np.uint8).ravel())
            if differ.size:
                where = int(differ[0]) // array.itemsize
                here, there = first[index].ravel()[where], array.ravel()[where]
                raise HostCheckError(
                    "order",
                    f"{call.name}: argument {index} depends on the order of threads: element {where} is "
                    f"{here} in order and {there} with {order}: a barrier is missing",
                )
    return first


def run_build(
    call: KernelCall, build: str, order: str = "forward", seed: int = 1, defines: tuple[str, ...] = ()
) -> dict[int, np.ndarray[Any, Any]]:
    """One run of one build (a key of compile.BUILDS) in a process of its own; defines: macros."""
    image = build_kernel(call.source, call.name, build, defines, call.headers)
    sanitizers = tuple(
        option for option in BUILDS[build].options if option.startswith("-fsanitize") and not BUILDS[build].watch
    )
    runner = build_library(HERE / "check_runner.cpp", "check_runner", ("-fPIE", *sanitizers[:1]))
    with tempfile.TemporaryDirectory(prefix="psigraph-check-") as scratch:
        launch, result = Path(scratch) / "launch", Path(scratch) / "result"
        launch.write_bytes(_launch_bytes(call, order, seed))
        try:
            done = subprocess.run(
                [str(runner), str(image), str(launch), str(result)],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=RUN_SECONDS,
                env={**os.environ, **_SANITIZERS},
            )
        except subprocess.TimeoutExpired as error:
            raise HostCheckError(
                "hang", f"{call.name}: did not end within {RUN_SECONDS} s; it spins on memory"
            ) from error
        if done.returncode:
            raise _failure(call, image, done)
        return _results(call, result.read_bytes())


def build_all(call: KernelCall, builds: Sequence[str]) -> None:
    """Compile several builds of one kernel at once."""
    with ThreadPoolExecutor(max_workers=len(builds)) as pool:
        for future in [pool.submit(build_kernel, call.source, call.name, build, (), call.headers) for build in builds]:
            future.result()


def _three(size: int | tuple[int, int, int]) -> tuple[int, int, int]:
    return (size, 1, 1) if isinstance(size, int) else size


def _launch_bytes(call: KernelCall, order: str, seed: int) -> bytes:
    """The launch as check_runner.cpp reads it."""
    head = (*_three(call.grid), *_three(call.block), call.shared_bytes, call.together, int(call.programmatic))
    parts = [struct.pack("<16I", _MAGIC, *head, ORDERS.index(order), seed, len(call.args), 0, 0, 0)]
    writable = call.writable()
    for index, arg in enumerate(call.args):
        if isinstance(arg, np.ndarray):
            data = np.ascontiguousarray(arg).tobytes()
            parts += [struct.pack("<4I", 1, int(index in call.produced), int(index in writable), len(data)), data]
        else:
            data = (
                arg.tobytes()
                if isinstance(arg, np.generic)
                else struct.pack("<i" if isinstance(arg, int) else "<f", arg)
            )
            parts += [struct.pack("<4I", 0, 0, 0, len(data)), data]
    return b"".join(parts)


def _results(call: KernelCall, data: bytes) -> dict[int, np.ndarray[Any, Any]]:
    arrays: dict[int, np.ndarray[Any, Any]] = {}
    at = 0
    for index in call.writable():
        arg = call.args[index]
        assert isinstance(arg, np.ndarray)
        arrays[index] = np.frombuffer(data[at : at + arg.nbytes], dtype=arg.dtype).reshape(arg.shape).copy()
        at += arg.nbytes
    return arrays


def _failure(call: KernelCall, image: Path, done: subprocess.CompletedProcess[str]) -> HostCheckError:
    """What a process that did not end well says, as one line with the kernel's line in it."""
    if done.returncode == 3:
        kind, _, rest = done.stdout.strip().partition(": ")
        rest, _, places = rest.partition(" @")
        lines = _lines_of(image, places.split(",")) if places else []
        return HostCheckError(kind, f"{call.name}: {rest}{_source_lines(lines)}")
    if done.returncode == 2:
        return HostCheckError("launch", f"{call.name}: {done.stderr.strip()}")
    found = re.search(r"ERROR: AddressSanitizer: (\S+)|runtime error: ([^\n]*)", done.stderr)
    if found:
        lines = _LINE.findall(done.stderr)
        what = found[1] or found[2]
        size = re.search(r"^(READ|WRITE) of size (\d+)", done.stderr, re.M)
        access = f", {size[1].lower()} of {size[2]} bytes" if size else ""
        kind = "misaligned" if "misaligned" in what else "out of bounds"
        return HostCheckError(kind, f"{call.name}: {what}{access}{_source_lines(lines)}")
    return HostCheckError(
        "crash", f"{call.name}: the process ended with status {done.returncode}: {done.stderr[-300:].strip()}"
    )


def _lines_of(image: Path, places: list[str]) -> list[tuple[str, str]]:
    """(file, line) of the kernel's text and its headers for offsets into the image, innermost first; none without
    binutils."""
    tool = shutil.which("addr2line")
    if tool is None:
        return []
    offsets = [place.removeprefix("+") for place in places]
    done = subprocess.run(
        [tool, "-i", "-e", str(image), *offsets], capture_output=True, text=True, check=False, timeout=60
    )
    return _LINE.findall(done.stdout)


def _source_lines(lines: list[tuple[str, str]]) -> str:
    """The innermost of these lines, and the outermost if it is another."""
    if not lines:
        return ""
    quoted = []
    for path, line in [lines[0]] if lines[0] == lines[-1] else [lines[0], lines[-1]]:
        text = Path(path).read_text().splitlines() if Path(path).is_file() else []
        if int(line) <= len(text):
            where = f" of {Path(path).name}" if path.endswith(".cuh") else ""
            quoted.append(f"line {line}{where} `{text[int(line) - 1].strip()}`")
    return f" ({', called from '.join(quoted)})"
