"""How well a model predicts a text, and how far its predictions are from saved ones.

Perplexity is exp of the mean negative log likelihood of each token given those before it in its window; the first
token of a window is given, not scored. Divergence is KL(reference || this model) in nats at every position.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.errors import OutputError, PsigraphError, UsageError
from ..json_file import check_writable, read_json
from ..runtime.whole_files import whole_file
from ..session import Session, check_ids

SCHEMA = "psigraph.perplexity.v1"
WINDOW = 512
_ROWS_AT_ONCE = 32  # of logits: 20 MB in a vocabulary of 151,936

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Reference:
    """Saved logits: after ids[i], read in windows of `window`, logits[i]."""

    name: str
    key: str
    ids: list[int]
    window: int
    logits: np.ndarray


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


def load_reference(path: str | os.PathLike[str], tier: str, key: str | None = None) -> Reference:
    """Saved logits out of an .npz file, or the one that a report of `psigraph perplexity` names.

    The file holds ids, int[n], and logits, float[n, vocabulary], under `key`: by itself `logits`, or `logits_` and the
    tier of the model ("Q4_K_M"), or the only one there is. It may hold window, the size of the windows.
    UsageError where it is not like that.
    """
    source = Path(path)
    if source.suffix == ".json":
        named = read_json(source).get("logits_file")
        if not isinstance(named, str):
            raise UsageError(f"{source}: this report names no logits_file; --save-logits makes one")
        source = source.parent / named
    try:
        with np.load(source, allow_pickle=False) as stored:
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise ValueError
            names = [name for name in stored.files if name.startswith("logits")]
            chosen = key or next(
                (name for name in ("logits", f"logits_{tier.lower()}") if name in names),
                names[0] if len(names) == 1 else "",
            )
            if chosen not in stored.files or "ids" not in stored.files:
                raise UsageError(
                    f"{source}: needs ids and {chosen or 'logits'}; it holds {', '.join(stored.files) or 'nothing'}"
                    + ("; choose with --key" if len(names) > 1 else "")
                )
            ids, logits = stored["ids"], stored[chosen]
            window = int(stored["window"]) if "window" in stored.files else len(ids)
    except OSError as error:
        raise UsageError(f"{source}: cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, MemoryError):
        raise UsageError(f"{source}: is no .npz file of plain arrays") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids) or window < 1:
        raise UsageError(f"{source}: ids must be a list of whole numbers, and a window at least 1")
    if logits.ndim != 2 or logits.dtype.kind != "f" or len(logits) != len(ids):
        raise UsageError(f"{source}: {chosen} must be float[{len(ids)}, vocabulary], one row for every id")
    if np.isnan(logits).any() or not np.isfinite(logits.max(-1)).all():
        raise UsageError(f"{source}: {chosen} holds values that are no logits")
    return Reference(source.name, chosen, ids.tolist(), window, logits)


def save_logits(path: str | os.PathLike[str], ids: Sequence[int], window: int, rows: Sequence[np.ndarray]) -> None:
    """Write what `load_reference` reads, whole or not at all; OutputError where that fails."""
    check_writable(path)
    target = Path(os.path.realpath(path))  # a link stays, what it points to is replaced
    try:
        with whole_file(target, 0o666) as file:
            np.savez(file, ids=np.asarray(ids, np.int32), window=np.int32(window), logits=np.concatenate(rows))
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from None
