// The KV cache in 8 bits, type `q8`. A row (one position of one head) has groups of 32 columns with one scale each, the
// group's largest magnitude over 127: the numbers of ggml's q8_0. A value is the half next to integer * scale.
//
// In memory a head is a row of tiles of 16 positions, whole ones: the integers [position][column], plus 128 so that they
// are unsigned, then the scales [group][position] as halves. So every row of either plane begins at 16 bytes, a tile lies
// in one piece, and the positions that a kernel may read are a prefix of what one copy brings. Within 16 columns, column
// c (below 8) and column c + 8 are neighbours: 16 bits that a transposing load moves as one then hold two columns, and
// both come out where a tile of halves would have them.
#ifndef PSIGRAPH_CACHE_CUH
#define PSIGRAPH_CACHE_CUH

// The first `bytes` of 16 (an even number) on their way into shared memory, zeros behind them; only they are read.
// EARLIER: they were written by an earlier step, so that they may be read before the wait.
// load_transposed_bytes: of rows 0 to 7 and of rows 8 to 15 (`row` bytes apart), lane (g, t) gets bytes 2 g and 2 g + 1
// of row 2 t, then the same of row 2 t + 1.
#ifdef PSIGRAPH_HOST
template <bool EARLIER> DEVICE void copy_first_bytes(u8* to, const u8* from, int bytes) {
    for (int i = 0; i < 8; i++) {
        const u16* at = (const u16*)from + i;
        ((u16*)to)[i] = 2 * i >= bytes ? (u16)0 : EARLIER ? host::from_earlier_step(at) : *at;
    }
}
DEVICE void load_transposed_bytes(u32 out[2], const u8* rows, int row, int lane) {
    for (int i = 0; i < 2; i++) {
        const u8* at = rows + (2 * (lane & 3) + 8 * i) * row + 2 * (lane >> 2);
        out[i] = (u32)at[0] | (u32)at[1] << 8 | (u32)at[row] << 16 | (u32)at[row + 1] << 24;
    }
}
#else
template <bool EARLIER> DEVICE void copy_first_bytes(u8* to, const u8* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes) : "memory");
}
DEVICE void load_transposed_bytes(u32 out[2], const u8* rows, int row, int lane) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"((u32)__cvta_generic_to_shared(rows + (lane & 15) * row))
                 : "memory");
}
#endif

// Bytes 0 and 2, and bytes 1 and 3 of a word, as halves (byte - 128) * scale; scales: one for each half. A byte below
// 1024 is a half whose lowest bit is worth 1, so that only the product is rounded.
DEVICE void widen(u32& even, u32& odd, u32 word, u32 scales) {
    constexpr u32 LESS = 0xe480e480u;  // -(1024 + 128)
    even = multiply_halves(add_halves((word & 0x00ff00ffu) | 0x64006400u, LESS), scales);
    odd = multiply_halves(add_halves(((word >> 8) & 0x00ff00ffu) | 0x64006400u, LESS), scales);
}

template <int HEAD_DIM> struct Q8 {
    static constexpr int POSITIONS = 16, GROUPS = (HEAD_DIM + 31) / 32;  // of a tile; of a row
    static constexpr int VALUES = POSITIONS * HEAD_DIM, BYTES = VALUES + 2 * POSITIONS * GROUPS;
    // In shared memory rows are an odd number of 16 bytes apart, so that lanes read them from different banks.
    static constexpr int ROW = HEAD_DIM % 32 ? HEAD_DIM : HEAD_DIM + 16, SCALES = POSITIONS * ROW;
    static constexpr int SHARED = SCALES + 2 * POSITIONS * GROUPS;

    // A row on its way into the cache, in shared memory.
    struct __align__(16) Row {
        float floats[HEAD_DIM];
        u8 bytes[HEAD_DIM];
        u16 scales[GROUPS];
    };

    DEVICE u64 head_bytes(int context) { return (u64)((context + POSITIONS - 1) / POSITIONS) * BYTES; }
    // Where a query's column stands among halves, so that it meets the key's column as that lies here.
    DEVICE int query_place(int column) { return (column & ~15) | (column & 6) << 1 | (column & 8) >> 2 | (column & 1); }

    // Integers and scales of a row's floats, which lanes of this warp have just written.
    DEVICE void quantize(Row& row, int lane) {
        __syncwarp();
        for_each<GROUPS>([&](auto group) {
            const int column = group.index * 32 + lane;
            const float value = column < HEAD_DIM ? row.floats[column] : 0.0f;
            const float amax = lanes_max(fabsf(value), 32);
            const float inverse = amax >= 1.50463277e-36f ? divide(127.0f, amax) : 0.0f;  // as in `store_digits`
            const int place = (column & ~15) | (column & 7) << 1 | (column >> 3 & 1);
            if (column < HEAD_DIM) row.bytes[place] = (u8)(128 + round_to_int(value * inverse));
            if (lane == 0) row.scales[group.index] = float_to_half(amax * (1.0f / 127.0f));
        });
        __syncwarp();
    }
    // A quantized row to its place: in the cache of its head, or in a tile in shared memory.
    DEVICE void store(u8* head, int position, const Row& row, int lane) {
        u8* tile = head + (u64)(position / POSITIONS) * BYTES;
        place_row(tile + position % POSITIONS * HEAD_DIM, tile + VALUES, position % POSITIONS, row, lane);
    }
    DEVICE void put(u8* tile, int place, const Row& row, int lane) { place_row(tile + place * ROW, tile + SCALES, place, row, lane); }
    DEVICE void place_row(u8* values, u8* scales, int place, const Row& row, int lane) {
        if (lane < HEAD_DIM / 16) ((uint4*)values)[lane] = ((const uint4*)row.bytes)[lane];
        if (lane < GROUPS) ((u16*)scales)[lane * POSITIONS + place] = row.scales[lane];
    }

    // Bytes that count of 16-byte piece `piece` of a tile of which the first `seen` positions may be read.
    DEVICE int bytes_of_piece(int piece, int seen) {
        if (piece < HEAD_DIM) return piece / (HEAD_DIM / 16) < seen ? 16 : 0;
        const int left = seen - (piece - HEAD_DIM) % 2 * 8;
        return left <= 0 ? 0 : left >= 8 ? 16 : 2 * left;
    }
    // A tile into shared memory, by one warp.
    DEVICE void fetch(u8* to, const u8* tile, int seen, int lane) {
#pragma unroll 1
        for (int i = lane; i < HEAD_DIM; i += 32)
            copy_first_bytes<true>(to + i / (HEAD_DIM / 16) * ROW + i % (HEAD_DIM / 16) * 16, tile + i * 16, bytes_of_piece(i, seen));
        if (lane < 2 * GROUPS) copy_first_bytes<true>(to + SCALES + lane * 16, tile + VALUES + lane * 16, bytes_of_piece(HEAD_DIM + lane, seen));
    }

    // What `dot_halves` takes of a tile in shared memory, 16 columns: rows g and g + 8 of keys, columns g and g + 8 of values.
    DEVICE void key(u32 out[4], const u8* tile, int step, int lane) {
        const u8* mine = tile + (lane >> 2) * ROW + step * 16 + (lane & 3) * 4;
        const u16* scales = (const u16*)(tile + SCALES) + step / 2 * POSITIONS + (lane >> 2);
        widen(out[0], out[2], *(const u32*)mine, scales[0] * 0x10001u);
        widen(out[1], out[3], *(const u32*)(mine + 8 * ROW), scales[8] * 0x10001u);
    }
    DEVICE void value(u32 out[4], const u8* tile, int step, int lane) {
        u32 words[2];
        load_transposed_bytes(words, tile + step * 16, ROW, lane);
        const u32* scales = (const u32*)(tile + SCALES + step / 2 * 2 * POSITIONS) + (lane & 3);
        widen(out[0], out[1], words[0], scales[0]);
        widen(out[2], out[3], words[1], scales[4]);
    }
};

// Tiles of keys and values for `attend_block`: bytes arrive behind one stage of halves, and are widened into it.
#ifdef PSIGRAPH_PREFILL_CUH
template <int D> struct Q8Tiles {
    typedef u8 Element;
    typedef AttendShape<D> Shape;
    typedef Q8<D> Cache;
    static constexpr int TILES = Shape::KEYS / Cache::POSITIONS, PIECES = Cache::BYTES / 16;
    const u8 *head_keys, *head_values;
    u16* halves;
    u8* raw;
    int keys;
    METHOD Q8Tiles(const u8* k_cache, const u8* v_cache, int kv_head, int context, int keys_, u16* shared)
        : head_keys(k_cache + kv_head * Cache::head_bytes(context)),
          head_values(v_cache + kv_head * Cache::head_bytes(context)),
          halves(shared),
          raw((u8*)(shared + Shape::STAGE)),
          keys(keys_) {}
    METHOD void fetch(int tile) const {
#pragma unroll(D > 128 ? 1 : 2)
        for (int i = threadIdx.x; i < TILES * PIECES; i += ATTEND_THREADS) {
            const int which = tile * TILES + i / PIECES, piece = i % PIECES;
            const int bytes = Cache::bytes_of_piece(piece, keys - which * Cache::POSITIONS);
            const u64 at = bytes ? (u64)which * Cache::BYTES + piece * 16 : 0;  // an address behind the cache is not given
            copy_first_bytes<false>(raw + i * 16, head_keys + at, bytes);
            copy_first_bytes<false>(raw + (TILES * PIECES + i) * 16, head_values + at, bytes);
        }
    }
    METHOD const u16* arrived(int tile, int tiles) const {
        widen_all(halves, raw, Shape::KEY_STRIDE);
        widen_all(halves + Shape::KEYS * Shape::KEY_STRIDE, raw + TILES * Cache::BYTES, Shape::VALUE_STRIDE);
        __syncthreads();
        if (tile + 1 < tiles) fetch(tile + 1);
        return halves;
    }
    METHOD void widen_all(u16* to, const u8* from, int stride) const {
#pragma unroll(D > 128 ? 1 : 2)
        for (int i = threadIdx.x; i < Shape::KEYS * D / 16; i += ATTEND_THREADS) {
            const int key = i / (D / 16), part = i % (D / 16), row = key % Cache::POSITIONS;
            const u8* tile = from + key / Cache::POSITIONS * Cache::BYTES;
            const uint4 words = *(const uint4*)(tile + row * D + part * 16);
            const u32 scale = ((const u16*)(tile + Cache::VALUES))[part / 2 * Cache::POSITIONS + row] * 0x10001u;
            uint4 low, high;  // columns 0 to 7, and 8 to 15
            widen(low.x, high.x, words.x, scale);
            widen(low.y, high.y, words.y, scale);
            widen(low.z, high.z, words.z, scale);
            widen(low.w, high.w, words.w, scale);
            uint4* eight = (uint4*)(to + key * stride + part * 16);
            eight[0] = low;
            eight[1] = high;
        }
    }
};
#endif

#endif
