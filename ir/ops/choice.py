"""Ops that choose a token for each row, and move the state of its sequence on."""

from __future__ import annotations

import numpy as np

from .. import sampling
from ..op import Arrays, Attributes, EvalContext, Op, Results, Types
from ..sampling import PEAK_SPAN, SAMPLER_WORDS

NONE = -1
"""The token of a row whose logits are not finite numbers: there is nothing to choose from. It is in the log, where the
host finds it, and a step that is queued behind it embeds token 0."""


def recorded(log: np.ndarray, tokens: np.ndarray, positions: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """The log [sequences, context] with each row's token at its position."""
    changed, there = log.copy(), positions >= 0
    changed[sequences[there], positions[there]] = tokens[there]
    return changed


def stopping(
    tokens: np.ndarray, ends: np.ndarray, stop: np.ndarray, positions: np.ndarray, sequences: np.ndarray
) -> np.ndarray:
    changed = stop.copy()
    changed[sequences[(positions >= 0) & np.isin(tokens, ends)]] = 1
    return changed


def moved_on(
    tokens: np.ndarray,
    log: np.ndarray,
    ends: np.ndarray,
    stop: np.ndarray,
    positions: np.ndarray,
    sequences: np.ndarray,
) -> Arrays:
    """(tokens, log, stop, positions) after a step that chose `tokens`."""
    stop = stopping(tokens, ends, stop, positions, sequences)
    return tokens, recorded(log, tokens, positions, sequences), stop, following(positions)


def following(positions: np.ndarray) -> np.ndarray:
    """Each row's next position; an absent row stays absent."""
    return np.where(positions >= 0, positions + 1, positions).astype(np.int32)


def likeliest(logits: np.ndarray) -> np.ndarray:
    """Each row's largest logit, the lowest index of equals: i32[T]; NONE where it is infinite or one is no number."""
    return np.where(np.isfinite(logits.max(axis=-1)), np.argmax(logits, axis=-1), NONE).astype(np.int32)


def choice(logits: np.ndarray, *state: np.ndarray) -> Arrays:
    """(tokens, log, stop, positions) after a step that takes the likeliest."""
    return moved_on(likeliest(logits), *state)


def drawn(logits: np.ndarray, peaks: np.ndarray, settings: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The tokens that the settings, the seed and the positions choose: i32[T]; 0 for an absent row.

    NONE where a peak is no number, or all of them are minus infinity.
    """
    words = sampling.words_of(settings)
    random = sampling.random_words(np.maximum(positions, 0), words.seed)
    tops = peaks.max(axis=-1)
    rows = [
        NONE if np.isnan(top) or np.isneginf(top) else int(sampling.choices(row, words).at(word))
        for row, top, word in zip(logits, tops, random, strict=True)
    ]
    return np.where(positions >= 0, rows, 0).astype(np.int32)


def _sampler(t: Types) -> None:
    t.vector("sampler", SAMPLER_WORDS, dtypes="i32")


def _argmax_rule(t: Types, attrs: Attributes) -> Results:
    t.rows("logits", None)
    return (t.made(dtype="i32"),)


def _argmax(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    return (likeliest(ins[0]),)


def _adjust_rule(t: Types, attrs: Attributes) -> Results:
    (size,) = t.rows("logits", None)
    t.expect("history", "i32", (None, None))
    _sampler(t)
    t.integers("tokens", "positions", "sequences")
    return t.made(size), t.made(-(-size // PEAK_SPAN)), t["history"]


def _adjust(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    logits, tokens, history, settings, positions, sequences = ins
    words = sampling.words_of(settings)
    history = recorded(history, tokens, positions, sequences)
    rows, peaks = [], []
    for row, position, sequence in zip(logits, positions, sequences, strict=True):
        window = history[sequence, max(0, position + 1 - words.window) : position + 1]
        rows.append(sampling.adjusted(row, window, words).astype(context.dtype))
        peaks.append(np.where(sampling.peaks_of(row) < np.inf, sampling.peaks_of(rows[-1]), np.nan))
    return np.stack(rows), np.stack(peaks), history


def _draw_rule(t: Types, attrs: Attributes) -> Results:
    (size,) = t.rows("logits", None)
    t.rows("peaks", -(-size // PEAK_SPAN))
    _sampler(t)
    t.integers("positions")
    return (t.made(dtype="i32"),)


def _draw(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    return (drawn(*ins),)


def _record_rule(t: Types, attrs: Attributes) -> Results:
    t.expect("log", "i32", (None, None))
    t.integers("tokens", "positions", "sequences")
    return (t["log"],)


def _record(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    return (recorded(*ins),)


def _stop_on_rule(t: Types, attrs: Attributes) -> Results:
    t.vector("end_tokens", dtypes="i32")
    t.vector("stop", dtypes="i32")
    t.integers("tokens", "positions", "sequences")
    return (t["stop"],)


def _stop_on(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    return (stopping(*ins),)


def _advance_rule(t: Types, attrs: Attributes) -> Results:
    t.integers("positions")
    return (t.made(dtype="i32"),)


def _advance(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    return (following(ins[0]),)


def chosen_rule(t: Types, attrs: Attributes) -> Results:
    """The results of everything that chooses and moves on; who calls it has checked what stands before the log."""
    t.expect("log", "i32", (t["stop"].shape[0], None))
    t.vector("end_tokens", dtypes="i32")
    t.vector("stop", dtypes="i32")
    t.integers("positions", "sequences")
    return t.made(dtype="i32"), t["log"], t["stop"], t.made(dtype="i32")


def _choose_rule(t: Types, attrs: Attributes) -> Results:
    t.rows("logits", None)
    return chosen_rule(t, attrs)


def _choose(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    return choice(*ins)


def _draw_choose_rule(t: Types, attrs: Attributes) -> Results:
    _draw_rule(t, attrs)
    return chosen_rule(t, attrs)


def _draw_choose(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    logits, peaks, settings, *state = ins
    positions = state[-2]
    return moved_on(drawn(logits, peaks, settings, positions), *state)


_STATE = "i32[2,16] i32[8] i32[2] i32[T] i32[T]"
_LOGITS = f"f32[T,1500] f32[T,2] i32[{SAMPLER_WORDS}]"

OPS = (
    Op(
        "argmax(logits) -> tokens",
        "index of the largest logit, the lowest one of equals; -1 where it is infinite or one is no number",
        _argmax_rule,
        _argmax,
        "f32[T,96]",
    ),
    Op(
        "adjust(logits, tokens, history, sampler, positions, sequences) -> adjusted, peaks, history",
        "biases and penalties of the sampler's settings; history takes the tokens at their positions; "
        "a peak is the largest of 1024 values, no number where one of their logits is none or infinite",
        _adjust_rule,
        _adjust,
        f"f32[T,1500] i32[T] i32[2,16] i32[{SAMPLER_WORDS}] i32[T] i32[T]",
        consumes=("history",),
    ),
    Op(
        "draw(logits, peaks, sampler, positions) -> tokens",
        "a token by chance: top-k, top-p, min-p and temperature of the settings, random by seed and position; "
        "-1 where a peak is no number or all are minus infinity",
        _draw_rule,
        _draw,
        f"{_LOGITS} i32[T]",
    ),
    Op(
        "record(log, tokens, positions, sequences) -> log",
        "the log with the tokens at their positions",
        _record_rule,
        _record,
        "i32[2,16] i32[T] i32[T] i32[T]",
        consumes=("log",),
    ),
    Op(
        "stop_on(tokens, end_tokens, stop, positions, sequences) -> stop",
        "1 for a sequence that stopped or whose token is an end token",
        _stop_on_rule,
        _stop_on,
        "i32[T] i32[8] i32[2] i32[T] i32[T]",
        consumes=("stop",),
    ),
    Op("advance(positions) -> positions", "positions + 1", _advance_rule, _advance, "i32[T]"),
    Op(
        "choose(logits, log, end_tokens, stop, positions, sequences) -> tokens, log, stop, positions",
        "argmax, record, stop_on and advance",
        _choose_rule,
        _choose,
        f"f32[T,96] {_STATE}",
        consumes=("log", "stop"),
        fused=True,
    ),
    Op(
        "draw_choose(logits, peaks, sampler, log, end_tokens, stop, positions, sequences)"
        " -> tokens, log, stop, positions",
        "draw, record, stop_on and advance",
        _draw_choose_rule,
        _draw_choose,
        f"{_LOGITS} {_STATE}",
        consumes=("log", "stop"),
        fused=True,
    ),
)
