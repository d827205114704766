"""Plain tables for a terminal or a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..ir.errors import UsageError
from ..ir.program import DECODE


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns padded to their widest cell: the first `left` ones flush left, the rest, numbers, flush right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return ("  " + "  ".join(cells)).rstrip()

    return "\n".join(line(row) for row in (head, *rows))


def pass_table(passes: Sequence[Mapping[str, Any]]) -> str:
    """What every pass did; rows as `passes.pipeline.PassReport`."""
    rows = [
        (
            step["name"],
            "disabled" if step["disabled"] else str(step["matches"]),
            f"{step['nodes_before']} -> {step['nodes_after']}",
            f"{1e3 * step['seconds']:.1f}",
        )
        for step in passes
    ]
    return text_table(("pass", "matches", "nodes", "ms"), rows)


def _launches(record: Mapping[str, Any], step: str) -> list[Mapping[str, Any]]:
    """The launches of a step of a program.json; UsageError says why the program has no such step."""
    for found in record["steps"]:
        if found["name"] == step:
            return list(found["launches"])
    raise UsageError(f"--step {step}: prompts go in {record['notes'].get(step, 'another way')}")


def kernel_table(record: Mapping[str, Any], step: str = DECODE) -> str:
    """The kernels of a program.json: how often a step launches them and in what shape, and what they move.

    Kernels of other steps are left out; those that run only while weights are loaded, or to measure the memory, come
    last, without launches.
    """
    resources = record.get("resources", {})
    elsewhere = {launch.get("kernel") for other in record["steps"] for launch in other["launches"]}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for launch in _launches(record, step):
        groups.setdefault(launch["kernel"], []).append(launch)
    groups |= {name: [] for name in record["kernels"] if name not in elsewhere}
    rows = []
    for name, launches in groups.items():
        found = resources.get(name, {})
        static = found.get("shared_bytes")
        shapes = sorted({(launch["grid"], launch["block"], launch["shared_bytes"]) for launch in launches})
        grid, block, dynamic = shapes[0] if shapes else ("", "", 0)
        shared = f"{dynamic:,}" if static is None else f"{dynamic:,} + {static:,}"
        moved = sum(launch["bytes_read"] + launch["bytes_written"] for launch in launches)
        rows.append(
            (
                name,
                str(len(launches)) if launches else "-",
                f"{grid} x {block}" + (" .." if shapes[1:] else "") if launches else "-",
                shared if launches or static is not None else "-",
                f"{moved:,}" if launches else "-",
                str(found.get("registers", "-")),
                str(found.get("spill_bytes", "-")),
            )
        )
    bytes_of = "bytes a token" if step == DECODE else "bytes a chunk"
    head = ("kernel", "launches", "grid x block", "shared (dynamic + static)", bytes_of, "registers", "spills")
    return text_table(head, rows)


def launch_table(record: Mapping[str, Any], step: str = DECODE, layer: int | None = None) -> str:
    """The launches of a step of a program.json in order."""
    rows = [
        (
            str(index),
            launch["kernel"],
            ", ".join(f"%{node}" for node in launch["nodes"]),
            f"{launch['grid']} x {launch['block']}",
            f"{launch['shared_bytes']:,}",
            f"{launch['bytes_read'] + launch['bytes_written']:,}",
        )
        for index, launch in enumerate(_launches(record, step))
        if layer is None or launch["layer"] == layer
    ]
    return text_table(("#", "kernel", "computes", "grid x block", "shared", "bytes"), rows, left=3)


def step_line(record: Mapping[str, Any], step: str = DECODE) -> str:
    """How many launches a step has, and how many bytes it moves."""
    launches = _launches(record, step)
    layers: dict[int, int] = {}
    for launch in launches:
        if launch["layer"] is not None:
            layers[launch["layer"]] = layers.get(launch["layer"], 0) + 1
    read = sum(launch["bytes_read"] for launch in launches)
    per_position = sum(launch["cache_bytes_per_position"] for launch in launches)
    most = max(layers.values(), default=0)
    what = "token" if step == DECODE else "chunk"
    return (
        f"{len(launches)} launches a {what}, {most} a layer; {read / 1e6:,.1f} MB read a {what}, "
        f"and {per_position:,} bytes of cache for every position before it"
    )
