"""The meaning of sampling: known answers, and every filter against a softmax in float64."""

import numpy as np
import pytest

from psigraph.ir import sampling
from psigraph.ir.sampling import adjusted, choices, philox, random_words, words_of
from psigraph.text.sampler import SamplerSettings

DRAWS = 100_000
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}
FILTERS = {
    "none": {},
    "top_k": {"top_k": 9},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.07},
    "cold": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "combined": {"top_k": 20, "top_p": 0.93, "min_p": 0.02, "temperature": 0.8},
    "qwen3": {"top_k": 20, "top_p": 0.95, "temperature": 0.6},
}


def softmax_after_filters(logits, settings):
    """Probabilities in float64, written as the options are explained: llama.cpp's order."""
    order = np.argsort(-logits, kind="stable")
    if settings.top_k:
        order = order[: settings.top_k]
    plain = np.exp(logits[order].astype(np.float64) - logits.max())
    plain /= plain.sum()
    kept = 1 + np.searchsorted(np.cumsum(plain), settings.top_p) if settings.top_p < 1 else len(order)
    order, plain = order[:kept], plain[:kept]
    order = order[plain >= settings.min_p * plain[0]]
    tempered = np.exp((logits[order].astype(np.float64) - logits.max()) / settings.temperature)
    found = np.zeros(len(logits))
    found[order] = tempered / tempered.sum()
    return found


def deviations(tokens, probabilities):
    """Chi-square of draws, in standard deviations of a normal number (Wilson and Hilferty)."""
    expected = probabilities * len(tokens)
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert not counts[probabilities == 0].any()
    rare = expected < 10
    pairs = np.c_[np.r_[counts[~rare], counts[rare].sum()], np.r_[expected[~rare], expected[rare].sum()]]
    pairs = pairs[pairs[:, 1] > 0]
    chi, free = ((pairs[:, 0] - pairs[:, 1]) ** 2 / pairs[:, 1]).sum(), len(pairs) - 1
    return (np.cbrt(chi / free) - (1 - 2 / (9 * free))) / np.sqrt(2 / (9 * free))


def test_philox_gives_the_known_answers():
    # Random123's kat_vectors, philox4x32 with 10 rounds.
    known = [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0),
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]  # fmt: skip
    for counter, key, wanted in known:
        assert philox(np.array(counter, np.uint32), key).tolist() == wanted


def test_random_words_differ_by_position_and_seed():
    positions = np.arange(1000)
    found = np.concatenate([random_words(positions, (seed, high)) for seed in (0, 1) for high in (0, 1)])
    assert len(set(found.tolist())) == 4000


def test_weights_are_powers():
    distance = np.linspace(0, 20, 100_001, dtype=np.float32)
    found = sampling.weights_of(distance, sampling.LOG2_E)
    wanted = np.exp(-distance.astype(np.float64)) * 2**39
    # The product is rounded to float32 at 29 or less: 2^-20 * ln 2; then comes the floor.
    assert (np.abs(found - wanted) <= 2e-6 * wanted + 1).all()
    assert found[0] == 2**39
    assert (np.diff(found.astype(np.int64)) <= 0).all()
    assert sampling.weights_of(np.array([28, 1e30, np.inf], np.float32), sampling.LOG2_E).tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("spread", [0.5, 1.5])
def test_chi_square_of_every_filter(name, spread):
    settings = SamplerSettings(**{**OFF, **FILTERS[name]}, seed=11)
    logits = (np.random.default_rng(5).standard_normal(60) * spread).astype(np.float32)
    words = words_of(settings.words())
    found = choices(logits, words)
    wanted = softmax_after_filters(logits, settings)
    shares = np.zeros(len(logits))
    shares[found.tokens] = np.diff(found.reach.astype(np.float64), prepend=0) / float(found.reach[-1])
    np.testing.assert_allclose(shares, wanted, rtol=1e-5, atol=1e-9)
    tokens = found.at(random_words(np.arange(DRAWS), words.seed))
    assert abs(deviations(tokens, wanted)) < 3.5


def test_chi_square_sees_a_wrong_temperature():
    logits = np.random.default_rng(5).standard_normal(60).astype(np.float32)
    words = words_of(SamplerSettings(**{**OFF, "temperature": 1.05}).words())
    tokens = choices(logits, words).at(random_words(np.arange(DRAWS), words.seed))
    assert deviations(tokens, softmax_after_filters(logits, SamplerSettings(**OFF))) > 5


def test_biases_and_penalties_as_formulas():
    settings = SamplerSettings(
        repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.2, logit_bias={2: 1.5, 5: -np.inf}
    )
    logits = np.array([2.0, -2.0, 1.0, 0.5, -1.0, 9.0])
    found = adjusted(logits, np.array([0, 1, 1, 2]), words_of(settings.words()))
    wanted = [2 / 1.5 - 0.3 - 0.2, -2 * 1.5 - 0.3 - 0.4, 2.5 / 1.5 - 0.3 - 0.2, 0.5, -1, -np.inf]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_what_is_no_number_is_never_drawn():
    words = words_of(SamplerSettings(**OFF).words())
    clean = adjusted(np.array([np.nan, 1.0, -0.0, np.nan]), np.array([], int), words)
    assert clean.tolist() == [-np.inf, 1, 0, -np.inf]
    assert not np.signbit(clean[2])
    tokens = choices(clean, words).at(random_words(np.arange(1000), (0, 0)))
    assert set(tokens.tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("logits", "wanted"),
    [
        ([-np.inf, -np.inf, -40.0, -np.inf], {2}),
        ([0.0, np.inf, 3.0, np.inf], {1, 3}),
        ([-np.inf] * 4, {0, 1, 2, 3}),
        ([1.0, 1.0, 0.0, 1.0], {0, 1, 3}),
    ],
)
def test_infinities_and_ties(logits, wanted):
    words = words_of(SamplerSettings(**{**OFF, "top_k": 4, "min_p": 0.9}).words())
    tokens = choices(np.array(logits, np.float32), words).at(random_words(np.arange(1000), (0, 0)))
    assert set(tokens.tolist()) == wanted
    first = words_of(SamplerSettings(top_k=1).words())
    assert choices(np.array(logits, np.float32), first).tokens.tolist() == [int(np.argmax(logits))]


def test_a_draw_is_the_share_of_the_random_word():
    found = sampling.Choices(np.array([7, 3]), np.array([3 << 50, (3 << 50) + (1 << 50)], np.uint64))
    edge = 3 * 2**62
    assert found.at(np.array([0, edge - 1, edge, 2**64 - 1], np.uint64)).tolist() == [7, 7, 3, 3]
