"""`psigraph synth`: options reach the writer, and nothing is left behind when it fails."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from psigraph.cli import run, synth
from psigraph.ir.errors import OutputError
from psigraph.runtime.synth.model import write_synth
from psigraph.runtime.synth.vocab import SMALLEST


def test_options_reach_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: dict[str, Any] = {}

    def write(path: Path, size: str, quant: str, seed: int, **rest: Any) -> Path:
        rest.pop("progress")(1, 2)
        called.update(rest, path=path, size=size, quant=quant, seed=seed)
        path.write_bytes(b"12345")
        return path

    monkeypatch.setattr(synth, "write_synth", write)
    out = tmp_path / "m.gguf"
    arguments = ["--size", "1.7B", "--quant", "Q4_K_M", "--seed", "7", "--untied", "--layers", "2"]
    assert run(["synth", str(out), *arguments]) == 0
    assert called == {"path": out, "size": "1.7b", "quant": "q4_k_m", "seed": 7, "untied": True, "layers": 2}
    assert capsys.readouterr().out == f"{out}: 5 bytes, 1.7b q4_k_m, seed 7\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--quant", "q4_k_m"], "--size"),
        (["--size", "9b", "--quant", "q4_k_m"], "--size"),
        (["--size", "1.7b", "--quant", "q2_k"], "--quant"),
        (["--size", "1.7b", "--quant", "q4_k_m", "--layers", "0"], "--layers"),
        (["--size", "1.7b", "--quant", "q4_k_m", "--seed", "-1"], "--seed"),
    ],
)
def test_wrong_options(arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["synth", str(tmp_path / "m.gguf"), *arguments]) == 2
    shown = capsys.readouterr().err
    assert named in shown
    assert shown.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_written_over_by_force_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, link = tmp_path / "m.gguf", tmp_path / "link.gguf"
    target.write_bytes(b"mine")
    link.symlink_to(target)
    given = ["--size", "0.6b", "--quant", "q8_0", "--layers", "1"]
    for out in (target, link):
        assert run(["synth", str(out), *given]) == OutputError.exit_code
        assert "--force" in capsys.readouterr().err
        assert target.read_bytes() == b"mine"
    small = partial(write_synth, vocab=SMALLEST)
    monkeypatch.setattr(synth, "write_synth", small)
    assert run(["synth", str(link), *given, "--force"]) == 0
    assert link.is_symlink()
    assert target.read_bytes()[:4] == b"GGUF"


def test_an_unwritable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "absent" / "m.gguf"
    assert run(["synth", str(out), "--size", "0.6b", "--quant", "f16", "--layers", "1"]) == OutputError.exit_code
    assert str(out) in capsys.readouterr().err
