"""The CUDA driver, as little of it as the engine needs, with errors that say what to do.

Every call goes through `Driver.call`, so that a failure of any of them becomes one `DeviceError` naming the call, and
that any thread may make it; tests make each call fail once (`runtime.host.inject`).
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ...ir.errors import DeviceError, OutOfMemoryError

# Commands that need kernels say this without the part that is no help there (psigraph/cli/kernels_only.py).
OTHER_BACKENDS = "use --backend cpu or host"
ADVICE = {
    "CUDA_ERROR_NO_DEVICE": f"no NVIDIA GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES, or {OTHER_BACKENDS}",
    "CUDA_ERROR_INVALID_DEVICE": "there is no such GPU; `psigraph doctor` lists them",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": (  # 803
        "libcuda and the kernel's driver differ in version, mostly after an update: restart the machine, or let the "
        "container have the libcuda of its host's driver"
    ),
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": (  # 804
        "a newer libcuda of cuda-compat stands before the driver's own, which only data center GPUs allow: take its "
        "folder (such as /usr/local/cuda/compat) out of LD_LIBRARY_PATH, and install driver 580 or newer"
    ),
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the kernels were compiled for another GPU; clear the kernel cache",
}
UNKNOWN_STATE = "the GPU's state is unknown now; start the program again"
PORTABLE_CLUSTER = 8  # blocks: what every GPU with clusters can run (CUDA C Programming Guide, thread block clusters)
OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
FORKED = "a GPU's state does not go over into a forked child; load the model there, or start processes by spawn"
LOWER = "lower --ctx, use a smaller model, or free the GPU (nvidia-smi shows who holds it)"


@dataclass(frozen=True)
class DeviceFacts:
    """What a report says of a GPU; memory in bytes, clock in kHz."""

    name: str
    capability: tuple[int, int]
    sm_count: int
    total_memory: int
    l2_bytes: int
    driver_version: str


class _Thread(threading.local):
    """The driver whose context is current in a thread, by this class."""

    current: object = None


_thread = _Thread()
os.register_at_fork(after_in_child=lambda: setattr(_thread, "current", None))


class Driver:
    """The primary context of one GPU, in the process that made it. Close it, or use it in a `with` statement."""

    def __init__(self, device: int = 0) -> None:
        self._key = object()  # in `_thread`, which must not keep the driver itself
        self._process = os.getpid()
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise DeviceError(f"cuda-bindings cannot be imported ({error}); pip install cuda-bindings") from error
        self.api = driver
        self._retained = False
        try:
            self.call("cuInit", 0)
        except RuntimeError as error:  # the bindings' own word for "no libcuda"
            raise DeviceError(
                f"no NVIDIA driver (libcuda.so.1) on this machine; install it, or {OTHER_BACKENDS}"
            ) from error
        count = self.call("cuDeviceGetCount")
        if not 0 <= device < count:
            raise DeviceError(f"--device {device}: this machine has {count} GPU(s), numbered from 0")
        self.device = self.call("cuDeviceGet", device)
        self.context = self.call("cuDevicePrimaryCtxRetain", self.device)
        self._retained = True
        try:
            self.enter()
        except DeviceError:
            self.close()
            raise

    @property
    def forked(self) -> bool:
        """Whether this is a child that was forked from the driver's process: nothing works here, nothing is freed."""
        return os.getpid() != self._process

    def enter(self) -> None:
        """Make the context current in the calling thread, unless it is; DeviceError in a forked child."""
        if _thread.current is not self._key:
            if self.forked:
                raise DeviceError(FORKED)
            if self._retained:
                self._call("cuCtxSetCurrent", self.context)
                _thread.current = self._key

    def call(self, name: str, *args: Any) -> Any:
        """Call a driver function, from any thread; its result without the status, DeviceError on failure."""
        self.enter()
        return self._call(name, *args)

    def give_back(self, name: str, *args: Any) -> None:
        """Call a function that frees something; a failure is not reported, and a forked child frees nothing."""
        with suppress(DeviceError):
            self.call(name, *args)

    def _call(self, name: str, *args: Any) -> Any:
        try:
            status, *results = getattr(self.api, name)(*args)
        except (KeyError, ValueError) as error:  # the bindings' words for a code that their version has no name for
            unnamed = re.match(r"(\d+)( is not a valid CUresult|$)", str(error))
            if unnamed is None:
                raise
            raise DeviceError(
                f"{name} failed with error {unnamed[1]}, which these bindings have no name for: {UNKNOWN_STATE}"
            ) from None
        if status != self.api.CUresult.CUDA_SUCCESS:
            raise self._error(name, status)
        return results[0] if len(results) == 1 else tuple(results) if results else None

    def _error(self, name: str, status: Any) -> DeviceError:
        label = getattr(status, "name", str(status))
        if label == OUT_OF_MEMORY:
            return OutOfMemoryError(f"{name} failed with {label}: it needs more than is free ({self._free()}); {LOWER}")
        advice = ADVICE.get(label, UNKNOWN_STATE)
        # The driver's own words: the stand-in names the kernel here, and what it did.
        told, text = self.api.cuGetErrorString(status)
        words = " ".join(bytes(text or b"").decode(errors="replace").split()) if told == status.CUDA_SUCCESS else ""
        return DeviceError(f"{name} failed with {label}{f' ({words})' if words and words != label else ''}: {advice}")

    def attribute(self, name: str) -> int:
        value = getattr(self.api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self.call("cuDeviceGetAttribute", value, self.device))

    def facts(self) -> DeviceFacts:
        raw = self.call("cuDeviceGetName", 128, self.device)
        version = int(self.call("cuDriverGetVersion"))
        return DeviceFacts(
            name=bytes(raw).split(b"\0")[0].decode(),
            capability=(self.attribute("COMPUTE_CAPABILITY_MAJOR"), self.attribute("COMPUTE_CAPABILITY_MINOR")),
            sm_count=self.attribute("MULTIPROCESSOR_COUNT"),
            total_memory=int(self.call("cuDeviceTotalMem", self.device)),
            l2_bytes=self.attribute("L2_CACHE_SIZE"),
            driver_version=f"{version // 1000}.{version % 1000 // 10}",
        )

    def _free(self) -> str:
        """How much device memory is free, for messages: asking may fail too."""
        status, free, _ = self.api.cuMemGetInfo()
        return f"{mebibytes(free)} of GPU memory" if status == status.CUDA_SUCCESS else "how much is not known"

    def allocate(self, nbytes: int, what: str) -> int:
        """Device memory; OutOfMemoryError says how much was needed and free, and what to lower."""
        try:
            return int(self.call("cuMemAlloc", nbytes))
        except OutOfMemoryError:
            raise OutOfMemoryError(
                f"{what} needs {mebibytes(nbytes)} of GPU memory, cuMemAlloc found less free ({self._free()}); {LOWER}"
            ) from None

    def load_kernel(self, image: bytes, name: str, dynamic_shared: int = 0, cluster: int = 1) -> tuple[Any, Any]:
        """(module, function), with its dynamic shared memory and clusters of its size allowed."""
        module = self.call("cuModuleLoadData", image)
        try:
            function = self.call("cuModuleGetFunction", module, name.encode())
            attributes = self.api.CUfunction_attribute
            if dynamic_shared > 32 * 1024:  # without this, dynamic and static memory together must not exceed 48 KiB
                limit = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self.call("cuFuncSetAttribute", function, limit, dynamic_shared)
            if cluster > PORTABLE_CLUSTER:
                self.call(
                    "cuFuncSetAttribute", function, attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1
                )
            carveout = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            self.call("cuFuncSetAttribute", function, carveout, 100)
        except BaseException:
            self.give_back("cuModuleUnload", module)
            raise
        return module, function

    def launch(
        self,
        function: Any,
        grid: int,
        block: int,
        shared_bytes: int,
        stream: Any,
        args: Sequence[tuple[int, type]],
        programmatic: bool = False,
        cluster: int = 1,
    ) -> None:
        """Launch a kernel; args are (value, ctypes type) pairs; cluster: blocks that run side by side."""
        api = self.api
        config = api.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = stream
        attributes = []
        if programmatic:
            attribute = api.CUlaunchAttribute()
            attribute.id = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if cluster > 1:
            attribute = api.CUlaunchAttribute()
            attribute.id = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster, 1, 1
            attributes.append(attribute)
        config.attrs = attributes
        config.numAttrs = len(attributes)
        values = tuple(value for value, _ in args)
        types = tuple(kind for _, kind in args)
        self.call("cuLaunchKernelEx", config, function, (values, types), 0)

    def host_memory(self, nbytes: int) -> HostMemory:
        """Page-locked host memory; OutOfMemoryError says how much was needed and free, and what to lower."""
        return HostMemory(self, nbytes)

    def close(self) -> None:
        if self._retained and not self.forked:
            with suppress(DeviceError):  # not by `give_back`: what could not be made current must be released too
                self._call("cuDevicePrimaryCtxRelease", self.device)
        self._retained = False

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HostMemory:
    """Page-locked memory that the GPU copies from and to; `view` is a memoryview of bytes."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self._driver = driver
        try:
            self.address = int(driver.call("cuMemHostAlloc", nbytes, 0))
        except OutOfMemoryError:
            raise OutOfMemoryError(
                f"cuMemHostAlloc could not lock {mebibytes(nbytes)} of main memory ({mebibytes(free_main_memory())} "
                "are free); lower --ctx, or close other programs"
            ) from None
        self.view = memoryview((ctypes.c_uint8 * nbytes).from_address(self.address)).cast("B")

    def close(self) -> None:
        if self.address:
            self._driver.give_back("cuMemFreeHost", self.address)
            self.address = 0


def mebibytes(nbytes: int) -> str:
    """`1,234 MiB`, and `0.03 MiB` for little."""
    size = nbytes / 2**20
    return f"{size:,.0f} MiB" if size >= 10 else f"{size:.2f} MiB"


def free_main_memory() -> int:
    """Bytes of main memory that nothing uses."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
