"""Plain tables for a terminal or a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


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


def kernel_table(record: Mapping[str, Any]) -> str:
    """The kernels of a program.json: how often a step launches them and in what shape, and what they move.

    Kernels that run only while weights are loaded, or to measure the memory, come last, without launches.
    """
    resources = record.get("resources", {})
    groups: dict[str, list[Mapping[str, Any]]] = {name: [] for name in record["kernels"]}
    for launch in record["launches"]:
        groups[launch["kernel"]].append(launch)
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
    head = ("kernel", "launches", "grid x block", "shared (dynamic + static)", "bytes a token", "registers", "spills")
    return text_table(head, rows)


def launch_table(record: Mapping[str, Any], layer: int | None = None) -> str:
    """The launches of a program.json in order."""
    rows = [
        (
            str(index),
            launch["kernel"],
            ", ".join(f"%{node}" for node in launch["nodes"]),
            f"{launch['grid']} x {launch['block']}",
            f"{launch['shared_bytes']:,}",
            f"{launch['bytes_read'] + launch['bytes_written']:,}",
        )
        for index, launch in enumerate(record["launches"])
        if layer is None or launch["layer"] == layer
    ]
    return text_table(("#", "kernel", "computes", "grid x block", "shared", "bytes"), rows, left=3)


def step_line(record: Mapping[str, Any]) -> str:
    """How many launches a step has, and how many bytes it moves."""
    launches = record["launches"]
    layers: dict[int, int] = {}
    for launch in launches:
        if launch["layer"] is not None:
            layers[launch["layer"]] = layers.get(launch["layer"], 0) + 1
    read = sum(launch["bytes_read"] for launch in launches)
    per_position = sum(launch["cache_bytes_per_position"] for launch in launches)
    most = max(layers.values(), default=0)
    return (
        f"{len(launches)} launches a token, {most} a layer; {read / 1e6:,.1f} MB read a token, "
        f"and {per_position:,} bytes of cache for every position before it"
    )
