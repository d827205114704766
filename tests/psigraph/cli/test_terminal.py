"""What is shown while work goes on: bars, lines in logs, nothing that a terminal does not know."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from psigraph.cli import notes, run, stages, terminal, waiting
from psigraph.cli.word_wrap import whole_words


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    yield now
    notes.set_quiet(False)


def work(clock: list[float], seconds: float) -> None:
    with stages.stages() as bars:
        report = bars.bar("compiling kernels")
        for done in range(5):
            report(done, 4)
            clock[0] += seconds


@pytest.mark.parametrize(
    ("seconds", "quiet", "lines"),
    [
        (0.4, False, []),
        (5.0, False, ["psigraph: compiling kernels: 1/4"]),
        (20.0, False, [f"psigraph: compiling kernels: {done}/4" for done in (1, 2, 3)]),
        (20.0, True, []),
    ],
)
def test_a_log_hears_of_long_work_and_not_often(
    seconds: float, quiet: bool, lines: list[str], clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    notes.set_quiet(quiet)
    work(clock, seconds)
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize(("term", "escapes"), [("xterm", True), ("dumb", False), ("", False)])
def test_a_terminal_gets_what_it_can_show(
    term: str, escapes: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(stages, "WATCHED_S", 0.0)
    with stages.stages() as bars:
        bars.bar("compiling kernels")(1, 4)
    shown = capsys.readouterr().err
    assert "compiling kernels" in shown
    assert ("\x1b" in shown) is escapes


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colours_are_left_out_where_they_are_not_wanted(
    variables: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(["doctor"]) in (0, 1)
    assert ("\x1b[" in capsys.readouterr().out) is coloured


def test_a_prompt_that_is_read_shows_how_far_it_is_until_the_answer_begins(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "is_watched", lambda: True)

    def pieces() -> Iterator[str]:
        for position in (0, 512, 600):
            sign.reading(position, 600)
            clock[0] += 0.2
        yield "a"
        sign.reading(601, 600)

    with waiting.Waiting() as sign:
        sign.show("reading ...")
        clock[0] += 0.2
        assert list(sign.until_first(pieces())) == ["a"]
    shown = capsys.readouterr().err
    longest = "reading 600 of 600 tokens ..."
    assert shown.split("\r") == [
        "", "reading ...", "reading 0 of 600 tokens ...", "reading 512 of 600 tokens ...", longest,
        " " * len(longest), "",
    ]  # fmt: skip
    assert not terminal.is_watched()  # no terminal here: nothing of it in a log


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["The state ", "of the Un", "ion is", " strong."], "The state of the\nUnion is strong."),
        (["a" * 21, " b"], "a" * 21 + " b"),
        (["to be ", "o" * 25], "to be\n" + "o" * 25),
        (["12345678901234567890 x"], "12345678901234567890\nx"),
        (["one\n\n  two"], "one\n\n  two"),
        (["東京" * 6], "東京" * 5 + "\n" + "東京"),
        (["```py\nfor one in some_long_list_of_things:\n```\nand then back to prose"],
         "```py\nfor one in some_long_list_of_things:\n```\nand then back to\nprose"),
        (["e\u0301" * 19 + " e\u0301"], "e\u0301" * 19 + "\ne\u0301"),
    ],
)  # fmt: skip
def test_words_are_whole_and_no_line_is_too_long(pieces: list[str], shown: str) -> None:
    assert "".join(whole_words(pieces, 20)) == shown
    assert "".join(whole_words(list("".join(pieces)), 20)) == shown  # however the text is cut
    assert "".join(whole_words(pieces, 5)) == "".join(pieces)


def test_a_word_is_shown_when_it_is_whole() -> None:
    assert list(whole_words(["The wh", "ale, the", " sea"], 80)) == ["The", " whale,", " the", " sea"]
    endless = ["a"] * 100
    assert "".join(whole_words(endless, 80)) == "a" * 100
    assert len(list(whole_words(endless, 80))) > 1  # a sign of life, though no space comes
