"""Emitted pieces -> kernels and launches: equal texts become one kernel, and the pieces' order is the launches'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..ir.graph import Node, layer_of
from ..ir.program import HEADER_NAME, LIBRARY_PRODUCT, Kernel, Launch
from ..ir.text import print_node
from .emission import Emitted


def scheduled(
    emitted: Sequence[tuple[Node, Emitted]], programmatic: bool = False
) -> tuple[tuple[Kernel, ...], tuple[Launch, ...]]:
    """Kernels, and a launch a piece. programmatic: every launch but the first lets its successor start early."""
    kernels, names = _name_kernels(emitted)
    launches = tuple(
        Launch(
            kernel=name,
            nodes=tuple(out.name for out in node.outs),
            args=item.args,
            grid=item.grid,
            block=item.block,
            shared_bytes=item.shared_bytes,
            programmatic=programmatic and position > 0,
            cluster=item.cluster,
            bytes_read=item.bytes_read,
            bytes_written=item.bytes_written,
            cache_bytes_per_position=item.cache_bytes_per_position,
            layer=layer_of(node),
        )
        for position, ((node, item), name) in enumerate(zip(emitted, names, strict=True))
    )
    return kernels, launches


def _name_kernels(emitted: Sequence[tuple[Node, Emitted]]) -> tuple[tuple[Kernel, ...], list[str]]:
    """Equal texts become one kernel; its comment shows the first node and counts the others."""
    groups: dict[tuple[str, int], list[int]] = {}
    for position, (_, item) in enumerate(emitted):
        if item.stem != LIBRARY_PRODUCT:
            groups.setdefault((item.body, item.block), []).append(position)
    stems: dict[str, int] = {}
    names = [LIBRARY_PRODUCT] * len(emitted)
    kernels = []
    for (body, _), positions in groups.items():
        node, item = emitted[positions[0]]
        stems[item.stem] = stems.get(item.stem, 0) + 1
        name = item.stem if stems[item.stem] == 1 else f"{item.stem}_{stems[item.stem]}"
        for position in positions:
            names[position] = name
        text = body.replace("KERNEL(", f"{name}(", 1)
        kernels.append(Kernel(name, _comment(name, node, item, len(positions)) + text))
    return tuple(kernels), names


def _comment(name: str, node: Node, item: Emitted, count: int) -> str:
    lines = [f"{name}: {item.grid} blocks of {item.block} threads, {item.shared_bytes:,} bytes of shared memory"]
    if item.describe:
        lines.append(item.describe)
    lines.append("Implements, from " + (", ".join(map(str, node.origin)) or "a pass") + ":")
    lines.append("    " + print_node(replace(node, origin=())))
    if count > 1:
        lines.append(f"and {count - 1} more launches of the same shape.")
    return f'#include "{HEADER_NAME}"\n' + "".join(f"// {line}\n" for line in lines)
