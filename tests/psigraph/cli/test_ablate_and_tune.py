"""`psigraph ablate` and `tune` where they cannot run: nothing on stdout, and advice that helps."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import Q4

from psigraph import gpu_start
from psigraph.cli import run
from psigraph.ir.errors import DeviceError
from psigraph.runtime.cuda.driver import OTHER_BACKENDS


@pytest.mark.parametrize("command", ["ablate", "tune"])
@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--backend", "cpu"], 2, "--backend cpu"),
        (["--backend", "auto"], 7, "no driver; use --backend host to try the command out"),
        ([], 7, "no driver; use --backend host to try the command out"),
        (["--device", "1", "--backend", "host"], 2, "one device"),
    ],
)
def test_kernels_need_a_gpu_or_the_host_target(
    command: str,
    arguments: list[str],
    code: int,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start(_: int) -> None:
        raise DeviceError(f"no driver; {OTHER_BACKENDS}")

    monkeypatch.setattr(gpu_start, "start_driver", start)
    monkeypatch.setenv("PSIGRAPH_CACHE_DIR", str(tmp_path))
    assert run([command, str(Q4), *arguments]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert named in shown.err


def test_ablate_names_what_fills_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ablate", str(Q4), "--backend", "host", "--depth", "2048"]) == 2
    assert "--depth and --steps fill 2173 positions, the model's context has 2048; lower one" in capsys.readouterr().err


def test_ablate_measures_one_chunk_of_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ablate", str(Q4), "--backend", "host", "--prompt-tokens", "513"]) == 2
    assert "--prompt-tokens 513: one chunk is measured, of at most 512 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["nan", "0", "inf", "soon"])
def test_tune_takes_a_number_of_seconds(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", str(Q4), "--backend", "host", "--seconds", seconds]) == 2
    assert "--seconds" in capsys.readouterr().err
