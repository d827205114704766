"""What takes long and needs no model: the driver's context and, before it, nvidia-smi's word on who uses the GPU.

Begun as soon as a command's options are sound, it goes on in threads beside the imports, the model's header and the
passes. So nothing that is imported here may need numpy.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from .ir.errors import PsigraphError

if TYPE_CHECKING:
    from .bench.environment import GpuSnapshot
    from .runtime.cuda.driver import Driver

GPU_BACKENDS = ("auto", "cuda")


class GpuStart:
    """A GPU's driver on its way. Who does not `take` it closes it; closing it after that does nothing.

    device: number of the GPU. with_snapshot: ask nvidia-smi first. The context comes after its answer, since this
    process would show itself.
    """

    def __init__(self, device: int = 0, with_snapshot: bool = False) -> None:
        self.device = device
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._snapshot = self._pool.submit(_ask_who_is_there) if with_snapshot else None
        self._driver: Future[Driver] | None = self._pool.submit(self._start)
        self._driver.add_done_callback(_load_compiler)  # in the same thread, when nobody waits for it any more
        self._pool.shutdown(wait=False)

    def take(self) -> Driver:
        """The driver; DeviceError if none works."""
        assert self._driver is not None, "a driver has one owner"
        driver, self._driver = self._driver, None
        return driver.result()

    def snapshot(self) -> GpuSnapshot | None:
        """What nvidia-smi said; None if it was not to be asked."""
        return self._snapshot.result() if self._snapshot is not None else None

    def close(self) -> None:
        """Wait, and give back what nobody took."""
        if self._driver is not None:
            driver, self._driver = self._driver, None
            if driver.exception() is None:
                driver.result().close()

    def _start(self) -> Driver:
        if self._snapshot is not None:
            _wake_driver()  # takes most of the time, and shows no process yet
            self._snapshot.exception()
        return start_driver(self.device)


def start_driver(device: int) -> Driver:
    """A GPU's driver."""
    from .runtime.cuda.driver import Driver

    return Driver(device)


def _wake_driver() -> None:
    """Let the driver initialize; what is wrong with it, `start_driver` finds again and says."""
    with suppress(ImportError, RuntimeError, KeyError, ValueError):  # the last two: a code without a name
        from cuda.bindings import driver

        driver.cuInit(0)


def _load_compiler(driver: Future[Driver]) -> None:
    """NVRTC names its version in the kernel cache's keys, and a hundred megabytes are loaded for that."""
    if driver.exception() is not None:
        return
    from .runtime.cuda.nvrtc import nvrtc_version

    with suppress(PsigraphError, RuntimeError):
        nvrtc_version()


def _ask_who_is_there() -> GpuSnapshot:
    from .bench.environment import GpuSnapshot

    return GpuSnapshot()
