"""CUDA C -> machine code with NVRTC. Needs no GPU and no driver."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...ir.errors import CompileError, DeviceError

OPTIONS = (
    "--std=c++17",
    "--device-as-default-execution-space",  # NVRTC 13.0 takes a lambda inside a kernel for host code otherwise
    "--fmad=true",
    "--ptxas-options=-v",
)

# What is tried where a kernel spills, one after the other (device/base.cuh).
_ROOMIER = ("MORE_REGISTERS=8", "MORE_REGISTERS=16", "ONE_BLOCK")


@dataclass(frozen=True)
class KernelResources:
    """What the assembler says of one kernel: registers a thread, bytes of static shared memory,
    of stack frame and of spills (stores + loads)."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def nvrtc_version() -> str:
    """`13.0`, say; DeviceError if the library is not installed."""
    nvrtc = _bindings()
    error, major, minor = nvrtc.nvrtcVersion()
    _check(nvrtc, error, "nvrtcVersion")
    return f"{major}.{minor}"


def compile_kernel(
    source: str, headers: Mapping[str, str], name: str, arch: str, defines: Sequence[str] = ()
) -> tuple[bytes, KernelResources]:
    """The cubin of a kernel text, and its resources.

    headers: texts by the names that the source includes; name: the entry; arch: `sm_90a`; defines: macros. CompileError
    carries the compiler's first error line.

    The assembler sometimes spills a few bytes so that one block more may be resident, or because the text asks for
    few registers. Such a kernel is compiled again with a little more of them, and at last told that one block is
    enough.
    """
    cubin, resources = _compile(source, headers, name, arch, defines)
    for roomier in _ROOMIER:
        if not resources.spill_bytes and not resources.stack_bytes:
            break
        again, better = _compile(source, headers, name, arch, (*defines, roomier))
        if better.spill_bytes + better.stack_bytes < resources.spill_bytes + resources.stack_bytes:
            cubin, resources = again, better
    return cubin, resources


def _compile(
    source: str, headers: Mapping[str, str], name: str, arch: str, defines: Sequence[str]
) -> tuple[bytes, KernelResources]:
    nvrtc = _bindings()
    error, program = nvrtc.nvrtcCreateProgram(
        source.encode(),
        f"{name}.cu".encode(),
        len(headers),
        [text.encode() for text in headers.values()],
        [header.encode() for header in headers],
    )
    _check(nvrtc, error, "nvrtcCreateProgram")
    try:
        macros = [f"--define-macro={define}" for define in defines]
        options = [option.encode() for option in (f"--gpu-architecture={arch}", *OPTIONS, *macros)]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _text(nvrtc, program)
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            lines = [line for line in log.splitlines() if "error" in line] or log.splitlines() or [str(error)]
            raise CompileError(f"kernel {name} for {arch}: {lines[0].strip()}")
        error, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(nvrtc, error, "nvrtcGetCUBINSize")
        cubin = bytearray(size)
        (error,) = nvrtc.nvrtcGetCUBIN(program, cubin)
        _check(nvrtc, error, "nvrtcGetCUBIN")
        return bytes(cubin), parse_resources(log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def parse_resources(log: str) -> KernelResources:
    """Reads ptxas' report (`-v`)."""

    def number(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, log))

    return KernelResources(
        registers=number(r"Used (\d+) registers"),
        shared_bytes=number(r"(\d+) bytes smem"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        spill_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
    )


def _bindings() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        advice = "pip install cuda-bindings nvidia-cuda-nvrtc"
        raise DeviceError(f"NVRTC's bindings cannot be imported ({error}); {advice}") from error
    return nvrtc


def _text(nvrtc: Any, program: Any) -> str:
    error, size = nvrtc.nvrtcGetProgramLogSize(program)
    _check(nvrtc, error, "nvrtcGetProgramLogSize")
    text = bytearray(size)
    (error,) = nvrtc.nvrtcGetProgramLog(program, text)
    _check(nvrtc, error, "nvrtcGetProgramLog")
    return bytes(text).rstrip(b"\0").decode(errors="replace")


def _check(nvrtc: Any, error: Any, call: str) -> None:
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"{call} failed: {error.name}")
