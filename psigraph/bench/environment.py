"""The machine, for reports: GPU, driver, clocks, whether anybody else uses the GPU, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..version import package_version

_SECONDS = 20  # an nvidia-smi that takes longer does not answer
_BUSY_PERCENT = 5  # utilization above this: somebody computes there whose process is not shown (another container)
_GPU_FIELDS = (
    "uuid",
    "pci.bus_id",
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "utilization.gpu",
    "memory.used",
    "persistence_mode",
)
_PACKAGES = ("cuda-bindings", "nvidia-cuda-nvrtc", "numpy", "gguf", "tokenizers")


class GpuSnapshot:
    """What nvidia-smi says of all GPUs. Take it before this process has a context on one: it would show itself."""

    def __init__(self) -> None:
        # gpu_uuid first, to tell GPUs apart; the rest is the question that every report of this field records.
        of_gpus = "--query-gpu=" + ",".join(_GPU_FIELDS)
        of_processes = "--query-compute-apps=gpu_uuid,pid,process_name,used_gpu_memory"
        with ThreadPoolExecutor(max_workers=2) as pool:  # an answer takes a tenth of a second and more
            gpus, self.processes = pool.map(_smi, (of_gpus, of_processes))
        self.gpus = [dict(zip(_GPU_FIELDS, row, strict=False)) for row in gpus]

    def of(self, bus_id: str | None) -> dict[str, Any]:
        """For a report: driver, clocks, and whether the GPU at this PCI address (`0000:18:00.0`) was idle."""
        rows = [gpu for gpu in self.gpus if bus_id is None or _same_address(gpu.get("pci.bus_id", ""), bus_id)]
        if not rows:
            return {"gpu_idle": False, "gpu_idle_check": "nvidia-smi did not answer, so nobody can tell"}
        gpu = rows[0]
        others = [row[1:] for row in self.processes if row and row[0] == gpu.get("uuid")]
        busy = _number(gpu.get("utilization.gpu"))
        return {
            "gpu_idle": not others and (busy is None or busy <= _BUSY_PERCENT),
            "gpu_idle_check": {"processes": [", ".join(row) for row in others], "utilization_percent": busy},
            "driver": gpu.get("driver_version"),
            "clocks": {
                "sm_mhz": _number(gpu.get("clocks.sm")),
                "memory_mhz": _number(gpu.get("clocks.mem")),
                "sm_max_mhz": _number(gpu.get("clocks.max.sm")),
                "memory_max_mhz": _number(gpu.get("clocks.max.mem")),
                "power_limit_w": _number(gpu.get("power.limit")),
                "temperature_c": _number(gpu.get("temperature.gpu")),
            },
        }


def machine_record() -> dict[str, Any]:
    """Versions, processor and commit; no name and no address of the machine."""
    return {
        "psigraph": package_version(),
        "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def commit() -> str | None:
    """The commit of the source tree that this package runs from, `+changes` behind it where files differ from it.

    Where there is no repository: $PSIGRAPH_COMMIT, for copies of a tree, or None.
    """
    folder = Path(__file__).resolve().parent
    head = _git(folder, "rev-parse", "HEAD")
    # A package in somebody else's repository (a virtual environment inside it) has no commit of its own.
    if head is None or _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return os.environ.get("PSIGRAPH_COMMIT") or None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ":/")
    return head + ("+changes" if changed else "")


def seconds_since_start() -> float | None:
    """How long this process has been running, to a hundredth of a second; None where the system does not say."""
    try:
        # The command's name may hold spaces and brackets; the fields behind the last bracket are numbers.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def peak_memory_bytes() -> int:
    """The most main memory that this process has held."""
    import resource

    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


def _smi(query: str) -> list[list[str]]:
    """Rows of nvidia-smi's answer; none where it is absent or fails."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def _same_address(left: str, right: str) -> bool:
    """nvidia-smi writes the domain with eight digits, the driver with four."""
    return left.lower().lstrip("0") == right.lower().lstrip("0")


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:  # "[N/A]"
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _version(package: str) -> str | None:
    from importlib import metadata  # brings the whole of `email`, which nothing before a report needs

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
