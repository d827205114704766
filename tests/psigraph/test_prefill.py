"""Ways for prompts: what options say, what is said where there is no library, and what the library is asked."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_model import Q4

from psigraph import gpu_start
from psigraph.bench.measure import prompt_record
from psigraph.cli.options import prefill_option
from psigraph.ir.errors import DeviceError, UnsupportedModelError, UsageError
from psigraph.options import SessionOptions
from psigraph.prefill import PREFILLS, prefill_maker
from psigraph.runtime.cuda import cublas
from psigraph.session import open_session


class Library:
    """Stands where cuBLASLt's functions are: notes the calls, and makes handles out of numbers."""

    def __init__(self, algorithms: int = 1, fails: str = "") -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.algorithms, self.fails = algorithms, fails

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            self.calls.append((name, args))
            if name.endswith("Create"):
                args[0]._obj.value = len(self.calls)
            if name == "cublasLtMatmulAlgoGetHeuristic":
                args[9]._obj.value = self.algorithms
            return 14 if name == self.fails else 0

        return call

    def count(self, part: str) -> int:
        return sum(part in name for name, _ in self.calls)


class Gpu:
    """A driver that has memory to give."""

    def __init__(self) -> None:
        self.freed: list[int] = []

    def enter(self) -> None:
        pass

    def give_back(self, name: str, address: int) -> None:
        assert name == "cuMemFree"
        self.freed.append(address)

    def allocate(self, nbytes: int, what: str) -> int:
        return 4096


def test_options_are_those_of_sessions() -> None:
    found: list[Any] = []
    prefill_option(lambda: None)
    command = prefill_option(lambda prefill: found.append(prefill))
    (option,) = command.__click_params__  # type: ignore[attr-defined]
    assert tuple(option.type.choices) == PREFILLS


def test_a_product_is_what_the_library_is_asked_for() -> None:
    library, gpu = Library(), Gpu()
    opened = cublas.Cublas(gpu, library, "cuBLASLt")  # type: ignore[arg-type]
    for _ in range(2):
        opened.prepare(48, 512, 256)
    assert library.count("GetHeuristic") == 1, "a shape is prepared once"
    opened.product(100, 200, 300, 400, 48, 512, 256, add=True, up=4, stream=9)
    name, args = library.calls[-1]
    assert name == "cublasLtMatmul"
    alpha, beta = args[2]._obj.value, args[7]._obj.value
    assert (alpha, beta) == (16.0, 1.0)
    assert [args[place].value for place in (3, 5, 8, 10, 15)] == [100, 200, 300, 400, 9]
    layouts = [call for name, call in library.calls if name == "cublasLtMatrixLayoutCreate"]
    assert [(one[1].value, one[2].value, one[3].value, one[4].value) for one in layouts] == [
        (2, 256, 48, 256),  # w, x and y, column by column
        (2, 256, 512, 256),
        (0, 48, 512, 48),
    ]
    opened.close()
    opened.close()
    assert library.count("LayoutDestroy") == 3
    assert library.count("cublasLtDestroy") == library.count("DescDestroy") == library.count("PreferenceDestroy") == 1
    assert gpu.freed == [4096]


def test_what_the_library_refuses() -> None:
    opened = cublas.Cublas(Gpu(), Library(algorithms=0), "cuBLASLt")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="no algorithm for 512 tokens x 48 rows x 256 columns"):
        opened.prepare(48, 512, 256)
    broken = Library(fails="cublasLtMatmulDescCreate")
    with pytest.raises(DeviceError, match="cublasLtMatmulDescCreate of cuBLASLt failed with status 14"):
        cublas.Cublas(Gpu(), broken, "cuBLASLt")  # type: ignore[arg-type]
    assert broken.count("cublasLtDestroy") == 1


def test_where_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise RuntimeError(f"no {name} here")

    monkeypatch.setattr("cuda.pathfinder.load_nvidia_dynamic_lib", missing)
    found, why = cublas.open_cublas(Gpu())  # type: ignore[arg-type]
    assert found is None
    assert "no cublasLt here" in why
    assert "pip install 'psigraph[library]'" in why
    wanted: tuple[Any, ...] = ("library", "cuda", None, False, (), None, Gpu())
    make = prefill_maker(*wanted)
    assert make is not None
    with pytest.raises(UsageError, match="prefill library: cuBLASLt cannot be loaded"):
        make(None, {})  # type: ignore[arg-type]
    assert prefill_maker("off", *wanted[1:]) is None


def test_an_old_library_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that loads and lacks what is needed."""
    path = ctypes.CDLL(None)._name or "libc.so.6"
    monkeypatch.setattr("cuda.pathfinder.load_nvidia_dynamic_lib", lambda _: SimpleNamespace(abs_path=path))
    assert cublas.open_cublas(Gpu())[0] is None  # type: ignore[arg-type]


def test_in_numpy_a_prompt_is_timed_once_and_shows_its_progress() -> None:
    seen: list[tuple[int, int]] = []
    with open_session(Q4, SessionOptions("cpu")) as session:
        record = prompt_record(session, 12, 3, lambda done, total: seen.append((done, total)))
        assert session.fed_at_once == 1
    assert record["tokens"] == 12
    assert record["way"] == "token by token: numpy"
    assert len(record["first_token_ms"]) == 1
    assert record["prompt_tokens_per_second"] == pytest.approx(12e3 / record["median_first_token_ms"])
    assert seen[0] == (1, 20), "8 ids warm up"
    assert seen[-1] == (20, 20)
    assert len(set(seen)) == 20


def test_short_prompts_go_in_token_by_token_and_the_record_says_so() -> None:
    seen: list[tuple[int, int]] = []
    with open_session(Q4, SessionOptions("host", ctx=64)) as session:
        record = prompt_record(session, 8, 1, lambda done, total: seen.append((done, total)))
        assert session.prefill_of(9) == session.prefill == "by chunks, from the first prompt on"
        assert session.fed_at_once == 128
        session.engine._no_prefill = "whatever it says"  # type: ignore[attr-defined]
        assert session.fed_at_once == 1
    assert record["way"] == "token by token: a prompt of up to 8 tokens"
    assert seen == [(8, 16), (16, 16)]


@pytest.mark.parametrize("prefill", ["own", "library"])
def test_a_way_that_needs_a_gpu_is_no_way_without_one(prefill: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: int) -> None:
        raise DeviceError("no NVIDIA driver")

    monkeypatch.setattr(gpu_start, "start_driver", start)
    with pytest.raises(
        UsageError, match=rf"^prefill {prefill}: no GPU works here \(no NVIDIA driver\), and numpy takes"
    ):
        open_session(Q4, SessionOptions("auto", prefill=prefill))
    with open_session(Q4, SessionOptions("auto", ctx=16)) as session:
        assert session.backend == "cpu"
