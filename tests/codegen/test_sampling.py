"""The kernels of `adjust` and `draw` against their reference: the same token from the same logits, always."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from machine_code import machine_code

from psigraph.codegen.device import device_headers
from psigraph.codegen.lower import lower
from psigraph.codegen.target import GPU_ARCHES, target_for
from psigraph.ir.errors import ModelFileError, UsageError
from psigraph.ir.graph import Graph
from psigraph.ir.interpret import Interpreter
from psigraph.ir.sampling import SAMPLER_WORDS, adjusted, choices, random_words, words_of
from psigraph.ir.text import parse_graph
from psigraph.ir.verify import verify
from psigraph.passes.fuse_choice import fuse_choice
from psigraph.runtime import host
from psigraph.runtime.cuda.compiler import compile_program
from psigraph.runtime.cuda.driver import Driver
from psigraph.runtime.cuda.kernel_cache import KernelCache
from psigraph.runtime.engine import Engine
from psigraph.runtime.host.check import KernelCall, run_build
from psigraph.text.sampler import SamplerSettings

CONTEXT = 2048
SMALL, LARGE = 50, 2500  # one span of logits, and three of which the last is ragged
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}


def sampling_graph(size: int) -> Graph:
    """A step that draws from constant logits. cache: nothing reads it, and it says how many positions there are."""
    peaks = -(-size // 1024)
    return parse_graph(f"""
    graph sampling(constant %logits: f32[1,{size}], constant %sampler: i32[{SAMPLER_WORDS}],
                   constant %end_tokens: i32[8], state %tokens: i32[1], state %positions: i32[1],
                   state %sequences: i32[1], state %stop: i32[1], state %log: i32[1,{CONTEXT}],
                   state %history: i32[1,{CONTEXT}], state %cache: f16[1,1,{CONTEXT},16]) {{
      %adjusted: f32[1,{size}], %peaks: f32[1,{peaks}], %history2: i32[1,{CONTEXT}] =
          adjust(%logits, %tokens, %history, %sampler, %positions, %sequences)
      %tokens2: i32[1] = draw(%adjusted, %peaks, %sampler, %positions)
      %log2: i32[1,{CONTEXT}] = record(%log, %tokens2, %positions, %sequences)
      %stop2: i32[1] = stop_on(%tokens2, %end_tokens, %stop, %positions, %sequences)
      %positions2: i32[1] = advance(%positions)
      return tokens=%tokens2, positions=%positions2, stop=%stop2, log=%log2, history=%history2
    }}""")


class NoWeights:
    def fileno(self) -> int:
        raise AssertionError

    def place(self, name: str) -> tuple[int, int]:
        raise AssertionError(name)


@functools.cache
def driver() -> Driver:
    host.activate(sms=4)
    return Driver(0)


class Sampler:
    """The kernels on the host target, for any logits and settings of one size."""

    def __init__(self, size: int, folder: Path, fused: bool = True, graph: bool = True) -> None:
        self.graph = sampling_graph(size)
        verify(self.graph)
        program = lower(fuse_choice(self.graph)[0] if fused else self.graph, target_for("host", 2))
        compiled = compile_program(program, "host", KernelCache(folder))
        constants = {"logits": np.zeros((1, size), np.float32), "sampler": SamplerSettings().words()}
        self.engine = Engine(driver(), program, compiled, NoWeights(), graph=graph, constants=constants)

    def tokens(self, logits: np.ndarray, settings: SamplerSettings, count: int) -> list[int]:
        self.engine.reset()
        self.engine.set_constant("logits", logits.astype(np.float32)[None])
        self.engine.set_constant("sampler", settings.words(len(logits)))
        self.engine.feed([0])
        for _ in range(count - 1):
            self.engine.step()
        return self.engine.read("log").view(np.int32)[:count].tolist()

    def wanted(self, logits: np.ndarray, settings: SamplerSettings, count: int) -> list[int]:
        interpreter = Interpreter()
        states = interpreter.initial_state(self.graph)
        states |= {"logits": logits.astype(np.float32).astype(np.float64)[None], "sampler": settings.words(len(logits))}
        found = []
        for _ in range(count):
            states |= interpreter.results(self.graph, interpreter.run(self.graph, states))
            found.append(int(states["tokens"][0]))
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def small(folder):
    sampler = Sampler(SMALL, folder)
    yield sampler
    sampler.engine.close()


@pytest.fixture(scope="module")
def large(folder):
    sampler = Sampler(LARGE, folder)
    yield sampler
    sampler.engine.close()


def normal(size: int, spread: float = 3.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
SETTINGS = {
    "default": {},
    "everything": {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0},
    "greedy": {"temperature": 0.0},
    "top_k 1": {"top_k": 1},
    "few of the peaks": {"top_k": 2, "top_p": 1.0, "min_p": 0.0},
    "as many as peaks": {"top_k": 3, "top_p": 0.7},
    "more than peaks": {"top_k": 4, "top_p": 0.9},
    "top_k over the vocabulary": {"top_k": 10**9, "top_p": 1.0, "temperature": 2.0},
    "top_k of all": {"top_k": LARGE, "top_p": 0.999, "min_p": 0.0, "temperature": 3.0},
    "top_p": {"top_k": 0, "top_p": 0.9, "min_p": 0.0},
    "min_p": {"top_k": 0, "top_p": 1.0, "min_p": 0.01, "temperature": 1.5},
    "cold": {"top_k": 0, "temperature": 1e-3},
    "hot": {"top_k": 0, "top_p": 0.99, "min_p": 0.0, "temperature": 100.0},
    "tiny top_p": {"top_k": 0, "top_p": 1e-6, "temperature": 5.0},
    "no top_p": {"top_k": 0, "top_p": 0.0},
    "min_p 1": {"top_k": 0, "min_p": 1.0},
    "penalties": {**PENALTIES, "temperature": 1.2},
    "long window": {**PENALTIES, "penalty_window": -1, "top_k": 0},
    "short window": {**PENALTIES, "penalty_window": 2, "top_k": 3},
    "rewards": {"presence_penalty": -1.0, "frequency_penalty": -0.5, "penalty_window": 8},
    "greedy with penalties": {**PENALTIES, "temperature": 0.0, "penalty_window": -1},
    "biases": {"top_k": 0, "logit_bias": {0: 4.0, 1024: 9.0, LARGE - 1: 8.0, 7: float("-inf"), 2048: -3}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_kernels_choose_as_the_reference(name, large):
    for seed, spread in [(0, 3.0), (2**63 + 5, 0.2)]:
        settings = SamplerSettings(**SETTINGS[name], seed=seed)
        logits = normal(LARGE, spread)
        assert large.tokens(logits, settings, 12) == large.wanted(logits, settings, 12)


EXTREMES = {
    "all equal": np.zeros(LARGE),
    "many equal": np.r_[np.full(1500, 2.0), np.full(LARGE - 1500, 1.0)],
    "one finite": np.where(np.arange(LARGE) == 1777, -50.0, -np.inf),
    "not a number": np.where(np.arange(LARGE) % 3 == 0, normal(LARGE), np.nan),
    "none a number": np.full(LARGE, np.nan),
    "infinite": np.where(np.arange(LARGE) % 1000 == 999, np.inf, normal(LARGE)),
    "zeros of both signs": np.where(np.arange(LARGE) % 2, -0.0, 0.0),
    "huge": normal(LARGE, 1e37),
    "sorted": np.linspace(5, -5, LARGE),
    "far apart": np.linspace(5, -200, LARGE),
    "largest in one span": np.r_[np.linspace(10, 9, 1024), normal(LARGE - 1024, 0.1)],
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize(
    "options",
    [{}, OFF, {"top_k": 2, "min_p": 0.0}, {**OFF, "top_k": 1200}, {**OFF, "top_p": 0.5}],
    ids=["default", "off", "top_k 2", "top_k 1200", "top_p"],
)
def test_extreme_logits(name, options, large):
    settings = SamplerSettings(**options, seed=3)
    assert large.tokens(EXTREMES[name], settings, 5) == large.wanted(EXTREMES[name], settings, 5)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "top_k": 0}, {"temperature": 2.0, "top_k": 7, "min_p": 0.0}])
def test_hundreds_of_draws(options, small):
    settings = SamplerSettings(**options, seed=99)
    logits, words = normal(SMALL, 1.0, seed=4), words_of(settings.words())
    found = small.tokens(logits, settings, 600)
    wanted = choices(adjusted(logits, np.array([], int), words), words).at(random_words(np.arange(600), words.seed))
    assert found == wanted.tolist()
    assert len(set(found)) > 4


def test_a_seed_gives_the_same_tokens_again_eager_and_unfused(large, folder):
    settings = SamplerSettings(**PENALTIES, temperature=1.5, seed=1234)
    logits = normal(LARGE, 1.0)
    found = large.tokens(logits, settings, 40)
    assert found == large.tokens(logits, settings, 40)
    assert found != large.tokens(logits, SamplerSettings(**PENALTIES, temperature=1.5, seed=1235), 40)
    for fused, graph in [(True, False), (False, False), (False, True)]:
        other = Sampler(LARGE, folder, fused, graph)
        assert other.tokens(logits, settings, 40) == found
        other.engine.close()


def test_constants_change_in_the_order_of_steps(small):
    """A new seed reaches the steps queued after it, none before it."""
    logits = normal(SMALL, 1.0)
    settings = [SamplerSettings(**OFF, seed=seed) for seed in (1, 2)]
    first, second = (small.tokens(logits, one, 200) for one in settings)
    small.engine.reset()
    small.engine.set_constant("sampler", settings[0].words())
    for step in range(200):
        if step == 100:
            small.engine.set_constant("sampler", settings[1].words())
        small.engine.step()
    assert small.engine.read("log").view(np.int32)[:200].tolist() == first[:100] + second[100:]


def test_a_logit_that_becomes_no_number_ends_the_text_where_it_did(small):
    """Replays that are queued behind it do no harm, and the next text is as good as any."""
    settings, sound = SamplerSettings(**OFF, seed=5), normal(SMALL)
    wanted = small.tokens(sound, settings, 24)

    def spoiled(place, value):
        small.tokens(sound, settings, 1)
        logits = np.where(np.arange(SMALL) == place, value, sound).astype(np.float32)
        for tokens in small.engine.decode(40, 4):
            yield from tokens
            small.engine.set_constant("logits", logits[None])  # three chunks of four are queued by now

    for wrong in ((0, np.nan), (SMALL - 1, np.inf)):
        given = []
        with pytest.raises(ModelFileError, match="at position 12: "):
            given.extend(spoiled(*wrong))
        assert given == wanted[:12]
        with pytest.raises(ModelFileError, match="no token can be chosen at position"):
            small.engine.chosen()
    assert small.tokens(sound, settings, 24) == wanted


def test_constants_that_do_not_fit(small):
    engine = small.engine
    with pytest.raises(UsageError, match="no constant log; there are logits, sampler, end_tokens"):
        engine.set_constant("log", np.zeros(CONTEXT, np.int32))
    with pytest.raises(UsageError, match=r"the constant sampler is int32\[2064\], not int32\[3\]"):
        engine.set_constant("sampler", np.zeros(3, np.int32))
    with pytest.raises(UsageError, match="not float64"):
        engine.set_constant("logits", np.zeros((1, SMALL)))
    with pytest.raises(UsageError, match="needs the constant sampler"):
        Engine(driver(), engine.program, engine.compiled, NoWeights(), constants={"logits": np.zeros((1, SMALL), "f4")})


DTYPES = {"f32": np.float32, "i32": np.int32, "u8": np.uint8, "f16": np.float16}


@pytest.mark.parametrize(
    "options", [{"top_k": 2, **PENALTIES, "logit_bias": {7: 1.0}}, {"top_k": 1100, "temperature": 9.0}], ids=str
)
def test_the_kernels_keep_every_rule(options):
    program = lower(fuse_choice(sampling_graph(LARGE))[0], target_for("host", 2))
    arrays = {b.name: np.zeros(b.nbytes if b.dtype == "u8" else b.shape, DTYPES[b.dtype]) for b in program.buffers}
    arrays |= {"logits": normal(LARGE)[None], "sampler": SamplerSettings(**options).words()}
    arrays["positions"][0], arrays["tokens"][0] = 9, 5
    arrays["history"][0, :9] = np.arange(9) * 3
    changed = {"adjust": ("value.", "history"), "draw_choose": ("scratch.", "tokens", "log", "stop", "positions")}
    for launch in program.step().kernels:
        kinds = [program.buffer(str(arg)).kind for arg in launch.args]
        call = KernelCall(
            program.kernel(launch.kernel).text, launch.kernel, launch.grid, launch.block, launch.shared_bytes,
            [arrays[str(arg)] for arg in launch.args],
            produced=tuple(index for index, kind in enumerate(kinds) if kind in ("state", "scratch")),
            writes=tuple(i for i, arg in enumerate(launch.args) if str(arg).startswith(changed[launch.kernel])),
            programmatic=True, headers=device_headers(),
        )  # fmt: skip
        for build in ("address", "watch"):
            run_build(call, build)
        runs = [run_build(call, "fast", order) for order in ("forward", "reverse", "shuffle")]
        for index, array in runs[0].items():
            name = str(launch.args[index])
            # The list of candidates is in any order; what comes of it is not.
            assert name == "scratch.candidates" or all(array.tobytes() == run[index].tobytes() for run in runs), name
            arrays[name] = array
    assert arrays["history"][0, :11].tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24, 5, 0]
    assert arrays["log"][0, 9] == arrays["tokens"][0]
    assert not arrays["scratch.tally"].any()


@pytest.mark.parametrize("arch", GPU_ARCHES)
def test_no_register_is_spilled(arch):
    program = lower(fuse_choice(sampling_graph(151_936))[0], target_for(arch))
    for name in ("adjust", "draw_choose"):
        resources = machine_code(program, arch, name)[name].resources
        assert (resources.spill_bytes, resources.stack_bytes) == (0, 0)
    turns = -(-149 // target_for(arch).sm_count)  # spans a block takes, so that all blocks run at once
    assert [launch.grid for launch in program.step().launches] == [149, -(-149 // turns)]
