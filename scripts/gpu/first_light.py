"""First run on a GPU: tiny model against its references, then timings of a synthetic model."""

import json
import sys
import time

import numpy as np

from psigraph.build import build_program, open_model
from psigraph.codegen.target import arch_of_capability, target_for
from psigraph.runtime.compiler import compile_program
from psigraph.runtime.driver import Driver
from psigraph.runtime.engine import Engine
from psigraph.runtime.kernel_cache import KernelCache, default_cache_dir


def kl(reference, other):
    def log_softmax(x):
        x = x.astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(-1)


def engine_for(driver, path, outputs=(), graph=True, ctx=None, disable=()):
    model = open_model(path, ctx)
    facts = driver.facts()
    arch = arch_of_capability(*facts.capability)
    program = build_program(model, target_for(arch, facts.sm_count), outputs, disable)
    started = time.time()
    compiled = compile_program(program, arch, KernelCache(default_cache_dir()))
    print(f"compile {time.time() - started:.2f} s;", {n: k.resources.registers for n, k in compiled.items()})
    engine = Engine(driver, program, compiled, model, graph=graph)
    print("timings", engine.timings, "arena MiB", engine.arena_bytes / 2**20)
    return engine


def tiny(driver):
    reference = np.load("fixtures/tiny/reference_logits.npz")
    greedy = json.load(open("fixtures/tiny/reference_greedy.json"))
    for quant in ("q4_k_m", "q8_0"):
        for graph in (True, False):
            with engine_for(driver, f"fixtures/tiny/tiny-qwen3-{quant}.gguf", ("logits",), graph) as engine:
                ids = reference["ids"].tolist()
                got = engine.forced_logits(ids)
                d = kl(reference[f"logits_{quant}"], got)
                print(f"{quant} graph={graph}: mean KL {d.mean():.3e} largest {d.max():.3e}", flush=True)
                for name, prompt in greedy["prompts"].items():
                    engine.reset()
                    engine.feed(prompt["ids"])
                    tokens = [t for chunk in engine.decode(64) for t in chunk]
                    want = greedy["greedy"][quant][name]["ids"]
                    same = sum(a == b for a, b in zip(tokens, want))
                    print("   ", name, same, "of", len(want))


def speed(driver, path, disable=()):
    with engine_for(driver, path, disable=disable) as engine:
        print(f"read bandwidth {engine.read_bandwidth() / 1e9:.0f} GB/s")
        for repeat in range(4):
            engine.reset()
            engine.feed([151644])
            started = time.perf_counter()
            tokens = [t for chunk in engine.decode(512) for t in chunk]
            seconds = time.perf_counter() - started
            print(f"  512 tokens: {512 / seconds:.1f} tok/s, {seconds / 512 * 1e6:.1f} us", tokens[:6], len(set(tokens)))
        engine.reset()
        engine.feed([151644])
        times = engine.step_times(500)
        print("  step us: p10 %.1f p50 %.1f p90 %.1f" % tuple(np.percentile(times, [10, 50, 90])), "at 8:", times[5:12].mean(), "at 490:", times[480:].mean())


if __name__ == "__main__":
    with Driver(0) as driver:
        print(driver.facts())
        if "tiny" in sys.argv[1]:
            tiny(driver)
        for path in sys.argv[2:]:
            speed(driver, path)
