"""Going back to an earlier position with the engine that drives GPUs: what a chat does between two turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from psigraph.ir.errors import UsageError
from psigraph.options import SessionOptions
from psigraph.runtime.synth.model import write_synth
from psigraph.runtime.synth.vocab import SMALLEST
from psigraph.session import open_session


def test_what_is_fed_after_a_rewind_gives_the_tokens_of_a_new_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PSIGRAPH_CACHE_DIR", str(tmp_path))
    model = write_synth(tmp_path / "model.gguf", "0.6b", "q4_k_m", 1, layers=1, vocab=SMALLEST)
    with open_session(model, SessionOptions("host", ctx=16)) as session:

        def tokens(*ids: int) -> list[int]:
            session.feed(ids)
            return [token for chunk in session.decode(4) for token in chunk]

        wanted = tokens(5, 6, 9, 10)
        session.reset()
        # Other tokens stand on the device then, so that what was left from before does not pass for an answer.
        assert not set(tokens(5, 6, 7, 8)) & set(wanted)
        session.rewind(2)
        assert tokens(9, 10) == wanted
        with pytest.raises(UsageError, match="positions are 0 to 7"):
            session.rewind(8)
