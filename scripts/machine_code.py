"""Whether the kernels of two versions of the repository are the same machine code.

    python scripts/machine_code.py REVISION [--arch sm_90a] [--model "1.7b q4_k_m"] ...

Compiles the models below with `psigraph compile` as it was at REVISION and as it is here, and compares the cubins'
instructions, kernel by kernel (names as `psigraph compile` writes them). Prints a line for every kernel that differs.
Needs git and NVRTC, no GPU. Exit status 1 if any differ.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELS = (
    "0.6b q4_k_m",
    "1.7b q4_k_m",
    "1.7b q4_k_m --kv-type q8",
    "1.7b q5_k_m",
    "1.7b q8_0",
    "1.7b f16",
    "4b q4_k_m",
    "8b q4_k_m",
)
INSTRUCTION = 16  # bytes, since Volta


def sections(image: bytes) -> dict[str, bytes]:
    """The sections of an ELF file by name (System V ABI, figure 4-8 and following)."""
    (start,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<HHH", image, 58)
    heads = [struct.unpack_from("<IIQQQQ", image, start + index * size) for index in range(count)]
    strings = heads[names][4]
    found = {}
    for name, kind, _, _, offset, length in heads:
        at = strings + name
        found[image[at : image.index(b"\0", at)].decode()] = b"" if kind == 8 else image[offset : offset + length]
    return found


def code_of(image: bytes) -> bytes:
    """The instructions of a cubin's kernel."""
    return b"".join(data for name, data in sorted(sections(image).items()) if name.startswith(".text."))


def compiled(tree: Path, python_path: Path, model: str, arch: str, out: Path) -> dict[str, bytes]:
    """Kernel name -> instructions, of `psigraph compile` in a tree."""
    size, quant, *options = model.split()
    command = ["--size", size, "--quant", quant, "--arch", arch, "--out", str(out), *options]
    done = subprocess.run(
        [sys.executable, "-m", "psigraph", "compile", *command],
        cwd=tree.parent,
        env={"PYTHONPATH": str(python_path), "PYTHONSAFEPATH": "1", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{tree}: psigraph compile {' '.join(command)} failed: {done.stderr.strip()[-300:]}")
    return {path.stem: code_of(path.read_bytes()) for path in sorted((out / "cubins" / arch).glob("*.cubin"))}


def installed(tree: Path, folder: Path) -> Path:
    """The tree's package in a folder of its own, built from a copy: setuptools would find what it built before."""
    copy = folder.with_name(f"{folder.name}-tree")
    unwanted = shutil.ignore_patterns(".git", ".venv", ".make", "build", "*.egg-info", "__pycache__")
    shutil.copytree(tree, copy, ignore=unwanted, symlinks=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(copy)]
    subprocess.run(command, check=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="what to compare with, such as a commit")
    parser.add_argument("--arch", action="append", help="architectures; none: sm_90a")
    parser.add_argument("--model", action="append", help="size, quant and options of `psigraph compile`; none: all")
    arguments = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory(prefix="psigraph-machine-code-") as scratch:
        old = Path(scratch) / "old"
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", str(old), arguments.revision], cwd=ROOT, check=True
        )
        try:
            paths = {tree: installed(tree, Path(scratch) / name) for tree, name in ((old, "before"), (ROOT, "now"))}
            for arch in arguments.arch or ["sm_90a"]:
                for model in arguments.model or MODELS:
                    before, now = (
                        compiled(tree, paths[tree], model, arch, Path(scratch) / f"out-{index}")
                        for index, tree in enumerate((old, ROOT))
                    )
                    different += compare(f"{model}, {arch}", before, now)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(old)], cwd=ROOT, check=False)
    return 1 if different else 0


def compare(what: str, before: dict[str, bytes], now: dict[str, bytes]) -> int:
    """Prints what differs; the number of kernels that do. Kernels that only one of them has are counted."""
    lines = []
    for name in sorted(before.keys() & now.keys()):
        old, new = before[name], now[name]
        if old != new:
            places = range(0, max(len(old), len(new)), INSTRUCTION)
            count = sum(old[at : at + INSTRUCTION] != new[at : at + INSTRUCTION] for at in places)
            sizes = f"{len(old) // INSTRUCTION} and {len(new) // INSTRUCTION} instructions"
            lines.append(f"    {name}: {count} of {len(places)} places differ ({sizes})\n")
    gone, new_ones = sorted(before.keys() - now.keys()), len(now.keys() - before.keys())
    lines += [f"    {name}: only before\n" for name in gone]
    print(f"{what}: {len(before.keys() & now.keys()) - len(lines) + len(gone)} kernels equal, {new_ones} new")
    print("".join(lines), end="")
    return len(lines)


if __name__ == "__main__":
    sys.exit(main())
