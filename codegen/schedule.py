"""Pieces -> kernels and launches: equal texts become one kernel, and the pieces' order is the launches'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..ir.graph import Node, layer_of
from ..ir.program import Kernel, Launch, LibraryProduct
from ..ir.text import print_node
from .emission import KernelSpec
from .writer import kernel_text

Pieces = Sequence[tuple[Node, KernelSpec | LibraryProduct]]


def scheduled(
    pieces: Pieces, prefix: str, programmatic: bool
) -> tuple[tuple[Kernel, ...], tuple[Launch | LibraryProduct, ...]]:
    """Kernels, whose names begin with the prefix, and a launch a piece. programmatic: every launch but the first lets
    its successor start early."""
    kernels, names = _name_kernels(pieces, prefix)
    launches: list[Launch | LibraryProduct] = []
    for (node, piece), name in zip(pieces, names, strict=True):
        if isinstance(piece, LibraryProduct):
            launches.append(replace(piece, nodes=tuple(out.name for out in node.outs), layer=layer_of(node)))
            continue
        launches.append(
            Launch(
                kernel=name,
                nodes=tuple(out.name for out in node.outs),
                args=piece.args,
                grid=piece.grid,
                block=piece.threads,
                shared_bytes=piece.shared_bytes,
                programmatic=programmatic and bool(launches),
                cluster=piece.cluster,
                bytes_read=piece.bytes_read,
                bytes_written=piece.bytes_written,
                cache_bytes_per_position=piece.cache_bytes_per_position,
                layer=layer_of(node),
            )
        )
    return kernels, tuple(launches)


def _name_kernels(pieces: Pieces, prefix: str) -> tuple[tuple[Kernel, ...], list[str]]:
    """Equal texts become one kernel; its comment shows the first node and counts the others."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for position, (_, spec) in enumerate(pieces):
        if isinstance(spec, KernelSpec):
            key = (spec.stem, spec.parameters, spec.body, spec.threads, spec.registers)
            groups.setdefault(key, []).append(position)
    stems: dict[str, int] = {}
    names = [""] * len(pieces)
    kernels = []
    for positions in groups.values():
        node, spec = pieces[positions[0]]
        assert isinstance(spec, KernelSpec)
        stems[spec.stem] = stems.get(spec.stem, 0) + 1
        name = prefix + (spec.stem if stems[spec.stem] == 1 else f"{spec.stem}_{stems[spec.stem]}")
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
