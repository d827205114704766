// Weight types: how a superblock of a tile is multiplied, and the quantized activations that it meets.
#ifndef PSIGRAPH_QUANT_CUH
#define PSIGRAPH_QUANT_CUH

#include "base.cuh"

// ---------------------------------------------------------------------------------------------------------
// Integer products. A *tile* is 16 rows of a weight matrix; a superblock is 16 rows x 256 columns, a chunk 64
// columns of it, a group 16 columns. The activation of a group is scale * (254 * high + low), two signed bytes
// a value (layout `i8x2`): the tensor core multiplies both digits with the weights in one instruction, in
// columns that would be empty otherwise, so the second digit costs nothing.
//
// Lane (g, t) = (lane / 4, lane % 4) owns rows g and g + 8 and group t of every chunk.
// ---------------------------------------------------------------------------------------------------------

// sums[0..1]: row g, group t, times the high and the low digit; sums[2..3]: row g + 8.
// weights[2 j], weights[2 j + 1]: unsigned bytes of rows g and g + 8, columns 16 j + 4 t .. + 3.
// digits: for group lane / 8, digit (lane / 4) % 2, columns 4 t .. + 3.
#ifdef PSIGRAPH_HOST
DEVICE void dot_chunk(int sums[4], const u32 weights[8], u32 digits, int lane) { host::dot_chunk(sums, weights, digits, lane); }
#else
DEVICE void dot_groups(int sums[4], const u32* weights, u32 first_digits, u32 second_digits) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(first_digits), "r"(second_digits));
}
DEVICE void dot_chunk(int sums[4], const u32 weights[8], u32 digits, int lane) {
    int mine = lane >> 3;
    dot_groups(sums, weights, mine == 0 ? digits : 0u, mine == 1 ? digits : 0u);
    dot_groups(sums, weights + 4, mine == 2 ? digits : 0u, mine == 3 ? digits : 0u);
}
#endif

// The activations of 256 columns, held in registers as lane (g, t) needs them.
// Of group t in chunk c: digits, scale, and bias = scale * the group's integers summed.
// minimum_bias[k]: bias of the 32 columns that a 6-bit minimum covers, half t / 2 of chunk 2 (t % 2) + k.
struct ActivationBlock {
    u32 digits[4];
    float scale[4], bias[4], minimum_bias[2];
    u32 number;  // `bits_of_2_23`, for types with minima
    // words, factors: where this lane reads its block (`first_words`, `first_factors`).
    METHOD void load(const uint4* words, const float4* factors) {
        uint4 four = fresh(words);
        float4 a = fresh(factors), b = fresh(factors + 1);
        digits[0] = four.x; digits[1] = four.y; digits[2] = four.z; digits[3] = four.w;
        scale[0] = a.x; bias[0] = a.y; scale[1] = a.z; bias[1] = a.w;
        scale[2] = b.x; bias[2] = b.y; scale[3] = b.z; bias[3] = b.w;
    }
    // Only Q4_K and Q5_K need it.
    METHOD void find_minimum_bias(int lane) {
        number = bits_of_2_23();
        float of_half[4];
#pragma unroll
        for (int c = 0; c < 4; c++) of_half[c] = bias[c] + __shfl_xor_sync(FULL_WARP, bias[c], 1);
        minimum_bias[0] = (lane & 1) ? of_half[2] : of_half[0];
        minimum_bias[1] = (lane & 1) ? of_half[3] : of_half[1];
    }
};

// An i8x2 vector in memory: of every 256 columns 32 lanes x 4 chunks x 4 digits, then 4 groups x 4 chunks x (scale, bias).
#define ACTIVATION_BLOCK 640
#define ACTIVATION_STRIDE 40  // words of 16 bytes
#define ACTIVATION_COPIES 4   // of a vector, one after the other: a product's blocks take turns with them
// Where lane (g, t) reads the block of a superblock.
DEVICE const uint4* first_words(const u8* vector, int superblock, int lane) { return (const uint4*)(vector + superblock * ACTIVATION_BLOCK) + lane; }
DEVICE const float4* first_factors(const u8* vector, int superblock, int lane) {
    return (const float4*)(vector + superblock * ACTIVATION_BLOCK + 512) + 2 * (lane & 3);
}

// The activations of a warp's slice for weights that are floating-point numbers: float32 in shared memory.
struct Floats {
    const float* values;
};

DEVICE int integer_sum(const int* sums) { return 254 * sums[0] + sums[1]; }

// Low nibbles: a chunk is 32 lanes x 16 bytes; word j holds rows g (low nibbles) and g + 8 (high nibbles).
DEVICE int nibble_at(const u8* plane, int row, int column) {
    int lane = (row & 7) * 4 + ((column >> 2) & 3);
    int byte = plane[((column >> 6) * 32 + lane) * 16 + ((column >> 4) & 3) * 4 + (column & 3)];
    return row < 8 ? byte & 15 : byte >> 4;
}
// weights[2 j]: row g; weights[2 j + 1]: 16 times row g + 8, which saves the shift.
DEVICE void spread_nibbles(u32 weights[8], uint4 packed) {
    const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        weights[2 * j] = words[j] & 0x0f0f0f0fu;
        weights[2 * j + 1] = words[j] & 0xf0f0f0f0u;
    }
}

// The 6-bit scales and minima of Q4_K and Q5_K, 256 bytes: three planes of 16 words and 8 pairs of (d, dmin).
// Word 8 h + g serves rows g and g + 8; its byte c serves columns 64 c + 32 h .. + 31:
//   plane 0: scale of row g, and bits 4 and 5 of its minimum above it; plane 1: the same for row g + 8;
//   plane 2: low 4 bits of the minima of rows g and g + 8.
struct SixBit {
    u32 low_scales, high_scales, low_minima, high_minima;  // one byte a chunk
    float2 low_d, high_d;                                  // (d, dmin)
    METHOD void load(const u8* header, int g, int half) {
        const u32* planes = (const u32*)header + half * 8 + g;
        u32 a = planes[0], b = planes[16], c = planes[32];
        low_scales = a & 0x3f3f3f3fu;
        high_scales = b & 0x3f3f3f3fu;
        low_minima = (c & 0x0f0f0f0fu) | ((a >> 2) & 0x30303030u);
        high_minima = ((c >> 4) & 0x0f0f0f0fu) | ((b >> 2) & 0x30303030u);
        uint2 d = ((const uint2*)(header + 192))[g];
        low_d = halves_to_floats(d.x);
        high_d = halves_to_floats(d.y);
    }
};

// What Q4_K and Q5_K share: value = d * scale * quant - dmin * minimum. QUANTS::HIGH: what its high rows are multiplied with.
template <class QUANTS>
DEVICE void dot_with_minimum(const u8* superblock, const u8* header, const ActivationBlock& x, int lane, float& low_row, float& high_row) {
    SixBit six;
    six.load(header, lane >> 2, (lane >> 1) & 1);
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int c = 0; c < 4; c++) {
        u32 weights[8];
        QUANTS::unpack(weights, superblock, c, lane);
        int sums[4] = {0, 0, 0, 0};
        dot_chunk(sums, weights, x.digits[c], lane);
        low += x.scale[c] * byte_to_float(six.low_scales, c, x.number) * (float)integer_sum(sums);
        high += x.scale[c] * byte_to_float(six.high_scales, c, x.number) * (float)integer_sum(sums + 2);
    }
    const int at = 2 * (lane & 1);
    float first = x.minimum_bias[0], second = x.minimum_bias[1];
    low_row += six.low_d.x * low - six.low_d.y * (byte_to_float(six.low_minima, at, x.number) * first + byte_to_float(six.low_minima, at + 1, x.number) * second);
    high_row += six.high_d.x * (1.0f / QUANTS::HIGH) * high -
                six.high_d.y * (byte_to_float(six.high_minima, at, x.number) * first + byte_to_float(six.high_minima, at + 1, x.number) * second);
}
DEVICE float value_with_minimum(const u8* header, int quant, int row, int column) {
    SixBit six;
    six.load(header, row & 7, (column >> 5) & 1);
    float2 d = row < 8 ? six.low_d : six.high_d;
    int chunk = column >> 6;
    float scale = byte_to_float(row < 8 ? six.low_scales : six.high_scales, chunk);
    return d.x * scale * (float)quant - d.y * byte_to_float(row < 8 ? six.low_minima : six.high_minima, chunk);
}

// Q4_K: 4 chunks of nibbles (2,048 bytes), then scales and minima.
struct Q4K {
    static constexpr int BYTES = 2304, HIGH = 16;
    typedef ActivationBlock Activations;
    static constexpr bool MINIMA = true;
    DEVICE void unpack(u32 weights[8], const u8* superblock, int chunk, int lane) { spread_nibbles(weights, ((const uint4*)superblock)[chunk * 32 + lane]); }
    DEVICE void dot(const u8* superblock, const ActivationBlock& x, int lane, float& low_row, float& high_row) {
        dot_with_minimum<Q4K>(superblock, superblock + 2048, x, lane, low_row, high_row);
    }
    DEVICE float element(const u8* superblock, int row, int column) {
        return value_with_minimum(superblock + 2048, nibble_at(superblock, row, column), row, column);
    }
};

// Q5_K: nibbles, then 4 chunks of fifth bits (32 lanes x 4 bytes; bit 2 j + (row >= 8) of a byte), then scales and minima.
struct Q5K {
    static constexpr int BYTES = 2816, HIGH = 1;
    typedef ActivationBlock Activations;
    static constexpr bool MINIMA = true;
    DEVICE void unpack(u32 weights[8], const u8* superblock, int chunk, int lane) {
        uint4 packed = ((const uint4*)superblock)[chunk * 32 + lane];
        const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
        u32 bits = ((const u32*)(superblock + 2048))[chunk * 32 + lane];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 nibbles = (i & 1) ? words[i >> 1] >> 4 : words[i >> 1];
            weights[i] = (nibbles & 0x0f0f0f0fu) | ((i < 4 ? bits << (4 - i) : bits >> (i - 4)) & 0x10101010u);
        }
    }
    DEVICE void dot(const u8* superblock, const ActivationBlock& x, int lane, float& low_row, float& high_row) {
        dot_with_minimum<Q5K>(superblock, superblock + 2560, x, lane, low_row, high_row);
    }
    DEVICE float element(const u8* superblock, int row, int column) {
        int lane = (row & 7) * 4 + ((column >> 2) & 3);
        int byte = superblock[2048 + ((column >> 6) * 32 + lane) * 4 + (column & 3)];
        int fifth = (byte >> (((column >> 4) & 3) * 2 + (row >= 8))) & 1;
        return value_with_minimum(superblock + 2560, nibble_at(superblock, row, column) + 16 * fifth, row, column);
    }
};

// Q6_K: nibbles, then bits 4 and 5 (2 x 32 lanes x 16 bytes: word i = 2 j + (row >= 8), bits 2 c and 2 c + 1 of a byte
// for chunk c), then int8 scales as lane (g, t) reads them (row g chunks 0..3, row g + 8 chunks 0..3), then d of 16 rows.
// value = d * scale * (quant - 32). Nibbles and high bits go through the tensor core apart, each masked in place:
// that is one instruction a word instead of three.
struct Q6K {
    static constexpr int BYTES = 3360;
    typedef ActivationBlock Activations;
    static constexpr bool MINIMA = false;
    DEVICE void dot(const u8* superblock, const ActivationBlock& x, int lane, float& low_row, float& high_row) {
        uint4 first = ((const uint4*)(superblock + 2048))[lane], second = ((const uint4*)(superblock + 2560))[lane];
        const u32 bits[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
        uint2 scales = ((const uint2*)(superblock + 3072))[lane];
        const u16* d = (const u16*)(superblock + 3328);
        float low = 0.0f, high = 0.0f;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            u32 weights[8];
            spread_nibbles(weights, ((const uint4*)superblock)[c * 32 + lane]);
            int nibbles[4] = {0, 0, 0, 0}, highs[4] = {0, 0, 0, 0};
            u32 digits = x.digits[c];
            dot_chunk(nibbles, weights, digits, lane);
#pragma unroll
            for (int i = 0; i < 8; i++) weights[i] = bits[i] & (0x03030303u << (2 * c));
            dot_chunk(highs, weights, digits, lane);
            // highs are 4^c times the two bits, and stand 16 times higher; the nibbles of row g + 8 are 16 times theirs.
            constexpr int UP[4] = {16, 4, 1, 1}, DOWN[4] = {1, 1, 1, 4};
            int low_sum = DOWN[c] * integer_sum(nibbles) + UP[c] * integer_sum(highs);
            int high_sum = integer_sum(nibbles + 2) + (256 >> (2 * c)) * integer_sum(highs + 2);
            float scale = x.scale[c], zero = 32.0f * x.bias[c];
            low += signed_byte_to_float(scales.x, c) * (scale * (1.0f / DOWN[c]) * (float)low_sum - zero);
            high += signed_byte_to_float(scales.y, c) * (scale * (1.0f / 16.0f) * (float)high_sum - zero);
        }
        low_row += half_to_float(d[lane >> 2]) * low;
        high_row += half_to_float(d[(lane >> 2) + 8]) * high;
    }
    DEVICE float element(const u8* superblock, int row, int column) {
        int g = row & 7, lane = g * 4 + ((column >> 2) & 3), chunk = column >> 6, group = (column >> 4) & 3, i = 2 * group + (row >= 8);
        int byte = superblock[2048 + (i >> 2) * 512 + lane * 16 + (i & 3) * 4 + (column & 3)];
        int high_bits = (byte >> (2 * chunk)) & 3;
        int scale = ((const s8*)superblock)[3072 + (g * 4 + group) * 8 + (row >= 8) * 4 + chunk];
        return half_to_float(((const u16*)(superblock + 3328))[row]) * (float)scale * (float)(nibble_at(superblock, row, column) + 16 * high_bits - 32);
    }
};

// Q8_0: bytes + 128 so that they are unsigned (4 chunks x 2 halves x 32 lanes x 16 bytes; word 2 (j % 2) + (row >= 8)
// of half j / 2), then 8 halves of scales a row. value = d * (quant - 128).
struct Q80 {
    static constexpr int BYTES = 4352;
    typedef ActivationBlock Activations;
    static constexpr bool MINIMA = false;
    DEVICE void dot(const u8* superblock, const ActivationBlock& x, int lane, float& low_row, float& high_row) {
        const uint4* scales = (const uint4*)(superblock + 4096);
        uint4 low_scales = scales[lane >> 2], high_scales = scales[(lane >> 2) + 8];
        const u32 low_words[4] = {low_scales.x, low_scales.y, low_scales.z, low_scales.w};
        const u32 high_words[4] = {high_scales.x, high_scales.y, high_scales.z, high_scales.w};
        int shift = ((lane >> 1) & 1) * 16;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            uint4 a = ((const uint4*)superblock)[(c * 2) * 32 + lane], b = ((const uint4*)superblock)[(c * 2 + 1) * 32 + lane];
            const u32 weights[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
            int sums[4] = {0, 0, 0, 0};
            dot_chunk(sums, weights, x.digits[c], lane);
            float scale = x.scale[c], zero = 128.0f * x.bias[c];
            low_row += half_to_float((u16)(low_words[c] >> shift)) * (scale * (float)integer_sum(sums) - zero);
            high_row += half_to_float((u16)(high_words[c] >> shift)) * (scale * (float)integer_sum(sums + 2) - zero);
        }
    }
    DEVICE float element(const u8* superblock, int row, int column) {
        int lane = (row & 7) * 4 + ((column >> 2) & 3), group = (column >> 4) & 3;
        int quant = superblock[(((column >> 6) * 2 + (group >> 1)) * 32 + lane) * 16 + ((group & 1) * 2 + (row >= 8)) * 4 + (column & 3)];
        return half_to_float(((const u16*)(superblock + 4096))[row * 8 + (column >> 5)]) * (float)(quant - 128);
    }
};

// Floating-point weights: group by group (16 columns), 32 lanes x (4 values of row g, 4 of row g + 8).
template <class NUMBER> struct FloatTiles {
    static constexpr int LANE = 8 * NUMBER::BYTES_EACH;
    static constexpr int BYTES = 16 * 32 * LANE;
    typedef Floats Activations;
    static constexpr bool MINIMA = false;
    DEVICE void dot(const u8* superblock, const Floats& x, int lane, float& low_row, float& high_row) {
#pragma unroll 4
        for (int group = 0; group < 16; group++) {
            float4 a = *(const float4*)(x.values + group * 16 + (lane & 3) * 4);
            float4 low, high;
            NUMBER::load(superblock, group * 32 + lane, low, high);
            low_row += low.x * a.x + low.y * a.y + (low.z * a.z + low.w * a.w);
            high_row += high.x * a.x + high.y * a.y + (high.z * a.z + high.w * a.w);
        }
    }
    DEVICE float element(const u8* superblock, int row, int column) {
        int lane = (row & 7) * 4 + ((column >> 2) & 3), index = column & 3;
        float4 low, high;
        NUMBER::load(superblock, (column >> 4) * 32 + lane, low, high);
        float4 four = row < 8 ? low : high;
        return index == 0 ? four.x : index == 1 ? four.y : index == 2 ? four.z : four.w;
    }
};
struct HalfNumber {
    static constexpr int BYTES_EACH = 2;
    DEVICE void load(const u8* superblock, int at, float4& low, float4& high) {
        uint4 v = ((const uint4*)superblock)[at];
        float2 a = halves_to_floats(v.x), b = halves_to_floats(v.y), c = halves_to_floats(v.z), d = halves_to_floats(v.w);
        low = make_float4(a.x, a.y, b.x, b.y);
        high = make_float4(c.x, c.y, d.x, d.y);
    }
};
struct BfloatNumber {
    static constexpr int BYTES_EACH = 2;
    DEVICE void load(const u8* superblock, int at, float4& low, float4& high) {
        uint4 v = ((const uint4*)superblock)[at];
        low = make_float4(bits_to_float(v.x << 16), bits_to_float(v.x & 0xffff0000u), bits_to_float(v.y << 16), bits_to_float(v.y & 0xffff0000u));
        high = make_float4(bits_to_float(v.z << 16), bits_to_float(v.z & 0xffff0000u), bits_to_float(v.w << 16), bits_to_float(v.w & 0xffff0000u));
    }
};
struct FloatNumber {
    static constexpr int BYTES_EACH = 4;
    DEVICE void load(const u8* superblock, int at, float4& low, float4& high) {
        low = ((const float4*)superblock)[2 * at];
        high = ((const float4*)superblock)[2 * at + 1];
    }
};
typedef FloatTiles<HalfNumber> F16;
typedef FloatTiles<BfloatNumber> BF16;
typedef FloatTiles<FloatNumber> F32;

// Bytes `odd` and `odd` + 2 of both words.
#ifdef PSIGRAPH_HOST
DEVICE u32 every_other_byte(u32 first, u32 second, int odd) {
    first >>= 8 * odd, second >>= 8 * odd;
    return (first & 0xffu) | ((first >> 8) & 0xff00u) | ((second & 0xffu) << 16) | ((second << 8) & 0xff000000u);
}
#else
DEVICE u32 every_other_byte(u32 first, u32 second, int odd) { return __byte_perm(first, second, odd ? 0x7531 : 0x6420); }
#endif

// Write one value of an i8x2 vector, COPIES times at every COPY_BYTES. 16 neighbouring lanes hold one group; all 32 lanes
// call it, those with `inside` false write nothing (a whole group is inside or outside). index: the value's place.
template <int COPIES, int COPY_BYTES> DEVICE void store_activations(u8* vector, int index, float value, bool inside) {
    float amax = half_warp_max(fabsf(value));  // what is no number is larger than all: its group becomes none either
    bool alive = !(amax < 1.50463277e-36f);  // 128 * smallest normal number: below, 127 / amax could overflow
    float inverse = divide(127.0f, alive ? amax : 1.0f);  // no branch around it, so that it overlaps with what is beside it
    float scaled = alive ? value * inverse : 0.0f;
    int high = round_to_int(scaled);
    int low = round_to_int((scaled - (float)high) * 254.0f);
    int sum = half_warp_sum(254 * high + low);
    // The four lanes of a word know all of it, and each of them writes other copies.
    const int quad = index & 3, chunk = (index >> 6) & 3, group = (index >> 4) & 3;
    u32 mine = ((u32)high & 0xffu) | (((u32)low & 0xffu) << 8), other = __shfl_xor_sync(FULL_WARP, mine, 1);
    mine = (quad & 1) ? other | (mine << 16) : mine | (other << 16);
    other = __shfl_xor_sync(FULL_WARP, mine, 2);
    u32 first = (quad & 2) ? other : mine, second = (quad & 2) ? mine : other;
    u8* const block = vector + (index >> 8) * ACTIVATION_BLOCK;
    u32* const words = (u32*)(block + (group * 8 + ((index >> 2) & 3)) * 16) + chunk;
    float2* const factor = (float2*)(block + 512) + group * 4 + chunk;
    float scale = alive ? amax * (1.0f / 32258.0f) : 0.0f;
#pragma unroll
    for (int copy = 0; copy < COPIES; copy += 4) {
        const int at = (copy + quad) * COPY_BYTES;
        if (!inside || copy + quad >= COPIES) continue;
        *(u32*)((u8*)words + at) = every_other_byte(first, second, 0);
        *(u32*)((u8*)words + at + 64) = every_other_byte(first, second, 1);
        if ((index & 12) == 0) *(float2*)((u8*)factor + at) = make_float2(scale, scale * (float)sum);
    }
}

// 1 / sqrt(mean of squares + eps) from at most 32 * TURNS partial sums of squares; all 32 lanes of one warp call it.
template <int TURNS> DEVICE float factor_from_parts(const float* parts, int count, float inverse_size, float eps, int lane) {
    float part[TURNS], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < TURNS; i++) part[i] = i * 32 + lane < count ? fresh(parts + i * 32 + lane) : 0.0f;
#pragma unroll
    for (int i = 0; i < TURNS; i++) sum += part[i];
    return rsqrtf(lanes_sum(sum, 32) * inverse_size + eps);
}

#endif
