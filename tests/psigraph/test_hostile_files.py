"""Files that psigraph reads back, whoever wrote them: any content gives an error of ours, in one line."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bench_reports import a_comparator, a_report

from psigraph.bench import tuned
from psigraph.bench.baseline import check_baseline, check_work, compare_reports
from psigraph.bench.report import validate_report
from psigraph.ir.errors import PsigraphError, UsageError
from psigraph.json_file import LARGEST_JSON, read_json
from psigraph.medpsy.matrix import build_matrix, read_source, validate_matrix
from psigraph.runtime.cuda.driver import DeviceFacts
from psigraph.text.chat import FORMAT, ChatSettings, Conversation
from psigraph.text.saved_logits import load_reference

ROUNDS = 300
ODD = (
    *(None, True, False, 0, -1, 1, 2**63, -(2**63), 10**400, 0.5, 1e308, -1e308, float("nan"), float("inf")),
    *("", "x", "\0", "\ud800", "a" * 300, "../../x", [], {}, [[]], [None], {"": None}, ["x"], {"x": [1]}),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


def changed(record: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The record with one to three of its values odd, gone, or elsewhere."""
    record = copy.deepcopy(record)
    for _ in range(draw.randint(1, 3)):
        *way, last = draw.choice(places(record)[1:] or [("x",)])
        holder: Any = record
        for key in way:
            holder = holder[key]
        if draw.random() < 0.2:
            del holder[last]
        else:
            holder[last] = copy.deepcopy(draw.choice(ODD)) if draw.random() < 0.8 else record.get(last, way)
    return record


def only_ours(call: Callable[[], Any], what: object) -> None:
    """The call ends well or with an error of ours, short and printable on one line."""
    try:
        call()
    except PsigraphError as error:
        message = str(error)
        assert "\n" not in message, what
        assert len(message) < 2000, what
        message.encode()
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}: {what!r:.1000}") from error


def hostile(record: dict[str, Any], use: Callable[[Path], Any], folder: Path) -> None:
    """Feeds ROUNDS changed records to a reader."""
    draw, path = random.Random(5), folder / "x.json"
    only_ours(lambda: use(path), "absent")
    for _ in range(ROUNDS):
        wrong = changed(record, draw)
        path.write_text(json.dumps(wrong))
        only_ours(lambda: use(path), wrong)


def test_saved_chats(tmp_path: Path) -> None:
    model: Any = SimpleNamespace(ask_guard=lambda messages: [message["content"].lower() for message in messages])
    good = {
        "format": FORMAT,
        "model": "m.gguf",
        "system": "be brief",
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "settings": {**ChatSettings().record(), "logit_bias": {"5": "-inf"}, "stop": ["x"]},
    }
    whole = tmp_path / "good.json"
    whole.write_text(json.dumps(good))
    Conversation(model).load(whole)

    def use(path: Path) -> None:
        conversation = Conversation(model)
        conversation.load(path)
        conversation.messages("and now?")
        conversation.settings.sampler.words(4096)

    hostile(good, use, tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"max_new_tokens": 2.5}, {"max_new_tokens": True}, {"max_new_tokens": 1e308}, {"thinking": 1},
        {"temperature": "x\nforged: line"},
    ],
)  # fmt: skip
def test_settings_of_saved_chats(setting: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    settings = {**ChatSettings().record(), **setting}
    path.write_text(json.dumps({"format": FORMAT, "model": "m", "system": None, "messages": [], "settings": settings}))
    with pytest.raises(UsageError) as caught:
        Conversation(SimpleNamespace()).load(path)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_bias_typed_in_a_chat() -> None:
    with pytest.raises(UsageError, match="give token ids and biases"):
        ChatSettings().with_value("logit_bias", '{"1": 1' + "0" * 400 + "}")


@pytest.mark.parametrize("warnings", [5, True, None, "text"])
def test_warnings_of_a_report_that_are_none(warnings: object) -> None:
    report = a_report(100.0)
    report["artifact"]["tier"] = "Q4_K_M"
    report["admission"]["warnings"] = warnings
    assert any("receipt warning" in problem for problem in validate_report(report))


def test_reports_and_matrices(tmp_path: Path) -> None:
    good = a_report(100.0)

    def baseline(path: Path) -> None:
        record = read_json(path)
        validate_report(record)
        check_baseline(record)
        check_work(record, {"prompt_tokens": [1], "max_new_tokens": 512, "decode_row": "chained", "depth": 0})
        compare_reports(record, good)

    def matrix(path: Path) -> None:
        validate_matrix(build_matrix([read_source(path, tmp_path)], host="h"), tmp_path)

    hostile(good, baseline, tmp_path)
    hostile(good, matrix, tmp_path)
    hostile(a_comparator(100.0), matrix, tmp_path)
    sound = tmp_path / "sound.json"
    sound.write_text(json.dumps(good))
    whole = build_matrix([read_source(sound, tmp_path)], host="h")
    hostile(whole, lambda path: validate_matrix(read_json(path), tmp_path), tmp_path)


def test_tuned_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSIGRAPH_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    facts = DeviceFacts("G", (9, 0), 132, 1, 1, "13.0")
    path = tuned.save_tuned(facts, {"q4_k": {"column_warps": 4, "tile_warps": 2, "ring_limit": 65536}})
    good, draw = json.loads(path.read_text()), random.Random(7)
    for _ in range(ROUNDS):
        path.write_text(json.dumps(changed(good, draw)))
        for shape in tuned.load_tuned(facts).values():
            assert all(0 < value <= tuned.LARGEST[key] for key, value in shape.items())
    path.write_text("[" * 100_000)
    assert tuned.load_tuned(facts) == {}
    path.write_text(json.dumps(good))
    assert tuned.load_tuned(facts) == good["shapes"]
    path.chmod(0o666)  # others may have written it
    assert tuned.load_tuned(facts) == {}
    path.unlink()
    os.mkfifo(path)
    assert tuned.load_tuned(facts) == {}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": 1e999}', "out of range"),
        ('{"a": 1' + "0" * 5000 + "}", "out of range"),
        ('{"a": "\\ud800"}', "not valid Unicode"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "holds no JSON object"),
    ],
)
def test_json_that_nobody_can_compute_with(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=named):
        read_json(path)


def test_json_that_is_no_file_or_too_large(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", LARGEST_JSON + 1)
    for name, named in (("fifo", "is no regular file"), ("large", "is larger than 64 MiB"), (".", "Is a directory")):
        with pytest.raises(UsageError, match=named):
            read_json(tmp_path / name)


def npz(path: Path, **changes: Any) -> bytes:
    arrays = {"ids": np.array([1, 2]), "logits": np.zeros((2, 30), np.float32), "window": np.int32(2), **changes}
    np.savez(path, **arrays)
    return path.read_bytes()


def header(shape: str, descr: str = "'<f4'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("member", "method"),
    [
        (header("(2, 10000000000)"), zipfile.ZIP_STORED),  # memory that the file does not have
        (header("(2, -1)"), zipfile.ZIP_STORED),
        (header("(2, 'x')"), zipfile.ZIP_STORED),
        (header("(" * 400), zipfile.ZIP_STORED),
        (header("(2, 3)", "'O'"), zipfile.ZIP_STORED),
        (header("(2, 3)", "[('a', '<f4'), ('a', '<f4')]"), zipfile.ZIP_STORED),
        (header("(2, 50000000)") + bytes(400_000_000 // 8), zipfile.ZIP_DEFLATED),  # a bomb
        (b"\x93NUMPY\x09\x00", zipfile.ZIP_STORED),
        (b"", zipfile.ZIP_LZMA),
    ],
)
def test_members_that_are_no_arrays(member: bytes, method: int, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    ids = io.BytesIO()
    np.save(ids, np.array([1, 2]))
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("ids.npy", ids.getvalue())
        archive.writestr("logits.npy", member)
    with pytest.raises(UsageError, match=r"x\.npz: (unpacks to|is no \.npz file|logits must)"):
        load_reference(path, "Q8_0")


def test_saved_logits_with_any_bytes(tmp_path: Path) -> None:
    """Encrypted (a flag of the archive), cut, flipped; and a pipe that nobody writes to."""
    path = tmp_path / "x.npz"
    whole, draw = npz(path), random.Random(11)
    for number in range(ROUNDS):
        wrong = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            wrong[draw.randrange(len(wrong))] ^= 1 << draw.randrange(8)
        path.write_bytes(wrong[: draw.randrange(len(wrong))] if number % 5 == 0 else wrong)
        only_ours(lambda: load_reference(path, "Q8_0"), number)
    encrypted = bytearray(whole)
    for start in (b"PK\x01\x02", b"PK\x03\x04"):
        place = -1
        while (place := encrypted.find(start, place + 1)) >= 0:
            encrypted[place + (8 if start == b"PK\x01\x02" else 6)] |= 1
    path.write_bytes(encrypted)
    with pytest.raises(UsageError, match=r"is no \.npz file of plain arrays"):
        load_reference(path, "Q8_0")
    npz(path, logits=np.zeros((2, 0), np.float32))
    with pytest.raises(UsageError, match=r"logits must be float\[2, vocabulary\]"):
        load_reference(path, "Q8_0")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError):
        load_reference(path, "Q8_0")
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
