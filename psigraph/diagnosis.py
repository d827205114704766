"""What is installed here, what will work with it, and what to do about the rest: the facts behind `psigraph doctor`."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .ir.errors import PsigraphError
from .runtime.cuda.kernel_cache import default_cache_dir
from .runtime.private_cache import make_private

OLDEST_CAPABILITY = (8, 0)  # kernels use bulk copies of sm_90 where there are any, and cp.async of sm_80 elsewhere
OLDEST_DRIVER = (13, 0)  # cubins of a CUDA 13 compiler load from the first driver of that major version on
SMALLEST_CACHE = 64 << 20  # bytes: the kernels of a dozen models, several architectures each
PROBE_SECONDS = 30  # a driver that takes longer to say what it has does not work

# What `pip install psigraph` brings, for a source tree that was never installed and so has no metadata.
PACKAGES = (
    "click>=8.1.4",
    "cuda-bindings>=13,<14",
    "gguf>=0.17",
    "jinja2>=3.1.6",
    "networkx>=3.2",
    "numpy>=1.26",
    "nvidia-cuda-nvrtc>=13.0.48,<14",
    "pyyaml>=6.0.1",
    "rich>=13",
    "tokenizers>=0.20",
)
BARE = frozenset({"gguf", "numpy", "pyyaml"})  # enough to read a model file and run it in numpy
GXX_INSTALL = "apt-get install g++  (or: dnf install gcc-c++)"


@dataclass(frozen=True)
class Check:
    """One thing looked at. status: `ok`, `warning` or `missing`; advice: what to do, "" if nothing."""

    name: str
    status: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Capability:
    """One thing a user may want to do; reason: what stands in the way, or what it will run on."""

    name: str
    works: bool
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything found, in the order in which it is shown. gpus: see `gpu_probe.probe`."""

    checks: tuple[Check, ...]
    gpus: tuple[dict[str, Any], ...]
    capabilities: tuple[Capability, ...]

    @property
    def useful(self) -> bool:
        """Whether a model can be run here at all."""
        return any(capability.works for capability in self.capabilities if capability.name.startswith("run"))


def diagnose() -> Diagnosis:
    """Looks at this machine. Takes about a second; never raises for what it finds."""
    packages = [_package(requirement) for requirement in PACKAGES]
    nvrtc, gxx = _nvrtc(), _gxx()
    answer = ask_driver()
    driver = _driver(answer)
    gpus = [_gpu(device) for device in answer["devices"]]
    checks = (_python(), *packages, nvrtc, driver, *gpus, gxx, _cache(), _memory())
    return Diagnosis(checks, tuple(answer["devices"]), tuple(_capabilities(packages, nvrtc, driver, gpus, gxx)))


def ask_driver() -> dict[str, Any]:
    """The answer of `gpu_probe.probe`, asked in a process of its own that has a deadline."""
    command = [sys.executable, "-m", "psigraph.gpu_probe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return _silent(f"the driver did not answer within {PROBE_SECONDS} s; see `dmesg`, and restart the machine")
    except ValueError:  # it ended before it could print
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return _silent(f"asking the driver ended with code {done.returncode}: {last}")
    return answer if isinstance(answer, dict) else _silent("the driver's answer makes no sense")


def _silent(error: str) -> dict[str, Any]:
    return {"cuda_version": None, "devices": [], "error": error}


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        return Check("Python", "warning", found, "only Linux is tested; under Windows use WSL 2")
    return Check("Python", "ok", found)


def _package(requirement: str) -> Check:
    name = re.split(r"[<>=]", requirement, maxsplit=1)[0]
    install = f"pip install '{requirement}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "missing", "not installed", install)
    if not satisfies(version, requirement[len(name) :]):
        return Check(name, "warning", f"{version}, but {requirement} is needed", install)
    return Check(name, "ok", version)


def satisfies(version: str, bounds: str) -> bool:
    """Whether `1.2.3` lies within bounds such as `>=1.2,<2`; whatever follows the numbers is left out of account."""
    numbers = _numbers(version)
    for bound in bounds.split(","):
        if bound.startswith(">=") and numbers < _numbers(bound[2:]):
            return False
        if bound.startswith("<") and numbers >= _numbers(bound[1:]):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in leading.group().split(".")) if leading else ()


def _nvrtc() -> Check:
    try:
        from .runtime.cuda.nvrtc import nvrtc_version

        return Check("NVRTC", "ok", nvrtc_version())
    except (PsigraphError, ImportError, RuntimeError) as error:
        cause = str(error).partition("\n")[0]
        return Check("NVRTC", "missing", cause, "pip install 'nvidia-cuda-nvrtc>=13,<14' 'cuda-bindings>=13,<14'")


def _driver(answer: dict[str, Any]) -> Check:
    install = "for an NVIDIA GPU install driver 580 or newer; without one use --backend cpu"
    if answer["error"]:
        return Check("NVIDIA driver", "missing", answer["error"], install)
    found = f"supports CUDA {answer['cuda_version']}"
    if _numbers(answer["cuda_version"]) < OLDEST_DRIVER:
        return Check("NVIDIA driver", "missing", f"{found}, but CUDA 13.0 is needed", "install driver 580 or newer")
    if not answer["devices"]:
        advice = "see `nvidia-smi` and CUDA_VISIBLE_DEVICES; in a container start it with --gpus all"
        return Check("NVIDIA driver", "warning", f"{found}, but shows no GPU", advice)
    return Check("NVIDIA driver", "ok", found)


def _gpu(device: dict[str, Any]) -> Check:
    name = f"GPU {device['index']}"
    capability = device["capability"]
    found = f"{device['name']}, sm_{capability.replace('.', '')}, {_gib(device['total_bytes'])}"
    if _numbers(capability) < OLDEST_CAPABILITY:
        return Check(name, "missing", found, "kernels need sm_80 (Ampere) or newer; use --backend cpu")
    if device["error"]:
        found = f"{found}, refuses a context: {device['error']}"
        return Check(name, "warning", found, "see `nvidia-smi` for who uses it")
    return Check(name, "ok", f"{found}, {_gib(device['free_bytes'])} free")


def _gxx() -> Check:
    path = shutil.which("g++")
    if path is None:
        return Check("g++", "warning", "not installed", GXX_INSTALL)
    done = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True, check=False)
    return Check("g++", "ok", f"{done.stdout.strip()} ({path})")


def _cache() -> Check:
    folder = default_cache_dir()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    elsewhere = "set PSIGRAPH_CACHE_DIR to a folder of yours; without a cache every start compiles"
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return Check("kernel cache", "warning", f"{folder}: cannot be written", elsewhere)
    if folder.exists():
        try:
            make_private(folder)
        except OSError as error:
            return Check("kernel cache", "warning", f"{folder}: {error.strerror}", elsewhere)
    free = shutil.disk_usage(nearest).free
    if free < SMALLEST_CACHE:
        return Check("kernel cache", "warning", f"{folder}: {free >> 20} MiB left on the disk", elsewhere)
    kept = sum(1 for _ in folder.glob("*.kernel"))
    return Check("kernel cache", "ok", f"{folder}, {kept} kernel{'' if kept == 1 else 's'}")


def _memory() -> Check:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return Check("main memory", "warning", "unknown")
    kibibytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    total, free = kibibytes.get("MemTotal", 0) << 10, kibibytes.get("MemAvailable", 0) << 10
    return Check("main memory", "ok", f"{_gib(total)}, {_gib(free)} available, {os.cpu_count()} cores")


def _capabilities(
    packages: list[Check], nvrtc: Check, driver: Check, gpus: list[Check], gxx: Check
) -> list[Capability]:
    absent = [package.name for package in packages if package.status == "missing"]
    bare = [name for name in absent if name in BARE]
    usable = [gpu for gpu in gpus if gpu.status != "missing"]
    compiles = not absent and nvrtc.status != "missing"

    if driver.status == "missing":
        gpu = Capability("run on a GPU", False, driver.found)
    elif not usable:
        gpu = Capability("run on a GPU", False, gpus[0].advice if gpus else driver.found)
    elif not compiles:
        gpu = Capability("run on a GPU", False, _lacks(absent or ["NVRTC"]))
    else:
        gpu = Capability("run on a GPU", True, "; ".join(f"{found.name}: {found.found}" for found in usable))

    def other(name: str, lacking: list[str], reason: str) -> Capability:
        return Capability(name, not lacking, _lacks(lacking) if lacking else reason)

    return [
        gpu,
        other("run the generated kernels on the CPU", absent or _unless(gxx), f"g++ {gxx.found}"),
        other("run in numpy on the CPU", bare, "slow and exact"),
        other("compile kernels for GPUs", absent or _unless(nvrtc), "sm_80 and newer"),
        other("read and inspect model files", bare, "GGUF"),
    ]


def _unless(check: Check) -> list[str]:
    return [] if check.status == "ok" else [check.name]


def _lacks(names: list[str]) -> str:
    return "needs " + ", ".join(names)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
