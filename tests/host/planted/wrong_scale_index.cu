// Matrix times vector with bytes and one scale for each 32 of them; the last block of a row takes the scale before it.
extern "C" __global__ void __launch_bounds__(128) wrong_scale_index(const s8* quants, const u16* scales, const float* x, float* out, int rows,
                                                                    int columns) {
    int lane = threadIdx.x & 31, row = blockIdx.x * 4 + (threadIdx.x >> 5), blocks = columns / 32;
    if (row >= rows) return;
    float sum = 0.0f;
    for (int block = 0; block < blocks; block++) {
#ifdef FIXED
        int at = row * blocks + block;
#else
        int at = row * blocks + min(block, blocks - 2);
#endif
        sum += half_to_float(scales[at]) * ((float)quants[(row * blocks + block) * 32 + lane] * x[block * 32 + lane]);
    }
    sum = lanes_sum(sum, 32);
    if (lane == 0) out[row] = sum;
}
