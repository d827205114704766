"""`psigraph chat`: a conversation in the terminal."""

from __future__ import annotations

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

from ..ir.errors import DeviceError, PolicyRefusal, PsigraphError
from ..options import SessionOptions
from .begin_gpu import begin_gpu
from .chat_input import entries, reader
from .options import MODEL_PATH, admission_options, backend_option, policy_option, prefill_option, run_options
from .sampling_options import new_seed, sampling_options
from .shell import printable
from .stages import stages
from .template_options import template_options
from .writing import write_pieces

if TYPE_CHECKING:
    from ..text.chat import Conversation
    from ..text.generation import TextRun

EPILOG = """\b
/help lists what can be typed beside questions. Ctrl-C stops an answer; at the prompt, twice, it leaves, as do
Ctrl-D and /quit. Lines may come through a pipe or out of a file, too. Answers are drawn at temperature 0.6, top-k
20, top-p 0.95 unless told otherwise; --temperature 0 takes the likeliest token each time.

\b
Examples:
  psigraph chat model.gguf --system "Be brief." --thinking off
  psigraph chat model.gguf --script lines.txt --seed 1 > transcript.txt"""

REASONS = {
    "length": "stopped at max_new_tokens",
    "stop": "ended by a stop string",
    "interrupted": "stopped by Ctrl-C",
    "context": "stopped: the context is full; /reset begins anew, or leave and give a larger --ctx",
}


@click.command("chat", epilog=EPILOG)
@click.argument("model", type=MODEL_PATH)
@click.option("--system", metavar="TEXT", help="A system message.")
@click.option("--thinking", type=click.Choice(["on", "off"]), help="Switch the model's thinking, where it can.")
@click.option("--max-new-tokens", type=click.IntRange(1), metavar="N", help="The most tokens of an answer.")
@click.option("--stop", multiple=True, metavar="STRING", help="End an answer before this text; repeatable.")
@click.option(
    "--script",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Take the lines from a file and show them: a transcript.",
)
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
    chat_template: str | None,
    template_vars: dict[str, Any],
    sampling: dict[str, Any],
    options: SessionOptions,
    allow_blocked: bool,
    expect_sha256: str | None,
    policy: str | None,
) -> None:
    """Talk with MODEL."""
    read = reader(script)
    start = begin_gpu(options.backend, options.device)
    from ..api import LanguageModel
    from ..text.chat import CHAT_SAMPLER, ChatSettings, Conversation
    from ..text.stop_strings import StopStrings

    StopStrings(stop)  # says what is wrong with one
    sampler = replace(CHAT_SAMPLER, **{"seed": new_seed(), **sampling})
    settings = ChatSettings(sampler, max_new_tokens, None if thinking is None else thinking == "on", stop)
    with stages() as bars:
        opened = LanguageModel(
            model,
            replace(
                options,
                sampling=not sampler.greedy,
                start=start,
                on_load=bars.bar("loading weights", in_bytes=True),
                on_compile=bars.bar("compiling kernels"),
            ),
            allow_blocked_quantization=allow_blocked,
            expect_sha256=expect_sha256,
            policy=policy,
            chat_template=chat_template,
            template_vars=template_vars,
            warn=lambda warning: click.echo(f"psigraph: warning: {warning}", err=True),
            on_hash=bars.bar(f"hashing {model.name}", in_bytes=True),
        )
    with opened:
        sampler.words(opened.vocabulary)  # says which token of a bias there is not
        conversation = Conversation(opened, settings, system)
        # What cannot work with any question is said before the first one.
        opened.ask_guard(conversation.messages())
        opened.template.render(conversation.messages("Hello"), settings.thinking, variables=template_vars)
        Talk(conversation, notes_to_stdout=script is not None).run(entries(read))


class Talk:
    """The loop: an entry, its answer, a line about how that went."""

    def __init__(self, conversation: Conversation, notes_to_stdout: bool) -> None:
        self._conversation = conversation
        self._notes_to_stdout = notes_to_stdout

    def run(self, entries: Iterator[str]) -> None:
        """Until the entries end or the user leaves."""
        from .chat_commands import Leave

        self._note(self._header())
        asked_twice = False
        while True:
            try:
                entry = next(entries, None)
            except KeyboardInterrupt:
                # A generator that an exception went through is over; the terminal's is made anew.
                if asked_twice or not sys.stdin.isatty():
                    raise
                asked_twice = True
                entries = _again()
                self._note("\n(Ctrl-C once more leaves, as do Ctrl-D and /quit)")
                continue
            asked_twice = False
            if entry is None:
                if sys.stdin is not None and sys.stdin.isatty():
                    self._note("")  # off the line on which Ctrl-D was pressed
                return
            try:
                self._entry(entry)
            except Leave:
                return

    def _header(self) -> str:
        model, settings = self._conversation.model, self._conversation.settings
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
            if entry.startswith("/") and not entry.startswith("//"):
                self._note(run_command(entry, self._conversation))
            else:
                self._answer(entry.removeprefix("/") if entry.startswith("//") else entry)
        except DeviceError:
            raise
        except PolicyRefusal as error:
            write_pieces([str(error)])
        except PsigraphError as error:
            self._note(f"psigraph: {error}")

    def _answer(self, question: str) -> None:
        with interrupts() as cancelled:
            run = self._conversation.ask(question, cancelled.is_set)
            write_pieces(run)
        if run.reason != "interrupted" or run.text:
            self._conversation.keep(question, run.answer, run.reasoning)
        self._note(f"[{speed(run, self._conversation.model.context)}]")

    def _note(self, text: str) -> None:
        click.echo(printable(text), err=not self._notes_to_stdout)


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


def _again() -> Iterator[str]:
    return entries(reader(None))


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
