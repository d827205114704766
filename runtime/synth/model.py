"""Model files of exact shapes and block types with seeded random weights.

What a decode step costs depends on shapes and block types, not on what the weights say; so a benchmark on such a
file stands for the real one where that cannot be had. The file says that it is synthetic (`psigraph.synthetic`).

Block types follow llama.cpp's llama-quantize (src/llama-quant.cpp, without an importance matrix); tensors lie in its
order: `output`, `output_norm`, `token_embd`, then layer by layer in alphabetical order.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import OutputError, UsageError
from ..gguf.ggml_types import tensor_bytes
from ..gguf.write import header, padded, pair
from ..whole_files import remove_stale, whole_file
from .blocks import norm_weights, random_blocks
from .vocab import QWEN3_SIZE, SMALLEST, Vocabulary, synthetic_vocabulary


class Size(NamedTuple):
    """The shape of a Qwen3 model, as published with its weights."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    untied: bool
    head_dim: int = 128
    context: int = 40_960
    theta: float = 1e6
    epsilon: float = 1e-6


class Quant(NamedTuple):
    """file_type: llama.cpp's number of the recipe; base: most matrices; head: output, or token_embd where tied."""

    file_type: int
    base: str
    head: str


SIZES = {
    "0.6b": Size(28, 1024, 3072, 16, 8, False),
    "1.7b": Size(28, 2048, 6144, 16, 8, False),
    "4b": Size(36, 2560, 9728, 32, 8, False),
    "8b": Size(36, 4096, 12288, 32, 8, True),
}
QUANTS = {
    "q4_k_m": Quant(15, "q4_k", "q6_k"),
    "q5_k_m": Quant(17, "q5_k", "q6_k"),
    "q8_0": Quant(7, "q8_0", "q8_0"),
    "f16": Quant(1, "f16", "f16"),
    "iq3_m": Quant(27, "iq3_s", "q6_k"),
}

# A logit is a sum of hidden products of unit-variance inputs: 2.5 / sqrt(hidden) gives logits of deviation 2.5, as in
# trained models. Every other matrix keeps its input's variance.
_HEAD_GAIN = 2.5
_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

Progress = Callable[[int, int], None]


class _Tensor(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]


def write_synth(
    path: str | os.PathLike[str],
    size: str,
    quant: str,
    seed: int,
    untied: bool = False,
    layers: int | None = None,
    progress: Progress | None = None,
    vocab: int = QWEN3_SIZE,
) -> Path:
    """Write a synthetic Qwen3 file to `path` and return the path.

    size    0.6b, 1.7b, 4b or 8b.
    quant   q4_k_m, q5_k_m, q8_0, f16, or iq3_m (which no kernel supports: for tests of refusals).
    seed    0 to 2**64 - 1; the same arguments give the same bytes, and a tensor's bytes depend on seed, name, type
            and shape alone.
    untied  a separate `output.weight` (8b always has one).
    layers  how many instead of the size's own; the block mix is that of a model with so many.
    vocab   number of tokens (tests take small ones).
    progress(bytes written, bytes in all).

    The file appears whole or not at all: it is written beside `path` and renamed after fsync.
    Raises UsageError for arguments that cannot work, OutputError for a file that cannot be written.
    """
    shape, recipe, vocabulary = _checked(size, quant, seed, layers, vocab)
    shape = shape._replace(untied=shape.untied or untied)
    tensors = list(_tensors(shape, recipe, vocab))
    name = f"Qwen3 {size.upper()} synthetic (random weights, seed {seed})"
    start = header(_pairs(name, shape, recipe, seed, vocabulary), tensors)
    total = len(start) + sum(padded(tensor_bytes(tensor.dtype, tensor.shape)) for tensor in tensors)
    path = Path(path)
    with _whole_file(path, total) as descriptor:
        done = _write(descriptor, start)
        for tensor in tensors:
            for chunk in _data(tensor, seed, shape):
                done += _write(descriptor, chunk)
                if progress is not None:
                    progress(done, total)
            done += _write(descriptor, b"\0" * (padded(done) - done))
    if progress is not None:
        progress(total, total)
    return path


def synth_model(
    size: str, quant: str, untied: bool = False, layers: int | None = None
) -> tuple[dict[str, object], dict[str, tuple[str, tuple[int, ...]]]]:
    """What the header of such a file says, without writing one: (metadata of the model, name -> (type, shape)).

    The arguments and errors are those of `write_synth`; the tokenizer's keys are left out.
    """
    shape, recipe, _ = _checked(size, quant, 0, layers, QWEN3_SIZE)
    shape = shape._replace(untied=shape.untied or untied)
    metadata: dict[str, object] = {
        "general.architecture": "qwen3",
        "general.name": f"Qwen3 {size.upper()} {quant.upper()} (shapes only)",
        "qwen3.block_count": shape.layers,
        "qwen3.context_length": shape.context,
        "qwen3.embedding_length": shape.hidden,
        "qwen3.feed_forward_length": shape.feed_forward,
        "qwen3.attention.head_count": shape.heads,
        "qwen3.attention.head_count_kv": shape.kv_heads,
        "qwen3.attention.key_length": shape.head_dim,
        "qwen3.attention.value_length": shape.head_dim,
        "qwen3.attention.layer_norm_rms_epsilon": shape.epsilon,
        "qwen3.rope.freq_base": shape.theta,
    }
    return metadata, {tensor.name: (tensor.dtype, tensor.shape) for tensor in _tensors(shape, recipe, QWEN3_SIZE)}


def _checked(size: str, quant: str, seed: int, layers: int | None, vocab: int) -> tuple[Size, Quant, Vocabulary]:
    if size.lower() not in SIZES:
        raise UsageError(f"--size {size}: choose one of {', '.join(SIZES)}")
    if quant.lower() not in QUANTS:
        raise UsageError(f"--quant {quant}: choose one of {', '.join(QUANTS)}")
    if not 0 <= seed < 2**64:
        raise UsageError(f"--seed {seed}: choose a number from 0 to 2**64 - 1")
    shape = SIZES[size.lower()]
    if layers is not None:
        if not 1 <= layers <= 1024:
            raise UsageError(f"--layers {layers}: choose a number from 1 to 1024")
        shape = shape._replace(layers=layers)
    if vocab < SMALLEST:
        raise UsageError(f"a vocabulary of {vocab} tokens: at least {SMALLEST} are needed")
    return shape, QUANTS[quant.lower()], synthetic_vocabulary(vocab)


def use_more_bits(layer: int, layers: int) -> bool:
    """Whether the _M recipes of the K types give a layer's attn_v and ffn_down to q6_k: the first and last eighth,
    and every third in between.
    """
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _block_type(recipe: Quant, part: str, layer: int, layers: int) -> str:
    """The type of one matrix of a layer."""
    if recipe.base in ("q4_k", "q5_k"):
        return "q6_k" if part in ("attn_v", "ffn_down") and use_more_bits(layer, layers) else recipe.base
    if recipe.base == "iq3_s":
        raised = part in ("attn_v", "attn_output") or (part == "ffn_down" and layer < layers // 8)
        return "q4_k" if raised else recipe.base
    return recipe.base


def _tensors(size: Size, recipe: Quant, vocab: int) -> Iterator[_Tensor]:
    hidden, query, key = size.hidden, size.heads * size.head_dim, size.kv_heads * size.head_dim
    if size.untied:
        yield _Tensor("output.weight", recipe.head, (vocab, hidden))
    yield _Tensor("output_norm.weight", "f32", (hidden,))
    yield _Tensor("token_embd.weight", recipe.base if size.untied else recipe.head, (vocab, hidden))
    parts: dict[str, tuple[int, ...]] = {
        "attn_k": (key, hidden),
        "attn_k_norm": (size.head_dim,),
        "attn_norm": (hidden,),
        "attn_output": (hidden, query),
        "attn_q": (query, hidden),
        "attn_q_norm": (size.head_dim,),
        "attn_v": (key, hidden),
        "ffn_down": (hidden, size.feed_forward),
        "ffn_gate": (size.feed_forward, hidden),
        "ffn_norm": (hidden,),
        "ffn_up": (size.feed_forward, hidden),
    }
    for layer in range(size.layers):
        for part, shape in parts.items():
            dtype = "f32" if len(shape) == 1 else _block_type(recipe, part, layer, size.layers)
            yield _Tensor(f"blk.{layer}.{part}.weight", dtype, shape)


def _pairs(name: str, size: Size, recipe: Quant, seed: int, vocabulary: Vocabulary) -> list[bytes]:
    end_of_text = vocabulary.first_special
    end_of_turn = end_of_text + 2
    return [
        pair("general.architecture", "str", "qwen3"),
        pair("general.type", "str", "model"),
        pair("general.name", "str", name),
        pair("psigraph.synthetic", "bool", True),
        pair("psigraph.seed", "u64", seed),
        pair("qwen3.block_count", "u32", size.layers),
        pair("qwen3.context_length", "u32", size.context),
        pair("qwen3.embedding_length", "u32", size.hidden),
        pair("qwen3.feed_forward_length", "u32", size.feed_forward),
        pair("qwen3.attention.head_count", "u32", size.heads),
        pair("qwen3.attention.head_count_kv", "u32", size.kv_heads),
        pair("qwen3.rope.freq_base", "f32", size.theta),
        pair("qwen3.attention.layer_norm_rms_epsilon", "f32", size.epsilon),
        pair("qwen3.attention.key_length", "u32", size.head_dim),
        pair("qwen3.attention.value_length", "u32", size.head_dim),
        pair("tokenizer.ggml.model", "str", "gpt2"),
        pair("tokenizer.ggml.pre", "str", "qwen2"),
        pair("tokenizer.ggml.tokens", "[str]", vocabulary.tokens),
        pair("tokenizer.ggml.token_type", "[i32]", vocabulary.types),
        pair("tokenizer.ggml.merges", "[str]", vocabulary.merges),
        pair("tokenizer.ggml.eos_token_id", "u32", end_of_turn),
        pair("tokenizer.ggml.padding_token_id", "u32", end_of_text),
        pair("tokenizer.ggml.bos_token_id", "u32", end_of_text),
        pair("tokenizer.ggml.add_bos_token", "bool", False),
        pair("tokenizer.chat_template", "str", _TEMPLATE),
        pair("general.quantization_version", "u32", 2),
        pair("general.file_type", "u32", recipe.file_type),
    ]


def _data(tensor: _Tensor, seed: int, size: Size) -> Iterator[NDArray[np.uint8]]:
    """The tensor's bytes, in chunks."""
    generator = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(tensor.name.encode())]))
    elements = math.prod(tensor.shape)
    if tensor.dtype == "f32":
        yield norm_weights(elements, generator)
        return
    is_head = tensor.name == "output.weight" or (tensor.name == "token_embd.weight" and not size.untied)
    deviation = (_HEAD_GAIN if is_head else 1.0) / math.sqrt(tensor.shape[1])
    yield from random_blocks(tensor.dtype, elements, deviation, generator)


def _write(descriptor: int, data: bytes | NDArray[np.uint8]) -> int:
    """Write all of it; bytes written."""
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    done = 0
    while done < len(view):
        done += os.write(descriptor, view[done:])
    return done


@contextlib.contextmanager
def _whole_file(path: Path, total: int) -> Iterator[int]:
    """Descriptor of a temporary file that becomes `path` if the block ends well and is gone if it does not."""
    try:
        path = Path(os.path.realpath(path))  # a symlink stays, and what it names is written
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise OutputError(f"{path}: is not a regular file; choose another name")
        remove_stale(path.parent, path.name)  # gigabytes, where a run before this one was killed
        disk = os.statvfs(path.parent)
        free = disk.f_bavail * disk.f_frsize
        if free < total:
            raise OutputError(f"{path}: needs {total:,} bytes, the disk has {free:,} free; choose another disk or size")
        with whole_file(path, 0o666) as file:
            yield file.fileno()
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None


def _sync_folder(folder: Path) -> None:
    """Make the rename last through a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
