"""The gate passes on this checkout and on a sound copy, and each check fails when what it holds is broken."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gate
import pytest
from bench_reports import a_comparator, a_report
from click.testing import CliRunner

from psigraph.cli import matrix as matrix_command
from psigraph.json_file import write_json_atomically

ROOT = Path(__file__).parents[3]
OURS = "fixtures/medpsy/benchmarks/gate/ours.json"
THEIRS = "fixtures/medpsy/benchmarks/gate/theirs.json"


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A checkout with one session of two reports and everything rendered from them."""
    root = tmp_path_factory.mktemp("gate") / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "*.gguf", "*.npz")
    for folder in ("ir", "passes", "codegen", "runtime", "models", "psigraph", "fixtures/medpsy"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignore)
    for name in ("pyproject.toml", *map(str, gate.DOCS)):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / OURS).parent.mkdir()
    write_json_atomically(root / OURS, a_report(600.0, tokens=512, session="s1", gpu="NVIDIA Gate"))
    write_json_atomically(root / THEIRS, a_comparator(250.0, gpu="NVIDIA Gate"))
    with (root / gate.DOCS[1]).open("a") as stream:
        stream.write(f"\nMeasured: [600.04 tok/s](../{OURS}).\n")
    arguments = ["--root", str(root), "--out", str(root / gate.MATRIX), "--into", str(root / gate.DOCS[0])]
    result = CliRunner().invoke(matrix_command.command, arguments)
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def checkout(sound, tmp_path, request):
    """A copy to break; without the source where the check does not read it."""
    needs_source = request.node.callspec.params["check"] == "no sidecar"
    rooms = () if needs_source else tuple(room for room in gate._ROOMS if room != "models")
    return shutil.copytree(sound, tmp_path / "checkout", ignore=shutil.ignore_patterns(*rooms))


def test_this_checkout_passes():
    assert {name: problems for name, problems in gate.run_checks(ROOT).items() if problems} == {}


def test_a_sound_checkout_passes(sound, capsys):
    assert gate.main([str(sound)]) == 0, capsys.readouterr().out
    assert "FAIL" not in capsys.readouterr().out


def swap(name, old, new):
    def edit(root):
        path = root / name
        text = path.read_text("utf-8")
        assert old in text, f"{name} holds no {old!r}"
        path.write_text(text.replace(old, new, 1), "utf-8")

    return edit


def append(name, text):
    def edit(root):
        with (root / name).open("a", encoding="utf-8") as stream:
            stream.write(text)

    return edit


def in_json(name, change):
    def edit(root):
        content = json.loads((root / name).read_text("utf-8"))
        change(content)
        (root / name).write_text(json.dumps(content), "utf-8")

    return edit


def remove(name):
    return lambda root: (root / name).unlink()


def put(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def our_row(key, value):
    def change(content):
        row = next(row for row in content["rows"] if row["report_ref"] == OURS)
        row[key] = value

    return change


def gate_host(content):
    entry = next(entry for entry in content["decision"]["by_host"] if entry["gpu"] == "NVIDIA Gate")
    entry["can_claim_parity"] = False


MATRIX = str(gate.MATRIX)
POLICY = str(gate.POLICY)
CASES = gate.CASES
REFUSE = f"{gate.GUARD_FIXTURES}/must_refuse.yaml"
ALLOW = f"{gate.GUARD_FIXTURES}/must_allow.yaml"
BENCH_DOC, PILOT_DOC = map(str, gate.DOCS)
DIGEST = "41ee947d9cce72ec657577219fd1798fabeabf0d832217fe23c9d6d3d18d5880"
OTHER = "51ee947d9cce72ec657577219fd1798fabeabf0d832217fe23c9d6d3d18d5880"


@pytest.mark.parametrize(
    ("check", "edit", "message"),
    [
        ("reports", in_json(OURS, put("mean_decode_tokens_per_second", value=999.0)), "is not the mean"),
        ("reports", in_json(OURS, put("artifact", "sha256", value="6" * 64)), "differs from artifact.sha256"),
        ("reports", in_json(OURS, put("artifact", "admitted", value=True)), "artifact.admitted"),
        ("reports", in_json(OURS, put("execution_engine", value="llama.cpp")), "does not belong to backend"),
        ("reports", in_json(THEIRS, put("samples", value=[])), "samples"),
        ("reports", append(OURS, "}"), "is not JSON"),
        ("matrix and decision", in_json(OURS, put("environment", "driver", value="1")), "has changed since"),
        ("matrix and decision", in_json(THEIRS, put("samples", 0, value=1.0)), "has changed since"),
        ("matrix and decision", in_json(MATRIX, put("decision", "can_claim_parity", value=True)), "decision"),
        ("matrix and decision", in_json(MATRIX, gate_host), "decision"),
        ("matrix and decision", in_json(MATRIX, our_row("artifact_sha256", DIGEST)), "artifact_sha256"),
        ("matrix and decision", in_json(MATRIX, our_row("mean_decode_tokens_per_second", 9.0)), "is 9.0"),
        ("matrix and decision", in_json(MATRIX, put("artifact", "sha256", value=OTHER)), "artifact"),
        ("matrix and decision", in_json(MATRIX, put("medical_policy", "policy_id", value="x")), "medical_policy"),
        ("matrix and decision", in_json(MATRIX, put("schema", value="x")), "schema"),
        ("matrix and decision", remove(THEIRS), "no report at"),
        ("matrix and decision", lambda root: shutil.copy(root / OURS, root / (OURS + ".json")), "no row speaks of"),
        ("matrix and decision", remove(MATRIX), "cannot be checked"),
        ("policy", swap(POLICY, DIGEST, OTHER), "artifact.sha256"),
        ("policy", swap(POLICY, "direct_diagnosis_allowed: false", "direct_diagnosis_allowed: true"), "diagnosis"),
        (
            "policy",
            swap(POLICY, "bits: [3], decision: blocked, override: needed", "bits: [3], decision: preferred"),
            "Q3",
        ),
        ("policy", swap(POLICY, "mean: 369.49", "mean: 300.0"), "reported.rows"),
        ("policy", swap(POLICY, "gpu: RTX 4080", "gpu: H200"), "claim.gpu"),
        ("policy", swap(POLICY, "Q5_K_M, Q4_K_M]", "Q5_K_M]"), "Q4_K_M of the 1.7b"),
        ("policy", remove(POLICY), "cannot be checked"),
        ("guard", append(REFUSE, "  - What is the capital of France?\n"), "is allowed, must be"),
        ("guard", append(ALLOW, "  - Do I have diabetes?\n"), "must be allowed"),
        ("guard", lambda root: (root / ALLOW).write_text("few:\n  - Hello\n"), "holds 1 prompts"),
        ("guard", swap(REFUSE, "prescribing:", "elsewhere:"), "no prompt of the region prescribing"),
        ("guard", swap(POLICY, "region: dosage_selection", "region: nowhere"), "cannot be checked"),
        ("documents", swap(PILOT_DOC, "[600.04 tok/s]", "[700.04 tok/s]"), "cites 700.04"),
        ("documents", append(PILOT_DOC, "We reach 1,234 tok/s.\n"), "cites no report"),
        ("documents", append(PILOT_DOC, "[1.0 tok/s](absent.json)\n"), "which is not there"),
        ("documents", in_json(OURS, put("kv_type", value="q8")), "of a q8 cache and does not say so"),
        ("documents", swap(BENCH_DOC, "| 239.19 |", "| 240.19 |"), "differ from the matrix"),
        ("documents", swap(BENCH_DOC, "<!-- psigraph matrix: begin -->", ""), "no block"),
        ("documents", lambda root: (root / "README.md").write_text(f"[1 tok/s]({OURS})"), "README.md: cites 1"),
        ("no sidecar", append("runtime/engine.py", "\nimport llama_cpp\n"), "imports llama_cpp"),
        ("no sidecar", append("runtime/engine.py", "\nfrom torch.cuda import graphs\n"), "imports torch.cuda"),
        ("no sidecar", append("runtime/engine.py", "\nSERVER = 'llama-server'\n"), "names llama-server"),
        (
            "no sidecar",
            append("psigraph/__init__.py", "\nfrom .medpsy.comparators import Job\n"),
            "imports psigraph.medpsy.comparators",
        ),
        (
            "no sidecar",
            append("psigraph/bench/report.py", "\nfrom ..medpsy import compare\n"),
            "imports psigraph.medpsy.compare",
        ),
        (
            "no sidecar",
            swap("pyproject.toml", '"click>=8.1.4"', '"click>=8.1.4", "llama-cpp-python"'),
            "pyproject.toml",
        ),
        ("no sidecar", lambda root: [shutil.rmtree(root / room) for room in gate._ROOMS], "no source file"),
    ],
)
def test_what_is_broken_fails(checkout, check, edit, message):
    edit(checkout)
    problems = gate.run_checks(checkout, [check])[check]
    assert any(message in problem for problem in problems), problems


def test_one_problem_fails_the_gate(tmp_path, capsys):
    shutil.copytree(ROOT / "models", tmp_path / "models")
    shutil.copytree(ROOT / CASES.parent, tmp_path / CASES.parent)
    assert gate.main([str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "FAIL matrix and decision" in output
    assert "ok   policy" in output


def test_the_script_runs_the_gate():
    script = ROOT / "scripts" / "release" / "check-psionic-medpsy-pilot.sh"
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONSAFEPATH": ""}
    done = subprocess.run([script, "--no-tests"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all checks passed" in done.stdout


def test_importing_the_decode_path_loads_no_comparator():
    code = (
        "import sys, psigraph.bench.report, psigraph.medpsy.policy, psigraph.medpsy.guard\n"
        "driving = ('psigraph.medpsy.comparators', 'psigraph.medpsy.compare', 'llama_cpp')\n"
        "sys.exit(any(name in sys.modules for name in driving))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
