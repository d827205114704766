"""Perplexity and divergence against float64 by hand, windows, and references that are no references."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import Q4, TINY, divergence, reference_logits

from psigraph.cli import run
from psigraph.ir.errors import OutputError, PsigraphError, UsageError
from psigraph.options import SessionOptions
from psigraph.session import open_session
from psigraph.text.perplexity import log_probabilities, measure
from psigraph.text.saved_logits import Reference, load_reference, save_logits

SAVED = TINY / "reference_logits.npz"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSIGRAPH_CACHE_DIR", str(tmp_path / "cache"))


class Table:
    """A session whose logits depend on the token and its position."""

    vocabulary, context = 7, 16

    def __init__(self) -> None:
        self.table = np.random.default_rng(1).normal(size=(self.context, self.vocabulary, self.vocabulary))
        self.position = 0

    def reset(self) -> None:
        self.position = 0

    def forced_logits(self, ids: Any) -> np.ndarray:
        rows = [self.table[self.position + index, token] for index, token in enumerate(ids)]
        self.position += len(ids)
        return np.stack(rows)


IDS = [1, 2, 3, 4, 5, 6, 0, 1, 2, 3]


@pytest.mark.parametrize("window", [1, 3, 5, 9, 10, 16])
def test_every_token_but_a_windows_first_is_scored_and_the_context_is_emptied_between(window: int) -> None:
    session: Any = Table()
    wanted = []
    for index in range(1, len(IDS)):
        if index % window:
            row = session.table[index % window - 1, IDS[index - 1]]
            wanted.append(row[IDS[index]] - np.log(np.exp(row).sum()))
    kept: list[np.ndarray] = []
    result = measure(session, IDS, window, keep=kept)
    assert np.allclose(result.likelihoods, wanted, rtol=0, atol=1e-12)
    assert len(result.likelihoods) == len(wanted)
    if wanted:
        assert result.perplexity == pytest.approx(np.exp(-np.mean(wanted)))
        assert result.record()["scored"] == len(wanted)
    else:
        assert result.perplexity is result.uncertainty is None
    assert np.concatenate(kept).shape == (10, 7)
    assert "divergence" not in result.record()


def test_divergence_by_hand() -> None:
    session: Any = Table()
    other = np.random.default_rng(2).normal(size=(10, 7))
    other[3, 2] = -np.inf  # a token that the reference forbids costs nothing
    own = np.stack([session.table[index, token] for index, token in enumerate(IDS)])
    saved = Reference("saved.npz", "logits", IDS, 10, other)
    result = measure(session, IDS, 10, saved)
    p, q = np.exp(log_probabilities(other)), np.exp(log_probabilities(own))
    wanted = [sum(a * np.log(a / b) for a, b in zip(*rows, strict=True) if a) for rows in zip(p, q, strict=True)]
    assert result.divergences is not None
    assert np.allclose(result.divergences, wanted)
    found = result.record()["divergence"]
    assert (found["mean"], found["largest"]) == (pytest.approx(np.mean(wanted)), pytest.approx(max(wanted)))
    assert found["p99"] == pytest.approx(np.quantile(wanted, 0.99))
    assert found["largest_at"] == int(np.argmax(wanted))
    assert found["same_likeliest_token"] == np.mean(own.argmax(-1) == other.argmax(-1))
    itself = Reference("s", "logits", IDS, 10, own)
    assert measure(session, IDS, 10, itself).record()["divergence"]["largest"] == pytest.approx(0, abs=1e-12)


def test_the_tiny_model_against_its_reference() -> None:
    ids, logits = reference_logits(Q4)
    saved = load_reference(SAVED, "Q4_K_M")
    assert (saved.key, saved.ids, saved.window) == ("logits_q4_k_m", ids, 64)
    part = Reference(saved.name, saved.key, ids[:20], 20, saved.logits[:20])
    with open_session(Q4, SessionOptions("cpu", ctx=20, outputs=("logits",))) as session:
        result = measure(session, ids[:20], 20, part)
        assert result.divergences is not None
        assert result.divergences.max() <= 1e-6
        session.reset()
        wanted = divergence(logits[:20], session.forced_logits(ids[:20]))
    assert np.allclose(result.divergences, wanted, atol=1e-12)


def test_what_cannot_be_measured() -> None:
    session: Any = Table()
    for ids, window, named in (
        ([], 4, "prompt is empty"),
        ([7], 4, "ids are 0 to 6"),
        (IDS, 0, "window of 0"),
        (IDS, 17, "at most the context, 16"),
    ):
        with pytest.raises(UsageError, match=named):
            measure(session, ids, window)
    with pytest.raises(UsageError, match=r"logits is \[10, 6\]; this model gives \[10, 7\]"):
        measure(session, IDS, 10, Reference("s", "logits", IDS, 10, np.zeros((10, 6))))
    session.table[4, 5, 0] = np.nan
    with pytest.raises(PsigraphError, match="logits at position 4 are not finite"):
        measure(session, IDS, 10)


def broken(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


ROWS = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({}, "needs ids and logits; it holds nothing"),
        ({"logits": ROWS}, "needs ids and logits; it holds logits"),
        ({"ids": [1, 2], "logits_a": ROWS, "logits_b": ROWS}, "choose with --key"),
        ({"ids": [1], "logits": ROWS}, r"logits must be float\[1, vocabulary\]"),
        ({"ids": [1.5, 2], "logits": ROWS}, "ids must be a list of whole numbers"),
        ({"ids": [1, 2], "logits": ROWS.astype(int)}, "logits must be float"),
        ({"ids": [1, 2], "logits": ROWS * np.nan}, "values that are no logits"),
        ({"ids": [1, 2], "logits": ROWS, "window": 0}, "a window at least 1"),
        ({"ids": [1, 2], "logits": np.array([{}, {}], dtype=object)}, r"no \.npz file of plain arrays"),
    ],
)
def test_files_that_hold_no_reference(arrays: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=named):
        load_reference(broken(tmp_path / "saved.npz", **arrays), "Q8_0")


@pytest.mark.parametrize(
    ("name", "write", "named"),
    [
        ("absent.npz", lambda path: None, "cannot be read: No such file"),
        ("text.npz", lambda path: path.write_text("hello"), r"no \.npz file"),
        ("cut.npz", lambda path: path.write_bytes(SAVED.read_bytes()[:5000]), r"no \.npz file"),
        ("empty.npz", lambda path: path.write_bytes(b""), r"no \.npz file"),
        ("one.npz", lambda path: np.save(path.open("wb"), ROWS), r"no \.npz file"),
        ("report.json", lambda path: path.write_text("{}"), "names no logits_file"),
        ("other.json", lambda path: path.write_text("["), "is not JSON"),
    ],
)
def test_files_that_are_something_else(name: str, write: Callable[[Path], Any], named: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    with pytest.raises(UsageError, match=named):
        load_reference(tmp_path / name, "Q8_0")


def test_what_is_saved_is_what_is_loaded_and_nothing_half_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "saved.npz"
    path.parent.mkdir()
    save_logits(path, [1, 2, 3], 2, [ROWS, ROWS[:1] + 1])
    found = load_reference(path, "Q4_K_M")
    assert (found.ids, found.window, found.key) == ([1, 2, 3], 2, "logits")
    assert found.logits.tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1]]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OutputError, match="cannot be written: No space left"):
        save_logits(path, [1], 1, [ROWS[:1]])
    assert [entry.name for entry in path.parent.iterdir()] == ["saved.npz"]
    assert load_reference(path, "Q4_K_M").ids == [1, 2, 3]


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Fellow-Citizens of the Senate and House of Representatives: I have the honor\n")
    given = ["perplexity", str(Q4), "--backend", "cpu", "--text", str(text), "--window", "8"]
    report, logits = tmp_path / "out" / "report.json", tmp_path / "logits.npz"
    report.parent.mkdir()
    assert run([*given, "--max-tokens", "12", "--json-out", str(report), "--save-logits", str(logits)]) == 0
    shown = capfd.readouterr().out
    assert "over 10 of 12 tokens, in windows of 8" in shown
    record = json.loads(report.read_text())
    assert (record["schema"], record["tokens"], record["window"]) == ("psigraph.perplexity.v1", 12, 8)
    assert 1 < record["perplexity"] < 4096
    assert record["artifact"]["sha256"].startswith("a7d5630a")
    assert record["logits_file"] == "../logits.npz"

    assert run(["perplexity", str(Q4), "--backend", "cpu", "--against", str(report)]) == 0
    shown = capfd.readouterr().out
    assert f"perplexity {record['perplexity']:.4f}" in shown
    assert "same likeliest token at 100.00 %" in shown
    assert run([*given, "--against", str(report)]) == 2
    assert "its ids are not those of the text" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "nothing to read: give --text FILE, or --against"),
        (["--text", "/nonexistent"], "/nonexistent: cannot be read"),
        (["--text", "/dev/null"], "/dev/null: holds no token"),
        (["--text", __file__, "--json-out", "a", "--save-logits", "./a"], "are both a; name two files"),
        (["--text", __file__, "--key", "a"], "--key names an array of --against"),
        (["--against", str(SAVED), "--max-tokens", "9"], "it goes with --text alone"),
        (["--against", str(SAVED), "--key", "nothing"], "needs ids and nothing"),
        (["--text", __file__, "--window", "9", "--ctx", "8"], "--window 9 does not fit into --ctx 8"),
        (["--text", __file__, "--window", "4096"], "a window of 4096 tokens does not fit into the model's context"),
        (["--against", str(SAVED), "--ctx", "16"], "a window of 64 tokens does not fit into --ctx 16"),
    ],
)
def test_refusals(arguments: list[str], named: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["perplexity", str(Q4), "--backend", "cpu", *arguments]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert named in shown.err.splitlines()[-1]
