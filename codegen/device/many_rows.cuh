// Many rows at once, on the tensor cores, in halves: products and attention of a prompt's chunk.
//
// A prompt's chunk is a matrix of activations, a row a token, float16 (layout `halves`: rows padded with zeros to whole
// superblocks). Weights stay in the tiles of a decode step. m16n8k16 multiplies 16 weight rows with 8 tokens: a lane
// (g, t) gives the values of rows g and g + 8, which is what it reads of a tile anyway, and the order of the 16 columns
// within one instruction is free, so that columns 4 t .. 4 t + 3 of a tile's group and of a token's row meet as they lie.
#ifndef PSIGRAPH_MANY_ROWS_CUH
#define PSIGRAPH_MANY_ROWS_CUH

#include "rows.cuh"

// == Instructions

// Two bytes of a word, 0 and 1 or 2 and 3, as halves of 1024 + the byte: a half's lowest bit is worth 1 there.
#ifdef PSIGRAPH_HOST
DEVICE u32 bytes_on_1024(u32 word, int second) { return 0x64006400u | byte_of_word(word, 2 * second) | byte_of_word(word, 2 * second + 1) << 16; }
#else
DEVICE u32 bytes_on_1024(u32 word, int second) { return __byte_perm(word, 0x64646464u, second ? 0x4342 : 0x4140); }
#endif
DEVICE u32 halves_twice(float value) { return halves_from(value, value); }

// 16 bytes on their way into shared memory; zeros, and nothing is read, where `inside` is false.
// A thread sees its own copies after `finish_copies`, a block all of them after the barrier behind it.
#ifdef PSIGRAPH_HOST
DEVICE void copy_16(void* shared, const void* global, bool inside) { *(uint4*)shared = inside ? *(const uint4*)global : make_uint4(0, 0, 0, 0); }
DEVICE void finish_copies() {}
#else
DEVICE void copy_16(void* shared, const void* global, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(shared)), "l"(global), "r"(inside ? 16 : 0) : "memory");
}
DEVICE void finish_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif

// sums[i][n] += tile i (16 rows x 16 columns) times 8 rows of halves in shared memory, for each block n of 8 rows.
// sums[i][n]: row g of the tile with rows 8 n + 2 t and + 1, then row g + 8 with the same two.
// tiles[i]: columns 4 t, + 1 of row g, of row g + 8; columns 4 t + 2, + 3 of row g, of row g + 8.
// rows: the first row's first column; `stride` halves from row to row. All lanes give the same address.
template <int TILES, int BLOCKS>
DEVICE void multiply_rows(float (*sums)[BLOCKS][4], const u32 (*tiles)[4], const u16* rows, int stride, int lane) {
#ifdef PSIGRAPH_HOST
    for (int i = 0; i < TILES; i++) host::multiply_halves(&sums[i][0][0], tiles[i], rows, stride, BLOCKS, false, lane);
#else
    const u16* mine = rows + (lane >> 2) * stride + (lane & 3) * 4;
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
        uint2 columns = *(const uint2*)(mine + n * 8 * stride);
#pragma unroll
        for (int i = 0; i < TILES; i++)
            asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                : "+f"(sums[i][n][0]), "+f"(sums[i][n][1]), "+f"(sums[i][n][2]), "+f"(sums[i][n][3])
                : "r"(tiles[i][0]), "r"(tiles[i][1]), "r"(tiles[i][2]), "r"(tiles[i][3]), "r"(columns.x), "r"(columns.y));
    }
#endif
}

// sums[n] += tile (16 rows x 16 columns) times 16 rows of 8 halves in shared memory, block n at 8 n. Columns of the tile
// stand in the instruction's own order: 2 t, + 1 of row g, of row g + 8; 2 t + 8, + 9 of row g, of row g + 8.
template <int BLOCKS> DEVICE void multiply_columns(float (*sums)[4], const u32 tile[4], const u16* rows, int stride, int lane) {
    static_assert(BLOCKS % 2 == 0, "blocks come in pairs");
#ifdef PSIGRAPH_HOST
    host::multiply_halves(&sums[0][0], tile, rows, stride, BLOCKS, true, lane);
#else
    u32 mine = (u32)__cvta_generic_to_shared(rows + (lane & 15) * stride + (lane >> 4) * 8);
#pragma unroll
    for (int n = 0; n < BLOCKS; n += 2) {
        u32 b[4];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                     : "r"(mine + n * 16)
                     : "memory");
#pragma unroll
        for (int i = 0; i < 2; i++)
            asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                : "+f"(sums[n + i][0]), "+f"(sums[n + i][1]), "+f"(sums[n + i][2]), "+f"(sums[n + i][3])
                : "r"(tile[0]), "r"(tile[1]), "r"(tile[2]), "r"(tile[3]), "r"(b[2 * i]), "r"(b[2 * i + 1]));
    }
#endif
}

// == One lane's share of a chunk (16 rows x 64 columns) of a tile: `Raw::load` only asks memory for it, `prepare` works out
// the scales, `tile` makes the halves of group J as `multiply_rows` wants them. Scales are worked out in float32.

template <class TYPE> struct Chunk;

// Four unsigned bytes as halves: (byte - CENTER) * scale + offset, or without an offset. The difference is exact, the
// scale is rounded, and so is the result. CENTER: the middle of the bytes' range, so that what is rounded is small.
template <int CENTER> DEVICE void scaled_bytes(u32& first, u32& second, u32 word, u32 scale, u32 offset) {
    constexpr u32 LESS = 0xe400e400u + CENTER * 0x10001u;  // -(1024 + CENTER)
    first = fma_halves(add_halves(bytes_on_1024(word, 0), LESS), scale, offset);
    second = fma_halves(add_halves(bytes_on_1024(word, 1), LESS), scale, offset);
}
template <int CENTER> DEVICE void scaled_bytes(u32& first, u32& second, u32 word, u32 scale) {
    constexpr u32 LESS = 0xe400e400u + CENTER * 0x10001u;
    first = multiply_halves(add_halves(bytes_on_1024(word, 0), LESS), scale);
    second = multiply_halves(add_halves(bytes_on_1024(word, 1), LESS), scale);
}

// Q4_K and Q5_K: what the 6-bit scales and minima are worth for this chunk, in both halves of a word: [half of the
// columns][row g, row g + 8]. scale * quant - minimum = scale * (quant - CENTER) + offset.
template <int CENTER> struct ChunkScales {
    struct Raw {
        u32 planes[2][3];
        uint2 d;
        METHOD void load(const u8* header, int lane) {
            const u32* words = (const u32*)header + (lane >> 2);
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int plane = 0; plane < 3; plane++) planes[half][plane] = words[plane * 16 + half * 8];
            d = ((const uint2*)(header + 192))[lane >> 2];
        }
    };
    u32 scale[2][2], offset[2][2];
    METHOD void put(int half, int row, float scale_, float minimum) {
        scale[half][row] = halves_twice(scale_);
        offset[half][row] = halves_twice(scale_ * (float)CENTER - minimum);
    }
    METHOD void prepare(const Raw& raw, int chunk) {
        const float2 low_d = halves_to_floats(raw.d.x), high_d = halves_to_floats(raw.d.y);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 a = raw.planes[half][0] >> (8 * chunk), b = raw.planes[half][1] >> (8 * chunk), c = raw.planes[half][2] >> (8 * chunk);
            put(half, 0, low_d.x * (float)(a & 0x3fu), low_d.y * (float)((c & 0x0fu) | ((a >> 2) & 0x30u)));
            put(half, 1, high_d.x * (float)(b & 0x3fu), high_d.y * (float)(((c >> 4) & 0x0fu) | ((b >> 2) & 0x30u)));
        }
    }
};

template <> struct Chunk<Q4K> {
    struct Raw {
        uint4 packed;
        ChunkScales<8>::Raw scales;
        METHOD void load(const u8* superblock, int chunk, int lane) {
            packed = ((const uint4*)superblock)[chunk * 32 + lane];
            scales.load(superblock + 2048, lane);
        }
    };
    u32 words[4];
    ChunkScales<8> scales;
    METHOD void prepare(const Raw& raw, int chunk) {
        words[0] = raw.packed.x, words[1] = raw.packed.y, words[2] = raw.packed.z, words[3] = raw.packed.w;
        scales.prepare(raw.scales, chunk);
    }
    template <int J> METHOD void tile(u32 out[4]) const {
        scaled_bytes<8>(out[0], out[2], words[J] & 0x0f0f0f0fu, scales.scale[J / 2][0], scales.offset[J / 2][0]);
        scaled_bytes<8>(out[1], out[3], (words[J] >> 4) & 0x0f0f0f0fu, scales.scale[J / 2][1], scales.offset[J / 2][1]);
    }
};

template <> struct Chunk<Q5K> {
    struct Raw {
        uint4 packed;
        u32 bits;
        ChunkScales<16>::Raw scales;
        METHOD void load(const u8* superblock, int chunk, int lane) {
            packed = ((const uint4*)superblock)[chunk * 32 + lane];
            bits = ((const u32*)(superblock + 2048))[chunk * 32 + lane];
            scales.load(superblock + 2560, lane);
        }
    };
    u32 words[4], bits;
    ChunkScales<16> scales;
    METHOD void prepare(const Raw& raw, int chunk) {
        words[0] = raw.packed.x, words[1] = raw.packed.y, words[2] = raw.packed.z, words[3] = raw.packed.w;
        bits = raw.bits;
        scales.prepare(raw.scales, chunk);
    }
    template <int J> METHOD void tile(u32 out[4]) const {
        u32 low = ((bits >> (2 * J)) & 0x01010101u) << 4, high = ((bits >> (2 * J + 1)) & 0x01010101u) << 4;
        scaled_bytes<16>(out[0], out[2], (words[J] & 0x0f0f0f0fu) | low, scales.scale[J / 2][0], scales.offset[J / 2][0]);
        scaled_bytes<16>(out[1], out[3], ((words[J] >> 4) & 0x0f0f0f0fu) | high, scales.scale[J / 2][1], scales.offset[J / 2][1]);
    }
};

template <> struct Chunk<Q6K> {
    struct Raw {
        uint4 packed, first, second, scales[2];
        u16 low_d, high_d;
        METHOD void load(const u8* superblock, int chunk, int lane) {
            packed = ((const uint4*)superblock)[chunk * 32 + lane];
            first = ((const uint4*)(superblock + 2048))[lane], second = ((const uint4*)(superblock + 2560))[lane];
            scales[0] = ((const uint4*)(superblock + 3072))[(lane >> 2) * 2], scales[1] = ((const uint4*)(superblock + 3072))[(lane >> 2) * 2 + 1];
            low_d = ((const u16*)(superblock + 3328))[lane >> 2], high_d = ((const u16*)(superblock + 3328))[(lane >> 2) + 8];
        }
    };
    u32 words[4], bits[8];  // bits: moved down so that those of this chunk are lowest
    u32 scale[4][2];        // [group][row g, row g + 8]
    METHOD void prepare(const Raw& raw, int chunk) {
        words[0] = raw.packed.x, words[1] = raw.packed.y, words[2] = raw.packed.z, words[3] = raw.packed.w;
        const u32 all[8] = {raw.first.x, raw.first.y, raw.first.z, raw.first.w, raw.second.x, raw.second.y, raw.second.z, raw.second.w};
#pragma unroll
        for (int i = 0; i < 8; i++) bits[i] = (all[i] >> (2 * chunk)) & 0x03030303u;
        const float low = half_to_float(raw.low_d), high = half_to_float(raw.high_d);
        const u32 bytes[8] = {raw.scales[0].x, raw.scales[0].y, raw.scales[0].z, raw.scales[0].w,
                              raw.scales[1].x, raw.scales[1].y, raw.scales[1].z, raw.scales[1].w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            scale[j][0] = halves_twice(low * signed_byte_to_float(bytes[2 * j] >> (8 * chunk), 0));
            scale[j][1] = halves_twice(high * signed_byte_to_float(bytes[2 * j + 1] >> (8 * chunk), 0));
        }
    }
    template <int J> METHOD void tile(u32 out[4]) const {
        scaled_bytes<32>(out[0], out[2], (words[J] & 0x0f0f0f0fu) | bits[2 * J] << 4, scale[J][0]);
        scaled_bytes<32>(out[1], out[3], ((words[J] >> 4) & 0x0f0f0f0fu) | bits[2 * J + 1] << 4, scale[J][1]);
    }
};

template <> struct Chunk<Q80> {
    struct Raw {
        uint4 packed[2];
        u32 scales[2];
        METHOD void load(const u8* superblock, int chunk, int lane) {
            packed[0] = ((const uint4*)superblock)[chunk * 64 + lane], packed[1] = ((const uint4*)superblock)[chunk * 64 + 32 + lane];
            const u32* all = (const u32*)(superblock + 4096) + chunk + (lane >> 2) * 4;
            scales[0] = all[0], scales[1] = all[32];
        }
    };
    u32 words[8], scales[2];
    METHOD void prepare(const Raw& raw, int) {
        words[0] = raw.packed[0].x, words[1] = raw.packed[0].y, words[2] = raw.packed[0].z, words[3] = raw.packed[0].w;
        words[4] = raw.packed[1].x, words[5] = raw.packed[1].y, words[6] = raw.packed[1].z, words[7] = raw.packed[1].w;
        scales[0] = raw.scales[0], scales[1] = raw.scales[1];
    }
    template <int J> METHOD void tile(u32 out[4]) const {
        const u32 low = (scales[0] >> (J / 2 * 16) & 0xffffu) * 0x10001u, high = (scales[1] >> (J / 2 * 16) & 0xffffu) * 0x10001u;
        scaled_bytes<128>(out[0], out[2], words[2 * J], low);
        scaled_bytes<128>(out[1], out[3], words[2 * J + 1], high);
    }
};

// f16 and bf16: four groups of 32 lanes x (4 values of row g, 4 of row g + 8).
struct RawHalves {
    uint4 groups[4];
    METHOD void load(const u8* superblock, int chunk, int lane) {
#pragma unroll
        for (int j = 0; j < 4; j++) groups[j] = ((const uint4*)superblock)[(chunk * 4 + j) * 32 + lane];
    }
};

template <> struct Chunk<F16> {
    typedef RawHalves Raw;
    uint4 groups[4];
    METHOD void prepare(const Raw& raw, int) {
#pragma unroll
        for (int j = 0; j < 4; j++) groups[j] = raw.groups[j];
    }
    template <int J> METHOD void tile(u32 out[4]) const { out[0] = groups[J].x, out[2] = groups[J].y, out[1] = groups[J].z, out[3] = groups[J].w; }
};

template <> struct Chunk<BF16> {
    typedef RawHalves Raw;
    uint4 groups[4];
    METHOD void prepare(const Raw& raw, int) {
#pragma unroll
        for (int j = 0; j < 4; j++) groups[j] = raw.groups[j];
    }
    DEVICE u32 halves(u32 pair) { return halves_from(bits_to_float(pair << 16), bits_to_float(pair & 0xffff0000u)); }
    template <int J> METHOD void tile(u32 out[4]) const {
        out[0] = halves(groups[J].x), out[2] = halves(groups[J].y), out[1] = halves(groups[J].z), out[3] = halves(groups[J].w);
    }
};

template <> struct Chunk<F32> {
    struct Raw {
        float4 groups[4][2];
        METHOD void load(const u8* superblock, int chunk, int lane) {
#pragma unroll
            for (int j = 0; j < 4; j++) FloatNumber::load(superblock, (chunk * 4 + j) * 32 + lane, groups[j][0], groups[j][1]);
        }
    };
    u32 halves[4][4];
    METHOD void prepare(const Raw& raw, int) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float4 low = raw.groups[j][0], high = raw.groups[j][1];
            halves[j][0] = halves_from(low.x, low.y), halves[j][2] = halves_from(low.z, low.w);
            halves[j][1] = halves_from(high.x, high.y), halves[j][3] = halves_from(high.z, high.w);
        }
    }
    template <int J> METHOD void tile(u32 out[4]) const { out[0] = halves[J][0], out[1] = halves[J][1], out[2] = halves[J][2], out[3] = halves[J][3]; }
};

// == Products. A block has 64 weight rows (4 tiles) and 128 tokens; its 8 warps are 2 teams that share the columns (team k
// takes chunks k and k + 2 of every superblock), of 2 x 2 warps with 2 tiles and 64 tokens each. A stage of shared memory
// holds 128 columns of the block's tokens; the next one is on its way while this one is multiplied.

constexpr int PRODUCT_THREADS = 256, BLOCK_TOKENS = 128, WARP_TOKENS = 64, BLOCK_TILES = 4;
constexpr int STAGE_COLUMNS = 128, STAGE_STRIDE = STAGE_COLUMNS + 16;  // halves; the 16 keep lanes in banks of their own
constexpr int STAGE_HALVES = BLOCK_TOKENS * STAGE_STRIDE;

typedef float ProductSums[2][WARP_TOKENS / 8][4];

// A thread copies 16 bytes of every 16th token. source: of its first one, at the stage's first column; `rows` of the
// block's tokens count from that one on. An address behind the last token is given and not read.
template <int STRIDE> DEVICE void fetch_stage(u16* stage, const u16* source, int rows) {
    u16* to = stage + threadIdx.x / 16 * STAGE_STRIDE + threadIdx.x % 16 * 8;
#pragma unroll
    for (int i = 0; i < BLOCK_TOKENS / 16; i++) copy_16(to + i * 16 * STAGE_STRIDE, source + i * 16 * STRIDE, i * 16 < rows);
}

// The sums of this warp's tiles; of team 0 they are whole in the end. first, second: its two tiles; x: halves
// [token][stride]; tokens first_token and after, below count. shared: 2 * STAGE_HALVES halves.
template <class A, class B, int SUPERBLOCKS>
DEVICE void multiply_block(ProductSums& sums, const u8* first, const u8* second, const u16* x, int first_token, int count, u16* shared) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, team = warp >> 2, token_warp = warp & 1;
    const bool busy = first_token + token_warp * WARP_TOKENS < count;
    for_each<2>([&](auto i) { for_each<WARP_TOKENS / 8>([&](auto n) { for_each<4>([&](auto e) { sums[i.index][n.index][e.index] = 0.0f; }); }); });
    static_assert(PRODUCT_THREADS == 16 * (STAGE_COLUMNS / 8), "16 threads a token, 16 tokens at once");
    constexpr int STRIDE = SUPERBLOCKS * 256;
    const int my_token = first_token + threadIdx.x / 16;
    const u16* source = x + (u64)my_token * STRIDE + threadIdx.x % 16 * 8;
    fetch_stage<STRIDE>(shared, source, count - my_token);
    typename Chunk<A>::Raw raw_a;
    typename Chunk<B>::Raw raw_b;
    if (busy) {
        raw_a.load(first, team, lane);
        raw_b.load(second, team, lane);
    }
#pragma unroll 1
    for (int step = 0; step < 2 * SUPERBLOCKS; step++) {
        finish_copies();
        __syncthreads();
        const int next = step + 1;
        if (next < 2 * SUPERBLOCKS) fetch_stage<STRIDE>(shared + (next & 1) * STAGE_HALVES, source + next * STAGE_COLUMNS, count - my_token);
        if (busy) {
            Chunk<A> a;
            Chunk<B> b;
            a.prepare(raw_a, 2 * (step & 1) + team);
            b.prepare(raw_b, 2 * (step & 1) + team);
            if (next < 2 * SUPERBLOCKS) {
                raw_a.load(first + (next >> 1) * A::BYTES, 2 * (next & 1) + team, lane);
                raw_b.load(second + (next >> 1) * B::BYTES, 2 * (next & 1) + team, lane);
            }
            const u16* rows = shared + (step & 1) * STAGE_HALVES + token_warp * WARP_TOKENS * STAGE_STRIDE + team * 64;
            for_each<4>([&](auto j) {
                u32 tiles[2][4];
                a.template tile<j.index>(tiles[0]);
                b.template tile<j.index>(tiles[1]);
                multiply_rows<2, WARP_TOKENS / 8>(sums, tiles, rows + j.index * 16, STAGE_STRIDE, lane);
            });
        }
    }
    __syncthreads();
    float* halfway = (float*)shared + (warp & 3) * (64 * 32) + lane;
    if (team == 1) for_each<64>([&](auto i) { halfway[i.index * 32] = (&sums[0][0][0])[i.index]; });
    __syncthreads();
    if (team == 0) for_each<64>([&](auto i) { (&sums[0][0][0])[i.index] += halfway[i.index * 32]; });
}

// store(row of the tile, token, value of the first tile, value of the second) for everything that team 0 holds.
template <class STORE> DEVICE void store_sums(const ProductSums& sums, int first_token, int count, STORE&& store) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (warp >= 4) return;
    for_each<WARP_TOKENS / 8>([&](auto n) {
        for_each<4>([&](auto e) {
            int token = first_token + (warp & 1) * WARP_TOKENS + n.index * 8 + (lane & 3) * 2 + e.index % 2;
            int row = (lane >> 2) + e.index / 2 * 8;
            if (token < count) store(row, token, sums[0][n.index][e.index], sums[1][n.index][e.index]);
        });
    });
}

// A weight matrix of a product, in tiles.
template <class TYPE, int ROWS> struct Weight {
    typedef TYPE Type;
    static constexpr int COUNT = ROWS, TILES = (ROWS + 15) / 16;
    const u8* tiles;
};

// The different types among the weights of a product: each has one stretch of code.
template <class... TYPES> struct Types {};
template <class A, class B> constexpr bool SAME = false;
template <class A> constexpr bool SAME<A, A> = true;
template <class TYPE, class FIRST, class... REST> constexpr int index_of(Types<FIRST, REST...>) {
    if constexpr (SAME<TYPE, FIRST>) return 0;
    else return 1 + index_of<TYPE>(Types<REST...>());
}
// body(TYPE()) for the type of that index; the last one is not asked for.
template <class BODY, class FIRST, class... REST> DEVICE void with_type(int index, Types<FIRST, REST...>, BODY&& body) {
    if constexpr (sizeof...(REST) == 0) body(FIRST());
    else if (index == 0) body(FIRST());
    else with_type(index - 1, Types<REST...>(), body);
}

// The weight that a unit of work belongs to: its rows, where they begin among all, which of its units this is, its type's
// index. A tile has UNITS of them, or a unit has TILES. Weights of one type so share one stretch of code.
struct Part {
    const u8* tiles;
    int rows, offset, unit, type;
};
template <class TYPES, int UNITS, int TILES, class FIRST, class... REST> DEVICE Part part_of(int unit, int offset, FIRST first, REST... rest) {
    constexpr int ALL = (FIRST::TILES * UNITS + TILES - 1) / TILES;
    if constexpr (sizeof...(REST) > 0)
        if (unit >= ALL) return part_of<TYPES, UNITS, TILES>(unit - ALL, offset + FIRST::COUNT, rest...);
    return {first.tiles, FIRST::COUNT, offset, unit, index_of<typename FIRST::Type>(TYPES())};
}

// What becomes of a product's value: it is stored, or a function of it and of another operand.
template <class OUT> struct Stored {
    OUT out;
    METHOD void put(int row, int at, float value) const { out.store(row, at, value, true); }
};
template <class OUT, class FUNCTION, class OPERAND> struct Applied {
    OUT out;
    FUNCTION function;
    OPERAND operand;
    METHOD void put(int row, int at, float value) const { out.store(row, at, function(operand.at(ManyRows{}, row, at), value), true); }
};
template <class OUT> DEVICE Stored<OUT> results(OUT out) { return {out}; }
template <class OUT, class FUNCTION, class OPERAND> DEVICE Applied<OUT, FUNCTION, OPERAND> results(OUT out, FUNCTION function, OPERAND operand) {
    return {out, function, operand};
}

// y = w @ x for every weight, 64 weight rows and 128 tokens a block. x: halves times 2^-UP.
template <class SHAPE, class TYPES, class RESULTS, class... WEIGHTS>
DEVICE void product_rows(const u16* x, const int* rows, const RESULTS& results, const Stamps& stamps, WEIGHTS... weights) {
    DYNAMIC_SHARED(shared_memory);
    wait_for_previous_kernel(stamps);
    const int count = *rows, first_token = blockIdx.x % SHAPE::TOKEN_BLOCKS * BLOCK_TOKENS;
    if (first_token >= count) return;
    const Part part = part_of<TYPES, 1, BLOCK_TILES>(blockIdx.x / SHAPE::TOKEN_BLOCKS, 0, weights...);
    const int pair = (threadIdx.x >> 6) & 1;  // of a block's two pairs of tiles, this warp's
    const int last = (part.rows + 15) / 16 - 1, tile = part.unit * BLOCK_TILES + pair * 2;
    const u64 one = (u64)(tile < last ? tile : last) * SHAPE::SUPERBLOCKS;
    const u64 two = (u64)(tile + 1 < last ? tile + 1 : last) * SHAPE::SUPERBLOCKS;
    ProductSums sums;
    with_type(part.type, TYPES(), [&](auto type) {
        typedef decltype(type) TYPE;
        multiply_block<TYPE, TYPE, SHAPE::SUPERBLOCKS>(sums, part.tiles + one * TYPE::BYTES, part.tiles + two * TYPE::BYTES, x, first_token, count, (u16*)shared_memory);
    });
    store_sums(sums, first_token, count, [&](int row, int token, float a, float b) {
        const int to = tile * 16 + row;
        if (to < part.rows) results.put(token, part.offset + to, a * (float)(1 << SHAPE::UP));
        if (to + 16 < part.rows) results.put(token, part.offset + to + 16, b * (float)(1 << SHAPE::UP));
    });
}

// y = swiglu(gate @ x, up @ x): two tiles of the gate and the same two of up a block.
template <class SHAPE, class FUNCTION, class OUT, class GATE, class UP>
DEVICE void product_swiglu(const u16* x, const int* rows, const FUNCTION& function, const OUT& out, const Stamps& stamps, GATE gate, UP up) {
    DYNAMIC_SHARED(shared_memory);
    wait_for_previous_kernel(stamps);
    const int count = *rows, first_token = blockIdx.x % SHAPE::TOKEN_BLOCKS * BLOCK_TOKENS;
    if (first_token >= count) return;
    const int mine = blockIdx.x / SHAPE::TOKEN_BLOCKS * (BLOCK_TILES / 2) + ((threadIdx.x >> 6) & 1);
    const u64 at = (u64)(mine < GATE::TILES - 1 ? mine : GATE::TILES - 1) * SHAPE::SUPERBLOCKS;
    typedef typename GATE::Type A;
    typedef typename UP::Type B;
    ProductSums sums;
    multiply_block<A, B, SHAPE::SUPERBLOCKS>(sums, gate.tiles + at * A::BYTES, up.tiles + at * B::BYTES, x, first_token, count, (u16*)shared_memory);
    constexpr float SCALE = 1 << SHAPE::UP;
    float largest = 0.0f;
    store_sums(sums, first_token, count, [&](int row, int token, float a, float b) {
        const int to = mine * 16 + row;
        const float value = function(a * SCALE, b * SCALE);
        out.store(token, to, value, to < GATE::COUNT);
        if constexpr (IS_SAMPLED<OUT>) largest = fmaxf(largest, fabsf(value));
    });
    if constexpr (IS_SAMPLED<OUT>)
        if (blockIdx.x / SHAPE::TOKEN_BLOCKS % 16 == 0) out.tell(largest);
}

// Weights as halves [rows][padded columns], one below the other, for a library that multiplies: a warp a superblock of a
// tile.
template <class TYPE> DEVICE void dequantize_tile(const u8* tiles, u16* out, int rows, int superblocks, int which) {
    const int lane = threadIdx.x & 31, tile = which / superblocks, superblock = which % superblocks;
    const int row = tile * 16 + (lane >> 2);
    u16* mine = out + (u64)row * superblocks * 256 + superblock * 256 + (lane & 3) * 4;
#pragma unroll
    for (int c = 0; c < 4; c++) {
        typename Chunk<TYPE>::Raw raw;
        raw.load(tiles + (u64)which * TYPE::BYTES, c, lane);
        Chunk<TYPE> chunk;
        chunk.prepare(raw, c);
        for_each<4>([&](auto j) {
            u32 halves[4];
            chunk.template tile<j.index>(halves);
            if (row < rows) *(uint2*)(mine + c * 64 + j.index * 16) = make_uint2(halves[0], halves[2]);
            if (row + 8 < rows) *(uint2*)(mine + (u64)8 * superblocks * 256 + c * 64 + j.index * 16) = make_uint2(halves[1], halves[3]);
        });
    }
}
template <class SHAPE, class TYPES, class... WEIGHTS> DEVICE void dequantize_weights(u16* halves, WEIGHTS... weights) {
    const int warp = blockIdx.x * (SHAPE::THREADS / 32) + (threadIdx.x >> 5);
    const Part part = part_of<TYPES, SHAPE::SUPERBLOCKS, 1>(warp, 0, weights...);
    if (part.unit >= (part.rows + 15) / 16 * SHAPE::SUPERBLOCKS) return;
    u16* const out = halves + (u64)part.offset * SHAPE::SUPERBLOCKS * 256;
    with_type(part.type, TYPES(), [&](auto type) { dequantize_tile<decltype(type)>(part.tiles, out, part.rows, SHAPE::SUPERBLOCKS, part.unit); });
}

// == Causal attention of a chunk over the cache (running softmax: Milakov and Gimelshein 2018; tiles as in
// FlashAttention-2). A block has one key/value head and 64 rows, a row being a token and one of the query heads that
// share that head; a warp has 16 of them. Keys and values come in tiles through shared memory.

constexpr int ATTEND_THREADS = 128, ATTEND_ROWS = 64;

template <int D> struct AttendShape {
    static constexpr int KEYS = D > 128 ? 32 : 64;                     // of a tile
    static constexpr int KEY_STRIDE = D + 16, VALUE_STRIDE = D + 8;    // halves: lanes in banks of their own
    static constexpr int STAGE = KEYS * (KEY_STRIDE + VALUE_STRIDE);   // halves
};

// Tiles of keys and values, as a type of cache brings them: `fetch` begins the copies of one; `arrived`, once those of
// all threads are there, begins those of the next and gives halves [KEYS][KEY_STRIDE], [KEYS][VALUE_STRIDE]. `keys` of
// the head may be read. The caches themselves are in `cache.cuh`.
//
// Halves arrive as they are, in two stages of shared memory by turns.
template <int D> struct HalfTiles {
    typedef AttendShape<D> Shape;
    typedef HalfCache<D> Cache;
    const u8 *head_keys, *head_values;
    u16* shared;
    int keys;
    METHOD HalfTiles(const u8* k_cache, const u8* v_cache, int kv_head, int context, int keys_, u16* shared_)
        : head_keys(k_cache + kv_head * Cache::head_bytes(context)), head_values(v_cache + kv_head * Cache::head_bytes(context)), shared(shared_), keys(keys_) {}
    METHOD void fetch(int tile) const {
        u16* stage = shared + (tile & 1) * Shape::STAGE;
#pragma unroll 4
        for (int i = threadIdx.x; i < Shape::KEYS * D / 8; i += ATTEND_THREADS) {
            int row = i / (D / 8), part = i % (D / 8), key = tile * Shape::KEYS + row;
            bool inside = key < keys;  // behind them may lie anything, and zero times that is not always zero
            u64 at = inside ? ((u64)key * Cache::PARTS + part_place<Cache::PARTS>(part, key)) * 16 : 0;
            copy_16(stage + row * Shape::KEY_STRIDE + part * 8, head_keys + at, inside);
            copy_16(stage + Shape::KEYS * Shape::KEY_STRIDE + row * Shape::VALUE_STRIDE + part * 8, head_values + at, inside);
        }
    }
    METHOD const u16* arrived(int tile, int tiles) const {
        if (tile + 1 < tiles) fetch(tile + 1);
        return shared + (tile & 1) * Shape::STAGE;
    }
};

// Bytes arrive behind one stage of halves, and are widened into it.
template <int D> struct Q8Tiles {
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
            const int bytes = Cache::bytes_of_piece(piece, 0, keys - which * Cache::POSITIONS);
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
            const uint4 words = ((const uint4*)tile)[row * Cache::PARTS + part_place<Cache::PARTS>(part, row)];
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

// q, y: halves [token][stride]; caches: as TILES knows them. The rows are tokens at consecutive positions of one sequence,
// the first `*rows` of them. scale: of the scores, times log2(e). Dynamic shared memory: 2 * STAGE halves, or what TILES
// needs.
template <class SHAPE, template <int> class TILES>
DEVICE void attend_block(const u16* q, const u8* k_cache, const u8* v_cache, u16* y, const int* positions, const int* rows,
                         int context, float scale, const Stamps& stamps) {
    constexpr int D = SHAPE::HEAD_DIM, GROUP = SHAPE::GROUP, q_stride = SHAPE::Q_STRIDE, y_stride = SHAPE::Y_STRIDE;
    typedef AttendShape<D> Shape;
    constexpr int KEYS = Shape::KEYS, BLOCKS = D / 8;
    DYNAMIC_SHARED(shared_memory);
    u16* const shared = (u16*)shared_memory;
    wait_for_previous_kernel(stamps);
    const int kv_head = blockIdx.x % SHAPE::KV_HEADS, block = SHAPE::BLOCKS - 1 - (int)blockIdx.x / SHAPE::KV_HEADS;
    const int position = positions[0], count = *rows;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int first_token = block * ATTEND_ROWS / GROUP;
    if (first_token >= count) return;
    int last_token = (block * ATTEND_ROWS + ATTEND_ROWS - 1) / GROUP;
    last_token = last_token < count ? last_token : count - 1;
    const int keys = position + last_token + 1;
    const TILES<D> cache(k_cache, v_cache, kv_head, context, keys, shared);
    cache.fetch(0);

    // Rows g and g + 8 of this warp: their tokens, heads and queries.
    int token[2], head[2];
    u32 query[D / 16][1][4];
    for_each<2>([&](auto r) {
        int row = block * ATTEND_ROWS + warp * 16 + (lane >> 2) + r.index * 8;
        token[r.index] = row / GROUP;
        head[r.index] = kv_head * GROUP + row % GROUP;
        const u16* mine = q + (u64)(token[r.index] < count ? token[r.index] : count - 1) * q_stride + head[r.index] * D + (lane & 3) * 4;
        for_each<D / 16>([&](auto k) {
            uint2 four = *(const uint2*)(mine + k.index * 16);
            query[k.index][0][r.index] = four.x;
            query[k.index][0][r.index + 2] = four.y;
        });
    });

    float sums[BLOCKS][4], top[2] = {-1e30f, -1e30f}, total[2] = {0.0f, 0.0f};
    for_each<BLOCKS>([&](auto n) { for_each<4>([&](auto e) { sums[n.index][e.index] = 0.0f; }); });
    const int tiles = (keys + KEYS - 1) / KEYS;
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        finish_copies();
        __syncthreads();
        const u16* stage = cache.arrived(tile, tiles);
        float scores[1][KEYS / 8][4];
        for_each<KEYS / 8>([&](auto n) { for_each<4>([&](auto e) { scores[0][n.index][e.index] = 0.0f; }); });
        for_each<D / 16>([&](auto k) { multiply_rows<1, KEYS / 8>(scores, query[k.index], stage + k.index * 16, Shape::KEY_STRIDE, lane); });
        const bool ragged = (tile + 1) * KEYS > position + first_token + 1;  // some row does not see all of these keys
        float highest[2] = {top[0], top[1]};
        for_each<KEYS / 8>([&](auto n) {
            for_each<4>([&](auto e) {
                constexpr int r = e.index / 2;
                int key = tile * KEYS + n.index * 8 + (lane & 3) * 2 + e.index % 2;
                float score = scores[0][n.index][e.index] * scale;
                if (ragged && key > position + token[r]) score = -1e30f;
                scores[0][n.index][e.index] = score;
                highest[r] = fmaxf(highest[r], score);
            });
        });
        for_each<2>([&](auto r) {
            highest[r.index] = lanes_max(highest[r.index], 4);
            float shrink = exp2_fast(top[r.index] - highest[r.index]);
            top[r.index] = highest[r.index];
            total[r.index] *= shrink;
            for_each<BLOCKS>([&](auto n) {
                sums[n.index][2 * r.index] *= shrink;
                sums[n.index][2 * r.index + 1] *= shrink;
            });
        });
        for_each<KEYS / 8>([&](auto n) {
            for_each<4>([&](auto e) {
                constexpr int r = e.index / 2;
                float weight = exp2_fast(scores[0][n.index][e.index] - top[r]);
                total[r] += weight;
                scores[0][n.index][e.index] = weight;
            });
        });
        for_each<KEYS / 16>([&](auto k) {
            const float *one = scores[0][2 * k.index], *two = scores[0][2 * k.index + 1];
            const u32 weights[4] = {halves_from(one[0], one[1]), halves_from(one[2], one[3]), halves_from(two[0], two[1]), halves_from(two[2], two[3])};
            multiply_columns<BLOCKS>(sums, weights, stage + KEYS * Shape::KEY_STRIDE + k.index * 16 * Shape::VALUE_STRIDE, Shape::VALUE_STRIDE, lane);
        });
    }
    for_each<2>([&](auto r) {
        float inverse = divide(1.0f, lanes_sum(total[r.index], 4));
        u16* mine = y + (u64)token[r.index] * y_stride + head[r.index] * D + (lane & 3) * 2;
        if (token[r.index] < count)
            for_each<BLOCKS>([&](auto n) { *(u32*)(mine + n.index * 8) = halves_from(sums[n.index][2 * r.index] * inverse, sums[n.index][2 * r.index + 1] * inverse); });
    });
}

#endif
