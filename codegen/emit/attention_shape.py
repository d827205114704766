"""What attention's kernel is made of: blocks of a head, stages of a warp's ring, and the shared memory they take."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.errors import UnsupportedModelError
from ...ir.graph import Node
from ..cache_types import CACHE_TYPES, CacheType
from ..target import RESERVED_BYTES, Target

WARPS = 4
THREADS = 32 * WARPS
MAX_SPLITS = 32
LEAST_STAGES, USUAL_STAGES, MOST_STAGES = 2, 3, 6


@dataclass(frozen=True)
class AttentionShape:
    """A warp's ring has stages, each with a tile of keys or of values; where its tiles were, it collects its part. In a
    cluster a block also has all parts of the values that it finishes.

    splits: blocks of a key/value head; clusters: they are a cluster.
    """

    heads: int
    kv_heads: int
    head_dim: int
    held: CacheType
    splits: int
    clusters: bool

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads

    @property
    def block_values(self) -> int:
        """Of the values of a head's group, those that a block finishes."""
        return self.group * self.head_dim // self.splits if self.clusters else self.group * self.head_dim

    @property
    def block_heads(self) -> int:
        """Query heads that those belong to, at most."""
        block_values, head_dim = self.block_values, self.head_dim
        return -(-block_values // head_dim) + (head_dim % block_values != 0 and block_values % head_dim != 0)

    def warp_bytes(self, stages: int) -> int:
        """Dynamic shared memory of a warp."""
        ring, part = stages * self.held.tile_bytes(self.head_dim), self.group * (self.head_dim * 4 + 8)
        return -(-max(ring, part) // 128) * 128

    def dynamic_bytes(self, stages: int) -> int:
        """Dynamic shared memory of a block."""
        received = WARPS * self.splits * (self.block_values * 4 + self.block_heads * 8) if self.clusters else 0
        return WARPS * self.warp_bytes(stages) + received

    def block_bytes(self, stages: int) -> int:
        """All that a block takes of a multiprocessor's shared memory, at most, in whole 128 bytes.

        Beside the dynamic part: queries, the new rows, norms, rotation, shares, and what the driver takes.
        """
        queries = -(-self.group // 4) * 8 * ((self.head_dim + 31) // 64 * 64 + 32) * 2
        shares = self.block_heads * (WARPS * self.splits + 4) * 4 if self.clusters else 0
        static = queries + 2 * self.held.row_bytes(self.head_dim) + self.head_dim * 12 + shares + 256
        return -(-(self.dynamic_bytes(stages) + static + RESERVED_BYTES) // 128) * 128


def attention_shape(node: Node, target: Target) -> AttentionShape:
    """The shape of a node of rope_attention, rope_append or attention.

    UnsupportedModelError names a head's size that no kernel supports.
    """
    rotate = node.op != "attention"
    cache = node.ins[5 if rotate else 1].type
    _, kv_heads, _, head_dim = cache.shape
    heads = int(node.attr("heads")) if rotate else node.ins[0].type.shape[1]  # type: ignore[arg-type]
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise UnsupportedModelError(f"head_dim {head_dim}: kernels support multiples of 16 from 16 to 256")
    attend = node.op != "rope_append"
    splits = _splits(target, kv_heads, heads // kv_heads * head_dim) if attend else 1
    return AttentionShape(heads, kv_heads, head_dim, CACHE_TYPES[cache.dtype], splits, attend and target.cluster > 1)


def _splits(target: Target, kv_heads: int, values: int) -> int:
    """Blocks of a key/value head. In a cluster each finishes whole groups of 16 of the head's `values`."""
    if target.cluster == 1:
        return max(1, min(MAX_SPLITS, target.sm_count // kv_heads))
    splits = target.cluster
    while splits > 1 and (values % (16 * splits) or kv_heads * splits > max(target.sm_count, kv_heads * 2)):
        splits //= 2
    return splits
