"""What a Program is written for: a GPU class, its number of SMs, and what it can do."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import UsageError


@dataclass(frozen=True)
class Target:
    """A GPU class.

    arch            as NVRTC names it.
    sm_count        multiprocessors; the built-in figure is that of the class's usual card.
    shared_bytes    shared memory that one block may ask for, bytes (CUDA C Programming
                    Guide, table of technical specifications).
    programmatic    has programmatic launch (griddepcontrol) and bulk copies.
    """

    arch: str
    sm_count: int
    shared_bytes: int
    programmatic: bool

    def with_sm_count(self, sm_count: int) -> Target:
        return Target(self.arch, sm_count, self.shared_bytes, self.programmatic)


TARGETS: dict[str, Target] = {
    target.arch: target
    for target in (
        Target("sm_80", 108, 163 * 1024, False),
        Target("sm_86", 82, 99 * 1024, False),
        Target("sm_89", 76, 99 * 1024, False),
        Target("sm_90a", 132, 227 * 1024, True),
        Target("sm_100", 148, 227 * 1024, True),
        Target("sm_120", 170, 99 * 1024, True),
        Target("host", 4, 227 * 1024, True),
    )
}

GPU_ARCHES = tuple(name for name in TARGETS if name != "host")


def target_for(arch: str, sm_count: int | None = None) -> Target:
    """The row of an architecture; UsageError lists the known ones."""
    target = TARGETS.get(arch)
    if target is None:
        raise UsageError(f"--arch {arch}: unknown architecture; known are {', '.join(GPU_ARCHES)}")
    return target if sm_count is None else target.with_sm_count(sm_count)


def arch_of_capability(major: int, minor: int) -> str:
    """The architecture whose machine code runs on a device of this compute capability."""
    exact = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90a"}
    if (major, minor) in exact:
        return exact[(major, minor)]
    if major == 10:
        return "sm_100"
    if major == 12:
        return "sm_120"
    raise UsageError(f"compute capability {major}.{minor} has no kernels here; 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0 have")
