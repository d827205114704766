"""The kernel cache: an entry is whole or it is not there, and nothing that is odd about the disk ends a run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from psigraph.runtime import private_cache, whole_files
from psigraph.runtime.cuda.kernel_cache import KernelCache
from psigraph.runtime.cuda.nvrtc import KernelResources

KEY = {"source": "a" * 64, "entry": "matvec", "arch": "sm_90a", "compiler": "nvrtc 13.0"}
PAYLOAD = bytes(range(256)) * 40 + b"\n{}\n"
RESOURCES = KernelResources(40, 1024, 0, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "new" / "cache"


@pytest.fixture
def entry(folder: Path) -> Path:
    """The file of KEY, written."""
    KernelCache(folder).put(KEY, PAYLOAD, RESOURCES)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(autouse=True)
def no_other_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_what_was_put_comes_back(folder: Path, entry: Path) -> None:
    assert KernelCache(folder).get(KEY) == (PAYLOAD, RESOURCES)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert entry.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("part", sorted(KEY))
def test_every_part_of_the_key_counts(part: str, folder: Path, entry: Path) -> None:
    assert KernelCache(folder).get({**KEY, part: KEY[part] + "x"}) is None


def test_an_entry_under_another_keys_name_is_not_taken(folder: Path, entry: Path) -> None:
    other = {**KEY, "arch": "sm_80"}
    cache = KernelCache(folder)
    entry.rename(folder / cache._name(other))
    assert cache.get(other) is None


def test_every_cut_is_noticed(folder: Path, entry: Path) -> None:
    data, cache = entry.read_bytes(), KernelCache(folder)
    head = data.index(b"\n")
    for size in (*range(head + 5), len(data) // 2, len(data) - 1):
        entry.write_bytes(data[:size])
        assert cache.get(KEY) is None, size
    entry.write_bytes(data + b"\0")
    assert cache.get(KEY) is None


def test_every_flipped_bit_is_noticed(folder: Path, entry: Path) -> None:
    """In the resources' numbers too: `tune` decides by them what can be launched."""
    data, cache = entry.read_bytes(), KernelCache(folder)
    head = data.index(b"\n", 65)
    for place in (*range(head + 2), head + 100, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        entry.write_bytes(changed)
        assert cache.get(KEY) is None, place


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"[]\n", b"null\nx", b"\xff\xfe\n", b"{}\n", b'{"magic": "psigraph kernel 1"}\n', b"[" * 100_000],
)
def test_what_is_no_entry_is_none(data: bytes, folder: Path, entry: Path) -> None:
    entry.write_bytes(data)
    assert KernelCache(folder).get(KEY) is None
    KernelCache(folder).put(KEY, PAYLOAD, RESOURCES)
    assert KernelCache(folder).get(KEY) == (PAYLOAD, RESOURCES)


def test_resources_that_fit_no_longer_are_none(folder: Path, entry: Path) -> None:
    _, head, payload = entry.read_bytes().split(b"\n", 2)
    record = {**json.loads(head), "resources": {"threads": 1}}
    rest = json.dumps(record).encode() + b"\n" + payload
    entry.write_bytes(hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
    assert KernelCache(folder).get(KEY) is None


def test_a_folder_in_an_entrys_place(folder: Path, entry: Path) -> None:
    entry.unlink()
    entry.mkdir()
    cache = KernelCache(folder)
    assert cache.get(KEY) is None
    with pytest.warns(UserWarning, match="running without it"):
        cache.put(KEY, PAYLOAD, RESOURCES)
    assert [path.name for path in folder.iterdir()] == [entry.name]


def fails(code: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["os.open", "os.fsync", "os.replace"])
def test_a_disk_that_takes_nothing_costs_a_warning(
    call: str, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = KernelCache(folder)
    module, name = call.split(".")
    descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(getattr(whole_files, module), name, fails(code))
        with pytest.warns(UserWarning, match=f"{os.strerror(code)}; running without it"):
            cache.put(KEY, PAYLOAD, RESOURCES)
    cache.put(KEY, PAYLOAD, RESOURCES)  # one warning is enough
    assert cache.get(KEY) is None
    assert list(folder.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_disk_that_fills_while_it_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, real = KernelCache(folder), os.fdopen

    def opened(*args: Any) -> Any:
        file = real(*args)

        class Full:
            def __enter__(self) -> Any:
                file.__enter__()
                return SimpleNamespace(write=fails(errno.ENOSPC), flush=file.flush, fileno=file.fileno)

            def __exit__(self, *ending: Any) -> None:
                file.__exit__(*ending)

        return Full()

    monkeypatch.setattr(whole_files.os, "fdopen", opened)
    with pytest.warns(UserWarning, match="No space left on device"):
        cache.put(KEY, PAYLOAD, RESOURCES)
    assert list(folder.iterdir()) == []


def test_an_interrupt_leaves_no_temporary_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    cache = KernelCache(folder)
    monkeypatch.setattr(whole_files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.put(KEY, PAYLOAD, RESOURCES)
    assert list(folder.iterdir()) == []


def test_an_unreadable_entry_is_compiled_again(folder: Path, entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KernelCache(folder)
    monkeypatch.setattr(private_cache.os, "open", fails(errno.EACCES))
    assert cache.get(KEY) is None


def test_a_folder_of_somebody_else_is_not_used(folder: Path, entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_cache.os, "getuid", lambda: os.stat(folder).st_uid + 1)
    with pytest.warns(UserWarning, match="belongs to another user; running without it"):
        cache = KernelCache(folder)
    assert cache.get(KEY) is None
    cache.put(KEY, b"", RESOURCES)
    assert list(folder.iterdir()) == [entry]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720])
def test_a_folder_that_others_may_write_is_refused(mode: int, folder: Path, entry: Path) -> None:
    """Making it private would make what they put there look like ours."""
    folder.chmod(mode)
    with pytest.warns(UserWarning, match="others may write it; .* running without it"):
        assert KernelCache(folder).get(KEY) is None
    assert folder.stat().st_mode & 0o777 == mode


def test_a_folder_whose_parent_is_everybodys_is_refused(folder: Path, entry: Path) -> None:
    folder.parent.chmod(0o777)
    with pytest.warns(UserWarning, match=f"everybody may write {folder.parent}"):
        assert KernelCache(folder).get(KEY) is None
    folder.parent.chmod(0o1777)  # as /tmp: nobody can rename what is not theirs
    assert KernelCache(folder).get(KEY) == (PAYLOAD, RESOURCES)


@pytest.mark.parametrize("kind", ["writable", "other owner", "link", "fifo", "folder"])
def test_an_entry_that_others_could_have_written_is_not_taken(
    kind: str, folder: Path, entry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none blocks: a FIFO that nobody writes to."""
    cache = KernelCache(folder)
    if kind == "writable":
        entry.chmod(0o622)
    elif kind == "other owner":
        monkeypatch.setattr(private_cache.os, "getuid", lambda: os.stat(folder).st_uid + 1)
    else:
        entry.rename(folder.parent / "elsewhere")
        {"link": lambda: entry.symlink_to(folder.parent / "elsewhere"), "fifo": lambda: os.mkfifo(entry)}.get(
            kind, entry.mkdir
        )()
    assert cache.get(KEY) is None


def test_unused_entries_go_by_age_and_then_by_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [{**KEY, "entry": str(number)} for number in range(4)]
    for number, key in enumerate(keys):
        KernelCache(folder).put(key, PAYLOAD, RESOURCES)
        path = folder / KernelCache._name(key)
        when = private_cache.time.time() - (100, 50, 40, 0)[number] * 86_400
        os.utime(path, (when, when))
    mine = folder / "notes.kernel"
    mine.write_text("not psigraph's name")
    KernelCache(folder).put(KEY, PAYLOAD, RESOURCES)
    cache = KernelCache(folder)
    assert cache.get(keys[0]) is None
    assert cache.get(keys[1]) is not None  # which counts as a use
    monkeypatch.setattr(private_cache, "KEPT_BYTES", 4 * (folder / KernelCache._name(keys[1])).stat().st_size - 1)
    cache.put(KEY, PAYLOAD, RESOURCES)
    assert [cache.get(key) is not None for key in keys] == [False, True, False, True]
    assert mine.exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_where_the_folder_should_be(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="running without it"):
        cache = KernelCache(tmp_path / place)
    assert cache.get(KEY) is None
    cache.put(KEY, PAYLOAD, RESOURCES)


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", fails(errno.EROFS))
    with pytest.warns(UserWarning, match="Read-only file system"):
        KernelCache(tmp_path / "cache")


def test_writers_at_once_leave_one_whole_entry(folder: Path) -> None:
    """Readers meanwhile see an entry that is whole, or none."""
    payloads = [bytes([number]) * 200_000 for number in range(8)]

    def work(number: int) -> None:
        cache = KernelCache(folder)
        for _ in range(5):
            cache.put(KEY, payloads[number], RESOURCES)
            found = cache.get(KEY)
            assert found is not None
            assert found[0] in payloads

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(list(folder.iterdir())) == 1


def test_no_folder_keeps_nothing() -> None:
    cache = KernelCache(None)
    cache.put(KEY, PAYLOAD, RESOURCES)
    assert cache.get(KEY) is None
