"""What a Program is written for: a GPU class, its number of SMs, and what it can do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..ir.errors import UsageError

Slot = Literal["before attention", "after attention", "wide", "deep", "last"]  # of a product in the step

RESERVED_BYTES = 1024  # of shared memory that the driver takes for each resident block
STATIC_BYTES = 128  # of static shared memory that a product has
WIDE_BYTES = 116864  # in all of a product in the slot `wide`: gate and up's ring of six stages
DEEP_BYTES = 82560  # in all of a product in the slot `deep`: three superblocks of eight warps in Q6_K
LEAST_WARPS = 10  # of a product's block where products have slots
SCHEDULER_WARPS = 3  # of a product's block that one of a multiprocessor's four schedulers may have
WARP_REGISTERS = 512  # of 32 threads each, that a scheduler has
REGISTERS = 4 * 32 * WARP_REGISTERS  # of a multiprocessor, and the most that a block may have
REGISTERS_OF_SLOT: dict[Slot, int] = {  # a thread of a product; attention may have what is left
    "before attention": 72,
    "after attention": 64,
    "wide": 72,
    "deep": 72,
    "last": 72,
}


@dataclass(frozen=True)
class Target:
    """A GPU class.

    arch            as NVRTC names it.
    sm_count        multiprocessors; the built-in figure is that of the class's usual card.
    shared_bytes    shared memory that one block may ask for, bytes (CUDA C Programming
                    Guide, table of technical specifications).
    programmatic    has programmatic launch (griddepcontrol) and bulk copies.
    cluster         blocks that can reach each other's shared memory; 1 where there are no clusters.
    slots          the step's kernels have slots of fixed sizes on each multiprocessor, see `slot_bytes`.
    """

    arch: str
    sm_count: int
    shared_bytes: int
    programmatic: bool
    cluster: int = 1
    slots: bool = False

    def with_sm_count(self, sm_count: int) -> Target:
        return replace(self, sm_count=sm_count)

    def plain(self) -> Target:
        """The same GPU class without what came with compute capability 9.0: programmatic launch, clusters, slots."""
        return replace(self, programmatic=False, cluster=1, slots=False)

    def slot_registers(self, slot: Slot) -> int:
        """The registers of a thread of a product, or 0 where nobody counts them.

        Two products and attention share a multiprocessor. Its registers belong to its four schedulers, and a block's
        warps are dealt out to them evenly: two or three of each product (`LEAST_WARPS`) and one of attention to each.
        However they are dealt, a third product, or a second block of one, does not fit: every product has as many as
        its slot says (`hold_registers`).
        """
        return REGISTERS_OF_SLOT[slot] if self.slots else 0

    @property
    def attention_registers(self) -> int:
        """The most registers of a thread of attention, or 0 for no such bound.

        It is what the product after it leaves with the one before it, or with the wide one, if each gives a scheduler
        three warps. Beside the deep one and the one before it there is room only where their warps are dealt well.
        """
        if not self.slots:
            return 0
        before, after = REGISTERS_OF_SLOT["before attention"], REGISTERS_OF_SLOT["after attention"]
        return WARP_REGISTERS - SCHEDULER_WARPS * (after + max(before, REGISTERS_OF_SLOT["wide"]))

    @property
    def most_warps(self) -> int:
        """Warps that may multiply in the block of a product; two helpers come with them."""
        return 4 * SCHEDULER_WARPS - 2 if self.slots else 16

    def slot_bytes(self, slot: Slot, attention_bytes: int) -> int:
        """Dynamic shared memory that the block of a product takes, used or not; 0: no slots.

        While one product works, the next one is resident and fetches its weights. The hardware puts blocks where there
        is room, and with sizes of their own, kernels were seen to crowd on 43 to 90 of 132 multiprocessors, two and
        three blocks of one kernel on each (docs/performance-log.md, version 4). So every product has one block a
        multiprocessor, whose registers have no room for a second one (`slot_registers`), and sizes are such that
        those stand beside each other that have to:

            before attention    beside `deep` and attention
            after attention     beside `wide` and attention
            wide                gate and up's ring of six stages (1.7B)
            deep                beside `wide`
            last                beside `deep`

        attention_bytes: what attention's block takes in all (`occupancy.step_slots`).
        """
        if not self.slots:
            return 0
        total = self.shared_bytes + RESERVED_BYTES
        sizes: dict[Slot, int] = {
            "before attention": total - attention_bytes - DEEP_BYTES,
            "after attention": total - attention_bytes - WIDE_BYTES,
            "wide": WIDE_BYTES,
            "deep": DEEP_BYTES,
            "last": total - DEEP_BYTES,
        }
        return (sizes[slot] - RESERVED_BYTES - STATIC_BYTES) // 128 * 128


TARGETS: dict[str, Target] = {
    target.arch: target
    for target in (
        Target("sm_80", 108, 163 * 1024, False),
        Target("sm_86", 82, 99 * 1024, False),
        Target("sm_89", 76, 99 * 1024, False),
        Target("sm_90a", 132, 227 * 1024, True, 8, True),
        Target("sm_100", 148, 227 * 1024, True, 8, True),
        Target("sm_120", 170, 99 * 1024, True, 8),
        Target("host", 4, 227 * 1024, True, 4, True),
    )
}

GPU_ARCHES = tuple(name for name in TARGETS if name != "host")


def target_for(arch: str, sm_count: int | None = None) -> Target:
    """The row of an architecture; UsageError lists the known ones."""
    target = TARGETS.get(arch)
    if target is None:
        raise UsageError(f"--arch {arch}: unknown architecture; known are {', '.join(GPU_ARCHES)}")
    return target if sm_count is None else target.with_sm_count(sm_count)


def stand_in_target(capability: tuple[int, int], sm_count: int) -> Target:
    """The host target with the features of the GPU class that has this compute capability."""
    host, like = target_for("host", sm_count), target_for(arch_of_capability(*capability))
    return replace(
        host,
        shared_bytes=like.shared_bytes,
        programmatic=like.programmatic,
        cluster=min(host.cluster, like.cluster),
        slots=like.slots,
    )


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
