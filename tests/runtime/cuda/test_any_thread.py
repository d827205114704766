"""A driver is used from any thread, names codes that nobody named, and says what is wrong in a forked child."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from psigraph.ir.errors import DeviceError
from psigraph.runtime import host
from psigraph.runtime.cuda.driver import Driver


@pytest.fixture
def driver() -> Iterator[Driver]:
    host.activate(sms=4)
    host.forget()
    with Driver(0) as made:
        yield made
    host.forget()


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What the work gives, or the error that it raises, in a thread of its own."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except DeviceError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def test_any_thread_may_call(driver: Driver) -> None:
    address = driver.call("cuMemAlloc", 64)
    # The stand-in knows as little of a new thread as a GPU's driver does.
    assert in_a_thread(lambda: driver.api.cuMemsetD8(address, 0, 64)[0].name) == "CUDA_ERROR_INVALID_CONTEXT"
    for _ in range(2):  # a second thread may get the first one's number
        assert in_a_thread(lambda: driver.call("cuMemsetD8", address, 0, 64)) is None
    with Driver(0) as other:
        assert in_a_thread(lambda: (other.call("cuMemGetInfo"), driver.call("cuMemsetD8", address, 0, 64))[1]) is None
    before = host.live()["device memory"]
    in_a_thread(lambda: driver.give_back("cuMemFree", address))
    assert host.live()["device memory"] == before - 1


def test_a_code_without_a_name_is_an_error_of_the_driver(driver: Driver) -> None:
    host.inject(1, 12345)
    with pytest.raises(DeviceError, match="cuMemAlloc failed with error 12345, which these bindings have no name for"):
        driver.call("cuMemAlloc", 64)
    host.inject(1, 12345)
    driver.give_back("cuStreamSynchronize", 0)
    with pytest.raises((TypeError, ValueError)):  # what we get wrong ourselves is no error of the driver
        driver.call("cuMemAlloc", "much")


def test_a_forked_child_is_told_and_frees_nothing(driver: Driver) -> None:
    address = driver.call("cuMemAlloc", 64)
    memory = driver.host_memory(16)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing"
        try:
            driver.call("cuMemAlloc", 64)
        except DeviceError as error:
            said = str(error)
        memory.close()
        driver.close()
        os.write(write, f"{said}; {len(host.calls())} calls".encode())
        os._exit(0)
    os.close(write)
    calls = len(host.calls())
    assert os.waitpid(child, 0)[1] == 0
    with os.fdopen(read) as pipe:
        assert pipe.read() == (
            "a GPU's state does not go over into a forked child; load the model there, or start processes by spawn; "
            f"{calls} calls"
        )
    driver.call("cuMemFree", address)
    memory.close()
