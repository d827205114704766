"""How the next token is drawn: the settings that people give, checked, as the words that kernels read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..ir.errors import UsageError
from ..ir.sampling import BIAS_SLOTS, BIAS_TOKENS, BIAS_VALUES, SAMPLER_WORDS

MOST_TEMPERATURE = 100.0
MOST_BIAS = float(np.finfo(np.float32).max)  # what kernels add
SEEDS = 1 << 64
# Bins of the kernels' search: 1024 of them reach 32 units of a logit far at temperature 1. Weights end at 27.8 units
# (40 bits), so that the last bin, which holds all that is further, weighs nothing.
_BINS_PER_UNIT = 32.0


@dataclass(frozen=True)
class SamplerSettings:
    """Options of one request; in the order in which they act, which is llama.cpp's.

    logit_bias          token id -> what is added to its logit; -infinity forbids it. At most 1,024 tokens.
    repetition_penalty  > 0: positive logits of tokens in the window are divided by it, others multiplied. 1: off.
    presence_penalty    subtracted from the logits of tokens in the window. 0: off.
    frequency_penalty   subtracted for every time that a token is in the window. 0: off.
    penalty_window      how many of the last tokens count, prompt included. -1: all; 0: none.
    top_k               this many likeliest tokens stay. 0: all.
    top_p               then the fewest likeliest whose probabilities reach it. 1: off.
    min_p               then those of at least this part of the likeliest one's probability. 0: off.
    temperature         probabilities are softmax(logits / temperature); 0: always the likeliest.
    seed                0 to 2^64 - 1: the same seed draws the same tokens.

    UsageError names an option that is out of range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0, MOST_TEMPERATURE)
        _within("top_p", self.top_p, 0, 1)
        _within("min_p", self.min_p, 0, 1)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _within("presence_penalty", self.presence_penalty, -100, 100)
        _within("frequency_penalty", self.frequency_penalty, -100, 100)
        _whole("top_k", self.top_k, 0, (1 << 31) - 1)
        _whole("penalty_window", self.penalty_window, -1, (1 << 31) - 1)
        _whole("seed", self.seed, 0, SEEDS - 1)
        if not isinstance(self.logit_bias, Mapping):
            raise UsageError(
                f"logit_bias is {_shown(self.logit_bias)}; give token ids and what is added to their logits"
            )
        if len(self.logit_bias) > BIAS_SLOTS:
            raise UsageError(f"logit_bias: {len(self.logit_bias)} tokens; at most {BIAS_SLOTS} are supported")
        for token, bias in self.logit_bias.items():
            _whole("logit_bias", token, 0, (1 << 31) - 1)
            if not isinstance(bias, (int, float)) or not (bias == -math.inf or abs(bias) <= MOST_BIAS):
                raise UsageError(
                    f"logit_bias of token {token} is {_shown(bias)}; give a number, or -infinity to forbid it; "
                    f"numbers end at {MOST_BIAS:.3g}"
                )

    @property
    def greedy(self) -> bool:
        """Whether the choice is that of the largest logit, so that a graph without sampling gives it faster."""
        return (self.temperature == 0 or self.top_k == 1) and not self.logit_bias and not self._penalises

    @property
    def _penalises(self) -> bool:
        neutral = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1, 0, 0)
        return not neutral and self.penalty_window != 0

    def record(self) -> dict[str, Any]:
        """For a report: every option; biases by the token's number, as text, since JSON has no infinity."""
        biases = {str(token): str(float(bias)) for token, bias in sorted(self.logit_bias.items())}
        return {**asdict(self), "logit_bias": biases}

    def words(self, vocabulary: int | None = None) -> np.ndarray:
        """The constant `sampler`: int32[SAMPLER_WORDS], laid out as `ir.sampling` says.

        vocabulary: number of token ids; UsageError names a biased token beyond it.
        """
        for token in self.logit_bias:
            if vocabulary is not None and token >= vocabulary:
                raise UsageError(
                    f"logit_bias: token id {token} is outside the vocabulary; ids are 0 to {vocabulary - 1}"
                )
        greedy = self.temperature == 0
        temperature = 1.0 if greedy else self.temperature
        words = np.zeros(SAMPLER_WORDS, np.int32)
        bits, numbers = words.view(np.uint32), words.view(np.float32)
        words[0] = 1 if greedy else self.top_k
        bits[1] = 0 if self.top_p >= 1 else max(1, int(self.top_p * 2**32))
        numbers[2] = -math.log(self.min_p) if self.min_p > 0 else math.inf
        # Larger than any finite number would be a temperature of 0.
        numbers[3] = min(math.log2(math.e) / temperature, 1e38)
        numbers[4] = _BINS_PER_UNIT / max(1.0, temperature)
        numbers[5:9] = (
            self.repetition_penalty, 1 / self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        )  # fmt: skip
        words[9] = 0 if not self._penalises else (1 << 31) - 1 if self.penalty_window < 0 else self.penalty_window
        bits[10], bits[11] = self.seed & 0xFFFFFFFF, self.seed >> 32
        words[12] = len(self.logit_bias)
        words[BIAS_TOKENS : BIAS_TOKENS + len(self.logit_bias)] = list(self.logit_bias)
        numbers[BIAS_VALUES : BIAS_VALUES + len(self.logit_bias)] = list(self.logit_bias.values())
        return words


def sampler_settings(given: dict[str, Any]) -> SamplerSettings:
    """Greedy for nothing given, else the defaults with what is given; UsageError names a field that is none."""
    if not given:
        return SamplerSettings(temperature=0.0)
    known = SamplerSettings.__dataclass_fields__
    for name in given:
        if name not in known:
            raise UsageError(f"{name} is no option of sampling; the options are {', '.join(known)}")
    # Notebooks compute them: numpy's numbers are numbers.
    return SamplerSettings(**{name: one.item() if isinstance(one, np.generic) else one for name, one in given.items()})


def _within(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UsageError(f"{name} is {_shown(value)}; it must be a number from {low:g} to {high:g}")


def _whole(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} is {_shown(value)}; it must be a whole number from {low} to {high}")


def _shown(value: object) -> str:
    """A value for a message of one line: saved chats hold anything."""
    return ascii(str(value))[1:-1][:40]
