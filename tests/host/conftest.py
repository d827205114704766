"""What the tests of the host target share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from psigraph.runtime import host


@pytest.fixture(scope="session")
def kernel_text() -> Callable[[str], str]:
    """A kernel's text with the device headers that it needs in front (`device_headers` has their texts)."""
    return lambda body: (
        f'#include "ring.cuh"\n#include "quant.cuh"\n#include "cluster.cuh"\n#include "cache.cuh"\n{body}'
    )


class Api:
    """cuda.bindings.driver with the status taken off; AssertionError with its name where a call fails."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self.driver = driver

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            status, *results = getattr(self.driver, name)(*args)
            assert status == 0, f"{name}: {status.name}"
            return results[0] if len(results) == 1 else tuple(results) if results else None

        return call

    def fails(self, name: str, *args: Any) -> str:
        """The name of the error that a call gives ("CUDA_SUCCESS" if none)."""
        status = getattr(self.driver, name)(*args)[0]
        return str(status.name)


@pytest.fixture
def api() -> Iterator[Api]:
    """The stand-in driver with a current context; afterwards nothing is left of the test."""
    host.activate(sms=4, memory_bytes=1 << 30)
    host.forget()
    api = Api()
    api.cuInit(0)
    device = api.cuDeviceGet(0)
    api.cuCtxSetCurrent(api.cuDevicePrimaryCtxRetain(device))
    yield api
    host.forget()
    api.driver.cuDevicePrimaryCtxRelease(device)
    host.set_order("forward")
