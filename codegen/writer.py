"""A kernel's text around its statements."""

from __future__ import annotations

from collections.abc import Sequence


def kernel_text(
    name: str,
    threads: int,
    parameters: Sequence[str],
    body: str,
    *,
    includes: Sequence[str],
    registers: int = 0,
    comment: Sequence[str] = (),
) -> str:
    """The text of a kernel, parameters on as many lines as they need.

    body: its statements, which find `stamps` (device/base.cuh). registers: the most that a thread may have, so that
    blocks share a multiprocessor; 0: as the block's size allows.
    """
    lines = [""]
    for number, parameter in enumerate(parameters):
        piece = parameter + (", " if number + 1 < len(parameters) else " STAMP_PARAMETERS")
        if lines[-1] and len(lines[-1]) + len(piece) > 112:
            lines[-1] = lines[-1].rstrip()
            lines.append("")
        lines[-1] += piece
    inner = "\n    ".join(lines)
    bounds = f"REGISTERS({threads}, {registers})" if registers else f"THREADS({threads})"
    statements = "".join(f"    {line}\n" if line else "\n" for line in ["STAMPS;", *body.splitlines()])
    return (
        "".join(f'#include "{header}"\n' for header in includes)
        + "".join(f"// {line}\n" for line in comment)
        + f'extern "C" __global__ void {bounds} {name}(\n    {inner}) {{\n{statements}}}\n'
    )


def c_float(value: float) -> str:
    """A float literal of C that reads back as the same float32."""
    text = f"{value:.9g}"
    return text + ("f" if "." in text or "e" in text else ".0f")
