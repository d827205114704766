"""Logits that are no finite numbers end a text with an error that names the position, on kernels and in numpy."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nano import PROMPT, write_nano

from psigraph.build import open_model
from psigraph.ir.errors import ModelFileError
from psigraph.numpy_path import NumpyEngine
from psigraph.options import SessionOptions
from psigraph.runtime import host
from psigraph.runtime.decode import checked
from psigraph.session import open_session
from psigraph.text.generation import Decoder, Limits
from psigraph.text.sampler import SamplerSettings


def damaged(folder: Path, tensor: str) -> Path:
    """A model whose values do not fit into halves or floats, because a norm's weights are larger than anything."""
    path = write_nano(folder)
    with open_model(path) as model:
        place = model.file.tensors[tensor]
    data = bytearray(path.read_bytes())
    data[place.offset : place.offset + place.nbytes] = np.full(place.nbytes // 4, 3e38, "<f4").tobytes()
    path.write_bytes(data)
    return path


DRAWN = Limits(4, SamplerSettings(seed=1))


@pytest.mark.parametrize(
    ("tensor", "backend", "options", "limits"),
    [
        ("blk.0.attn_norm", "cpu", {}, Limits(4)),
        ("blk.0.attn_norm", "cpu", {"sampling": True}, DRAWN),
        ("blk.0.attn_norm", "cpu", {"outputs": ("logits",)}, Limits(4, logprobs=1)),
        ("blk.0.attn_norm", "host", {}, Limits(4)),
        ("blk.0.attn_norm", "host", {"kv_type": "q8"}, Limits(4)),
        ("blk.0.attn_norm", "host", {"sampling": True}, DRAWN),
        ("blk.0.ffn_norm", "host", {"disable": ("fuse_choice",), "graph": False}, Limits(4)),
        ("blk.0.attn_q_norm", "host", {}, Limits(4)),
        ("output_norm", "host", {}, Limits(4)),
    ],
    ids=lambda value: "" if isinstance(value, Limits) else str(value),
)
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT * 8], ids=["steps", "chunk"])
def test_a_damaged_file_gives_an_error_and_no_token(
    tensor: str, backend: str, options: dict[str, Any], limits: Limits, prompt: tuple[int, ...], tmp_path: Path
) -> None:
    path, position = damaged(tmp_path, f"{tensor}.weight"), len(prompt) - 1
    with np.errstate(all="ignore"), open_session(path, SessionOptions(backend, ctx=32, **options)) as session:
        decoder = Decoder(session)
        for _ in range(2):
            run = decoder.run(prompt, limits)
            with pytest.raises(ModelFileError, match=rf"at position {position}: .* not finite"):
                next(run)
            assert (run.ids, run.reason) == ([], "")
        session.reset()
        session.feed(prompt)
        with pytest.raises(ModelFileError, match=f"at position {position}: "):
            list(session.decode(9, 4))
    if backend == "host":
        assert host.violations() == []


@pytest.mark.parametrize(
    ("tokens", "good", "position"),
    [([-1], [], 7), ([5, 6, -1, 8], [5, 6], 9), ([5, -1, -1], [5], 8)],
)
def test_tokens_before_it_are_given(tokens: list[int], good: list[int], position: int) -> None:
    given: list[int] = []
    with pytest.raises(ModelFileError, match=f"at position {position}:"):
        given.extend(chain.from_iterable(checked(tokens, 7)))
    assert given == good
    assert list(checked([3, 0], 7)) == [[3, 0]]


def spoiled(engine: NumpyEngine, after: int) -> Callable[[], None]:
    """A step that meets a NaN in its last weights after so many steps."""
    steps, sound = iter(range(99)), engine.step

    def step() -> None:
        if next(steps) == after:
            engine._weights["output_norm.weight"] = engine._weights["output_norm.weight"] * np.nan
        sound()

    return step


def test_where_it_begins_is_told_in_the_middle_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(write_nano(tmp_path), SessionOptions("cpu", ctx=16)) as session:
        run = Decoder(session).run(PROMPT, Limits(8, ignore_end=True))
        wanted = list(run)
        assert isinstance(session.engine, NumpyEngine)
        session.reset()
        session.feed(PROMPT)
        monkeypatch.setattr(session.engine, "step", spoiled(session.engine, 4))
        given: list[int] = []
        with pytest.raises(ModelFileError, match=f"at position {len(PROMPT) + 4}: "):
            given.extend(chain.from_iterable(session.decode(8, 3)))
        assert given == wanted[:5]
