"""What sampling means, in numpy, bit for bit as the kernels compute it.

A choice must be the same on every machine, eager or replayed. So no sum here depends on its
order: a token's weight is a whole number, 2^39 for the likeliest, and sums of whole numbers
are exact. The few operations on float32 are single IEEE additions and multiplications, which
no compiler may fuse, and logits are taken as float32 whatever the interpreter computes in.

The settings are one constant of 32-bit words, so that one captured graph serves all of them
(`psigraph.text.sampler.SamplerSettings` packs it):

    word  type  content
    0     i32   top_k: how many tokens stay; 0: all
    1     u32   top_p * 2^32; 0: off
    2     f32   min_p: tokens further than this below the largest logit go; infinity: off
    3     f32   log2(e) / temperature
    4     f32   bins of the search for each unit of a logit (`codegen`'s concern)
    5     f32   repetition penalty: negative logits of tokens in the window times this
    6     f32   1 / repetition penalty: positive ones times this
    7     f32   presence penalty: less, once
    8     f32   frequency penalty: less, for every time in the window
    9     i32   window: how many of the last tokens count, this step's own included; 0: none
    10    u32   seed, lower half
    11    u32   seed, upper half
    12    i32   number of biases, at most BIAS_SLOTS
    16    i32   tokens of the biases
    1040  f32   biases
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BIAS_SLOTS = 1024
BIAS_TOKENS = 16
BIAS_VALUES = BIAS_TOKENS + BIAS_SLOTS
SAMPLER_WORDS = BIAS_VALUES + BIAS_SLOTS
PEAK_SPAN = 1024  # logits that one peak stands for
LOG2_E = np.float32(1.4426950408889634)

_WHOLE_BITS = 39  # weight of the largest logit: 2^39, so that 2^24 tokens' weights fit into 63 bits
_FRACTION_BITS = 24
# ln(2)^k / k! * 2^32 for k = 1..9: the Taylor series of 2^-x, good to 2^-31 on [0, 1).
SERIES = (2977044472, 1031764991, 238388332, 41309550, 5726720, 661577, 65510, 5676, 437)


@dataclass(frozen=True)
class Words:
    """The constant, read: names as in the module's table."""

    top_k: int
    top_p: int
    min_p: np.float32
    sharpness: np.float32
    repetition: np.float32
    repetition_inverse: np.float32
    presence: np.float32
    frequency: np.float32
    window: int
    seed: tuple[int, int]
    bias_tokens: np.ndarray
    biases: np.ndarray


def words_of(block: np.ndarray) -> Words:
    """What an i32[SAMPLER_WORDS] says."""
    whole = np.ascontiguousarray(block, np.int32)
    bits, numbers = whole.view(np.uint32), whole.view(np.float32)
    count = int(whole[12])
    return Words(
        top_k=int(whole[0]),
        top_p=int(bits[1]),
        min_p=numbers[2],
        sharpness=numbers[3],
        repetition=numbers[5],
        repetition_inverse=numbers[6],
        presence=numbers[7],
        frequency=numbers[8],
        window=int(whole[9]),
        seed=(int(bits[10]), int(bits[11])),
        bias_tokens=whole[BIAS_TOKENS : BIAS_TOKENS + count],
        biases=numbers[BIAS_VALUES : BIAS_VALUES + count],
    )


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11).

    counter: uint32[..., 4]; key: two 32-bit words. Returns uint32[..., 4].
    """
    low = np.uint64(0xFFFFFFFF)
    c = [counter[..., index].astype(np.uint64) for index in range(4)]
    k0, k1 = key
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c = [
            (second >> shift) ^ c[1] ^ np.uint64(k0),
            second & low,
            (first >> shift) ^ c[3] ^ np.uint64(k1),
            first & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=-1).astype(np.uint32)


def random_words(positions: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """One uint64 for every position: the first two words of Philox at counter (position, 0, 0, 0)."""
    counter = np.zeros((*positions.shape, 4), np.uint32)
    counter[..., 0] = positions
    drawn = philox(counter, seed).astype(np.uint64)
    return np.asarray(drawn[..., 1] << np.uint64(32) | drawn[..., 0])


def adjusted(logits: np.ndarray, seen: np.ndarray, words: Words) -> np.ndarray:
    """Biases, then penalties: float32[vocabulary]. What is not a number becomes -infinity.

    seen: the tokens in the window.
    """
    out = logits.astype(np.float32)
    size = len(out)
    with np.errstate(all="ignore"):
        inside = (words.bias_tokens >= 0) & (words.bias_tokens < size)
        out[words.bias_tokens[inside]] += words.biases[inside]
        counts = np.bincount(seen[(seen >= 0) & (seen < size)], minlength=size)
        at = np.flatnonzero(counts)
        was = out[at]
        scaled = np.where(was <= 0, was * words.repetition, was * words.repetition_inverse)
        out[at] = scaled - (counts[at].astype(np.float32) * words.frequency + words.presence)
        return np.where(np.isnan(out), np.float32(-np.inf), out + np.float32(0))  # -0 becomes 0


def peaks_of(values: np.ndarray) -> np.ndarray:
    """The largest of every PEAK_SPAN values."""
    return np.maximum.reduceat(values, np.arange(0, len(values), PEAK_SPAN))


def weights_of(distance: np.ndarray, sharpness: np.float32) -> np.ndarray:
    """floor(2^39 * 2^-(distance * sharpness)) as uint64; before the floor it is off by at most 2e-6 of itself."""
    with np.errstate(all="ignore"):
        exponent = distance * sharpness
    alive = exponent < _WHOLE_BITS + 1
    fixed = (np.where(alive, exponent, 0) * np.float32(1 << _FRACTION_BITS)).astype(np.uint64)
    fraction = (fixed & np.uint64((1 << _FRACTION_BITS) - 1)) << np.uint64(32 - _FRACTION_BITS)
    sum_ = np.full_like(fraction, SERIES[-1])
    for coefficient in SERIES[-2::-1]:
        sum_ = np.uint64(coefficient) - (sum_ * fraction >> np.uint64(32))
    power = np.uint64(1 << 32) - (sum_ * fraction >> np.uint64(32))
    shifted = (power << np.uint64(_WHOLE_BITS - 32)) >> (fixed >> np.uint64(_FRACTION_BITS))
    return np.where(alive, shifted, np.uint64(0))


@dataclass(frozen=True)
class Choices:
    """Tokens that the filters leave, likeliest first (the lowest of equals), and sums of their weights."""

    tokens: np.ndarray
    reach: np.ndarray

    def at(self, random: np.ndarray) -> np.ndarray:
        """The tokens that random uint64s choose: the first whose sum exceeds random * total / 2^64."""
        total = self.reach[-1]
        half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
        # The upper half of a product of 128 bits.
        cross = (random & low) * (total >> half) + ((random & low) * (total & low) >> half)
        upper = (random >> half) * (total & low) + (cross & low)
        target = (random >> half) * (total >> half) + (cross >> half) + (upper >> half)
        return np.asarray(self.tokens[np.searchsorted(self.reach, target, side="right")])


def choices(values: np.ndarray, words: Words) -> Choices:
    """top-k, top-p and min-p, then temperature, of adjusted logits."""
    values = values.astype(np.float32)
    bits = values.view(np.uint32)
    keys = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))
    order = np.argsort(~keys, kind="stable")
    if 0 < words.top_k < len(order):
        order = order[: words.top_k]
    values = values[order]
    with np.errstate(invalid="ignore"):
        # The largest itself may be infinite.
        distance = np.where(values == values[0], np.float32(0), values[0] - values)
    if words.top_p:
        reach = np.cumsum(weights_of(distance, LOG2_E))
        target = max(1, int(reach[-1]) * words.top_p >> 32)
        kept = int(np.searchsorted(reach, np.uint64(target))) + 1
        order, distance = order[:kept], distance[:kept]
    near = distance <= words.min_p
    return Choices(order[near], np.cumsum(weights_of(distance[near], words.sharpness)))
