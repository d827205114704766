"""Small models of any shape: headers for the Qwen3 spec, and random weights for a graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import psigraph.models
from psigraph.ir.graph import Graph, TensorType
from psigraph.ir.interpret import Interpreter
from psigraph.ir.regime import Regime
from psigraph.ir.spec.loader import ModelSpec, load_spec

SPEC_PATH = Path(psigraph.models.__file__).with_name("qwen3.yaml")
QWEN3 = load_spec(SPEC_PATH)
VOCABULARY = 48


@dataclass(frozen=True)
class Small:
    """Sizes of a model. dtypes: one for all matrices, or one for each kind of tensor. context: positions of each of its
    sequences. lines: of the spec, and what stands there instead (`OTHER_LINES`)."""

    layers: int = 1
    hidden: int = 256
    ffn: int = 512
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    tied: bool = True
    dtype: str = "q4_k"
    dtypes: tuple[tuple[str, str], ...] = ()
    context: int = 16
    sequences: int = 1
    lines: tuple[tuple[str, str], ...] = ()

    def metadata(self) -> dict[str, object]:
        return {
            "general.architecture": "qwen3",
            "qwen3.block_count": self.layers,
            "qwen3.context_length": 64,
            "qwen3.embedding_length": self.hidden,
            "qwen3.feed_forward_length": self.ffn,
            "qwen3.attention.head_count": self.heads,
            "qwen3.attention.head_count_kv": self.kv_heads,
            "qwen3.attention.key_length": self.head_dim,
            "qwen3.attention.value_length": self.head_dim,
            "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
            "qwen3.rope.freq_base": 1e6,
        }

    def tensors(self) -> dict[str, TensorType]:
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        found = {"token_embd": (VOCABULARY, self.hidden), "output_norm": (self.hidden,)}
        if not self.tied:
            found["output"] = (VOCABULARY, self.hidden)
        for layer in range(self.layers):
            found |= {
                f"blk.{layer}.attn_norm": (self.hidden,),
                f"blk.{layer}.attn_q": (query, self.hidden),
                f"blk.{layer}.attn_k": (key, self.hidden),
                f"blk.{layer}.attn_v": (key, self.hidden),
                f"blk.{layer}.attn_q_norm": (self.head_dim,),
                f"blk.{layer}.attn_k_norm": (self.head_dim,),
                f"blk.{layer}.attn_output": (self.hidden, query),
                f"blk.{layer}.ffn_norm": (self.hidden,),
                f"blk.{layer}.ffn_gate": (self.ffn, self.hidden),
                f"blk.{layer}.ffn_up": (self.ffn, self.hidden),
                f"blk.{layer}.ffn_down": (self.hidden, self.ffn),
            }
        special = dict(self.dtypes)
        return {
            f"{name}.weight": TensorType(
                "f32" if len(shape) == 1 else special.get(name.split(".")[-1], self.dtype), shape
            )
            for name, shape in found.items()
        }

    def graph(self, *outputs: str, rows: int = 1) -> Graph:
        spec = changed_spec(self.lines) if self.lines else QWEN3
        binding = spec.bind(self.metadata(), self.tensors(), self.context, max_sequences=self.sequences)
        return spec.graph(binding, outputs, rows)


@cache
def changed_spec(lines: tuple[tuple[str, str], ...]) -> ModelSpec:
    """Qwen3's, with other op lines in the place of some."""
    text = SPEC_PATH.read_text(encoding="utf-8")
    for old, new in lines:
        assert old in text, f"qwen3.yaml has no line {old}"
        text = text.replace(old, new.replace("\n", "\n  "))
    with TemporaryDirectory() as folder:
        path = Path(folder, "changed.yaml")
        path.write_text(text, encoding="utf-8")
        return load_spec(path)


OTHER_LINES: dict[str, tuple[tuple[str, str], ...]] = {
    "a norm behind attention's output": (
        (
            "%o = matvec(%a, %attn_output)",
            "%o1 = matvec(%a, %attn_output)\n%o = rms_norm(%o1, %ffn_norm) {eps=$epsilon}",
        ),
    ),
}
"""Models beside Qwen3 on which passes are proved: lines of qwen3.yaml, and what stands there instead. An op that Qwen3
has not, and the fusions that take it, belong here."""


def random_weights(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Matrices that keep the length of a vector; norm weights around one."""
    rng = np.random.default_rng(seed)
    found = {}
    for param in graph.params:
        if param.kind == "weight":
            values = rng.standard_normal(param.type.shape)
            vector = len(param.type.shape) == 1
            found[param.name] = 1 + values / 4 if vector else values / np.sqrt(param.type.shape[1])
    return found


Arrays = dict[str, np.ndarray]


def run_steps(graph: Graph, weights: Arrays, feeds: Iterable[Arrays], **options: object) -> list[Arrays]:
    """The results of a step for each of the feeds: states and constants that the host writes before it."""
    interpreter = Interpreter(**options)  # type: ignore[arg-type]
    states = interpreter.initial_state(graph)
    if "end_tokens" in states:
        states["end_tokens"][:2] = [3, 7]
    history = []
    for feed in feeds:
        states |= feed
        results = interpreter.results(graph, interpreter.run(graph, {**weights, **states}))
        states |= {name: array for name, array in results.items() if name in states}
        # Caches may change in place: what this step left is kept.
        history.append({name: array.copy() for name, array in results.items()})
    return history


def decode(graph: Graph, weights: Arrays, steps: int = 3, **options: object) -> list[Arrays]:
    """The results of `steps` steps of one row from token 5, each fed with the one before."""
    return run_steps(graph, weights, [{"tokens": integers(5)}, *[{}] * (steps - 1)], **options)


ROWS = {Regime.STEP: 1, Regime.FEW: 3, Regime.MANY: 20}
"""How many rows a test's step has in each regime."""


def row_feeds(rows: int, steps: int = 2) -> list[Arrays]:
    """Tokens of two sequences in turn, at positions one behind the other; of several rows the last one is absent."""
    row, rng, feeds = np.arange(rows, dtype=np.int32), np.random.default_rng(rows), []
    for step in range(steps):
        positions = step * ((rows + 1) // 2) + row // 2
        positions[rows - 1 :] = -1 if rows > 1 else step
        tokens = rng.integers(0, VOCABULARY, rows, np.int32)
        feeds.append({"tokens": tokens, "positions": positions, "sequences": row % 2})
    return feeds


def only(names: Iterable[str], steps: list[Arrays]) -> list[Arrays]:
    """These results of every step."""
    return [{name: step[name] for name in names} for step in steps]


def integers(*values: int) -> np.ndarray:
    """An i32 of one value a row: tokens, positions, sequences."""
    return np.array(values, np.int32)


def assert_same_steps(left: list[Arrays], right: list[Arrays], atol: float = 1e-9) -> None:
    """Every result of every step agrees: integers exactly, numbers within atol."""
    assert len(left) == len(right)
    for ours, theirs in zip(left, right, strict=True):
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_allclose(array, theirs[name], rtol=0, atol=atol, err_msg=name)
