"""The strict reader: sound files as the gguf package reads them, wrong ones refused cheaply and by name."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import malformed_gguf as malformed
import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES

from psigraph.ir.errors import ModelFileError
from psigraph.runtime.gguf import cursor as gguf_cursor
from psigraph.runtime.gguf.file import open_gguf
from psigraph.runtime.gguf.ggml_types import BY_NAME, GGML_TYPES, first_not_finite, tensor_bytes
from psigraph.runtime.gguf.strings import StringArray

TINY = Path(__file__).parents[3] / "fixtures" / "tiny"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Every case's outcome and cost, by name; one process forks for each file."""
    folder = tmp_path_factory.mktemp("malformed")
    paths = []
    for name, case in malformed.CASES.items():
        paths.append(folder / f"{name}.gguf")
        paths[-1].write_bytes(case.content())
    command = [sys.executable, malformed.__file__, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    sizes = {path.stem: path.stat().st_size for path in paths}
    for path in paths:
        path.unlink()
    return {row["case"]: row | {"size": sizes[row["case"]]} for row in rows}


@pytest.mark.parametrize("name", malformed.CASES)
def test_wrong_files_are_refused_by_name_and_sound_ones_load(measured, name):
    case, row = malformed.CASES[name], measured[name]
    assert row["outcome"] == ("loaded" if case.sound else "ModelFileError"), row
    assert case.names in row["message"]
    assert "\n" not in row["message"]
    assert row["message"].isascii()
    assert len(row["message"]) < 400


@pytest.mark.parametrize("name", malformed.CASES)
def test_no_file_costs_more_than_a_second_and_64_mb_beyond_five_times_its_size(measured, name):
    row = measured[name]
    assert row["seconds"] <= 1.0
    assert row["growth"] <= (64 << 20) + 5 * row["size"]


def test_header_of_qwen3s_vocabulary_takes_at_most_a_second_and_100_mb(measured):
    row = measured["vocabulary"]
    assert row["seconds"] <= 1.0
    assert row["growth"] <= 100 << 20


@pytest.mark.parametrize("name", ["tiny-qwen3-q4_k_m.gguf", "tiny-qwen3-q8_0.gguf"])
def test_reads_what_the_gguf_package_reads(name):
    reference = GGUFReader(TINY / name)
    with open_gguf(TINY / name) as file:
        assert file.version == 3
        assert file.alignment == reference.alignment
        assert file.data_offset == reference.data_offset
        assert file.size == (TINY / name).stat().st_size
        fields = {key: field for key, field in reference.fields.items() if not key.startswith("GGUF.")}
        assert list(file.metadata) == list(fields)
        for key, field in fields.items():
            value = file.metadata[key]
            if isinstance(value, np.ndarray | StringArray):
                value = list(value)
            assert value == field.contents(), key
        assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
        for tensor in reference.tensors:
            info = file.tensors[tensor.name]
            assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
            assert info.dtype == tensor.tensor_type.name.lower()
            assert info.shape == tuple(reversed(tensor.shape.tolist()))
            assert file.read(tensor.name).tobytes() == np.asarray(tensor.data).tobytes()


def test_every_cut_of_a_file_is_refused(tmp_path):
    """No length makes a truncated header look whole."""
    path = tmp_path / "cut.gguf"
    for length in range(len(malformed.VALID)):
        path.write_bytes(malformed.VALID[:length])
        with pytest.raises(ModelFileError):
            open_gguf(path)


def test_flipped_bytes_load_or_are_refused(tmp_path):
    """Whatever single byte is damaged, no other exception escapes."""
    path = tmp_path / "flipped.gguf"
    random = np.random.default_rng(5)
    for at in range(len(malformed.VALID) - 64):
        damaged = bytearray(malformed.VALID)
        damaged[at] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        try:
            with open_gguf(path) as file:
                for name in file.tensors:
                    file.read(name, check=False)
        except ModelFileError:
            pass


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "zero.gguf").symlink_to("/dev/zero")
    for name in ("fifo.gguf", "folder.gguf", "zero.gguf"):
        with pytest.raises(ModelFileError, match=rf"{name}.*not a regular file"):
            open_gguf(tmp_path / name)
    with pytest.raises(ModelFileError, match="no such file"):
        open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError, match="cannot be opened"):
        open_gguf(tmp_path / "nul\0.gguf")


def test_a_file_that_shrinks_after_it_was_opened_gives_an_error(tmp_path):
    path = tmp_path / "shrinks.gguf"
    path.write_bytes(malformed.one([1 << 18], data=b"\0" * (1 << 20)))
    with open_gguf(path) as file:
        os.truncate(path, 4096)
        with pytest.raises(ModelFileError, match=r"tensor a: .*truncated.*byte 4096"):
            file.read("a")
        os.truncate(path, 8192)
        with pytest.raises(ModelFileError, match="changed"):
            file.sha256(lambda done, total: os.truncate(path, 100))


def test_closed_file_and_unknown_tensor(tmp_path):
    path = tmp_path / "valid.gguf"
    path.write_bytes(malformed.VALID)
    with open_gguf(path) as file, pytest.raises(ModelFileError, match="absent: no such tensor"):
        file.read("absent")
    file.close()
    with pytest.raises(ModelFileError, match="cannot be read"):
        file.read("a")


def test_refused_files_leave_no_descriptor_open(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(malformed.VALID[:200])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(ModelFileError):
            open_gguf(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_split_files_are_refused_by_the_name_of_their_parts(tmp_path):
    path = tmp_path / "big-00002-of-00003.gguf"
    path.write_bytes(malformed.VALID)
    with pytest.raises(ModelFileError) as refused:
        open_gguf(path)
    for part in (1, 2, 3):
        assert f"big-0000{part}-of-00003.gguf" in str(refused.value)
    whole = tmp_path / "whole-00001-of-00001.gguf"
    whole.write_bytes(malformed.build([*malformed.PAIRS, malformed.pair("split.count", malformed.U16, 1)]))
    open_gguf(whole).close()


def test_many_parts_are_named_in_short(tmp_path):
    path = tmp_path / "huge-00001-of-00099.gguf"
    path.write_bytes(malformed.VALID)
    with pytest.raises(ModelFileError, match=r"huge-00002-of-00099.gguf, \.\.\., huge-00099-of-00099.gguf"):
        open_gguf(path)


def test_scalars_and_arrays_of_every_type(tmp_path):
    values = {
        malformed.U8: 255, malformed.I8: -128, malformed.U16: 65_535, malformed.I16: -32_768,
        malformed.U32: 2**32 - 1, malformed.I32: -(2**31), malformed.F32: 0.5, malformed.U64: 2**64 - 1,
        malformed.I64: -(2**63), malformed.F64: 0.1, malformed.BOOL: 1, malformed.STRING: "é\n",
    }  # fmt: skip
    pairs = [malformed.pair(f"k{kind}", kind, value) for kind, value in values.items()]
    pairs += [malformed.array(f"a{kind}", kind, [value] * 3) for kind, value in values.items()]
    pairs += [malformed.array(f"e{kind}", kind, []) for kind in values]
    path = tmp_path / "types.gguf"
    path.write_bytes(malformed.build(pairs))
    with open_gguf(path) as file:
        for kind, value in values.items():
            assert file.metadata[f"k{kind}"] == value
            assert type(file.metadata[f"k{kind}"]) is (bool if kind == malformed.BOOL else type(value))
            assert list(file.metadata[f"a{kind}"]) == [value] * 3
            assert len(file.metadata[f"e{kind}"]) == 0


def test_array_strings_keep_bytes_that_are_not_utf8(tmp_path):
    raw = [b"\xff\xfe", b"", "é".encode(), b"a" * 3_000]
    path = tmp_path / "raw.gguf"
    path.write_bytes(malformed.build([malformed.array("k", malformed.STRING, raw * 1000)]))  # spans several reads
    with open_gguf(path) as file:
        assert [text.encode("utf-8", "surrogateescape") for text in file.metadata["k"]] == raw * 1000


def test_the_bound_on_metadata_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_cursor, "MAX_METADATA_BYTES", 300)
    path = tmp_path / "valid.gguf"
    path.write_bytes(malformed.VALID)
    with pytest.raises(ModelFileError, match="metadata of more than"):
        open_gguf(path)


def test_digest_is_remembered_until_the_file_changes(tmp_path):
    path, cache = tmp_path / "valid.gguf", tmp_path / "cache"
    path.write_bytes(malformed.VALID)
    steps = []
    with open_gguf(path) as file:
        digest = file.sha256(lambda done, total: steps.append((done, total)), cache)
        assert digest == hashlib.sha256(malformed.VALID).hexdigest()
        assert steps == [(len(malformed.VALID), len(malformed.VALID))]
        assert file.sha256(lambda *_: pytest.fail("hashed again"), cache) == digest
    path.write_bytes(malformed.VALID + b"more")
    with open_gguf(path) as file:
        assert file.sha256(cache_dir=cache) == hashlib.sha256(malformed.VALID + b"more").hexdigest()


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"sha256": 3}', b'{"sha256": "zz"}', b"\xff"])
def test_a_damaged_digest_cache_is_not_believed(tmp_path, damage):
    path, cache = tmp_path / "valid.gguf", tmp_path / "cache"
    path.write_bytes(malformed.VALID)
    with open_gguf(path) as file:
        digest = file.sha256(cache_dir=cache)
        (entry,) = cache.iterdir()
        entry.write_bytes(damage)
        assert file.sha256(cache_dir=cache) == digest


def test_a_digest_cache_that_cannot_be_written_is_left_out(tmp_path):
    path = tmp_path / "valid.gguf"
    path.write_bytes(malformed.VALID)
    with open_gguf(path) as file:
        assert file.sha256(cache_dir=path / "below-a-file") == hashlib.sha256(malformed.VALID).hexdigest()


def test_threads_may_read_at_once():
    with open_gguf(TINY / "tiny-qwen3-q4_k_m.gguf") as file:
        names = list(file.tensors)
        alone = {name: file.read(name).tobytes() for name in names}
        wrong = []

        def read_all():
            wrong.extend(name for name in names if file.read(name).tobytes() != alone[name])

        threads = [threading.Thread(target=read_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_type_table_agrees_with_the_gguf_package():
    known = {int(kind): (kind.name.lower(), *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    ours = {number: (row.name, row.block, row.nbytes) for number, row in GGML_TYPES.items()}
    assert {number: ours[number] for number in ours.keys() & known.keys()} == {
        number: known[number] for number in ours.keys() & known.keys()
    }
    assert {"f32", "f16", "bf16", "q4_k", "q5_k", "q6_k", "q8_0", "iq3_s"} <= {ours[number][0] for number in known}
    assert tensor_bytes("q4_k", (3, 512)) == 3 * 2 * 144


@pytest.mark.parametrize("dtype", [name for name, row in BY_NAME.items() if row.scales or row.floats])
def test_a_scale_that_is_not_finite_is_found(dtype):
    """In the last block of several chunks, where the type keeps its scales; -Inf and NaN both."""
    row = BY_NAME[dtype]
    bits = {"f32": b"\0\0\x80\xff", "bf16": b"\x80\xff", "f64": b"\0\0\0\0\0\0\xf0\x7f"}.get(row.floats, b"\x01\x7e")
    blocks = 600_000 if row.nbytes < 40 else 300_000
    data = np.zeros(blocks * row.nbytes, np.uint8)
    assert first_not_finite(dtype, data) is None
    for at in row.scales or (0,):
        place = (blocks - 1) * row.nbytes + at
        data[place : place + len(bits)] = np.frombuffer(bits, np.uint8)
        assert first_not_finite(dtype, data) == place
        data[place : place + len(bits)] = 0
