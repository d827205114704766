// Where the file keeps a value: used once, at load, to lay a matrix out in tiles (quant.cuh) without
// changing a bit. One struct a weight type. A block of 128 threads moves one superblock (16 rows x 256 columns).
// Sources: ggml's block layouts (ggml-common.h).
#ifndef PSIGRAPH_REPACK_CUH
#define PSIGRAPH_REPACK_CUH

#include "base.cuh"

// The 256 columns of one row of the file, or nothing beyond the matrix.
struct FileRow {
    const u8* bytes;
    int columns;  // how many of the 256 columns exist
};

// The 16 rows of one superblock of a tile; row r of them, found when asked for (no array in local memory).
struct FileTile {
    const u8* bytes;  // of row 0 at this superblock
    u64 row_bytes;
    int rows, columns;  // how many rows and columns exist from here on
    METHOD FileRow operator[](int r) const {
        FileRow row;
        row.bytes = r < rows ? bytes + r * row_bytes : (const u8*)0;
        row.columns = r < rows ? columns : 0;
        return row;
    }
};

DEVICE u32 byte_of(const FileRow& row, int at) { return row.bytes ? row.bytes[at] : 0u; }
DEVICE u32 half_of(const FileRow& row, int at) { return byte_of(row, at) | (byte_of(row, at + 1) << 8); }

// Columns 16 j + 4 t .. + 3 of a chunk, for rows g and g + 8, as one word of low nibbles (and the shared plane code).
template <class FILE> DEVICE u32 nibble_word(const FileRow& low, const FileRow& high, int column) {
    u32 word = 0;
    for (int i = 0; i < 4; i++) word |= ((FILE::quant(low, column + i) & 15u) | ((FILE::quant(high, column + i) & 15u) << 4)) << (8 * i);
    return word;
}
template <class FILE> DEVICE void nibble_plane(u8* superblock, const FileRow& low, const FileRow& high, int slot) {
    int chunk = slot >> 5, t = slot & 3;
    for (int j = 0; j < 4; j++) ((u32*)superblock)[slot * 4 + j] = nibble_word<FILE>(low, high, chunk * 64 + j * 16 + t * 4);
}
DEVICE void copy_bytes(u8* target, const FileRow& row, int from, int count) {
    for (int i = 0; i < count; i++) target[i] = (u8)byte_of(row, from + i);
}
// The 6-bit scales and minima of Q4_K and Q5_K as the file packs them (ggml, get_scale_min_k4), index 0..7.
DEVICE u32 file_scale(const FileRow& row, int i) {
    return i < 4 ? byte_of(row, 4 + i) & 63u : (byte_of(row, 8 + i) & 15u) | ((byte_of(row, i) >> 6) << 4);
}
DEVICE u32 file_minimum(const FileRow& row, int i) {
    return i < 4 ? byte_of(row, 8 + i) & 63u : (byte_of(row, 8 + i) >> 4) | ((byte_of(row, 4 + i) >> 6) << 4);
}
// The planes that `SixBit` reads; slot 0..15 = 8 * half + g.
DEVICE void scale_planes(u8* header, const FileRow& low, const FileRow& high, int slot) {
    int half = slot >> 3, g = slot & 7;
    u32 words[3] = {0, 0, 0};
    for (int c = 0; c < 4; c++) {
        u32 low_minimum = file_minimum(low, 2 * c + half), high_minimum = file_minimum(high, 2 * c + half);
        words[0] |= (file_scale(low, 2 * c + half) | ((low_minimum >> 4) << 6)) << (8 * c);
        words[1] |= (file_scale(high, 2 * c + half) | ((high_minimum >> 4) << 6)) << (8 * c);
        words[2] |= ((low_minimum & 15u) | ((high_minimum & 15u) << 4)) << (8 * c);
    }
    for (int plane = 0; plane < 3; plane++) ((u32*)header)[plane * 16 + slot] = words[plane];
    if (half == 0) {
        copy_bytes(header + 192 + g * 8, low, 0, 4);
        copy_bytes(header + 192 + g * 8 + 4, high, 0, 4);
    }
}

// slot = chunk * 32 + lane runs over 0..127; `rows` are the 16 rows of the tile.
struct FileQ4K {
    static constexpr int COLUMNS = 256, BYTES = 144;
    DEVICE u32 quant(const FileRow& row, int k) { return (byte_of(row, 16 + (k >> 6) * 32 + (k & 31)) >> ((k & 32) ? 4 : 0)) & 15u; }
    DEVICE void place(u8* superblock, const FileTile& rows, int slot) {
        nibble_plane<FileQ4K>(superblock, rows[(slot >> 2) & 7], rows[((slot >> 2) & 7) + 8], slot);
        if (slot < 16) scale_planes(superblock + 2048, rows[slot & 7], rows[(slot & 7) + 8], slot);
    }
};

struct FileQ5K {
    static constexpr int COLUMNS = 256, BYTES = 176;
    DEVICE u32 quant(const FileRow& row, int k) {
        u32 nibble = (byte_of(row, 48 + (k >> 6) * 32 + (k & 31)) >> ((k & 32) ? 4 : 0)) & 15u;
        return nibble | (((byte_of(row, 16 + (k & 31)) >> (k >> 5)) & 1u) << 4);
    }
    DEVICE void place(u8* superblock, const FileTile& rows, int slot) {
        const FileRow low = rows[(slot >> 2) & 7], high = rows[((slot >> 2) & 7) + 8];
        nibble_plane<FileQ5K>(superblock, low, high, slot);
        u32 bits = 0;
        for (int j = 0; j < 4; j++)
            for (int i = 0; i < 4; i++) {
                int k = (slot >> 5) * 64 + j * 16 + (slot & 3) * 4 + i;
                bits |= ((quant(low, k) >> 4) << (8 * i + 2 * j)) | ((quant(high, k) >> 4) << (8 * i + 2 * j + 1));
            }
        ((u32*)(superblock + 2048))[slot] = bits;
        if (slot < 16) scale_planes(superblock + 2560, rows[slot & 7], rows[(slot & 7) + 8], slot);
    }
};

struct FileQ6K {
    static constexpr int COLUMNS = 256, BYTES = 210;
    DEVICE u32 quant(const FileRow& row, int k) {
        int half = k >> 7, l = k & 31, quarter = (k >> 5) & 3;
        u32 nibble = (byte_of(row, 64 * half + 32 * (quarter & 1) + l) >> (quarter & 2 ? 4 : 0)) & 15u;
        return nibble | (((byte_of(row, 128 + 32 * half + l) >> (2 * quarter)) & 3u) << 4);
    }
    DEVICE void place(u8* superblock, const FileTile& rows, int slot) {
        const FileRow low = rows[(slot >> 2) & 7], high = rows[((slot >> 2) & 7) + 8];
        nibble_plane<FileQ6K>(superblock, low, high, slot);
        // Words 2 (slot / 32) and the next of lane slot % 32: one for row g, one for row g + 8, all four chunks.
        int j = slot >> 5, lane = slot & 31;
        const FileRow lane_low = rows[lane >> 2], lane_high = rows[(lane >> 2) + 8];
        u32 low_bits = 0, high_bits = 0;
        for (int c = 0; c < 4; c++)
            for (int i = 0; i < 4; i++) {
                int k = c * 64 + j * 16 + (lane & 3) * 4 + i;
                low_bits |= (quant(lane_low, k) >> 4) << (8 * i + 2 * c);
                high_bits |= (quant(lane_high, k) >> 4) << (8 * i + 2 * c);
            }
        u32* plane = (u32*)(superblock + 2048 + (j >> 1) * 512) + lane * 4 + (j & 1) * 2;
        plane[0] = low_bits;
        plane[1] = high_bits;
        if (slot < 32)
            for (int chunk = 0; chunk < 4; chunk++) {
                superblock[3072 + slot * 8 + chunk] = (u8)byte_of(rows[slot >> 2], 192 + chunk * 4 + (slot & 3));
                superblock[3072 + slot * 8 + 4 + chunk] = (u8)byte_of(rows[(slot >> 2) + 8], 192 + chunk * 4 + (slot & 3));
            }
        if (slot < 16) copy_bytes(superblock + 3328 + slot * 2, rows[slot], 208, 2);
    }
};

struct FileQ80 {
    static constexpr int COLUMNS = 32, BYTES = 34;
    DEVICE u32 quant(const FileRow& row, int k) { return (k < row.columns ? byte_of(row, (k >> 5) * 34 + 2 + (k & 31)) : 0u) ^ 0x80u; }
    DEVICE void place(u8* superblock, const FileTile& rows, int slot) {
        int chunk = slot >> 5, lane = slot & 31, g = lane >> 2, t = lane & 3;
        for (int half = 0; half < 2; half++)
            for (int word = 0; word < 4; word++) {
                int k = chunk * 64 + (2 * half + (word >> 1)) * 16 + t * 4;
                const FileRow row = rows[g + 8 * (word & 1)];
                ((u32*)superblock)[((chunk * 2 + half) * 32 + lane) * 4 + word] =
                    quant(row, k) | (quant(row, k + 1) << 8) | (quant(row, k + 2) << 16) | (quant(row, k + 3) << 24);
            }
        const FileRow row = rows[slot >> 3];
        ((u16*)(superblock + 4096))[slot] = (slot & 7) * 32 < row.columns ? (u16)half_of(row, (slot & 7) * 34) : (u16)0;
    }
};

template <int EACH> struct FileNumbers {
    static constexpr int COLUMNS = 1, BYTES = EACH;
    DEVICE void place(u8* superblock, const FileTile& rows, int slot) {
        for (int quarter = 0; quarter < 4; quarter++) {
            int at = quarter * 128 + slot, lane = at & 31, group = at >> 5;  // 16 groups x 32 lanes
            for (int v = 0; v < 8; v++) {
                const FileRow row = rows[(lane >> 2) + 8 * (v >> 2)];
                int k = group * 16 + (lane & 3) * 4 + (v & 3);
                for (int b = 0; b < EACH; b++) superblock[(at * 8 + v) * EACH + b] = k < row.columns ? (u8)byte_of(row, k * EACH + b) : (u8)0;
            }
        }
    }
};
typedef FileNumbers<2> FileF16;
typedef FileNumbers<2> FileBF16;
typedef FileNumbers<4> FileF32;

// file: the tensor as it lies in the model file; tiles: its packed form. One block a superblock, 128 threads.
template <class FILE, int SUPERBLOCK_BYTES> DEVICE void repack(const u8* file, u8* tiles, int rows, int columns) {
    int superblocks = (columns + 255) / 256, tile = blockIdx.x / superblocks, superblock = blockIdx.x % superblocks;
    u64 row_bytes = (u64)(columns / FILE::COLUMNS) * FILE::BYTES;
    FileTile sixteen;
    sixteen.bytes = file + (u64)tile * 16 * row_bytes + (u64)superblock * (256 / FILE::COLUMNS) * FILE::BYTES;
    sixteen.row_bytes = row_bytes;
    sixteen.rows = rows - tile * 16;
    sixteen.columns = columns - superblock * 256;
    FILE::place(tiles + (u64)blockIdx.x * SUPERBLOCK_BYTES, sixteen, threadIdx.x);
}

#endif
