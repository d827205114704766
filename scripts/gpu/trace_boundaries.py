"""Where the time at each kernel boundary of a decode step goes, launch by launch.

    python scripts/gpu/trace_boundaries.py MODEL.gguf [--layer N] [--layers N] [--position N] [--target JSON]
                                                      [--shapes JSON] [--backend host]

A development tool beside `psigraph bench --profile`, which adds the launches of a kernel together. It reads the same
time stamps (`psigraph.bench.stamps`): when a launch's blocks were let through, and when their last warps ended; blocks
whose numbers are alike modulo 64 share a stamp. Times are microseconds after the last end of the kernel before,
`first/median/last` over the stamps. A first release is the hand-over; a wide span of releases or ends says that some
blocks hold up the step. --backend host tries the script out.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from psigraph.bench.stamps import PLACES, TRACE, profiled
from psigraph.bench.tune import target_of
from psigraph.codegen.lower import lower
from psigraph.ir.program import Launch
from psigraph.options import SessionOptions
from psigraph.runtime.cuda.compiler import compile_program
from psigraph.runtime.cuda.kernel_cache import KernelCache, default_cache_dir
from psigraph.runtime.engine import Engine
from psigraph.session import open_session

RUNS, STEPS = 9, 40


def one_run(engine: Engine, launches: int) -> tuple[np.ndarray, np.ndarray]:
    """(releases, ends) of one step: float64[launches, PLACES] microseconds, NaN where no block has the stamp."""
    engine.clear(TRACE)
    engine.step()
    stamps = engine.read(TRACE).view(np.uint64).reshape(-1, 2, PLACES)[:launches]
    used = stamps[:, 1] > 0
    start = (~stamps[:, 0][used]).min()
    releases, ends = ((~stamps[:, 0] - start) / 1e3, (stamps[:, 1] - start) / 1e3)
    return np.where(used, releases, np.nan), np.where(used, ends, np.nan)


def spans(times: np.ndarray) -> np.ndarray:
    """(first, median, last) of each launch: float64[launches, 3] of float64[launches, PLACES]."""
    return np.stack([np.nanmin(times, axis=1), np.nanmedian(times, axis=1), np.nanmax(times, axis=1)], axis=1)


def boundaries(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Spans of releases and of ends after the last end before, medians over runs: float64[launches - 1, 3] each."""
    releases, ends = [], []
    for released, ended in runs:
        last_end = np.nanmax(ended, axis=1)[:-1, None]
        releases.append(spans(released)[1:] - last_end)
        ends.append(spans(ended)[1:] - last_end)
    return np.median(releases, axis=0), np.median(ends, axis=0)


def show(launches: Sequence[Launch], releases: np.ndarray, ends: np.ndarray, layers: range) -> None:
    kinds: dict[str, list[int]] = {}
    for row, (before, launch) in enumerate(itertools.pairwise(launches)):
        boundary = f"{before.kernel:>22s} -> {launch.kernel:22s}"
        kinds.setdefault(boundary, []).append(row)
        if launch.layer in layers or row == len(launches) - 2:
            released, ended = ("/".join(f"{time:.2f}" for time in times[row]) for times in (releases, ends))
            print(f"{boundary} released {released}, ended {ended}")
    print(f"\n{'boundary':48s} times  hand-over   releases       ends   together")
    for boundary, rows in kinds.items():
        wide, tail = releases[rows, 2] - releases[rows, 0], ends[rows, 2] - ends[rows, 1]
        columns = (np.median(releases[rows, 0]), np.median(wide), np.median(tail), ends[rows, 2].sum())
        print(f"{boundary} {len(rows):5d} " + " ".join(f"{value:10.2f}" for value in columns))
    print("us: the first release; from the first to the last; from the median to the last end; all until the last end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--position", type=int, default=280)
    parser.add_argument("--target", default="{}", help='fields of the target to change, as JSON: {"cluster": 4}')
    parser.add_argument("--shapes", default="{}", help="launch shapes by product class, as JSON")
    parser.add_argument("--backend", default="cuda", choices=("cuda", "host"))
    options = parser.parse_args()
    with open_session(options.model, SessionOptions(options.backend, shapes={})) as session:
        engine = session.engine
        assert isinstance(engine, Engine)
        target = replace(target_of(session), **json.loads(options.target))
        cache = KernelCache(default_cache_dir())
        plain = lower(session.graph, target, json.loads(options.shapes))
        engine.adopt(plain, compile_program(plain, target.arch, cache))
        engine.feed([1] * options.position)
        print(f"plain step {np.median(engine.step_times(STEPS)):.1f} us")
        stamped = profiled(plain)
        engine.adopt(stamped, compile_program(stamped, target.arch, cache))
        print(f"stamped step {np.median(engine.step_times(STEPS)):.1f} us")
        launches = plain.step().kernels
        runs = [one_run(engine, len(launches)) for _ in range(RUNS)]
    show(launches, *boundaries(runs), range(options.layer, options.layer + options.layers))


if __name__ == "__main__":
    main()
