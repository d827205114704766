"""A prompt's step of a whole model, fused and with fusions off, against the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
from product_graphs import random_matrices
from run_node import Step, same_bits
from shipped import unfused

from psigraph.build import fuse
from psigraph.codegen.target import target_for
from psigraph.ir.graph import Graph
from psigraph.ir.interpret import Interpreter
from psigraph.ir.regime import Regime
from psigraph.passes.pipeline import PIPELINE

ROWS, COUNT, FIRST = 20, 17, 30
FUSIONS = tuple(step.name for step in PIPELINE if Regime.MANY in step.regimes and not step.lowering)
# Kernels round weights to halves too, and activations from sums in another order: 4e-8 of mean square each time, some
# tens of times a layer.
NMSE, LARGEST = 2e-6, 2e-3


def prompt(disable: tuple[str, ...]) -> Graph:
    """The tiny model's over ROWS rows."""
    return fuse(unfused("q4_k_m", ROWS), disable, regime=Regime.MANY)[0]


def test_every_fusion_of_prompts_leaves_something_where_it_is_off() -> None:
    _, reports = fuse(unfused("q4_k_m", ROWS), regime=Regime.MANY)
    found = [report.name for report in reports if report.matches and report.name in FUSIONS]
    assert len(found) >= 4
    for name in found:  # one for an op that Qwen3 has not finds nothing here
        assert len(prompt((name,)).nodes) > len(prompt(()).nodes), name


@pytest.mark.parametrize("library", [False, True], ids=["own", "library"])
@pytest.mark.parametrize(
    "disable", [(), *[(name,) for name in FUSIONS], FUSIONS], ids=lambda names: "+".join(names)[:40] or "fused"
)
def test_a_prompt_is_what_the_interpreter_makes_of_it(disable: tuple[str, ...], library: bool) -> None:
    graph = prompt(disable)
    raw, values = random_matrices(graph)
    generator = np.random.default_rng(3)
    there = np.arange(ROWS) < COUNT
    states: dict[str, np.ndarray] = {
        "tokens": generator.integers(0, 900, ROWS).astype(np.int32),
        "positions": np.where(there, FIRST + np.arange(ROWS), -1).astype(np.int32),
        "sequences": np.zeros(ROWS, np.int32),
    }
    for param in graph.params:
        if len(param.type.shape) == 4:  # a cache of which only what was there before may be looked at
            states[param.name] = generator.standard_normal(param.type.shape).astype(np.float16)
            states[param.name][:, :, FIRST:] = np.nan
    interpreter = Interpreter()
    wanted = interpreter.results(graph, interpreter.run(graph, {**values, **states}))
    with Step(graph, target_for("host"), raw, regime=Regime.MANY, library=library) as step:
        got = step.run({**states, "count": np.array([COUNT])})
        again = step.run({**states, "count": np.array([COUNT])}, "shuffle")
    assert set(got) == set(wanted) == {name for name in states if "cache" in name}
    for name, want in wanted.items():
        assert same_bits(got[name], again[name]), name
        new = slice(FIRST, FIRST + COUNT)
        have = np.asarray(got[name], np.float64)
        np.testing.assert_array_equal(np.delete(have, np.r_[new], axis=2), np.delete(states[name], np.r_[new], axis=2))
        error, size = have[:, :, new] - want[:, :, new], np.abs(want[:, :, new].astype(np.float64))
        layers = 1 + int(name.split(".")[1])
        assert (error**2).sum() <= layers * NMSE * (size**2).sum(), f"{name}: {(error**2).sum() / (size**2).sum():.2e}"
        assert np.abs(error).max() <= layers * LARGEST * size.max(), f"{name}: {np.abs(error).max() / size.max():.2e}"
