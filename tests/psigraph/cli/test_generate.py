"""`psigraph generate`: text as it comes, whole characters, end tokens, and nothing on stdout when it fails."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import Q4, changed, reference_greedy

from psigraph import guard
from psigraph import session as sessions
from psigraph.cli import run
from psigraph.generation import continuation, text_pieces
from psigraph.ir.errors import UsageError
from psigraph.policy import template_digest
from psigraph.runtime.gguf_file import open_gguf
from psigraph.runtime.tokenizer import Tokenizer
from psigraph.session import open_session

pytestmark = pytest.mark.usefixtures("no_gpu")

BASE = ["generate", str(Q4), "--max-new-tokens", "6"]


def test_text_is_continued_and_only_the_continuation_is_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    _, greedy, _ = reference_greedy(Q4, "speech")
    with open_gguf(Q4) as file:
        wanted = Tokenizer(file).decode(greedy[:6], skip_special=True)
    prompt = "Fellow-Citizens of the Senate and House of Representatives:"
    assert run([*BASE, "--prompt", prompt]) == 0
    shown = capfd.readouterr()
    assert shown.out == wanted + "\n"
    assert "weights are quantized" in shown.err


def test_ids_in_and_out(capfd: pytest.CaptureFixture[str]) -> None:
    prompt, greedy, _ = reference_greedy(Q4, "one_token")
    ids = " ".join(map(str, prompt))
    assert run([*BASE, "--prompt-token-ids", ids, "--output", "ids"]) == 0
    assert [int(token) for token in capfd.readouterr().out.split()] == greedy[:6]


def test_ids_work_without_a_tokenizer_and_text_does_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = changed(tmp_path / "m.gguf", b"\x05\0\0\0\0\0\0\0qwen2", b"\x05\0\0\0\0\0\0\0qwen9")
    prompt, greedy, _ = reference_greedy(Q4, "one_token")
    given = ["generate", str(model), "--max-new-tokens", "2"]
    assert run([*given, "--prompt-token-ids", ",".join(map(str, prompt))]) == 0
    assert [int(token) for token in capfd.readouterr().out.split()] == greedy[:2]
    assert run([*given, "--prompt", "a"]) == 4
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "--prompt-token-ids" in shown.err


def test_it_stops_at_the_files_end_token_and_does_not_give_it() -> None:
    prompt, greedy, _ = reference_greedy(Q4, "one_token")
    with open_session(Q4, "cpu") as session:
        at = next(index for index, token in enumerate(greedy) if token in session.end_tokens)
        assert list(continuation(session, prompt, 64)) == greedy[:at]
        session.reset()
        with pytest.raises(UsageError, match="at least 1"):
            next(continuation(session, prompt, 0))


@pytest.mark.parametrize("text", ["naïve café", "日本語", "🩺 ok", "plain"])
def test_pieces_are_whole_characters(text: str) -> None:
    with open_gguf(Q4) as file:
        tokenizer = Tokenizer(file)
    ids = tokenizer.encode(text)
    pieces = list(text_pieces(tokenizer, ids))
    assert "".join(pieces) == text
    assert all(piece and "\ufffd" not in piece for piece in pieces)
    cut = list(text_pieces(tokenizer, tokenizer.encode("🩺")[:-1]))
    assert "".join(cut) == "\ufffd"


class Slow:
    """A session whose tokens can be watched on their way."""

    def __init__(self, seen: list[str]) -> None:
        self.end_tokens, self.seen = (2,), seen

    def feed(self, ids: Any) -> None: ...

    def decode(self, count: int) -> Any:
        for index in range(count):
            self.seen.append(f"token {index}")
            yield [index]


def test_pieces_come_as_the_tokens_do() -> None:
    seen: list[str] = []
    tokens = continuation(Slow(seen), [1], 9)  # type: ignore[arg-type]
    for token in tokens:
        seen.append(f"shown {token}")  # noqa: PERF401 (the session appends to the same list in between)
    assert seen == ["token 0", "shown 0", "token 1", "shown 1", "token 2"]
    assert list(continuation(Slow([]), [1], 4, stop=False)) == [0, 1, 2, 3]  # type: ignore[arg-type]


def test_an_interrupt_ends_the_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def decode(*_: Any) -> Any:
        yield [67]
        raise KeyboardInterrupt

    monkeypatch.setattr(sessions.Session, "decode", decode)
    assert run([*BASE, "--prompt", "a"]) == 130
    assert capfd.readouterr().out.endswith("\n")


def test_ctrl_c_ends_a_running_process_at_once() -> None:
    command = [sys.executable, "-m", "psigraph", "generate", str(Q4), "--backend", "cpu", "--output", "ids"]
    command += ["--prompt-token-ids", "0", "--max-new-tokens", "2000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)  # it decodes
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ([], 2, "either --prompt or --prompt-token-ids"),
        (["--prompt", "a", "--prompt-token-ids", "1"], 2, "either --prompt or --prompt-token-ids"),
        (["--prompt", ""], 2, "prompt is empty"),
        (["--prompt-token-ids", " "], 2, "prompt is empty"),
        (["--prompt-token-ids", "4096"], 2, "ids are 0 to 4095"),
        (["--prompt-token-ids", "99999999999"], 2, "is no token id"),
        (["--prompt", "a", "--max-new-tokens", "0"], 2, "--max-new-tokens"),
        (["--prompt", "a", "--max-new-tokens", "2048"], 0, ""),
        (["--prompt", "a", "--max-new-tokens", "2049"], 2, "context has 2048"),
        (["--prompt", "a b c", "--ctx", "6"], 2, "--ctx 6"),
        (["--prompt", "a", "--backend", "cuda"], 7, "--backend cpu"),
        (["--prompt", "a", "--device", "-1"], 2, "--device"),
        (["--prompt", "\udcff"], 2, "not valid Unicode"),
    ],
)
def test_refusals(
    arguments: list[str],
    code: int,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sessions.Session, "decode", lambda self, count: iter(()))
    assert run([*BASE, *arguments]) == code
    shown = capfd.readouterr()
    lines = [line for line in shown.err.splitlines() if "warning" not in line]
    assert len(lines) == (1 if code else 0)
    assert all(named in line for line in lines)
    assert code == 0 or shown.out == ""


@pytest.mark.parametrize("given", ["text", "ids"])
def test_the_medical_guard_answers_instead_of_the_model(
    given: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    request = "Do I have cancer? Diagnose me."
    with open_gguf(Q4) as file:
        ids = Tokenizer(file).encode(request)
        digest = template_digest(str(file.metadata["tokenizer.chat_template"]))
    monkeypatch.setattr("psigraph.policy.Policy.is_medpsy", lambda self, sha256, template: template == digest)
    prompt = ["--prompt", request] if given == "text" else ["--prompt-token-ids", ",".join(map(str, ids))]
    assert run([*BASE, *prompt]) == 5
    shown = capfd.readouterr()
    assert shown.out == ""
    assert guard.Guard(guard.load_policy().data["guard"]).classify(request).message.split(".")[0] in shown.err
    assert run([*BASE, "--prompt", "What is a virus?"]) == 0
    disclaimer = guard.load_policy().data["guard"]["disclaimer"]
    assert capfd.readouterr().out.startswith(disclaimer)
