"""The CPU path against float64 references that were computed elsewhere."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_model import Q4, Q8, divergence, reference_greedy, reference_logits

from psigraph import numpy_path
from psigraph.build import fuse, open_model
from psigraph.ir.errors import OutOfMemoryError, UsageError
from psigraph.numpy_path import NumpyEngine, dequantized
from psigraph.options import SessionOptions
from psigraph.session import open_session


@pytest.mark.parametrize(
    ("path", "cache", "count", "bar"),
    [(Q4, "f32", 64, 1e-10), (Q8, "f32", 24, 1e-10), (Q4, "f16", 32, 1e-6), (Q8, "f16", 24, 1e-6)],
    ids=lambda value: getattr(value, "stem", str(value)),
)
def test_logits_stay_within_the_bar(path: Path, cache: str, count: int, bar: float) -> None:
    ids, wanted = reference_logits(path)
    with open_session(path, SessionOptions("cpu", outputs=("logits",), cache_dtype=cache)) as session:
        found = session.forced_logits(ids[:count])
    assert found.shape == (count, 4096)
    assert divergence(wanted[:count], found).max() <= bar


def test_greedy_tokens_are_those_of_the_reference() -> None:
    prompt, wanted, gaps = reference_greedy(Q4, "speech")
    with open_session(Q4, SessionOptions("cpu")) as session:
        session.feed(prompt)
        tokens = [token for chunk in session.decode(24, 5) for token in chunk]
    assert min(gaps[:24]) > 1e-3  # else rounding could choose
    assert tokens == wanted[:24]


def test_float32_is_close_and_takes_the_same_choice() -> None:
    ids, wanted = reference_logits(Q4)
    with open_model(Q4) as model:
        engine = NumpyEngine(fuse(model.graph(("logits",)))[0], model, dtype=np.float32)
        assert divergence(wanted[:6], engine.forced_logits(ids[:6])).max() <= 1e-5
        assert engine.chosen() == wanted[5].argmax()


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.3.attn_q.weight", "output_norm.weight"])
def test_weights_are_what_the_gguf_package_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_path, "_ELEMENTS_AT_ONCE", 1000)  # so that blocks of rows join
    tensor = next(tensor for tensor in gguf.GGUFReader(Q4).tensors if tensor.name == name)
    wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    with open_model(Q4) as model:
        assert np.array_equal(dequantized(model, name, np.float64), wanted)


def test_a_reset_starts_anew_and_an_end_token_sets_the_flag_only() -> None:
    with open_model(Q4, 8) as model:
        engine = NumpyEngine(fuse(model.graph())[0], model, end_tokens=[1, 2])
        engine.feed([5, 6])
        first = [token for chunk in engine.decode(4) for token in chunk]
        engine.reset()
        engine.feed([5, 6])
        assert [token for chunk in engine.decode(4, 3) for token in chunk] == first
        with pytest.raises(UsageError, match="context of 8"):
            list(engine.decode(5))
        with pytest.raises(UsageError, match="context of 8"):
            engine.feed([1] * 4)
        with pytest.raises(UsageError, match="without logits"):
            engine.logits()


def test_a_model_that_does_not_fit_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_path, "_available_memory", lambda: 10 << 20)
    with pytest.raises(OutOfMemoryError, match=r"needs 0\.1 GiB of main memory .*--backend cuda"):
        open_session(Q4, SessionOptions("cpu"))
