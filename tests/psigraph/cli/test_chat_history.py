"""What is kept of what was typed, for the arrow keys of later chats."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from psigraph.cli.chat_history import MOST_ENTRIES, add_to_history, history_file, read_history
from psigraph.cli.chat_input import History, terminal_reader


def test_entries_come_back_whole_and_are_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = history_file()
    assert path == tmp_path / "state" / "psigraph" / "chat_history"
    assert read_history(path) == []
    said = ["The whale?", "two\nlines", "☃ \x1b[A", ""]
    for entry in said:
        assert add_to_history(path, entry)
    assert read_history(path) == said
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_long_history_is_cut_to_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_text("".join(f'"{number}"\n' for number in range(MOST_ENTRIES + 1)))
    newest = [str(number) for number in range(MOST_ENTRIES // 2 + 1, MOST_ENTRIES + 1)]
    assert read_history(path) == newest
    assert path.read_text().splitlines() == [f'"{entry}"' for entry in newest]
    assert [one.name for one in tmp_path.iterdir()] == ["history"]


@pytest.mark.parametrize("content", [b"\xff\n", b"[" * 100_000, b'{"a": 1}\n3\n', b'"a\\u0000b"\n', b"\n" * 5])
def test_what_is_no_entry_is_left_out(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_bytes(content + b'\n"good"\n')
    assert read_history(path) == ["good"]


def test_a_history_that_cannot_be_kept_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    kept = History(tmp_path / "file" / "history")
    kept.remember("a")
    kept.remember("b")
    assert capsys.readouterr().err.count("--no-history leaves it out") == 1
    os.mkfifo(tmp_path / "fifo")
    assert read_history(tmp_path / "fifo") == []  # and does not wait for a writer
    assert not add_to_history(tmp_path / "fifo", "a")


def test_letters_that_the_locale_lacks_stay_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(entry: str) -> None:
        entry.encode("ascii")

    readline: Any = ModuleType("readline")
    readline.add_history = refuse
    readline.set_auto_history = readline.parse_and_bind = lambda _: None
    readline.clear_history = lambda: None
    monkeypatch.setitem(sys.modules, "readline", readline)
    history = History(tmp_path / "history")
    history.remember("Ñandú ☃")
    history.remember("plain")
    assert read_history(tmp_path / "history") == ["Ñandú ☃", "plain"]
    assert terminal_reader(tmp_path / "history")
