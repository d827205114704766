"""The medical guard of text surfaces: refuses what the medical policy refuses, and adds its disclaimer.

The rules are data (models/medpsy.yaml, `guard`); this module reads them. It sees the words of a request, not its
meaning: docs/MEDPSY_BENCHMARK.md says what that cannot do.

    guard = guard_for(admission)            # None where the policy is not active
    decision = guard.classify(request)
    if decision.refused:
        print(decision.message)
    else:
        for piece in guard.stream(pieces): ...
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .policy import Admission, load_policy

# What a reader does not see but a pattern would stumble over: zero-width and direction marks, soft hyphens.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
_QUOTES = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201b": "'", "\u02bc": "'", "`": "'", "\u201c": '"', "\u201d": '"'}
)
_WORD = re.compile(r"\{([a-z_]+)\}")
# A request is read in overlapping windows, so that the time a rule can take grows with the text and no faster.
_WINDOW = 4096
_OVERLAP = 512


@dataclass(frozen=True)
class Decision:
    """What the guard says about a request. `message` is the answer to give instead, "" where it is allowed."""

    refused: bool
    region: str = ""
    rule: str = ""
    message: str = ""


@dataclass(frozen=True)
class _Rule:
    name: str
    region: str
    any: re.Pattern[str]
    unless: re.Pattern[str] | None

    def refuses(self, text: str) -> bool:
        return self.any.search(text) is not None and (self.unless is None or self.unless.search(text) is None)


class Guard:
    """The guard with the rules of a policy file's `guard` section."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        """data: disclaimer, emergency_referral, regions, words, rules; KeyError or re.error where they are wrong."""
        self.disclaimer: str = data["disclaimer"]
        self.emergency_referral: str = data["emergency_referral"]
        self._answers: Mapping[str, str] = data["regions"]
        words: dict[str, str] = {}
        for name, pattern in data["words"].items():
            words[name] = _expand(pattern, words)
        self._rules = tuple(
            _Rule(
                name=row["rule"],
                region=row["region"],
                any=_compile(row["any"], words),
                unless=_compile(row["unless"], words) if "unless" in row else None,
            )
            for row in data["rules"]
        )
        unknown = {rule.region for rule in self._rules} - set(self._answers)
        if unknown:
            raise KeyError(f"guard.regions: no answer for {', '.join(sorted(unknown))}")

    def classify(self, request: str, previous: str = "") -> Decision:
        """Decide about one request of a user.

        previous: the user's turn before this one in a chat, so that "and how many for my son?" is read with what
        it speaks of. A previous turn that was refused by itself is left out: it must not refuse all that follows.
        """
        text = normalise(request)
        decision = self._classify(text)
        if decision.refused or not previous:
            return decision
        before = normalise(previous)
        return decision if self._classify(before).refused else self._classify(f"{before[-_OVERLAP:]} {text}")

    def stream(self, pieces: Iterable[str]) -> Generator[str, None, None]:
        """The pieces of an answer with the disclaimer before them: an answer that is cut short still carries it."""
        yield f"{self.disclaimer}\n\n"
        yield from pieces

    def _classify(self, text: str) -> Decision:
        starts = range(0, max(1, len(text) - _OVERLAP), _WINDOW - _OVERLAP)
        windows = [text[start : start + _WINDOW] for start in starts]
        for rule in self._rules:
            if any(rule.refuses(window) for window in windows):
                return Decision(True, rule.region, rule.name, self._answer(rule.region))
        return Decision(False)

    def _answer(self, region: str) -> str:
        answer = self._answers[region]
        if region == "emergency_triage":
            return f"{self.emergency_referral} {answer}"
        return f"{answer} {self.disclaimer}"


def guard_for(admission: Admission) -> Guard | None:
    """The guard where the medical policy is active for the loaded file, else None."""
    return Guard(load_policy().data["guard"]) if admission.policy_active else None


def normalise(text: str) -> str:
    """What the patterns are matched against: compatibility forms, lower case, plain quotes, single spaces."""
    plain = unicodedata.normalize("NFKC", text).translate(_QUOTES)
    return " ".join(_INVISIBLE.sub("", plain).casefold().split())


def _expand(pattern: str, words: Mapping[str, str]) -> str:
    return _WORD.sub(lambda match: words[match[1]], pattern.strip())


def _compile(patterns: Iterable[str], words: Mapping[str, str]) -> re.Pattern[str]:
    texts = []
    for pattern in patterns:
        text = _expand(pattern, words)
        texts.append(text.replace(" ~~ ", r"\b.{0,200}?").replace(" ~ ", r"\b[^.!?;]{0,60}?"))
    return re.compile("|".join(f"(?:{text})" for text in texts))
