"""Asks the driver about its GPUs and prints the answer as JSON: `python -m psigraph.gpu_probe`.

A program of its own, because a broken driver can hang or end the process that asks it: `doctor` gives it a deadline.
"""

from __future__ import annotations

import json
import uuid
from typing import Any


def probe() -> dict[str, Any]:
    """What the driver says.

    cuda_version  newest CUDA of the driver, as `13.0`; None if it does not answer.
    devices       per GPU: index, name, bus_id `0000:18:00.0`, uuid as CUDA_VISIBLE_DEVICES takes it, capability `9.0`,
                  multiprocessors, total_bytes, free_bytes (None if no context could be made), error (why not, or None).
    error         why there is nothing to tell, or None.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        return _nothing(f"the CUDA bindings cannot be imported: {error}")
    try:
        _check(driver, driver.cuInit(0))
        number = _check(driver, driver.cuDriverGetVersion())
        count = _check(driver, driver.cuDeviceGetCount())
        devices = [_device(driver, index) for index in range(count)]
    except RuntimeError as error:  # a failed call, or libcuda.so.1 that is not there
        if "DynamicLib" in type(error).__name__:
            return _nothing("no NVIDIA driver is installed: libcuda.so.1 was not found")
        return _nothing(str(error).partition("\n")[0])
    return {"cuda_version": f"{number // 1000}.{number % 1000 // 10}", "devices": devices, "error": None}


def _nothing(error: str) -> dict[str, Any]:
    return {"cuda_version": None, "devices": [], "error": error}


def _device(driver: Any, index: int) -> dict[str, Any]:
    device = _check(driver, driver.cuDeviceGet(index))
    attribute = driver.CUdevice_attribute

    def read(name: str) -> int:
        value = _check(driver, driver.cuDeviceGetAttribute(getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), device))
        return int(value)

    name = _text(_check(driver, driver.cuDeviceGetName(128, device)))
    found: dict[str, Any] = {
        "index": index,
        "name": name,
        "bus_id": _text(_check(driver, driver.cuDeviceGetPCIBusId(16, device))),
        "uuid": _uuid(name, bytes(_check(driver, driver.cuDeviceGetUuid(device)).bytes)),
        "capability": f"{read('COMPUTE_CAPABILITY_MAJOR')}.{read('COMPUTE_CAPABILITY_MINOR')}",
        "multiprocessors": read("MULTIPROCESSOR_COUNT"),
        "total_bytes": int(_check(driver, driver.cuDeviceTotalMem(device))),
        "free_bytes": None,
        "error": None,
    }
    # Free memory needs a context, and a GPU that is full or set to one process at a time refuses one.
    try:
        context = _check(driver, driver.cuDevicePrimaryCtxRetain(device))
        _check(driver, driver.cuCtxSetCurrent(context))
        free, _ = _check(driver, driver.cuMemGetInfo())
        found["free_bytes"] = int(free)
    except RuntimeError as error:
        found["error"] = str(error)
    return found


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode(errors="replace")


def _uuid(name: str, raw: bytes) -> str:
    """A slice of a GPU (MIG) has its own."""
    return f"{'MIG' if ' MIG ' in name else 'GPU'}-{uuid.UUID(bytes=raw)}"


def _check(driver: Any, answer: tuple[Any, ...]) -> Any:
    """The results of a driver call without its status; RuntimeError with the status' name and advice if it failed."""
    from .runtime.cuda.driver import ADVICE

    status, *results = answer
    if status != driver.CUresult.CUDA_SUCCESS:
        name = getattr(status, "name", str(status))
        advice = ADVICE.get(name)
        raise RuntimeError(f"the driver answers {name}" + (f": {advice}" if advice else ""))
    return results[0] if len(results) == 1 else tuple(results)


if __name__ == "__main__":
    print(json.dumps(probe()))
