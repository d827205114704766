// The KV cache: how the rows of its types lie in memory, and how tiles of them come to the tensor cores. A row is one
// position of one head.
//
// In memory a head is a row of tiles of 16 positions, whole ones. A tile lies in one piece and is copied as it is, so its
// rows are not padded; instead the 16-byte parts of a row stand in another order in each of eight neighbouring rows
// (`part_place`), so that the lanes of a warp read one part of eight rows from different banks of shared memory.
//
// Both structs offer the same: Row, head_bytes, put, finish, store, set, bytes_of_piece, key, value.
#ifndef PSIGRAPH_CACHE_CUH
#define PSIGRAPH_CACHE_CUH

#include "warp_copies.cuh"

// Where part `part` of PARTS stands in the row of a position; the same the other way round.
template <int PARTS> DEVICE int part_place(int part, int position) {
    constexpr int EVEN = PARTS & -PARTS, MASK = (EVEN < 8 ? EVEN : 8) - 1;  // so that no place is outside the row
    return part ^ (position & MASK);
}

// The first `bytes` of 16 (an even number) on their way into shared memory, zeros behind them; only they are read.
// EARLIER: they were written by an earlier step, so that they may be read before the wait.
// load_rows: `a` of `dot_halves`, rows 0 to 15 and columns 16 step to 16 step + 15 of a tile of halves.
// load_transposed: the same of the tile's transpose: columns 16 step to 16 step + 15, and rows 0 to 15.
// load_transposed_bytes: of rows 0 to 7 and of rows 8 to 15 of a tile of bytes, lane (g, t) gets bytes 2 g and 2 g + 1 of
// part `part` of row 2 t, then the same of row 2 t + 1.
#ifdef PSIGRAPH_HOST
template <bool EARLIER> DEVICE void copy_first_bytes(u8* to, const u8* from, int bytes) {
    for (int i = 0; i < 8; i++) {
        const u16* at = (const u16*)from + i;
        ((u16*)to)[i] = 2 * i >= bytes ? (u16)0 : EARLIER ? host::from_earlier_step(at) : *at;
    }
}
template <int HEAD_DIM> DEVICE u32 half_of_tile(const u8* tile, int row, int column) {
    return ((const u16*)tile)[row * HEAD_DIM + part_place<HEAD_DIM / 8>(column / 8, row) * 8 + column % 8];
}
template <int HEAD_DIM> DEVICE void load_rows(u32 a[4], const u8* tile, int step, int lane) {
    for (int i = 0; i < 4; i++) {
        const int row = (lane >> 2) + 8 * (i & 1), column = 16 * step + 2 * (lane & 3) + 8 * (i >> 1);
        a[i] = half_of_tile<HEAD_DIM>(tile, row, column) | half_of_tile<HEAD_DIM>(tile, row, column + 1) << 16;
    }
}
template <int HEAD_DIM> DEVICE void load_transposed(u32 a[4], const u8* tile, int step, int lane) {
    for (int i = 0; i < 4; i++) {
        const int row = 2 * (lane & 3) + 8 * (i >> 1), column = 16 * step + (lane >> 2) + 8 * (i & 1);
        a[i] = half_of_tile<HEAD_DIM>(tile, row, column) | half_of_tile<HEAD_DIM>(tile, row + 1, column) << 16;
    }
}
template <int HEAD_DIM> DEVICE void load_transposed_bytes(u32 out[2], const u8* tile, int part, int lane) {
    auto at = [&](int row, int byte) { return (u32)tile[row * HEAD_DIM + part_place<HEAD_DIM / 16>(part, row) * 16 + byte]; };
    for (int i = 0; i < 2; i++) {
        const int row = 2 * (lane & 3) + 8 * i, byte = 2 * (lane >> 2);
        out[i] = at(row, byte) | at(row, byte + 1) << 8 | at(row + 1, byte) << 16 | at(row + 1, byte + 1) << 24;
    }
}
#else
template <bool EARLIER> DEVICE void copy_first_bytes(u8* to, const u8* from, int bytes) {
    // A step reads the cache once: it must not push out of L2 what comes next. The constant is what
    // `createpolicy.fractional.L2::evict_first` gives (CUTLASS, `TMA::CacheHintSm90`); worked out, it costs 8 instructions.
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes), "l"(0x12f0000000000000ull)
                 : "memory");
}
// The address of a part of a row. Where a row is a whole number of 128 bytes, so are tiles, and the order of parts can be
// applied to the address of the row's first part: one instruction a part.
template <int ROW> DEVICE u32 part_address(const u8* tile, int row, int low, int high) {
    const u32 start = (u32)__cvta_generic_to_shared(tile) + row * ROW;
    if (ROW % 128 == 0) return ((start + part_place<8>(low, row) * 16) ^ (high % 8 * 16)) + high / 8 * 128;
    return start + part_place<ROW / 16>(high + low, row) * 16;
}
template <int HEAD_DIM> DEVICE void load_rows(u32 a[4], const u8* tile, int step, int lane) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(part_address<HEAD_DIM * 2>(tile, lane & 15, lane >> 4, 2 * step))
                 : "memory");
}
template <int HEAD_DIM> DEVICE void load_transposed(u32 a[4], const u8* tile, int step, int lane) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(part_address<HEAD_DIM * 2>(tile, (lane & 7) + 8 * (lane >> 4), (lane >> 3) & 1, 2 * step))
                 : "memory");
}
template <int HEAD_DIM> DEVICE void load_transposed_bytes(u32 out[2], const u8* tile, int part, int lane) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(part_address<HEAD_DIM>(tile, lane & 15, 0, part))
                 : "memory");
}
#endif

// A tile into shared memory, by one warp: the first `seen` positions, zeros behind them, since a weight of zero times
// whatever lies there must be zero. Whole tiles and others go the same way, so that no code is rare, and so far away.
template <class CACHE> DEVICE void fetch_tile(u8* to, const u8* tile, int seen, int lane) {
    constexpr int PIECES = CACHE::BYTES / 16;
    to += lane * 16;
    tile += lane * 16;
    for_each<(PIECES + 31) / 32>([&](auto i) {
        if (PIECES % 32 == 0 || i.index * 32 + lane < PIECES)
            copy_first_bytes<true>(to + i.index * 512, tile + i.index * 512, CACHE::bytes_of_piece(i.index * 32, lane, seen));
    });
}

// Halves [position][column], the parts of a row in their order.
template <int HEAD_DIM> struct HalfCache {
    static constexpr int POSITIONS = 16, PARTS = HEAD_DIM / 8, BYTES = POSITIONS * HEAD_DIM * 2;  // of a tile; of a row; of a tile

    // A row on its way into the cache, in shared memory.
    struct __align__(16) Row {
        u16 halves[HEAD_DIM];
    };

    DEVICE u64 head_bytes(int context) { return (u64)((context + POSITIONS - 1) / POSITIONS) * BYTES; }
    DEVICE void put(Row& row, int column, float value) { row.halves[column] = float_to_half(value); }
    // Once lanes of this warp have put all columns.
    DEVICE void finish(Row&, int) { __syncwarp(); }
    DEVICE void store(u8* head, int position, const Row& row, int lane) {
        set(head + (u64)(position / POSITIONS) * BYTES, position % POSITIONS, row, lane);
    }
    DEVICE void set(u8* tile, int place, const Row& row, int lane) {
        if (lane < PARTS) ((uint4*)tile)[place * PARTS + part_place<PARTS>(lane, place)] = ((const uint4*)row.halves)[lane];
    }
    // Bytes that count of 16-byte piece `first + lane` of a tile of which the first `seen` positions may be read.
    DEVICE int bytes_of_piece(int first, int lane, int seen) {
        if (32 % PARTS == 0) return lane / PARTS - seen < -(first / PARTS) ? 16 : 0;  // one number for all pieces of a lane
        return (first + lane) / PARTS < seen ? 16 : 0;
    }
    DEVICE void key(u32 out[4], const u8* tile, int step, int lane) { load_rows<HEAD_DIM>(out, tile, step, lane); }
    DEVICE void value(u32 out[4], const u8* tile, int step, int lane) { load_transposed<HEAD_DIM>(out, tile, step, lane); }
};

// Bytes 0 and 2, and bytes 1 and 3 of a word, as halves (byte - 128) * scale; scales: one for each half. A byte below
// 1024 is a half whose lowest bit is worth 1, so that only the product is rounded.
DEVICE void widen(u32& even, u32& odd, u32 word, u32 scales) {
    constexpr u32 LESS = 0xe480e480u;  // -(1024 + 128)
    even = multiply_halves(add_halves((word & 0x00ff00ffu) | 0x64006400u, LESS), scales);
    odd = multiply_halves(add_halves(((word >> 8) & 0x00ff00ffu) | 0x64006400u, LESS), scales);
}

// Bytes: groups of 32 columns with one scale each, the group's largest magnitude over 127: the numbers of ggml's q8_0. A
// value is the half next to integer * scale. A tile is the integers [position][column], plus 128 so that they are
// unsigned, then the scales [group][position] as halves. Within 16 columns, column c (below 8) and column c + 8 are
// neighbours: 16 bits that a transposing load moves as one then hold two columns, and both come out where a tile of halves
// would have them.
template <int HEAD_DIM> struct Q8 {
    static constexpr int POSITIONS = 16, GROUPS = (HEAD_DIM + 31) / 32, PARTS = HEAD_DIM / 16;  // of a tile; of a row; of a row
    static constexpr int VALUES = POSITIONS * HEAD_DIM, BYTES = VALUES + 2 * POSITIONS * GROUPS;

    // A row on its way into the cache, in shared memory.
    struct __align__(16) Row {
        float floats[HEAD_DIM];
        u8 bytes[HEAD_DIM];
        u16 scales[GROUPS];
    };

    DEVICE u64 head_bytes(int context) { return (u64)((context + POSITIONS - 1) / POSITIONS) * BYTES; }

    DEVICE void put(Row& row, int column, float value) { row.floats[column] = value; }
    // Integers and scales, once lanes of this warp have put all columns.
    DEVICE void finish(Row& row, int lane) {
        __syncwarp();
        for_each<GROUPS>([&](auto group) {
            const int column = group.index * 32 + lane;
            const float value = column < HEAD_DIM ? row.floats[column] : 0.0f;
            const float amax = warp_max(fabsf(value));  // what is no number is larger than all
            const float inverse = amax >= 1.50463277e-36f ? divide(127.0f, amax) : 0.0f;  // as in `store_activations`
            const int place = (column & ~15) | (column & 7) << 1 | (column >> 3 & 1);
            if (column < HEAD_DIM) row.bytes[place] = (u8)(128 + round_to_int(value * inverse));
            if (lane == 0) row.scales[group.index] = float_to_half(amax * (1.0f / 127.0f));
        });
        __syncwarp();
    }
    // A finished row to its place: in the cache of its head, or in a tile.
    DEVICE void store(u8* head, int position, const Row& row, int lane) {
        set(head + (u64)(position / POSITIONS) * BYTES, position % POSITIONS, row, lane);
    }
    DEVICE void set(u8* tile, int place, const Row& row, int lane) {
        if (lane < PARTS) ((uint4*)tile)[place * PARTS + part_place<PARTS>(lane, place)] = ((const uint4*)row.bytes)[lane];
        if (lane < GROUPS) ((u16*)(tile + VALUES))[lane * POSITIONS + place] = row.scales[lane];
    }

    // Bytes that count of 16-byte piece `first + lane` of a tile of which the first `seen` positions may be read.
    DEVICE int bytes_of_piece(int first, int lane, int seen) {
        const int piece = first + lane;
        if (piece < HEAD_DIM) return piece / (HEAD_DIM / 16) < seen ? 16 : 0;
        const int left = seen - (piece - HEAD_DIM) % 2 * 8;
        return left <= 0 ? 0 : left >= 8 ? 16 : 2 * left;
    }
    // What `dot_halves` takes of a tile in shared memory, 16 columns: rows g and g + 8 of keys, columns g and g + 8 of values.
    DEVICE void key(u32 out[4], const u8* tile, int step, int lane) {
        const int row = lane >> 2;
        const u8* mine = tile + (row * PARTS + part_place<PARTS>(step, row)) * 16 + (lane & 3) * 4;  // row + 8: the same place
        const u16* scales = (const u16*)(tile + VALUES) + step / 2 * POSITIONS + row;
        widen(out[0], out[2], *(const u32*)mine, scales[0] * 0x10001u);
        widen(out[1], out[3], *(const u32*)(mine + 8 * HEAD_DIM), scales[8] * 0x10001u);
    }
    DEVICE void value(u32 out[4], const u8* tile, int step, int lane) {
        u32 words[2];
        load_transposed_bytes<HEAD_DIM>(words, tile, step, lane);
        const u32* scales = (const u32*)(tile + VALUES + step / 2 * 2 * POSITIONS) + (lane & 3);
        widen(out[0], out[1], words[0], scales[0]);
        widen(out[2], out[3], words[1], scales[4]);
    }
};

#endif
