"""The host's compiler: kernel text -> shared object, through g++.

The twin of the NVRTC compiler: `compile_kernel` takes the same text and gives a module image, which the
stand-in driver loads as the real one loads a cubin. Images are kept on disk by content (text, headers,
options, compiler, processor), each written to a temporary file and renamed, so that two processes can
compile at once. The text stays beside its image: debuggers and sanitizers name its lines.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ...ir.errors import CompileError, DeviceError
from ..private_cache import make_private, prune, read_private, user_cache_dir
from ..whole_files import lasting_scratch_folder, scratch_folder, write_whole

HERE = Path(__file__).resolve().parent
NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_SEAL_BYTES = 32  # behind every image: the SHA-256 of its name and of what g++ made
_NAMES = re.compile(r"[\w.]+-[0-9a-f]{32}(\.so|\.cu|\.o)?|\.\w+-\w{8}")  # the last of versions before this
COMPILE_SECONDS = 300  # longer means that g++ itself hangs

_COMMON = ("-std=c++17", "-fPIC", "-shared", "-pthread", "-w", "-fno-strict-aliasing", "-fvisibility=hidden")
_ADDRESS_LIKE = ("-O1", "-g", "-fno-omit-frame-pointer", "-march=native")


@dataclass(frozen=True)
class Build:
    """One way of compiling a kernel; `watch` builds take two objects, as the watcher must not watch itself."""

    name: str
    options: tuple[str, ...]
    watch: bool = False


BUILDS = {
    # What the stand-in driver runs. -O2 takes g++ 1.7 times as long, and kernels run no longer without it; what it has
    # beside -O1 that they need is sums and products in one instruction, as on a GPU: the second option.
    "fast": Build("fast", ("-O1", "-fexpensive-optimizations", "-g1", "-march=native")),
    # For stepping through with a debugger.
    "step": Build("step", ("-O0", "-g", "-march=native", "-DPSIGRAPH_HOST_STEP")),
    # Out of bounds and misaligned accesses, the line named.
    "address": Build(
        "address",
        (
            *_ADDRESS_LIKE,
            "-DPSIGRAPH_HOST_ADDRESS",
            "-fsanitize=address,alignment,bounds",
            "-fno-sanitize-recover=all",
            "-fsanitize-sections=psigraph_shared",
        ),
    ),
    # Every load and store calls watch.cpp; the instrumentation is ThreadSanitizer's, its runtime is not used.
    "watch": Build("watch", (*_ADDRESS_LIKE, "-DPSIGRAPH_HOST_WATCH", "-fsanitize=thread"), watch=True),
}


def cache_directory() -> Path:
    """Where images lie: PSIGRAPH_HOST_CACHE, else the user's cache; private to the user, made if missing.

    Raises DeviceError if it cannot be made, or others could have written it: what lies there is run.
    """
    named = os.environ.get("PSIGRAPH_HOST_CACHE")
    path = Path(named) if named else user_cache_dir() / "host"
    try:
        make_private(path)
        if not os.access(path, os.W_OK | os.X_OK):
            raise OSError(0, "cannot be written")
    except OSError as error:
        if named:
            raise DeviceError(
                f"PSIGRAPH_HOST_CACHE: {path} cannot be used ({error.strerror}); name a folder of yours"
            ) from error
        return _fallback_directory()
    return path


@functools.cache
def _fallback_directory() -> Path:
    """A folder for this process alone, where that of the user cannot be used."""
    return lasting_scratch_folder(Path(tempfile.gettempdir()), "psigraph-host")


@functools.cache
def compiler() -> str:
    """Path of g++ (PSIGRAPH_CXX names another); DeviceError with the line that installs it if there is none."""
    name = os.environ.get("PSIGRAPH_CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise DeviceError(f"the host target needs the C++ compiler {name}, which was not found: apt-get install g++")
    return path


@functools.cache
def _fingerprint() -> str:
    """What an image depends on besides its text: compiler, processor, headers."""
    digest = hashlib.sha256()
    version = subprocess.run([compiler(), "--version"], capture_output=True, check=False, timeout=60)
    digest.update(version.stdout)
    digest.update(platform.machine().encode())
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        digest.update("\n".join(line for line in lines if line.startswith(("flags", "Features")))[:8192].encode())
    except OSError:
        digest.update(platform.processor().encode())
    for path in sorted((*HERE.glob("*.h"), HERE / "watch.cpp")):
        if not path.name.startswith("libcuda"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def compiler_version() -> str:
    """What a kernel's image depends on besides its text: compiler, processor, host headers, build. One word."""
    return f"host-{os.environ.get('PSIGRAPH_HOST_BUILD', 'fast')}-{_fingerprint()[:16]}"


_running: set[subprocess.Popen[str]] = set()
_stopping = threading.Event()


def stop_compilers() -> None:
    """End every g++ that this process waits for, and every one that a thread is about to start: after Ctrl-C
    nobody wants what they make. `allow_compilers` takes it back."""
    _stopping.set()
    for process in tuple(_running):
        _stop(process)


def allow_compilers() -> None:
    """Let g++ run again, for a program that goes on after Ctrl-C."""
    _stopping.clear()


def _stop(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)  # g++ and the compiler proper that it started


def run_compiler(arguments: list[str], what: str) -> None:
    """Run g++; CompileError with its first error (path shortened) if it refuses.

    Its last argument is the file to make, in whose folder it has its temporary files.
    """
    if _stopping.is_set():
        raise CompileError(f"{what}: stopped")
    try:
        # A process group of its own, so that all of it can be stopped.
        with subprocess.Popen(
            [compiler(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
            env={**os.environ, "TMPDIR": os.path.dirname(arguments[-1])},
        ) as done:
            _running.add(done)
            try:
                if _stopping.is_set():  # set while this one was being started
                    _stop(done)
                _, told = done.communicate(timeout=COMPILE_SECONDS)
            except BaseException:
                _stop(done)
                raise
            finally:
                _running.discard(done)
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"{what}: g++ did not finish within {COMPILE_SECONDS} s") from error
    except OSError as error:
        raise CompileError(f"{what}: g++ cannot be run ({error.strerror})") from error
    if done.returncode:
        lines = told.splitlines()
        line = next(
            (line for line in lines if " error: " in line), lines[0] if lines else f"exit status {done.returncode}"
        )
        raise CompileError(f"{what}: g++ refuses the text: {re.sub(r'^.*/', '', line).strip()}")


def _keep(made: Path, image: Path) -> None:
    """Put what g++ made in its place, its hash behind it: the loader and the linker pass over it."""
    data = made.read_bytes()
    write_whole(image, data + _seal(image, data), 0o700)


def _is_whole(image: Path) -> bool:
    """Whether an image is there as it was kept, under its name, and by nobody else."""
    try:
        data = read_private(image)
    except OSError:
        return False
    return data[-_SEAL_BYTES:] == _seal(image, data[:-_SEAL_BYTES])


def _seal(image: Path, data: bytes) -> bytes:
    return hashlib.sha256(f"{image.parent.name}/{image.name}\n".encode() + data).digest()


def build_kernel(
    source: str,
    name: str,
    build: str = "fast",
    defines: Sequence[str] = (),
    headers: Mapping[str, str] = NO_HEADERS,
) -> Path:
    """Compile one kernel; path of its shared object in the cache.

    source: the kernel's text. name: the extern "C" entry. build: a key of BUILDS. defines: macros, `NAME` or `NAME=1`.
    headers: texts by the names that the source includes.
    Raises CompileError if g++ refuses the text, DeviceError if there is no g++.
    """
    how = BUILDS[build]
    key = hashlib.sha256(
        "\0".join(
            [_fingerprint(), how.name, *how.options, *defines, name, source, *headers, *headers.values()]
        ).encode()
    ).hexdigest()[:32]
    folder = cache_directory()
    image = folder / f"{name}-{key}.so"
    if _is_whole(image):
        return image
    text = folder / f"{name}-{key}.cu"
    write_whole(text, source.encode())
    entry = f'#define PSIGRAPH_HOST 1\n#include "cuda_on_cpu.h"\n#include "{text.name}"\nPSIGRAPH_HOST_KERNEL({name})\n'
    with scratch_folder(folder, name) as scratch:
        unit = scratch / f"{name}.cpp"
        unit.write_text(entry)
        made = scratch / "kernel.so"
        macros = [f"-D{define}" for define in defines]
        options = [*_COMMON, *how.options, *macros, f"-iquote{HERE}", f"-iquote{folder}"]
        if headers:
            options.append(f"-iquote{_header_folder(headers)}")
        if how.watch:
            kernel = scratch / "kernel.o"
            without_link = [option for option in options if option != "-shared"]
            run_compiler([*without_link, "-c", str(unit), "-o", str(kernel)], name)
            run_compiler(["-shared", "-pthread", str(kernel), str(_watcher(how)), "-o", str(made)], name)
        else:
            run_compiler([*options, str(unit), "-o", str(made)], name)
        _keep(made, image)
    prune(folder, _NAMES)
    return image


def _header_folder(headers: Mapping[str, str]) -> Path:
    """A folder of the cache that holds these texts, under their names: a debugger shows their lines."""
    key = hashlib.sha256("\0".join([*headers, *headers.values()]).encode()).hexdigest()[:32]
    folder = cache_directory() / f"headers-{key}"
    folder.mkdir(mode=0o700, exist_ok=True)
    os.utime(folder)  # in use: `prune` asks the folder, not what lies in it
    for name, text in headers.items():
        if not _holds(folder / name, text.encode()):
            write_whole(folder / name, text.encode())
    return folder


def _holds(path: Path, data: bytes) -> bool:
    try:
        return read_private(path) == data
    except OSError:
        return False


def _watcher(how: Build) -> Path:
    """The object of watch.cpp, which every kernel of a watching build is linked with; uninstrumented."""
    options = [option for option in (*_COMMON, *how.options) if option != "-shared" and "-fsanitize" not in option]
    options.append("-O2")
    key = hashlib.sha256("\0".join([_fingerprint(), *options]).encode()).hexdigest()[:32]
    image = cache_directory() / f"watch-{key}.o"
    if not _is_whole(image):
        with scratch_folder(image.parent, "watch") as scratch:
            made = scratch / "watch.o"
            run_compiler([*options, f"-iquote{HERE}", "-c", str(HERE / "watch.cpp"), "-o", str(made)], "watch.cpp")
            _keep(made, image)
    return image


def compile_kernel(
    source: str,
    name: str,
    headers: Mapping[str, str] = NO_HEADERS,
    defines: Sequence[str] = (),
    sanitize: bool = False,
) -> bytes:
    """Module image of one kernel for the stand-in driver: the bytes of a shared object.

    source, name, headers, defines: see `build_kernel`. sanitize: compile for the AddressSanitizer; such an image is
    only of use to `check.run_kernel`, whose process has its runtime.
    Raises CompileError or DeviceError.
    """
    build = "address" if sanitize else os.environ.get("PSIGRAPH_HOST_BUILD", "fast")
    return build_kernel(source, name, build, defines, headers).read_bytes()[:-_SEAL_BYTES]


def build_library(source: Path, image_name: str, options: tuple[str, ...] = ()) -> Path:
    """Compile one of this folder's own C++ files; its path lies in a folder named after its content."""
    texts = [path.read_text() for path in sorted((*HERE.glob("*.h"), source))]
    key = hashlib.sha256("\0".join([_fingerprint(), *texts, *options]).encode()).hexdigest()[:32]
    folder = cache_directory() / f"{source.stem}-{key}"
    image = folder / image_name
    if _is_whole(image):
        os.utime(folder)  # in use, as above
        return image
    folder.mkdir(mode=0o700, exist_ok=True)
    with scratch_folder(cache_directory(), source.stem) as scratch:
        made = scratch / image_name
        run_compiler(
            ["-std=c++17", "-O2", "-g1", "-fPIC", "-pthread", "-Wall", *options, str(source), "-ldl", "-o", str(made)],
            source.name,
        )
        _keep(made, image)
    return image
