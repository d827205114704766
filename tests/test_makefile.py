"""An environment that cannot work is made anew: whoever upgraded Python need not find out what `.venv` is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"


@pytest.mark.parametrize("state", ["works", "gone", "too old", "upgraded"])
def test_a_stale_environment_heals_itself(state: str, tmp_path: Path) -> None:
    shutil.copy(MAKEFILE, tmp_path)
    venv = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (venv / "installed").write_text(f"{tmp_path}\n")
    python = venv / "bin" / "python"
    if state == "upgraded":  # the packages lie where the Python before looked for them
        (site,) = venv.glob("lib/python3*")
        site.rename(site.with_name("python3.9"))
    elif state != "works":
        python.unlink()
        python.symlink_to("/usr/bin/python3.9-of-old" if state == "gone" else "/bin/false")
    subprocess.run(["make", "-C", str(tmp_path), "help"], check=True, stdout=subprocess.DEVNULL)
    assert venv.exists() is (state == "works")
