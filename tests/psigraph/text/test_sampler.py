"""Settings: what is refused, and what a request with them gives on the tiny model's kernels."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import Q8, reference_greedy

from psigraph.build import build_program, open_model
from psigraph.codegen.target import target_for
from psigraph.ir.errors import UsageError
from psigraph.ir.sampling import BIAS_SLOTS, SAMPLER_WORDS, words_of
from psigraph.runtime import host
from psigraph.runtime.cuda.compiler import compile_program
from psigraph.runtime.cuda.driver import Driver
from psigraph.runtime.cuda.kernel_cache import KernelCache
from psigraph.runtime.engine import Engine
from psigraph.text.sampler import SamplerSettings


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("temperature", -0.1, "temperature is -0.1; it must be a number from 0 to 100"),
        ("temperature", math.nan, "temperature is nan"),
        ("top_p", 1.5, "top_p is 1.5; it must be a number from 0 to 1"),
        ("min_p", -1, "min_p is -1"),
        ("top_k", -1, "top_k is -1; it must be a whole number from 0 to"),
        ("top_k", 2.0, "top_k is 2.0; it must be a whole number"),
        ("top_k", True, "top_k is True"),
        ("repetition_penalty", 0, "repetition_penalty is 0"),
        ("presence_penalty", math.inf, "presence_penalty is inf"),
        ("frequency_penalty", "1", "frequency_penalty is 1"),
        ("penalty_window", -2, "penalty_window is -2"),
        ("seed", 2**64, "seed is 18446744073709551616"),
        ("logit_bias", {-1: 1.0}, "logit_bias is -1"),
        ("logit_bias", {3: math.nan}, "logit_bias of token 3 is nan"),
        ("logit_bias", {3: math.inf}, "logit_bias of token 3 is inf; give a number, or -infinity"),
        ("logit_bias", dict.fromkeys(range(BIAS_SLOTS + 1), 1.0), "1025 tokens; at most 1024 are supported"),
    ],
)
def test_an_error_names_the_option(option: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        SamplerSettings(**{option: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_words() -> None:
    settings = SamplerSettings(
        temperature=0.5, top_k=7, top_p=0.25, min_p=0.5, repetition_penalty=2.0, presence_penalty=0.25,
        penalty_window=-1, seed=2**32 + 5, logit_bias={3: 1.5, 1: -math.inf},
    )  # fmt: skip
    words = words_of(settings.words(4))
    assert (words.top_k, words.top_p, words.seed, words.window) == (7, 2**30, (5, 1), 2**31 - 1)
    assert (words.repetition, words.repetition_inverse, words.presence, words.frequency) == (2, 0.5, 0.25, 0)
    assert words.sharpness == np.float32(2 * math.log2(math.e))
    assert words.min_p == np.float32(math.log(2))
    assert (words.bias_tokens.tolist(), words.biases.tolist()) == ([3, 1], [1.5, -math.inf])
    assert settings.words().shape == (SAMPLER_WORDS,)
    with pytest.raises(UsageError, match="token id 3 is outside the vocabulary; ids are 0 to 2"):
        settings.words(3)


@pytest.mark.parametrize(
    ("options", "greedy"),
    [
        ({}, False),
        ({"temperature": 0.0}, True),
        ({"top_k": 1}, True),
        ({"temperature": 0.0, "presence_penalty": 1.0}, False),
        ({"temperature": 0.0, "presence_penalty": 1.0, "penalty_window": 0}, True),
        ({"temperature": 0.0, "logit_bias": {1: 2.0}}, False),
    ],
)
def test_what_needs_no_sampling_graph(options: dict[str, Any], greedy: bool) -> None:
    assert SamplerSettings(**options).greedy == greedy


def test_requests_to_the_tiny_model(tmp_path: Path) -> None:
    """One captured graph serves every request; greedy settings give the reference's tokens."""
    prompt, ids, gaps = reference_greedy(Q8, "speech")
    host.activate(sms=4)
    with Driver(0) as driver, open_model(Q8, 256) as model:
        program = build_program(model, target_for("host", 4), sampling=True)
        assert [launch.nodes[0] for launch in program.step().kernels[-3:]] == ["logits", "adjusted", "tokens.2"]
        compiled = compile_program(program, "host", KernelCache(tmp_path))

        def request(engine: Engine, settings: SamplerSettings) -> list[int]:
            engine.reset()
            engine.set_constant("sampler", settings.words(4096))
            engine.feed(prompt)
            return [token for chunk in engine.decode(8) for token in chunk]

        constants = {"sampler": SamplerSettings().words(4096)}
        with Engine(driver, program, compiled, model, constants=constants) as engine:
            clear = next((at for at, gap in enumerate(gaps) if gap < 0.01), 8)
            assert request(engine, SamplerSettings(temperature=0.0))[:clear] == ids[: min(clear, 8)]
            hot = SamplerSettings(temperature=1.5, top_k=0, top_p=1.0, seed=3)
            drawn = request(engine, hot)
            assert drawn == request(engine, hot)
            others = [request(engine, replace(hot, seed=seed)) for seed in (4, 5)]
            assert len({tuple(tokens) for tokens in (drawn, *others)}) == 3
            banned = SamplerSettings(temperature=0.0, logit_bias={ids[0]: -math.inf})
            assert ids[0] not in request(engine, banned)
            unlike = SamplerSettings(temperature=0.0, presence_penalty=100.0, penalty_window=-1)
            tokens = request(engine, unlike)
            assert len({*tokens}) == 8
            assert not {*tokens} & {*prompt}
        with Engine(driver, program, compiled, model, graph=False, constants=constants) as engine:
            assert request(engine, hot) == drawn
