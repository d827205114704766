"""Synthetic files: right shapes and block types, finite weights, same bytes for the same seed, whole or not at all."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants

from psigraph.ir.errors import OutputError, UsageError
from psigraph.runtime.gguf.file import open_gguf
from psigraph.runtime.gguf.ggml_types import tensor_bytes
from psigraph.runtime.synth import model as synth
from psigraph.runtime.synth.blocks import CHUNK_BYTES, random_blocks
from psigraph.runtime.synth.model import QUANTS, SIZES, use_more_bits, write_synth
from psigraph.runtime.synth.vocab import SMALLEST, synthetic_vocabulary
from psigraph.runtime.tokenizer.bpe import Tokenizer

VOCAB = 512


def dequantized(dtype, shape, data):
    """f32 of `shape`, by the gguf package."""
    if dtype == "f32":
        return data.view("<f4").reshape(shape)
    rows = data.view("<f2").reshape(shape) if dtype == "f16" else data.reshape(shape[0], -1)
    return quants.dequantize(rows, GGMLQuantizationType[dtype.upper()]).reshape(shape)


def planned(size, quant, untied=False, layers=None):
    """(name, type, shape) of every tensor, without writing them."""
    shape = SIZES[size]
    shape = shape._replace(untied=shape.untied or untied, layers=layers or shape.layers)
    return [tuple(tensor) for tensor in synth._tensors(shape, QUANTS[quant], 151_936)]


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("untied", [False, True])
def test_one_layer_of_every_quant_is_read_by_both_readers_with_weights_of_the_right_size(tmp_path, quant, untied):
    path = write_synth(tmp_path / "one.gguf", "0.6b", quant, 3, untied=untied, layers=1, vocab=VOCAB)
    reference = GGUFReader(path)
    with open_gguf(path) as file:
        assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
        for tensor in reference.tensors:
            info = file.tensors[tensor.name]
            assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
            weights = dequantized(info.dtype, info.shape, file.read(info.name))
            assert np.isfinite(weights).all()
            if len(info.shape) == 1:
                assert info.dtype == "f32"
                assert 0.9 <= weights.min() < weights.max() <= 1.1
                continue
            is_head = info.name == ("output.weight" if untied else "token_embd.weight")
            deviation = (2.5 if is_head else 1) / info.shape[1] ** 0.5
            assert abs(weights.std() / deviation - 1) < 0.02, info
            assert abs(weights.mean() / deviation) < 0.02, info
            assert file.metadata["qwen3.block_count"] == 1
            assert file.metadata["psigraph.synthetic"] is True
            assert file.metadata["psigraph.seed"] == 3
    assert os.listdir(tmp_path) == ["one.gguf"]


@pytest.mark.parametrize(("layers", "more"), [(28, 14), (36, 18)])
def test_k_recipes_raise_half_of_the_layers(layers, more):
    raised = [layer for layer in range(layers) if use_more_bits(layer, layers)]
    assert len(raised) == more
    assert raised[: layers // 8] == list(range(layers // 8))
    assert raised[-3:] == [layers - 3, layers - 2, layers - 1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("quant", "base"), [("q4_k_m", "q4_k"), ("q5_k_m", "q5_k")])
def test_block_mix_of_the_k_recipes(size, quant, base):
    tensors = planned(size, quant)
    layers = SIZES[size].layers
    for name, dtype, shape in tensors:
        if len(shape) == 1:
            assert dtype == "f32"
        elif name == "output.weight" or (name == "token_embd.weight" and size != "8b"):
            assert dtype == "q6_k"
        elif "attn_v" in name or "ffn_down" in name:
            assert dtype == ("q6_k" if use_more_bits(int(name.split(".")[1]), layers) else base)
        else:
            assert dtype == base
    assert (tensors[0][0] == "output.weight") == (size == "8b")
    assert tensors[-1][0] == f"blk.{layers - 1}.ffn_up.weight"


def test_the_mix_is_that_of_the_tiny_model_quantized_by_llama_cpp():
    fixture = Path(__file__).parents[3] / "fixtures" / "tiny" / "tiny-qwen3-q4_k_m.gguf"
    with open_gguf(fixture) as file:
        theirs = [(info.name, info.dtype) for info in file.tensors.values()]
    assert [(name, dtype) for name, dtype, _ in planned("0.6b", "q4_k_m", layers=8)] == theirs


def test_data_of_the_untied_1_7b_is_as_large_as_medpsys():
    """The published file has 1,282,439,360 bytes; what is not data is its header, with Qwen3's vocabulary."""
    tensors = planned("1.7b", "q4_k_m", untied=True)
    data = sum(tensor_bytes(dtype, shape) for _, dtype, shape in tensors)
    assert 5_000_000 < 1_282_439_360 - data < 6_500_000
    assert Counter(dtype for _, dtype, _ in tensors) == {"q4_k": 169, "q6_k": 29, "f32": 113}


def test_iq3_m_keeps_some_matrices_in_q4_k():
    types = {name: dtype for name, dtype, _ in planned("1.7b", "iq3_m")}
    assert {types[f"blk.9.{part}.weight"] for part in ("attn_q", "attn_k", "ffn_up", "ffn_down")} == {"iq3_s"}
    assert {types["blk.9.attn_v.weight"], types["blk.9.attn_output.weight"], types["blk.2.ffn_down.weight"]} == {"q4_k"}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    def digest(seed, name):
        path = write_synth(tmp_path / name, "0.6b", "q4_k_m", seed, layers=1, vocab=VOCAB)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    first = digest(1, "a.gguf")
    assert digest(1, "b.gguf") == first
    assert digest(2, "c.gguf") != first


@pytest.mark.parametrize(
    ("dtype", "digest"),
    [
        ("q4_k", "92dbd9ac78c8d420"),
        ("q5_k", "185468260afc9810"),
        ("q6_k", "6679afbed4c814aa"),
        ("q8_0", "b6b73ac9f66b43f3"),
        ("f16", "88e8fe34aa600408"),
        ("iq3_s", "14a280cbacc2028e"),
    ],
)
def test_the_bytes_do_not_change_between_versions(dtype, digest):
    """Recorded digests of synthetic files, and with them reports, rest on this."""
    drawn = b"".join(chunk.tobytes() for chunk in random_blocks(dtype, 1024, 0.02, np.random.PCG64(9)))
    assert hashlib.sha256(drawn).hexdigest().startswith(digest)


def first_logits(file, layers, token):
    """f32[vocabulary] after one token at position 0, where attention gives back the value itself and RoPE nothing."""

    def weights(name):
        info = file.tensors[f"{name}.weight"]
        return dequantized(info.dtype, info.shape, file.read(info.name)).astype(np.float32)

    def norm(x, name):
        return x / np.sqrt(np.mean(x * x) + 1e-6) * weights(name)

    x = weights("token_embd")[token]
    for layer in range(layers):
        h = norm(x, f"blk.{layer}.attn_norm")
        value = (weights(f"blk.{layer}.attn_v") @ h).reshape(8, 1, 128)
        x = x + weights(f"blk.{layer}.attn_output") @ np.repeat(value, 2, axis=1).reshape(-1)
        h = norm(x, f"blk.{layer}.ffn_norm")
        gate = weights(f"blk.{layer}.ffn_gate") @ h
        x = x + weights(f"blk.{layer}.ffn_down") @ (gate / (1 + np.exp(-gate)) * (weights(f"blk.{layer}.ffn_up") @ h))
    return weights("token_embd") @ norm(x, "output_norm")


def test_logits_are_finite_varied_and_differ_by_token(tmp_path):
    path = write_synth(tmp_path / "two.gguf", "0.6b", "q4_k_m", 1, layers=2, vocab=VOCAB)
    with open_gguf(path) as file:
        first, second = (first_logits(file, 2, token) for token in (5, 6))
    for logits in (first, second):
        assert np.isfinite(logits).all()
        assert 2 < logits.std() < 3.5
        assert np.diff(np.sort(logits)[-2:]) > 1e-3
    assert first.argmax() != second.argmax()
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.3


def test_neighbouring_tensors_and_blocks_differ(tmp_path):
    path = write_synth(tmp_path / "two.gguf", "0.6b", "q8_0", 1, layers=2, vocab=VOCAB)
    with open_gguf(path) as file:
        first, second = (file.read(f"blk.{layer}.attn_q.weight") for layer in (0, 1))
        assert not np.array_equal(first, second)
        scales = first.reshape(-1, 34)[:, :2].copy().view("<f2")
        assert len(np.unique(scales)) > 100


def test_chunks_are_whole_blocks_of_a_bounded_size():
    elements = 256 * 100_000
    chunks = [len(chunk) for chunk in random_blocks("q6_k", elements, 0.02, np.random.PCG64(1))]
    assert sum(chunks) == elements // 256 * 210
    assert len(chunks) > 1
    assert max(chunks) <= CHUNK_BYTES


def test_the_vocabulary_has_qwen3s_special_tokens_where_qwen3_has_them():
    tokens, merges, types, _ = synthetic_vocabulary()
    assert len(tokens) == len(set(tokens)) == len(types) == 151_936
    assert len(merges) == 151_387
    assert tokens[151_643:151_646] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokens[151_667:151_669] == ["<think>", "</think>"]
    assert tokens[-1] == "[PAD151935]"
    assert Counter(types) == {1: 151_643, 3: 14, 4: 12, 5: 267}
    made = set(tokens[:256])
    for merge, token in zip(merges, tokens[256:], strict=False):
        head, tail = merge.split(" ")
        assert head + tail == token
        assert head in made
        assert tail in made
        made.add(token)


def test_text_goes_through_the_vocabulary_and_back(tmp_path):
    path = write_synth(tmp_path / "one.gguf", "0.6b", "q8_0", 1, layers=1, vocab=SMALLEST + 100)
    with open_gguf(path) as file:
        tokenizer = Tokenizer(file)
    text = "<|im_start|>user\nabc Zürich 42 😀<|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[0] == tokenizer.vocab_size - 26 + 1
    assert tokenizer.end_tokens == (tokenizer.vocab_size - 26 + 2, tokenizer.vocab_size - 26)


def test_progress_ends_with_the_files_size(tmp_path):
    steps = []
    path = write_synth(
        tmp_path / "one.gguf", "0.6b", "q4_k_m", 1, layers=1, vocab=VOCAB, progress=lambda *step: steps.append(step)
    )
    size = path.stat().st_size
    assert steps[-1] == (size, size)
    assert steps == sorted(steps)
    assert {total for _, total in steps} == {size}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")])
def test_a_failure_leaves_nothing_and_keeps_the_old_file(tmp_path, failure):
    path = tmp_path / "kept.gguf"
    path.write_bytes(b"old")

    def fail(done, total):
        raise failure

    expected = OutputError if isinstance(failure, OSError) else failure
    with pytest.raises(expected):
        write_synth(path, "0.6b", "q8_0", 1, layers=1, vocab=VOCAB, progress=fail)
    assert os.listdir(tmp_path) == ["kept.gguf"]
    assert path.read_bytes() == b"old"


def test_an_existing_file_is_replaced_and_keeps_ordinary_permissions(tmp_path):
    path = tmp_path / "again.gguf"
    path.write_bytes(b"old")
    write_synth(path, "0.6b", "q8_0", 1, layers=1, vocab=VOCAB)
    open_gguf(path).close()
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_where_it_cannot_be_written(tmp_path, monkeypatch):
    def attempt(path):
        write_synth(path, "0.6b", "q8_0", 1, layers=1, vocab=VOCAB)

    with pytest.raises(OutputError, match=r"absent.*No such file or directory"):
        attempt(tmp_path / "absent" / "x.gguf")
    with pytest.raises(OutputError, match="not a regular file"):
        attempt(tmp_path)
    with pytest.raises(OutputError, match="not a regular file"):
        attempt("/dev/null")
    full = os.statvfs_result((4096, 4096, 100, 10, 10, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with pytest.raises(OutputError, match=r"needs [\d,]+ bytes, the disk has 40,960 free"):
        attempt(tmp_path / "x.gguf")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"size": "7b"}, "--size 7b: choose one of 0.6b, 1.7b, 4b, 8b"),
        ({"quant": "q2_k"}, "--quant q2_k: choose one of q4_k_m"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**64}, "--seed 18446744073709551616"),
        ({"layers": 0}, "--layers 0: choose a number from 1"),
        ({"vocab": 10}, "at least 282"),
    ],
)
def test_arguments_that_cannot_work(tmp_path, arguments, says):
    with pytest.raises(UsageError) as refused:
        write_synth(tmp_path / "x.gguf", **({"size": "0.6b", "quant": "q8_0", "seed": 1, "vocab": VOCAB} | arguments))
    assert says in str(refused.value)
    assert os.listdir(tmp_path) == []
