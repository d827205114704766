"""What a kernel's image holds is given back when its module is unloaded: memory of its fibers, its mappings, files."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest

from psigraph.runtime import host

THREADS, BLOCKS = 1024, 8  # side by side, so that each thread has a stack
STACKS = THREADS * BLOCKS * 8192  # bytes: the top page of each stack, and the one with its canary
STAMP = """
extern "C" __global__ void stamp(int* out) { out[blockIdx.x * 1024 + threadIdx.x] = threadIdx.x; }
"""


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def images() -> list[str]:
    """The lines of this process's memory map that belong to kernels' images."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "psigraph-kernel" in line]


def load_run_unload(api: Any, image: bytes, memory: Any) -> int:
    """Bytes that the process had grown by before the module was unloaded."""
    before = resident()
    module = api.cuModuleLoadData(image)
    function = api.cuModuleGetFunction(module, b"stamp")
    size = (BLOCKS, 1, 1, THREADS, 1, 1)
    api.cuLaunchCooperativeKernel(function, *size, 0, 0, ((int(memory),), (ctypes.c_void_p,)))
    api.cuCtxSynchronize()
    grown = resident() - before
    api.cuModuleUnload(module)
    return grown


@pytest.mark.parametrize("folder", ["usual", "missing"])
def test_unloading_gives_memory_and_files_back(api: Any, folder: str, monkeypatch: Any) -> None:
    """Without a folder for images they are loaded from memory files, which are closed too."""
    if folder == "missing":
        monkeypatch.setenv("TMPDIR", "/nonexistent")
    image = host.compile_kernel(STAMP, "stamp")
    memory = api.cuMemAlloc(THREADS * BLOCKS * 4)
    load_run_unload(api, image, memory)
    before, files, mapped = resident(), set(os.listdir("/proc/self/fd")), images()
    for _ in range(3):
        assert load_run_unload(api, image, memory) >= STACKS, "what is measured below"
    assert resident() - before < STACKS // 2
    assert set(os.listdir("/proc/self/fd")) == files
    assert images() == mapped, "another test may have left its own"
    api.cuMemFree(memory)
