"""What another runtime did on our file: schema `psionic.medpsy.comparator.v1`, built and checked here.

One report a tool and session. `samples` are tokens per second, one a turn; everything else says what a token cost
that tool and how it was driven, so that a reader can judge whether the rows are alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from .policy import Policy, load_policy

SCHEMA = "psionic.medpsy.comparator.v1"
STATUSES = ("measured", "not_run", "refused", "timed_out", "failed")
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": str,
    "created_at": str,
    "runtime": str,
    "version": str,
    "backend": str,
    "host": str,
    "gpu": str,
    "gpu_idle": bool,
    "artifact_sha256": str,
    "synthetic": bool,
    "status": str,
    "reason": str,
    "session": str,
    "work_per_token": str,
    "depth": int,
    "max_new_tokens": int,
    "samples": list,
    "command": list,
    "raw": list,
}


def build_comparator_report(
    *,
    runtime: str,
    status: str,
    sha256: str,
    synthetic: bool,
    session: str,
    max_new_tokens: int,
    samples: Sequence[float] = (),
    reason: str = "",
    version: str = "",
    backend: str = "cuda",
    host: str = "",
    gpu: str = "",
    gpu_idle: bool = False,
    work_per_token: str = "",
    depth: int = 0,
    command: Sequence[str] = (),
    raw: Sequence[object] = (),
) -> dict[str, Any]:
    """A report about one tool: `samples` in tokens per second where it ran, `reason` where it did not."""
    return {
        "schema": SCHEMA,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "runtime": runtime,
        "version": version,
        "backend": backend,
        "host": host,
        "gpu": gpu,
        "gpu_idle": gpu_idle,
        "artifact_sha256": sha256,
        "synthetic": synthetic,
        "status": status,
        "reason": reason,
        "session": session,
        "work_per_token": work_per_token,
        "depth": depth,
        "max_new_tokens": max_new_tokens,
        "samples": [float(sample) for sample in samples],
        "command": list(command),
        "raw": list(raw),
    }


def validate_comparator_report(report: Mapping[str, Any], policy: Policy | None = None) -> list[str]:
    """Everything wrong with a comparator's report, one line each."""
    policy = policy or load_policy()
    problems = []
    for key, kind in _FIELDS.items():
        value = report.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            problems.append(f"{key}: is missing or has the wrong type")
    if problems:
        return problems
    if report["schema"] != SCHEMA:
        problems.append(f"schema: is {report['schema']}, not {SCHEMA}")
    if report["status"] not in STATUSES:
        problems.append(f"status: is {report['status']}, not one of {', '.join(STATUSES)}")
    samples = report["samples"]
    if not all(
        isinstance(sample, int | float) and not isinstance(sample, bool) and math.isfinite(sample) and sample > 0
        for sample in samples
    ):
        problems.append("samples: hold something that is no rate")
    if (report["status"] == "measured") != bool(samples):
        problems.append("samples: a measured row has some, any other has none")
    if report["status"] == "measured" and len(report["raw"]) != len(samples):
        problems.append("raw: holds what the tool said for each sample")
    if report["status"] != "measured" and not report["reason"]:
        problems.append("reason: a row without a measurement says why")
    if not re.fullmatch(r"[0-9a-f]{64}", report["artifact_sha256"]):
        problems.append("artifact_sha256: is no SHA-256")
    if report["synthetic"] and policy.artifact_of(report["artifact_sha256"]) is not None:
        problems.append("synthetic: this digest is the real artifact's")
    return problems
