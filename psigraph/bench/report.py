"""The benchmark report, schema `psionic.medpsy.bench.v1`: built in one place, checked in one place.

Every derived figure (means, rates, shares) is computed here from the runs and recomputed by `validate_report`,
so that a figure edited by hand shows. Rates are tokens per second of generation alone: load, compile and capture
have fields of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import mean
from typing import Any

from ..ir.errors import UsageError
from ..json_file import check_writable, json_text, read_json, write_json_atomically
from ..medpsy.policy import Policy, load_policy

__all__ = [
    "ENGINES",
    "SCHEMA",
    "build_report",
    "check_writable",
    "json_text",
    "kv_type_of",
    "merge_reports",
    "read_json",
    "validate_report",
    "write_json_atomically",
]

SCHEMA = "psionic.medpsy.bench.v1"
ENGINES = {"cuda": "psionic_qwen3_cuda", "cpu": "psionic_qwen3_cpu", "host": "psionic_qwen3_host"}
DECODE_ROWS = {
    "chained": "the device's argmax feeds the next step; tokens reach the host in chunks; no logits read back",
    "forced": "given token ids; a host synchronization and full logits on the host for every token",
    "text": "as generate and chat do it: tokens reach the host as they come, and become text if the tokenizer is known",
}
# Types of KV cache; a report that names none is older than the choice. Claims and comparators speak of the first.
KV_TYPES = ("f16", "q8", "f32")
_CACHE = re.compile(r"(\w+) cache\b")
# Figures are stored as computed, so that only the printing of floats can differ.
_RELATIVE = 1e-9
_SHA256 = re.compile(r"[0-9a-f]{64}")


def build_report(
    *,
    model_path: str,
    model_size: str,
    backend: str,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    runs: Sequence[Mapping[str, Any]],
    sha256: str,
    policy: Mapping[str, Any],
    environment: Mapping[str, Any],
    artifact: Mapping[str, Any],
    timings: Mapping[str, Any],
    roofline: Mapping[str, Any] | None = None,
    kernels: Sequence[Mapping[str, Any]] = (),
    decode_row: str = "chained",
    depth: int = 0,
    kv_type: str = KV_TYPES[0],
    sampler: Mapping[str, Any] | None = None,
    session: str | None = None,
    created_at: str | None = None,
) -> dict[str, Any]:
    """A report, ready to write.

    backend: "cuda", "host" or "cpu"; names the execution engine. runs: {generated_tokens: ids, total_ms,
    stopped_on_eos, and decode_ms where generation alone took less than the total}, milliseconds.
    sha256: of the model file. policy: `Admission.record()`. environment: {gpu, gpu_idle, driver, cuda, ...};
    `stand_in_driver: True` there forbids the backend "cuda". artifact: {synthetic, quant_mix, bytes_per_token,
    ...}; sha256, admitted and tier are added. timings: {load_ms, compile_ms, capture_ms, first_token_ms, ...}.
    roofline: {read_bandwidth_gb_s, bytes_per_token} measured in this process, or None (no GPU); share and
    validity are added. kernels: [{name, us, bytes}]. decode_row: one of DECODE_ROWS. depth: positions filled before the
    first measured token. sampler: how tokens were drawn (`SamplerSettings.record`); None: the likeliest were taken.
    kv_type: what the KV cache held, as the environment says it too. session: an identifier shared by all rows measured
    interleaved.

    Raises UsageError for a backend that this environment may not claim and for runs without tokens or time.
    """
    if backend not in ENGINES:
        raise UsageError(f"backend {backend!r}: use one of {', '.join(ENGINES)}")
    if backend == "cuda" and environment.get("stand_in_driver"):
        raise UsageError("backend 'cuda': kernels ran on a stand-in driver; report them as backend 'host'")
    if decode_row not in DECODE_ROWS:
        raise UsageError(f"decode_row {decode_row!r}: use one of {', '.join(DECODE_ROWS)}")
    if kv_type not in KV_TYPES or environment.get("kv_type", kv_type) != kv_type:
        raise UsageError(f"kv_type {kv_type!r}: use one of {', '.join(KV_TYPES)}, the one that the environment names")
    if not runs:
        raise UsageError("runs: a report needs at least one")
    engine = ENGINES[backend]
    rows = [_run(index, run, engine, sha256) for index, run in enumerate(runs)]
    admission = {key: value for key, value in policy.items() if key != "medical_policy"}
    mean_rate = mean(row["decode_tokens_per_second"] for row in rows)
    report = {
        "schema": SCHEMA,
        "created_at": created_at or datetime.now(UTC).isoformat(timespec="seconds"),
        "model_path": model_path,
        "model_size": model_size,
        "artifact_kind": "gguf",
        "backend": backend,
        "execution_engine": engine,
        "decode_row": decode_row,
        "work_per_token": DECODE_ROWS[decode_row],
        "depth": depth,
        "kv_type": kv_type,
        "sampler": dict(sampler) if sampler is not None else None,
        "prompt_tokens": [int(token) for token in prompt_ids],
        "max_new_tokens": max_new_tokens,
        "end_tokens_ignored": True,
        "repeats": len(rows),
        "runs": rows,
        "runs_identical": all(row["generated_tokens"] == rows[0]["generated_tokens"] for row in rows),
        "mean_total_ms": mean(row["total_ms"] for row in rows),
        "mean_decode_tokens_per_second": mean_rate,
        "best_decode_tokens_per_second": max(row["decode_tokens_per_second"] for row in rows),
        "medical_policy": dict(policy["medical_policy"]),
        "admission": admission,
        "environment": dict(environment),
        "artifact": {
            **artifact,
            "sha256": sha256,
            "tier": admission["tier"],
            "admitted": bool(admission["admitted"]) and not artifact["synthetic"],
        },
        "timings": dict(timings),
        "roofline": _roofline(roofline, mean_rate, str(environment.get("gpu", "")), load_policy()),
        "kernels": [dict(kernel) for kernel in kernels],
    }
    if session is not None:
        report["session"] = session
    return report


def merge_reports(reports: Sequence[Mapping[str, Any]], session: str | None = None) -> dict[str, Any]:
    """One report with the runs of several reports of the same work, in their order.

    Interleaved measurements come as one report a turn. Environment, timings and kernels are the first one's; the
    bandwidth is the lowest probed. Raises UsageError naming the first field in which the work differs.
    """
    if not reports:
        raise UsageError("reports to merge: none given")
    first = reports[0]
    for other in reports[1:]:
        for key in ("backend", "prompt_tokens", "max_new_tokens", "decode_row", "depth", "model_size", "sampler"):
            if other.get(key) != first.get(key):
                there = f"{first.get(key)} and {other.get(key)}"
                raise UsageError(f"{key}: reports of unlike work cannot be merged ({there})")
        if kv_type_of(other) != kv_type_of(first):
            types = f"{kv_type_of(first)} and {kv_type_of(other)}"
            raise UsageError(f"kv_type: reports of unlike work cannot be merged ({types})")
        for key in ("gpu", "sha256"):
            part = "artifact" if key == "sha256" else "environment"
            if other[part].get(key) != first[part].get(key):
                raise UsageError(f"{part}.{key}: reports of unlike work cannot be merged")
    probes = [report["roofline"] for report in reports if report["roofline"]]
    lowest = min(probes, key=lambda probe: probe["read_bandwidth_gb_s"]) if probes else None
    idle = all(report["environment"].get("gpu_idle") is True for report in reports)
    environment = {**first["environment"], **({"gpu_idle": idle} if "gpu_idle" in first["environment"] else {})}
    return build_report(
        model_path=first["model_path"],
        model_size=first["model_size"],
        backend=first["backend"],
        prompt_ids=first["prompt_tokens"],
        max_new_tokens=first["max_new_tokens"],
        runs=[run for report in reports for run in report["runs"]],
        sha256=first["artifact"]["sha256"],
        policy={**first["admission"], "medical_policy": first["medical_policy"]},
        environment=environment,
        artifact=first["artifact"],
        timings=first["timings"],
        roofline=lowest,
        kernels=first["kernels"],
        decode_row=first["decode_row"],
        depth=first["depth"],
        kv_type=kv_type_of(first),
        sampler=first.get("sampler"),
        session=session or first.get("session"),
    )


def kv_type_of(report: Mapping[str, Any]) -> str:
    """The type of the KV cache that a report is about."""
    return str(report.get("kv_type", KV_TYPES[0]))


def validate_report(report: Mapping[str, Any], policy: Policy | None = None) -> list[str]:
    """Everything wrong with a report, one line each: shape, types, figures that do not follow from its runs.

    An empty list means that it is well formed and agrees with itself and with the policy; not that it is true.
    """
    policy = policy or load_policy()
    problems = _shape_problems(report)
    if problems:
        return problems
    problems += _engine_problems(report)
    problems += _cache_problems(report)
    problems += _run_problems(report)
    problems += _artifact_problems(report, policy)
    problems += _roofline_problems(report, policy)
    if dict(report["medical_policy"]) != policy.benchmark_record():
        problems.append("medical_policy: differs from the policy that ships with psigraph")
    return problems


def same_figure(left: object, right: object) -> bool:
    """Whether two numbers are the same up to the printing of floats."""
    return (
        isinstance(left, int | float)
        and isinstance(right, int | float)
        and math.isclose(left, right, rel_tol=_RELATIVE, abs_tol=0.0)
    )


def _run(index: int, run: Mapping[str, Any], engine: str, sha256: str) -> dict[str, Any]:
    tokens = [int(token) for token in run["generated_tokens"]]
    total_ms = float(run["total_ms"])
    decode_ms = float(run.get("decode_ms", total_ms))
    if not tokens or not decode_ms > 0 or decode_ms > total_ms:
        raise UsageError(f"runs[{index}]: needs tokens, and a time of generation that lies within the total")
    return {
        "run_index": index,
        "generated_tokens": tokens,
        "output_tokens": len(tokens),
        "execution_engine": engine,
        "stopped_on_eos": bool(run["stopped_on_eos"]),
        "total_ms": total_ms,
        "decode_ms": decode_ms,
        "decode_tokens_per_second": 1e3 * len(tokens) / decode_ms,
        "model_artifact_sha256": sha256,
    }


def _roofline(roofline: Mapping[str, Any] | None, rate: float, gpu: str, policy: Policy) -> dict[str, Any] | None:
    if roofline is None:
        return None
    bandwidth = float(roofline["read_bandwidth_gb_s"])
    bytes_per_token = float(roofline["bytes_per_token"])
    floor = policy.bandwidth_floor(gpu)
    return {
        "read_bandwidth_gb_s": bandwidth,
        "bytes_per_token": bytes_per_token,
        "share_of_read_bandwidth": rate * bytes_per_token / (bandwidth * 1e9),
        "valid": floor is None or bandwidth >= floor,
    }


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": str,
    "created_at": str,
    "model_path": str,
    "model_size": str,
    "artifact_kind": str,
    "backend": str,
    "execution_engine": str,
    "decode_row": str,
    "depth": int,
    "prompt_tokens": list,
    "max_new_tokens": int,
    "repeats": int,
    "runs": list,
    "mean_total_ms": (int, float),
    "mean_decode_tokens_per_second": (int, float),
    "medical_policy": dict,
    "admission": dict,
    "environment": dict,
    "artifact": dict,
    "timings": dict,
    "kernels": list,
}
_RUN_FIELDS: dict[str, type | tuple[type, ...]] = {
    "run_index": int,
    "generated_tokens": list,
    "output_tokens": int,
    "execution_engine": str,
    "stopped_on_eos": bool,
    "total_ms": (int, float),
    "decode_ms": (int, float),
    "decode_tokens_per_second": (int, float),
    "model_artifact_sha256": str,
}
_ARTIFACT_FIELDS: dict[str, type | tuple[type, ...]] = {"sha256": str, "admitted": bool, "synthetic": bool, "tier": str}


def _missing(where: str, obj: object, fields: Mapping[str, type | tuple[type, ...]]) -> list[str]:
    if not isinstance(obj, Mapping):
        return [f"{where.rstrip('.')}: is no object"]
    problems = []
    for key, kind in fields.items():
        value = obj.get(key)
        if key not in obj:
            problems.append(f"{where}{key}: is missing")
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            problems.append(f"{where}{key}: has the wrong type ({type(value).__name__})")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{where}{key}: is not finite")
    return problems


def _shape_problems(report: Mapping[str, Any]) -> list[str]:
    problems = _missing("", report, _FIELDS)
    if problems:
        return problems
    if report["schema"] != SCHEMA:
        return [f"schema: is {report['schema']}, not {SCHEMA}"]
    problems += _missing("artifact.", report["artifact"], _ARTIFACT_FIELDS)
    for index, run in enumerate(report["runs"]):
        problems += _missing(f"runs[{index}].", run, _RUN_FIELDS)
    if problems:
        return problems
    ids_of = {"prompt_tokens": report["prompt_tokens"]}
    ids_of |= {f"runs[{index}].generated_tokens": run["generated_tokens"] for index, run in enumerate(report["runs"])}
    for where, ids in ids_of.items():
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            problems.append(f"{where}: holds something that is no token id")
    if "roofline" not in report:
        problems.append("roofline: is missing (null where there is no GPU)")
    elif report["roofline"] is not None:
        kinds = dict.fromkeys(("read_bandwidth_gb_s", "bytes_per_token", "share_of_read_bandwidth"), (int, float))
        problems += _missing("roofline.", report["roofline"], kinds)
        if not problems and not all(report["roofline"][key] > 0 for key in kinds):
            problems.append("roofline: holds a figure that is not positive")
    for index, kernel in enumerate(report["kernels"]):
        problems += _missing(f"kernels[{index}].", kernel, {"name": str, "us": (int, float), "bytes": (int, float)})
    return problems


def _engine_problems(report: Mapping[str, Any]) -> list[str]:
    problems = []
    backend, engine = report["backend"], report["execution_engine"]
    if ENGINES.get(backend) != engine:
        problems.append(f"execution_engine: {engine} does not belong to backend {backend}")
    if backend == "cuda" and report["environment"].get("stand_in_driver"):
        problems.append("backend: what ran on a stand-in driver may not say cuda")
    if backend == "cuda" and not report["environment"].get("gpu"):
        problems.append("environment.gpu: a report of the backend cuda names its GPU")
    if backend == "cuda" and not isinstance(report["environment"].get("gpu_idle"), bool):
        problems.append("environment.gpu_idle: a report of the backend cuda says whether the GPU was idle")
    if report["decode_row"] not in DECODE_ROWS:
        problems.append(f"decode_row: {report['decode_row']} is none of {', '.join(DECODE_ROWS)}")
    return problems


def _cache_problems(report: Mapping[str, Any]) -> list[str]:
    """Wherever a report speaks of the KV cache it must name one type: a row in 8 bits may not pass for another."""
    found, environment = kv_type_of(report), report["environment"]
    said = [str(environment["kv_type"])] if "kv_type" in environment else []
    said += _CACHE.findall(str(environment.get("arithmetic", "")))
    if found not in KV_TYPES:
        return [f"kv_type: {found} is none of {', '.join(KV_TYPES)}"]
    return [f"kv_type: is {found}, but the environment says {other}" for other in said if other != found]


def _run_problems(report: Mapping[str, Any]) -> list[str]:
    runs = report["runs"]
    if not runs:
        return ["runs: holds none"]
    problems = []
    if report["repeats"] != len(runs):
        problems.append(f"repeats: is {report['repeats']}, but {len(runs)} runs are given")
    for index, run in enumerate(runs):
        where = f"runs[{index}]"
        if run["run_index"] != index:
            problems.append(f"{where}.run_index: is {run['run_index']}")
        if run["output_tokens"] != len(run["generated_tokens"]):
            problems.append(f"{where}.output_tokens: is not the number of its tokens")
        if not 0 < run["output_tokens"] <= report["max_new_tokens"]:
            problems.append(f"{where}.output_tokens: lies outside 1 to max_new_tokens")
        elif run["output_tokens"] < report["max_new_tokens"] and not run["stopped_on_eos"]:
            problems.append(f"{where}.output_tokens: fewer than max_new_tokens, and no end token stopped the run")
        if not 0 < run["decode_ms"] <= run["total_ms"]:
            problems.append(f"{where}.decode_ms: lies outside 0 to total_ms")
        elif not same_figure(run["decode_tokens_per_second"], 1e3 * run["output_tokens"] / run["decode_ms"]):
            problems.append(f"{where}.decode_tokens_per_second: does not follow from output_tokens and decode_ms")
        if run["execution_engine"] != report["execution_engine"]:
            problems.append(f"{where}.execution_engine: differs from the report's")
        if run["model_artifact_sha256"] != report["artifact"]["sha256"]:
            problems.append(f"{where}.model_artifact_sha256: differs from artifact.sha256")
    for key, source in (
        ("mean_total_ms", "total_ms"),
        ("mean_decode_tokens_per_second", "decode_tokens_per_second"),
    ):
        if not same_figure(report[key], mean(run[source] for run in runs)):
            problems.append(f"{key}: is not the mean of the runs")
    best = max(run["decode_tokens_per_second"] for run in runs)
    if not same_figure(report.get("best_decode_tokens_per_second", best), best):
        problems.append("best_decode_tokens_per_second: is not the best of the runs")
    identical = all(run["generated_tokens"] == runs[0]["generated_tokens"] for run in runs)
    if report.get("runs_identical", identical) is not identical:
        problems.append("runs_identical: does not follow from the runs")
    return problems


def _artifact_problems(report: Mapping[str, Any], policy: Policy) -> list[str]:
    artifact, admission = report["artifact"], report["admission"]
    problems = []
    if not _SHA256.fullmatch(artifact["sha256"]):
        problems.append("artifact.sha256: is no SHA-256 in lower-case hexadecimal digits")
    known = policy.artifact_of(artifact["sha256"])
    if artifact["admitted"] and (known is None or artifact["synthetic"] or admission.get("overridden")):
        problems.append("artifact.admitted: only a known digest, not synthetic and not overridden, is admitted")
    if artifact["synthetic"] and known is not None:
        problems.append("artifact.synthetic: this digest is the real artifact's")
    if admission.get("tier") != artifact["tier"]:
        problems.append("admission.tier: differs from artifact.tier")
    quantized = artifact["tier"] not in ("F16", "BF16", "F32", "F64")
    receipt = policy.receipt_warning.format(tier=artifact["tier"])
    warnings = admission.get("warnings")
    if quantized and not (isinstance(warnings, list) and receipt in warnings):
        problems.append("admission.warnings: a quantized route carries its receipt warning")
    return problems


def _roofline_problems(report: Mapping[str, Any], policy: Policy) -> list[str]:
    gpu = str(report["environment"].get("gpu", ""))
    computed = _roofline(report["roofline"], report["mean_decode_tokens_per_second"], gpu, policy)
    if computed is None:
        return []
    problems = []
    if not same_figure(report["roofline"]["share_of_read_bandwidth"], computed["share_of_read_bandwidth"]):
        problems.append("roofline.share_of_read_bandwidth: does not follow from rate, bytes and bandwidth")
    if not 0 < computed["share_of_read_bandwidth"] <= 1:
        problems.append("roofline.share_of_read_bandwidth: lies outside 0 to 1")
    if report["roofline"].get("valid") is not computed["valid"]:
        problems.append("roofline.valid: does not follow from the bandwidth that a probe must find on this GPU")
    return problems
