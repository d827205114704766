"""What a KV cache in 8 bits costs, by `psigraph perplexity` on the tiny models: prints the table, or writes it.

    .venv/bin/python scripts/cache_loss.py [--into docs/performance.md]

Every figure is out of the JSON of a run of the command line, in numpy (float64), so that nothing but the cache's type
differs: first with an f16 cache, whose logits are kept, then with a q8 cache against them. The text is this
repository's LICENSE, which does not change. Takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from psigraph.inspect.compilation import source_of_size
from psigraph.inspect.inspection import cache_bytes

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "fixtures" / "tiny"
TEXT = ROOT / "LICENSE"
BEGIN, END = "<!-- cache loss: begin -->\n", "<!-- cache loss: end -->\n"
TOKENS = 768  # of the text, in one window
QUANTS = ("q4_k_m", "q8_0")
SIZES = ("0.6b", "1.7b", "4b", "8b")


def measured(report: Path, *arguments: object) -> dict[str, Any]:
    """The report of `psigraph perplexity` with these arguments."""
    command = [sys.executable, "-m", "psigraph", "perplexity", *map(str, arguments), "--json-out", str(report)]
    subprocess.run([*command, "--backend", "cpu"], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(report.read_text("utf-8"))
    return found


def loss_rows(folder: Path) -> list[str]:
    """A line a model and reference: divergence and perplexity."""
    lines = []
    for quant in QUANTS:
        model = TINY / f"tiny-qwen3-{quant}.gguf"
        half, eight = folder / "f16.json", folder / "q8.json"
        text = ("--text", TEXT, "--window", TOKENS, "--max-tokens", TOKENS)
        f16 = measured(half, model, *text, "--save-logits", folder / "f16.npz")
        q8 = measured(eight, model, "--against", half, "--kv-type", "q8")
        lines.append(line(quant, "the same with an f16 cache", f16, q8))
        saved = TINY / "reference_logits.npz"
        for kv_type in ("f16", "q8"):
            report = measured(folder / "r.json", model, "--against", saved, "--kv-type", kv_type)
            lines.append(line(quant, "`reference_logits.npz` (float64, nothing rounded)", None, report))
    return lines


def line(quant: str, against: str, before: dict[str, Any] | None, report: dict[str, Any]) -> str:
    found = report["divergence"]
    perplexity = f"{report['perplexity']:.4f}" + (f" (f16: {before['perplexity']:.4f})" if before else "")
    cells = (
        quant.upper(),
        report["kv_type"],
        against,
        f"{report['tokens']:,}",
        f"{found['mean']:.2e}",
        f"{found['p99']:.2e}",
        f"{found['largest']:.2e}",
        f"{100 * found['same_likeliest_token']:.2f} %",
        perplexity,
    )
    return "| " + " | ".join(cells) + " |"


def size_rows() -> list[str]:
    """Bytes of a position in all layers, for the published sizes."""
    lines = []
    for size in SIZES:
        f16, q8 = (cache_bytes(source_of_size(size, "q4_k_m", kv_type=kind).graph()) for kind in ("f16", "q8"))
        lines.append(f"| {size} | {f16:,} | {q8:,} | {100 * q8 / f16:.1f} % |")
    return lines


def table() -> str:
    with tempfile.TemporaryDirectory() as folder:
        losses = loss_rows(Path(folder))
    head = "| tiny model | cache | against | tokens | mean KL | p99 | largest | same likeliest token | perplexity |"
    sizes = "| size | f16, bytes a position | q8 | of f16 |"
    parts = [
        head,
        "| --- " * head.count(" | ") + "| --- |",
        *losses,
        "",
        sizes,
        "| --- | --- | --- | --- |",
        *size_rows(),
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--into", type=Path, metavar="FILE", help="put the table between the markers in this file")
    target = parser.parse_args().into
    if target is None:
        print(table(), end="")
        return
    text = target.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{target}: needs the lines {BEGIN.strip()} and {END.strip()}, once each")
    head, rest = text.split(BEGIN)
    target.write_text(head + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
