"""Sessions with stand-in tools: executables of a few lines, and an HTTP server on this machine."""

import hashlib
import http.server
import json
import os
import stat
import sys
import threading

import pytest
from bench_reports import REAL_SHA256, a_report
from click.testing import CliRunner
from tiny_model import Q4

from psigraph.bench.gpu_state import GpuState, gpu_state
from psigraph.bench.report import validate_report
from psigraph.cli import compare as compare_command
from psigraph.cli import run
from psigraph.cli.comparison_table import comparison
from psigraph.ir.errors import OutputError, PolicyRefusal, PsigraphError, UsageError
from psigraph.json_file import read_json
from psigraph.medpsy.comparator_report import validate_comparator_report
from psigraph.medpsy.comparators import Job, LlamaBench, LlamaCppPython, LlamaServer, NotRun, Ollama
from psigraph.medpsy.compare import Session, cannot_settle, run_session, settle
from psigraph.medpsy.matrix import validate_matrix
from psigraph.medpsy.policy import load_policy

TOKENS = 16
IDLE = GpuState("NVIDIA H200", "580", True)
CARDS = [{"bus_id": f"0000:{number}8:00.0", "uuid": f"GPU-{number}"} for number in range(2)]
BENCH = """
import json, sys
row = {"n_prompt": 0, "n_gen": int(sys.argv[sys.argv.index("-n") + 1]), "n_depth": 0, "backends": "CUDA",
       "build_number": 11434, "build_commit": "abc", "samples_ts": [100.0, 250.0]}
print("noise")
print(json.dumps(row | EXTRA))
"""


def executable(path, body):
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def llama_bench(tmp_path, **extra):
    return LlamaBench(executable(tmp_path / "llama-bench", BENCH.replace("EXTRA", repr(extra))))


@pytest.fixture
def job(tmp_path):
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF and so on")
    return Job(model, hashlib.sha256(b"GGUF and so on").hexdigest(), (151644,), "<|im_start|>", TOKENS, timeout_s=20)


def bench_of(job, rate=600.0):
    def bench(_path, _ids, tokens, backend):
        return a_report(rate, repeats=1, sha256=job.sha256, tokens=tokens, backend=backend)

    return bench


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers every path with the object that the test put into `server.answers`."""

    def do_GET(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.server.asked.append((self.path, json.loads(self.rfile.read(length) or b"null")))
        answer = self.server.answers.get(self.path)
        self.send_response(200 if answer is not None else 404)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_POST = do_GET

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.answers, server.asked = {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


def ollama_answers(digest, **generated):
    return {
        "/api/version": {"version": "0.17.5"},
        "/api/show": {"modelfile": f"# made by ollama\nFROM /blobs/sha256-{digest}\nTEMPLATE x"},
        "/api/generate": {"eval_count": TOKENS, "eval_duration": 40_000_000, "prompt_eval_count": 1} | generated,
    }


def test_a_session_is_interleaved_and_its_reports_are_sound(tmp_path, job, server):
    server.answers = ollama_answers(job.sha256)
    lines = []
    session = run_session(
        job,
        [llama_bench(tmp_path), Ollama(server.url, "medpsy"), LlamaBench(str(tmp_path / "absent"))],
        bench_of(job),
        IDLE,
        say=lines.append,
    )
    assert validate_report(session.ours) == []
    assert [validate_comparator_report(report) for report in session.theirs] == [[], [], []]
    assert [report["status"] for report in session.theirs] == ["measured", "measured", "not_run"]
    assert session.theirs[0]["samples"] == [250.0] * 3
    assert session.theirs[1]["samples"] == [400.0] * 3
    assert "no such executable" in session.theirs[2]["reason"]
    assert {session.ours["session"], *(report["session"] for report in session.theirs)} == {session.name}
    order = [line.split(":")[0].split(" ", 2)[2] for line in lines if line.startswith("turn")]
    assert order == ["psigraph", "llama.cpp llama-bench", "ollama"] * 3
    assert dict(server.asked)["/api/generate"]["raw"] is True


@pytest.mark.parametrize(
    ("extra", "status", "reason"),
    [
        ({"backends": "CPU"}, "refused", "without CUDA"),
        ({"n_gen": 1}, "failed", "no row of 16"),
        ({"n_depth": 4096}, "refused", "depth"),
        ({"samples_ts": [1.0]}, "failed", "no row"),
        ({"samples_ts": [1.0, 0.0]}, "failed", "no rate"),
    ],
)
def test_llama_bench_rows_that_do_not_count(tmp_path, job, extra, status, reason):
    session = run_session(job, [llama_bench(tmp_path, **extra)], bench_of(job), IDLE)
    assert session.theirs[0]["status"] == status
    assert reason in session.theirs[0]["reason"]
    assert session.theirs[0]["samples"] == []


def test_a_tool_that_fails_says_its_last_line(tmp_path, job):
    body = "import sys\nprint('first', file=sys.stderr)\nprint('cannot load', file=sys.stderr)\nsys.exit(3)"
    session = run_session(job, [LlamaBench(executable(tmp_path / "bad", body))], bench_of(job), IDLE)
    assert session.theirs[0]["reason"] == "bad: exit code 3: cannot load"


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"/api/show": {"modelfile": "FROM /blobs/sha256-" + "0" * 64}}, "not this file"),
        ({"/api/show": {"modelfile": "FROM llama3"}}, "no digest"),
        ({"/api/generate": {"eval_count": 3, "eval_duration": 1}}, "stopped after 3 of 16"),
        ({"/api/generate": {"eval_count": TOKENS, "eval_duration": 1, "prompt_eval_count": 9}}, "9 prompt tokens"),
        ({"/api/generate": {"eval_count": TOKENS}}, "eval_duration"),
        ({"/api/version": None}, "404|Not Found"),
    ],
)
def test_ollama_that_does_other_work_is_refused(job, server, answers, reason):
    server.answers = ollama_answers(job.sha256) | answers
    session = run_session(job, [Ollama(server.url, "medpsy")], bench_of(job), IDLE)
    assert session.theirs[0]["status"] != "measured"
    assert any(part in session.theirs[0]["reason"] for part in reason.split("|"))


def test_llama_server_at_a_url_must_serve_this_very_file(tmp_path, job, server):
    timings = {"predicted_n": TOKENS, "predicted_per_second": 300.0, "predicted_ms": 53.0}
    server.answers = {"/props": {"model_path": str(job.model)}, "/completion": {"timings": timings}}
    report = run_session(job, [LlamaServer(server.url)], bench_of(job), IDLE).theirs[0]
    assert (report["status"], report["samples"]) == ("measured", [300.0] * 3)
    asked = dict(server.asked)["/completion"]
    assert (asked["prompt"], asked["ignore_eos"], asked["cache_prompt"]) == ([151644], True, False)
    (tmp_path / "other.gguf").write_bytes(b"other")
    server.answers["/props"] = {"model_path": str(tmp_path / "other.gguf")}
    report = run_session(job, [LlamaServer(server.url)], bench_of(job), IDLE).theirs[0]
    assert report["status"] == "refused"
    server.answers = {
        "/props": {"model_path": str(job.model)},
        "/completion": {"timings": timings | {"predicted_n": 2}},
    }
    assert "instead of 16" in run_session(job, [LlamaServer(server.url)], bench_of(job), IDLE).theirs[0]["reason"]


SERVER = """
import http.server, json, sys
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        timings = {"predicted_n": 16, "predicted_per_second": 300.0}
        self.wfile.write(json.dumps({"timings": timings, "build_info": "b1"}).encode())
    do_POST = do_GET
    def log_message(self, *_): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Answers).serve_forever()
"""


def test_llama_server_is_started_and_stopped(tmp_path, job):
    tool = LlamaServer(executable(tmp_path / "llama-server", SERVER))
    report = run_session(job, [tool], bench_of(job), IDLE).theirs[0]
    assert (report["status"], report["version"]) == ("measured", "b1")
    assert tool._process is None
    with pytest.raises(NotRun, match="exit code 1"):
        LlamaServer(executable(tmp_path / "dies", "raise SystemExit(1)")).prepare(job)


LIBRARY = """
__version__ = "0.3.99"
def llama_supports_gpu_offload(): return GPU
class Llama:
    def __init__(self, **options): assert options["n_gpu_layers"] == -1
    def reset(self): pass
    def generate(self, tokens, **options):
        while True: yield 1
"""


@pytest.mark.parametrize(("gpu", "status"), [("True", "measured"), ("False", "refused")])
def test_llama_cpp_python_runs_in_a_process_of_its_own(tmp_path, monkeypatch, job, gpu, status):
    (tmp_path / "llama_cpp.py").write_text(LIBRARY.replace("GPU", gpu))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = run_session(job, [LlamaCppPython()], bench_of(job), IDLE, repeats=1).theirs[0]
    assert (report["status"], report["version"]) == (status, "0.3.99")
    assert "llama_cpp" not in sys.modules


def test_llama_cpp_python_that_is_absent_says_how_to_install_it(job, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    report = run_session(job, [LlamaCppPython()], bench_of(job), IDLE, repeats=1).theirs[0]
    assert report["status"] == "not_run"
    assert "GGML_CUDA=on" in report["reason"]


def test_our_report_must_be_of_the_work_asked_for(job):
    def other_file(_path, _ids, tokens, backend):
        return a_report(repeats=1, sha256="7" * 64, tokens=tokens, backend=backend)

    def fewer_tokens(_path, _ids, tokens, backend):
        return a_report(repeats=1, sha256=job.sha256, tokens=tokens - 1, backend=backend)

    def other_cache(_path, _ids, tokens, backend):
        return a_report(repeats=1, sha256=job.sha256, tokens=tokens, backend=backend, kv_type="q8")

    for bench, message in (
        (other_file, "another file"),
        (fewer_tokens, "max_new_tokens"),
        (other_cache, "kv_type is q8, comparisons are of f16 caches"),
    ):
        with pytest.raises(UsageError, match=message):
            run_session(job, [], bench, IDLE)


def test_what_settles_the_claim():
    policy = load_policy()
    rtx = GpuState("NVIDIA GeForce RTX 4080", "580", True)
    assert cannot_settle(REAL_SHA256, rtx, policy) == ""
    assert "real artifact" in cannot_settle("0" * 64, rtx, policy)
    assert "claim speaks of" in cannot_settle(REAL_SHA256, IDLE, policy)
    assert "not idle" in cannot_settle(REAL_SHA256, GpuState(rtx.gpu, "580", False, ("7 game 900",)), policy)
    ours = a_report(sha256=REAL_SHA256, gpu=rtx.gpu)
    assert settle({}, Session("s", ours, ({"status": "not_run"},)), policy) == (
        False,
        "not settled: no other engine was measured",
    )
    entry = {"gpu": rtx.gpu, "share_of_fastest_comparator": 0.9}
    decision = {"can_claim_parity": False, "why": "slower", "by_host": [entry]}
    assert settle(decision, Session("s", ours, ({"status": "measured"},)), policy) == (
        True,
        "settled: no parity; slower",
    )
    unlike = {"can_claim_parity": False, "why": "too few", "by_host": [entry | {"share_of_fastest_comparator": None}]}
    assert settle(unlike, Session("s", ours, ({"status": "measured"},)), policy) == (False, "not settled: too few")


SMI = """
import sys
assert sys.argv[1] in ("--id=0", "--id=0000:18:00.0")
print("NVIDIA H200, 580.1" if "name" in sys.argv[2].split("=")[1].split(",") else APPS)
"""


def test_gpu_state_reads_nvidia_smi(tmp_path):
    busy = executable(tmp_path / "busy", SMI.replace("APPS", "'77, game, 900'"))
    assert gpu_state(nvidia_smi=busy) == GpuState("NVIDIA H200", "580.1", False, ("77 game 900",))
    assert gpu_state("0000:18:00.0", nvidia_smi=busy, own=frozenset({77})).idle
    assert gpu_state(nvidia_smi=executable(tmp_path / "idle", SMI.replace("APPS", "''"))).idle
    assert gpu_state(nvidia_smi=str(tmp_path / "absent")) == GpuState()
    assert gpu_state(nvidia_smi=executable(tmp_path / "broken", "raise SystemExit(9)")) == GpuState()


@pytest.fixture
def prepared(tmp_path, job, monkeypatch):
    llama_bench(tmp_path)
    monkeypatch.setattr(compare_command, "gpu_state", lambda _card: IDLE)
    monkeypatch.setattr(compare_command, "ask_driver", lambda: {"devices": CARDS, "error": None})
    monkeypatch.setattr(compare_command, "check_header", lambda *_: None)  # the file is none
    monkeypatch.setattr(compare_command, "first_token", lambda _: 151644)
    bench = bench_of(job)
    monkeypatch.setattr(compare_command, "bench_in_a_process", lambda *arguments: bench(*arguments[:4]))
    return ["--model", str(job.model), "--max-new-tokens", "512", "--out-dir", str(tmp_path / "out")]


def test_command_writes_reports_and_a_matrix(tmp_path, prepared):
    result = CliRunner().invoke(compare_command.command, [*prepared, "--llama-bench", str(tmp_path / "llama-bench")])
    assert result.exit_code == 0, result.output
    assert "psigraph is 2.40 times as fast as llama.cpp llama-bench 11434" in result.output
    for foreign in ("settled", "RTX", "Parity", "41ee947d"):  # rows and claims of another file
        assert foreign not in result.output
    matrix = read_json(tmp_path / "out" / "matrix.json")
    assert validate_matrix(matrix, tmp_path / "out") == []
    assert matrix["decision"]["by_host"][0]["can_claim_parity"] is True
    assert matrix["decision"]["can_claim_parity"] is False


def test_a_comparison_gives_a_ratio_for_each_engine_that_ran(job, tmp_path):
    tools = [llama_bench(tmp_path), LlamaBench(str(tmp_path / "absent"))]
    session = run_session(job, tools, bench_of(job, 100.0), IDLE)
    shown = comparison(session.ours, session.theirs)
    lines = [line.split() for line in shown.splitlines()]
    assert ["psigraph", "100.00", "3"] in lines
    assert any(line[-2:] == ["0.40", "x"] and "250.00" in line for line in lines)
    assert "not_run: " in shown
    assert shown.endswith("psigraph is 0.40 times as fast as llama.cpp llama-bench 11434 abc")
    assert comparison(session.ours, session.theirs[1:]).endswith("no other engine was measured, so there is no ratio")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([], UsageError, "nothing to compare"),
        (["--ollama", "http://127.0.0.1:1"], UsageError, "give both"),
        (["--llama-bench", "x", "--settle"], UsageError, "not the real artifact"),
        (["--llama-bench", "x", "--expect-sha256", "0" * 64], PolicyRefusal, "digest is"),
        (["--llama-bench", "x", "--backend", "cpu", "--device", "1"], UsageError, "uses no GPU"),
        (["--llama-bench", "x", "--out-dir", "absent/new"], OutputError, "absent: there is no such folder"),
        (["--ollama", "u", "--ollama-model", "m", "--prompt-token-ids", "1,2"], UsageError, "--prompt-text"),
    ],
)
def test_command_refuses_before_it_measures(prepared, arguments, error, message):
    result = CliRunner().invoke(compare_command.command, [*prepared, *arguments])
    assert isinstance(result.exception, error)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--prompt-token-ids", "a"], 2, "separated by commas"),
        (["--prompt-token-ids", "4096"], 2, "--prompt-token-ids: token id 4096"),
        (["--prompt-token-ids", "0", "--max-new-tokens", "4096"], 2, "context has 2048"),
        (["--prompt-token-ids", "0", "--timeout", "nan"], 2, "--timeout"),
        (["--prompt-token-ids", "0", "--timeout", "0"], 2, "--timeout"),
        (["--prompt-token-ids", "0", "--backend", "cuda"], 7, "--device 0: no NVIDIA driver"),
        (["--model", "absent.gguf"], 3, "no such file"),
        (["--model", "."], 3, "not a regular file"),
    ],
)
def test_command_refuses_before_it_hashes(tmp_path, monkeypatch, capsys, arguments, code, named):
    monkeypatch.setattr(compare_command, "ask_driver", lambda: {"devices": [], "error": "no NVIDIA driver"})
    monkeypatch.setattr(compare_command, "_sha256", lambda _: pytest.fail("the file was hashed"))
    given = ["compare", "--model", str(Q4), "--llama-bench", "x", "--out-dir", str(tmp_path / "out")]
    assert run([*given, *arguments]) == code
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_command_refuses_a_busy_gpu(prepared, monkeypatch):
    monkeypatch.setattr(compare_command, "gpu_state", lambda _card: GpuState("G", "1", False, ("77 game 900",)))
    result = CliRunner().invoke(compare_command.command, [*prepared, "--llama-bench", "x"])
    assert "77 game 900" in str(result.exception)


def test_the_card_is_found_by_its_address_and_passed_on(tmp_path, job, prepared, monkeypatch):
    """nvidia-smi and the driver number cards in different orders; every tool gets the one that was asked about."""
    asked, seen = [], []
    monkeypatch.setattr(compare_command, "gpu_state", lambda card: asked.append(card) or IDLE)
    ours = bench_of(job)

    def bench(*arguments):
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        return ours(*arguments[:4])

    monkeypatch.setattr(compare_command, "bench_in_a_process", bench)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    tell = f"import os\nopen({str(tmp_path / 'theirs')!r}, 'a').write(os.environ['CUDA_VISIBLE_DEVICES'] + ' ')\n"
    tool = executable(tmp_path / "telling", tell + BENCH.replace("EXTRA", "{}"))
    result = CliRunner().invoke(compare_command.command, [*prepared, "--llama-bench", tool, "--device", "1"])
    assert result.exit_code == 0, result.output
    assert asked == ["0000:18:00.0"]
    assert set(seen) == {"GPU-1"} == set((tmp_path / "theirs").read_text().split())
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,1"
    result = CliRunner().invoke(compare_command.command, [*prepared, "--llama-bench", tool, "--device", "2"])
    assert "has 2 GPU(s), numbered from 0" in str(result.exception)


def test_ours_runs_as_a_process(job, monkeypatch):
    monkeypatch.setattr(compare_command.sys, "executable", "/bin/false")
    with pytest.raises(PsigraphError, match="exit code 1"):
        compare_command.bench_in_a_process(str(job.model), [1], 2, "cpu")
