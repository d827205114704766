"""What the tests of the host target share."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def device_header() -> str:
    return (importlib.resources.files("psigraph.codegen.device") / "psigraph_device.cuh").read_text()


@pytest.fixture(scope="session")
def kernel_text(device_header: str) -> Callable[[str], str]:
    """Device header and kernel in one text, as a Program gives it to a compiler."""
    return lambda body: f"{device_header}\n{body}"
