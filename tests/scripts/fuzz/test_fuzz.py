"""`make fuzz`: a fixed small part of it, and that it notices what it is there to notice."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from psigraph.ir.errors import UsageError

FOLDER = Path(__file__).parents[3] / "scripts" / "fuzz"


def load(name: str) -> ModuleType:
    """A module of the fuzzer, which is run as a folder."""
    spec = importlib.util.spec_from_file_location(f"fuzz_{name.strip('_')}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fuzzer() -> ModuleType:
    return load("__main__")


@pytest.fixture(scope="module")
def stages(fuzzer: ModuleType) -> ModuleType:
    return sys.modules["stages"]


def test_forty_wrong_files_give_one_line_or_a_sound_result(fuzzer: ModuleType, stages: ModuleType) -> None:
    judgement = functools.partial(stages.judge, templates=False)
    outcomes, problems = fuzzer.fuzz("make test", 0, 40, 60.0, judgement)
    assert {key: found[:3] for key, found in problems.items()} == {}
    assert outcomes["cases"] == 40
    assert all(outcomes[f"refused by {stage}"] > 2 for stage in ("header", "tokenizer", "binding", "none"))


def test_a_case_is_made_of_its_seed_and_number_alone(fuzzer: ModuleType, tmp_path: Path) -> None:
    base = fuzzer.sound(tmp_path)
    assert fuzzer.case("s", 7, base) == fuzzer.case("s", 7, base)
    assert len({fuzzer.case("s", number, base)[0] for number in range(30)}) > 25  # a mistake may happen to be none
    assert base.header() == fuzzer.sound(tmp_path).header()


def test_the_file_that_cases_begin_with_is_sound(fuzzer: ModuleType, stages: ModuleType, tmp_path: Path) -> None:
    base = fuzzer.sound(tmp_path)
    path = tmp_path / "sound.gguf"
    path.write_bytes(base.header() + base.data)
    answer = stages.judge(path, fuzzer.Random(2), len(base.header()))  # which draws a context that it can have
    assert answer == {"problems": [], "refused": []}
    with stages.open_gguf(path) as file:
        assert len(stages.Tokenizer(file).encode("abc")) == 1  # it has merges that are used


def panic() -> None:
    raise type("PanicException", (BaseException,), {})("range end index 2")


def refuse(message: str) -> Any:
    raise UsageError(message)


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (lambda: np.array([1, 2]) == [3, 4] or None, "ValueError in test_fuzz.py"),
        (panic, "PanicException in test_fuzz.py"),
        (lambda: sys.exit(3), "SystemExit in test_fuzz.py"),
        (lambda: refuse("x" * 501), "UsageError of over 500 letters"),
        (lambda: refuse("two\nlines"), "UsageError that is no printable line"),
        (lambda: refuse("\x1b[2J"), "UsageError that is no printable line"),
        (lambda: refuse(""), "UsageError that is no printable line"),
        (lambda: warnings.warn("y" * 501, stacklevel=1), "warning UserWarning of over 500 letters"),
        (lambda: np.float32(3e38) * np.float32(10), "RuntimeWarning for developers"),
    ],
)
def test_what_is_no_plain_line_is_a_problem(stages: ModuleType, act: Any, what: str) -> None:
    court = stages.Judge()
    assert court.run("here", act) is None or what == "RuntimeWarning for developers"
    (problem,) = court.problems
    assert problem[0] == "here"
    assert problem[1].startswith(what)


def test_a_refusal_in_one_line_is_none(stages: ModuleType) -> None:
    court = stages.Judge()
    court.run("here", lambda: refuse("the file is damaged (byte 3)"))
    assert (court.problems, court.refused) == ([], ["here"])


@pytest.mark.parametrize(
    ("act", "what"),
    [(signal.pause, "hang"), (lambda: os.kill(os.getpid(), signal.SIGKILL), "the process died, wait status 9")],
)
def test_a_hang_and_a_crash_are_problems(fuzzer: ModuleType, act: Any, what: str) -> None:
    ((stage, found, _),) = fuzzer.in_a_process(act, 0.3)["problems"]
    assert (stage, found) == ("all", what)


def test_time_and_memory_beyond_the_bar_are_problems(
    fuzzer: ModuleType, stages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = fuzzer.sound(tmp_path)
    path = tmp_path / "sound.gguf"
    path.write_bytes(base.header() + base.data)
    monkeypatch.setattr(stages, "READER_SECONDS", 0.0)
    monkeypatch.setattr(stages, "SPARE_BYTES", -(1 << 40))
    answer = stages.judge(path, fuzzer.Random(1), len(base.header()), templates=False)
    assert [what for _, what, _ in answer["problems"]] == ["slow", "memory"]


def test_each_kind_of_problem_is_counted_and_keeps_its_first_file(fuzzer: ModuleType) -> None:
    def judgement(path: Path, draw: Any, header_bytes: int) -> dict[str, Any]:
        return {"problems": [("text", "slow", path.read_bytes()[:4].hex())], "refused": ["text"]}

    outcomes, problems = fuzzer.fuzz("s", 5, 3, 60.0, judgement)
    assert outcomes == {"cases": 3, "refused by text": 3}
    count, first, _, content = problems["text", "slow"]
    assert (count, first) == (3, 5)
    assert len(content) > 1000
