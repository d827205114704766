"""Pieces -> kernels and launches: equal texts become one kernel, and the pieces' order is the launches'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..ir.graph import Node, layer_of
from ..ir.program import LIBRARY_PRODUCT, Kernel, Launch
from ..ir.text import print_node
from .emission import KernelSpec
from .writer import kernel_text


def scheduled(
    emitted: Sequence[tuple[Node, KernelSpec]], programmatic: bool = False
) -> tuple[tuple[Kernel, ...], tuple[Launch, ...]]:
    """Kernels, and a launch a piece. programmatic: every launch but the first lets its successor start early."""
    kernels, names = _name_kernels(emitted)
    launches = tuple(
        Launch(
            kernel=name,
            nodes=tuple(out.name for out in node.outs),
            args=item.args,
            grid=item.grid,
            block=item.threads,
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


def _name_kernels(emitted: Sequence[tuple[Node, KernelSpec]]) -> tuple[tuple[Kernel, ...], list[str]]:
    """Equal texts become one kernel; its comment shows the first node and counts the others."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for position, (_, spec) in enumerate(emitted):
        if spec.stem != LIBRARY_PRODUCT:
            groups.setdefault((spec.stem, spec.parameters, spec.body, spec.threads, spec.registers), []).append(
                position
            )
    stems: dict[str, int] = {}
    names = [LIBRARY_PRODUCT] * len(emitted)
    kernels = []
    for positions in groups.values():
        node, spec = emitted[positions[0]]
        stems[spec.stem] = stems.get(spec.stem, 0) + 1
        name = spec.stem if stems[spec.stem] == 1 else f"{spec.stem}_{stems[spec.stem]}"
        for position in positions:
            names[position] = name
        text = kernel_text(
            name,
            spec.threads,
            spec.parameters,
            spec.body,
            includes=spec.includes,
            registers=spec.registers,
            comment=_comment(name, node, spec, len(positions)),
        )
        kernels.append(Kernel(name, text))
    return tuple(kernels), names


def _comment(name: str, node: Node, spec: KernelSpec, count: int) -> list[str]:
    lines = [f"{name}: {spec.grid} blocks of {spec.threads} threads, {spec.shared_bytes:,} bytes of shared memory"]
    if spec.describe:
        lines.append(spec.describe)
    lines.append("Implements, from " + (", ".join(map(str, node.origin)) or "a pass") + ":")
    lines.append("    " + print_node(replace(node, origin=())))
    if count > 1:
        lines.append(f"and {count - 1} more launches of the same shape.")
    return lines
