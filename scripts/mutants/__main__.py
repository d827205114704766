"""Are there tests that fail when the code is wrong? `make mutants` makes the mistakes of mutants.toml, one at a time.

    python scripts/mutants [WORD ...]      only those whose file or description holds every word

Each is made in a temporary copy of the tree, where only the tests named beside it run. Exit status 1 if one survives,
if a mistake's old text is not found exactly once, or if the tests fail without any mistake.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("ir", "passes", "codegen", "runtime", "models")  # installed as parts of psigraph
MOST_SECONDS = 600
PASSED, FAILED = 0, 1  # of pytest; anything else is no verdict


def copy_tree(to: Path) -> None:
    """All files that git knows or would add, and a folder `site` whose `psigraph` is this copy."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    package = to / "site" / "psigraph"
    package.mkdir(parents=True)
    for entry in [*(to / "psigraph").iterdir(), *(to / room for room in ROOMS)]:
        (package / entry.name).symlink_to(entry)


def run_tests(tree: Path, tests: list[str]) -> tuple[int | None, str]:
    """(exit status of pytest, its first failure or last line); no status for tests that do not end."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree / "site"),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # a mistake of the same length in the same second would not be seen
    }
    try:
        done = subprocess.run(
            [*command, "-m", "not gpu and not slow", *tests],
            cwd=tree, env=environment, check=False, capture_output=True, text=True, timeout=MOST_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"no end within {MOST_SECONDS} s"
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode, found[1] if found else lines[-1] if lines else "no output"


def verdict(tree: Path, mutant: dict[str, str | list[str]]) -> tuple[bool, str]:
    """(whether the tests noticed, the test that did or what went wrong)."""
    file = tree / str(mutant["file"])
    text = file.read_text() if file.is_file() else ""
    count = text.count(str(mutant["old"]))
    if count != 1:
        return False, f"the old text stands {count} times in {mutant['file']}"
    file.write_text(text.replace(str(mutant["old"]), str(mutant["new"])))
    try:
        status, told = run_tests(tree, list(mutant["tests"]))
    finally:
        file.write_text(text)
    if status == PASSED:
        return False, "SURVIVED: " + ", ".join(mutant["tests"])
    return status == FAILED, told


def main() -> int:
    mutants = tomllib.loads((Path(__file__).parent / "mutants.toml").read_text())["mutant"]
    chosen = [mutant for mutant in mutants if all(word in mutant["what"] + mutant["file"] for word in sys.argv[1:])]
    if not chosen:
        print(f"no mistake with the words {' '.join(sys.argv[1:])}")
        return 1
    with tempfile.TemporaryDirectory(prefix="psigraph-mutants-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        status, told = run_tests(tree, sorted({test for mutant in chosen for test in mutant["tests"]}))
        if status != PASSED:
            print(f"without any mistake the tests do not pass: {told}")
            return 1
        missed = 0
        for mutant in chosen:
            started = time.perf_counter()
            caught, told = verdict(tree, mutant)
            missed += not caught
            seconds = time.perf_counter() - started
            print(
                f"{'caught' if caught else 'MISSED':7}{seconds:5.0f} s  {mutant['file']}: {mutant['what']}", flush=True
            )
            print(f"{'':16}{told}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mistakes were noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
