"""A comparator matrix for readers: Markdown tables for the docs and a bar chart as SVG, both made by code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

from ..ir.errors import UsageError

BEGIN = "<!-- psigraph matrix: begin -->"
END = "<!-- psigraph matrix: end -->"
_COLOURS = {"measured": "#2f6f4e", "reported": "#9aa0a6"}
_OTHER = "#c58b2a"


def markdown(matrix: Mapping[str, Any]) -> str:
    """The decision and the rows as Markdown. Depends on the matrix alone: the gate renders it again."""
    decision = matrix["decision"]
    lines = [
        f"Parity on the claim's GPU: **{_yes(decision['can_claim_parity'])}**. "
        f"Competitive: **{_yes(decision['can_claim_competitive_medpsy'])}**. Why: {decision['why']}.",
        "",
    ]
    if decision["by_host"]:
        lines += ["| GPU | file (sha256) | parity there | why |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {_cell(entry['gpu'])} | `{entry['artifact_sha256'][:12]}` | {_yes(entry['can_claim_parity'])} "
            f"| {_cell(entry['why'])} |"
            for entry in decision["by_host"]
        ]
        lines.append("")
    lines += [
        "| runtime | GPU | file | status | tok/s (mean) | best | runs | share of bandwidth | report or reason |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in matrix["rows"]:
        name = f"{row['runtime']} {row['version']}".strip()
        if row.get("decode_row"):
            name += f" ({row['decode_row']}, {row['kv_type']} cache)"
        ref = row["report_ref"]
        cells = (
            name,
            row["gpu"] or row["backend"],
            _file(row, matrix),
            row["status"],
            _figure(row["mean_decode_tokens_per_second"]),
            _figure(row["best_warm_decode_tokens_per_second"]),
            str(row["repeats"] or ""),
            _share(row.get("share_of_read_bandwidth")),
            f"`{ref}`" if ref and row["status"] == "measured" else row["reason"],
        )
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def plain(tables: str) -> str:
    """The same for a terminal: without the asterisks that make a browser write in bold."""
    return tables.replace("**", "")


def replace_block(text: str, body: str, name: str = "the document") -> str:
    """`text` with `body` between its two markers. UsageError where they are not there exactly once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UsageError(f"{name}: needs the markers {BEGIN} and {END}, once each and in this order")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{body}{END}{rest.split(END)[1]}"


def block_of(text: str) -> str | None:
    """What stands between the markers, None where there are none."""
    if BEGIN not in text or END not in text:
        return None
    return text.split(BEGIN, 1)[1].split(END, 1)[0].removeprefix("\n")


def svg(matrix: Mapping[str, Any]) -> str:
    """Bars of mean tokens per second, one a row that has any, with the share of read bandwidth where known."""
    rows = [row for row in matrix["rows"] if row["mean_decode_tokens_per_second"]]
    top = max((row["mean_decode_tokens_per_second"] for row in rows), default=1.0)
    label_width, bar_width, step, head = 390, 360, 26, 56
    width, height = label_width + bar_width + 210, head + step * len(rows) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" role="img">',
        "<title>Decode rate by runtime, tokens per second</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<text x="12" y="22" font-size="15" font-weight="bold">Decode rate, tokens per second (mean)</text>',
        '<text x="12" y="42" fill="#5f6368">green: measured here; grey: reported by the originating issue; '
        "rates of different GPUs or files do not compare</text>",
    ]
    for index, row in enumerate(rows):
        y = head + step * index
        rate = row["mean_decode_tokens_per_second"]
        kind = f", {row['decode_row']}, {row['kv_type']} cache" if row.get("decode_row") else ""
        label = f"{row['runtime']}{kind}: {(row['gpu'] or row['backend']).replace('NVIDIA ', '')}, {_file(row, matrix)}"
        share = row.get("share_of_read_bandwidth")
        note = f"{rate:,.2f}" + (f" ({share:.0%} of read bandwidth)" if share else "")
        bar = max(1.0, bar_width * rate / top)
        parts += [
            f'<text x="{label_width - 8}" y="{y + 15}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{label_width}" y="{y + 3}" width="{bar:.1f}" height="16" '
            f'fill="{_COLOURS.get(row["status"], _OTHER)}"/>',
            f'<text x="{label_width + bar + 6:.1f}" y="{y + 15}">{note}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _file(row: Mapping[str, Any], matrix: Mapping[str, Any]) -> str:
    """Which file a row is about: the artifact that the claim speaks of, a synthetic stand-in, or another one."""
    if row["artifact_sha256"] == matrix["artifact"]["sha256"]:
        return "real artifact"
    return "synthetic" if row["synthetic"] else f"other, {row['artifact_sha256'][:8]}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.3f}" if value < 1 else f"{value:,.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
