"""Whether halves hold a model's weights: asked of the device when prompts are about to go in by chunks."""

from __future__ import annotations

import ctypes

import numpy as np

from ..ir.errors import UnsupportedModelError
from ..ir.program import PREFILL, Program
from .program import LoadedProgram

MOST_SMALL = 1 / 8
"""Share of a weight's values that may be too small for all bits of a half: of a bell curve that many are where its
deviation is 2^-11, of which the largest error, 2^-25, is 2^-14."""
LEAST_ACTIVATION = 2.0**-10
"""SwiGLU's activations are stored times 2^-4, and below 2^-14 halves lack bits. Where not one of thousands reaches
this, they all lack some."""


def not_held(told: np.ndarray) -> str:
    """What a chunk met that halves do not hold, "" for nothing. told: the words of `prefill.beyond`, u32."""
    if told[0]:
        return "a prompt has values beyond 65,504, where halves end"
    largest = told[1:].view(np.float32)
    if ((largest > 0) & (largest < LEAST_ACTIVATION)).any():
        return "a prompt has activations below 2^-10, for which halves lack bits"
    return ""


def check_half_range(loaded: LoadedProgram, program: Program) -> None:
    """UnsupportedModelError names a weight with values beyond halves, or with many that are too small for them."""
    names = program.notes.get("halved", ())
    if not names:
        return
    stream, memory = loaded.stream, loaded.memory
    counts = f"{PREFILL}.half_range"
    memory.clear(counts)
    slot_bytes = memory.buffer(counts).nbytes // len(names)
    for index, name in enumerate(names):
        buffer = memory.buffer(name)
        args = (
            (memory.address(name), ctypes.c_void_p),
            (buffer.nbytes // 4, ctypes.c_ulonglong),
            (memory.address(counts) + index * slot_bytes, ctypes.c_void_p),
        )
        grid = min(4 * program.sm_count, -(-buffer.nbytes // (4 * 512)))
        function = loaded.function(f"half_range_{buffer.dtype}")
        stream.guarded(stream.driver.launch, function, grid, 512, 0, stream.handle, args)
    found = memory.read(counts).view(np.uint32).reshape(len(names), -1)
    for name, (beyond, small, kept) in zip(names, found.tolist(), strict=True):
        if beyond:
            raise UnsupportedModelError(f"{name} has values beyond 65,504, where halves end")
        if small > MOST_SMALL * (small + kept):
            raise UnsupportedModelError(f"{name} has many values below 2^-14, for which halves lack bits")
