"""The same commands on generated kernels, run by this machine's CPU: nothing there may say cuda."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import Q4, reference_greedy

from psigraph.bench.report import read_json, validate_report
from psigraph.ir.errors import UsageError
from psigraph.runtime.host.variables import check_variables

SOURCES = (".py", ".h", ".cpp")


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
from psigraph.options import SessionOptions
from psigraph.session import open_session
host.activate()
with open_session({str(Q4)!r}) as session:
    print(session.backend, session.facts["no_gpu_because"])
try:
    open_session({str(Q4)!r}, SessionOptions("cuda"))
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
    assert "(20 MiB of GPU memory); lower --ctx" in line
    assert psigraph(*given, "--ctx", "64", "--no-graph").returncode == 0


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("SMS", "many", "1 to 999"),
        ("SMS", "0", "1 to 999"),
        ("MEMORY", "64G", "bytes"),
        ("THREADS", "-1", "threads"),
        ("CAPABILITY", "91", "80, 86"),
        ("ORDER", "backward", "forward, reverse or shuffle"),
        ("BUILD", "debug", "fast or step"),
        ("BUILD", "", "fast or step"),
        ("FAIL", "7", "NTH:CODE"),
    ],
)
def test_variables_that_mean_nothing_are_named(
    name: str, value: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"PSIGRAPH_HOST_{name}", value)
    with pytest.raises(UsageError, match=f"PSIGRAPH_HOST_{name}={value}: give .*{named}"):
        check_variables()


@pytest.mark.parametrize(("capability", "edges", "most"), [("80", False, 163), ("90", True, 227), ("120", True, 99)])
def test_a_capability_gets_the_kernels_of_its_class(
    capability: str, edges: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PSIGRAPH_HOST_CAPABILITY", capability)
    prompt, greedy, _ = reference_greedy(Q4, "one_token")
    code = f"""
from psigraph.options import SessionOptions
from psigraph.session import open_session
with open_session({str(Q4)!r}, SessionOptions("host", ctx=16)) as session:
    session.feed({prompt!r})
    launches = session.program.step().kernels
    largest = max(launch.shared_bytes for launch in launches)
    print(any(launch.programmatic for launch in launches), largest <= {most} * 1024)
    print([token for chunk in session.decode(2) for token in chunk])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{edges} True", str(greedy[:2])]


def test_sound_variables_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = {"SMS": "132", "MEMORY": "1000000000", "THREADS": "2", "ORDER": "reverse", "BUILD": "fast", "FAIL": "9:2"}
    for name, value in sound.items():
        monkeypatch.setenv(f"PSIGRAPH_HOST_{name}", value)
    check_variables()
    for name in sound:
        monkeypatch.setenv(f"PSIGRAPH_HOST_{name}", "fast" if name == "BUILD" else "")
    check_variables()


def test_every_variable_is_documented() -> None:
    root = Path(__file__).parents[3]
    read = re.compile(r"""(?:environ|getenv|from_environment|_RULES)\b[^\n]*?["'](_?PSIGRAPH_[A-Z_]+)["']""")
    folders = ("psigraph", "runtime", "codegen", "ir", "passes")
    texts = [path.read_text() for folder in folders for path in (root / folder).rglob("*.*") if path.suffix in SOURCES]
    names = {name for text in texts for name in read.findall(text)}
    documented = (root / "docs" / "debugging.md").read_text()
    assert {"PSIGRAPH_DEBUG", "PSIGRAPH_HOST_SMS", "PSIGRAPH_CACHE_DIR"} <= names
    assert not {name for name in names if f"`{name}`" not in documented}
