"""Files are whole or not there: after an error, when a process ends in the middle, and when it was killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from psigraph.runtime.synth.model import write_synth
from psigraph.runtime.synth.vocab import SMALLEST
from psigraph.runtime.whole_files import remove_stale, remove_unfinished, replace_folder, scratch_folder, whole_file

KILLED = """
import os, signal, sys
from pathlib import Path
from psigraph.runtime.whole_files import scratch_folder, whole_file
with whole_file(Path(sys.argv[1])) as file, scratch_folder(Path(sys.argv[1]).parent, Path(sys.argv[1]).name) as folder:
    (folder / "x").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / ("ä" * 120)  # 240 bytes: its partial file must not have a longer name than there can be
    with whole_file(target, 0o644) as file:
        file.write(b"half ")
        assert not target.exists()
        file.write(b"whole")
    assert target.read_bytes() == b"half whole"
    assert target.stat().st_mode & 0o777 == 0o644
    with contextlib.suppress(KeyboardInterrupt), whole_file(target) as file:
        file.write(b"other")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"half whole"
    assert list(tmp_path.iterdir()) == [target]


def test_a_process_that_ends_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    suppressed = contextlib.suppress(FileNotFoundError)
    with suppressed, whole_file(tmp_path / "file"), scratch_folder(tmp_path, "folder") as folder:
        (folder / "inside").write_text("x")
        remove_unfinished()
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_and_what_lives_stays(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    other = tmp_path / ".other.0123456789ab.partial"
    other.write_bytes(b"of another file")
    with whole_file(target):
        remove_stale(tmp_path, target.name)
        assert len(list(tmp_path.iterdir())) == 2  # what is being written, and the other file's
    remove_stale(tmp_path, seconds=3600)
    assert other.exists()
    remove_stale(tmp_path)
    assert list(tmp_path.iterdir()) == [target]


def test_synth_removes_what_an_earlier_run_left(tmp_path: Path) -> None:
    """Also what versions before this one left, under the same kind of name."""
    left = tmp_path / ".m.gguf.x1_2abcd.partial"
    left.write_bytes(b"gigabytes")
    write_synth(tmp_path / "m.gguf", "0.6b", "q8_0", 1, layers=1, vocab=SMALLEST)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_folder_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    for text in ("old", "new"):
        new = tmp_path / "made"
        new.mkdir()
        (new / text).write_text(text)
        replace_folder(new, target)
        assert [path.name for path in target.iterdir()] == [text]

    real = Path.rename

    def rename(path: Path, to: Path) -> Path:
        if path.name == "made":
            raise OSError(28, os.strerror(28))
        return real(path, to)

    (tmp_path / "made").mkdir()
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        replace_folder(tmp_path / "made", target)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "out"]
