"""`psigraph chat`: a conversation in the terminal."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ..ending import own_interrupts
from ..ir.errors import DeviceError, PolicyRefusal, PsigraphError, SpecError, UsageError
from ..options import SessionOptions
from ..printable import printable
from .begin_gpu import begin_gpu
from .chat_history import history_file
from .chat_input import History, Read, entries, reader
from .model_argument import model_argument
from .notes import is_quiet, warn_of_file
from .options import (
    FILE_PATH,
    TOKEN_COUNT,
    admission_options,
    backend_option,
    policy_option,
    prefill_option,
    run_options,
)
from .sampling_options import new_seed, sampling_options
from .stages import stages
from .template_options import template_options
from .texts import stdin_is_piped
from .waiting import Waiting
from .word_wrap import whole_words
from .writing import write_pieces

if TYPE_CHECKING:
    from ..text.generation import TextRun
    from .chat_commands import Chat

EPILOG = """\b
/help lists what can be typed beside questions. Ctrl-C stops an answer; at the prompt, twice, it leaves, as do
Ctrl-D and /quit. Lines may come through a pipe or out of a file, too. Answers are drawn at temperature 0.6, top-k
20, top-p 0.95 unless the file (general.sampling.*) or an option says otherwise; --temperature 0 takes the
likeliest token each time. /set shows what holds.

\b
Examples:
  psigraph chat model.gguf --system "Be brief." --thinking off
  psigraph chat model.gguf --script lines.txt --seed 1 > transcript.txt"""

REASONS = {
    "length": "stopped at max_new_tokens",
    "stop": "ended by a stop string",
    "interrupted": "stopped by Ctrl-C",
    "context": "stopped: the context is full; /reset begins anew, /drop leaves out old turns, /set ctx N makes room",
}


@click.command("chat", epilog=EPILOG)
@model_argument()
@click.option("--system", metavar="TEXT", help="A system message.")
@click.option("--thinking", type=click.Choice(["on", "off"]), help="Switch the model's thinking, where it can.")
@click.option(
    "-n",
    "--max-new-tokens",
    type=TOKEN_COUNT,
    metavar="N",
    help="The most tokens of an answer; -1, as without: until the model is done or the context is full.",
)
@click.option("--stop", multiple=True, metavar="STRING", help="End an answer before this text; repeatable.")
@click.option(
    "--script",
    type=FILE_PATH,
    metavar="FILE",
    help="Take the lines from a file and show them: a transcript.",
)
@click.option(
    "--history/--no-history",
    default=True,
    envvar="PSIGRAPH_HISTORY",
    help="Keep what is typed for the arrow keys of later chats; PSIGRAPH_HISTORY=0 never does.",
)
@click.option("--wrap/--no-wrap", default=True, help="On a terminal, break lines between words.")
@template_options
@sampling_options
@backend_option()
@run_options
@prefill_option
@admission_options
@policy_option
def command(
    model: Path,
    system: str | None,
    thinking: str | None,
    max_new_tokens: int | None,
    stop: tuple[str, ...],
    script: Path | None,
    history: bool,
    wrap: bool,
    chat_template: str | None,
    template_vars: dict[str, Any],
    sampling: dict[str, Any],
    options: SessionOptions,
    allow_blocked: bool,
    expect_sha256: str | None,
    policy: str | None,
) -> None:
    """Talk with MODEL."""
    typed = script is None and not stdin_is_piped()
    kept = history_file() if typed and history else None
    read = reader(script, kept)
    start = begin_gpu(options.backend, options.device)
    from ..api import LanguageModel
    from ..text.chat import CHAT_SAMPLER, ChatSettings, Conversation
    from ..text.file_sampling import file_sampling
    from ..text.stop_strings import StopStrings
    from .chat_commands import Chat

    StopStrings(stop)  # says what is wrong with one
    sampler = replace(CHAT_SAMPLER, **{"seed": new_seed(), **file_sampling(model), **sampling})
    most = None if max_new_tokens == -1 else max_new_tokens
    settings = ChatSettings(sampler, most, None if thinking is None else thinking == "on", stop)

    def opened(options: SessionOptions, settings: ChatSettings) -> LanguageModel:
        warnings: list[str] = []
        with stages() as bars:
            found = LanguageModel(
                model,
                replace(
                    options,
                    sampling=not settings.sampler.greedy,
                    on_load=bars.bar("loading weights", in_bytes=True),
                    on_compile=bars.bar("compiling kernels"),
                ),
                allow_blocked_quantization=allow_blocked,
                expect_sha256=expect_sha256,
                policy=policy,
                chat_template=chat_template,
                template_vars=template_vars,
                warn=warnings.append,
                on_hash=bars.bar(f"hashing {model.name}", in_bytes=True),
                reword=lambda error: None,
            )
        warn_of_file(model, warnings)
        return found

    conversation = Conversation(opened(replace(options, start=start), settings), settings, system)
    try:
        # What cannot work with any question is said before the first one.
        sampler.words(conversation.model.vocabulary)  # says which token of a bias there is not
        conversation.model.ask_guard(conversation.messages())
        conversation.rendered("Hello")
        chat = Chat(conversation, lambda ctx: opened(replace(options, ctx=ctx), conversation.settings))
        with own_interrupts():
            Talk(chat, read, History(kept), script is not None, wrap).run()
    finally:
        conversation.model.close()


class Talk:
    """The loop: an entry, its answer, a line about how that went."""

    def __init__(self, chat: Chat, read: Read, history: History, scripted: bool, wrap: bool) -> None:
        self._chat, self._read, self._history = chat, read, history
        self._to_stdout = scripted
        self._typed = not scripted and not stdin_is_piped()
        self._wrap = wrap and sys.stdout is not None and sys.stdout.isatty()

    def run(self) -> None:
        """Until the entries end or the user leaves."""
        from .chat_commands import Leave

        self._note(self._header())
        asked_twice = False
        lines = entries(self._read)
        while True:
            try:
                entry = next(lines, None)
            except (KeyboardInterrupt, UsageError) as stopped:
                # A generator that an exception went through is over; the terminal's is made anew.
                if not self._typed or (asked_twice and isinstance(stopped, KeyboardInterrupt)):
                    raise
                lines = entries(self._read)
                asked_twice = isinstance(stopped, KeyboardInterrupt)
                what = "(Ctrl-C once more leaves, as do Ctrl-D and /quit)" if asked_twice else f"psigraph: {stopped}"
                self._reply(f"\n{what}")
                continue
            asked_twice = False
            if entry is None:
                if self._typed:
                    self._reply("")  # off the line on which Ctrl-D was pressed
                return
            if self._typed:
                self._history.remember(entry)
            try:
                self._entry(entry)
            except Leave:
                return

    def _header(self) -> str:
        model, settings = self._chat.conversation.model, self._chat.conversation.settings
        drawn = "greedy" if settings.sampler.greedy else f"seed {settings.sampler.seed}"
        session = model.session
        # In numpy they always do, and nobody expects them not to.
        slow = f"; prompts go in {session.prefill}" if session.backend != "cpu" and not session.engine.chunked else ""
        return (
            f"{session.model.file.path.name} on {session.backend}, context of {model.context:,} tokens, {drawn}{slow}; "
            "/help lists commands"
        )

    def _entry(self, entry: str) -> None:
        """One entry; what goes wrong with it is said and ends nothing, unless the device is gone."""
        from .chat_commands import run_command

        try:
            if "\n" in entry:  # a text that somebody pasted is no command, whatever it begins with
                self._chat.question = entry
            elif entry.startswith("/") and not entry.startswith("//"):
                self._reply(run_command(entry, self._chat))
            else:
                self._chat.question = entry.removeprefix("/") if entry.startswith("//") else entry
            question, self._chat.question = self._chat.question, None
            if question is not None:
                self._answer(question)
        except DeviceError:
            raise
        except PolicyRefusal as error:
            write_pieces([str(error)])
        except PsigraphError as error:
            self._reply(printable(f"psigraph: {error}", isinstance(error, SpecError)))

    def _answer(self, question: str) -> None:
        """The answer to a question, and what can be done where the context has no room for it."""
        from .chat_commands import offer_to_drop

        chat, answered = self._chat, False
        restored, chat.restored, chat.unanswered = chat.restored, None, None
        try:
            answered = self._streamed(question)
        except UsageError as error:
            offer = offer_to_drop(chat, question)
            if not offer:
                raise
            raise UsageError(f"{error}; {offer}") from None
        finally:
            if not answered and restored is not None:
                chat.conversation.turns = restored

    def _streamed(self, question: str) -> bool:
        """Whether an answer came, and is kept."""
        conversation = self._chat.conversation
        run: TextRun | None = None

        def cancelled() -> bool:
            if run is not None:
                waiting.reading(conversation.model.session.position, run.timings()["prompt_tokens"])
            return pressed.is_set()

        with Waiting() as waiting, interrupts() as pressed:
            waiting.show("reading ...")
            run = conversation.ask(question, cancelled)
            pieces = waiting.until_first(run)
            write_pieces(whole_words(pieces, shutil.get_terminal_size().columns) if self._wrap else pieces)
        answered = run.reason != "interrupted" or bool(run.text)
        if answered:
            conversation.keep(question, run.answer, run.reasoning)
        self._note(f"[{speed(run, conversation.model.context)}]")
        return answered

    def _note(self, text: str) -> None:
        """What nobody asked for."""
        if not is_quiet():
            self._reply(text)

    def _reply(self, text: str) -> None:
        click.echo(printable(text), err=not self._to_stdout)


def speed(run: TextRun, context: int) -> str:
    """How fast an answer came, how full the context is, and why it ended if not by the model's own choice."""
    timings = run.timings()
    count, rate = timings["generated_tokens"], timings["decode_tokens_per_second"]
    parts = [f"{count} token{'s' * (count != 1)}" + (f", {rate:,.1f} tok/s" if rate else "")]
    if timings["first_token_ms"]:
        parts.append(f"first after {timings['first_token_ms']:,.0f} ms")
    read = timings["prompt_tokens"] - timings["reused_tokens"]
    parts.append(f"read {read} of {timings['prompt_tokens']}")
    parts.append(f"context {min(context, timings['prompt_tokens'] + count):,} of {context:,}")
    if run.reason in REASONS:
        parts.append(REASONS[run.reason])
    return "; ".join(parts)


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """While an answer comes, Ctrl-C sets the event instead of raising: no driver call is torn apart.

    A second one raises KeyboardInterrupt, should the first not be heard. Outside the main thread nothing changes.
    """
    pressed = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
