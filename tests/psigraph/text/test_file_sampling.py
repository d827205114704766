"""What a file asks for in `general.sampling.*`, from its header to a drawn token."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from changed_gguf import changed_gguf
from tiny_model import Q4

import psigraph
from psigraph.cli import run
from psigraph.runtime.gguf.write import pair
from psigraph.text.file_sampling import PREFIX, file_sampling, published_sampling

ASKED = {"temp": ("f32", 0.7), "top_k": ("i32", 3), "top_p": ("f32", 0.5), "min_p": ("f32", 0.1),
         "penalty_repeat": ("f32", 1.3), "penalty_last_n": ("i32", -1)}  # fmt: skip
FOUND = {"temperature": 0.7, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.3, "penalty_window": -1}
GIVEN = ["--backend", "cpu", "--seed", "7", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = {f"{PREFIX}{name}": pair(f"{PREFIX}{name}", *value) for name, value in ASKED.items()}
    return changed_gguf(Q4, tmp_path_factory.mktemp("asking") / "asking.gguf", pairs)


def test_a_file_without_the_keys_asks_for_nothing() -> None:
    assert file_sampling(Q4) == {}


def test_every_key_becomes_its_field(asking: Path) -> None:
    assert file_sampling(asking) == FOUND


@pytest.mark.parametrize(
    ("name", "value", "found", "said"),
    [
        ("top_k", -1, {"top_k": 0}, ""),
        ("top_k", 20.0, {"top_k": 20}, ""),
        ("temp", 0, {"temperature": 0.0}, ""),
        ("mirostat", 0, {}, ""),
        ("mirostat", 2, {}, "general.sampling.mirostat is not supported"),
        ("sequence", "kpt", {}, "general.sampling.sequence is not supported"),
        ("temp", float("nan"), {}, "temperature is nan"),
        ("temp", -1.0, {}, "temperature is -1.0"),
        ("top_k", 2.5, {}, "top_k is 2.5"),
        ("top_p", True, {}, "'True' is no number"),
        ("min_p", "x" * 500, {}, "is no number"),
        ("top_k", float("inf"), {}, "top_k is inf"),
    ],
)
def test_what_cannot_be_taken_is_said_and_left_out(name: str, value: Any, found: dict[str, Any], said: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert published_sampling({f"{PREFIX}{name}": value}) == found
    texts = [str(one.message) for one in caught]
    assert (said in texts[0] and len(texts[0]) < 200) if said else not texts


def written(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert run(["generate", str(path), "--prompt", "The state", *GIVEN, "--json", *options]) == 0
    return str(json.loads(capsys.readouterr().out)["ids"])


def test_generate_as_a_chat_takes_them(asking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "0.7", "--top-k", "3", "--top-p", "0.5", "--min-p", "0.1", "--repeat-penalty", "1.3"]
    wanted = written(Q4, capsys, "--chat", *options, "--penalty-window", "-1")
    assert written(asking, capsys, "--chat") == wanted


def test_chat_begins_with_them_an_option_comes_first_and_set_shows_all(
    asking: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/set\n")))
    assert run(["chat", str(asking), "--backend", "cpu", "--top-p", "0.4"]) == 0
    shown = capsys.readouterr().err
    for line in ("temperature 0.7", "top_k 3", "top_p 0.4", "repetition_penalty 1.3", "penalty_window -1"):
        assert f"  {line}\n" in shown


def test_the_api_takes_them_for_a_chat(asking: Path) -> None:
    talk = [{"role": "user", "content": "The state"}]
    with psigraph.load(Q4, "cpu", ctx=64, sampling=True) as plain:
        wanted = plain.chat(talk, 8, seed=7, **FOUND)
        "".join(wanted)
    with psigraph.load(asking, "cpu", ctx=64, sampling=True) as model:
        assert model.published_sampling == FOUND
        answer = model.chat(talk, 8, seed=7)
        "".join(answer)
        assert answer.ids == wanted.ids
