"""Going back to an earlier position with the engine that drives GPUs: what a chat does between two turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from psigraph.ir.errors import UsageError
from psigraph.options import SessionOptions
from psigraph.runtime.synth.model import write_synth
from psigraph.runtime.synth.vocab import SMALLEST
from psigraph.session import open_session


def test_what_is_fed_after_a_rewind_gives_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSIGRAPH_CACHE_DIR", str(tmp_path))
    model = write_synth(tmp_path / "model.gguf", "0.6b", "q4_k_m", 1, layers=1, vocab=SMALLEST)
    with open_session(model, SessionOptions("host", ctx=16)) as session:
        session.feed([5, 6, 7, 8])
        tokens = [token for chunk in session.decode(4) for token in chunk]
        session.rewind(2)
        session.feed([7, 8])
        assert [token for chunk in session.decode(4) for token in chunk] == tokens
        with pytest.raises(UsageError, match="positions are 0 to 7"):
            session.rewind(8)
