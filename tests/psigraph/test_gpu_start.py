"""The driver begins early: in which order things happen, who owns it, and what is not imported for it."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from psigraph import gpu_start
from psigraph.bench import environment
from psigraph.gpu_start import GpuStart
from psigraph.ir.errors import DeviceError


class FakeDriver:
    closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened, in order; nvidia-smi answers only after the driver woke up."""
    happened: list[str] = []
    awake = threading.Event()

    def wake() -> None:
        happened.append("driver awake")
        awake.set()

    def ask() -> str:
        awake.wait(5)
        happened.append("answer")
        return "the answer"

    def start(device: int) -> FakeDriver:
        happened.append(f"context on {device}")
        return FakeDriver()

    monkeypatch.setattr(gpu_start, "_wake_driver", wake)
    monkeypatch.setattr(gpu_start, "_ask_who_is_there", ask)
    monkeypatch.setattr(gpu_start, "start_driver", start)
    return happened


def test_the_context_waits_for_the_answer_and_the_driver_does_not(began: list[str]) -> None:
    start = GpuStart(2, with_snapshot=True)
    driver = start.take()
    assert began == ["driver awake", "answer", "context on 2"]
    assert start.snapshot() == "the answer"
    start.close()
    assert not driver.closed


def test_what_nobody_took_is_closed(began: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    drivers: list[FakeDriver] = []

    def start(_: int) -> FakeDriver:
        drivers.append(FakeDriver())
        return drivers[-1]

    monkeypatch.setattr(gpu_start, "start_driver", start)
    unwanted = GpuStart()
    unwanted.close()
    unwanted.close()
    assert drivers[0].closed
    assert unwanted.snapshot() is None
    assert began == []


def test_why_there_is_no_driver_is_said_to_who_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: int) -> None:
        raise DeviceError("no driver")

    monkeypatch.setattr(gpu_start, "start_driver", start)
    with pytest.raises(DeviceError, match="no driver"):
        GpuStart().take()
    GpuStart().close()


def test_both_questions_to_nvidia_smi_are_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2)

    def answer(query: str) -> list[list[str]]:
        together.wait(5)  # breaks unless the other is under way
        return [["GPU-a"]] if "--query-gpu" in query else []

    monkeypatch.setattr(environment, "_smi", answer)
    assert environment.GpuSnapshot().gpus == [{"uuid": "GPU-a"}]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("psigraph.gpu_start", ["numpy", "yaml", "importlib.metadata"]),
        ("psigraph.cli.bench", ["numpy", "importlib.metadata"]),
        (
            "psigraph.bench.measure, psigraph.runtime.tokenizer.end_tokens",
            ["tokenizers", "jinja2", "networkx", "rich", "gguf"],
        ),
    ],
)
def test_what_the_way_to_the_first_token_does_not_import(module: str, absent: list[str]) -> None:
    # What the interpreter brings with it, an editable install's finder say, is no part of psigraph.
    code = f"import sys; before = set(sys.modules); import {module}; "
    code += f"print([name for name in {absent} if name in set(sys.modules) - before])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
