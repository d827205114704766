"""What the kernel keeps from a process that renders a chat template; imports nothing of psigraph.

Jinja's sandbox is the first wall, this is the second: a process that needs only memory and its answer's pipe has no
files, no network and no children from here on.
"""

from __future__ import annotations

import os
import resource
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# System calls that Python needs to compute and to write its answer, by machine: (audit architecture, numbers).
# read, write, close, fstat, lseek, mmap, mprotect, munmap, brk, rt_sigaction, rt_sigprocmask, rt_sigreturn, mremap,
# madvise, getpid, exit, gettimeofday, gettid, (time,) futex, clock_gettime, exit_group, getrandom.
_ALLOWED: dict[str, tuple[int, Sequence[int]]] = {
    "x86_64": (
        0xC000003E,
        (0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 25, 28, 39, 60, 96, 186, 201, 202, 228, 231, 318),
    ),
    "aarch64": (
        0xC00000B7,
        (63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 216, 233, 172, 93, 169, 178, 98, 113, 94, 278),
    ),
}
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # classic BPF: load a word, jump where equal, return
_FORBID, _ALLOW = 0x00050001, 0x7FFF0000  # the call fails with EPERM; the call is made
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2  # prctl's numbers


def limit(cpu_seconds: int, memory_bytes: int) -> bool:
    """No more than this much further processor time and memory; no file, no process, no core dump from here on.

    True where the kernel also filters system calls; without such a kernel the limits stand alone.
    """
    control = _control_of_process()  # imports, for which files are needed
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = resource.getrusage(resource.RUSAGE_SELF)
    for name, most in (
        ("RLIMIT_AS", pages * resource.getpagesize() + memory_bytes),
        ("RLIMIT_CPU", round(used.ru_utime + used.ru_stime) + cpu_seconds),  # what was imported does not count
        ("RLIMIT_CORE", 0),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_NOFILE", 0),
        ("RLIMIT_NPROC", 0),
    ):
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    return control is not None and _filter_calls(control)


def _control_of_process() -> Any:
    """The C library's prctl; None where there is none."""
    try:
        from ctypes import CDLL, c_int, c_ulong

        prctl = CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        return None
    prctl.argtypes = [c_int, c_ulong, c_ulong, c_ulong, c_ulong]
    return prctl


def _filter_calls(prctl: Any) -> bool:
    """Every system call but those of the table fails with EPERM; False where this machine has no such filter."""
    from ctypes import addressof, create_string_buffer

    machine = os.uname().machine
    if sys.platform != "linux" or machine not in _ALLOWED:
        return False
    program = _program(*_ALLOWED[machine])
    kept = create_string_buffer(program, len(program))
    header = create_string_buffer(struct.pack("@HP", len(program) // 8, addressof(kept)))
    if prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        return False
    return bool(prctl(_SET_SECCOMP, _FILTER, addressof(header), 0, 0) == 0)


def _program(architecture: int, allowed: Sequence[int]) -> bytes:
    """The filter in BPF: another architecture's numbers mean other calls, so they are all forbidden."""
    numbers = sorted(allowed)
    steps = [
        (_LOAD, 0, 0, 4),  # of struct seccomp_data: arch
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _FORBID),
        (_LOAD, 0, 0, 0),  # nr
        *((_EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)),
        (_RETURN, 0, 0, _FORBID),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
