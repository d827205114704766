"""What `psigraph doctor` shows and returns."""

from __future__ import annotations

import json

import pytest

from psigraph.cli import doctor, run
from psigraph.diagnosis import Capability, Check, Diagnosis

GPU = {"index": 0, "name": "NVIDIA H100", "capability": "9.0", "total_bytes": 1, "free_bytes": 1, "error": None}


def pretend(monkeypatch: pytest.MonkeyPatch, works: bool) -> Diagnosis:
    checks = (Check("numpy", "ok", "2.4"), Check("NVIDIA driver", "missing", "not there", "install driver 580"))
    capabilities = (Capability("run in numpy on the CPU", works, "slow"), Capability("compile", True, "all"))
    diagnosis = Diagnosis(checks, (GPU,), capabilities)
    monkeypatch.setattr(doctor, "diagnose", lambda: diagnosis)
    return diagnosis


@pytest.mark.parametrize(("works", "code"), [(True, 0), (False, 1)])
def test_exit_code_says_whether_anything_runs(works: bool, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, works)
    assert run(["doctor"]) == code


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend(monkeypatch, True)
    run(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert "  ok    numpy          2.4" in lines
    assert "  no    NVIDIA driver  not there" in lines
    assert "  ok    run in numpy on the CPU  slow" in lines
    assert lines[lines.index("What to do") + 1] == "  NVIDIA driver: install driver 580"


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend(monkeypatch, True)
    run(["doctor", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["useful"] is True
    assert record["gpus"] == [GPU]
    assert record["checks"][1]["advice"] == "install driver 580"
    assert record["capabilities"][0]["works"] is True


def test_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """numpy and gguf are installed wherever the tests run, so something works."""
    assert run(["doctor"]) == 0
    assert "run in numpy on the CPU" in capsys.readouterr().out
