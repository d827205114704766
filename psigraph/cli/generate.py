"""`psigraph generate`: continues a text, streamed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from .options import MODEL_PATH, TOKEN_IDS, admission_options, backend_option, run_options
from .stages import stages

EPILOG = """\b
Only the continuation is written to stdout; everything else goes to stderr. Generation stops at the end tokens
that the file names. Special tokens that the prompt spells out, such as <|im_start|>, are taken as such.

\b
Examples:
  psigraph generate model.gguf --prompt "The whale" --max-new-tokens 64
  psigraph generate model.gguf --prompt-token-ids 151644,872,198 --output ids"""


@click.command("generate", epilog=EPILOG)
@click.argument("model", type=MODEL_PATH)
@click.option("--prompt", metavar="TEXT", help="Text to continue.")
@click.option("--prompt-token-ids", "ids", type=TOKEN_IDS, help="Token ids to continue, instead of a text.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, metavar="N", help="Stop after N tokens."
)
@click.option(
    "--output",
    type=click.Choice(["text", "ids"]),
    help="Write text or token ids. Default: text, as far as psigraph knows the file's tokenizer.",
)
@backend_option()
@run_options
@admission_options
def command(
    model: Path,
    prompt: str | None,
    ids: tuple[int, ...] | None,
    max_new_tokens: int,
    output: str | None,
    backend: str,
    device: int,
    ctx: int | None,
    no_graph: bool,
    disable: tuple[str, ...],
    allow_blocked: bool,
    expect_sha256: str | None,
) -> None:
    """Continue a prompt with MODEL, the likeliest token each time (greedy), written as it comes."""
    from ..artifact import admit_file
    from ..build import Model
    from ..generation import Prompt, continuation, text_pieces
    from ..guard import guard_for
    from ..policy import Admission
    from ..runtime.gguf_file import GgufFile
    from ..session import check_ids, open_session, vocabulary_of

    admitted: list[Admission] = []
    with Prompt(prompt, ids, max_new_tokens) as request:
        with stages() as bars:
            on_hash = bars.bar(f"hashing {model.name}", in_bytes=True)

            def admit(file: GgufFile) -> None:
                # The digest of a file of gigabytes takes seconds, and only an expectation needs it here.
                admission = admit_file(
                    file,
                    allow_blocked=allow_blocked,
                    expect_sha256=expect_sha256,
                    with_digest=False,
                    on_hash=on_hash,
                )
                for warning in admission.warnings:
                    click.echo(f"psigraph: warning: {warning}", err=True)
                admitted.append(admission)

            def check(opened: Model) -> None:
                if ids is not None:
                    check_ids(ids, vocabulary_of(opened))
                request.check(admitted[0])

            session = open_session(
                model,
                backend,
                device,
                ctx,
                graph=not no_graph,
                disable=disable,
                positions=request.positions,
                admit=admit,
                check=check,
                on_load=bars.bar("loading weights", in_bytes=True),
                on_compile=bars.bar("compiling kernels"),
            )
        with session:
            tokens = continuation(session, request.ids, max_new_tokens)
            tokenizer = request.tokenizer if output == "text" else request.tokenizer_or_none
            if output == "ids" or tokenizer is None:
                _write(f"{token} " for token in tokens)
                return
            pieces = text_pieces(tokenizer, tokens)
            guard = guard_for(admitted[0])
            _write(guard.stream(pieces) if guard is not None else pieces)


def _write(pieces: Iterable[str]) -> None:
    """Writes pieces as they come and ends the line, after Ctrl-C too, but none where nothing was begun."""
    begun = False
    try:
        for piece in _encodable(pieces):
            click.echo(piece, nl=False)
            sys.stdout.flush()
            begun = True
        begun = True  # an answer of no characters is a line too
    finally:
        if begun:
            click.echo()


def _encodable(pieces: Iterable[str]) -> Iterator[str]:
    """What a terminal of another encoding cannot show becomes a question mark instead of an error."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for piece in pieces:
        yield piece.encode(encoding, "replace").decode(encoding)
