"""Drivers of other runtimes, each giving the decode rate of one turn on a given file.

A driver is asked once (`prepare`) whether it can run that very file, and then once a turn (`turn`). It raises
NotRun with the reason where it cannot; the matrix keeps that reason. Nothing here is imported by the decode path,
and no driver imports the runtime that it drives: tools run as processes or are spoken to over HTTP.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

LLAMA_CPP_PYTHON_INSTALL = 'CMAKE_ARGS="-DGGML_CUDA=on" python -m pip install llama-cpp-python'


class NotRun(Exception):
    """Why a tool did not run. `status`: not_run, refused (it would run something unlike), timed_out or failed."""

    def __init__(self, reason: str, status: str = "not_run") -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Job:
    """The work of one turn: the file and its digest, the prompt as ids and as text, tokens to generate."""

    model: Path
    sha256: str
    prompt_ids: tuple[int, ...]
    prompt_text: str
    max_new_tokens: int
    backend: str = "cuda"
    timeout_s: float = 600.0


@dataclass(frozen=True)
class Turn:
    """Tokens per second of one turn, and what the tool itself said."""

    tokens_per_second: float
    raw: Mapping[str, Any]


class Comparator(Protocol):
    """runtime, work_per_token: words for the report. version, command: known after `prepare`."""

    runtime: str
    work_per_token: str
    version: str
    command: tuple[str, ...]

    def prepare(self, job: Job) -> None: ...
    def turn(self, job: Job) -> Turn: ...
    def close(self) -> None: ...


@dataclass
class LlamaBench:
    """llama-bench at `path`. Each turn is a process of two repetitions of which the second counts: the first pays
    for CUDA-graph capture."""

    path: str
    runtime: str = "llama.cpp llama-bench"
    work_per_token: str = "random ids, a host synchronization and full logits on the host every token, no sampling"
    version: str = ""
    command: tuple[str, ...] = ()

    def prepare(self, job: Job) -> None:
        executable = _executable(self.path)
        layers = "99" if job.backend == "cuda" else "0"
        self.command = (
            *(executable, "-m", str(job.model), "-p", "0", "-n", str(job.max_new_tokens), "-r", "2"),
            *("-ngl", layers, "-fa", "1", "-o", "jsonl"),
        )  # fmt: skip

    def turn(self, job: Job) -> Turn:
        answer = _run(self.command, job.timeout_s)
        rows = [row for line in answer.splitlines() if (row := _json_object(line)) is not None]
        row = next((row for row in rows if row.get("n_gen") == job.max_new_tokens and row.get("n_prompt") == 0), None)
        if row is None or len(row.get("samples_ts") or ()) != 2:
            raise NotRun(f"llama-bench: printed no row of {job.max_new_tokens} generated tokens", "failed")
        if job.backend == "cuda" and "CUDA" not in str(row.get("backends", "")):
            raise NotRun(f"llama-bench: built without CUDA (backends: {row.get('backends')})", "refused")
        if row.get("n_depth", 0) != 0:
            raise NotRun(f"llama-bench: ran at depth {row['n_depth']}", "refused")
        self.version = f"{row.get('build_number', '')} {row.get('build_commit', '')}".strip()
        return Turn(_rate(row["samples_ts"][1], "llama-bench"), row)

    def close(self) -> None:
        """Nothing stays open."""


@dataclass
class LlamaServer:
    """llama-server at a URL, or started from a path for the session."""

    where: str
    runtime: str = "llama.cpp llama-server"
    work_per_token: str = "its own greedy choice fed back, sampling on the host, cache_prompt off"
    version: str = ""
    command: tuple[str, ...] = ()
    start_timeout_s: float = 300.0
    _url: str = field(default="", repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def prepare(self, job: Job) -> None:
        if self.where.startswith(("http://", "https://")):
            self._url = self.where.rstrip("/")
            self.command = (self._url,)
        else:
            self._start(job)
        properties = _get_json(f"{self._url}/props", 10.0, "llama-server")
        self.version = str(properties.get("build_info", ""))
        served = str(properties.get("model_path", ""))
        if self._process is None and _digest_of(served) != job.sha256:
            raise NotRun(
                f"llama-server: serves {served or 'a file that it does not name'}, which is not this file by sha256; "
                "start it on this machine with -m on the same file, or give the path of the executable",
                "refused",
            )

    def turn(self, job: Job) -> Turn:
        answer = _post_json(
            f"{self._url}/completion",
            {
                "prompt": list(job.prompt_ids),
                "n_predict": job.max_new_tokens,
                "temperature": 0,
                "seed": 0,
                "ignore_eos": True,
                "cache_prompt": False,
                "stream": False,
            },
            job.timeout_s,
            "llama-server",
        )
        timings = answer.get("timings")
        if not isinstance(timings, dict) or timings.get("predicted_n") != job.max_new_tokens:
            found = timings.get("predicted_n") if isinstance(timings, dict) else "no timings"
            raise NotRun(f"llama-server: generated {found} instead of {job.max_new_tokens} tokens", "refused")
        return Turn(_rate(timings.get("predicted_per_second"), "llama-server"), {"timings": timings})

    def close(self) -> None:
        """Stop the server if it was started here."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _start(self, job: Job) -> None:
        executable = _executable(self.where)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = len(job.prompt_ids) + job.max_new_tokens + 64
        layers = "99" if job.backend == "cuda" else "0"
        self.command = (
            *(executable, "-m", str(job.model), "-ngl", layers, "-c", str(context), "-np", "1"),
            *("--host", "127.0.0.1", "--port", str(port)),
        )  # fmt: skip
        self._url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + self.start_timeout_s
        while True:
            code = self._process.poll()
            if code is not None:
                self._process = None
                raise NotRun(f"llama-server: ended with exit code {code} before it served", "failed")
            try:
                _get_json(f"{self._url}/health", 2.0, "llama-server")
                return
            except NotRun:
                if time.monotonic() > deadline:
                    raise NotRun("llama-server: did not become ready", "timed_out") from None
            try:
                self._process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue


@dataclass
class Ollama:
    """A running Ollama at `url` with a model `name` that was created from this very file."""

    url: str
    name: str
    runtime: str = "ollama"
    work_per_token: str = "its own greedy choice fed back through the runner, sampling and text on the host"
    version: str = ""
    command: tuple[str, ...] = ()

    def prepare(self, job: Job) -> None:
        base = self.url.rstrip("/")
        self.command = (base, self.name)
        self.version = str(_get_json(f"{base}/api/version", 10.0, "ollama").get("version", ""))
        shown = _post_json(f"{base}/api/show", {"model": self.name}, 30.0, "ollama")
        # Ollama stores a model's weights under their digest, and its model file names that blob.
        digests = re.findall(r"^FROM .*sha256[-:]([0-9a-f]{64})\s*$", str(shown.get("modelfile", "")), re.MULTILINE)
        if digests != [job.sha256]:
            held = ", ".join(digests) or "no digest"
            raise NotRun(
                f"ollama: model {self.name} holds {held}, not this file; create it with a Modelfile of the one line "
                f"'FROM {job.model}'",
                "refused",
            )

    def turn(self, job: Job) -> Turn:
        answer = _post_json(
            f"{self.url.rstrip('/')}/api/generate",
            {
                "model": self.name,
                "prompt": job.prompt_text,
                "raw": True,
                "stream": False,
                "options": {
                    "temperature": 0,
                    "seed": 0,
                    "num_predict": job.max_new_tokens,
                    "num_ctx": len(job.prompt_ids) + job.max_new_tokens + 64,
                },
            },
            job.timeout_s,
            "ollama",
        )
        raw = {key: answer[key] for key in answer if key.endswith(("_count", "_duration", "reason"))}
        if answer.get("eval_count") != job.max_new_tokens:
            raise NotRun(
                f"ollama: stopped after {answer.get('eval_count')} of {job.max_new_tokens} tokens (end of text)",
                "refused",
            )
        if answer.get("prompt_eval_count", len(job.prompt_ids)) != len(job.prompt_ids):
            raise NotRun(
                f"ollama: read {answer['prompt_eval_count']} prompt tokens instead of {len(job.prompt_ids)}", "refused"
            )
        duration = answer.get("eval_duration")
        if not isinstance(duration, int | float) or duration <= 0:
            raise NotRun("ollama: gave no eval_duration", "failed")
        return Turn(_rate(1e9 * answer["eval_count"] / duration, "ollama"), raw)

    def close(self) -> None:
        """Nothing stays open; the server is the user's."""


# Runs in a process of its own, so that the library is never imported here. Prints one JSON line.
_LLAMA_CPP_PYTHON = """
import json, sys, time
import llama_cpp
job = json.loads(sys.argv[1])
gpu = bool(llama_cpp.llama_supports_gpu_offload())
if job["backend"] == "cuda" and not gpu:
    print(json.dumps({"version": llama_cpp.__version__, "gpu": False})); sys.exit(0)
model = llama_cpp.Llama(model_path=job["model"], n_gpu_layers=-1 if job["backend"] == "cuda" else 0,
                        n_ctx=len(job["prompt"]) + job["tokens"] + 64, flash_attn=True, seed=0, verbose=False)
seconds = []
for _ in range(2):
    model.reset()
    stream = model.generate(job["prompt"], temp=0.0, top_k=1, reset=True)
    count, begin = 0, time.perf_counter()
    for _token in stream:
        count += 1
        if count == job["tokens"]:
            break
    seconds.append(time.perf_counter() - begin)
    stream.close()
print(json.dumps({"version": llama_cpp.__version__, "gpu": gpu, "tokens": count, "seconds": seconds}))
"""


@dataclass
class LlamaCppPython:
    """llama-cpp-python in a Python of the user's (default: this one), one process a turn, second pass counted."""

    python: str = sys.executable
    runtime: str = "llama-cpp-python"
    work_per_token: str = "its own greedy choice fed back, sampling in llama.cpp called from Python every token"
    version: str = ""
    command: tuple[str, ...] = ()

    def prepare(self, job: Job) -> None:
        del job
        probe = [_executable(self.python), "-c", "import llama_cpp; print(llama_cpp.__version__)"]
        try:
            self.version = _run(probe, 120.0).strip()
        except NotRun as error:
            missing = "No module named 'llama_cpp'" in str(error)
            raise NotRun(
                f"llama-cpp-python: not installed; {LLAMA_CPP_PYTHON_INSTALL}" if missing else str(error)
            ) from None
        self.command = (self.python, "-c", "psigraph.medpsy.comparators._LLAMA_CPP_PYTHON")

    def turn(self, job: Job) -> Turn:
        work = {
            "model": str(job.model),
            "prompt": list(job.prompt_ids),
            "tokens": job.max_new_tokens,
            "backend": job.backend,
        }
        answer = _run([self.python, "-c", _LLAMA_CPP_PYTHON, json.dumps(work)], job.timeout_s)
        row = next((row for line in reversed(answer.splitlines()) if (row := _json_object(line)) is not None), {})
        if job.backend == "cuda" and not row.get("gpu"):
            raise NotRun(f"llama-cpp-python: built without CUDA; {LLAMA_CPP_PYTHON_INSTALL}", "refused")
        if row.get("tokens") != job.max_new_tokens or len(row.get("seconds", ())) != 2:
            raise NotRun(f"llama-cpp-python: generated {row.get('tokens')} of {job.max_new_tokens} tokens", "failed")
        return Turn(_rate(row["tokens"] / row["seconds"][1], "llama-cpp-python"), row)

    def close(self) -> None:
        """Nothing stays open."""


def _executable(path: str) -> str:
    found = shutil.which(path)
    if found is None:
        raise NotRun(f"{path}: no such executable")
    return found


def _run(command: Sequence[str], timeout_s: float) -> str:
    name = os.path.basename(command[0])
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise NotRun(f"{name}: timed out after {timeout_s:.0f} s", "timed_out") from None
    except OSError as error:
        raise NotRun(f"{name}: cannot be started: {error.strerror}", "failed") from None
    if answer.returncode != 0:
        said = (answer.stderr.strip() or answer.stdout.strip() or "nothing").splitlines()[-1]
        raise NotRun(f"{name}: exit code {answer.returncode}: {said[:300]}", "failed")
    return answer.stdout


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _rate(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise NotRun(f"{name}: gave no rate", "failed")
    return float(value)


def _get_json(url: str, timeout_s: float, name: str) -> dict[str, Any]:
    return _ask(urllib.request.Request(url), timeout_s, name)


def _post_json(url: str, body: object, timeout_s: float, name: str) -> dict[str, Any]:
    data = json.dumps(body).encode()
    return _ask(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout_s, name)


def _ask(request: urllib.request.Request, timeout_s: float, name: str) -> dict[str, Any]:
    # Straight to the user's own server: a proxy of the environment has no place between the two.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            value = json.loads(answer.read())
    except TimeoutError:
        raise NotRun(f"{name}: {request.full_url} timed out after {timeout_s:.0f} s", "timed_out") from None
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise NotRun(f"{name}: {request.full_url}: {getattr(error, 'reason', error)}") from None
    if not isinstance(value, dict):
        raise NotRun(f"{name}: {request.full_url} answered no object", "failed")
    return value


def _digest_of(path: str) -> str:
    """SHA-256 of a file on this machine, "" where there is none."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""
