"""Each thing that doctor looks at, in its good and its bad forms."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from psigraph import diagnosis
from psigraph.diagnosis import Capability, Check, satisfies
from psigraph.ir.errors import DeviceError

H100 = {
    "index": 0,
    "name": "NVIDIA H100",
    "capability": "9.0",
    "multiprocessors": 132,
    "total_bytes": 80 << 30,
    "free_bytes": 79 << 30,
    "error": None,
}


def answer(**changes: Any) -> dict[str, Any]:
    return {"cuda_version": "13.0", "devices": [H100], "error": None, **changes}


def with_driver(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Capability]:
    """Capabilities by name, on a machine whose driver gives that answer."""
    monkeypatch.setattr(diagnosis, "ask_driver", lambda: answer(**changes))
    return {capability.name: capability for capability in diagnosis.diagnose().capabilities}


@pytest.mark.parametrize(
    ("version", "bounds", "within"),
    [
        ("13.5.37", ">=13,<14", True),
        ("14.0", ">=13,<14", False),
        ("12.9.1", ">=13,<14", False),
        ("1.2", ">=1.2,<2", True),
        ("1.10.0", ">=1.2,<2", True),
        ("2.0.0rc1", ">=1.2,<2", False),
        ("6.0.3", ">=6", True),
    ],
)
def test_bounds(version: str, bounds: str, within: bool) -> None:
    assert satisfies(version, bounds) is within


def test_a_missing_or_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert diagnosis._package("no-such-package-at-all>=1").status == "missing"
    monkeypatch.setattr(diagnosis.metadata, "version", lambda name: "1.0")
    old = diagnosis._package("cuda-core>=1.2,<2")
    assert (old.status, old.advice) == ("warning", "pip install 'cuda-core>=1.2,<2'")


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_driver(monkeypatch)["run on a GPU"]
    assert found.works
    assert "sm_90" in found.reason
    assert "79.0 GiB free" in found.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"error": "no NVIDIA driver is installed", "devices": [], "cuda_version": None}, "no NVIDIA driver"),
        ({"cuda_version": "12.4"}, "CUDA 13.0 is needed"),
        ({"devices": []}, "shows no GPU"),
        ({"devices": [{**H100, "capability": "7.5"}]}, "sm_80"),
    ],
)
def test_no_usable_gpu(changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_driver(monkeypatch, **changes)
    assert not found["run on a GPU"].works
    assert reason in found["run on a GPU"].reason
    assert found["run in numpy on the CPU"].works


def test_a_gpu_in_use_is_a_warning() -> None:
    check = diagnosis._gpu({**H100, "free_bytes": None, "error": "the driver answers CUDA_ERROR_OUT_OF_MEMORY"})
    assert check.status == "warning"
    assert "OUT_OF_MEMORY" in check.found


def test_nothing_useful_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_package", lambda requirement: Check("numpy", "missing", "not installed"))
    monkeypatch.setattr(diagnosis, "ask_driver", answer)
    found = diagnosis.diagnose()
    assert not found.useful
    assert not any(capability.works for capability in found.capabilities)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: None)
    found = with_driver(monkeypatch, error="none", devices=[])
    assert found["run the generated kernels on the CPU"] == Capability(
        "run the generated kernels on the CPU", False, "needs g++"
    )
    assert "apt-get install g++" in diagnosis._gxx().advice


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> str:
        raise DeviceError("NVRTC's bindings cannot be imported")

    monkeypatch.setattr("psigraph.runtime.cuda.nvrtc.nvrtc_version", absent)
    found = with_driver(monkeypatch)
    assert found["compile kernels for GPUs"].reason == "needs NVRTC"
    assert not found["run on a GPU"].works


def test_a_driver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("probe", 30)

    monkeypatch.setattr(diagnosis.subprocess, "run", hang)
    assert "did not answer within 30 s" in diagnosis.ask_driver()["error"]


@pytest.mark.parametrize(("printed", "said"), [("", "ended with code -11: boom"), ("[]", "makes no sense")])
def test_a_driver_that_crashes(printed: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], -11, stdout=printed, stderr="first\nboom\n")
    monkeypatch.setattr(diagnosis.subprocess, "run", lambda *_, **__: done)
    assert said in diagnosis.ask_driver()["error"]


def test_the_probe_answers_on_any_machine() -> None:
    found = diagnosis.ask_driver()
    assert set(found) == {"cuda_version", "devices", "error"}
    assert (found["error"] is None) == (found["cuda_version"] is not None)


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSIGRAPH_CACHE_DIR", str(tmp_path / "new" / "cache"))
    assert diagnosis._cache().status == "ok"
    assert not (tmp_path / "new").exists(), "looking must not write"

    (tmp_path / "file").touch()
    monkeypatch.setenv("PSIGRAPH_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert diagnosis._cache().status == "warning"

    monkeypatch.setenv("PSIGRAPH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: -1)
    assert "another user" in diagnosis._cache().found
