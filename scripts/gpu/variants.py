"""Times variants of one step on a GPU: parts of it left out, other launch shapes, features off.

    python scripts/gpu/variants.py MODEL.gguf [name ...]

Prints microseconds of a replayed step (median of 200 at position ~60 and ~450). Steps with parts left
out compute nonsense; they tell what the part costs in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from psigraph.build import build_program, open_model
from psigraph.codegen.target import arch_of_capability, target_for
from psigraph.ir.program import Launch, Program
from psigraph.runtime.compiler import compile_program
from psigraph.runtime.driver import Driver
from psigraph.runtime.engine import Engine
from psigraph.runtime.kernel_cache import KernelCache, default_cache_dir


def only(*stems: str) -> Callable[[Program], Program]:
    return lambda p: replace(p, launches=tuple(x for x in p.launches if any(x.kernel.startswith(s) for s in stems)))


def without(*stems: str) -> Callable[[Program], Program]:
    return lambda p: replace(p, launches=tuple(x for x in p.launches if not any(x.kernel.startswith(s) for s in stems)))


def every(change: Callable[[Launch], Launch]) -> Callable[[Program], Program]:
    return lambda p: replace(p, launches=tuple(change(x) for x in p.launches))


def measure(driver: Driver, path: str, edit=None, shapes=None, disable=(), check: bool = False) -> str:
    facts = driver.facts()
    arch = arch_of_capability(*facts.capability)
    with open_model(path) as model:
        program = build_program(model, target_for(arch, facts.sm_count), disable=disable, shapes=shapes)
        if edit:
            program = edit(program)
        compiled = compile_program(program, arch, KernelCache(default_cache_dir()))
        spills = {n: k.resources.spill_bytes for n, k in compiled.items() if k.resources.spill_bytes}
        with Engine(driver, program, compiled, model) as engine:
            engine.feed([9707])
            tokens = [t for chunk in engine.decode(8) for t in chunk]
            result = []
            for position in (60, 450):
                engine.reset()
                if not edit:
                    engine.feed([9707] * position)
                engine.step_times(20)
                result.append(float(np.median(engine.step_times(40))))
    registers = {n: k.resources.registers for n, k in compiled.items() if n in {x.kernel for x in program.launches}}
    note = f" spills {spills}" if spills else ""
    return f"{result[0]:8.1f} {result[1]:8.1f}  {hash(tuple(tokens)) & 0xFFFF:04x} regs {list(registers.values())}{note}"
