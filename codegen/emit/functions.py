"""The C++ object that computes a value of a node's result (`device/functions.cuh`)."""

from __future__ import annotations

from collections.abc import Collection

from ...ir.graph import Node
from ...ir.ops import OPS
from ..writer import c_float


def function_of(node: Node, name: str = "", elsewhere: Collection[str] = ()) -> str:
    """The struct of the op's name, or of another `name`, with the node's attributes as its members, in the order of the
    op's row.

    elsewhere: attributes that are no members, because something else of the kernel reads them. A struct that lacks a
    member, or is missing, does not compile.
    """
    op = OPS[node.op]
    keys = [key for key in (*op.attributes, *op.optional) if key in node.attributes and key not in elsewhere]
    values = [node.attr(key) for key in keys]
    literals = [c_float(value) if isinstance(value, float) else str(value).lower() for value in values]
    return f"{(name or node.op).title().replace('_', '')}{{{', '.join(literals)}}}"
