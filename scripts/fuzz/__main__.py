"""Feeds wrong model files to psigraph: `make fuzz` takes minutes, tests/scripts/test_fuzz.py a fixed hundred of them.

    python scripts/fuzz [--seconds N] [--cases N] [--seed TEXT] [--first NUMBER]

A case is a sound file of one layer with one to four mistakes, drawn from seed and number alone, so that
`--seed TEXT --first NUMBER --cases 1` makes it again. It goes through header, tokenizer, admission, template, binding,
passes and, in numpy, generation, in a process of its own. Exit status 1 if anything but a sound result or one short
line comes out: a traceback, a panic, a hang, a message of over 500 letters or of several lines, more than a second or
64 MB + 5x the metadata for header and tokenizer, tokens from logits that are not finite.

Each kind of problem is shown once, and its first file is kept in .make/fuzz.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests" / "support")]

import stages  # noqa: E402 - beside this file
from document import STRING, U32, Document, Pair, parse  # noqa: E402
from mutations import mutated  # noqa: E402
from nano import write_nano  # noqa: E402 - among the helpers of tests

KEPT = ROOT / ".make" / "fuzz"

Judgement = Callable[[Path, Random, int], dict[str, Any]]


def sound(folder: Path) -> Document:
    """The file that every case begins with."""
    document = parse(write_nano(folder).read_bytes())
    merges = document.pair(b"tokenizer.ggml.merges")
    tokens, kinds = document.pair(b"tokenizer.ggml.tokens"), document.pair(b"tokenizer.ggml.token_type")
    assert merges is not None
    assert tokens is not None
    assert kinds is not None
    merges.of, merges.value = STRING, [b"a b", "Ġ a".encode(), b"ab c", "Ã ©".encode()]
    unused = [index for index, kind in enumerate(kinds.value) if index > 255 and kind != 3]
    for index, merge in zip(unused, merges.value, strict=False):
        tokens.value[index], kinds.value[index] = merge.replace(b" ", b""), 1
    document.pairs.append(Pair(b"tokenizer.ggml.eot_token_id", U32, 257))
    return document


def in_a_process(act: Callable[[], dict[str, Any]], seconds: float = stages.HANG_SECONDS) -> dict[str, Any]:
    """What `act` gives in a fork of its own; where it does not end, or ends the process, that is the problem."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # panics are noticed; their text is not for the terminal
            with os.fdopen(writer, "w") as pipe:
                json.dump(act(), pipe)
        finally:
            os._exit(0)
    os.close(writer)
    deadline, parts = time.monotonic() + seconds, []
    while True:
        ready = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]
        part = os.read(reader, 1 << 16) if ready else b""
        if not part:
            break
        parts.append(part)
    os.close(reader)
    if not ready:
        os.killpg(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not ready:
        return {"problems": [("all", "hang", f"over {seconds:.0f} s")], "refused": []}
    if not parts:
        return {"problems": [("all", f"the process died, wait status {status}", "")], "refused": []}
    answer: dict[str, Any] = json.loads(b"".join(parts))
    return answer


def case(seed: str, number: int, base: Document) -> tuple[bytes, int]:
    """A case's bytes, and how many of them are header."""
    document = copy.deepcopy(base)
    content = mutated(document, Random(f"{seed} {number}"))
    return content, min(len(content), len(content) - len(document.data))


def fuzz(
    seed: str, first: int, cases: int, seconds: float, judgement: Judgement = stages.judge
) -> tuple[Counter[str], dict[tuple[str, str], list[Any]]]:
    """Outcomes by count, and problems: (stage, what) -> [count, first case, details, its bytes]."""
    outcomes: Counter[str] = Counter()
    problems: dict[tuple[str, str], list[Any]] = {}
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="psigraph-fuzz-") as folder:
        base, path = sound(Path(folder)), Path(folder) / "case.gguf"
        for number in range(first, first + cases):
            if time.monotonic() > deadline:
                break
            content, header_bytes = case(seed, number, base)
            path.write_bytes(content)
            draw = Random(f"{seed} {number} judged")
            answer = in_a_process(lambda: judgement(path, draw, header_bytes))  # noqa: B023 - called at once
            outcomes["cases"] += 1
            outcomes.update(f"refused by {stage}" for stage in answer["refused"] or ["none"])
            for stage, what, details in answer["problems"]:
                problems.setdefault((stage, what), [0, number, details, content])[0] += 1
            if sys.stderr.isatty():
                print(f"\r{outcomes['cases']} cases, {len(problems)} kinds of problems", end="", file=sys.stderr)
    return outcomes, problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Feeds wrong model files to psigraph.")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", default="psigraph")
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    began = time.monotonic()
    outcomes, problems = fuzz(given.seed, given.first, given.cases, given.seconds)
    KEPT.mkdir(parents=True, exist_ok=True)
    for index, ((stage, what), (count, number, details, content)) in enumerate(sorted(problems.items())):
        kept = KEPT / f"{given.seed}-{number}-{index}.gguf"
        kept.write_bytes(content)
        print(f"{stage}: {what}: {count} cases, first {number}, kept as {kept.relative_to(ROOT)}\n{details[-2000:]}\n")
    told = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
    print(f"seed {given.seed}, {time.monotonic() - began:.0f} s: {told}; {len(problems)} kinds of problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
