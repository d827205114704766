"""What each part of the design is worth: a step, or a prompt's chunk, with one pass or feature off: `psigraph ablate`.

Every row is a median over whole dependent steps with cold weights, on the same GPU and in
the same process as the row with everything on. That one is measured again when its session
has done its other rows, so that the program and its memory are the same, and told last:
what the two full rows differ by is the noise of the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..codegen.lower import PREFILL_ROWS
from ..ir.errors import UsageError
from ..ir.program import Program
from ..ir.regime import Regime
from ..options import Filling, SessionOptions
from ..passes.pipeline import PIPELINE
from ..session import Session
from .measure import Work, environment, filler_ids, prepared

SCHEMA = "psigraph.ablation.v1"
FULL = "everything on"
STEPS = 100
FILLING = Filling("--depth and --steps", "lower one of them")
Report = Callable[["Row"], None]


@dataclass(frozen=True)
class Row:
    """One variant: what was off, kernels in a step, median microseconds and the middle half's width.

    prompt_us: median microseconds that a prompt takes to go in; None where none was measured, or none can change.
    """

    off: str
    kernels: int
    step_us: float
    spread_us: float
    prompt_us: float | None = None

    def record(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def ablate(
    path: str | os.PathLike[str],
    options: SessionOptions,
    *,
    depth: int = 256,
    steps: int = STEPS,
    prompt_tokens: int = 0,
    report: Report | None = None,
    on_start: Callable[[Session], None] | None = None,
    **preparing: Any,
) -> dict[str, Any]:
    """All rows, as a record of schema `psigraph.ablation.v1`.

    options: for the backend "cuda" or "host". prompt_tokens: of the prompt that every row whose pass works on prompts
    takes in too, at most a chunk's; 0: none. preparing: options of `measure.prepared`. on_start: called with the first
    session, before anything is measured.
    """
    backend = options.backend
    if backend not in ("cuda", "host"):
        raise UsageError(f"--backend {backend}: a pass is worth something in kernels; take cuda, or host to try it out")
    if prompt_tokens > PREFILL_ROWS:
        raise UsageError(f"--prompt-tokens {prompt_tokens}: one chunk is measured, of at most {PREFILL_ROWS} tokens")
    work = Work((0,), steps + steps // 4, 1, "chained", depth)
    rows: list[Row] = []
    again: list[Row] = []
    where: dict[str, Any] = {}

    def keep(row: Row) -> None:
        rows.append(row)
        if report:
            report(row)

    preparing |= {"filling": FILLING, "prompt_tokens": prompt_tokens}
    for name, disable, of_prompts in _variants():
        with prepared(path, work, replace(options, disable=disable), **preparing) as bench:
            prompt = prompt_tokens if of_prompts else 0
            bench.session.expect_prompt(prompt)
            if on_start and not rows:
                on_start(bench.session)
            where = where or environment(bench.session, bench.snapshot)
            keep(_measure(bench.session, name, work, steps, prompt))
            if name == FULL and bench.session.program is not None:
                for feature, change in FEATURES if bench.session.program.programmatic else ():
                    keep(_without_feature(bench.session, feature, change, work, steps))
                again.append(_measure(bench.session, f"{FULL}, again", work, steps, prompt))
    for row in again:
        keep(row)
    return {
        "schema": SCHEMA,
        "model_path": str(path),
        "backend": backend,
        "depth": depth,
        **({"prompt_tokens": prompt_tokens} if prompt_tokens else {}),
        "environment": where,
        "rows": [row.record() for row in rows],
    }


def _variants() -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """What is off, the passes that are, and whether prompts can change by it."""
    yield FULL, (), True
    optional = [entry for entry in PIPELINE if not entry.lowering]
    for entry in optional:
        yield f"pass {entry.name}", (entry.name,), Regime.MANY in entry.regimes
    yield "all passes", tuple(entry.name for entry in optional), True


def _plain_edges(program: Program) -> Program:
    step = program.step()
    plain = tuple(replace(launch, programmatic=False) for launch in step.kernels)
    return program.with_step(replace(step, launches=plain))


# Features of the Program that are no pass: name -> what turns one off.
FEATURES: Sequence[tuple[str, Callable[[Program], Program]]] = (("programmatic edges", _plain_edges),)


def _without_feature(session: Session, name: str, change: Callable[[Program], Program], work: Work, steps: int) -> Row:
    from ..runtime.engine import Engine

    engine = session.engine
    assert isinstance(engine, Engine)
    program, compiled = engine.program, engine.compiled
    engine.adopt(change(program), compiled)
    try:
        return _measure(session, name, work, steps)
    finally:
        engine.adopt(program, compiled)


def _measure(session: Session, name: str, work: Work, steps: int, prompt_tokens: int = 0) -> Row:
    session.reset()
    session.feed(filler_ids(max(1, work.depth), session.vocabulary))
    session.engine.step_times(steps // 4)
    times = session.engine.step_times(steps)
    low, middle, high = np.percentile(times, [25, 50, 75])
    kernels = len(session.program.step().launches) if session.program is not None else len(session.graph.nodes)
    prompt_us = _prompt_us(session, prompt_tokens, max(3, steps // 4)) if prompt_tokens else None
    return Row(name, kernels, float(middle), float(high - low), prompt_us)


def _prompt_us(session: Session, tokens: int, count: int) -> float:
    """Of one chunk at position 0, after one that nobody times."""
    from ..runtime.engine import Engine

    assert isinstance(session.engine, Engine)
    return float(np.median(session.engine.chunk_times(filler_ids(tokens, session.vocabulary), count + 1)[1:]))
