"""Reports agree with themselves, and a figure edited by hand shows."""

import copy
import json
import os
import stat
from pathlib import Path

import pytest
from bench_reports import REAL_SHA256, a_report

from psigraph.bench.report import (
    check_writable,
    json_text,
    kv_type_of,
    merge_reports,
    read_json,
    validate_report,
    write_json_atomically,
)
from psigraph.ir.errors import OutputError, UsageError
from psigraph.json_file import check_new_folder


@pytest.mark.parametrize("backend", ["cuda", "cpu", "host"])
def test_a_built_report_is_valid_and_survives_its_file(tmp_path, backend):
    report = a_report(backend=backend)
    assert validate_report(report) == []
    path = tmp_path / "report.json"
    write_json_atomically(path, report)
    assert read_json(path) == report
    assert validate_report(read_json(path)) == []
    assert report["execution_engine"] == f"psionic_qwen3_{backend}"
    assert os.listdir(path.parent) == ["report.json"]


def test_rate_is_tokens_over_the_time_of_generation_alone():
    report = a_report(
        tokens=4,
        runs=[{"generated_tokens": [1, 2, 3, 4], "total_ms": 100.0, "decode_ms": 8.0, "stopped_on_eos": False}],
    )
    assert report["mean_decode_tokens_per_second"] == 500.0
    assert report["mean_total_ms"] == 100.0
    assert report["roofline"]["share_of_read_bandwidth"] == pytest.approx(500 * 1.1e9 / 4.2e12)


def test_the_real_artifact_is_admitted_and_a_synthetic_file_never():
    assert a_report(sha256=REAL_SHA256)["artifact"]["admitted"] is True
    assert a_report()["artifact"]["admitted"] is False


def put(path, value):
    def edit(report):
        target = report
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return edit


def drop(key):
    return lambda report: report.pop(key)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put(["mean_decode_tokens_per_second"], 999.0), "mean_decode_tokens_per_second: is not the mean"),
        (put(["mean_total_ms"], 1.0), "mean_total_ms: is not the mean"),
        (put(["best_decode_tokens_per_second"], 9e9), "best_decode_tokens_per_second"),
        (put(["runs", 1, "decode_tokens_per_second"], 999.0), "runs[1].decode_tokens_per_second"),
        (put(["runs", 1, "decode_ms"], 1e9), "runs[1].decode_ms"),
        (put(["runs", 1, "output_tokens"], 9), "runs[1].output_tokens"),
        (put(["runs", 1, "generated_tokens"], [1, 2, -3]), "no token id"),
        (put(["runs", 2, "model_artifact_sha256"], "6" * 64), "runs[2].model_artifact_sha256"),
        (put(["runs", 2, "execution_engine"], "llama.cpp"), "runs[2].execution_engine"),
        (put(["runs", 0, "run_index"], 4), "runs[0].run_index"),
        (put(["max_new_tokens"], 9), "no end token stopped"),
        (put(["repeats"], 4), "repeats"),
        (put(["repeats"], True), "repeats: has the wrong type"),
        (put(["runs"], []), "runs: holds none"),
        (put(["runs_identical"], False), "runs_identical"),
        (put(["artifact", "sha256"], "6" * 64), "model_artifact_sha256"),
        (put(["artifact", "sha256"], "xyz"), "is no SHA-256"),
        (put(["artifact", "admitted"], True), "artifact.admitted"),
        (put(["artifact", "tier"], "Q8_0"), "admission.tier"),
        (put(["admission", "warnings"], []), "receipt warning"),
        (put(["backend"], "cpu"), "execution_engine"),
        (put(["environment", "stand_in_driver"], True), "stand-in"),
        (put(["environment", "gpu"], ""), "names its GPU"),
        (put(["environment", "gpu_idle"], None), "idle"),
        (put(["medical_policy", "direct_diagnosis_allowed"], True), "medical_policy"),
        (put(["roofline", "share_of_read_bandwidth"], 0.99), "share_of_read_bandwidth"),
        (put(["roofline", "valid"], False), "roofline.valid"),
        (put(["decode_row"], "warm"), "is none of chained, forced, text"),
        (put(["kv_type"], "q4"), "kv_type: q4 is none of"),
        (put(["environment", "kv_type"], "q8"), "kv_type: is f16, but the environment says q8"),
        (put(["environment", "arithmetic"], "float32 sums, q8 cache"), "kv_type: is f16, but the environment says q8"),
        (put(["schema"], "psionic.medpsy.bench.v0"), "schema"),
        (put(["kernels"], [{"name": "x"}]), "kernels[0].us"),
        (put(["runs", 0], []), "runs[0]: is no object"),
        (drop("runs"), "runs: is missing"),
        (drop("roofline"), "roofline: is missing"),
        (drop("admission"), "admission: is missing"),
    ],
)
def test_tampering_shows(edit, message):
    report = copy.deepcopy(a_report())
    edit(report)
    assert any(message in problem for problem in validate_report(report)), validate_report(report)


def test_the_type_of_the_cache_is_part_of_the_work():
    """A report that is older than the choice is one of an f16 cache."""
    half, eight, older = a_report(), a_report(kv_type="q8"), a_report()
    del older["kv_type"]
    assert (half["kv_type"], eight["kv_type"]) == ("f16", "q8")
    assert [kv_type_of(report) for report in (half, eight, older)] == ["f16", "q8", "f16"]
    assert [validate_report(report) for report in (half, eight, older)] == [[], [], []]
    assert merge_reports([older, half])["kv_type"] == "f16"
    assert merge_reports([eight, eight])["kv_type"] == "q8"
    with pytest.raises(UsageError, match="kv_type: reports of unlike work cannot be merged"):
        merge_reports([half, eight])


def test_a_slow_probe_voids_the_roofline():
    report = a_report(gpu="NVIDIA H100 80GB HBM3", roofline={"read_bandwidth_gb_s": 2900.0, "bytes_per_token": 1e9})
    assert report["roofline"]["valid"] is False
    assert validate_report(report) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"environment": {"stand_in_driver": True}}, "stand-in"),
        ({"backend": "rocm"}, "use one of"),
        ({"runs": []}, "at least one"),
        ({"runs": [{"generated_tokens": [], "total_ms": 1.0, "stopped_on_eos": False}]}, r"runs\[0\]"),
        ({"decode_row": "x"}, "decode_row"),
        ({"kv_type": "q4"}, "kv_type 'q4'"),
        ({"environment": {"gpu": "NVIDIA H200", "gpu_idle": True, "kv_type": "q8"}}, "kv_type 'f16'"),
    ],
)
def test_what_cannot_be_reported(options, message):
    with pytest.raises(UsageError, match=message):
        a_report(**options)


def test_interleaved_turns_merge_into_one_report():
    merged = merge_reports([a_report(rate, repeats=1) for rate in (500.0, 510.0, 490.0)], session="s1")
    assert validate_report(merged) == []
    assert (merged["repeats"], merged["session"]) == (3, "s1")
    assert merged["mean_decode_tokens_per_second"] == pytest.approx(500.0)
    with pytest.raises(UsageError, match="max_new_tokens"):
        merge_reports([a_report(), a_report(max_new_tokens=9)])
    with pytest.raises(UsageError, match=r"artifact\.sha256"):
        merge_reports([a_report(), a_report(sha256=REAL_SHA256)])
    assert merge_reports([a_report(), a_report(idle=False)])["environment"]["gpu_idle"] is False


def test_number_lists_stay_on_one_line_and_the_text_is_the_same_json():
    obj = {"ids": [1, 2, -3], "text": "[\n 1, 2\n]", "rates": [1.5, 2e-9], "rows": [{"a": 1}], "none": []}
    assert json.loads(json_text(obj)) == obj
    assert '"ids": [1, 2, -3]' in json_text(obj)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "report.json"
    write_json_atomically(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json_atomically(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["report.json"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400


def test_unwritable_places_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    (tmp_path / "model.gguf").write_bytes(b"GGUF and so on")
    (tmp_path / "to_model").symlink_to("model.gguf")
    before = sorted(os.listdir(tmp_path))
    for path in ("file/report.json", ".", "absent/report.json", "loop", "pipe", "to_pipe", "model.gguf", "to_model"):
        with pytest.raises(OutputError, match=str(tmp_path)):
            write_json_atomically(tmp_path / path, {})
        with pytest.raises(OutputError):
            check_writable(tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == before
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUF and so on"
    with pytest.raises(OutputError, match="absent: there is no such folder"):
        check_writable(tmp_path / "absent" / "report.json")


def test_a_folder_for_reports_may_be_missing_but_not_its_parent(tmp_path):
    (tmp_path / "file").write_text("x")
    check_new_folder(tmp_path)
    check_new_folder(tmp_path / "new")
    for path in ("file", "new/er", "file/new"):
        with pytest.raises(OutputError, match=path.split("/")[0]):
            check_new_folder(tmp_path / path)
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    for target in ("there/old.json", "there/new.json"):
        (tmp_path / "there" / "old.json").write_text("{}")
        link = tmp_path / Path(target).name
        link.symlink_to(target)
        write_json_atomically(link, {"a": 1})
        assert link.is_symlink()
        assert read_json(tmp_path / target) == {"a": 1}


def test_names_that_are_not_utf_8_are_spelled_out(tmp_path):
    path = tmp_path / os.fsdecode(b"report-\xff.json")
    write_json_atomically(path, {"model": "m\udcff.gguf", "other": "\ud800"})
    assert read_json(path) == {"model": "m\\xff.gguf", "other": "\\ud800"}


def test_what_is_no_report_file(tmp_path):
    for text in ("{", "[]", ""):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UsageError, match=r"x\.json"):
            read_json(tmp_path / "x.json")
    with pytest.raises(UsageError, match="cannot be read"):
        read_json(tmp_path / "absent.json")
