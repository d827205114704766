"""How well a model predicts a text, and how far its predictions are from saved ones.

Perplexity is exp of the mean negative log likelihood of each token given those before it in its window; the first
token of a window is given, not scored. Divergence is KL(reference || this model) in nats at every position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir.errors import PsigraphError, UsageError
from ..session import Session, check_ids
from .saved_logits import Reference

SCHEMA = "psigraph.perplexity.v1"
WINDOW = 512
_ROWS_AT_ONCE = 32  # of logits: 20 MB in a vocabulary of 151,936

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Result:
    """What a text said about a model.

    likelihoods  float64[scored]: log likelihood of each scored token, in nats.
    divergences  float64[ids]: from the reference, or None; same_choice: bool[ids], whether the likeliest token is one.
    """

    ids: int
    window: int
    likelihoods: np.ndarray
    divergences: np.ndarray | None = None
    same_choice: np.ndarray | None = None

    @property
    def perplexity(self) -> float | None:
        """None where nothing was scored: a text of one token."""
        return float(np.exp(-self.likelihoods.mean())) if len(self.likelihoods) else None

    @property
    def uncertainty(self) -> float | None:
        """The standard error of the perplexity, from the spread of the likelihoods."""
        count = len(self.likelihoods)
        if count < 2:
            return None
        return float(np.exp(-self.likelihoods.mean()) * self.likelihoods.std(ddof=1) / np.sqrt(count))

    def record(self) -> dict[str, Any]:
        """Plain values for a report."""
        found: dict[str, Any] = {
            "tokens": self.ids,
            "window": self.window,
            "scored": len(self.likelihoods),
            "perplexity": self.perplexity,
            "perplexity_standard_error": self.uncertainty,
        }
        if self.divergences is not None and self.same_choice is not None:
            found["divergence"] = {
                "unit": "nats, KL(reference || model)",
                "mean": float(self.divergences.mean()),
                "p99": float(np.quantile(self.divergences, 0.99)),
                "largest": float(self.divergences.max()),
                "largest_at": int(self.divergences.argmax()),
                "same_likeliest_token": float(self.same_choice.mean()),
            }
        return found


def measure(
    session: Session,
    ids: Sequence[int],
    window: int,
    reference: Reference | None = None,
    keep: list[np.ndarray] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Run a text through a session that was opened with outputs=("logits",).

    window: tokens that are read before the context is emptied, at most the session's. keep: gets the logits,
    float32[rows, vocabulary] piece by piece. UsageError for ids or a window that cannot be, or a reference whose
    vocabulary is another.
    """
    check_ids(ids, session.vocabulary)
    if not 1 <= window <= session.context:
        raise UsageError(f"a window of {window} tokens; it is at least 1 and at most the context, {session.context}")
    if reference is not None and reference.logits.shape != (len(ids), session.vocabulary):
        raise UsageError(
            f"{reference.name}: {reference.key} is {list(reference.logits.shape)}; this model gives "
            f"[{len(ids)}, {session.vocabulary}] for these ids"
        )
    likelihoods, divergences, same = [], [], []
    for first, rows in _rows(session, ids, window):
        if keep is not None:
            keep.append(rows.astype(np.float32))
        if not np.isfinite(rows).all():
            at = first + int(np.isfinite(rows).all(-1).argmin())
            raise PsigraphError(f"logits at position {at} are not finite numbers; the weights or a kernel are at fault")
        own = log_probabilities(rows)
        after = np.arange(first, first + len(rows)) + 1
        scored = (after < len(ids)) & (after % window != 0)
        following = np.asarray(ids)[np.minimum(after, len(ids) - 1)]
        likelihoods.append(own[np.arange(len(rows)), following][scored])
        if reference is not None:
            saved = log_probabilities(reference.logits[first : first + len(rows)])
            with np.errstate(invalid="ignore"):
                terms = np.where(np.isneginf(saved), 0.0, np.exp(saved) * (saved - own))
            divergences.append(terms.sum(-1))
            same.append(saved.argmax(-1) == own.argmax(-1))
        if progress:
            progress(first + len(rows), len(ids))
    return Result(
        len(ids),
        window,
        np.concatenate(likelihoods),
        np.concatenate(divergences) if reference is not None else None,
        np.concatenate(same) if reference is not None else None,
    )


def _rows(session: Session, ids: Sequence[int], window: int) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first id, logits after it and those that follow), all ids in order."""
    for start in range(0, len(ids), window):
        session.reset()
        end = min(start + window, len(ids))
        for first in range(start, end, _ROWS_AT_ONCE):
            yield first, session.forced_logits(ids[first : min(first + _ROWS_AT_ONCE, end)])


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """float64 log softmax of every row."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
