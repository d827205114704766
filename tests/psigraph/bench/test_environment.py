"""What a report says of the machine, from made-up answers of nvidia-smi."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest

from psigraph.bench import environment
from psigraph.bench.environment import GpuSnapshot, commit, machine_record, peak_memory_bytes, seconds_since_start

GPUS = (
    "GPU-a, 00000000:18:00.0, NVIDIA H200, 580.1, 1980, 3201, 1980, 3201, 700.00, 35, 0, 4, Enabled\n"
    "GPU-b, 00000000:2A:00.0, NVIDIA H200, 580.1, [N/A], 3201, 1980, 3201, 700.00, 35, 97, 4, Enabled\n"
)


def answering(monkeypatch: pytest.MonkeyPatch, gpus: str, processes: str) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, gpus if "--query-gpu" in command[1] else processes, "")

    monkeypatch.setattr(environment.subprocess, "run", run)


def test_an_idle_gpu_beside_a_busy_one(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, GPUS, "GPU-b, 4242, python, 1024\n")
    snapshot = GpuSnapshot()
    idle = snapshot.of("0000:18:00.0")
    assert idle["gpu_idle"] is True
    assert idle["driver"] == "580.1"
    assert idle["clocks"]["sm_mhz"] == 1980.0
    busy = snapshot.of("0000:2a:00.0")
    assert busy["gpu_idle"] is False
    assert busy["gpu_idle_check"] == {"processes": ["4242, python, 1024"], "utilization_percent": 97.0}
    assert busy["clocks"]["sm_mhz"] is None


def test_work_of_processes_that_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, GPUS, "")
    assert GpuSnapshot().of("0000:2a:00.0")["gpu_idle"] is False


def test_without_nvidia_smi_nobody_says_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(environment.subprocess, "run", absent)
    snapshot = GpuSnapshot()
    assert snapshot.of("0000:18:00.0")["gpu_idle"] is False
    assert snapshot.of(None)["gpu_idle"] is False
    monkeypatch.setenv("PSIGRAPH_COMMIT", "abc")
    assert commit() == "abc"
    monkeypatch.delenv("PSIGRAPH_COMMIT")
    assert commit() is None


def test_the_machine() -> None:
    record = machine_record()
    assert record["cores"] >= 1
    assert record["packages"]["numpy"]
    assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{40,64}(\+changes)?", record["commit"])
    assert peak_memory_bytes() > 1 << 20
    seconds = seconds_since_start()
    assert seconds is not None
    assert 0 < seconds < 86_400
