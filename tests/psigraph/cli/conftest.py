"""What the tests of commands share: helpers beside the tests of psigraph/, no GPU, a kernel cache of their own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_model import TINY

from psigraph import gpu_choice, gpu_start, numpy_path
from psigraph.build import Model
from psigraph.ir.errors import DeviceError


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests of a run: kernels compile once."""
    return tmp_path_factory.mktemp("kernels")


WEIGHTS: dict[tuple[str, str, type], np.ndarray] = {}
DEQUANTIZED = numpy_path.dequantized


def dequantized_once(model: Model, name: str, dtype: type) -> np.ndarray:
    """The tiny models' weights for numpy: every command loads them, and they never change."""
    path = Path(model.file.path)
    if path.parent != TINY:
        return DEQUANTIZED(model, name, dtype)
    key = (path.name, name, dtype)
    if key not in WEIGHTS:
        WEIGHTS[key] = DEQUANTIZED(model, name, dtype)
        WEIGHTS[key].flags.writeable = False
    return WEIGHTS[key]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, kernel_cache: Path) -> None:
    """As on a machine without a driver, whatever the machine."""

    reason = "no NVIDIA driver on this machine; install it, or use --backend cpu"

    def start(_: int) -> Any:
        raise DeviceError(reason)

    monkeypatch.setattr(gpu_start, "start_driver", start)
    monkeypatch.setattr(gpu_choice, "_told", {reason})  # once a process: tests/psigraph/test_no_gpu.py
    monkeypatch.setattr(numpy_path, "dequantized", dequantized_once)
    monkeypatch.setenv("PSIGRAPH_CACHE_DIR", str(kernel_cache))
    shutil.rmtree(kernel_cache / "told", ignore_errors=True)  # every test is a first run
