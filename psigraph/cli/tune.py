"""`psigraph tune`: measures launch shapes on the GPU that is here and keeps the best."""

from __future__ import annotations

from pathlib import Path

import click

from ..ir.errors import UsageError
from ..options import SessionOptions
from .kernels_only import kernels_only
from .model_argument import model_argument
from .notes import note
from .options import Seconds, backend_option, kv_type_option
from .stages import stages

EPILOG = """\b
Every class of product is tried in place, in the whole step, with cold weights. What is found is kept in the
cache folder for this GPU, and every later command uses it. Without it the built-in shapes are used.

\b
Examples:
  psigraph tune qwen3-1.7b.gguf
  psigraph tune qwen3-1.7b.gguf --seconds 20 --dry-run"""


@click.command("tune", epilog=EPILOG)
@model_argument()
@backend_option("cuda")
@click.option("--device", type=click.IntRange(0), default=0, show_default=True, help="Which GPU.")
@kv_type_option
@click.option("--seconds", type=Seconds(1, 3600), default=60.0, show_default=True, help="When to stop trying.")
@click.option("--dry-run", is_flag=True, help="Measure and print; keep nothing.")
def command(model: Path, backend: str, device: int, kv_type: str, seconds: float, dry_run: bool) -> None:
    """Find the launch shapes that make a step of MODEL fastest on this GPU."""
    if backend == "auto":
        backend = "cuda"
    if backend not in ("cuda", "host"):
        raise UsageError(f"--backend {backend}: launch shapes need kernels; take cuda, or host to try the command out")
    from ..bench.tune import target_of, tune
    from ..bench.tuned import save_tuned
    from ..session import open_session

    with kernels_only(), stages() as bars:
        options = SessionOptions(
            backend,
            device,
            kv_type=kv_type,
            shapes={},
            on_compile=bars.bar("compiling kernels"),
            on_load=bars.bar("loading weights", in_bytes=True),
        )
        session = open_session(model, options)
    with session:
        facts = session.device_facts
        assert facts is not None

        def show(name: str, shape: str, us: float, fastest: float) -> None:
            note(f"  {us:10.1f} us  best {fastest:10.1f}  {name}: {shape}")

        found = tune(session, target_of(session), seconds, show)
        click.echo(
            f"{facts.name}: {found.tried} shapes in {found.seconds:.0f} s; a step took {found.before_us:,.1f} us and "
            f"takes {found.after_us:,.1f} us now"
        )
        for name, shape in found.shapes.items():
            click.echo(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in shape.items()))
        if dry_run or not found.shapes:
            click.echo("kept nothing" if dry_run else "the built-in shapes are the fastest: kept nothing")
        elif backend == "host":
            click.echo("kept nothing: times on the host target say nothing about a GPU")
        else:
            click.echo(f"kept in {save_tuned(facts, found.shapes)}")
