"""Kernels over many rows run alone in the builds that look at each load and store: see test_generated_kernels.py."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import q8_memory
from one_image import ENTRY, MOST_ARGUMENTS, one_image
from packing import pack
from signature import written
from weights import raw_weights

from psigraph.codegen.device import device_headers
from psigraph.codegen.lower import lower
from psigraph.codegen.target import target_for
from psigraph.ir.program import PREFILL, Buffer, Program
from psigraph.ir.regime import Regime
from psigraph.ir.text import parse_graph
from psigraph.ir.types import quantize_q8
from psigraph.runtime.host.check import HostCheckError, KernelCall, build_all, run_build
from psigraph.runtime.tables import table_values

TOKENS, COUNT, FIRST, CONTEXT = 20, 17, 50, 70
# A layer: two types side by side, ragged rows, ragged counts of tokens and keys.
LAYER = f"""graph layer(weight %table: q8_0[40,256], weight %norm: f32[256], weight %wq: q4_k[64,256],
        weight %wk: q4_k[16,256], weight %wv: q6_k[16,256], weight %wo: f16[256,64], weight %gate: q4_k[40,256],
        weight %up: q4_k[40,256], weight %q_norm: f32[16], weight %k_norm: f32[16],
        state %tokens: i32[{TOKENS}], state %positions: i32[{TOKENS}], state %sequences: i32[{TOKENS}],
        state %log: i32[1,{CONTEXT}],
        state %k_cache: f16[1,1,{CONTEXT},16], state %v_cache: f16[1,1,{CONTEXT},16]) {{
    %x: f32[{TOKENS},256] = embed(%table, %tokens)
    %h: f16[{TOKENS},256] = rms_norm(%x, %norm) {{eps=1e-6}}
    %q: f32[{TOKENS},64], %k: f32[{TOKENS},16], %v: f32[{TOKENS},16] = matvec(%h, %wq, %wk, %wv)
    %turned: f16[{TOKENS},4,16], %k1: f16[1,1,{CONTEXT},16], %v1: f16[1,1,{CONTEXT},16] =
        rope_append(%q, %k, %v, %q_norm, %k_norm, %k_cache, %v_cache, %positions, %sequences)
            {{eps=1e-6, theta=1000000.0, heads=4, kv_heads=1}}
    %y: f16[{TOKENS},4,16] = attention(%turned, %k1, %v1, %positions, %sequences) {{scale=0.25}}
    %a: f16[{TOKENS},64] = merge_heads(%y)
    %x1: f32[{TOKENS},256] = matvec_add(%a, %wo, %x)
    %act: f16[{TOKENS},40] = matvec_swiglu(%h, %gate, %up)
    %log2: i32[1,{CONTEXT}] = record(%log, %tokens, %positions, %sequences)
    return x1=%x1, act=%act, k_cache=%k1, v_cache=%v1, log=%log2
}}"""


def contents(buffer: Buffer) -> np.ndarray:
    """uint8: what lies in a buffer before the chunk."""
    generator = np.random.default_rng(len(buffer.name))
    if buffer.kind == "weight" and buffer.layout == "tiles":
        return pack(raw_weights(buffer.dtype, *buffer.shape, 1), buffer.dtype, *buffer.shape)
    if buffer.kind == "table":
        return np.ascontiguousarray(table_values(buffer)).view(np.uint8).ravel()
    if buffer.name == "prefill.count":
        return np.array([COUNT], np.int32).view(np.uint8)
    if buffer.name == "prefill.positions":
        there = np.arange(TOKENS) < COUNT
        return np.where(there, FIRST + np.arange(TOKENS), -1).astype(np.int32).view(np.uint8)
    if buffer.name == "prefill.tokens":
        return generator.integers(0, 40, buffer.shape).astype(np.int32).view(np.uint8).ravel()
    if buffer.dtype == "f16" and buffer.kind == "state":
        return generator.standard_normal(buffer.nbytes // 2).astype(np.float16).view(np.uint8)
    if buffer.layout == "q8 tiles":
        rows = generator.standard_normal((buffer.shape[1], CONTEXT, buffer.shape[3]))
        return q8_memory.pack(*quantize_q8(rows))
    if buffer.kind == "weight":
        return np.ones(buffer.shape, np.float32).view(np.uint8)
    return np.zeros(buffer.nbytes, np.uint8)


def lowered(text: str, library: bool = False) -> Program:
    return lower(parse_graph(text), target_for("host"), regime=Regime.MANY, name=PREFILL, library=library)


def test_kernels_of_a_chunk_are_sound() -> None:
    """Of both ways; where a library would multiply, zeros stand for what it makes."""
    names = check(lowered(LAYER), lowered(LAYER, library=True))
    assert len(names) >= 11


def test_kernels_over_a_q8_cache_are_sound() -> None:
    cache = f"[1,1,{CONTEXT},16]"
    program = lowered(LAYER.replace(f"f16{cache}", f"q8{cache}"))
    step = program.step(PREFILL)
    launches = tuple(launch for launch in step.kernels if re.match("prefill_(rope_append|attention)", launch.kernel))
    kernels = tuple(program.kernel(launch.kernel) for launch in launches)
    assert len(launches) == 2
    check(replace(program, kernels=kernels).with_step(replace(step, launches=launches)))


def check(own: Program, *others: Program) -> list[str]:
    """Run all kernels of a program under checks, and of others those that are new; the kernels' names."""
    texts = {kernel.text: kernel for program in (own, *others) for kernel in program.kernels}
    names = [kernel.name for kernel in texts.values()]
    assert len(set(names)) == len(names)
    source = one_image(tuple(texts.values()))
    problems = []
    new = [(own, set(names))] + [(other, set(names) - {kernel.name for kernel in own.kernels}) for other in others]
    for program, kernels in new:
        memory = {buffer.name: contents(buffer) for buffer in program.buffers}
        for launch in program.step(PREFILL).kernels:
            if launch.kernel not in kernels:
                continue
            args: list[Any] = [np.int32(names.index(launch.kernel))]
            args += [memory[arg] if isinstance(arg, str) else np.uint64(arg) for arg in launch.args]
            args += [np.uint64(0)] * (1 + MOST_ARGUMENTS - len(args))
            writes = written(program.kernel(launch.kernel))
            shape = (launch.grid, launch.block, launch.shared_bytes)
            call = KernelCall(
                source, ENTRY, *shape, args, writes=tuple(1 + place for place in writes), headers=device_headers()
            )
            try:
                build_all(call, ("address", "watch"))
                run_build(call, "address")
                left = run_build(call, "watch", "shuffle")
            except HostCheckError as error:
                problems.append(f"{launch.kernel}: {error.kind}: {error}")
                continue
            for place in writes:
                memory[str(launch.args[place])] = left[1 + place]
    assert not problems, "\n".join(problems)
    return names
