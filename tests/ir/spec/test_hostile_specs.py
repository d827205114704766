"""Specs that somebody gives: whatever they hold, an error that names the file, soon."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from small_models import QWEN3, SPEC_PATH, Small, changed_spec

from psigraph.ir.errors import SpecError, UnsupportedModelError
from psigraph.ir.spec.expression import evaluate
from psigraph.ir.spec.loader import load_spec
from psigraph.ir.spec.yaml_nodes import MOST_BYTES

TEXT = SPEC_PATH.read_text(encoding="utf-8")
SCALE = "value: head_dim ** -0.5"

HOSTILE: dict[str, tuple[str, str]] = {
    "lists in lists": ("a: " + "[" * 5_000, "more than 16 nodes in each other"),
    "maps in maps": ("".join(" " * depth + "a:\n" for depth in range(500)), "more than 16 nodes in each other"),
    "lists in a line": ("- " * 20_000, "more than 16 nodes in each other"),
    "an alias of itself": ("architecture: a\nsizes: &a {layers: *a}", "a spec has no aliases"),
    "aliases of aliases": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "a spec has no aliases"),
    "a control character": ("architecture: \x07", "not allowed"),
    "a large file": ("#" + "x" * MOST_BYTES, "no spec is that long"),
    "no UTF-8": ("architecture: \udcff", "cannot be read"),
    "a tag": (TEXT.replace("layers:   ", "layers: !!python/object/apply:os.system "), ""),
    "a power of powers": (TEXT.replace(SCALE, "value: ((((9 ** 8) ** 8) ** 8) ** 8) ** 8"), "more than 128 bits"),
    "a large exponent": (TEXT.replace(SCALE, "value: 2 ** 100000"), "exponent 100000 is above 8"),
    "a division by zero": (TEXT.replace("head_dim % 2 == 0", "head_dim % 2 // 0"), "division"),
    "a root of less than zero": (TEXT.replace(SCALE, "value: (0 - 2) ** 0.5"), "no finite number"),
    "no number": (TEXT.replace(SCALE, "value: 1e308 * 10"), "no finite number"),
    "many digits": (TEXT.replace(SCALE, "value: " + "9" * 150), "more than 128 bits"),
    "a long expression": (TEXT.replace(SCALE, "value: " + "-" * 100_000 + "1"), "characters, at most 200"),
    "many brackets": (TEXT.replace(SCALE, "value: " + "(" * 99 + "1" + ")" * 99), "wants scale as float"),
    "a NUL": (TEXT.replace("layers == 1", "x").replace("heads % kv_heads == 0", '"heads \\0"'), "is no expression"),
    "digits in an op": (TEXT.replace("eps=$epsilon", "eps=" + "9" * 5000), "a number of too many digits"),
    "a text in an op": (TEXT.replace("eps=$epsilon", 'eps="\\q"'), "cannot read this text"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_spec_is_one_error_and_soon(tmp_path: Path, case: str) -> None:
    text, said = HOSTILE[case]
    path = tmp_path / "m.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    began, found = time.process_time(), ""
    small = Small()
    try:
        spec = load_spec(path)
        spec.graph(spec.bind(small.metadata(), small.tensors(), 16))
    except (SpecError, UnsupportedModelError) as error:
        found = str(error).splitlines()[0]
    assert said in found
    assert bool(said) == bool(found)
    assert len(found) < 400
    assert time.process_time() - began < 2


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.yaml")
    with pytest.raises(SpecError, match="not a regular one"):
        load_spec(tmp_path / "m.yaml")


def test_layers_are_bounded_whatever_a_spec_allows() -> None:
    spec = changed_spec((("integer: 1..1024}", "integer: 1..9000000000}"),))
    small = Small()
    with pytest.raises(UnsupportedModelError, match="1000000000 layers; at most 4096"):
        spec.bind({**small.metadata(), "qwen3.block_count": 1_000_000_000}, small.tensors(), 16)


def test_what_sizes_need_is_within_the_bounds() -> None:
    assert evaluate("2 ** 8 * 3", {}) == 768
    assert QWEN3.bind(Small().metadata(), Small().tensors(), 16).layers == 1
