"""What nvidia-smi says about the GPU before a measurement: name, driver, and whether something else uses it."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuState:
    """gpu: name, "" without a GPU. idle: no other compute process. processes: "pid name MiB" of those there are."""

    gpu: str = ""
    driver: str = ""
    idle: bool = False
    processes: tuple[str, ...] = ()


def gpu_state(card: str = "0", nvidia_smi: str = "nvidia-smi", own: frozenset[int] | None = None) -> GpuState:
    """State of a GPU; `own` are process ids that do not count as others (default: this process).

    card: its PCI address, `0000:18:00.0`: nvidia-smi numbers GPUs in another order than the driver.
    """
    own = frozenset({os.getpid()}) if own is None else own
    name = _query(nvidia_smi, card, "--query-gpu=name,driver_version")
    apps = _query(nvidia_smi, card, "--query-compute-apps=pid,process_name,used_gpu_memory")
    if not name or apps is None:
        return GpuState()
    gpu, _, driver = name[0].rpartition(", ")
    others = []
    for line in apps:
        pid, *rest = (part.strip() for part in line.split(","))
        if not (pid.isdigit() and int(pid) in own):
            others.append(" ".join([pid, *rest]))
    return GpuState(gpu, driver, not others, tuple(others))


def _query(nvidia_smi: str, card: str, what: str) -> list[str] | None:
    path = shutil.which(nvidia_smi)
    if path is None:
        return None
    try:
        answer = subprocess.run(
            [path, f"--id={card}", what, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else None
