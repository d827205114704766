"""Where caches lie for every kind of user, and that a planted digest proves nothing."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
from pathlib import Path

import pytest

from psigraph.runtime.gguf.file_digest import _entry, _identity, file_digest
from psigraph.runtime.private_cache import make_private, user_cache_dir


def unknown(_: int) -> None:
    raise KeyError("getpwuid(): uid not found: 4242")


@pytest.mark.parametrize(
    ("variables", "known", "wanted"),
    [
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, True, "/x/psigraph"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, True, "/h/.cache/psigraph"),
        ({"HOME": "/h"}, False, "/h/.cache/psigraph"),
        ({}, True, "/of/passwd/.cache/psigraph"),
        ({"HOME": ""}, False, "/tmp-folder/psigraph-4242"),
        ({}, False, "/tmp-folder/psigraph-4242"),
    ],
)
def test_every_user_has_a_cache_folder(
    variables: dict[str, str], known: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's uid has no entry in passwd and often no HOME; "~" must not become a folder of that name."""
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/tmp-folder")
    entry = pwd.struct_passwd(("u", "x", 4242, 4242, "", "/of/passwd", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", (lambda _: entry) if known else unknown)
    assert str(user_cache_dir()) == wanted


@pytest.mark.parametrize("planted", ["in a folder of everybody", "writable", "fifo", "nested"])
def test_a_planted_digest_is_not_believed(planted: str, tmp_path: Path) -> None:
    model, cache = tmp_path / "model", tmp_path / "cache"
    model.write_bytes(b"weights")
    cache.mkdir(mode=0o700)
    with model.open("rb") as file:
        identity = _identity(file.fileno(), model)
        entry = _entry(cache, identity)
        assert entry is not None
        if planted == "fifo":
            os.mkfifo(entry)
        else:
            lie = json.dumps({**identity, "sha256": "ab" * 32}) if planted != "nested" else "[" * 100_000
            entry.write_text(lie)
            entry.chmod(0o622 if planted == "writable" else 0o600)
        if planted == "in a folder of everybody":
            cache.chmod(0o777)
        assert file_digest(file.fileno(), model, cache_dir=cache) == hashlib.sha256(b"weights").hexdigest()


def test_folders_above_a_cache_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        make_private(tmp_path / "a" / "b" / "host")
    finally:
        os.umask(before)
    make_private(tmp_path / "a" / "b")
    assert (tmp_path / "a").stat().st_mode & 0o077 == 0
