"""The comparator matrix, schema `psionic.medpsy.comparator_matrix.v1`: reports in, rows and a decision out.

Nothing in a matrix is typed: a measured row is computed from the report it names, a reported row is copied from
models/medpsy.yaml, and the decision is computed from the rows. `validate_matrix` computes all of it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any

from ..bench import report
from ..ir.errors import UsageError
from ..json_file import read_json
from . import comparator_report
from .policy import Policy, load_policy

SCHEMA = "psionic.medpsy.comparator_matrix.v1"
ENGINE = "psionic_qwen3_cuda"


@dataclass(frozen=True)
class Source:
    """A report on disk: `ref` as the matrix names it (relative, with forward slashes), digest of its bytes."""

    ref: str
    sha256: str
    report: Mapping[str, Any]


def read_source(path: Path, root: Path) -> Source:
    """The report at `path`, named relative to `root`. UsageError for what is no report that agrees with itself."""
    content = read_json(path)
    if str(path).encode("utf-8", "replace").decode() != str(path):
        raise UsageError(f"{path}: the name is not UTF-8, so no matrix can refer to it; rename the file")
    problems = problems_of(content)
    if problems:
        raise UsageError(f"{path}: {problems[0]}")
    resolved, base = path.resolve(), root.resolve()
    ref = resolved.relative_to(base).as_posix() if resolved.is_relative_to(base) else path.name
    return Source(ref, hashlib.sha256(path.read_bytes()).hexdigest(), content)


def problems_of(content: Mapping[str, Any]) -> list[str]:
    """What is wrong with a report of either kind."""
    if content.get("schema") == report.SCHEMA:
        return report.validate_report(content)
    if content.get("schema") == comparator_report.SCHEMA:
        return comparator_report.validate_comparator_report(content)
    return [f"schema: {content.get('schema')!r} is neither {report.SCHEMA} nor {comparator_report.SCHEMA}"]


def row_of(source: Source) -> dict[str, Any]:
    """The matrix row of a report, ours or a comparator's."""
    content = source.report
    if content["schema"] == report.SCHEMA:
        rates = [run["decode_tokens_per_second"] for run in content["runs"]]
        environment = content["environment"]
        roofline = content["roofline"]
        row = _row(
            runtime="psigraph",
            version=str(environment.get("psigraph", environment.get("commit", ""))),
            backend=content["backend"],
            host=str(environment.get("host", "")),
            gpu=str(environment.get("gpu", "")),
            execution_engine=content["execution_engine"],
            artifact_sha256=content["artifact"]["sha256"],
            synthetic=content["artifact"]["synthetic"],
            status="measured",
            max_new_tokens=content["max_new_tokens"],
            reason="measured by psigraph bench; ends of text do not stop it",
        )
        row |= {
            "gpu_idle": environment.get("gpu_idle") is True,
            "session": content.get("session", ""),
            "work_per_token": content.get("work_per_token", ""),
            "decode_row": content["decode_row"],
            "depth": content["depth"],
            "kv_type": report.kv_type_of(content),
        }
        if roofline and roofline["valid"]:
            row["share_of_read_bandwidth"] = roofline["share_of_read_bandwidth"]
    else:
        rates = content["samples"]
        row = _row(
            runtime=content["runtime"],
            version=content["version"],
            backend=content["backend"],
            host=content["host"],
            gpu=content["gpu"],
            execution_engine=content["runtime"],
            artifact_sha256=content["artifact_sha256"],
            synthetic=content["synthetic"],
            status=content["status"],
            max_new_tokens=content["max_new_tokens"],
            reason=content["reason"],
        )
        row |= {
            "gpu_idle": content["gpu_idle"],
            "session": content["session"],
            "work_per_token": content["work_per_token"],
            "depth": content["depth"],
        }
    if rates:
        row |= {
            "repeats": len(rates),
            "mean_decode_tokens_per_second": mean(rates),
            "median_decode_tokens_per_second": median(rates),
            "least_decode_tokens_per_second": min(rates),
            "best_warm_decode_tokens_per_second": max(rates),
        }
    return row | {"report_ref": source.ref, "report_sha256": source.sha256}


def reported_rows(policy: Policy) -> list[dict[str, Any]]:
    """The rows that the originating issue reported, and those that nobody has run, as rows of a matrix."""
    data = policy.data["reported"]
    rows = []
    for entry, host in (
        *((entry, data["host"]) for entry in data["rows"]),
        *((entry, "") for entry in data["absent"]),
    ):
        row = _row(
            runtime=entry["runtime"],
            version=str(entry.get("version", "")),
            backend=entry["backend"],
            host=host,
            gpu=data["gpu"],
            execution_engine=entry["runtime"],
            artifact_sha256=data["sha256"],
            synthetic=False,
            status=entry["status"],
            max_new_tokens=policy.data["claim"]["prompt_contract"]["max_new_tokens"],
            reason=entry["reason"],
        )
        row["mean_decode_tokens_per_second"] = entry.get("mean")
        row["best_warm_decode_tokens_per_second"] = entry.get("best")
        rows.append(row)
    return rows


def build_matrix(sources: Sequence[Source], host: str = "", created_at: str | None = None) -> dict[str, Any]:
    """The matrix of these reports, with the reported rows and the decision."""
    policy = load_policy()
    names = [source.ref for source in sources]
    if len(set(names)) != len(names):
        raise UsageError("reports: one is given twice, or two outside the root have the same name")
    artifact = policy.artifact_of(policy.data["claim"]["artifact_sha256"])
    if artifact is None:
        raise UsageError("models/medpsy.yaml: claim.artifact_sha256 is of no artifact listed there")
    rows = [row_of(source) for source in sorted(sources, key=lambda source: source.ref)] + reported_rows(policy)
    return {
        "schema": SCHEMA,
        "status": "measured" if any(row["status"] == "measured" for row in rows) else "awaiting_measurements",
        "created_at": created_at or datetime.now(UTC).isoformat(timespec="seconds"),
        "host": host,
        "artifact": {
            "repo": artifact["repository"],
            "file": artifact["file"],
            "sha256": artifact["sha256"],
            "synthetic": False,
        },
        "prompt_contract": policy.data["claim"]["prompt_contract"],
        "rows": rows,
        "medical_policy": policy.benchmark_record(),
        "decision": decide(rows, policy),
    }


def decide(rows: Sequence[Mapping[str, Any]], policy: Policy) -> dict[str, Any]:
    """What the rows allow to be claimed.

    by_host: for every GPU and file on which psigraph was measured, whether its chained row reaches the fastest
    comparator of the same session. The top level is that verdict for the real artifact on the claim's GPU, and
    false where those have not been measured.
    """
    claim = policy.data["claim"]
    ours = [row for row in rows if row["status"] == "measured" and row["execution_engine"] == ENGINE]
    places = sorted({(row["gpu"], row["artifact_sha256"]) for row in ours})
    by_host: list[dict[str, Any]] = []
    for gpu, sha256 in places:
        share, why = _verdict(rows, gpu, sha256, claim)
        by_host.append(
            {
                "gpu": gpu,
                "artifact_sha256": sha256,
                "can_claim_parity": share is not None and share >= 1.0,
                "share_of_fastest_comparator": share,
                "why": why,
            }
        )
    synthetic = {(row["gpu"], row["artifact_sha256"]) for row in ours if row["synthetic"]}
    settled = [
        entry
        for entry in by_host
        if claim["gpu"] in entry["gpu"]
        and entry["artifact_sha256"] == claim["artifact_sha256"]
        and (entry["gpu"], entry["artifact_sha256"]) not in synthetic
    ]
    if settled:
        # More than one GPU carries the claim's name (a laptop's does too): the slowest against its peers speaks.
        entry = min(settled, key=lambda entry: entry["share_of_fastest_comparator"] or 0.0)
        share = entry["share_of_fastest_comparator"]
        return {
            "can_claim_parity": entry["can_claim_parity"],
            "can_claim_competitive_medpsy": share is not None and share >= claim["competitive_share"],
            "why": entry["why"],
            "by_host": by_host,
        }
    return {
        "can_claim_parity": False,
        "can_claim_competitive_medpsy": False,
        "why": (
            f"the real artifact (sha256 {claim['artifact_sha256']}) has not been measured with psigraph on an "
            f"{claim['gpu']}; figures from other GPUs or synthetic files do not carry over"
        ),
        "by_host": by_host,
    }


def validate_matrix(matrix: Mapping[str, Any], root: Path) -> list[str]:
    """Everything wrong with a matrix whose `report_ref`s lie under `root`, one line each.

    Rows, policy and decision are computed again from the reports that the matrix names and compared whole.
    """
    problems = []
    if matrix.get("schema") != SCHEMA:
        return [f"schema: is {matrix.get('schema')!r}, not {SCHEMA}"]
    rows = matrix.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        return ["rows: are missing or no objects"]
    sources = []
    for index, row in enumerate(rows):
        ref = row.get("report_ref")
        if ref is None:
            continue
        path = root / str(ref)
        if not path.resolve().is_relative_to(root.resolve()) or not path.is_file():
            problems.append(f"rows[{index}].report_ref: no report at {ref}")
            continue
        try:
            source = read_source(path, root)
        except UsageError as error:
            problems.append(f"rows[{index}].report_ref: {error}")
            continue
        if source.sha256 != row.get("report_sha256"):
            problems.append(f"rows[{index}].report_sha256: {ref} has changed since the matrix was made")
        sources.append(source)
    if problems:
        return problems
    try:
        expected = build_matrix(sources, host=str(matrix.get("host", "")), created_at=str(matrix.get("created_at")))
    except UsageError as error:
        return [str(error)]
    for index, (row, right) in enumerate(zip(rows, expected["rows"], strict=False)):
        for key in sorted({*row, *right}):
            if row.get(key) != right.get(key):
                source_name = right["report_ref"] or "models/medpsy.yaml"
                problems.append(f"rows[{index}].{key}: is {row.get(key)!r}, but {right.get(key)!r} by {source_name}")
    if len(rows) != len(expected["rows"]):
        problems.append(f"rows: are {len(rows)}, but {len(expected['rows'])} belong here")
    problems += [
        f"{key}: does not follow from the rows and the policy"
        for key in sorted({*matrix, *expected} - {"rows"})
        if matrix.get(key) != expected.get(key)
    ]
    return problems


def _row(**values: object) -> dict[str, Any]:
    """A row with all keys of the schema in their order; what is not given is None."""
    keys = (
        "runtime",
        "version",
        "artifact_kind",
        "backend",
        "host",
        "gpu",
        "execution_engine",
        "artifact_sha256",
        "synthetic",
        "status",
        "max_new_tokens",
        "repeats",
        "mean_decode_tokens_per_second",
        "best_warm_decode_tokens_per_second",
        "report_ref",
        "reason",
    )
    return dict.fromkeys(keys) | {"artifact_kind": "gguf"} | values


def _verdict(
    rows: Sequence[Mapping[str, Any]], gpu: str, sha256: str, claim: Mapping[str, Any]
) -> tuple[float | None, str]:
    """Our rate over the fastest comparator's on this GPU and file, or None, and the reason in words."""
    here = [
        row
        for row in rows
        if row["status"] == "measured" and (row["gpu"], row["artifact_sha256"]) == (gpu, sha256)
    ]  # fmt: skip
    ours = [row for row in here if row["execution_engine"] == ENGINE and row.get("decode_row") == "chained"]
    best: tuple[float, str] | None = None
    obstacles = []
    for mine in ours:
        theirs = [row for row in here if not str(row["execution_engine"]).startswith("psionic_")]
        paired = [row for row in theirs if row.get("session") and row.get("session") == mine.get("session")]
        if not paired:
            obstacles.append("no comparator was measured interleaved with psigraph (same session)")
            continue
        obstacle = next((why for row in paired if (why := unlike(mine, row, claim["least_repeats"]))), "")
        if mine["max_new_tokens"] != claim["prompt_contract"]["max_new_tokens"]:
            due = claim["prompt_contract"]["max_new_tokens"]
            obstacle = f"the row generates {mine['max_new_tokens']} tokens, the claim speaks of {due}"
        if obstacle:
            obstacles.append(obstacle)
            continue
        fastest = max(paired, key=lambda row: row["median_decode_tokens_per_second"])
        our_rate, their_rate = mine["median_decode_tokens_per_second"], fastest["median_decode_tokens_per_second"]
        share = our_rate / their_rate
        why = (
            f"psigraph {our_rate:.2f} tok/s against {fastest['runtime']} {their_rate:.2f} tok/s "
            f"(medians of {mine['repeats']} and {fastest['repeats']}, interleaved, same file): {share:.2f} x"
        )
        # Of several sessions the worst one speaks: a good day proves nothing.
        if best is None or share < best[0]:
            best = (share, why)
    if best is not None:
        return best
    return None, obstacles[0] if obstacles else "no chained row of psigraph"


def unlike(left: Mapping[str, Any], right: Mapping[str, Any], least_repeats: int = 1) -> str:
    """Why two measured rows may not stand side by side, "" where they may."""
    for row in (left, right):
        if row.get("kv_type", report.KV_TYPES[0]) != report.KV_TYPES[0]:
            return f"{row['runtime']}: its KV cache is {row['kv_type']}, comparisons are of {report.KV_TYPES[0]} caches"
    for key in ("artifact_sha256", "gpu", "backend", "max_new_tokens", "depth"):
        if left.get(key) != right.get(key):
            return f"{right['runtime']}: {key} differs ({left.get(key)} and {right.get(key)})"
    for row in (left, right):
        if row.get("gpu_idle") is not True:
            return f"{row['runtime']}: the GPU was not idle"
        if not row.get("work_per_token"):
            return f"{row['runtime']}: its work per token is not stated"
        if (row.get("repeats") or 0) < least_repeats:
            return f"{row['runtime']}: fewer than {least_repeats} repeats"
    return ""
