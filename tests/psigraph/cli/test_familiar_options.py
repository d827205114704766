"""Options as people of llama.cpp and Ollama know them, and what the command line says where it cannot follow."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from pathlib import Path

import click
import pytest
from tiny_model import Q4

from psigraph.bench.report import read_json
from psigraph.cli import COMMANDS, main, run
from psigraph.cli.commands import TEXTS
from psigraph.cli.generate import _token
from psigraph.cli.notes import warn_of_file
from psigraph.runtime.gguf.file import open_gguf
from psigraph.runtime.tokenizer.bpe import Tokenizer

pytestmark = pytest.mark.usefixtures("no_gpu")


def parameters(name: str) -> list[click.Parameter]:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    return command.params


@pytest.mark.parametrize("name", COMMANDS)
def test_h_is_help_and_q_is_quiet_everywhere(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "-h"]) == 0
    assert "-q, --quiet" in capsys.readouterr().out
    assert run(["-h"]) == 0


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("synth", "matrix", "doctor")])
def test_every_command_takes_its_model_as_an_argument_or_by_m(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tools = ["--llama-bench", "x"] if name == "compare" else []
    text = ["--text", __file__] if name == "perplexity" else ["--prompt", "a"] if name == "generate" else []
    for given in (["absent.gguf"], ["-m", "absent.gguf"], ["--model", "absent.gguf"]):
        assert run([name, *given, *tools, *text]) in (3, 7), name  # 7: tune and ablate look for a GPU first
        assert name in ("tune", "ablate") or "absent.gguf" in capsys.readouterr().err
    assert run([name, "a.gguf", "-m", "b.gguf", *tools]) == 2
    assert "given twice" in capsys.readouterr().err
    assert run([name, *tools]) == 2
    assert "MODEL" in capsys.readouterr().err


def named_options() -> list[tuple[str, str]]:
    """Every option of every command that names something."""
    return [
        (name, param.opts[-1])
        for name in COMMANDS
        for param in parameters(name)
        if isinstance(param, click.Option) and not param.is_flag and param.name not in TEXTS
        if param.type.name in ("text", "path", "file", "directory")
    ]


@pytest.mark.parametrize(("name", "option"), named_options())
def test_an_empty_name_is_refused_where_it_stands(name: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, str(Q4), option, ""]) == 2
    shown = capsys.readouterr().err
    assert f"'{option}'" in shown
    assert "the name is empty" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", str(Q4), "--layer", "x"], "'x' is not a whole number"),
        (["bench", str(Q4), "--repeats", "1.5"], "'1.5' is not a whole number"),
        (["chat", str(Q4), "--top-p", "x"], "'x' is not a number"),
        (["generate", str(Q4), "-n", "-2"], "-2 is not in the range x>=1"),
        (["generate", str(Q4), "--prompt-token-ids", "1,2,"], "an id is missing beside a comma"),
        (["generate", str(Q4), "--prompt-token-ids", ",1"], "an id is missing beside a comma"),
        (["generate", str(Q4), "--prompt-token-ids", " "], "the prompt is empty"),
        (["generate", str(Q4), "-p", "a", "--logit-bias", "5=1e99"], "logit_bias of token 5 is 1e+99"),
        (["generate", str(Q4), "-p", "a", "--logit-bias", "5=-1e39"], "or -infinity to forbid it"),
    ],
)
def test_what_is_wrong_is_said_in_peoples_words(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's are none of people's
        assert run(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert "range." not in lines[0]


def test_a_model_that_may_not_be_read_has_the_code_of_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copy(Q4, tmp_path / "mine.gguf")
    opened = os.open

    def refuse(path: object, *rest: int, **more: int) -> int:
        if str(path) == str(model):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # root may read everything
    monkeypatch.setattr(os, "open", refuse)
    assert run(["inspect", str(model)]) == 3
    assert "Permission denied" in capsys.readouterr().err


def test_generate_as_llama_cpp_has_it(capfd: pytest.CaptureFixture[str]) -> None:
    known = ["-m", str(Q4), "-p", "The whale", "-n", "3", "-c", "24", "--temp", "0.9", "--top-k", "-1"]
    seeds = []
    for seed in ("-1", "-1"):
        assert run(["generate", *known, "--seed", seed, "--json"]) == 0
        record = json.loads(capfd.readouterr().out)
        assert (len(record["ids"]), record["context"]) == (3, 24)
        seeds.append(record["seed"])
    assert seeds[0] != seeds[1]
    assert run(["generate", str(Q4), "-p", "The whale", "-n", "-1", "-c", "24", "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["stopped_by"] == "context"
    assert len(record["prompt_ids"]) + len(record["ids"]) == 25  # the last one is chosen and never goes in


def test_bench_as_llama_bench_has_it(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    assert run(["bench", "-m", str(Q4), "-n", "2", "-r", "1", "-d", "1", "-c", "64", "--json-out", str(new)]) == 0
    given = ["--model-path", str(Q4), "--max-new-tokens", "2", "--repeats", "1", "--depth", "1", "--ctx", "64"]
    assert run(["bench", *given, "--json-out", str(old)]) == 0
    work = ("prompt_tokens", "max_new_tokens", "repeats", "depth", "model_size")
    assert [read_json(old)[key] for key in work] == [read_json(new)[key] for key in work]


def test_likeliest_tokens_have_their_text_and_partial_ones_their_bytes(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(Q4), "-p", "The whale", "-n", "2", "--json", "--logprobs", "5"]) == 0
    record = json.loads(capfd.readouterr().out)
    with open_gguf(Q4) as file:
        tokenizer = Tokenizer(file)
        for step in record["logprobs"]:
            for one in (step, *step["likeliest"]):
                assert one["text"] == tokenizer.decode([one["id"]])
                assert "bytes" not in one
        partial = tokenizer.encode("☃")[0]  # three bytes, of which no token has all
        assert _token(partial, tokenizer) == {"id": partial, "text": "�", "bytes": [0xE2]}
    assert _token(3, None) == {"id": 3, "text": None}


def test_a_file_warns_once_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for times in (1, 0):
        assert run(["generate", str(Q4), "--prompt-token-ids", "1", "-n", "1", "--policy", "medpsy"]) == 0
        assert capfd.readouterr().err.count("weights are quantized") == times
    model = tmp_path / "m.gguf"
    model.write_text("")
    for changed in range(2):
        os.utime(model, ns=(changed, changed))  # another file in its place
        for line in ("psigraph: warning: one; two\n", ""):
            warn_of_file(model, ["one", "two"])
            assert capfd.readouterr().err == line


def test_quiet_leaves_the_result_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["generate", str(Q4), "-p", "The whale", "-n", "-1", "-c", "8", "--policy", "medpsy"]
    assert run(given) == 0
    loud = capfd.readouterr()
    assert "quantized" in loud.err
    assert "context of 8 tokens is full" in loud.err
    shutil.rmtree(Path(os.environ["PSIGRAPH_CACHE_DIR"]) / "told")
    assert run([*given, "-q"]) == 0
    assert capfd.readouterr() == (loud.out, "")
    script = tmp_path / "lines.txt"
    script.write_text("/set seed\n")
    assert run(["chat", str(Q4), "--script", str(script), "--seed", "5", "-q"]) == 0
    assert capfd.readouterr() == ("> /set seed\nseed 5\n", "")
    assert run(["generate", str(Q4), "-q"]) == 2
    assert capfd.readouterr().err.startswith("psigraph: ")  # an error is a result
