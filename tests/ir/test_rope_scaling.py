"""Positions stretched over a longer context: the formula, the files that ask for it, and the graphs that carry it.

The reference is written from the papers: YaRN (arXiv 2309.00071) with the ramp over dimensions of its authors' code,
which ggml's rope_yarn computes too, and position interpolation (arXiv 2306.15595).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from small_models import QWEN3, Small, assert_same_steps, decode, random_weights

from psigraph.ir.errors import ModelFileError, PsigraphError, UnsupportedModelError, UsageError
from psigraph.ir.graph import Graph, TensorType
from psigraph.ir.op import EvalContext, TypeMismatch
from psigraph.ir.ops import OPS
from psigraph.passes.pipeline import run_pipeline
from psigraph.runtime.tables import rope_table

SCALING = "qwen3.rope.scaling."
YARN = {SCALING + "type": "yarn", SCALING + "factor": 4.0, SCALING + "original_context_length": 16}
ATTRS = {"theta": 1e6, "factor": 4.0, "attn_factor": 1.0, "original": 32768, "beta_fast": 32.0, "beta_slow": 1.0}


def reference(dim: int, attrs: dict[str, float]) -> tuple[list[float], float]:
    """(radians a position of each pair, factor of the attention's logits' square root), a pair at a time."""
    base, scale, context = attrs["theta"], attrs["factor"], attrs["original"]

    def dimension(rotations: float) -> float:
        return (dim * math.log(context / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = math.floor(dimension(attrs["beta_fast"])), math.ceil(dimension(attrs["beta_slow"]))
    low, high = max(low, 0), min(high, dim - 1)
    speeds = []
    for pair in range(dim // 2):
        extrapolated = 1.0 / base ** (2 * pair / dim)
        interpolated = 1.0 / (scale * base ** (2 * pair / dim))
        gamma = 1 - min(1.0, max(0.0, (pair - low) / max(high - low, 0.001)))
        speeds.append((1 - gamma) * interpolated + gamma * extrapolated)
    return speeds, attrs["attn_factor"] * (0.1 * math.log(scale) + 1.0)


CASES = [
    ATTRS,
    {**ATTRS, "factor": 1.0},
    {**ATTRS, "factor": 40.0, "original": 4096, "theta": 1e4},
    {**ATTRS, "beta_fast": 8.0, "beta_slow": 2.0, "attn_factor": 0.75},
    {**ATTRS, "original": 1},
    {**ATTRS, "original": 16_777_216, "theta": 1.5},
    {**ATTRS, "beta_fast": 1.0, "beta_slow": 1.0},
]


@pytest.mark.parametrize("attrs", CASES)
@pytest.mark.parametrize("dim", [32, 128])
def test_yarn_is_that_of_the_paper(attrs: dict[str, float], dim: int) -> None:
    speeds, magnitude = reference(dim, attrs)
    positions = np.array([0, 1, 977, 131_071])
    x = np.random.default_rng(1).standard_normal((4, 2, dim))
    (turned,) = OPS["rope"].reference(EvalContext(), [x, positions], attrs)
    for row, position in enumerate(positions):
        pairs = (
            (x[row, :, : dim // 2] + 1j * x[row, :, dim // 2 :]) * magnitude * np.exp(1j * position * np.array(speeds))
        )
        wanted = np.concatenate([pairs.real, pairs.imag], axis=1)
        np.testing.assert_allclose(turned[row], wanted, rtol=0, atol=1e-9)
    table = rope_table(1000, dim, attrs)
    angles = np.arange(1000)[:, None] * np.array(speeds)
    np.testing.assert_allclose(table[..., 0], magnitude * np.cos(angles), atol=2e-7 * max(1, magnitude))
    np.testing.assert_allclose(table[..., 1], magnitude * np.sin(angles), atol=2e-7 * max(1, magnitude))


def test_what_the_paper_says_of_the_ends() -> None:
    """Pairs that turn often enough keep their speed; those that never turn once are stretched in full."""
    plain = np.array(reference(128, {**ATTRS, "factor": 1.0})[0])
    ratio = plain / np.array(reference(128, ATTRS)[0])
    turns = ATTRS["original"] * plain / (2 * np.pi)
    assert np.all(ratio[turns > 32 * 1.25] == 1)
    np.testing.assert_allclose(ratio[turns < 1 / 1.25], 4)
    assert np.all(np.diff(ratio) >= 0)


def test_linear_divides_positions() -> None:
    x = np.random.default_rng(2).standard_normal((1, 2, 32))
    (stretched,) = OPS["rope"].reference(EvalContext(), [x, np.array([12])], {"theta": 1e4, "factor": 4.0})
    (plain,) = OPS["rope"].reference(EvalContext(), [x, np.array([3])], {"theta": 1e4})
    np.testing.assert_allclose(stretched, plain)
    np.testing.assert_allclose(
        rope_table(13, 32, {"theta": 1e4, "factor": 4.0})[12], rope_table(4, 32, {"theta": 1e4})[3]
    )


def graph_of(keys: dict[str, object], ctx: int = 32, **sizes: Any) -> Graph:
    small = Small(**sizes)
    return QWEN3.graph(QWEN3.bind({**small.metadata(), **keys}, small.tensors(), ctx), ("logits",))


def ropes(graph: Graph) -> list[dict[str, object]]:
    return [node.attributes for node in graph.nodes if "rope" in node.op]


def test_only_files_that_ask_for_it_have_it_in_their_graphs() -> None:
    plain = graph_of({})
    assert ropes(plain) == [{"theta": 1e6}] * 2
    assert graph_of({SCALING + "type": "none", SCALING + "factor": 1.0}) == plain
    assert ropes(graph_of(YARN))[0] == {**ATTRS, "original": 16}
    linear = {SCALING + "type": "linear", SCALING + "factor": np.float32(2)}
    assert ropes(graph_of(linear))[0] == {"theta": 1e6, "factor": 2.0, "attn_factor": 1.0}
    keys = {**YARN, SCALING + "yarn_beta_fast": 16.0, SCALING + "yarn_beta_slow": 2.0, SCALING + "attn_factor": 0.5}
    found = ropes(graph_of(keys))[0]
    assert (found["beta_fast"], found["beta_slow"], found["attn_factor"]) == (16.0, 2.0, 0.5)


def test_without_an_original_context_it_is_the_models() -> None:
    keys = {**YARN, SCALING + "original_context_length": None, "qwen3.context_length": 131_072}
    assert ropes(graph_of({key: value for key, value in keys.items() if value is not None}))[0]["original"] == 131_072


def test_the_context_of_the_file_is_the_limit() -> None:
    small = Small()
    keys = {**small.metadata(), **YARN, "qwen3.context_length": 131_072}
    assert QWEN3.bind(keys, small.tensors(), 131_072).sizes["context"] == 131_072
    with pytest.raises(UsageError, match="the model allows 1 to 131072"):
        QWEN3.bind(keys, small.tensors(), 131_073)


@pytest.mark.parametrize("keys", [YARN, {SCALING + "type": "linear", SCALING + "factor": 8.0}])
def test_fusing_keeps_the_scaling_and_what_is_computed(keys: dict[str, object]) -> None:
    graph = graph_of(keys, layers=2, hidden=64, ffn=64, heads=2, kv_heads=1, head_dim=32, dtype="f32")
    fused = run_pipeline(graph)[0]
    assert [node.op for node in fused.nodes if "rope" in node.op] == ["rope_attention"] * 2
    wanted = ropes(graph)[0]
    assert all(wanted.items() <= found.items() for found in ropes(fused))
    weights = random_weights(graph)
    plain = graph_of({}, layers=2, hidden=64, ffn=64, heads=2, kv_heads=1, head_dim=32, dtype="f32")
    ours, theirs = decode(graph, weights), decode(fused, weights)
    assert_same_steps([{"logits": s["logits"]} for s in ours], [{"logits": s["logits"]} for s in theirs], 1e-6)
    assert np.abs(decode(plain, weights)[-1]["logits"] - ours[-1]["logits"]).max() > 1e-4


def test_queries_and_keys_that_are_stretched_differently_are_not_fused() -> None:
    graph = graph_of(YARN)
    nodes = list(graph.nodes)
    at = next(index for index, node in enumerate(nodes) if node.op == "rope")
    nodes[at] = replace(nodes[at], attrs=(("theta", 1e6),))
    fused = run_pipeline(replace(graph, nodes=tuple(nodes)))[0]
    assert [node.op for node in fused.nodes if "rope" in node.op] == ["rope", "rope"]


@pytest.mark.parametrize(
    ("keys", "kind", "message"),
    [
        ({"factor": 0.0}, ModelFileError, "factor: is 0.0, wanted a number from 1 to 1e+06"),
        ({"factor": -4.0}, ModelFileError, "factor: is -4.0"),
        ({"factor": float("nan")}, ModelFileError, "factor: is nan"),
        ({"factor": float("inf")}, ModelFileError, "factor: is inf"),
        ({"factor": "4"}, ModelFileError, "factor: is '4', wanted a number"),
        ({"factor": np.ones(3)}, ModelFileError, "factor: is a list"),
        ({"factor": None}, ModelFileError, "factor: the key is missing"),
        ({"original_context_length": 0}, ModelFileError, "original_context_length: is 0, wanted a whole number"),
        ({"original_context_length": 2**31}, ModelFileError, "original_context_length: is 2147483648"),
        ({"original_context_length": 4096.5}, ModelFileError, "original_context_length: is 4096.5"),
        ({"attn_factor": 0.0}, ModelFileError, "attn_factor: is 0.0"),
        ({"yarn_beta_fast": float("nan")}, ModelFileError, "yarn_beta_fast: is nan"),
        ({"yarn_beta_slow": -1.0}, ModelFileError, "yarn_beta_slow: is -1.0"),
        ({"yarn_beta_slow": 64.0}, UnsupportedModelError, "yarn_beta_fast counts more turns than yarn_beta_slow"),
        ({"yarn_ext_factor": 0.5}, UnsupportedModelError, "yarn_ext_factor is 0.5, psigraph computes only 1 or -1"),
        ({"yarn_attn_factor": 2.0}, UnsupportedModelError, "yarn_attn_factor is 2.0"),
        ({"yarn_log_multiplier": 0.0707}, UnsupportedModelError, "yarn_log_multiplier is 0.0707"),
        (
            {"type": "longrope"},
            UnsupportedModelError,
            "type is 'longrope', psigraph computes only none or linear or yarn",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused_by_its_key(
    keys: dict[str, object], kind: type[PsigraphError], message: str
) -> None:
    changed = {**YARN, **{SCALING + key: value for key, value in keys.items()}}
    small = Small()
    metadata = {**small.metadata(), **changed}
    with pytest.raises(PsigraphError) as caught:
        QWEN3.bind({key: value for key, value in metadata.items() if value is not None}, small.tensors(), 32)
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert "qwen3" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_base_of_one_turns_all_pairs_alike_and_has_no_ramp() -> None:
    small = Small()
    with pytest.raises(UnsupportedModelError, match=r"theta is 1\.0"):
        QWEN3.bind({**small.metadata(), **YARN, "qwen3.rope.freq_base": 1.0}, small.tensors(), 32)


@pytest.mark.parametrize(
    ("attrs", "says"),
    [
        ({"original": 16}, "original goes with all of"),
        ({"beta_fast": 32.0, "original": 16}, "original goes with all of"),
        ({"factor": 0.5}, "factor is 0.5"),
        ({"factor": float("nan")}, "factor is nan"),
        ({"original": 0, "beta_fast": 32.0, "beta_slow": 1.0}, "above 0"),
    ],
)
def test_attributes_of_a_rotation_go_together(attrs: dict[str, float], says: str) -> None:
    with pytest.raises(TypeMismatch, match=says):
        OPS["rope"].infer([TensorType("f32", (1, 2, 8)), TensorType("i32", (1,))], {"theta": 1e4, **attrs})
