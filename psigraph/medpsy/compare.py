"""A session that measures psigraph and the user's own tools in turns on one file, and writes their reports.

Turns are interleaved (ours, A, B, ours, A, B, ...), so that clocks and temperature drift for all alike. A tool that
cannot run becomes a report with the reason. Ours comes from a function, so that this file knows no engine.
"""

from __future__ import annotations

import platform
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..bench.gpu_state import GpuState
from ..bench.report import KV_TYPES, kv_type_of, merge_reports, validate_report
from ..ir.errors import PsigraphError, UsageError
from .comparator_report import build_comparator_report
from .comparators import Comparator, Job, NotRun
from .policy import Policy

# run_bench(model path, prompt ids, max_new_tokens, backend) -> a report of one warm run
RunBench = Callable[[str, Sequence[int], int, str], Mapping[str, Any]]


@dataclass(frozen=True)
class Session:
    """ours: one merged report. theirs: one report a tool, in the order given."""

    name: str
    ours: Mapping[str, Any]
    theirs: tuple[Mapping[str, Any], ...]


def run_session(
    job: Job,
    comparators: Sequence[Comparator],
    run_bench: RunBench,
    state: GpuState,
    *,
    repeats: int = 3,
    host: str = "",
    session: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Session:
    """Measure `repeats` turns of each, ours first in every round.

    state: of the GPU before the session. say: takes one line of progress at a time.
    Raises what run_bench raises, and UsageError where its report is of other work than asked for.
    """
    name = session or uuid.uuid4().hex
    host = host or platform.node()
    reasons: dict[int, NotRun] = {}
    samples: dict[int, list[float]] = {index: [] for index in range(len(comparators))}
    raw: dict[int, list[object]] = {index: [] for index in range(len(comparators))}
    ours = []
    try:
        for index, tool in enumerate(comparators):
            try:
                tool.prepare(job)
            except NotRun as reason:
                reasons[index] = reason
                say(f"{tool.runtime}: {reason}")
        for turn in range(repeats):
            report = run_bench(str(job.model), job.prompt_ids, job.max_new_tokens, job.backend)
            _check_ours(report, job)
            ours.append(report)
            say(f"turn {turn + 1}/{repeats} psigraph: {report['mean_decode_tokens_per_second']:.2f} tok/s")
            for index, tool in enumerate(comparators):
                if index in reasons:
                    continue
                try:
                    result = tool.turn(job)
                except NotRun as reason:
                    reasons[index] = reason
                    say(f"{tool.runtime}: {reason}")
                    continue
                samples[index].append(result.tokens_per_second)
                raw[index].append(dict(result.raw))
                say(f"turn {turn + 1}/{repeats} {tool.runtime}: {result.tokens_per_second:.2f} tok/s")
    finally:
        for tool in comparators:
            tool.close()
    merged = merge_reports(ours, session=name)
    merged["environment"] |= {"host": host}
    if job.backend == "cuda":
        merged["environment"] |= {"gpu_idle": state.idle, "gpu_processes": list(state.processes)}
    theirs = []
    for index, tool in enumerate(comparators):
        stopped = reasons.get(index)
        theirs.append(
            build_comparator_report(
                runtime=tool.runtime,
                status=stopped.status if stopped else "measured",
                reason=str(stopped) if stopped else "",
                sha256=job.sha256,
                synthetic=merged["artifact"]["synthetic"],
                session=name,
                max_new_tokens=job.max_new_tokens,
                # A tool that failed midway is no row of fewer repeats: its samples are dropped with the reason kept.
                samples=[] if stopped else samples[index],
                raw=[] if stopped else raw[index],
                version=tool.version,
                backend=job.backend,
                host=host,
                gpu=str(merged["environment"].get("gpu", state.gpu)),
                gpu_idle=state.idle,
                work_per_token=tool.work_per_token,
                command=tool.command,
            )
        )
    return Session(name, merged, tuple(theirs))


def settle(decision: Mapping[str, Any], session: Session, policy: Policy) -> tuple[bool, str]:
    """Whether this session settled the claim, and the verdict in one line.

    It does where the real artifact ran on the claim's GPU beside at least one measured tool; the verdict itself
    may be yes or no.
    """
    gpu = str(session.ours["environment"].get("gpu", ""))
    state = GpuState(gpu, idle=session.ours["environment"].get("gpu_idle") is True)
    obstacle = cannot_settle(session.ours["artifact"]["sha256"], state, policy)
    if obstacle:
        return False, f"not settled: {obstacle}"
    if not any(report["status"] == "measured" for report in session.theirs):
        return False, "not settled: no other engine was measured"
    if not any(
        entry["gpu"] == gpu and entry["share_of_fastest_comparator"] is not None for entry in decision["by_host"]
    ):
        return False, f"not settled: {decision['why']}"
    answer = "parity" if decision["can_claim_parity"] else "no parity"
    return True, f"settled: {answer}; {decision['why']}"


def cannot_settle(sha256: str, state: GpuState, policy: Policy) -> str:
    """Why a session on this file and GPU could not settle the claim, "" where it could: asked before measuring."""
    claim = policy.data["claim"]
    if sha256 != claim["artifact_sha256"]:
        return f"the file is not the real artifact (sha256 {claim['artifact_sha256']}, this one {sha256})"
    if claim["gpu"] not in state.gpu:
        return f"this machine has {state.gpu or 'no GPU'}, the claim speaks of an {claim['gpu']}"
    if not state.idle:
        return "the GPU is not idle" + (f" ({'; '.join(state.processes)})" if state.processes else "")
    return ""


def _check_ours(report: Mapping[str, Any], job: Job) -> None:
    problems = validate_report(report)
    if problems:
        raise PsigraphError(f"psigraph bench gave a report that contradicts itself: {problems[0]}")
    asked = {
        "prompt_tokens": list(job.prompt_ids),
        "max_new_tokens": job.max_new_tokens,
        "backend": job.backend,
    }
    if kv_type_of(report) != KV_TYPES[0]:  # what the tools beside it hold
        raise UsageError(f"psigraph bench: kv_type is {kv_type_of(report)}, comparisons are of {KV_TYPES[0]} caches")
    for key, value in asked.items():
        if report[key] != value:
            raise UsageError(f"psigraph bench: {key} is {report[key]}, asked for was {value}")
    if report["artifact"]["sha256"] != job.sha256:
        raise UsageError("psigraph bench: measured another file than the one given (artifact.sha256 differs)")
