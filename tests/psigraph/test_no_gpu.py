"""What is said where no GPU works: once, with the driver's reason and what numpy costs."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_model import Q4

from psigraph import gpu_choice, gpu_probe, gpu_start
from psigraph.cli import run
from psigraph.ir.errors import DeviceError
from psigraph.runtime.cuda.driver import OTHER_BACKENDS, Driver

REASON = "cuInit failed with CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE: a newer libcuda"


@pytest.fixture(autouse=True)
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: int) -> Any:
        raise DeviceError(f"{REASON}, or {OTHER_BACKENDS}")

    monkeypatch.setattr(gpu_start, "start_driver", start)
    monkeypatch.setattr(gpu_choice, "_told", set())


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", str(Q4), "--prompt", "a", "--max-new-tokens", "1"],
        ["bench", "--model-path", str(Q4), "--prompt-token-ids", "1", "--max-new-tokens", "2", "--repeats", "1"],
        ["perplexity", str(Q4), "--text", __file__, "--window", "4", "--max-tokens", "4"],
        ["chat", str(Q4), "--script", "/dev/null"],
    ],
)
def test_every_command_says_once_that_there_is_no_gpu(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    code = run(arguments)
    shown = capfd.readouterr()
    assert code == 0, shown.err
    assert (shown.out + shown.err).count("no GPU") == 1
    (line,) = [line for line in shown.err.splitlines() if "no GPU" in line]
    assert line.startswith(f"psigraph: warning: no GPU works here ({REASON}): running in numpy, about ")
    assert line.endswith(" tok/s")


def test_numpy_that_was_asked_for_costs_no_word(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(Q4), "--prompt", "a", "--max-new-tokens", "1", "--backend", "cpu"]) == 0
    assert "no GPU" not in capfd.readouterr().err


@pytest.mark.parametrize(("seconds", "cost"), [(0.0205, "about 49 tok/s"), (0.6, "about 2 tok/s"), (4.0, "about 0.2")])
def test_the_cost_is_measured(seconds: float, cost: str) -> None:
    engine: Any = SimpleNamespace(
        context=2048, step_times=lambda count: np.array([9e6, 1e6 * seconds])[:count], reset=lambda: None
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gpu_choice.tell_of_numpy(engine, "why")
        gpu_choice.tell_of_numpy(engine, "why")
    (said,) = caught
    assert cost in str(said.message)


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "restart the machine"),
        ("CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE", "out of LD_LIBRARY_PATH"),
    ],
)
def test_codes_that_have_a_cause_say_it(code: str, advice: str) -> None:
    """803 and 804, from a command's own call and from doctor's."""
    from cuda.bindings import driver

    status = getattr(driver.CUresult, code)
    found = Driver.__new__(Driver)
    found.api = SimpleNamespace(
        CUresult=driver.CUresult, cuGetErrorString=lambda _: (driver.CUresult.CUDA_SUCCESS, b"x")
    )
    assert advice in str(found._error("cuInit", status))
    with pytest.raises(RuntimeError, match=advice):
        gpu_probe._check(driver, (status,))
