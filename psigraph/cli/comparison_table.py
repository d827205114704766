"""What a comparison of engines on one file comes to, for people: who ran, how fast, and how that compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from .tables import text_table


def comparison(ours: Mapping[str, Any], theirs: Sequence[Mapping[str, Any]]) -> str:
    """A table of a session's engines and, for each that was measured, psigraph's rate over its own; no other rows.

    ours: a report of psigraph; theirs: comparators' reports.
    """
    our_rates = [run["decode_tokens_per_second"] for run in ours["runs"]]
    rows = [("psigraph", f"{median(our_rates):,.2f}", str(len(our_rates)), "", "")]
    lines = []
    for report in theirs:
        name, rates = f"{report['runtime']} {report['version']}".strip(), report["samples"]
        if not rates:
            rows.append((name, "", "", "", f"{report['status']}: {report['reason']}"))
            continue
        ratio = median(our_rates) / median(rates)
        rows.append((name, f"{median(rates):,.2f}", str(len(rates)), f"{ratio:.2f} x", ""))
        lines.append(f"psigraph is {ratio:.2f} times as fast as {name}")
    table = text_table(("engine", "tok/s (median)", "turns", "psigraph / it", ""), rows)
    return "\n".join([table, "", *(lines or ["no other engine was measured, so there is no ratio"])])
