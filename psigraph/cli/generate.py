"""`psigraph generate`: continues a text, streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import UsageError
from ..options import SessionOptions
from .begin_gpu import begin_gpu
from .model_argument import model_argument
from .notes import note, warn, warn_of_file
from .options import (
    TOKEN_COUNT,
    TOKEN_IDS,
    admission_options,
    backend_option,
    policy_option,
    prefill_option,
    run_options,
)
from .sampling_options import new_seed, sampling_options
from .stages import stages
from .template_options import template_options
from .texts import STDIN, read_text, stdin_is_piped
from .waiting import Waiting
from .writing import showable, speaks_unicode, write_pieces

if TYPE_CHECKING:
    from ..medpsy.policy import Admission
    from ..runtime.tokenizer.bpe import Tokenizer
    from ..session import Session
    from ..text.generation import TokenRun
    from ..text.prompt import Prompt
    from ..text.thinking import Marks

EPILOG = """\b
Only the continuation is written to stdout; everything else goes to stderr. Generation stops at the end tokens
that `inspect` lists, at a --stop string, after N tokens, or where the context is full. Special tokens that the
prompt spells out, such as <|im_start|>, are taken as such. Without a sampling option the likeliest token is
taken each time; with any of them tokens are drawn, at temperature 0.8 unless it is given. With --chat what the
file asks for (general.sampling.*) is taken where no option says otherwise.

\b
Examples:
  psigraph generate model.gguf --prompt "The whale" --max-new-tokens 64
  psigraph generate model.gguf --chat --system "Be brief." --prompt "What is a whale?" --temperature 0.7
  psigraph generate model.gguf --prompt-file story.txt --json > record.json
  echo "The whale" | psigraph generate model.gguf
  psigraph generate model.gguf --prompt-token-ids 151644,872,198 --output ids"""


@click.command("generate", epilog=EPILOG)
@model_argument()
@click.option(
    "-p", "--prompt", metavar="TEXT", help="Text to continue; - reads stdin, as does a pipe without a prompt."
)
@click.option("-f", "--prompt-file", metavar="FILE", help="The text lies in this file (UTF-8); - reads stdin.")
@click.option("--prompt-token-ids", "ids", type=TOKEN_IDS, help="Token ids to continue, instead of a text.")
@click.option("--chat", is_flag=True, help="Write the text as a user's turn, by the file's chat template.")
@click.option("--system", metavar="TEXT", help="A system message before it; implies --chat.")
@click.option("--thinking", type=click.Choice(["on", "off"]), help="Switch the model's thinking; implies --chat.")
@template_options
@click.option(
    "-n",
    "--max-new-tokens",
    type=TOKEN_COUNT,
    default=128,
    show_default=True,
    metavar="N",
    help="Stop after N tokens; -1: as far as the context reaches.",
)
@click.option("--stop", multiple=True, metavar="STRING", help="Stop before this text; repeatable.")
@click.option(
    "--output",
    type=click.Choice(["text", "ids"]),
    help="Write text or token ids. Default: text, as far as psigraph knows the file's tokenizer.",
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON record with text, ids and timings instead.")
@click.option(
    "--logprobs",
    type=click.IntRange(0, 100),
    metavar="N",
    help="With --json: each token's log probability and the N likeliest tokens.",
)
@click.option("--stream/--no-stream", default=None, help="Write pieces as they come, as by default, or all at the end.")
@sampling_options
@backend_option()
@run_options
@prefill_option
@admission_options
@policy_option
def command(
    model: Path,
    prompt: str | None,
    prompt_file: str | None,
    ids: tuple[int, ...] | None,
    chat: bool,
    system: str | None,
    thinking: str | None,
    chat_template: str | None,
    template_vars: dict[str, Any],
    max_new_tokens: int,
    stop: tuple[str, ...],
    output: str | None,
    as_json: bool,
    logprobs: int | None,
    stream: bool | None,
    sampling: dict[str, Any],
    options: SessionOptions,
    allow_blocked: bool,
    expect_sha256: str | None,
    policy: str | None,
) -> None:
    """Continue a prompt with MODEL, written as it comes."""
    _check_output(output, as_json, stream, stop, logprobs)
    text = _prompt_text(prompt, prompt_file, ids)
    start = begin_gpu(options.backend, options.device)
    from ..build import Model
    from ..medpsy.artifact import admit_file
    from ..runtime.gguf.file import GgufFile
    from ..session import check_ids, open_session, vocabulary_of
    from ..text.file_sampling import file_sampling
    from ..text.generation import GREEDY, Decoder, Limits
    from ..text.prompt import Prompt, Request
    from ..text.sampler import SamplerSettings
    from ..text.stop_strings import StopStrings

    StopStrings(stop)  # says what is wrong with one
    thinks = None if thinking is None else thinking == "on"
    asked = Request(text, ids, chat, system, thinks, chat_template, template_vars)
    if asked.templated:
        sampling = {**file_sampling(model), **sampling}
    sampler = SamplerSettings(**{"seed": new_seed(), **sampling}) if sampling else GREEDY
    admitted: list[Admission] = []
    most = None if max_new_tokens == -1 else max_new_tokens
    with Prompt(asked, most or 1, options.ctx) as request:
        with stages() as bars:
            on_hash = bars.bar(f"hashing {model.name}", in_bytes=True)

            def admit(file: GgufFile) -> None:
                # The digest of a file of gigabytes takes seconds, and only an expectation needs it here.
                admission = admit_file(
                    file,
                    allow_blocked=allow_blocked,
                    expect_sha256=expect_sha256,
                    policy_active=policy is not None,
                    with_digest=False,
                    on_hash=on_hash,
                )
                admitted.append(admission)

            def check(opened: Model) -> None:
                if ids is not None:
                    check_ids(ids, vocabulary_of(opened), "--prompt-token-ids")
                warn_of_file(model, admitted[0].said)  # only now: the file is one that runs
                request.check(admitted[0])

            options = replace(
                options,
                positions=request.positions,
                outputs=() if logprobs is None else ("logits",),
                sampling=not sampler.greedy,
                admit=admit,
                check=check,
                start=start,
                on_load=bars.bar("loading weights", in_bytes=True),
                on_compile=bars.bar("compiling kernels"),
            )
            session = open_session(model, options)
        with session, Waiting() as waiting:

            def cancelled() -> bool:
                """Never; but asked for before every part of the prompt."""
                waiting.reading(session.position, len(request.ids))
                return False

            session.expect_prompt(len(request.ids))
            marks = request.marks()
            for warning in request.warnings:
                warn(warning)
            limits = Limits(most, sampler, end_tokens=marks.end_ids, logprobs=logprobs, cancelled=cancelled)
            tokens = Decoder(session).run(request.ids, limits)
            if as_json:
                record = _record(tokens, request, admitted[0], session, stop, marks)
                waiting.end()
                if not sampler.greedy:
                    record["seed"] = sampler.seed
                click.echo("".join(showable([json.dumps(record, ensure_ascii=not speaks_unicode())])))
            else:
                pieces = _pieces(tokens, request, admitted[0], output, stop, marks)
                write_pieces(waiting.until_first(["".join(pieces)] if stream is False else pieces))
            if tokens.reason == "context":
                note(f"psigraph: {context_full(session)}")


def context_full(session: Session) -> str:
    """What to say where a run ended because no position is left."""
    limit = session.model.binding.context_limit
    more = f"; a larger --ctx holds up to {limit:,}" if limit > session.context else ""
    return f"stopped: the context of {session.context:,} tokens is full{more}"


def _check_output(
    output: str | None, as_json: bool, stream: bool | None, stop: tuple[str, ...], logprobs: int | None
) -> None:
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs goes into the record; give --json too")
    if as_json and output:
        raise UsageError(f"--json holds text and ids; leave --output {output} out")
    if as_json and stream:
        raise UsageError("--json writes one record at the end; leave --stream out")
    if output == "ids" and stop:
        raise UsageError("--stop looks for text; it does not go with --output ids")


def _prompt_text(prompt: str | None, file: str | None, ids: tuple[int, ...] | None) -> str | None:
    """The prompt's text, None where ids are given instead. A pipe is read only where nothing else is given."""
    given = {"--prompt": prompt, "--prompt-file": file, "--prompt-token-ids": ids}
    named = [option for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)}: give one of them")
    if prompt is not None and prompt != STDIN:
        return prompt
    if ids is not None:
        return None
    if not named and not stdin_is_piped():
        raise UsageError("no prompt: give --prompt, --prompt-file or --prompt-token-ids, or pipe a text in")
    text = read_text(file or STDIN)
    if not text:
        where = "stdin" if file in (None, STDIN) else file
        raise UsageError(f"{where}: the prompt is empty; give at least one token, by --prompt for example")
    return text


def _pieces(
    tokens: TokenRun, request: Prompt, admission: Admission, output: str | None, stop: tuple[str, ...], marks: Marks
) -> Iterator[str]:
    """What goes to stdout: text with the policy's disclaimer, or ids."""
    from ..medpsy.guard import guard_for
    from ..text.generation import TextRun

    needed = output == "text" or stop
    tokenizer = request.tokenizer.get() if needed else request.tokenizer.get_or_none()
    if output == "ids" or tokenizer is None:
        yield from (f"{token} " for token in tokens)
        return
    yield from TextRun(tokens, tokenizer, stop, guard_for(admission), marks)


def _record(
    tokens: TokenRun, request: Prompt, admission: Admission, session: Session, stop: tuple[str, ...], marks: Marks
) -> dict[str, Any]:
    """The JSON record; text is null where the file's tokenizer is of another kind."""
    from ..medpsy.guard import guard_for
    from ..text.generation import TextRun

    tokenizer = request.tokenizer.get() if stop else request.tokenizer.get_or_none()
    text: str | None = None
    if tokenizer is None:
        for _ in tokens:
            pass
    else:
        text = "".join(TextRun(tokens, tokenizer, stop, marks=marks))
    guard = guard_for(admission)
    record: dict[str, Any] = {
        "text": text,
        "ids": tokens.ids,
        "prompt_ids": list(request.ids),
        "stopped_by": tokens.reason,
        "end_tokens": [end.record() for end in marks.ends],
        "model": session.model.file.path.name,
        "backend": session.backend,
        "context": session.context,
        "kv_type": session.kv_type,
        "prefill": session.prefill_of(len(request.ids)),
        "timings": {**tokens.timings(), **{key: round(value, 3) for key, value in session.timings.items()}},
    }
    if tokens.logprobs:
        record["logprobs"] = [
            {
                **_token(one.token, tokenizer),
                "logprob": one.value,
                "likeliest": [{**_token(token, tokenizer), "logprob": value} for token, value in one.likeliest],
            }
            for one in tokens.logprobs
        ]
    if guard is not None:
        record["disclaimer"] = guard.disclaimer
    return record


def _token(token: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A token of the record: its id and text, and its bytes where they are no whole characters."""
    if tokenizer is None:
        return {"id": token, "text": None}
    data = tokenizer.decode_bytes([token])
    text = data.decode("utf-8", "replace")
    return {"id": token, "text": text, **({} if text.encode() == data else {"bytes": list(data)})}
