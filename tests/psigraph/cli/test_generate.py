"""`psigraph generate`: text as it comes, whole characters, end tokens, and nothing on stdout when it fails."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import Q4, changed, reference_greedy

from psigraph import session as sessions
from psigraph.cli import run
from psigraph.medpsy import guard
from psigraph.medpsy.policy import template_digest
from psigraph.options import SessionOptions
from psigraph.runtime.gguf.file import open_gguf
from psigraph.runtime.tokenizer.bpe import Tokenizer

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
    assert "quantized" not in shown.err  # the policy has no word for a file that is not MedPsy


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


def test_an_interrupt_ends_the_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def decode(*_: Any) -> Any:
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


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_the_prompt_may_lie_in_a_file_or_come_through_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def out(*arguments: str) -> str:
        assert run([*BASE, *arguments]) == 0
        return capfd.readouterr().out

    wanted = out("--prompt", "Naïve whales")
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfNa\xc3\xafve whales\r\n")
    assert out("--prompt-file", str(file)) == wanted
    for arguments in ([], ["--prompt", "-"], ["--prompt-file", "-"]):
        pipe(monkeypatch, "Naïve whales\n".encode())
        assert out(*arguments) == wanted


def test_a_chat_turn_is_written_as_the_file_says(capfd: pytest.CaptureFixture[str]) -> None:
    _, greedy, _ = reference_greedy(Q4, "chat")
    said = ["--prompt", "The state of the Union is strong."]
    assert run([*BASE, "--chat", *said, "--output", "ids"]) == 0
    assert [int(token) for token in capfd.readouterr().out.split()] == greedy[:6]
    assert run([*BASE, "--system", "Be brief.", *said, "--json", "--max-new-tokens", "1"]) == 0
    record = json.loads(capfd.readouterr().out)
    with open_gguf(Q4) as file:
        prompt = Tokenizer(file).decode(record["prompt_ids"])
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nThe state")


def test_the_record(capfd: pytest.CaptureFixture[str]) -> None:
    prompt, greedy, _ = reference_greedy(Q4, "one_token")
    ids = ",".join(map(str, prompt))
    assert run([*BASE, "--prompt-token-ids", ids, "--json"]) == 0
    out = capfd.readouterr().out
    assert out.count("\n") == 1
    record = json.loads(out)
    with open_gguf(Q4) as file:
        text = Tokenizer(file).decode(greedy[:6], skip_special=True)
    assert (record["text"], record["ids"], record["prompt_ids"]) == (text, greedy[:6], prompt)
    assert (record["stopped_by"], record["backend"], "seed" in record) == ("length", "cpu", False)
    assert record["prefill"] == "token by token: numpy"
    timings = record["timings"]
    assert (timings["prompt_tokens"], timings["generated_tokens"]) == (1, 6)
    assert timings["first_token_ms"] > 0
    assert timings["decode_tokens_per_second"] == pytest.approx(5e3 / timings["decode_ms"], rel=0.01)


@pytest.mark.parametrize(
    "drawn", [(), ("--temperature", "1.5", "--top-k", "0", "--seed", "3")], ids=["greedy", "drawn"]
)
def test_log_probabilities_are_those_of_the_models_own_logits(
    drawn: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    asked = [*BASE, "--prompt-token-ids", "4094,448", "--max-new-tokens", "3", "--json", *drawn]
    assert run(asked) == 0
    plain = json.loads(capfd.readouterr().out)
    assert run([*asked, "--logprobs", "2"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert "logprobs" not in plain
    assert record["ids"] == plain["ids"]
    ids = [*record["prompt_ids"], *record["ids"]]
    with sessions.open_session(Q4, SessionOptions("cpu", ctx=8, outputs=("logits",))) as session:
        rows = session.forced_logits(ids[:-1])[1:]
    for row, token, told in zip(rows, record["ids"], record["logprobs"], strict=True):
        values = row - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert (told["id"], told["logprob"]) == (token, pytest.approx(values[token]))
        assert [one["id"] for one in told["likeliest"]] == np.argsort(-values)[:2].tolist()
        assert told["likeliest"][0]["logprob"] == pytest.approx(values.max())


def test_a_stop_string_ends_the_text_before_it(capfd: pytest.CaptureFixture[str]) -> None:
    given = ["generate", str(Q4), "--prompt", "The whale", "--max-new-tokens", "16"]
    assert run([*given, "--no-stream"]) == 0
    whole = capfd.readouterr().out
    stop = whole[6:9]
    assert run([*given, "--stop", "never there", "--stop", stop]) == 0
    assert capfd.readouterr().out == whole.partition(stop)[0] + "\n"
    assert run([*given, "--stop", stop, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["stopped_by"] == "stop"


def test_at_the_end_of_the_context_it_stops_and_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*BASE, "--prompt", "a", "--ctx", "4", "--max-new-tokens", "99", "--output", "ids"]) == 0
    shown = capfd.readouterr()
    assert len(shown.out.split()) == 4  # the last of them is chosen and takes no position
    assert shown.err.splitlines()[-1] == (
        "psigraph: stopped: the context of 4 tokens is full; a larger --ctx holds up to 2,048"
    )


def test_a_seed_gives_its_text_again(capfd: pytest.CaptureFixture[str]) -> None:
    def record(*options: str) -> dict[str, Any]:
        assert run([*BASE, "--prompt", "The whale", "--json", *options]) == 0
        found: dict[str, Any] = json.loads(capfd.readouterr().out)
        return found

    hot = ("--temperature", "1.5", "--top-k", "0", "--top-p", "1", "--min-p", "0")
    first = record(*hot)
    assert record(*hot, "--seed", str(first["seed"]))["ids"] == first["ids"]
    assert record(*hot, "--seed", "1")["ids"] != record(*hot, "--seed", "2")["ids"]
    greedy = record("--temperature", "0")
    assert "seed" not in greedy
    forbidden = record("--temperature", "0", "--logit-bias", f"{greedy['ids'][0]}=-inf")
    assert forbidden["ids"][0] != greedy["ids"][0]


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ([], 2, "stdin: the prompt is empty; give at least one token"),
        (["--prompt", "a", "--prompt-token-ids", "1"], 2, "--prompt and --prompt-token-ids: give one of them"),
        (["--prompt", "a", "--prompt-file", "b"], 2, "--prompt and --prompt-file: give one of them"),
        (["--prompt-file", "/nonexistent"], 2, "/nonexistent: cannot be read: No such file"),
        (["--prompt-file", "/"], 2, "/: cannot be read: Is a directory"),
        (["--prompt", ""], 2, "prompt is empty"),
        (["--prompt-token-ids", " "], 2, "prompt is empty"),
        (["--prompt-token-ids", "4096"], 2, "ids are 0 to 4095"),
        (["--prompt-token-ids", "99999999999"], 2, "is no token id"),
        (["--prompt-token-ids", "1", "--chat"], 2, "--chat writes a text as a chat"),
        (["--prompt-token-ids", "1", "--system", ""], 2, "--system writes a text as a chat"),
        (["--prompt", "a", "--thinking", "on"], 2, "--thinking on: the model's chat template cannot switch"),
        (["--prompt", "a", "--max-new-tokens", "0"], 2, "--max-new-tokens"),
        (["--prompt", "a", "--max-new-tokens", "2049"], 0, ""),
        (["--prompt", "a " * 2049], 2, "the prompt has 2050 tokens, the model's context holds 2048; shorten"),
        (["--prompt", "a " * 1_000_000], 2, "the text is too long for a context of 2,048 tokens: its first 65,537"),
        (["--prompt", " " * 10_000_000], 2, "the text has a run of more than 1,048,576 characters"),
        (["--prompt", "a b c d", "--ctx", "3"], 2, "--ctx 3: the prompt has 4 tokens; shorten it, or give --ctx 4"),
        (["--prompt", "a", "--backend", "cuda"], 7, "--backend cpu"),
        (["--prompt", "a", "--device", "-1"], 2, "--device"),
        (["--prompt", "\udcff"], 2, "not valid Unicode"),
        (["--prompt", "\udcff", "--chat"], 2, "not valid Unicode"),
        (["--prompt", "a", "--json", "--output", "ids"], 2, "leave --output ids out"),
        (["--prompt", "a", "--json", "--stream"], 2, "leave --stream out"),
        (["--prompt", "a", "--logprobs", "3"], 2, "--logprobs goes into the record; give --json too"),
        (["--prompt", "a", "--json", "--logprobs", "101"], 2, "--logprobs"),
        (["--prompt", "a", "--stop", "b", "--output", "ids"], 2, "does not go with --output ids"),
        (["--prompt", "a", "--stop", ""], 2, "stop string is empty"),
        (["--prompt", "a", "--temperature", "-1"], 2, "--temperature"),
        (["--prompt", "a", "--top-p", "1.5"], 2, "--top-p"),
        (["--prompt", "a", "--seed", "x"], 2, "--seed"),
        (["--prompt", "a", "--logit-bias", "5"], 2, "give token id and bias as 42=-5"),
        (["--prompt", "a", "--logit-bias", "5=nan"], 2, "give token id and bias as 42=-5"),
        (["--prompt", "a", "--logit-bias", "4096=1"], 2, "token id 4096 is outside the vocabulary"),
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
    pipe(monkeypatch, b"")
    assert run([*BASE, *arguments]) == code
    shown = capfd.readouterr()
    lines = [line for line in shown.err.splitlines() if "warning" not in line]
    assert len(lines) == (1 if code else 0)
    assert all(named in line for line in lines)
    assert code == 0 or shown.out == ""


def test_what_is_no_utf8_is_refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    pipe(monkeypatch, b"The \xff whale")
    assert run(BASE) == 2
    assert capfd.readouterr() == (
        "",
        "psigraph: stdin: byte 4 (0xff) is not UTF-8; convert the text first, for example with iconv\n",
    )
    monkeypatch.setattr("sys.stdin", None)
    assert run(BASE) == 2
    assert "no prompt: give --prompt" in capfd.readouterr().err


def test_a_reader_that_went_away_ends_it_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "psigraph", *BASE, "--prompt", "a", "--backend", "cpu"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 141
    assert all("warning" in line for line in done.stderr.splitlines())


@pytest.mark.parametrize("given", ["text", "ids"])
def test_the_medical_guard_answers_instead_of_the_model(
    given: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    request = "Do I have cancer? Diagnose me."
    with open_gguf(Q4) as file:
        ids = Tokenizer(file).encode(request)
        digest = template_digest(str(file.metadata["tokenizer.chat_template"]))
    monkeypatch.setattr("psigraph.medpsy.policy.Policy.is_medpsy", lambda self, sha256, template: template == digest)
    prompt = ["--prompt", request] if given == "text" else ["--prompt-token-ids", ",".join(map(str, ids))]
    assert run([*BASE, *prompt]) == 5
    if given == "text":
        for hidden in (["--chat", *prompt], ["--system", request, "--prompt", "Go on."]):
            assert run([*BASE, *hidden]) == 5
    shown = capfd.readouterr()
    assert shown.out == ""
    assert guard.Guard(guard.load_policy().data["guard"]).classify(request).message.split(".")[0] in shown.err
    assert run([*BASE, "--prompt", "What is a virus?"]) == 0
    disclaimer = guard.load_policy().data["guard"]["disclaimer"]
    assert capfd.readouterr().out.startswith(disclaimer)
    assert run([*BASE, "--prompt", "What is a virus?", "--json", "--max-new-tokens", "1"]) == 0
    assert json.loads(capfd.readouterr().out)["disclaimer"] == disclaimer


def test_the_medical_policy_may_be_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    request = ["--prompt", "Do I have cancer? Diagnose me.", "--max-new-tokens", "1"]
    assert run([*BASE, *request]) == 0
    assert run([*BASE, *request, "--policy", "medpsy"]) == 5
    assert "diagnos" in capfd.readouterr().err.splitlines()[-1].lower()
