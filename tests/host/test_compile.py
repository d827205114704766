"""The folder of compiled images: what is used stays, what nobody used for longest goes, what is not as it was kept is
made anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from psigraph.ir.errors import DeviceError
from psigraph.runtime import private_cache
from psigraph.runtime.host.compile import _is_whole, build_kernel, compile_kernel

TEXTS = [f'extern "C" __global__ void k(int* out) {{ out[0] = {number}; }}' for number in range(3)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PSIGRAPH_HOST_CACHE", str(tmp_path))
    return tmp_path


def test_the_longest_unused_image_goes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (build_kernel(text, "k") for text in TEXTS[:2])
    (folder / "mine.so").write_bytes(b"nobody's to remove")
    monkeypatch.setattr(private_cache, "KEPT_BYTES", sum(path.stat().st_size for path in folder.glob("k-*")) + 100)
    for age, image in enumerate((second, first)):
        for path in (image, image.with_suffix(".cu")):
            when = private_cache.time.time() - 2 * 86_400 - age  # the first is the older one
            os.utime(path, (when, when))
    assert build_kernel(TEXTS[0], "k") == first
    third = build_kernel(TEXTS[2], "k")
    assert set(folder.glob("k-*.so")) == {first, third}
    assert set(folder.glob("*.cu")) == {path.with_suffix(".cu") for path in (first, third)}
    assert (folder / "mine.so").exists()


def test_an_image_that_is_not_as_it_was_kept_is_made_anew(folder: Path) -> None:
    """A flipped bit, another kernel's image under this name, a planted one."""
    first, other = (build_kernel(text, "k") for text in TEXTS[:2])
    whole = first.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for wrong in (bytes(flipped), other.read_bytes(), b"\x7fELF planted"):
        first.write_bytes(wrong)
        assert compile_kernel(TEXTS[0], "k")[:4] == b"\x7fELF"
        assert _is_whole(first)
        assert len(first.read_bytes()) == len(whole)


@pytest.mark.parametrize("wrong", ["folder", "image"])
def test_what_others_could_have_written_is_not_run(wrong: str, folder: Path) -> None:
    image = build_kernel(TEXTS[0], "k")
    if wrong == "folder":
        folder.chmod(0o777)
        with pytest.raises(DeviceError, match="others may write it"):
            build_kernel(TEXTS[0], "k")
        assert folder.stat().st_mode & 0o777 == 0o777  # it is not made to look sound either
        folder.chmod(0o700)
        return
    image.chmod(0o722)
    before = image.stat().st_ino
    assert build_kernel(TEXTS[0], "k") == image
    assert image.stat().st_ino != before


def test_headers_are_compiled_as_they_were_given(folder: Path) -> None:
    """What lies in the cache under their names may be another text."""
    text = '#include "n.h"\nextern "C" __global__ void k(int* out) { out[0] = N; }'
    whole = build_kernel(text, "k", headers={"n.h": "#define N 7\n"}).read_bytes()
    for path in (*folder.glob("headers-*/n.h"), *folder.glob("k-*")):
        path.unlink() if path.suffix != ".h" else path.write_text("#error planted\n")
    assert build_kernel(text, "k", headers={"n.h": "#define N 7\n"}).read_bytes()[:4] == whole[:4]
