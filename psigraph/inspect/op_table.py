"""The op table as Markdown: `python -m psigraph.inspect.op_table` prints it."""

from __future__ import annotations

from ..ir.op import Op
from ..ir.ops import FUSED, UNFUSED


def op_row(op: Op) -> str:
    """One line of the table."""
    attributes = [*op.attributes, *(f"{name}?" for name in op.optional)]
    results = [f"{name}*" if name in op.may_quantize else name for name in op.results]
    attrs = f" {{{', '.join(attributes)}}}" if attributes else ""
    return f"| `{op.name}({', '.join(op.operands)}){attrs}` | `{', '.join(results)}` | {op.summary} |"


def op_table(title: str, ops: tuple[Op, ...]) -> str:
    head = [f"### {title}", "", "| op | results | meaning |", "| --- | --- | --- |"]
    return "\n".join([*head, *map(op_row, ops)]) + "\n"


def op_tables() -> str:
    """Both tables, unfused ops first. `*` marks results that may be i8x2, `?` optional attributes."""
    return op_table("Ops of model specs", UNFUSED) + "\n" + op_table("Fused ops", FUSED)


if __name__ == "__main__":
    print(op_tables(), end="")
