"""`psigraph compare`: the user's own runtimes and psigraph, in turns, on one file."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ..comparators import Comparator, Job, LlamaBench, LlamaCppPython, LlamaServer, Ollama
from ..compare import cannot_settle, run_session, settle
from ..gpu_state import gpu_state
from ..ir.errors import PolicyRefusal, PsigraphError, UsageError
from ..json_file import check_new_folder, read_json, write_json_atomically
from ..matrix import build_matrix, read_source
from ..matrix_view import markdown
from ..policy import load_policy

_IM_START = (151644,)


@click.command(
    epilog="Example: psigraph compare --model medpsy-1.7b-q4_k_m-imat.gguf --llama-bench ./llama-bench --settle"
)
@click.option("--model", required=True, type=click.Path(path_type=Path), help="GGUF file that all of them run.")
@click.option("--llama-bench", help="Path of llama.cpp's llama-bench.")
@click.option("--llama-server", help="URL of a llama-server on this machine that serves the file, or its path.")
@click.option("--ollama", help="URL of Ollama, such as http://127.0.0.1:11434.")
@click.option("--ollama-model", help="Name of the Ollama model that was created from the file.")
@click.option("--llama-cpp-python", is_flag=True, help="Use the llama-cpp-python of --python.")
@click.option("--python", default=sys.executable, help="Python that has llama-cpp-python.  [default: this one]")
@click.option("--backend", type=click.Choice(["cuda", "cpu"]), help="[default: cuda where there is a GPU]")
@click.option("--device", default=0, show_default=True, type=click.IntRange(min=0), help="GPU for psigraph.")
@click.option("--prompt-token-ids", default="151644", show_default=True, help="Ids, separated by commas.")
@click.option("--prompt-text", help="The prompt as text for Ollama, which takes no ids.  [default for 151644]")
@click.option("--max-new-tokens", default=512, show_default=True, type=click.IntRange(min=1))
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1), help="Turns of each.")
@click.option("--timeout", "timeout_s", default=600.0, show_default=True, help="Seconds for one turn of a tool.")
@click.option("--expect-sha256", help="Refuse a file with another digest.")
@click.option("--allow-busy-gpu", is_flag=True, help="Measure although the GPU is in use; such rows claim nothing.")
@click.option("--settle", "must_settle", is_flag=True, help="Refuse or fail unless this run settles the claim.")
@click.option(
    "--out-dir", default="psigraph-compare", show_default=True, type=click.Path(path_type=Path), help="For reports."
)
def command(
    model: Path,
    llama_bench: str | None,
    llama_server: str | None,
    ollama: str | None,
    ollama_model: str | None,
    llama_cpp_python: bool,
    python: str,
    backend: str | None,
    device: int,
    prompt_token_ids: str,
    prompt_text: str | None,
    max_new_tokens: int,
    repeats: int,
    timeout_s: float,
    expect_sha256: str | None,
    allow_busy_gpu: bool,
    must_settle: bool,
    out_dir: Path,
) -> None:
    """Measure psigraph and other runtimes on the same file, in turns, and say what may be claimed.

    Writes a report for each and a matrix into --out-dir. A tool that cannot run is a row with its reason.
    """
    tools: list[Comparator] = []
    if llama_bench:
        tools.append(LlamaBench(llama_bench))
    if llama_server:
        tools.append(LlamaServer(llama_server))
    if bool(ollama) != bool(ollama_model):
        raise UsageError("--ollama and --ollama-model: give both or neither")
    if ollama and ollama_model:
        tools.append(Ollama(ollama, ollama_model))
    if llama_cpp_python:
        tools.append(LlamaCppPython(python))
    if not tools:
        raise UsageError("nothing to compare with: give --llama-bench, --llama-server, --ollama or --llama-cpp-python")
    ids = _ids(prompt_token_ids)
    if ollama and prompt_text is None and ids != _IM_START:
        raise UsageError("--prompt-text: Ollama takes text, give the prompt's")
    check_new_folder(out_dir)
    sha256 = _sha256(model)
    if expect_sha256 is not None and expect_sha256.lower() != sha256:
        raise PolicyRefusal(f"--expect-sha256 {expect_sha256}: the file's digest is {sha256}")
    state = gpu_state(device)
    chosen = backend or ("cuda" if state.gpu else "cpu")
    policy = load_policy()
    if must_settle and (obstacle := cannot_settle(sha256, state, policy)):
        raise UsageError(f"--settle: {obstacle}")
    if chosen == "cuda" and not state.idle and not allow_busy_gpu:
        users = "; ".join(state.processes) or "nvidia-smi did not say"
        raise UsageError(f"the GPU is in use ({users}): stop that first, or give --allow-busy-gpu")
    job = Job(model, sha256, ids, prompt_text or "<|im_start|>", max_new_tokens, chosen, timeout_s)

    def bench(path: str, prompt: Sequence[int], tokens: int, engine: str) -> Mapping[str, Any]:
        return bench_in_a_process(path, prompt, tokens, engine, device)

    session = run_session(job, tools, bench, state, repeats=repeats, say=lambda line: click.echo(line, err=True))
    out_dir.mkdir(exist_ok=True)
    sources = []
    for name, report in (("psigraph", session.ours), *((str(one["runtime"]), one) for one in session.theirs)):
        path = out_dir / f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}_{session.name[:8]}.json"
        write_json_atomically(path, report)
        sources.append(read_source(path, out_dir))
    matrix = build_matrix(sources, host=str(session.ours["environment"].get("host", "")))
    write_json_atomically(out_dir / "matrix.json", matrix)
    click.echo(markdown(matrix), nl=False)
    settled, verdict = settle(matrix["decision"], session, policy)
    click.echo(verdict)
    if must_settle and not settled:
        raise PsigraphError(verdict)


def bench_in_a_process(
    model: str, prompt_ids: Sequence[int], max_new_tokens: int, backend: str, device: int = 0
) -> Mapping[str, Any]:
    """One warm run by `psigraph bench` in a process of its own: the GPU is free again for the next tool's turn."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        arguments = [
            *("bench", "--model-path", model, "--artifact-kind", "gguf", "--backend", backend),
            *("--prompt-token-ids", ",".join(map(str, prompt_ids)), "--max-new-tokens", str(max_new_tokens)),
            *("--repeats", "1", "--json-out", str(out)),
            *(("--device", str(device)) if backend == "cuda" else ()),
        ]
        done = subprocess.run(
            [sys.executable, "-m", __package__.partition(".")[0], *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            said = (done.stderr.strip() or "nothing").splitlines()[-1]
            raise PsigraphError(f"psigraph bench: exit code {done.returncode}: {said}")
        return read_json(out)


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--prompt-token-ids {text}: give ids separated by commas, such as 151644") from None


def _sha256(model: Path) -> str:
    if not model.is_file():
        raise UsageError(f"--model {model}: no such file")
    try:
        with model.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"--model {model}: cannot be read: {error.strerror}") from None
