"""Every driver call of a session's life fails once: one line says why, nothing hangs, nothing is left behind."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nano import PROMPT, write_nano

from psigraph import build, session
from psigraph.ir.errors import DeviceError, OutOfMemoryError, UsageError
from psigraph.options import SessionOptions
from psigraph.runtime import host
from psigraph.runtime.cuda import compiler
from psigraph.runtime.cuda.driver import Driver
from psigraph.session import Session, open_session

OUT_OF_MEMORY, ILLEGAL_ADDRESS, LAUNCH_FAILED, UNKNOWN = 2, 700, 719, 999
STICKY = (ILLEGAL_ADDRESS, LAUNCH_FAILED)
NEW_TOKENS = 4
MOST_SECONDS = 5.0
# What gives something back: nobody can do anything about its failure, and the result is there.
GIVES_BACK = (
    "cuEventDestroy",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuMemFree",
    "cuMemFreeHost",
    "cuModuleUnload",
    "cuStreamDestroy",
    "cuDevicePrimaryCtxRelease",
)


@dataclass(frozen=True)
class Life:
    """What a session gave, and the driver calls that it made. ready: calls before the first step."""

    tokens: tuple[int, ...]
    logits: np.ndarray
    calls: tuple[str, ...]
    ready: int
    closing: int


Live = Callable[..., Life]


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """The first result again and again: what comes before the driver is the same in every life."""
    results: list[Any] = []

    def first(*args: Any, **kwargs: Any) -> Any:
        if not results:
            results.append(function(*args, **kwargs))
        return results[0]

    return first


def use(opened: Session) -> tuple[tuple[int, ...], np.ndarray]:
    """All that asks something of the driver after the load: tokens and the last logits."""
    opened.feed(PROMPT)
    tokens = tuple(itertools.chain.from_iterable(opened.decode(NEW_TOKENS)))
    logits = opened.engine.logits()
    opened.reset()
    opened.feed(PROMPT[:1])
    opened.engine.chosen()
    return tokens, logits


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A session's whole life: live(graph, nth, code) lets the nth driver call fail."""
    path = write_nano(tmp_path_factory.mktemp("nano"))
    host.activate(sms=1)  # small grids: this is not about what kernels compute
    with pytest.MonkeyPatch.context() as patch:
        before_driver = {build: ("available_specs", "load_spec"), session: ("fuse", "lower")}
        for module, names in {**before_driver, compiler: ("compile_program",)}.items():
            for name in names:
                patch.setattr(module, name, remembered(getattr(module, name)))

        def one(graph: bool, nth: int = 0, code: int = 0) -> Life:
            host.forget()
            host.inject(nth, code)
            with open_session(path, SessionOptions("host", ctx=16, outputs=("logits",), graph=graph)) as opened:
                ready = len(host.calls())
                try:
                    tokens, logits = use(opened)
                except DeviceError:
                    if code != OUT_OF_MEMORY:
                        assert_refuses_at_once(opened)
                    raise
                closing = len(host.calls())
            return Life(tokens, logits, tuple(host.calls()), ready, closing)

        yield one
    host.forget()
    host.activate(sms=4)


def assert_refuses_at_once(opened: Session) -> None:
    """After a failure that leaves nothing to trust, no call reaches the driver again."""
    before = host.calls()
    engine = opened.engine
    for later in (opened.reset, engine.synchronize, engine.logits, lambda: use(opened), lambda: engine.step_times(1)):
        with pytest.raises(DeviceError, match="failed earlier in this process: cu"):
            later()
    assert host.calls() == before


@pytest.fixture(scope="module")
def whole(live: Live) -> dict[bool, Life]:
    """The lives in which nothing fails, by graph."""
    return {graph: live(graph) for graph in (True, False)}


def test_graph_and_eager_give_the_same_and_leave_nothing(whole: dict[bool, Life]) -> None:
    assert len(whole[True].tokens) == NEW_TOKENS
    assert whole[True].tokens == whole[False].tokens
    assert whole[True].logits.tobytes() == whole[False].logits.tobytes()
    # The list of those that may fail unnoticed is not longer than it must be: each of them is made.
    assert set(GIVES_BACK) <= set(whole[True].calls)
    for name in ("cuModuleLoadData", "cuMemAlloc", "cuMemHostAlloc", "cuStreamEndCapture", "cuGraphInstantiate"):
        assert name in whole[True].calls[: whole[True].ready]
    assert whole[True].calls[whole[True].ready : whole[True].closing].count("cuGraphLaunch") == len(PROMPT) + NEW_TOKENS
    assert whole[False].calls.count("cuLaunchKernelEx") > whole[True].calls.count("cuLaunchKernelEx")


ALL_CODES = (OUT_OF_MEMORY, LAUNCH_FAILED, UNKNOWN)


# The codes take turns over the calls; `make slow` has every code at every call, and the life without a graph, whose
# calls up to the first step are the same but for the capture.
@pytest.mark.parametrize(
    ("graph", "codes"),
    [
        (True, ALL_CODES),
        *(pytest.param(True, (code,), marks=pytest.mark.slow) for code in ALL_CODES),
        pytest.param(False, (OUT_OF_MEMORY, ILLEGAL_ADDRESS, UNKNOWN), marks=pytest.mark.slow),
    ],
)
def test_any_one_call_fails(graph: bool, codes: tuple[int, ...], live: Live, whole: dict[bool, Life]) -> None:
    clean = whole[graph]
    before, files = host.live(), os.listdir("/proc/self/fd")
    for nth in range(1 if graph else clean.ready + 1, len(clean.calls) + 1):
        name, code = clean.calls[nth - 1], codes[nth % len(codes)]
        started = time.perf_counter()
        failure: DeviceError | None = None
        try:
            life = live(graph, nth, code)
        except DeviceError as error:
            failure = error
        message = str(failure or "")
        where = f"call {nth}, {name}: {message or 'no error'}"
        assert failure is None or isinstance(failure, OutOfMemoryError) == (code == OUT_OF_MEMORY), where
        assert time.perf_counter() - started < MOST_SECONDS, where
        assert host.live() == before, where
        assert host.violations() == [], where
        if nth > clean.closing or (name in GIVES_BACK and code not in STICKY):
            assert not message, where
            assert life.tokens == clean.tokens, where
        else:
            check_message(message, name, code)
    host.forget()
    assert len(os.listdir("/proc/self/fd")) == len(files)


def check_message(message: str, name: str, code: int) -> None:
    """One line that names the call; out of memory: needed, free, what to lower."""
    assert message, f"{name} failed and nobody said so"
    assert "\n" not in message
    assert name in message or (code in STICKY and name in GIVES_BACK), message
    if code == OUT_OF_MEMORY:
        assert "free" in message, message
        assert "lower --ctx" in message, message
        if name in ("cuMemAlloc", "cuMemHostAlloc"):
            assert message.count("MiB") >= 2, message
    else:
        assert "start the program again" in message, message


def test_out_of_memory_says_how_much(live: Live, whole: dict[bool, Life]) -> None:
    arena = whole[True].calls.index("cuMemAlloc") + 1
    with pytest.raises(OutOfMemoryError, match=r"a context of 16 tokens .* needs 0\.\d+ MiB .* MiB of GPU memory\); "):
        live(True, arena, OUT_OF_MEMORY)


def test_memory_that_is_really_not_there(live: Live) -> None:
    host.activate(memory_bytes=100_000)
    try:
        with pytest.raises(OutOfMemoryError, match=r"less free \(0\.10 MiB of GPU memory\); lower --ctx"):
            live(True)
    finally:
        host.activate(memory_bytes=64 << 30)


def test_an_engine_that_was_closed_says_so(live: Live, tmp_path: Path) -> None:
    with open_session(write_nano(tmp_path), SessionOptions("host", ctx=16)) as opened:
        pass
    opened.close()
    with pytest.raises(UsageError, match="closed"):
        opened.feed(PROMPT)


def test_a_number_that_no_device_has() -> None:
    host.activate()
    with pytest.raises(DeviceError, match=r"^--device 5: this machine has 1 GPU\(s\), numbered from 0"):
        Driver(5)
