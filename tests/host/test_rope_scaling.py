"""A file with stretched positions, on the stand-in driver and in numpy: steps and prompts agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from psigraph.ir.errors import UsageError
from psigraph.options import SessionOptions
from psigraph.runtime.gguf.write import pair
from psigraph.runtime.synth import model as synth
from psigraph.runtime.synth.model import SMALLEST, Size, write_synth
from psigraph.session import open_session

SCALING = "qwen3.rope.scaling."
# So few positions were trained on that the ramp and both its ends lie within the pairs, and prompts go past them.
YARN = [
    pair(f"{SCALING}type", "str", "yarn"),
    pair(f"{SCALING}factor", "f32", 8.0),
    pair(f"{SCALING}original_context_length", "u32", 512),
]
LINEAR = [pair(f"{SCALING}type", "str", "linear"), pair(f"{SCALING}factor", "f32", 8.0)]
SIZE = Size(layers=2, hidden=256, feed_forward=256, heads=2, kv_heads=1, untied=False, context=4096)
IDS = [int(token) for token in np.random.default_rng(4).integers(0, 250, 90)]

Write = Callable[[list[bytes]], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    plain = synth._pairs

    def written(pairs: list[bytes]) -> Path:
        monkeypatch.setitem(synth.SIZES, "small", SIZE)
        monkeypatch.setattr(synth, "_pairs", lambda *args: plain(*args) + pairs)
        return write_synth(tmp_path / f"{len(pairs)}.gguf", "small", "q8_0", 1, vocab=SMALLEST)

    return written


def logits(path: Path, backend: str, prefill: str) -> np.ndarray:
    """After a prompt that a chunk takes in, and after three steps more."""
    with open_session(path, SessionOptions(backend, ctx=128, outputs=("logits",), prefill=prefill)) as session:
        session.feed(IDS)
        found = [session.engine.logits()]
        for token in (1, 2, 3):
            session.feed([token])
            found.append(session.engine.logits())
        assert session.prefill.startswith("own kernels" if prefill == "own" else "token by token")
        return np.stack(found)


@pytest.mark.parametrize("pairs", [YARN, LINEAR])
def test_kernels_compute_what_numpy_does(pairs: list[bytes], write: Write) -> None:
    path, plain = write(pairs), write([])
    wanted = logits(path, "cpu", "off")
    for prefill in ("off", "own"):
        np.testing.assert_allclose(logits(path, "host", prefill), wanted, atol=0.02)
    assert np.abs(logits(plain, "cpu", "off") - wanted).max() > 0.1


def test_the_context_is_the_files_own(write: Write) -> None:
    with open_session(write(YARN), SessionOptions("cpu", ctx=4096)) as session:
        assert session.context == 4096
    with pytest.raises(UsageError, match="the model allows 1 to 4096"):
        open_session(write(YARN), SessionOptions("cpu", ctx=4097))
