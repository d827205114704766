"""What a kernel's parameters say: through which of them it may write."""

from __future__ import annotations

import re

from psigraph.ir.program import Kernel


def parameters(kernel: Kernel) -> list[str]:
    """The declarations of a kernel's parameters, in order, without the stamps'."""
    head = rf'extern "C" __global__ void \w+\([\d, ]+\) {kernel.name}'
    found = re.search(rf"{head}\(([^)]*) STAMP_PARAMETERS\)", kernel.text)
    assert found, kernel.name
    return [" ".join(parameter.split()) for parameter in found[1].split(",")]


def written(kernel: Kernel) -> list[int]:
    """Indices of the parameters through which a kernel may write: pointers to what is not const."""
    return [i for i, text in enumerate(parameters(kernel)) if "*" in text and not text.startswith("const ")]


def read(kernel: Kernel) -> list[int]:
    """Indices of the parameters through which it only reads."""
    return [i for i, text in enumerate(parameters(kernel)) if "*" in text and text.startswith("const ")]
