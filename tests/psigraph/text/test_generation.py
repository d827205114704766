"""Runs: where they end, what they say about it, whole characters, stop strings, and prompts that are not fed twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from listed import Listed
from tiny_model import Q4, reference_greedy

from psigraph.ir.errors import UsageError
from psigraph.options import SessionOptions
from psigraph.runtime.gguf.file import open_gguf
from psigraph.runtime.tokenizer.bpe import Tokenizer
from psigraph.session import Session, open_session
from psigraph.text.generation import GREEDY, Decoder, Limits, TextRun, TokenRun
from psigraph.text.sampler import SamplerSettings
from psigraph.text.stop_strings import StopStrings


class Counting:
    """A session whose model counts upwards: after token n comes n + 1. Its engine runs ahead, as a GPU's does."""

    backend, vocabulary, end_tokens, fed_at_once = "cuda", 256, (250,), 512
    larger_context = ""

    def __init__(self, context: int = 64, chunk: int = 4) -> None:
        self.context, self.position, self.chunk = context, 0, chunk
        self.fed: list[list[int]] = []
        self.seen: list[str] = []
        self.samplers: list[SamplerSettings] = []
        self.engine = SimpleNamespace(chosen=lambda: self.fed[-1][-1] + 1, has_logits=False)

    def check_sampler(self, settings: SamplerSettings, may_change: bool = False) -> None:
        settings.words(self.vocabulary)

    def set_sampler(self, settings: SamplerSettings) -> None:
        self.samplers.append(settings)

    def rewind(self, position: int) -> None:
        assert 0 <= position <= self.position
        self.position = position

    def feed(self, ids: Sequence[int]) -> None:
        self.fed.append(list(ids))
        self.position += len(ids)

    def decode(self, count: int) -> Iterator[list[int]]:
        first = self.fed[-1][-1] + 1
        for begin in range(0, count, self.chunk):
            tokens = list(range(first + begin, first + min(count, begin + self.chunk)))
            self.position += len(tokens) - (begin == 0)
            assert self.position <= self.context
            self.seen.append(f"chunk {tokens}")
            yield tokens


def decoder(**options: int) -> tuple[Decoder, Counting]:
    session = Counting(**options)
    return Decoder(session), session  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "most", "wanted", "reason"),
    [
        ([5], 1, [6], "length"),
        ([5], 6, [6, 7, 8, 9, 10, 11], "length"),
        ([247], 6, [248, 249], "end"),
        ([249], 6, [], "end"),
        ([1, 5], 62, list(range(6, 68)), "length"),
        ([1, 5], 63, list(range(6, 69)), "length"),
        ([1, 5], 64, list(range(6, 69)), "context"),
        ([1, 5], None, list(range(6, 69)), "context"),
        ([5] * 64, None, [6], "context"),
    ],
)
def test_where_a_run_ends(prompt: list[int], most: int | None, wanted: list[int], reason: str) -> None:
    run = decoder()[0].run(prompt, Limits(most))
    assert run.reason == ""
    assert list(run) == run.ids == wanted
    assert run.reason == reason
    assert list(run) == []


def test_end_tokens_may_be_ignored() -> None:
    run = decoder()[0].run([248], Limits(4, ignore_end=True))
    assert list(run) == [249, 250, 251, 252]
    assert run.reason == "length"


def test_tokens_are_given_as_they_come() -> None:
    decoding, session = decoder(chunk=2)
    for token in decoding.run([1], Limits(5)):
        session.seen.append(f"shown {token}")
    assert session.seen == [
        "shown 2", "chunk [2, 3]", "shown 3", "chunk [4, 5]", "shown 4", "shown 5", "chunk [6]", "shown 6"
    ]  # fmt: skip


def test_a_run_can_be_stopped_before_any_token_and_between_two() -> None:
    decoding, session = decoder()
    assert list(decoding.run([1], Limits(9, cancelled=lambda: True))) == []
    assert session.fed == []
    answers = iter([False, False, False, True])
    run = decoding.run([1], Limits(9, cancelled=lambda: next(answers)))
    assert list(run) == [2, 3]
    assert run.reason == "interrupted"
    early = decoding.run([1], Limits(9))
    assert next(early) == 2
    early.close()
    assert (early.reason, list(early), early.ids) == ("interrupted", [], [2])
    early.close()
    run.close()
    assert run.reason == "interrupted"


def test_a_prompt_that_goes_on_from_what_the_caches_hold_is_not_fed_again() -> None:
    decoding, session = decoder()
    assert list(decoding.run([1, 2, 3], Limits(3))) == [4, 5, 6]
    # The engine ran ahead of what was taken or stands before the last token; either way only the rest is fed.
    follow = decoding.run([1, 2, 3, 4, 5, 6, 9], Limits(1))
    assert list(follow) == [10]
    assert (session.fed[1:], follow.reused_tokens, follow.prompt_tokens) == ([[6, 9]], 5, 7)
    other = decoding.run([1, 2, 8, 4], Limits(1))
    assert list(other) == [5]
    assert (session.fed[2:], other.reused_tokens) == ([[8, 4]], 2)
    same = decoding.run([1, 2, 8, 4], Limits(1))
    assert list(same) == [5]
    assert (session.fed[3:], same.reused_tokens) == ([[4]], 3)
    decoding.forget()
    assert list(decoding.run([1, 2], Limits(1))) == [3]
    assert session.fed[4:] == [[1, 2]]


def test_a_run_is_written_before_another_begins() -> None:
    decoding, session = decoder()
    settings = SamplerSettings(temperature=0, seed=5)
    first, second = decoding.run([1], Limits(6)), decoding.run([7], Limits(2, settings))
    assert next(first) == 2
    assert session.samplers == [GREEDY]  # a run that has not begun decides nothing for one that has
    assert next(second) == 8
    assert session.samplers == [GREEDY, settings]
    assert first.ids == [2, 3, 4, 5, 6, 7]
    assert next(first) == 3
    assert list(second) == [9]
    assert (list(first), first.reason, second.reason) == ([4, 5, 6, 7], "length", "length")


def test_a_run_that_nobody_has_any_more_is_not_written() -> None:
    decoding, session = decoder()
    dropped = decoding.run([1], Limits(30))
    assert next(dropped) == 2
    del dropped
    seen = len(session.seen)
    assert list(decoding.run([7], Limits(1))) == [8]
    assert len(session.seen) == seen


def test_a_run_that_is_dropped_while_another_waits_for_it_is_not_written_on() -> None:
    decoding, session = decoder(chunk=1)
    runs = [decoding.run([1], Limits(40))]
    assert next(runs[0]) == 2
    fine = session.decode

    def dropping(count: int) -> Iterator[list[int]]:
        for tokens in fine(count):
            if len(session.seen) == 5:
                runs.clear()
            yield tokens

    session.decode = dropping  # type: ignore[method-assign]
    assert list(decoding.run([7], Limits(1))) == [8]
    assert len(session.seen) == 5


def test_an_error_is_heard_by_who_reads_the_run_and_once() -> None:
    decoding, session = decoder(chunk=1)
    fine = session.decode

    def failing(count: int) -> Iterator[list[int]]:
        yield from islice(fine(count), None if session.fed[-1] == [7] else 3)
        if session.fed[-1] != [7]:
            raise UsageError("the model broke")

    session.decode = failing  # type: ignore[method-assign]
    first, second = decoding.run([1], Limits(9)), decoding.run([7], Limits(2))
    assert next(first) == 2
    assert list(second) == [8, 9]
    assert [next(first), next(first)] == [3, 4]
    with pytest.raises(UsageError, match="the model broke"):
        next(first)
    assert list(first) == []


def test_the_model_is_not_asked_from_within_its_own_work() -> None:
    decoding, _ = decoder()
    inner = decoding.run([1], Limits(2))
    run = decoding.run([5], Limits(3, cancelled=lambda: bool(list(inner))))
    with pytest.raises(UsageError, match="from within its own work"):
        next(run)
    assert list(inner) == [2, 3]


def test_what_cannot_run_is_refused_before_anything_is_fed() -> None:
    decoding, session = decoder()
    for ids, named in (([], "prompt is empty"), ([256], "ids are 0 to 255"), ([1] * 65, "has 65 tokens")):
        with pytest.raises(UsageError, match=named):
            decoding.run(ids)
    for options, named in (({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"logprobs": -1}, "logprobs is -1")):
        with pytest.raises(UsageError, match=named):
            Limits(**options)
    with pytest.raises(UsageError, match="opened with outputs="):
        decoding.run([1], Limits(logprobs=1))
    assert session.fed == []


def test_the_real_model_goes_on_where_it_was_with_the_same_tokens() -> None:
    prompt, greedy, _ = reference_greedy(Q4, "one_token")
    with open_session(Q4, SessionOptions("cpu", ctx=64)) as session:
        decoding = Decoder(session)
        assert list(decoding.run(prompt, Limits(6))) == greedy[:6]
        again = decoding.run([*prompt, *greedy[:4]], Limits(4))
        assert list(again) == greedy[4:8]
        assert again.reused_tokens == len(prompt) + 3
        assert session.end_tokens[0] in greedy
        at = next(index for index, token in enumerate(greedy) if token in session.end_tokens)
        run = decoding.run(prompt, Limits(64))
        assert (list(run), run.reason) == (greedy[:at], "end")
        timings = run.timings()
    assert (timings["prompt_tokens"], timings["reused_tokens"], timings["generated_tokens"]) == (1, 0, at)
    assert timings["decode_tokens_per_second"] == pytest.approx(at * 1e3 / timings["decode_ms"], rel=0.01)


def test_log_probabilities_are_given_for_tokens_that_are_given() -> None:
    prompt, greedy, _ = reference_greedy(Q4, "one_token")
    with open_session(Q4, SessionOptions("cpu", ctx=64, outputs=("logits",))) as session:
        at = next(index for index, token in enumerate(greedy) if token in session.end_tokens)
        run = Decoder(session).run([*prompt, *greedy[: at - 2]], Limits(9, logprobs=1))
        assert (list(run), run.reason) == (greedy[at - 2 : at], "end")
    assert [one.token for one in run.logprobs] == run.ids
    assert [one.likeliest for one in run.logprobs] == [((one.token, one.value),) for one in run.logprobs]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    with open_gguf(Q4) as file:
        return Tokenizer(file)


def text_run(tokenizer: Tokenizer, ids: list[int], stop: Sequence[str] = ()) -> TextRun:
    run: Any = Listed(ids)
    return TextRun(run, tokenizer, stop)


@pytest.mark.parametrize("text", ["naïve café", "日本語", "🩺 ok", "plain"])
def test_pieces_are_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    run = text_run(tokenizer, tokenizer.encode(text))
    pieces = list(run)
    assert "".join(pieces) == run.text == text
    assert all(piece and "\ufffd" not in piece for piece in pieces)
    assert "".join(text_run(tokenizer, tokenizer.encode("🩺")[:-1])) == "\ufffd"


def test_a_stop_string_may_lie_across_tokens(tokenizer: Tokenizer) -> None:
    run = text_run(tokenizer, tokenizer.encode("The whale and the sea"), ["ale an", "sea"])
    assert "".join(run) == run.text == "The wh"
    assert run.reason == "stop"
    assert "".join(text_run(tokenizer, tokenizer.encode("The whale"), ["ale!"])) == "The whale"
    assert list(text_run(tokenizer, tokenizer.encode("The whale"), ["The"])) == []


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("The whale<|im_start|>user", "<|im_start|>", "The whale"),
        ("The whale<|im_start|>user", "<|im_start|>user", "The whale"),
        ("The whale<|im_start|>use", "<|im_start|>user", "The whaleuse"),
        ("The <|im_start|>whale", "ale", "The wh"),
        ("The <|im_start|>whale", "unheard", "The whale"),
        ("é<|endoftext|>", "<|endoftext|>", "é"),
    ],
)
def test_a_stop_string_may_be_a_control_token_or_hold_one(
    tokenizer: Tokenizer, text: str, stop: str, shown: str
) -> None:
    run = text_run(tokenizer, tokenizer.encode(text), [stop])
    assert "".join(run) == run.text == shown
    assert run.reason == ("stop" if stop in text else "")


def test_a_chats_own_end_tokens_end_it_beside_the_files() -> None:
    runs = decoder()[0]
    ended = runs.run([1, 2], Limits(end_tokens=frozenset({5, 9})))
    assert (list(ended), ended.reason) == ([3, 4], "end")
    kept = runs.run([1, 2], Limits(8, end_tokens=frozenset({5, 9}), ignore_end=True))
    assert (list(kept), kept.reason) == (list(range(3, 11)), "length")
    assert list(runs.run([247], Limits(end_tokens=frozenset({5})))) == [248, 249]


LETTERS = st.text("ab", max_size=12)


@given(st.lists(LETTERS), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_what_is_shown_does_not_depend_on_the_pieces_and_holds_no_part_of_a_stop_string(
    pieces: list[str], stops: list[str]
) -> None:
    text = "".join(pieces)
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    wanted = text[: sum(min(ends))] if ends else text
    watcher, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += watcher.push(piece)
        assert wanted.startswith(shown)
    shown += watcher.finish() if not watcher.found else ""
    assert shown == wanted
    assert bool(watcher.found) == bool(ends)


def test_text_is_not_held_back_longer_than_needed() -> None:
    watcher = StopStrings(["###"])
    assert [watcher.push(piece) for piece in ("a", "#", "#", "b", "##", "#c")] == ["a", "", "", "##b", "", ""]
    assert watcher.found == "###"
    with pytest.raises(UsageError, match="stop string is empty"):
        StopStrings(["a", ""])


def test_types_of_the_stand_ins_stay_true() -> None:
    """The stand-ins above have what the real ones have."""
    assert all(hasattr(Session, name) for name in ("set_sampler", "rewind", "feed", "decode", "context", "position"))
    assert hasattr(Session, "check_sampler")
    assert hasattr(TokenRun, "end")
