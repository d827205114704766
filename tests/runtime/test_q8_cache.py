"""A KV cache in 8 bits, end to end on the host target: steps and chunks against numpy with the same rounding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import q8_memory

from psigraph.ir.errors import UsageError
from psigraph.options import SessionOptions
from psigraph.runtime.engine import Engine
from psigraph.runtime.synth import model as synth
from psigraph.runtime.synth.model import Size, write_synth
from psigraph.runtime.synth.vocab import SMALLEST
from psigraph.session import Session, open_session
from psigraph.text.perplexity import log_probabilities

TINY = Path(__file__).parents[2] / "fixtures" / "tiny" / "tiny-qwen3-q4_k_m.gguf"
MEAN_KL, LARGEST_KL = 2e-4, 1e-3
TWO_LAYERS = Size(layers=2, hidden=256, feed_forward=256, heads=2, kv_heads=1, untied=False, context=1024)
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 300)
OPTIONS: dict[str, Any] = {"ctx": 320, "outputs": ("logits",), "kv_type": "q8"}


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of every row, in nats."""
    p, q = log_probabilities(np.atleast_2d(reference)), log_probabilities(np.atleast_2d(other))
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synth.SIZES, "small", TWO_LAYERS)
        return write_synth(tmp_path_factory.mktemp("small") / "small.gguf", "small", "q4_k_m", 1, vocab=SMALLEST)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return [int(token) for token in np.random.default_rng(5).integers(0, 250, max(LENGTHS) + 8)]


@pytest.fixture(scope="module")
def by_steps(small: Path, ids: list[int]) -> dict[int, np.ndarray]:
    """Length -> logits behind a prompt of that length, in numpy."""
    found: dict[int, np.ndarray] = {}
    with open_session(small, SessionOptions("cpu", **OPTIONS)) as session:
        assert session.kv_type == "q8"

        def keep(index: int) -> None:
            if index + 1 in LENGTHS:
                found[index + 1] = session.engine.logits()

        session.engine.feed(ids[: max(LENGTHS)], keep)
    return found


@pytest.fixture(scope="module")
def chunked(small: Path) -> Iterator[Session]:
    with open_session(small, SessionOptions("host", prefill="own", **OPTIONS)) as session:
        assert session.kv_type == "q8"
        assert session.facts["arithmetic"].endswith("q8 cache")
        yield session


def test_every_length_gives_what_numpy_gives(chunked: Session, by_steps: dict[int, np.ndarray], ids: list[int]) -> None:
    divergences: list[np.ndarray] = []
    for length in LENGTHS:
        chunked.reset()
        chunked.feed(ids[:length])
        divergences.append(divergence(by_steps[length], chunked.engine.logits()))
    assert np.mean(divergences) <= MEAN_KL
    assert np.max(divergences) <= LARGEST_KL


def test_chunks_and_steps_leave_the_same_cache(chunked: Session, ids: list[int]) -> None:
    """Behind the first layer's keys and values lies no rounding but theirs: of a prompt they are off by a step at
    most. Positions that were not fed stay as they were."""
    engine = chunked.engine
    assert isinstance(engine, Engine)
    count = 33

    def caches() -> dict[str, tuple[np.ndarray, np.ndarray]]:
        names = [f"{name}.{layer}" for layer in range(2) for name in ("k_cache", "v_cache")]
        return {name: q8_memory.unpack(engine.read(name), 1, 128) for name in names}

    found = []
    for sizes in ((count,), (1,) * count, (16, 1, 15, 1)):
        for layer in range(2):
            for name in ("k_cache", "v_cache"):
                engine.clear(f"{name}.{layer}")
        chunked.reset()
        at = 0
        for size in sizes:
            chunked.feed(ids[at : at + size])
            at += size
        assert at == count
        found.append(caches())
    for one in found:
        for name, (integers, scales) in one.items():
            assert scales[:, :count].all(), name
            assert (np.abs(integers[:, :count]).max(axis=2) == 127).all(), name
            assert not scales[:, count:].any(), name
    for other in found[1:]:
        for name in ("k_cache.0", "v_cache.0"):
            (integers, scales), (theirs, their_scales) = found[0][name], other[name]
            np.testing.assert_allclose(scales, their_scales, rtol=2.0**-8, err_msg=name)
            assert np.abs(integers.astype(int) - theirs).max() <= 1, name


def test_decoding_goes_on_and_repeats_bit_for_bit(chunked: Session, ids: list[int]) -> None:
    runs = []
    for _ in range(2):
        chunked.reset()
        chunked.feed(ids[:47])
        tokens = [token for chunk in chunked.decode(6) for token in chunk]
        runs.append((tokens, chunked.engine.logits().tobytes(), chunked.position))
    assert runs[0] == runs[1]
    chunked.rewind(33)  # in the middle of a tile, whose rows behind it are stale
    chunked.feed(ids[33:47])
    again = [token for chunk in chunked.decode(6) for token in chunk]
    assert again == runs[0][0]


def test_the_cache_takes_half_the_memory(chunked: Session) -> None:
    engine = chunked.engine
    assert isinstance(engine, Engine)
    taken = [buffer.nbytes for buffer in engine.program.buffers if "_cache." in buffer.name]
    assert taken == [320 * 136] * 4
    assert sum(launch.cache_bytes_per_position for launch in engine.program.step().kernels) == 2 * 2 * 136


def test_steps_of_the_tiny_model_against_numpy(ids: list[int]) -> None:
    """Unfused and fused: q8 rows that differ from numpy's are those that rounding could place either way."""
    with open_session(TINY, SessionOptions("cpu", ctx=64, outputs=("logits",), kv_type="q8")) as session:
        wanted = session.forced_logits(ids[:34])
    for disable in ((), ("fuse_rope_append", "fuse_attention")):
        options = SessionOptions("host", ctx=64, outputs=("logits",), kv_type="q8", disable=disable)
        with open_session(TINY, options) as session:
            found = divergence(wanted, session.forced_logits(ids[:34]))
        assert found.mean() <= MEAN_KL
        assert found.max() <= LARGEST_KL


def test_a_type_that_does_not_exist() -> None:
    for backend in ("cpu", "host", "auto"):
        with pytest.raises(UsageError, match="--kv-type q4: choose one of f16, q8"):
            open_session(TINY, SessionOptions(backend, kv_type="q4"))
    with pytest.raises(UsageError, match="f32 cache"):
        open_session(TINY, SessionOptions("cpu", kv_type="q8", cache_dtype="f32"))
