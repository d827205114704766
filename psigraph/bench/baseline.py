"""Two benchmark reports side by side, with what their spreads allow to say."""

from __future__ import annotations

from statistics import median
from typing import Any

from ..ir.errors import UsageError
from .report import kv_type_of, validate_report

# What must be equal for two rates to be compared at all.
WORK = ("model_size", "prompt_tokens", "max_new_tokens", "backend", "decode_row", "depth", "kv_type", "sampler")


def check_baseline(before: dict[str, Any]) -> None:
    """UsageError where `before` is no report that agrees with itself."""
    problems = validate_report(before)
    if problems:
        raise UsageError(f"--baseline: {problems[0]}; give a report that psigraph bench wrote")


def check_work(before: dict[str, Any], known: dict[str, Any]) -> None:
    """UsageError where `before` is of other work than `known` (keys of WORK): asked before anything is measured."""
    there = {**before, "kv_type": kv_type_of(before)}
    for key, value in known.items():
        if there.get(key) != value:
            raise UsageError(f"--baseline: {key} is {there.get(key)} there and {value} here; not the same work")


def compare_reports(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Lines that say how much faster or slower `now` is; UsageError names what differs in the work done."""
    check_work(before, {key: now.get(key) for key in WORK} | {"kv_type": kv_type_of(now)})
    gpus = [report["environment"].get("gpu") for report in (before, now)]
    lines = [] if gpus[0] == gpus[1] else [f"  measured on different machines: {gpus[0]} then, {gpus[1]} now"]
    rates = [[float(run["decode_tokens_per_second"]) for run in report["runs"]] for report in (before, now)]
    old, new = median(rates[0]), median(rates[1])
    change = 100 * (new / old - 1)
    apart = max(rates[0]) < min(rates[1]) or max(rates[1]) < min(rates[0])
    verdict = "faster" if change > 0 else "slower"
    said = verdict if apart else "within the runs' spread: no difference shown"
    if min(map(len, rates)) < 2:
        said = "a single run has no spread: nothing shown"
    lines.append(f"  baseline {old:8.1f} tok/s   {min(rates[0]):.1f} to {max(rates[0]):.1f}")
    lines.append(f"  now      {new:8.1f} tok/s   {min(rates[1]):.1f} to {max(rates[1]):.1f}   {change:+.1f} %, {said}")
    return lines
