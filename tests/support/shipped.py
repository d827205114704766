"""Graphs of the models that psigraph is for, from the tables of `runtime.synth`: no file is needed."""

from __future__ import annotations

import functools
from pathlib import Path

from psigraph.build import fuse, open_model, spec_folder
from psigraph.codegen.lower import PREFILL_ROWS
from psigraph.ir.graph import Graph, TensorType
from psigraph.ir.regime import Regime
from psigraph.ir.spec.loader import load_spec
from psigraph.passes.pipeline import PIPELINE
from psigraph.runtime.synth import model as synth

TINY = Path(__file__).parents[2] / "fixtures" / "tiny"
VOCABULARY = synth.QWEN3_SIZE
CONTEXT = 4096
FUSIONS = tuple(step.name for step in PIPELINE if not step.lowering)


@functools.cache
def graph_of(
    size: str,
    quant: str,
    layers: int | None = None,
    logits: bool = True,
    kv_type: str = "f16",
    disable: tuple[str, ...] = (),
) -> Graph:
    """The fused step of a published size. layers: fewer than it has; the mix of types is that of the whole model."""
    return fuse(step_of(size, quant, layers, logits, kv_type), disable)[0]


@functools.cache
def one_layer_of_each(size: str, quant: str) -> Graph:
    """The fused step of a published size with one layer of each mix of types: all its kernels, not its length."""
    layers: dict[str, dict[str, TensorType]] = {}
    kept = {}
    for name, tensor in tensors_of(size, quant).items():
        if name.startswith("blk."):
            _, number, part = name.split(".", 2)
            layers.setdefault(number, {})[part] = tensor
        else:
            kept[name] = tensor
    mixes = {tuple(layer.items()): layer for layer in layers.values()}.values()
    kept |= {f"blk.{number}.{part}": t for number, layer in enumerate(mixes) for part, t in layer.items()}
    return fuse(bound(size, kept, len(mixes), True, "f16"))[0]


@functools.cache
def prefill_of(
    size: str, quant: str, layers: int | None = None, kv_type: str = "f16", disable: tuple[str, ...] = ()
) -> Graph:
    """The fused graph that takes a prompt in, of a published size."""
    return fuse(step_of(size, quant, layers, False, kv_type, PREFILL_ROWS), disable, regime=Regime.MANY)[0]


def step_of(size: str, quant: str, layers: int | None, logits: bool, kv_type: str = "f16", rows: int = 1) -> Graph:
    """The step of a published size as its spec has it, over so many rows."""
    kept = synth.SIZES[size].layers if layers is None else layers
    tensors = tensors_of(size, quant)
    tensors = {name: t for name, t in tensors.items() if not name.startswith("blk.") or int(name.split(".")[1]) < kept}
    return bound(size, tensors, kept, logits, kv_type, rows)


def tensors_of(size: str, quant: str) -> dict[str, TensorType]:
    """The tensors of the whole model, by name."""
    found = synth._tensors(synth.SIZES[size], synth.QUANTS[quant], VOCABULARY)
    return {t.name: TensorType(t.dtype, t.shape) for t in found}


def bound(size: str, tensors: dict[str, TensorType], layers: int, logits: bool, kv_type: str, rows: int = 1) -> Graph:
    """The step of a model of these tensors as the spec has it."""
    metadata, _ = synth.synth_model(size, "q4_k_m", layers=layers)
    spec = load_spec(spec_folder() / "qwen3.yaml")
    return spec.graph(spec.bind(metadata, tensors, CONTEXT, kv_type), ("logits",) if logits else (), rows)


@functools.cache
def unfused(quant: str, rows: int = 1) -> Graph:
    """The tiny model's step as its spec has it, over so many rows."""
    with open_model(TINY / f"tiny-qwen3-{quant}.gguf") as model:
        return model.graph(("logits",), rows=rows)


@functools.cache
def tiny_graph(quant: str, disable: tuple[str, ...] = ()) -> Graph:
    """The fused step of the tiny model."""
    return fuse(unfused(quant), disable)[0]
