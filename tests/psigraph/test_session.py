"""Sessions: which backend is taken, what is refused before a weight is read, what stays open after a failure."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_model import Q4, Q8, changed, divergence, reference_greedy, reference_logits

from psigraph import gpu_choice, gpu_start
from psigraph import session as sessions
from psigraph.build import Model
from psigraph.ir.errors import DeviceError, ModelFileError, PolicyRefusal, UnsupportedModelError, UsageError
from psigraph.options import SessionOptions
from psigraph.runtime.synth.model import write_synth
from psigraph.runtime.synth.vocab import SMALLEST
from psigraph.session import open_model_for, open_session
from psigraph.text.sampler import SamplerSettings


class FakeDriver:
    """A driver with a GPU of this name and compute capability."""

    def __init__(self, name: str, capability: tuple[int, int]) -> None:
        self.context = None
        self.closed = False
        self._facts = SimpleNamespace(name=name, capability=capability, sm_count=1)

    def call(self, *_: object) -> None: ...

    def facts(self) -> SimpleNamespace:
        return self._facts

    def close(self) -> None:
        self.closed = True


def no_driver(_: int) -> Any:
    raise DeviceError("no NVIDIA driver")


Start = Callable[[Callable[[int], Any]], None]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Puts a function in the place of the one that starts the driver."""
    return lambda function: monkeypatch.setattr(gpu_start, "start_driver", function)


def test_auto_takes_numpy_where_there_is_no_gpu_and_says_why(start: Start) -> None:
    start(no_driver)
    with open_session(Q4) as session:
        assert (session.backend, session.label) == ("cpu", "psionic_qwen3_cpu")
        assert session.facts["no_gpu_because"] == "no NVIDIA driver"
        assert (session.context, session.position, session.vocabulary) == (2048, 0, 4096)
        assert session.timings["load_ms"] > 0
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        open_session(Q4, SessionOptions("cuda"))


@pytest.mark.parametrize(
    ("name", "capability", "why"),
    [("Old", (7, 5), "compute capability 7.5"), (gpu_choice.STAND_IN_NAME, (9, 0), "stand-in driver")],
)
def test_a_device_that_cannot_serve(name: str, capability: tuple[int, int], why: str, start: Start) -> None:
    drivers: list[FakeDriver] = []

    def begin(_: int) -> FakeDriver:
        drivers.append(FakeDriver(name, capability))
        return drivers[-1]

    start(begin)
    with open_session(Q4) as session:
        assert session.backend == "cpu"
        assert why in session.facts["no_gpu_because"]
    with pytest.raises(DeviceError, match=why):
        open_session(Q4, SessionOptions("cuda"))
    assert all(driver.closed for driver in drivers)
    assert gpu_choice.present_target() is None


def test_nothing_stays_open_when_the_file_is_at_fault(start: Start, tmp_path: Path) -> None:
    drivers: list[FakeDriver] = []

    def begin(_: int) -> FakeDriver:
        drivers.append(FakeDriver("Good", (9, 0)))
        return drivers[-1]

    start(begin)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ModelFileError):
        open_session(tmp_path / "absent.gguf")
    missing = changed(tmp_path / "m.gguf", b"blk.0.attn_q.weight", b"blk.0.attn_x.weight")
    with pytest.raises(ModelFileError, match=r"blk\.0\.attn_q\.weight: the tensor is missing"):
        open_session(missing)
    assert all(driver.closed for driver in drivers)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_the_policy_speaks_before_the_spec_and_before_any_weight(start: Start, tmp_path: Path) -> None:
    start(no_driver)
    other = changed(tmp_path / "m.gguf", b"\x05\0\0\0\0\0\0\0qwen3", b"\x05\0\0\0\0\0\0\0qwen2")

    def refuse(_: object) -> None:
        raise PolicyRefusal("no")

    with pytest.raises(PolicyRefusal):
        open_session(other, SessionOptions(admit=refuse))
    with pytest.raises(UnsupportedModelError, match="biases"):
        open_session(other)
    read: list[int] = []
    with pytest.raises(PolicyRefusal):
        open_session(Q4, SessionOptions(check=refuse, on_load=lambda done, total: read.append(done)))
    assert not read


def test_options_that_cannot_work() -> None:
    with pytest.raises(UsageError, match="--backend gpu"):
        open_session(Q4, SessionOptions("gpu"))
    with pytest.raises(UsageError, match="f32 cache"):
        open_session(Q4, SessionOptions("cuda", cache_dtype="f32"))


def test_ids_are_checked_before_they_are_fed() -> None:
    with open_session(Q4, SessionOptions("cpu", ctx=4)) as session:
        with pytest.raises(UsageError, match="nothing was fed"):
            session.decode(1)
        for ids, problem in (([], "empty"), ([4096], "ids are 0 to 4095"), ([-1], "outside"), ([1] * 5, "--ctx")):
            with pytest.raises(UsageError, match=problem):
                session.feed(ids)
        assert session.position == 0


def test_the_cache_grows_to_what_is_asked_for_as_far_as_the_model_allows(tmp_path: Path) -> None:
    path = write_synth(tmp_path / "m.gguf", "0.6b", "q4_k_m", 1, layers=1, vocab=SMALLEST)

    def held(**options: Any) -> int:
        with open_model_for(path, SessionOptions(**options)) as model:
            return int(model.binding.sizes["context"])

    assert held() == held(positions=10) == 4096
    assert held(positions=5000) == 5000
    assert held(ctx=64, positions=64) == 64
    seen: list[Model] = []
    assert held(positions=lambda model: seen.append(model) or 4097) == 4097
    assert seen
    with pytest.raises(UsageError, match="--ctx 64: prompt and new tokens fill 65"):
        held(ctx=64, positions=65)
    with pytest.raises(UsageError, match="context has 40960; shorten"):
        held(positions=40961)


@pytest.mark.gpu
@pytest.mark.parametrize("path", [Q4, Q8], ids=lambda path: path.stem)
@pytest.mark.parametrize("graph", [True, False])
def test_on_a_gpu(path: Path, graph: bool) -> None:
    ids, wanted = reference_logits(path)
    with open_session(path, SessionOptions("cuda", outputs=("logits",), graph=graph)) as session:
        assert session.label == "psionic_qwen3_cuda"
        found = divergence(wanted, session.forced_logits(ids))
        assert found.mean() <= 2e-4
        assert found.max() <= 1e-3
        for name in ("speech", "chat") if path == Q4 else ():
            prompt, greedy, _ = reference_greedy(path, name)
            session.reset()
            session.feed(prompt)
            assert [token for chunk in session.decode(64) for token in chunk] == greedy


def test_a_rewind_forgets_what_came_after_and_nothing_before() -> None:
    with open_session(Q4, SessionOptions("cpu", ctx=16)) as session:
        session.feed([5, 6, 7, 8])
        tokens = [token for chunk in session.decode(4) for token in chunk]
        session.rewind(2)
        assert session.position == 2
        session.feed([7, 8])
        assert [token for chunk in session.decode(4) for token in chunk] == tokens
        with pytest.raises(UsageError, match="positions are 0 to 7"):
            session.rewind(8)
        session.rewind(0)
        session.feed([9])
        assert session.position == 1


def test_a_session_that_samples_draws_what_the_seed_says_and_takes_the_likeliest_until_told() -> None:
    def tokens(session: sessions.Session) -> list[int]:
        session.reset()
        session.feed([5, 6, 7, 8])
        return [token for chunk in session.decode(6) for token in chunk]

    with open_session(Q4, SessionOptions("cpu", ctx=16)) as session:
        likeliest = tokens(session)
        assert not session.samples
        session.set_sampler(SamplerSettings(temperature=0))
        with pytest.raises(UsageError, match="sampling=True"):
            session.set_sampler(SamplerSettings())
    with open_session(Q4, SessionOptions("cpu", ctx=16, sampling=True)) as session:
        assert session.samples
        assert tokens(session) == likeliest
        session.set_sampler(SamplerSettings(temperature=1.5, seed=3))
        drawn = tokens(session)
        assert drawn == tokens(session) != likeliest
        session.set_sampler(SamplerSettings(temperature=1.5, seed=4))
        assert tokens(session) != drawn
        session.set_sampler(SamplerSettings(temperature=0))
        assert tokens(session) == likeliest
        with pytest.raises(UsageError, match="outside the vocabulary"):
            session.set_sampler(SamplerSettings(logit_bias={4096: 1.0}))
        with pytest.raises(UsageError, match="no constant seed"):
            session.engine.set_constant("seed", SamplerSettings().words())
