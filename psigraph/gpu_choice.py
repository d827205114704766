"""Whether a GPU of this machine serves, and what is said where none does."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from . import gpu_start
from .codegen.target import Target, arch_of_capability, target_for
from .gpu_start import GpuStart
from .ir.errors import DeviceError, UsageError
from .runtime.cuda.driver import OTHER_BACKENDS, Driver

if TYPE_CHECKING:
    from .numpy_path import NumpyEngine

STAND_IN_NAME = "psigraph host target"

_told: set[str] = set()


def tell_of_numpy(engine: NumpyEngine, reason: str) -> None:
    """Warn, once a process, that no GPU works here, why not, and what that costs: two steps are timed."""
    if reason in _told:
        return
    _told.add(reason)
    seconds = float(engine.step_times(min(2, engine.context)).min()) / 1e6
    engine.reset()
    cost = f"about {1 / seconds:,.0f} tok/s" if seconds < 0.1 else f"about {1 / seconds:.1g} tok/s"
    why = reason.replace(f", or {OTHER_BACKENDS}", "")
    warnings.warn(f"no GPU works here ({why}): running in numpy, {cost}", stacklevel=2)


def settled(starting: GpuStart, may_fail: bool) -> tuple[Driver | None, str]:
    """The started driver, or (None, why not) where another backend may take its place."""
    try:
        driver = starting.take()
    except DeviceError as error:
        if may_fail:
            error.with_traceback(None)  # kept with the start; its frames would keep the model
            return None, str(error)
        raise
    try:
        facts = driver.facts()
        if facts.name.startswith(STAND_IN_NAME):
            raise DeviceError("the stand-in driver is loaded in this process; use --backend host, or a new process")
        arch_of_capability(*facts.capability)
    except (DeviceError, UsageError) as error:
        driver.close()
        if may_fail:
            return None, str(error)
        if isinstance(error, UsageError):
            raise DeviceError(f"{facts.name}: {error}; {OTHER_BACKENDS}") from None
        raise
    return driver, ""


def present_target() -> Target | None:
    """The target of GPU 0 of this machine, with its number of multiprocessors; None where no GPU works."""
    try:
        driver = gpu_start.start_driver(0)
    except DeviceError:
        return None
    try:
        facts = driver.facts()
        if facts.name.startswith(STAND_IN_NAME):
            return None
        return target_for(arch_of_capability(*facts.capability), facts.sm_count)
    except (DeviceError, UsageError):
        return None
    finally:
        driver.close()
