"""Values that halves do not hold: prompts go in token by token then, and never come out wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_gguf import changed_gguf

from psigraph.ir.errors import UnsupportedModelError
from psigraph.options import SessionOptions
from psigraph.runtime.gguf.file import open_gguf
from psigraph.runtime.synth import model as synth
from psigraph.runtime.synth.model import Size, write_synth
from psigraph.runtime.synth.vocab import SMALLEST
from psigraph.session import Session, open_session

TWO_LAYERS = Size(layers=2, hidden=256, feed_forward=256, heads=2, kv_heads=1, untied=False, context=64)
IDS = [int(token) for token in np.random.default_rng(4).integers(0, 250, 12)]
OPTIONS: dict[str, Any] = {"ctx": 64, "outputs": ("logits",)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synth.SIZES, "small", TWO_LAYERS)
        return write_synth(tmp_path_factory.mktemp("small") / "small.gguf", "small", "f16", 1, vocab=SMALLEST)


def as_bf16(values: np.ndarray) -> bytes:
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def scaled(model: Path, target: Path, dtype: str, **powers: int) -> Path:
    """The model with matrices of its first layer times powers of two, and those in another type."""
    changes = {}
    with open_gguf(model) as file:
        for part, power in powers.items():
            info = file.tensors[f"blk.0.{part}.weight"]
            values = file.read(info.name).view(np.float16).astype(np.float32).reshape(info.shape) * 2.0**power
            data = as_bf16(values) if dtype == "bf16" else values.astype(np.float16).tobytes()
            changes[info.name] = (dtype, info.shape, data)
    return changed_gguf(model, target, tensors=changes)


def prompt_logits(path: Path, prefill: str) -> tuple[np.ndarray, Session]:
    with open_session(path, SessionOptions("host", prefill=prefill, **OPTIONS)) as session:
        session.feed(IDS)
        return session.engine.logits(), session


# What SwiGLU makes passes 16 x 65,504 where gate and up are this large.
LARGE = {"ffn_gate": 11, "ffn_up": 11, "ffn_down": -11}


def test_activations_beyond_halves_are_noticed_and_the_prompt_is_taken_in_by_steps(model: Path, tmp_path: Path) -> None:
    path = scaled(model, tmp_path / "large.gguf", "f16", **LARGE)
    steps, _ = prompt_logits(path, "off")
    assert np.isfinite(steps).all()
    with open_session(path, SessionOptions("host", **OPTIONS)) as session:
        session.expect_prompt(len(IDS))
        assert session.prefill == "own kernels, 512 tokens at once"
        session.feed(IDS[:2])
        session.feed(IDS[2:])
        assert session.position == len(IDS)
        np.testing.assert_array_equal(session.engine.logits(), steps)
        assert session.prefill == "token by token: a prompt has values beyond 65,504, where halves end"
        after = [token for chunk in session.decode(4) for token in chunk]
        session.reset()
        session.feed(IDS)  # and the next one goes in by steps from the beginning
        assert [token for chunk in session.decode(4) for token in chunk] == after


def test_activations_that_lose_their_bits_are_noticed(model: Path, tmp_path: Path) -> None:
    """In weights that halves hold: F16 has them all."""
    path = scaled(model, tmp_path / "little.gguf", "f16", ffn_gate=-8, ffn_up=-8, ffn_down=16)
    steps, _ = prompt_logits(path, "off")
    chunks, session = prompt_logits(path, "auto")
    assert session.prefill == "token by token: a prompt has activations below 2^-10, for which halves lack bits"
    np.testing.assert_array_equal(chunks, steps)


def test_who_asked_for_chunks_is_told(model: Path, tmp_path: Path) -> None:
    path = scaled(model, tmp_path / "large.gguf", "f16", **LARGE)
    with open_session(path, SessionOptions("host", prefill="own", **OPTIONS)) as session:
        session.feed(IDS[:2])
        with pytest.raises(UnsupportedModelError, match="prefill own: a prompt has values beyond 65,504"):
            session.feed(IDS[2:])
        assert session.position == 2


WEIGHTS: dict[str, tuple[str, dict[str, int], str]] = {
    "small": ("bf16", {"ffn_up": -16}, "blk.0.ffn_up.weight has many values below 2^-14, for which halves lack bits"),
    "large": ("bf16", {"attn_v": 24}, "blk.0.attn_v.weight has values beyond 65,504, where halves end"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_beyond_halves_are_noticed_before_a_prompt(model: Path, tmp_path: Path, case: str) -> None:
    dtype, powers, said = WEIGHTS[case]
    path = scaled(model, tmp_path / "weights.gguf", dtype, **powers)
    steps, _ = prompt_logits(path, "off")
    chunks, session = prompt_logits(path, "auto")
    assert session.prefill == f"token by token: {said}"
    np.testing.assert_array_equal(chunks, steps)


def test_bf16_weights_of_the_usual_size_go_in_by_chunks(model: Path, tmp_path: Path) -> None:
    path = scaled(model, tmp_path / "usual.gguf", "bf16", ffn_up=0, attn_v=0)
    _, session = prompt_logits(path, "own")
    assert session.prefill == "own kernels, 512 tokens at once"


def test_a_norm_that_makes_everything_small_is_noticed(model: Path, tmp_path: Path) -> None:
    name = "blk.0.ffn_norm.weight"
    with open_gguf(model) as file:
        values = file.read(name).view(np.float32) * 2.0**-20
    path = changed_gguf(model, tmp_path / "norm.gguf", tensors={name: ("f32", values.shape, values.tobytes())})
    _, session = prompt_logits(path, "auto")
    assert session.prefill.startswith(f"token by token: {name} has many values below 2^-14")
