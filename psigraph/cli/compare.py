"""`psigraph compare`: the user's own runtimes and psigraph, in turns, on one file."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..bench.gpu_state import GpuState, gpu_state
from ..diagnosis import ask_driver
from ..ir.errors import DeviceError, ModelFileError, PolicyRefusal, PsigraphError, UsageError
from ..json_file import check_new_folder, read_json, write_json_atomically
from ..medpsy.comparators import Comparator, Job, LlamaBench, LlamaCppPython, LlamaServer, Ollama
from ..medpsy.compare import cannot_settle, run_session, settle
from ..medpsy.matrix import build_matrix, read_source
from ..medpsy.matrix_view import markdown, plain
from ..medpsy.policy import OVERRIDE_OPTION, load_policy
from ..options import SessionOptions
from ..runtime.whole_files import scratch_folder
from .comparison_table import comparison
from .first_token import IM_START, first_token
from .model_argument import model_argument
from .notes import note
from .options import FILE_PATH, TOKEN_IDS, Seconds, admission_options

if TYPE_CHECKING:
    from ..runtime.gguf.file import GgufFile

EPILOG = """\b
Each engine gets as many turns as --repeats says, psigraph first in every round, so that clocks and heat drift for
all alike. A tool that cannot run is a row with its reason and costs no exit code.

\b
Exit code 0 if the session was measured, 1 if --settle is given and the claim stays open, 2 and 3 as everywhere,
5 if the policy or --expect-sha256 refuses the file, 7 if --backend cuda finds no GPU.

\b
Examples:
  psigraph compare medpsy-1.7b-q4_k_m-imat.gguf --llama-bench ./llama-bench --settle
  psigraph compare qwen3.gguf --ollama http://127.0.0.1:11434 --ollama-model qwen3 --out-dir session"""


@click.command("compare", epilog=EPILOG)
@model_argument()
@click.option("--llama-bench", metavar="PATH", help="llama.cpp's llama-bench.")
@click.option("--llama-server", metavar="URL|PATH", help="A llama-server on this machine that serves the file.")
@click.option("--ollama", metavar="URL", help="Ollama, such as http://127.0.0.1:11434.")
@click.option("--ollama-model", metavar="NAME", help="The Ollama model that was created from the file.")
@click.option("--llama-cpp-python", is_flag=True, help="Use the llama-cpp-python of --python.")
@click.option(
    "--python", default=sys.executable, metavar="PATH", help="Python that has llama-cpp-python. Default: this one."
)
@click.option("--backend", type=click.Choice(["cuda", "cpu"]), help="Default: cuda where there is a GPU, else cpu.")
@click.option("--device", default=0, show_default=True, type=click.IntRange(0), help="Which GPU; all get this one.")
@click.option(
    "--prompt-token-ids",
    "ids",
    type=TOKEN_IDS,
    help="Prompt, as token ids. Default: 151644, Qwen's <|im_start|>, or the bos token of a smaller vocabulary.",
)
@click.option(
    "--prompt-text", metavar="TEXT", help="The prompt for Ollama, which takes no ids. Known for 151644 alone."
)
@click.option(
    "-n", "--max-new-tokens", default=512, show_default=True, type=click.IntRange(1), metavar="N", help="Tokens a turn."
)
@click.option(
    "-r", "--repeats", default=3, show_default=True, type=click.IntRange(1), metavar="N", help="Turns of each engine."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(1, 86400),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="For one turn of a tool.",
)
@admission_options
@click.option("--allow-busy-gpu", is_flag=True, help="Measure although the GPU is in use; such rows claim nothing.")
@click.option("--settle", "must_settle", is_flag=True, help="Refuse or fail unless this run settles the claim.")
@click.option(
    "--out-dir",
    type=FILE_PATH,
    default="psigraph-compare",
    show_default=True,
    metavar="DIR",
    help="Folder for the reports and the matrix; made if it is missing.",
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
    ids: tuple[int, ...] | None,
    prompt_text: str | None,
    max_new_tokens: int,
    repeats: int,
    timeout_s: float,
    allow_blocked: bool,
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
    if ids is None:
        ids = (first_token(model),)
    if ollama and prompt_text is None and ids != (IM_START,):
        raise UsageError("--prompt-text: Ollama takes text, give the prompt's")
    check_new_folder(out_dir)
    check_header(model, ids, max_new_tokens, allow_blocked)
    if backend == "cpu" and device:
        raise UsageError(f"--device {device}: the backend cpu uses no GPU; leave it out")
    card = None if backend == "cpu" else find_card(device, must_be=backend == "cuda")
    state = gpu_state(card["bus_id"]) if card is not None else GpuState()
    chosen = "cpu" if card is None else "cuda"
    if card is not None and not state.gpu:
        raise DeviceError(
            f"nvidia-smi does not know the GPU at {card['bus_id']}, so nobody can tell whether it is idle"
        )
    sha256 = _sha256(model)
    if expect_sha256 is not None and expect_sha256.lower() != sha256:
        raise PolicyRefusal(f"--expect-sha256 {expect_sha256}: the file's digest is {sha256}")
    policy = load_policy()
    if must_settle and (obstacle := cannot_settle(sha256, state, policy)):
        raise UsageError(f"--settle: {obstacle}")
    if chosen == "cuda" and not state.idle and not allow_busy_gpu:
        users = "; ".join(state.processes) or "nvidia-smi did not say"
        raise UsageError(f"the GPU is in use ({users}): stop that first, or give --allow-busy-gpu")
    job = Job(model, sha256, ids, prompt_text or "<|im_start|>", max_new_tokens, chosen, timeout_s)

    def bench(path: str, prompt: Sequence[int], tokens: int, engine: str) -> Mapping[str, Any]:
        return bench_in_a_process(path, prompt, tokens, engine, allow_blocked)

    with only_card(card):
        session = run_session(job, tools, bench, state, repeats=repeats, say=note)
    out_dir.mkdir(exist_ok=True)
    sources = []
    for name, report in (("psigraph", session.ours), *((str(one["runtime"]), one) for one in session.theirs)):
        path = out_dir / f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}_{session.name[:8]}.json"
        write_json_atomically(path, report)
        sources.append(read_source(path, out_dir))
    matrix = build_matrix(sources, host=str(session.ours["environment"].get("host", "")))
    write_json_atomically(out_dir / "matrix.json", matrix)
    if sha256 == policy.data["claim"]["artifact_sha256"]:
        click.echo(plain(markdown(matrix)))
    click.echo(comparison(session.ours, session.theirs))
    click.echo(f"reports: {out_dir}")
    settled, verdict = settle(matrix["decision"], session, policy)
    if must_settle or sha256 == policy.data["claim"]["artifact_sha256"]:
        click.echo(verdict)
    if must_settle and not settled:
        raise PsigraphError(verdict)


def find_card(device: int, must_be: bool) -> dict[str, Any] | None:
    """The GPU that --device names, as `gpu_probe.probe` tells of it; None, with a warning, where the driver has none.

    DeviceError where it has others, or must have one.
    """
    answer = ask_driver()
    cards = answer["devices"]
    if device < len(cards):
        return dict(cards[device])
    why = answer["error"] or "the driver shows no GPU"
    if cards or must_be:
        why = f"this machine has {len(cards)} GPU(s), numbered from 0" if cards else why
        raise DeviceError(f"--device {device}: {why}; use --backend cpu")
    warnings.warn(f"{why}; comparing in numpy on the CPU", stacklevel=2)
    return None


@contextmanager
def only_card(card: Mapping[str, Any] | None) -> Iterator[None]:
    """Lets processes that are started here see this GPU alone, as their number 0, whatever order they count in."""
    if card is None:
        yield
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = card["uuid"]
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def bench_in_a_process(
    model: str,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    backend: str,
    allow_blocked: bool = False,
) -> Mapping[str, Any]:
    """One warm run by `psigraph bench` in a process of its own: the GPU is free again for the next tool's turn."""
    with scratch_folder(Path(tempfile.gettempdir()), "psigraph-compare") as folder:
        out = folder / "report.json"
        arguments = [
            *("bench", "--model-path", model, "--artifact-kind", "gguf", "--backend", backend),
            *("--prompt-token-ids", ",".join(map(str, prompt_ids)), "--max-new-tokens", str(max_new_tokens)),
            *("--repeats", "1", "--json-out", str(out)),
            *((OVERRIDE_OPTION,) if allow_blocked else ()),
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


def check_header(model: Path, ids: tuple[int, ...], max_new_tokens: int, allow_blocked: bool) -> None:
    """What the first turn would refuse, asked before the file is hashed: the file, its tier, the ids, the context.

    Raises the errors of `build.open_model` and `artifact.admit_file`, and UsageError for ids or tokens that do not fit.
    """
    from ..medpsy.artifact import admit_file
    from ..session import check_ids, open_model_for, vocabulary_of

    def admit(file: GgufFile) -> None:
        admit_file(file, allow_blocked=allow_blocked, with_digest=False)

    with open_model_for(model, SessionOptions(positions=len(ids) + max_new_tokens - 1, admit=admit)) as opened:
        check_ids(ids, vocabulary_of(opened), "--prompt-token-ids")


def _sha256(model: Path) -> str:
    try:
        with model.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error.strerror}", str(model)) from None
