"""Where the time of each hop goes: time stamps inside the kernels of a layer, block by block.

    python scripts/gpu/trace_hops.py MODEL.gguf [--layer N] [--layers N] [--position N] [--target JSON] [--shapes JSON]

A development tool beside `psigraph bench --profile`, which only tells when a kernel was let through and when it
ended. Stamps are put into the generated texts at their marked places; together they cost a step about 5 %. Times are
microseconds after the end of the kernel before, `median/last` over the blocks of a launch. It also counts the
multiprocessors that a launch used: one that runs two blocks of a kernel holds up the whole step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from psigraph.bench.tune import target_of
from psigraph.codegen.lower import lower
from psigraph.codegen.profile import _parts
from psigraph.ir.program import Buffer, Launch, Program
from psigraph.options import SessionOptions
from psigraph.runtime.cuda.compiler import compile_program
from psigraph.runtime.cuda.kernel_cache import KernelCache, default_cache_dir
from psigraph.runtime.engine import Engine
from psigraph.session import open_session

STAMPS, BLOCKS, RUNS = 16, 2048, 9
MULTIPROCESSOR = 15  # the place of its number, counted from 1
PLACES = ("start", "asked", "released", "activations", "weights", "tiles", "together", "end")
HEADER = f"""
DEVICE void stamp(u64* trace, int slot, int place) {{
    if (threadIdx.x != 0) return;
    u64* mine = trace + ((u64)slot * {BLOCKS} + blockIdx.x) * {STAMPS};
    mine[place] = clock_ns();
    u32 multiprocessor;
    asm volatile("mov.u32 %0, %smid;" : "=r"(multiprocessor));
    mine[{MULTIPROCESSOR}] = multiprocessor + 1;
}}
#define STAMP(place) stamp(trace, slot, place)
"""
MARKS = (  # text of a kernel -> the same with a stamp; what a kernel does not have stays without
    ("wait_for_previous_kernel();\n", "STAMP(1);\nwait_for_previous_kernel();\nSTAMP(2);\n"),
    (
        "        // 3. Tiles",
        "float needed = 0.0f;\nfor (float b : slice[0].bias) needed += b;\nif (needed == 12345.678f) STAMP(14);\n"
        "STAMP(3);\n        // 3. Tiles",
    ),
    (
        "TeamRing::wait(my_barriers, place, turn);\n",
        "TeamRing::wait(my_barriers, place, turn);\nif (n == 0) STAMP(4);\n",
    ),
    ("__syncthreads();\n\n    // 4.", "STAMP(5);\n__syncthreads();\nSTAMP(6);\n    // 4."),
    ("// Columns of the products", "STAMP(3);\n// Columns of the products"),
    ("wait_for_copies_but_last<STAGES - 1>();\n", "wait_for_copies_but_last<STAGES - 1>();\nSTAMP(4);\n"),
    ("// This warp's part", "STAMP(5);\n// This warp's part"),
    ("wait_for_bytes(&all_sent);\n", "wait_for_bytes(&all_sent);\nSTAMP(6);\n"),
)


def stamped_text(text: str) -> str:
    """A kernel with stamps, and two more parameters for where they go."""
    head, signature, body = _parts(text)
    for mark, instead in MARKS:
        if "slice[0].bias" not in instead or "Digits slice" in body:
            body = body.replace(mark, instead, 1)
    end = body.rstrip().rfind("}")
    body = f"    STAMP(0);\n{body[:end]}__syncwarp();\nSTAMP(7);\n}}\n"
    include = head.index("\n") + 1
    return f"{head[:include]}{HEADER}{head[include:]}{signature}, u64* trace, int slot) {{\n{body}"


def stamped(program: Program) -> Program:
    used = {launch.kernel for launch in program.launches}
    kernels = tuple(replace(k, text=stamped_text(k.text)) if k.name in used else k for k in program.kernels)
    launches = tuple(replace(x, args=(*x.args, "trace", slot)) for slot, x in enumerate(program.launches))
    nbytes = len(launches) * BLOCKS * STAMPS * 8
    trace = Buffer("trace", "scratch", "u64", (nbytes // 8,), "plain", nbytes, zeroed=True)
    return replace(program, kernels=kernels, launches=launches, buffers=(*program.buffers, trace))


def one_run(engine: Engine, launches: Sequence[Launch]) -> np.ndarray:
    """int64[launches, BLOCKS, STAMPS] of one step."""
    engine.clear("trace")
    engine.step()
    return engine.read("trace").view(np.uint64).reshape(len(launches), BLOCKS, STAMPS).astype(np.int64)


def show(launches: Sequence[Launch], runs: Sequence[np.ndarray], layers: range) -> None:
    used, last_ends = [], dict[str, list[float]]()
    for slot, launch in enumerate(launches[1:], 1):
        middle, last, most, spread = [], [], 0, BLOCKS
        for run in runs:
            before = run[slot - 1, : launches[slot - 1].grid, 7].max()
            mine = run[slot, : launch.grid]
            times = np.where(mine[:, :8] > 0, (mine[:, :8] - before) / 1e3, np.nan)
            seen = ~np.isnan(times).all(axis=0)
            middle.append(np.where(seen, np.nanmedian(np.where(seen, times, 0.0), axis=0), np.nan))
            last.append(np.where(seen, np.nanmax(np.where(seen, times, 0.0), axis=0), np.nan))
            counts = np.bincount(mine[:, MULTIPROCESSOR])
            most, spread = max(most, int(counts.max())), min(spread, int((counts > 0).sum()))
        used.append(spread)
        medians, lasts = np.median(middle, axis=0), np.median(last, axis=0)
        last_ends.setdefault(launch.kernel, []).append(float(lasts[7]))
        if launch.layer in layers or slot == len(launches) - 1:
            stamps = zip(PLACES, medians, lasts, strict=True)
            cells = " ".join(f"{name} {a:.2f}/{b:.2f}" for name, a, b in stamps if not np.isnan(a))
            print(f"{launch.kernel:22s} {spread} multiprocessors, at most {most} blocks on one: {cells}")
    for name, values in last_ends.items():
        print(f"{name:22s} x{len(values):3d}: {np.median(values):.2f} us each (median), {sum(values):.1f} us together")
    print("multiprocessors by launch:", *used[:60])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--position", type=int, default=280)
    parser.add_argument("--target", default="{}", help='fields of the target to change, as JSON: {"cluster": 4}')
    parser.add_argument("--shapes", default="{}", help="launch shapes by product class, as JSON")
    options = parser.parse_args()
    with open_session(options.model, SessionOptions("cuda", shapes={})) as session:
        engine = session.engine
        assert isinstance(engine, Engine)
        target = replace(target_of(session), **json.loads(options.target))
        cache = KernelCache(default_cache_dir())
        plain = lower(session.graph, target, json.loads(options.shapes))
        engine.adopt(plain, compile_program(plain, target.arch, cache))
        engine.feed([1] * options.position)
        print(f"plain step {np.median(engine.step_times(40)):.1f} us")
        program = stamped(plain)
        engine.adopt(program, compile_program(program, target.arch, cache))
        engine.feed([1] * 20)
        print(f"stamped step {np.median(engine.step_times(20)):.1f} us")
        runs = [one_run(engine, plain.launches) for _ in range(RUNS)]
    show(plain.launches, runs, range(options.layer, options.layer + options.layers))


if __name__ == "__main__":
    main()
