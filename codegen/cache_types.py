"""One row a type of KV cache: what a position takes, and the parts of kernels that know how a row lies in memory.

A new type is a row here and in `ir/types.py`, its rounding in `ir/interpret.py`, and a struct in a device header that
stores a row and hands a tile to the tensor cores as halves. Parts are lines of C that emitters set in where they speak
of the cache; words in capitals that say so below are filled in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .device import cache_header

TILE = 16  # positions that a warp takes at once


@dataclass(frozen=True)
class StepParts:
    """What a decode step's kernels say of a cache, in the names of `emit_attention.py`.

    head_start   declares `head_start`, where the key/value head begins.
    new_rows     declares `new_key` and `new_value`, the position's own rows in shared memory.
    query_place  where column i of a query stands, so that it meets the key's column.
    tiles        declares `keys` and `values`, the warp's memory for a tile of each, in its WARP_BYTES.
    fetch        declares `fetch_keys(tile)` and `fetch_values(tile)`. SEEN: positions that earlier kernels wrote.
    prefetch     declares `prefetch_tile(tile)`: into L2, of the tile's keys and values what is there.
    put          takes columns i and HEAD_DIM / 2 + i of a new row, `a` and `b`.
    append       stores a new row, by the warp that has put it.
    new_row      sets the new row into its tile. WHAT: key or value; UPPER: KEY or VALUE.
    key, value   declare `key` and `value`, operands of `dot_halves`.
    """

    head_start: str
    new_rows: str
    query_place: str
    tiles: str
    fetch: str
    prefetch: str
    put: str
    append: str
    new_row: str
    key: str
    value: str


@dataclass(frozen=True)
class ChunkParts:
    """What a prompt's kernels say of a cache, in the names of `prefill_kernels.py`.

    row     what `rope_append` declares before it has a head's columns.
    put     takes columns i and HEAD_DIM / 2 + i, `a` and `b`, of q, k or v.
    append  stores a row of k or v.
    tiles   the template that brings tiles to `attend_block`, behind a comma; "": its default.
    """

    row: str
    put: str
    append: str
    tiles: str


@dataclass(frozen=True)
class CacheType:
    """A type of KV cache.

    name           as in the IR and behind --kv-type.
    element        the C type that kernels see a cache's memory as.
    layout         of its buffers.
    value_bytes    of a value without its scale.
    group          values that share a scale of two bytes; 0: there are no scales.
    padding        a head's memory holds whole multiples of so many positions.
    header         what its kernels need beside the common header.
    tile_bytes     head_dim -> shared memory for a tile of keys and one of values.
    chunk_bytes    head_dim, keys -> shared memory for `attend_block`'s tiles of so many keys and values.
    append_alone   the body of an unfused `cache_append` (fields: threads, kv_heads, head_dim, size), a block of
                   `threads`; append_threads: head_dim -> threads that store a row.
    """

    name: str
    element: str
    layout: str
    value_bytes: int
    group: int
    padding: int
    header: Callable[[], str]
    tile_bytes: Callable[[int], int]
    chunk_bytes: Callable[[int, int], int]
    append_alone: str
    append_threads: Callable[[int], int]
    step: StepParts
    chunk: ChunkParts

    def position_bytes(self, head_dim: int) -> int:
        """Bytes of one position of one key/value head, of keys or of values."""
        return head_dim * self.value_bytes + (2 * -(-head_dim // self.group) if self.group else 0)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a cache [key/value heads, context, head_dim]."""
        kv_heads, context, head_dim = shape
        return kv_heads * -(-context // self.padding) * self.padding * self.position_bytes(head_dim)

    def with_header(self, body: str) -> str:
        """A kernel's text behind what it needs of the cache's own header."""
        header = self.header()
        return f"{header}\n{body}" if header else body


# float16 [key/value head][position][head_dim].
_HALVES = CacheType(
    name="f16",
    element="u16",
    layout="plain",
    value_bytes=2,
    group=0,
    padding=1,
    header=lambda: "",
    tile_bytes=lambda head_dim: TILE * 2 * (2 * head_dim + 24),
    chunk_bytes=lambda head_dim, keys: 2 * keys * (2 * head_dim + 24) * 2,
    append_alone="""
        int at = blockIdx.x * {threads} + threadIdx.x;
        if (at < {size}) {{
            u64 line = (u64)(at / {head_dim}) * context + from_earlier_step(position);
            cache[line * {head_dim} + at % {head_dim}] = float_to_half(fresh(row + at));
        }}
    """,
    append_threads=lambda head_dim: head_dim,
    step=StepParts(
        head_start="const u64 head_start = (u64)kv_head * context * HEAD_DIM;",
        new_rows="__shared__ __align__(16) u16 new_key[HEAD_DIM], new_value[HEAD_DIM];",
        query_place="i",
        tiles="""
            // Rows are padded, so that the lanes of a warp read them from different banks.
            constexpr int KEY_ROW = HEAD_DIM + 16, VALUE_ROW = HEAD_DIM + 8;
            u16* keys = (u16*)(shared_memory + warp * WARP_BYTES);
            u16* values = keys + TILE * KEY_ROW;
        """,
        fetch="""
            // A tile's keys or values into shared memory. Rows that are not there become zero: a weight of zero times
            // whatever lies there must be zero.
            auto fetch = [&](u16* to, auto row_size, const u16* from, int tile) {
                constexpr int PARTS = HEAD_DIM / 8, ROW = row_size.index;  // parts of 16 bytes
                const u16* source = from + head_start + (u64)tile * TILE * HEAD_DIM;
                const int there = SEEN - tile * TILE;  // positions
                if (32 % PARTS == 0 && there >= TILE) {
                    u16* target = to + lane / PARTS * ROW + lane % PARTS * 8;
                    source += lane * 8;
                    for_each<TILE * PARTS / 32>([&](auto i) {
                        copy_16_bytes(target + i.index * (32 / PARTS) * ROW, source + i.index * 256);
                    });
                } else if (tile < tiles) {
                    #pragma unroll 1
                    for (int part = lane; part < TILE * PARTS; part += 32) {
                        u16* target = to + part / PARTS * ROW + part % PARTS * 8;
                        if (part / PARTS < there) copy_16_bytes(target, source + part * 8);
                        else *(uint4*)target = make_uint4(0u, 0u, 0u, 0u);
                    }
                }
                end_of_copies();
            };
            auto fetch_keys = [&](int tile) { fetch(keys, Index<KEY_ROW>(), k_cache, tile); };
            auto fetch_values = [&](int tile) { fetch(values, Index<VALUE_ROW>(), v_cache, tile); };
        """,
        prefetch="""
            auto prefetch_tile = [&](int tile) {
                const int positions = now - tile * TILE < TILE ? now - tile * TILE : TILE;
                const u16* cache = lane == 0 ? k_cache : v_cache;
                const int bytes = positions * HEAD_DIM * 2;
                if (lane < 2 && positions > 0) prefetch(cache + head_start + tile * TILE * HEAD_DIM, bytes);
            };
        """,
        put="""
            u16* shared = head == GROUP ? new_key : new_value;
            u16* cache = (head == GROUP ? k_cache : v_cache) + head_start + (u64)now * HEAD_DIM;
            shared[i] = float_to_half(a);
            shared[HEAD_DIM / 2 + i] = float_to_half(b);
            cache[i] = shared[i];
            cache[HEAD_DIM / 2 + i] = shared[HEAD_DIM / 2 + i];
        """,
        append="",
        new_row="""
            if (tile == tiles - 1) {  // the new WHAT is not in the cache yet
                for (int part = lane; part < HEAD_DIM / 8; part += 32)
                    ((uint4*)(WHATs + now % TILE * UPPER_ROW))[part] = ((const uint4*)new_WHAT)[part];
                __syncwarp();
            }
        """,
        key="""
            uint2 low = *(const uint2*)(keys + g * KEY_ROW + step * 16 + 4 * t);
            uint2 high = *(const uint2*)(keys + (g + 8) * KEY_ROW + step * 16 + 4 * t);
            const u32 key[4] = {low.x, high.x, low.y, high.y};
        """,
        value="""
            u32 value[4];
            load_transposed(value, values + step.index * 16, VALUE_ROW, lane);
        """,
    ),
    chunk=ChunkParts(
        row="""
            const u64 line = (u64)own * context + position;
            if (head >= HEADS) to = (head < HEADS + KV_HEADS ? k_cache : v_cache) + line * HEAD_DIM;
        """,
        put="""
            to[i] = float_to_half(a);
            to[HEAD_DIM / 2 + i] = float_to_half(b);
        """,
        append="",
        tiles="",
    ),
)


def _q8_tile(head_dim: int) -> int:
    """`Q8::SHARED`: a tile in shared memory."""
    row = head_dim if head_dim % 32 else head_dim + 16
    return TILE * row + 2 * TILE * -(-head_dim // 32)


def _q8_stage(head_dim: int, keys: int) -> int:
    """One stage of halves, and the bytes that are widened into it."""
    halves = keys * (2 * head_dim + 24) * 2
    return halves + 2 * keys * (head_dim + 2 * -(-head_dim // 32))


# Tiles of 16 positions, integers and scales in planes: device/psigraph_cache.cuh.
_Q8 = CacheType(
    name="q8",
    element="u8",
    layout="q8",
    value_bytes=1,
    group=32,
    padding=TILE,
    header=cache_header,
    tile_bytes=lambda head_dim: 2 * _q8_tile(head_dim),
    chunk_bytes=_q8_stage,
    append_alone="""
        typedef Q8<{head_dim}> Cache;
        __shared__ Cache::Row rows[{threads} / 32];
        const int lane = threadIdx.x & 31, head = (blockIdx.x * {threads} + threadIdx.x) / 32;  // a warp a head
        if (head < {kv_heads}) {{
            Cache::Row& mine = rows[threadIdx.x / 32];
            for (int i = lane; i < {head_dim}; i += 32) mine.floats[i] = fresh(row + head * {head_dim} + i);
            Cache::quantize(mine, lane);
            Cache::store(cache + head * Cache::head_bytes(context), from_earlier_step(position), mine, lane);
        }}
    """,
    append_threads=lambda head_dim: 32,
    step=StepParts(
        head_start="""
            typedef Q8<HEAD_DIM> Cache;
            const u64 head_start = kv_head * Cache::head_bytes(context);
        """,
        new_rows="__shared__ Cache::Row new_key, new_value;",
        query_place="Cache::query_place(i)",
        tiles="""
            u8* keys = shared_memory + warp * WARP_BYTES;
            u8* values = keys + Cache::SHARED;
        """,
        fetch="""
            // A tile's keys or values into shared memory. Rows that are not there become zero: a weight of zero times
            // whatever lies there must be zero.
            auto fetch = [&](u8* to, const u8* from, int tile) {
                const u8* source = from + head_start + (u64)tile * Cache::BYTES;
                if (tile < tiles) Cache::fetch(to, source, SEEN - tile * TILE, lane);
                end_of_copies();
            };
            auto fetch_keys = [&](int tile) { fetch(keys, k_cache, tile); };
            auto fetch_values = [&](int tile) { fetch(values, v_cache, tile); };
        """,
        prefetch="""
            auto prefetch_tile = [&](int tile) {
                const u8* cache = lane == 0 ? k_cache : v_cache;
                if (lane < 2 && tile < tiles) prefetch(cache + head_start + (u64)tile * Cache::BYTES, Cache::BYTES);
            };
        """,
        put="""
            float* row = head == GROUP ? new_key.floats : new_value.floats;
            row[i] = a;
            row[HEAD_DIM / 2 + i] = b;
        """,
        append="""
            if (head >= GROUP) {
                Cache::Row& row = head == GROUP ? new_key : new_value;
                Cache::quantize(row, lane);
                Cache::store((head == GROUP ? k_cache : v_cache) + head_start, now, row, lane);
            }
        """,
        new_row="""
            if (tile == tiles - 1) {  // the new WHAT is not in the cache yet
                Cache::put(WHATs, now % TILE, new_WHAT, lane);
                __syncwarp();
            }
        """,
        key="""
            u32 key[4];
            Cache::key(key, keys, step, lane);
        """,
        value="""
            u32 value[4];
            Cache::value(value, values, step.index, lane);
        """,
    ),
    chunk=ChunkParts(
        row="""
            typedef Q8<HEAD_DIM> Cache;
            __shared__ Cache::Row rows[THREADS / 32];
            Cache::Row& row = rows[threadIdx.x >> 5];
        """,
        put="""
            if (head < HEADS) {
                to[i] = float_to_half(a);
                to[HEAD_DIM / 2 + i] = float_to_half(b);
            } else {
                row.floats[i] = a;
                row.floats[HEAD_DIM / 2 + i] = b;
            }
        """,
        append="""
            if (head >= HEADS) {
                u8* cache = (head < HEADS + KV_HEADS ? k_cache : v_cache) + own * Cache::head_bytes(context);
                Cache::quantize(row, lane);
                Cache::store(cache, position, row, lane);
            }
        """,
        tiles=", Q8Tiles",
    ),
)

CACHE_TYPES: dict[str, CacheType] = {row.name: row for row in (_HALVES, _Q8)}
