"""The matrix is computed from its reports; nothing in it can be edited without notice."""

import copy
import json
import os

import pytest
from bench_reports import REAL_SHA256, SYNTH_SHA256, a_comparator, a_report
from click.testing import CliRunner

from psigraph.cli import run
from psigraph.cli.matrix import MATRIX, command
from psigraph.ir.errors import UsageError
from psigraph.json_file import read_json, write_json_atomically
from psigraph.medpsy.comparator_report import validate_comparator_report
from psigraph.medpsy.matrix import build_matrix, read_source, validate_matrix
from psigraph.medpsy.matrix_view import BEGIN, END, block_of, markdown, replace_block, svg

RTX_4080 = "NVIDIA GeForce RTX 4080"


def ours(rate=600.0, **options):
    return a_report(rate, tokens=512, **({"session": "s1"} | options))


def matrix_of(tmp_path, *reports):
    sources = []
    for index, content in enumerate(reports):
        path = tmp_path / f"report_{index}.json"
        write_json_atomically(path, content)
        sources.append(read_source(path, tmp_path))
    return build_matrix(sources, host="a-host")


def test_ours_twice_as_fast_on_a_synthetic_file(tmp_path):
    matrix = matrix_of(tmp_path, ours(600.0), a_comparator(250.0))
    decision = matrix["decision"]
    assert [entry["can_claim_parity"] for entry in decision["by_host"]] == [True]
    assert "2.40 x" in decision["by_host"][0]["why"]
    assert decision["can_claim_parity"] is False
    assert decision["can_claim_competitive_medpsy"] is False
    assert "RTX 4080" in decision["why"]
    assert validate_matrix(matrix, tmp_path) == []


def test_the_real_artifact_on_the_rtx_4080_settles_it(tmp_path):
    there = {"sha256": REAL_SHA256, "gpu": RTX_4080}
    other = {"sha256": REAL_SHA256, "synthetic": False, "gpu": RTX_4080}
    for rate, parity, competitive in ((400.0, True, True), (340.0, False, True), (200.0, False, False)):
        decision = matrix_of(tmp_path, ours(rate, **there), a_comparator(370.0, **other))["decision"]
        assert decision["can_claim_parity"] is parity
        assert decision["can_claim_competitive_medpsy"] is competitive


def test_of_two_gpus_of_the_claimed_name_the_slower_speaks(tmp_path):
    real = {"sha256": REAL_SHA256}
    decision = matrix_of(
        tmp_path,
        ours(400.0, gpu=RTX_4080, **real),
        a_comparator(370.0, gpu=RTX_4080, synthetic=False, **real),
        ours(200.0, gpu=f"{RTX_4080} Laptop", **real),
        a_comparator(250.0, gpu=f"{RTX_4080} Laptop", synthetic=False, **real),
    )["decision"]
    assert decision["can_claim_parity"] is False
    assert [entry["can_claim_parity"] for entry in decision["by_host"]] == [True, False]


def test_a_synthetic_file_on_the_rtx_4080_settles_nothing(tmp_path):
    decision = matrix_of(tmp_path, ours(900.0, gpu=RTX_4080), a_comparator(gpu=RTX_4080))["decision"]
    assert decision["by_host"][0]["can_claim_parity"] is True
    assert decision["can_claim_parity"] is False
    assert decision["can_claim_competitive_medpsy"] is False


@pytest.mark.parametrize(
    ("mine", "theirs", "why"),
    [
        ({}, {"session": "s2"}, "interleaved"),
        ({"session": None}, {"session": ""}, "interleaved"),
        ({}, {"max_new_tokens": 128}, "max_new_tokens differs"),
        ({}, {"depth": 4096}, "depth differs"),
        ({}, {"gpu_idle": False}, "not idle"),
        ({"idle": False}, {}, "not idle"),
        ({"repeats": 2}, {}, "fewer than 3"),
        ({}, {"samples": [250.0], "raw": [{}]}, "fewer than 3"),
        ({}, {"work_per_token": ""}, "work per token"),
        ({}, {"gpu": "NVIDIA H100"}, "interleaved"),
        ({}, {"sha256": "6" * 64}, "interleaved"),
        ({"decode_row": "forced"}, {}, "no chained row"),
        ({"kv_type": "q8"}, {}, "psigraph: its KV cache is q8, comparisons are of f16 caches"),
        ({}, {"status": "not_run", "samples": [], "raw": [], "reason": "absent"}, "interleaved"),
    ],
)
def test_unlike_rows_are_not_put_side_by_side(tmp_path, mine, theirs, why):
    entry = matrix_of(tmp_path, ours(**mine), a_comparator(**theirs))["decision"]["by_host"][0]
    assert entry["can_claim_parity"] is False
    assert why in entry["why"]


def test_a_q8_cache_speaks_for_no_other(tmp_path):
    """Beside the f16 row of the same session it changes nothing, and every row and table says which is which."""
    matrix = matrix_of(tmp_path, ours(900.0, kv_type="q8"), ours(240.0), a_comparator(250.0))
    assert [row.get("kv_type") for row in matrix["rows"][:3]] == ["q8", "f16", None]
    (entry,) = matrix["decision"]["by_host"]
    assert entry["can_claim_parity"] is False
    assert "psigraph 240.00 tok/s" in entry["why"]
    tables = markdown(matrix)
    assert "(chained, q8 cache)" in tables
    assert "(chained, f16 cache)" in tables
    assert validate_matrix(matrix, tmp_path) == []
    matrix["rows"][0]["kv_type"] = "f16"
    assert any("kv_type: is 'f16', but 'q8'" in problem for problem in validate_matrix(matrix, tmp_path))


def test_the_fastest_comparator_and_the_worst_session_speak(tmp_path):
    matrix = matrix_of(
        tmp_path,
        ours(600.0),
        a_comparator(250.0),
        a_comparator(500.0, runtime="ollama"),
        ours(500.0, session="s2"),
        a_comparator(550.0, session="s2"),
    )
    assert matrix["decision"]["by_host"][0]["can_claim_parity"] is False
    assert "0.91 x" in matrix["decision"]["by_host"][0]["why"]


def test_reported_rows_are_carried_as_reported(tmp_path):
    rows = matrix_of(tmp_path)["rows"]
    rates = {row["mean_decode_tokens_per_second"] for row in rows if row["status"] == "reported"}
    assert rates == {239.19, 127.46, 78.57, 250.26, 369.49, 0.346}
    assert all(row["reason"] for row in rows)
    assert not any(row["status"] == "measured" for row in rows)


def edit_row(key, value):
    def edit(matrix, _):
        matrix["rows"][0][key] = value

    return edit


def edit_decision(matrix, _):
    matrix["decision"]["can_claim_parity"] = True


def edit_by_host(matrix, _):
    matrix["decision"]["by_host"][0]["can_claim_parity"] = False


def edit_reported(matrix, _):
    matrix["rows"][-1]["status"] = "measured"


def drop_reported(matrix, _):
    matrix["rows"].pop()


def drop_measured(matrix, _):
    matrix["rows"].pop(1)


def edit_artifact(matrix, _):
    matrix["artifact"]["sha256"] = SYNTH_SHA256


def edit_report(_, tmp_path):
    path = tmp_path / "report_0.json"
    path.write_text(path.read_text().replace('"driver": "580"', '"driver": "581"'))


def edit_rate_in_report(_, tmp_path):
    path = tmp_path / "report_1.json"
    path.write_text(path.read_text().replace("250.0", "25.0"))


def remove_report(_, tmp_path):
    (tmp_path / "report_1.json").unlink()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_row("mean_decode_tokens_per_second", 999.0), "mean_decode_tokens_per_second: is 999.0"),
        (edit_row("artifact_sha256", REAL_SHA256), "artifact_sha256"),
        (edit_row("synthetic", False), "synthetic"),
        (edit_row("report_ref", "../elsewhere.json"), "no report at"),
        (edit_row("report_sha256", "0" * 64), "has changed"),
        (edit_row("report_ref", None), "rows"),
        (edit_decision, "decision: does not follow"),
        (edit_by_host, "decision: does not follow"),
        (edit_reported, "status"),
        (drop_reported, "belong here"),
        (drop_measured, "rows"),
        (edit_artifact, "artifact: does not follow"),
        (edit_report, "has changed since"),
        (edit_rate_in_report, "has changed since"),
        (remove_report, "no report at"),
    ],
)
def test_tampering_shows(tmp_path, edit, message):
    matrix = copy.deepcopy(matrix_of(tmp_path, ours(), a_comparator()))
    edit(matrix, tmp_path)
    problems = validate_matrix(matrix, tmp_path)
    assert any(message in problem for problem in problems), problems


def test_markdown_block_and_chart(tmp_path):
    matrix = matrix_of(tmp_path, ours(), a_comparator(runtime="a|b <c>"))
    text = replace_block(f"before\n{BEGIN}\nold\n{END}\nafter\n", markdown(matrix))
    assert block_of(text) == markdown(matrix)
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "a\\|b" in text
    assert "a|b &lt;c&gt;" in svg(matrix)
    assert svg(matrix).count("<rect") == 1 + 8
    with pytest.raises(UsageError, match="markers"):
        replace_block("nothing", "x")
    assert block_of("nothing") is None


def test_every_row_says_which_file_it_is_about(tmp_path):
    other = a_report(sha256="6" * 64, artifact={"synthetic": False, "quant_mix": {}, "bytes_per_token": 1.0})
    text = markdown(matrix_of(tmp_path, ours(), other))
    files = [line.split("|")[3].strip() for line in text.splitlines() if line.startswith("| psigraph")]
    assert files == ["synthetic", "other, 66666666", "real artifact"]


def test_comparator_reports_are_checked():
    assert validate_comparator_report(a_comparator()) == []
    for edit, message in (
        ({"samples": [float("nan")] * 3}, "no rate"),
        ({"samples": []}, "samples"),
        ({"raw": []}, "raw"),
        ({"status": "not_run", "samples": [], "raw": []}, "says why"),
        ({"sha256": "x"}, "artifact_sha256"),
        ({"sha256": REAL_SHA256}, "synthetic"),
        ({"status": "maybe"}, "status"),
    ):
        assert any(message in problem for problem in validate_comparator_report(a_comparator(**edit))), edit


def test_command_writes_and_checks(tmp_path):
    folder = tmp_path / "fixtures" / "medpsy" / "benchmarks"
    folder.mkdir(parents=True)
    write_json_atomically(folder / "ours.json", ours())
    write_json_atomically(folder / "theirs.json", a_comparator())
    write_json_atomically(folder / "other.json", {"schema": "something else"})
    out, chart, doc = folder / "matrix.json", tmp_path / "chart.svg", tmp_path / "doc.md"
    doc.write_text(f"{BEGIN}\n{END}\n")
    arguments = ["--root", str(tmp_path), "--out", str(out)]
    result = CliRunner().invoke(command, [*arguments, "--svg", str(chart), "--into", str(doc)])
    assert result.exit_code == 0, result.output
    assert "2.40 x" in doc.read_text()
    assert chart.read_text().startswith("<svg")
    assert CliRunner().invoke(command, [*arguments, "--check"]).exit_code == 0
    matrix = read_json(out)
    matrix["decision"]["can_claim_parity"] = True
    out.write_text(json.dumps(matrix))
    result = CliRunner().invoke(command, [*arguments, "--check"])
    assert isinstance(result.exception, UsageError)


def test_a_broken_report_is_not_merged(tmp_path):
    report = ours()
    report["mean_total_ms"] = 1.0
    with pytest.raises(UsageError, match="mean_total_ms"):
        matrix_of(tmp_path, report)


def test_command_touches_nothing_unless_everything_can_be_written(tmp_path, monkeypatch, capsys):
    report = tmp_path / "ours.json"
    write_json_atomically(report, ours())
    doc = tmp_path / "doc.md"
    doc.write_text(f"{BEGIN}\n{END}\n")
    os.mkfifo(tmp_path / "pipe")
    before = {path.name: path.read_bytes() for path in (report, doc)}
    out = str(tmp_path / "matrix.json")
    for arguments, code, named in (
        (["--out", str(report)], 2, "is one of the REPORTS"),
        (["--out", out, "--svg", out], 2, "is given twice"),
        (["--out", out, "--svg", str(tmp_path / "pipe")], 10, "is no regular file"),
        (["--out", out, "--svg", str(tmp_path / "absent" / "x.svg")], 10, "there is no such folder"),
        (["--out", out, "--into", str(tmp_path / "absent.md")], 2, "absent.md: cannot be read: No such file"),
        (["--root", str(tmp_path), "--into", str(doc)], 2, "give --out, or --root with a checkout"),
    ):
        assert run(["matrix", str(report), *arguments]) == code, arguments
        assert named in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert run(["matrix", str(report), "--root", str(tmp_path), "--out", out, "--into", str(doc)]) == 0
    assert "**" not in capsys.readouterr().out
    assert "**" in doc.read_text()


def test_a_report_whose_name_no_matrix_can_hold(tmp_path):
    path = tmp_path / os.fsdecode(b"report-\xff.json")
    write_json_atomically(path, ours())
    with pytest.raises(UsageError, match="not UTF-8"):
        read_source(path, tmp_path)


def test_a_bare_matrix_writes_nothing(tmp_path, capsys):
    """The project's own matrix is committed: whoever looks at the tables must not find it changed."""
    fixture = tmp_path / MATRIX
    fixture.parent.mkdir(parents=True)
    fixture.write_text("mine")
    report = fixture.parent / "report.json"
    report.write_text(json.dumps(a_report(100.0)))
    for arguments in ([], [str(report)]):
        assert run(["matrix", *arguments, "--root", str(tmp_path)]) == 0
        shown = capsys.readouterr()
        assert "psigraph" in shown.out
        assert "nothing is written" in shown.err
        assert fixture.read_text() == "mine"
