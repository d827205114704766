"""`psigraph chat` through pipes, scripts and a terminal: answers, commands, Ctrl-C, and ways to leave."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_model import Q4

from psigraph import api
from psigraph.cli import run
from psigraph.cli.chat import interrupts
from psigraph.cli.chat_history import read_history
from psigraph.cli.chat_input import entries
from psigraph.ir.errors import OutOfMemoryError, UsageError
from psigraph.medpsy.guard import Guard, load_policy
from psigraph.options import SessionOptions
from psigraph.text.chat import Conversation

pytestmark = pytest.mark.usefixtures("no_gpu")

BASE = ["chat", str(Q4), "--max-new-tokens", "4", "--temperature", "0", "--ctx", "128"]
SAID = "The state of the Union is strong."


def talk(monkeypatch: pytest.MonkeyPatch, lines: str | bytes, *options: str, code: int = 0) -> None:
    data = lines.encode() if isinstance(lines, str) else lines
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert run([*BASE, *options]) == code


def test_a_pipe_gets_answers_alone(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    talk(monkeypatch, f"{SAID}\n\n/set max_new_tokens 2\n{SAID}\n")
    shown = capfd.readouterr()
    first, second = shown.out.splitlines()
    assert first
    assert second
    notes = shown.err.splitlines()
    assert "context of 128 tokens, greedy" in notes[0]
    assert notes[1].startswith("[4 tokens, ")
    assert "read 19 of 19; context 23 of 128; stopped at max_new_tokens]" in notes[1]
    assert notes[2] == "max_new_tokens 2"
    # The first turn and its answer are still in the cache; the answer's last token and the new turn are read.
    assert "read 22 of 44;" in notes[3]


def test_a_script_makes_a_transcript(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "lines.txt"
    script.write_text(f'{SAID}\n"""\nTwo\nlines\n"""\n//slash\n/quit\nnever\n')
    assert run([*BASE, "--script", str(script)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith((">", ". "))] == [
        f"> {SAID}", '> """', ". Two", ". lines", '. """', "> //slash", "> /quit"
    ]  # fmt: skip
    assert sum(line.startswith("[4 tokens") for line in lines) == 3


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "chat.json"
    lines = [
        "/help", "/system", "/system Be brief.", "/system", SAID, f"/save {file}", "/reset", f"/load {file}",
        "/system none", "/set temperature", "/set seed 3", "/nothing", "/save", "/load /nonexistent",
        "/set logit_bias {\"4096\": 1}",
        f"/save {tmp_path}", "/set", "/quit", SAID,
    ]  # fmt: skip
    talk(monkeypatch, "\n".join(lines))
    shown = capfd.readouterr()
    assert len(shown.out.splitlines()) == 1
    for said in (
        "/set [NAME [VALUE]]",
        "no system message\n",
        "system: Be brief.",
        f"saved: {file}",
        "the conversation begins anew",
        f"loaded: {file}, 2 messages",
        "temperature 0.0\n",
        "seed 3\n",
        "psigraph: there is no command /nothing; the commands are /help, /system",
        "psigraph: /save: name a file",
        "psigraph: /nonexistent: cannot be read",
        "token id 4096 is outside the vocabulary",
        f"psigraph: {tmp_path}: is a folder",
        "  stop none\n",
    ):
        assert said in shown.err
    assert "Traceback" not in shown.err


def test_commands_that_other_chats_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there.json").write_text("precious")
    lines = [
        "/undo", "/regen", "/drop", SAID, "/regen", "/set temp 1", "/set seed 4", "/regen", "/save ~/chat.json",
        "/undo", "/undo", "/save ~/chat.json", "/save ~/there.json", "/clear", "/save ~/chat.json",
        "/save -f ~/there.json", "/load ~/chat.json", "/load ~no-such-user/x", "/set top_k -1",
        "/set parameter num_ctx 64", "/set ctx 0", "/set ctx 2049", "/set ctx", "/set thinking off",
        "/set thinking default", "/drop 2", "/?", "/bye", SAID,
    ]  # fmt: skip
    talk(monkeypatch, "\n".join(lines))
    shown = capfd.readouterr()
    first, again, *drawn = shown.out.splitlines()
    assert first == again
    assert len(drawn) == 1
    replies = [line for line in shown.err.splitlines() if not line.startswith(("[", "psigraph: warning", "tiny"))]
    there, mine = tmp_path / "there.json", tmp_path / "chat.json"
    for reply, begins in zip(
        replies,
        [
            "psigraph: nothing was asked yet", "psigraph: nothing was asked yet", "psigraph: /drop: there is no turn",
            "asked again; at temperature 0", "temperature 1.0", "seed 4", "asked again, with seed 5",
            f"saved: {mine}", f'taken back: "{SAID}"', "psigraph: nothing was asked yet", f"saved: {mine}",
            f"psigraph: {there}: is there already; /save -f ~/there.json writes over it",
            "the conversation begins anew", f"psigraph: {mine}: is there already", f"saved: {there}",
            f"loaded: {mine}, 0 messages", "psigraph: /load ~no-such-user/x: there is no such home folder", "top_k 0",
            "ctx 64", "psigraph: ctx is '0'; give a number of tokens from 1 to 2,048", "psigraph: ctx is '2049'",
            "ctx 64", "psigraph: --thinking off: the model's chat template cannot", "thinking none",
            "psigraph: /drop: there is no turn", "  /help",
        ],
        strict=False,
    ):  # fmt: skip
        assert reply.startswith(begins), replies
    assert "/clear is /reset, /bye is /quit" in shown.err
    assert json.loads(there.read_text())["messages"] == []


def test_an_answer_asked_for_again_that_does_not_come_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ask, answers = Conversation.ask, []

    def once(self: Conversation, *arguments: Any) -> Any:
        answers.append(arguments)
        if len(answers) == 2:
            raise UsageError("no second answer")
        return ask(self, *arguments)

    monkeypatch.setattr(Conversation, "ask", once)
    talk(monkeypatch, f"{SAID}\n/regen\n/save {tmp_path / 'chat.json'}\n")
    assert "psigraph: no second answer" in capfd.readouterr().err
    saved = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [message["role"] for message in saved] == ["user", "assistant"]


def test_a_context_that_is_no_good_leaves_the_one_before(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    opened = api.LanguageModel._opened

    def refuse(self: Any, options: SessionOptions) -> Any:
        if options.ctx == 64:
            raise OutOfMemoryError("64 positions do not fit")
        return opened(self, options)

    monkeypatch.setattr(api.LanguageModel, "_opened", refuse)
    talk(monkeypatch, f"/set ctx 64\n/set ctx\n{SAID}\n")
    shown = capfd.readouterr()
    assert "psigraph: ctx stays 128: 64 positions do not fit\nctx 128\n" in shown.err
    assert len(shown.out.splitlines()) == 1


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>"
)


def test_what_was_thought_lies_beside_the_answer_and_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    template, kept = tmp_path / "thinking.jinja", tmp_path / "chat.json"
    template.write_text(THINKING)
    talk(monkeypatch, f"{SAID}\n/save {kept}\n{SAID}\n", "--chat-template", str(template))
    shown = capfd.readouterr()
    thought = shown.out.splitlines()[0]
    said = json.loads(kept.read_text())["messages"][1]
    assert said == {"role": "assistant", "content": "", "reasoning_content": thought}
    assert "; read 23 of 23;" in shown.err
    assert " of 44; context" in shown.err  # two turns, and an answer of which nothing goes back


def test_temperature_may_be_raised_in_the_middle(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    talk(monkeypatch, f"/set max_new_tokens 8\n/set seed 4\n/set temperature 2\n/set top_k 0\n{SAID}\n/reset\n{SAID}\n")
    first, *rest = capfd.readouterr().out.splitlines()
    assert first
    assert first in rest


def test_a_full_context_is_said_and_a_conversation_that_does_not_fit_is_kept_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    talk(monkeypatch, f"{SAID}\n{SAID}\n/reset\n{SAID}\n/drop\n", "--ctx", "21")
    shown = capfd.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert shown.err.count("stopped: the context is full; /reset begins anew") == 2
    assert "psigraph: the conversation has 4" in shown.err
    assert f'/drop leaves out the oldest turn of 1 ("{SAID}") and asks again' in shown.err
    assert shown.err.endswith(f'left out: "{SAID}"\n')  # nothing waits for an answer any more


def test_a_question_that_does_not_fit_is_asked_again_when_the_turns_in_its_way_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script, kept = tmp_path / "lines.txt", tmp_path / "chat.json"
    script.write_text(f"One?\nTwo?\nThree?\n/drop\n/save {kept}\n/reset\n{'whale ' * 60}\n")
    assert run([*BASE, "--script", str(script), "--ctx", "40"]) == 0
    shown = capfd.readouterr().out
    assert '/drop leaves out the oldest turn of 2 ("One?") and asks again' in shown
    assert shown.partition("> /drop\n")[2].startswith('left out: "One?"\n')
    asked = [turn["content"] for turn in json.loads(kept.read_text())["messages"] if turn["role"] == "user"]
    assert asked == ["Two?", "Three?"]
    assert "/drop" not in shown.partition("whale whale")[2]  # it would not help: the question alone is too long


def test_the_guard_answers_in_the_models_place_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rules = Guard(load_policy().data["guard"])
    request = "Do I have cancer? Diagnose me."
    talk(monkeypatch, f"{request}\nWhat is a virus?\n/system {request}\n", "--ctx", "256", "--policy", "medpsy")
    shown = capfd.readouterr()
    refusal = rules.classify(request).message
    assert shown.out.startswith(f"{refusal}\n{rules.disclaimer}\n\n")
    assert shown.out.count(refusal.split(".")[0]) == 2
    assert shown.err.count(" tokens, ") == 2  # the header and one answer
    talk(monkeypatch, "", "--system", request, "--policy", "medpsy", code=5)


@pytest.mark.parametrize(
    ("lines", "options", "code", "named"),
    [
        ("", (), 0, ""),
        (b"a \xff\n", (), 2, "stdin: byte 2 (0xff) is not UTF-8"),
        ("", ("--thinking", "on"), 2, "cannot switch thinking"),
        ("", ("--script", "/nonexistent"), 2, "/nonexistent: cannot be read"),
        ('"""\nlost\n', (), 2, 'psigraph: the input ended within """: a line was not sent'),
        ("", ("--stop", ""), 2, "stop string is empty"),
        ("", ("--logit-bias", "5000=1"), 2, "token id 5000 is outside the vocabulary"),
        ("", ("--backend", "cuda"), 7, "--backend cpu"),
    ],
)
def test_ways_to_end(
    lines: str | bytes,
    options: tuple[str, ...],
    code: int,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    talk(monkeypatch, lines, *options, code=code)
    assert named in capfd.readouterr().err.splitlines()[-1]


def test_entries_are_lines_and_blocks() -> None:
    lines = iter(["  a ", "", '"""one"""', '"""two', "", ' three  """', '"""cut', "off"])

    def read(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    found = []
    with pytest.raises(UsageError, match='the input ended within """: 2 lines were not sent'):
        found.extend(entries(read))
    assert found == ["a", "one", "two\n\n three"]


def test_ctrl_c_while_an_answer_comes_is_noted_and_the_second_one_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts() as pressed:
        assert not pressed.is_set()
        signal.raise_signal(signal.SIGINT)
        assert pressed.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_stops_the_answer_and_not_the_program(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = api.TextRun._kept
    presses = [signal.SIGINT]

    def interrupted(self: Any, piece: str) -> str:
        if len(self.ids) == 2 and presses:
            signal.raise_signal(presses.pop())
        return kept(self, piece)

    monkeypatch.setattr(api.TextRun, "_kept", interrupted)
    talk(monkeypatch, f"{SAID}\n/set max_new_tokens 1\nGo on.\n", "--max-new-tokens", "20")
    shown_text = capfd.readouterr()
    assert len(shown_text.out.splitlines()) == 2
    assert "[2 tokens" in shown_text.err
    assert "stopped by Ctrl-C]" in shown_text.err
    assert "[1 token;" in shown_text.err


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.leader, follower = pty.openpty()
        command = [sys.executable, *arguments]
        self.process = subprocess.Popen(
            command, stdin=follower, stdout=follower, stderr=follower, start_new_session=True, close_fds=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(follower)
        self.shown, self.seen = "", 0

    def until(self, text: str, seconds: float = 30) -> None:
        """Reads until the text has come, after the one that was waited for before."""
        deadline = time.monotonic() + seconds
        while text not in self.shown[self.seen :]:
            ready = select.select([self.leader], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, f"no {text!r} in {self.shown!r}"
            self.shown += os.read(self.leader, 4096).decode("utf-8", "replace")
        self.seen = self.shown.index(text, self.seen) + len(text)

    def type(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def press(self, key: str, text: str = "") -> int:
        """Presses a key until the text has come, or, without a text, until the program has ended; its exit code.

        readline drops what is typed while it sets the terminal up, as it does for a person, who then presses again.
        """
        for _ in range(4):
            self.type(key)
            try:
                if not text:
                    return self.process.wait(8)
                self.until(text, 8)
                return 0
            except (AssertionError, subprocess.TimeoutExpired):
                continue
        raise AssertionError(f"{key!r} was pressed four times; {self.shown!r}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.leader)


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    found = Terminal("-m", "psigraph", *BASE, "--backend", "cpu", "--max-new-tokens", "100000")
    yield found
    found.close()


def test_on_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    terminal.until("> ")
    terminal.type(f"{SAID}\n")
    terminal.until(f"{SAID}\r\n")
    terminal.until("reading ...")  # the sign of life
    terminal.until(" of 19 tokens ...")  # how far it is depends on the machine
    terminal.until(" \r")  # the answer has begun
    assert "\x1b" not in terminal.shown  # TERM=dumb
    terminal.type("\x03")
    terminal.until("]")
    assert "stopped by Ctrl-C]" in terminal.shown or "tok/s" in terminal.shown
    terminal.until("> ")
    terminal.press("\x03", "Ctrl-C once more leaves")
    terminal.until("> ")
    terminal.press("/set seed\n", "seed ")
    terminal.until("> ")
    assert terminal.press("\x04") == 0
    assert read_history(tmp_path / "psigraph" / "chat_history")[:2] == [SAID, "/set seed"]


ECHO = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))  # None: cannot be imported
from psigraph.cli.chat_input import entries, terminal_reader
for entry in entries(terminal_reader()):
    print("got", ascii(entry))
"""


@pytest.mark.parametrize(
    ("term", "absent", "marks"),
    [("xterm", (), ("\x1b[200~", "\x1b[201~")), ("dumb", (), ("", "")), ("xterm", ("readline",), ("", ""))],
    ids=["marked", "dumb", "no readline"],
)
def test_pasted_lines_are_one_turn(
    term: str, absent: tuple[str, ...], marks: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    shown = Terminal("-c", ECHO, *absent)
    try:
        shown.until("> ")
        shown.type(f"{marks[0]}def whale():\n\n    /dive{marks[1]}\n")
        shown.until("got 'def whale():\\n\\n    /dive'")
        shown.until("> ")
        shown.type("one\n")
        shown.until("got 'one'")
    finally:
        shown.close()


def test_ctrl_c_twice_at_the_prompt_leaves(terminal: Terminal) -> None:
    terminal.until("> ")
    terminal.press("\x03", "Ctrl-C once more leaves")
    terminal.until("> ")
    assert terminal.press("\x03") == 130


def test_the_transcript_that_the_documents_show_is_what_the_model_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Speeds differ from machine to machine, and the last answers only make the test longer."""
    root = Path(__file__).parents[3]
    transcript = (root / "docs" / "chat-transcript.txt").read_text()
    assert transcript in (root / "README.md").read_text()
    command, *lines = transcript.splitlines()
    end = [index for index, line in enumerate(lines) if line.startswith("[")][1]
    script = tmp_path / "lines.txt"
    script.write_text("".join(f"{line[2:]}\n" for line in lines[:end] if line.startswith("> ")))
    monkeypatch.chdir(root)
    assert run([*command.removeprefix("$ psigraph ").split(), "--script", str(script)]) == 0
    shown = capfd.readouterr().out.splitlines()

    def words(text: list[str]) -> list[str]:
        return [line for line in text if not line.startswith("[")]

    assert words(shown) == words(lines[:end])
