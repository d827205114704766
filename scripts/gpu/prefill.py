"""Prompts on a GPU: numbers against token by token, then times, by own kernels and by cuBLASLt. Under 90 s on an H100.

    python scripts/gpu/prefill.py [--model FILE] [--size 1.7b] [--skip-numbers] [--long 8192]

Without --model a synthetic Q4_K_M file of that size is written to a temporary folder. Its last lines are the table; a
mistake in the numbers ends it with status 1, after the table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from psigraph.ir.errors import PsigraphError
from psigraph.ir.program import PREFILL, Launch, LibraryProduct, Step
from psigraph.options import SessionOptions
from psigraph.runtime.engine import Engine
from psigraph.runtime.measuring import step_times
from psigraph.runtime.program import captured
from psigraph.runtime.synth.model import write_synth
from psigraph.session import Session, open_session

TINY = Path(__file__).parents[2] / "fixtures" / "tiny"
LENGTHS = (1, 2, 31, 32, 33, 511, 512, 513)
MEAN_KL, LARGEST_KL = 2e-4, 1e-3
CHUNK, REPEATS = 512, 20
WAYS = ("own", "library")
BACKEND = os.environ.get("PSIGRAPH_PREFILL_BACKEND", "cuda")  # host: to try the script itself out


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    def log_probabilities(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max()
        return np.asarray(shifted - np.log(np.exp(shifted).sum()))

    p, q = log_probabilities(reference), log_probabilities(other)
    return float((np.exp(p) * (p - q)).sum())


def numbers(quant: str, ways: tuple[str, ...]) -> list[str]:
    """Lines about one of the tiny files; those that begin with WRONG fail the run."""
    path, lines = TINY / f"tiny-qwen3-{quant}.gguf", []
    ids = [int(token) for token in np.random.default_rng(7).integers(0, 4000, max(LENGTHS))]
    with np.load(TINY / "reference_logits.npz") as stored:
        text, exact = stored["ids"].tolist(), stored[f"logits_{quant}"]
    by_steps: dict[int, np.ndarray] = {}
    with open_session(path, SessionOptions(BACKEND, outputs=("logits",), prefill="off")) as session:

        def keep(index: int) -> None:
            if index + 1 in LENGTHS:
                by_steps[index + 1] = session.engine.logits()

        session.engine.feed(ids, keep)
    for way in ways:
        with open_session(path, SessionOptions(BACKEND, outputs=("logits",), prefill=way)) as session:
            found, other, again, tokens = [], 0, True, []
            for length in LENGTHS:
                logits = []
                for _ in range(2):
                    session.reset()
                    session.feed(ids[:length])
                    logits.append(session.engine.logits())
                again = again and logits[0].tobytes() == logits[1].tobytes()
                best = np.sort(by_steps[length])[-2:]
                other += best[1] - best[0] > 0.05 and int(logits[0].argmax()) != int(by_steps[length].argmax())
                found.append(divergence(by_steps[length], logits[0]))
            reference = []
            for length in range(9, len(text) + 1):
                session.reset()
                session.feed(text[:length])
                reference.append(divergence(exact[length - 1], session.engine.logits()))
            for _ in range(2):
                session.reset()
                session.feed(ids[:300])
                tokens.append([token for chunk in session.decode(32) for token in chunk])
            note = "" if way in session.prefill or "cuBLAS" in session.prefill else session.prefill
        good = np.mean(reference) <= MEAN_KL and np.max(reference) <= LARGEST_KL and np.max(found) <= MEAN_KL
        good = good and not other and again and tokens[0] == tokens[1] and not note
        lines.append(
            f"{'' if good else 'WRONG '}{quant} {way}: KL from float64 mean {np.mean(reference):.1e} largest "
            f"{np.max(reference):.1e}; from token by token, 1 to 513 tokens, largest {np.max(found):.1e}; "
            f"{other} other choices; {'repeats' if again and tokens[0] == tokens[1] else 'DOES NOT REPEAT'} {note}"
        )
    return lines


def alone(engine: Engine, launch: Launch | LibraryProduct) -> float:
    """Milliseconds of a launch among copies of itself, in a graph: what it takes without a cold start."""
    copies, stream = 20, engine.stream

    def launch_all() -> None:
        for _ in range(copies):
            engine.launch(launch)

    graph, executable = captured(stream, launch_all)
    try:
        times = step_times(stream, lambda: stream.call("cuGraphLaunch", executable, stream.handle), 7)[2:]
        return float(np.median(times)) / 1e3 / copies
    finally:
        engine.driver.call("cuGraphExecDestroy", executable)
        engine.driver.call("cuGraphDestroy", graph)


def name_of(launch: Launch | LibraryProduct) -> str:
    return launch.kernel if isinstance(launch, Launch) else "library product"


def breakdown(engine: Engine, step: Step) -> list[str]:
    """A line a kind of launch: how many, each alone, together, and the rate of products."""
    of = {out.name: node for node in step.graph.nodes for out in node.outs}
    kinds: dict[tuple[object, ...], list[Launch | LibraryProduct]] = {}
    for launch in step.launches:
        sizes = (launch.grid,) if isinstance(launch, Launch) else (launch.rows, launch.columns, launch.add)
        kinds.setdefault((name_of(launch), *sizes), []).append(launch)
    lines, total = [], 0.0
    for launches in kinds.values():
        launch = launches[0]
        each = alone(engine, launch)
        total += each * len(launches)
        node, elements = of[launch.nodes[0]], 0
        if isinstance(launch, LibraryProduct):
            elements = launch.rows * launch.columns
        elif launch.kernel.startswith(f"{PREFILL}_matvec") and not launch.kernel.endswith("_end"):
            elements = sum(value.type.size for value in node.ins if value.name.endswith(".weight"))
        rate = f"{2 * elements * step.rows / each / 1e9:7.0f} TFLOP/s" if elements else ""
        several = f"{len(launches):4} x {1e3 * each:8.1f} us = {each * len(launches):7.3f} ms"
        lines.append(f"  {name_of(launch):24} {node.op:14} {several} {rate}")
    return [*lines, f"  {'sum of kernels alone':39} {'':17} {total:9.3f} ms"]


def feed_ms(session: Session, ids: list[int]) -> float:
    """Wall-clock milliseconds until the first token is known."""
    session.reset()
    session.engine.synchronize()
    began = time.perf_counter()
    session.feed(ids)
    session.engine.chosen()
    return 1e3 * (time.perf_counter() - began)


def speed(path: Path, way: str, long: int) -> tuple[list[str], str]:
    """(lines, the table's line)."""
    with open_session(path, SessionOptions(BACKEND, ctx=long + 64, prefill=way)) as session:
        engine = session.engine
        assert isinstance(engine, Engine)
        before = engine.arena_bytes
        if not engine.prepare_prefill():
            return [f"{way}: {engine.prefill_way}"], f"{way:8} {engine.prefill_way}"
        step = engine.program.step(PREFILL)
        size = (engine.arena_bytes - before) / 2**20
        ids = [int(token) for token in np.random.default_rng(1).integers(0, session.vocabulary, long)]
        short = [feed_ms(session, ids[: CHUNK + 1]) for _ in range(REPEATS + 2)][2:]
        exact = [feed_ms(session, ids[:CHUNK]) for _ in range(REPEATS)]
        whole = [feed_ms(session, ids) for _ in range(3)]
        lines = [f"{way} ({engine.prefill_way}): {size:.0f} MiB of its own, {len(step.launches)} launches"]
        chunks = {}
        for position in (0, long - CHUNK):
            chunks[position] = float(np.median(engine.chunk_times(ids[:CHUNK], REPEATS + 2, position)[2:])) / 1e3
            lines.append(f"chunk of {CHUNK} at {position:,}: {chunks[position]:.3f} ms, as a graph; its kernels alone:")
            lines += breakdown(engine, step)
        lines.append(f"launches: {dict(Counter(map(name_of, step.launches)))}")
        rate, first, all_of = 1e3 * CHUNK / chunks[0], statistics.median(exact), statistics.median(whole)
        late, once_more = chunks[long - CHUNK], statistics.median(short)
        row = (
            f"{way:8} chunk {chunks[0]:7.2f} ms {rate:8,.0f} tok/s | last chunk of {long:,} {late:7.2f} ms | "
            f"512 to first token {first:7.2f} ms, {1e3 * 512 / first:8,.0f} tok/s (513: {once_more:.2f} ms) | "
            f"{long:,} to first token {all_of:8.1f} ms {1e3 * long / all_of:8,.0f} tok/s"
        )
        return lines, row


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--size", default="1.7b")
    parser.add_argument("--skip-numbers", action="store_true")
    parser.add_argument("--long", type=int, default=8192)
    options = parser.parse_args()
    began, ways, table = time.perf_counter(), list(WAYS), []
    try:
        open_session(TINY / "tiny-qwen3-q8_0.gguf", SessionOptions(BACKEND, prefill="library")).close()
    except PsigraphError as error:
        table.append(f"library: {error}")
        ways.remove("library")
    if not options.skip_numbers:
        for quant in ("q4_k_m", "q8_0"):
            table += numbers(quant, tuple(ways))
            print(table[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or write_synth(Path(folder) / "synth.gguf", options.size, "q4_k_m", 1)
        print(f"model ready after {time.perf_counter() - began:.0f} s", flush=True)
        for way in ways:
            lines, row = speed(path, way, options.long)
            print("\n".join(lines), flush=True)
            table.append(row)
    print(f"\n== prefill, {time.perf_counter() - began:.0f} s")
    print("\n".join(table))
    return 1 if any("WRONG" in line for line in table) else 0


if __name__ == "__main__":
    sys.exit(main())
