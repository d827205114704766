"""The folder of compiled images: what is used stays, what nobody used for longest goes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from psigraph.runtime.host import compile as host_compile
from psigraph.runtime.host.compile import build_kernel


def test_the_longest_unused_image_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSIGRAPH_HOST_CACHE", str(tmp_path))
    monkeypatch.setattr(host_compile, "KEPT_IMAGES", 2)
    texts = [f'extern "C" __global__ void k(int* out) {{ out[0] = {number}; }}' for number in range(3)]
    first, second = (build_kernel(text, "k") for text in texts[:2])
    for age, image in enumerate((second, first)):
        os.utime(image, (1000 - age, 1000 - age))  # the first is the older one
    assert build_kernel(texts[0], "k") == first
    third = build_kernel(texts[2], "k")
    assert set(tmp_path.glob("*.so")) == {first, third}
    assert set(tmp_path.glob("*.cu")) == {path.with_suffix(".cu") for path in (first, third)}
