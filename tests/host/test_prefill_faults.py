"""Each kind of driver call that a prompt's chunk makes fails once: see test_faults.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nano import write_nano

from psigraph.ir.errors import DeviceError, OutOfMemoryError
from psigraph.options import SessionOptions
from psigraph.runtime import host
from psigraph.session import open_session

PROMPT = tuple(range(1, 21))
OUT_OF_MEMORY, UNKNOWN = 2, 999
Live = Callable[..., tuple[int, str, list[str], list[str]]]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """live(nth, code): (the token behind the prompt, how it went in, calls before the prompt, calls of the prompt)."""
    path = write_nano(tmp_path_factory.mktemp("nano"))
    host.activate(sms=1)

    def one(nth: int = 0, code: int = 0, prefill: str = "auto") -> tuple[int, str, list[str], list[str]]:
        host.forget()
        host.inject(nth, code)
        with open_session(path, SessionOptions("host", ctx=32, prefill=prefill)) as session:
            before = host.calls()
            session.feed(PROMPT)
            token = session.engine.chosen()
            return token, session.prefill, before, host.calls()[len(before) :]

    yield one
    host.forget()
    host.activate(sms=4)


def firsts(before: list[str], during: list[str]) -> dict[str, int]:
    """Call -> number of its first one while the prompt goes in."""
    found: dict[str, int] = {}
    for index, name in enumerate(during):
        found.setdefault(name, len(before) + index + 1)
    return found


def test_any_kind_of_call_fails(live: Live) -> None:
    token, way, before, during = live()
    left = host.live()
    assert way.startswith("own kernels")
    calls = firsts(before, during)
    assert {"cuModuleLoadData", "cuMemAlloc", "cuStreamEndCapture", "cuGraphInstantiate"} <= set(calls)
    for name, nth in calls.items():
        with pytest.raises(DeviceError, match=f"{name} failed with CUDA_ERROR_UNKNOWN"):
            live(nth, UNKNOWN)
        assert host.live() == left, name
        assert host.violations() == [], name
    assert live()[0] == token


def test_where_memory_is_short_the_prompt_takes_steps(live: Live) -> None:
    token, _, before, during = live()
    left = host.live()
    for name in ("cuMemAlloc", "cuModuleLoadData", "cuGraphInstantiate"):
        found, way, *_ = live(firsts(before, during)[name], OUT_OF_MEMORY)
        assert found == token
        assert way.startswith("token by token: "), name
        assert host.live() == left, name


def test_where_memory_is_short_an_explicit_way_is_an_error(live: Live) -> None:
    _, _, before, during = live()
    left = host.live()
    for name in ("cuMemAlloc", "cuGraphInstantiate"):
        with pytest.raises(OutOfMemoryError, match=r"^prefill own: .*; auto or off takes prompts token by token$"):
            live(firsts(before, during)[name], OUT_OF_MEMORY, "own")
        assert host.live() == left, name


def test_a_failed_engine_takes_nothing_in(live: Live, tmp_path: Path) -> None:
    _, _, before, during = live()
    host.forget()
    host.inject(firsts(before, during)["cuGraphLaunch"], UNKNOWN)
    with open_session(write_nano(tmp_path), SessionOptions("host", ctx=32, prefill="own")) as session:
        with pytest.raises(DeviceError):
            session.feed(PROMPT)
        with pytest.raises(DeviceError, match="failed earlier in this process"):
            session.feed(PROMPT)
