// Matrix times vector, one warp a row; the last block has more warps than rows are left.
extern "C" __global__ void __launch_bounds__(128) off_by_one_row(const float* matrix, const float* x, float* out, int rows, int columns) {
    int lane = threadIdx.x & 31, row = blockIdx.x * 4 + (threadIdx.x >> 5);
#ifdef FIXED
    if (row >= rows) return;
#else
    if (row > rows) return;
#endif
    float sum = 0.0f;
    for (int i = lane; i < columns; i += 32) sum += matrix[row * columns + i] * x[i];
    sum = lanes_sum(sum, 32);
    if (lane == 0) out[row] = sum;
}
