"""The package's own face: load and compile, from nothing but `import psigraph`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import Q4, reference_greedy

import psigraph
from psigraph.ir.errors import UsageError


def test_load_and_decode() -> None:
    prompt, greedy, _ = reference_greedy(Q4, "one_token")
    with psigraph.load(Q4, "cpu", ctx=32) as session:
        session.feed(prompt)
        assert [token for chunk in session.decode(4) for token in chunk] == greedy[:4]


def test_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSIGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    compilation = psigraph.compile(Q4, tmp_path / "out", arches=["sm_90a"], ctx=64)
    assert [built.arch for built in compilation.built] == ["sm_90a"]
    assert compilation.built[0].program.notes["context"] == 64
    assert (tmp_path / "out" / "program.json").is_file()
    with pytest.raises(UsageError, match="sm_90a"):
        psigraph.compile(Q4, arches=["sm_1"])


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, psigraph; print([name for name in ('numpy', 'cuda', 'gguf') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
