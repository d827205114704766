// The same, within bounds: every row's product lands where it belongs but for one, which repeats its neighbour.
extern "C" __global__ void __launch_bounds__(128) shifted_row(const float* matrix, const float* x, float* out, int rows, int columns) {
    int lane = threadIdx.x & 31, row = blockIdx.x * 4 + (threadIdx.x >> 5);
    if (row >= rows) return;
#ifdef FIXED
    int from = row;
#else
    int from = min(row, rows - 2);
#endif
    float sum = 0.0f;
    for (int i = lane; i < columns; i += 32) sum += matrix[from * columns + i] * x[i];
    sum = lanes_sum(sum, 32);
    if (lane == 0) out[row] = sum;
}
