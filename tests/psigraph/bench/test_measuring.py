"""bench --profile, --sweep and --baseline, and tune, on generated kernels and the stand-in driver.

They run in a process of their own: a driver is chosen once in a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from psigraph.bench.baseline import compare_reports
from psigraph.bench.tuned import load_tuned, save_tuned, tuned_path
from psigraph.build import build_program, open_model, with_prefill
from psigraph.codegen.lower import PREFILL_ROWS
from psigraph.codegen.target import target_for
from psigraph.ir.errors import UsageError
from psigraph.ir.regime import Regime
from psigraph.runtime.synth import model as synth
from psigraph.runtime.synth.model import Size, write_synth

# The shapes of the tiny model in two layers, as in tests/runtime/test_engine.py, so that kernels are compiled once.
TWO_LAYERS = Size(layers=2, hidden=256, feed_forward=768, heads=4, kv_heads=2, untied=False, context=2048)
KERNELS = 2 * 5 + 2  # five a layer, embedding, head


def psigraph(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "psigraph", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PSIGRAPH_CACHE_DIR": str(cache)},
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synth.SIZES, "short", TWO_LAYERS)
        return write_synth(tmp_path_factory.mktemp("short") / "short.gguf", "short", "q4_k_m", 1, vocab=4096)


@pytest.fixture(scope="module")
def measured(short: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """(cache, report, printed) of one profiled run on the host target."""
    folder = tmp_path_factory.mktemp("measured")
    work = ["--max-new-tokens", "4", "--repeats", "2", "--prompt-token-ids", "5,6"]
    done = psigraph(
        *["bench", "--model-path", str(short), "--backend", "host", *work],
        *["--profile", "--prompt-tokens", "12", "--json-out", str(folder / "report.json")],
        cache=folder / "cache",
    )
    assert done.returncode == 0, done.stderr
    return folder / "cache", json.loads((folder / "report.json").read_text()), done.stdout


def test_profile_has_a_row_for_every_kernel_of_the_step(measured: tuple[Path, dict[str, Any], str]) -> None:
    _, report, printed = measured
    rows = {row["name"]: row for row in report["kernels"] if row["step"] == "decode"}
    assert sum(row["launches"] for row in rows.values()) == KERNELS + 1  # between steps
    assert rows["rope_attention"]["launches"] == 2
    assert all(row["us"] >= 0 for row in rows.values())
    weights = sum(row["bytes"] for row in rows.values() if row["name"] != "rope_attention")
    cache_of_mean_position = 2 * 1024 * 2.5  # 2 layers, 1,024 bytes a position, positions 1 to 4
    assert weights == report["artifact"]["bytes_per_token"] - cache_of_mean_position
    assert "hand-over" in printed
    assert report["timings"]["profile"]["rows_us"] == pytest.approx(sum(row["us"] for row in rows.values()))


def test_profile_has_a_row_for_every_kernel_of_a_prompts_chunk(
    short: Path, measured: tuple[Path, dict[str, Any], str]
) -> None:
    _, report, printed = measured
    rows = {row["name"]: row for row in report["kernels"] if row["step"] == "prefill"}
    with open_model(short) as model:
        graph = model.graph(rows=PREFILL_ROWS)
        program = with_prefill(build_program(model, target_for("host")), graph, target_for("host"))
    want = Counter(launch.kernel for launch in program.step("prefill").kernels)
    assert {name: row["launches"] for name, row in rows.items()} == {**want, "between steps": 1}
    assert all(row["us"] >= 0 for row in rows.values())
    assert sum(row["own_us"] > 0 for row in rows.values()) >= len(want)
    prompt = report["timings"]["prompt"]
    assert prompt["way"] == f"own kernels, {PREFILL_ROWS} tokens at once"
    assert prompt["profile"]["rows_us"] == pytest.approx(sum(row["us"] for row in rows.values()))
    assert "the first chunk of 12 tokens: " in printed
    assert all(printed.count(f"  {name} ") == 1 for name in want)


def test_a_prompt_that_takes_steps_has_no_chunk_in_the_profile(
    short: Path, measured: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    done = psigraph(
        *["bench", "--model-path", str(short), "--backend", "host", "--max-new-tokens", "1", "--repeats", "1"],
        *["--prompt-token-ids", "5", "--profile", "--prompt-tokens", "12", "--prefill", "off"],
        *["--json-out", str(tmp_path / "report.json")],
        cache=measured[0],
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert {row["step"] for row in report["kernels"]} == {"decode"}
    assert "profile" not in report["timings"]["prompt"]
    assert "first chunk" not in done.stdout


def test_profile_leaves_the_engine_as_it_was(measured: tuple[Path, dict[str, Any], str]) -> None:
    _, report, _ = measured
    assert report["runs_identical"]
    assert report["execution_engine"] == "psionic_qwen3_host"


def test_sweep_measures_each_depth_and_writes_a_report_for_each(
    short: Path, measured: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    done = psigraph(
        *["bench", "--model-path", str(short), "--backend", "host", "--max-new-tokens", "2", "--repeats", "1"],
        *["--prompt-token-ids", "5", "--sweep", "depth=0,8", "--json-out", str(tmp_path / "sweep")],
        cache=measured[0],
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads((tmp_path / "sweep" / f"depth-{depth}.json").read_text()) for depth in (0, 8)]
    assert [report["depth"] for report in reports] == [0, 8]
    assert "more us" in done.stdout


def test_baseline_tells_noise_from_change(measured: tuple[Path, dict[str, Any], str]) -> None:
    report = measured[1]
    assert "within the runs' spread" in compare_reports(report, report)[-1]
    faster = json.loads(json.dumps(report))
    for run in faster["runs"]:
        run["decode_tokens_per_second"] *= 10
    assert compare_reports(faster, report)[-1].endswith("faster")
    single = {**report, "runs": report["runs"][:1]}
    assert "a single run has no spread" in compare_reports(single, single)[-1]


def test_baseline_refuses_other_work(measured: tuple[Path, dict[str, Any], str]) -> None:
    report = measured[1]
    with pytest.raises(UsageError, match="depth is 7 there and 0 here"):
        compare_reports(report, {**report, "depth": 7})
    with pytest.raises(UsageError, match="kv_type is q8 there and f16 here"):
        compare_reports(report, {**report, "kv_type": "q8"})
    older = {key: value for key, value in report.items() if key != "kv_type"}
    assert compare_reports(report, older)


def test_profile_needs_kernels(short: Path, tmp_path: Path) -> None:
    done = psigraph(
        *["bench", "--model-path", str(short), "--backend", "cpu", "--profile", "--max-new-tokens", "1"],
        *["--prompt-token-ids", "5", "--repeats", "1"],
        cache=tmp_path,
    )
    assert done.returncode == 2
    assert "--profile: the backend cpu runs no kernels" in done.stderr


@pytest.mark.parametrize("value", ["512", "depth=", "depth=1,,2", "ctx=5"])
def test_sweep_says_how_depths_are_given(short: Path, value: str, tmp_path: Path) -> None:
    done = psigraph("bench", "--model-path", str(short), "--sweep", value, cache=tmp_path)
    assert done.returncode == 2
    assert "give depths as depth=0,512,1024" in done.stderr


def test_tune_tries_shapes_and_keeps_nothing_from_the_stand_in(
    short: Path, measured: tuple[Path, dict[str, Any], str]
) -> None:
    done = psigraph("tune", str(short), "--backend", "host", "--seconds", "4", cache=measured[0])
    assert done.returncode == 0, done.stderr
    assert "psigraph host target:" in done.stdout
    assert "kept nothing" in done.stdout
    assert "best" in done.stderr
    assert not (measured[0] / "tuned").exists()


def test_ablate_has_a_row_for_every_pass_and_feature(
    short: Path, measured: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    from psigraph.passes.pipeline import PIPELINE

    done = psigraph(
        *["ablate", str(short), "--backend", "host", "--depth", "1", "--steps", "4", "--prompt-tokens", "12"],
        *["--json-out", str(tmp_path / "ablation.json")],
        cache=measured[0],
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "ablation.json").read_text())
    passes = [f"pass {entry.name}" for entry in PIPELINE if not entry.lowering]
    rows = {row["off"]: row for row in record["rows"]}
    assert list(rows) == ["everything on", "programmatic edges", *passes, "all passes", "everything on, again"]
    assert rows["everything on"]["kernels"] == KERNELS
    assert all(rows[name]["kernels"] > KERNELS for name in (*passes, "all passes"))
    assert all(row["step_us"] > 0 for row in rows.values())
    assert (record["schema"], record["prompt_tokens"]) == ("psigraph.ablation.v1", 12)
    of_prompts = [f"pass {entry.name}" for entry in PIPELINE if not entry.lowering and Regime.MANY in entry.regimes]
    timed = [name for name, row in rows.items() if "prompt_us" in row]
    assert timed == ["everything on", *of_prompts, "all passes", "everything on, again"]
    assert all(rows[name]["prompt_us"] > 0 for name in timed)
    assert done.stdout.count("   prompt ") == len(timed)
    assert "at depth 1; prompts of 12 tokens, own kernels, 512 tokens at once\n" in done.stdout


def test_tuned_shapes_survive_only_if_they_make_sense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from psigraph.runtime.cuda.driver import DeviceFacts

    monkeypatch.setenv("PSIGRAPH_CACHE_DIR", str(tmp_path))
    facts = DeviceFacts("NVIDIA H200", (9, 0), 132, 1, 1, "13.0")
    assert load_tuned(facts) == {}
    shapes = {"scaled_swiglu q4_k[6144,2048] q4_k[6144,2048]": {"column_warps": 8, "tile_warps": 2}}
    save_tuned(facts, shapes)
    save_tuned(facts, {"other": {"column_warps": 4}})
    assert load_tuned(facts) == {**shapes, "other": {"column_warps": 4}}
    for odd in ("not json", "[]", '{"schema": "x"}', '{"schema": "psigraph.tuned.v1", "shapes": {"a": 3}}'):
        tuned_path(facts).write_text(odd)
        assert load_tuned(facts) == {}
    tuned_path(facts).write_text('{"schema": "psigraph.tuned.v1", "shapes": {"a": {"column_warps": -1, "evil": 1}}}')
    assert load_tuned(facts) == {}
