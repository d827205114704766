"""`psigraph bench`: the report it writes, what it prints, and every refusal before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import Q4, Q4_SHA256, reference_greedy

from psigraph import numpy_path
from psigraph.bench import measure as measuring
from psigraph.bench.report import read_json, validate_report
from psigraph.cli import run
from psigraph.cli.bench import summary
from psigraph.runtime.gguf.file import open_gguf
from psigraph.runtime.synth.model import write_synth
from psigraph.runtime.synth.vocab import SMALLEST

pytestmark = pytest.mark.usefixtures("no_gpu")

BASE = ["bench", "--model-path", str(Q4), "--artifact-kind", "gguf", "--max-new-tokens", "6"]


def test_a_report_of_the_cpu_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    prompt, greedy, _ = reference_greedy(Q4, "speech")
    ids = ",".join(map(str, prompt))
    arguments = ["--model-size", "8.9m", "--backend", "cpu", "--prompt-token-ids", ids, "--expect-sha256", Q4_SHA256]
    assert run([*BASE, *arguments, "--json-out", str(out)]) == 0
    report = read_json(out)
    assert validate_report(report) == []
    assert report["execution_engine"] == "psionic_qwen3_cpu"
    assert report["prompt_tokens"] == prompt
    assert report["repeats"] == len(report["runs"]) == 3
    assert all(run["generated_tokens"] == greedy[:6] for run in report["runs"])
    assert all(run["model_artifact_sha256"] == Q4_SHA256 for run in report["runs"])
    assert all(0 < run["decode_ms"] < run["total_ms"] for run in report["runs"])  # the prompt is not generation
    assert report["artifact"]["quant_mix"] == {"q4_k": 48, "q6_k": 9}
    assert [(end["id"], end["from"][-1]) for end in report["artifact"]["end_tokens"]] == [
        (4095, "the chat template ends turns with it"), (4093, "its text")
    ]  # fmt: skip
    assert (report["artifact"]["synthetic"], report["artifact"]["admitted"]) == (False, False)
    assert report["timings"]["load_ms"] > 0
    assert report["timings"]["start_to_first_token_ms"] > report["timings"]["first_token_ms"]
    assert set(report["timings"]["step_us"]) == {"p10", "p50", "p90", "p99", "max", "steps"}
    assert report["roofline"] is None
    shown = capsys.readouterr()
    assert "psionic_qwen3_cpu on" in shown.out
    assert "median" in shown.out
    assert f"report: {out}" in shown.out
    assert "quantized" not in shown.err  # the policy has no word for a file that is not MedPsy


def test_a_report_names_the_type_of_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = []
    for kv_type in ("f16", "q8"):
        out = tmp_path / f"{kv_type}.json"
        arguments = [
            "--prompt-token-ids",
            "0",
            "--backend",
            "cpu",
            "--repeats",
            "1",
            "--ctx",
            "16",
            "--kv-type",
            kv_type,
        ]
        assert run([*BASE, *arguments, "--json-out", str(out)]) == 0
        assert f"{kv_type} cache" in capsys.readouterr().out
        reports.append(read_json(out))
        assert validate_report(reports[-1]) == []
        assert (reports[-1]["kv_type"], reports[-1]["environment"]["kv_type"]) == (kv_type, kv_type)
    arguments = [
        "--prompt-token-ids",
        "0",
        "--backend",
        "cpu",
        "--repeats",
        "1",
        "--baseline",
        str(tmp_path / "f16.json"),
        "--kv-type",
        "q8",
    ]
    assert run([*BASE, *arguments]) == 2
    assert "kv_type is f16 there and q8 here; not the same work" in capsys.readouterr().err


def test_the_forced_row_at_a_depth(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    arguments = ["--prompt-token-ids", "0", "--mode", "forced", "--depth", "3", "--repeats", "2", "--ctx", "9"]
    assert run([*BASE, *arguments, "--json-out", str(out)]) == 0
    report = read_json(out)
    assert validate_report(report) == []
    assert (report["decode_row"], report["depth"], report["backend"]) == ("forced", 3, "cpu")
    assert "no NVIDIA driver" in report["environment"]["no_gpu_because"]


def test_the_text_row_gives_the_tokens_of_generate(tmp_path: Path) -> None:
    reports = {}
    prompt = ["--prompt-token-ids", "7,8", "--depth", "2", "--repeats", "2"]
    for name, more in {
        "chained": [],
        "text": ["--mode", "text"],
        "drawn": ["--mode", "text", "--temperature", "0.9", "--top-k", "40", "--logit-bias", "3=-inf"],
    }.items():
        out = tmp_path / f"{name}.json"
        assert run([*BASE, *prompt, *more, "--json-out", str(out)]) == 0
        reports[name] = read_json(out)
        assert validate_report(reports[name]) == []
        assert reports[name]["runs_identical"]
    tokens = {name: report["runs"][0]["generated_tokens"] for name, report in reports.items()}
    assert tokens["text"] == tokens["chained"]
    assert tokens["drawn"] != tokens["chained"]
    assert reports["text"]["decode_row"] == "text"
    assert reports["text"]["sampler"] is None
    drawn = reports["drawn"]["sampler"]
    assert (drawn["temperature"], drawn["top_k"], drawn["seed"], drawn["logit_bias"]) == (0.9, 40, 0, {"3": "-inf"})


def test_sampling_that_takes_the_likeliest_is_the_greedy_row(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    arguments = ["--prompt-token-ids", "7", "--mode", "text", "--temperature", "0", "--repeats", "1"]
    assert run([*BASE, *arguments, "--json-out", str(out)]) == 0
    assert read_json(out)["sampler"] is None


def test_a_prompt_counts_alike_in_all_rows(tmp_path: Path) -> None:
    ids = ",".join(str(one) for one in range(5, 25))
    spent = {}
    for mode in ("chained", "text"):
        out = tmp_path / f"{mode}.json"
        assert run([*BASE, "--prompt-token-ids", ids, "--mode", mode, "--repeats", "1", "--json-out", str(out)]) == 0
        report = read_json(out)
        spent[mode] = report["mean_total_ms"] / report["runs"][0]["decode_ms"]
    assert min(spent.values()) > 1.5  # twenty steps and few: the prompt is most of it


def test_drawn_tokens_are_no_baseline_of_likeliest_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "text.json"
    arguments = ["--prompt-token-ids", "7", "--mode", "text", "--repeats", "1"]
    assert run([*BASE, *arguments, "--json-out", str(out)]) == 0
    assert run([*BASE, *arguments, "--baseline", str(out), "--top-k", "4"]) == 2
    assert "sampler is None there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--top-k", "4"], 2, "sampling options are measured by --mode text"),
        (["--mode", "forced", "--temperature", "1"], 2, "sampling options are measured by --mode text"),
        (["--mode", "text", "--top-k", "4", "--profile"], 2, "without sampling options"),
        (["--sweep", "depth=0,0"], 2, "a depth stands there twice"),
        (
            ["--prompt-token-ids", "4096"],
            2,
            "ids: token id 4096 is outside the vocabulary; ids are 0 to",
        ),
        (["--depth", "2048"], 2, "or lower --max-new-tokens or --depth"),
        (["--backend", "cpu", "--device", "1"], 2, "--device 1: numpy uses no GPU"),
        (["--backend", "host", "--device", "1"], 2, "one device, number 0"),
        (["--prompt-token-ids", ""], 2, "prompt is empty"),
        (["--prompt-token-ids", "1,-2"], 2, "'-2' is no token id"),
        (["--max-new-tokens", "0"], 2, "--max-new-tokens"),
        (["--max-new-tokens", "2049"], 2, "context has 2048"),
        (["--ctx", "5"], 2, "--ctx 5: prompt and new tokens fill 6"),
        (["--ctx", "2049"], 2, "1 to 2048"),
        (["--repeats", "0"], 2, "--repeats"),
        (["--model-size", "1.7b"], 2, "size 8.9m"),
        (["--artifact-kind", "safetensors"], 2, "--artifact-kind"),
        (["--backend", "cuda"], 7, "--backend cpu"),
        (["--backend", "tpu"], 2, "--backend"),
        (["--disable-pass", "fuse_all"], 2, "fuse_swiglu"),
        (["--expect-sha256", "12"], 2, "64 hexadecimal digits"),
        (["--expect-sha256", "0" * 64], 5, "digest is a7d5630a"),
        (["--model-path", "absent.gguf"], 3, "no such file"),
    ],
)
def test_refusals(
    arguments: list[str],
    code: int,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(numpy_path, "dequantized", lambda *_: pytest.fail("a weight was read"))
    given = [*BASE, "--prompt-token-ids", "0", "--json-out", str(tmp_path / "r.json"), *arguments]
    assert run(given) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert len(lines) == 1
    assert named in lines[0]
    assert not list(tmp_path.iterdir())


def test_without_a_prompt_the_file_says_which_token_begins(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    assert run(["bench", str(Q4), "-n", "1", "-r", "1", "--json-out", str(out)]) == 0
    with open_gguf(Q4) as file:
        assert read_json(out)["prompt_tokens"] == [file.metadata["tokenizer.ggml.bos_token_id"]]


def test_a_baseline_of_other_work_is_refused_before_the_work_and_one_of_the_same_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    given = [*BASE, "--prompt-token-ids", "0", "--repeats", "1"]
    assert run([*given, "--json-out", str(first)]) == 0
    assert run([*given, "--json-out", str(second), "--baseline", str(first)]) == 0
    shown = capsys.readouterr().out
    assert "a single run has no spread" in shown.partition(str(second))[2]  # written first, then compared
    record = json.loads(first.read_text())
    monkeypatch.setattr(numpy_path, "dequantized", lambda *_: pytest.fail("a weight was read"))
    for other, named in (
        (["--max-new-tokens", "7"], "max_new_tokens is 6 there and 7 here"),
        (["--prompt-token-ids", "1"], "prompt_tokens is [0] there and [1] here"),
        (["--depth", "1"], "depth is 0 there"),
        (["--mode", "forced"], "decode_row is chained there"),
        (["--backend", "cuda"], "backend is cpu there and cuda here"),
    ):
        assert run([*given, *other, "--baseline", str(first)]) == 2
        assert named in capsys.readouterr().err
    first.write_text(json.dumps({**record, "model_size": "1.7b"}))
    assert run([*given, "--baseline", str(first)]) == 2
    assert "model_size is 1.7b there and 8.9m here" in capsys.readouterr().err
    first.write_text("{}")
    assert run([*given, "--baseline", str(first)]) == 2
    assert "give a report that psigraph bench wrote" in capsys.readouterr().err


def test_the_model_is_never_taken_for_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link.json").symlink_to(Q4)
    assert run([*BASE, "--json-out", str(tmp_path / "link.json")]) == 10
    assert "is a model file (GGUF)" in capsys.readouterr().err
    assert Q4.read_bytes()[:4] == b"GGUF"


def test_a_blocked_tier_is_refused_with_the_rule_and_the_override_is_not_enough_for_missing_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_synth(tmp_path / "m.gguf", "0.6b", "iq3_m", 1, layers=1, vocab=SMALLEST)
    given = ["bench", "--model-path", str(model), "--prompt-token-ids", "0"]
    assert run(given) == 5
    assert "rule any_3_bit_route" in capsys.readouterr().err
    assert run([*given, "--allow-blocked-quantization"]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "no kernel reads iq3" in line


def test_an_unwritable_report_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "run_bench", lambda *_, **__: pytest.fail("the work began"))
    (tmp_path / "file").write_text("")
    assert run([*BASE, "--json-out", str(tmp_path / "file" / "r.json")]) == 10
    assert "cannot be written" in capsys.readouterr().err
    assert run([*BASE, "--json-out", str(tmp_path)]) == 10


def a_shown_report(**changes: Any) -> dict[str, Any]:
    from bench_reports import a_report

    report = json.loads(json.dumps(a_report()))
    report["artifact"]["file"] = "m.gguf"
    report["environment"] |= {"cores": 2, "arithmetic": "int8"}
    for path, value in changes.items():
        part, _, key = path.partition("__")
        report[part][key] = value
    return report


def test_the_summary_of_a_gpu_names_share_and_doubts() -> None:
    shown = summary(a_shown_report())
    assert "NVIDIA H200" in shown
    assert "4,200 GB/s (measured): 13.1 %" in shown
    assert "void" not in shown
    shown = summary(a_shown_report(roofline__valid=False, environment__gpu_idle=False))
    assert "this row is void" in shown
    assert "the GPU was not idle" in shown


def test_a_prompt_too_short_for_a_profile_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = a_shown_report()
    prompt = {"tokens": 8, "way": "token by token: too short for a chunk", "median_first_token_ms": 1.0}
    report["timings"] |= {"prompt": {**prompt, "prompt_tokens_per_second": 8.0}}
    report["timings"]["profile"] = {"position": 4, "step_us": 1.0, "rows_us": 1.0}
    report["kernels"] = []
    monkeypatch.setattr(measuring, "run_bench", lambda *_, **__: report)
    given = ["bench", str(Q4), "--profile", "--prompt-tokens", "8"]
    assert run(given) == 0
    said = "--profile: no rows for the prompt, whose 8 tokens go in token by token: too short for a chunk"
    assert said in capsys.readouterr().err
    report["timings"]["prompt"]["profile"] = report["timings"]["profile"]
    assert run(given) == 0
    assert "no rows for the prompt" not in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("bench", "compile", "inspect", "generate"):
        assert run([command, "--help"]) == 0
        assert f"psigraph {command} " in capsys.readouterr().out
