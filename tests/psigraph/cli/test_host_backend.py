"""The same commands on generated kernels, run by this machine's CPU: nothing there may say cuda."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import Q4, reference_greedy

from psigraph.report import read_json, validate_report


def psigraph(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the stand-in driver cannot be taken out again."""
    return subprocess.run([sys.executable, "-m", "psigraph", *arguments], capture_output=True, text=True, check=False)


def test_a_report_of_the_stand_in(tmp_path: Path) -> None:
    prompt, greedy, _ = reference_greedy(Q4, "one_token")
    out = tmp_path / "report.json"
    ids = ["--prompt-token-ids", ",".join(map(str, prompt)), "--max-new-tokens", "3", "--repeats", "1"]
    done = psigraph("bench", "--model-path", str(Q4), "--backend", "host", *ids, "--json-out", str(out))
    assert done.returncode == 0, done.stderr
    report = read_json(out)
    assert validate_report(report) == []
    assert report["execution_engine"] == "psionic_qwen3_host"
    assert report["environment"]["stand_in_driver"] is True
    assert "gpu" not in report["environment"]
    assert report["roofline"] is None
    assert "cuda" not in done.stdout
    assert report["runs"][0]["generated_tokens"] == greedy[:3]


def test_the_stand_in_does_not_pass_for_a_gpu() -> None:
    code = f"""
from psigraph.runtime import host
from psigraph.ir.errors import DeviceError
from psigraph.session import open_session
host.activate()
with open_session({str(Q4)!r}) as session:
    print(session.backend, session.facts["no_gpu_because"])
try:
    open_session({str(Q4)!r}, "cuda")
except DeviceError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("cpu the stand-in driver is loaded")
    assert "--backend host" in lines[1]


def test_out_of_memory_says_how_much_and_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSIGRAPH_HOST_MEMORY", str(20 << 20))
    given = ("generate", str(Q4), "--backend", "host", "--prompt-token-ids", "0", "--max-new-tokens", "1")
    done = psigraph(*given)
    assert done.returncode == 8
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert "context of 2048 tokens" in line
    assert "20 MiB are free; lower --ctx" in line
    monkeypatch.setenv("PSIGRAPH_HOST_MEMORY", str(80 << 20))  # 64 MiB of it for loading
    assert psigraph(*given).returncode == 8
    assert psigraph(*given, "--ctx", "64", "--no-graph").returncode == 0
