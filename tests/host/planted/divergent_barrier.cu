// Turns 64 numbers round; threads beyond the end leave before the barrier.
extern "C" __global__ void __launch_bounds__(64) divergent_barrier(const float* x, float* out, int count) {
    __shared__ float values[64];
    int i = threadIdx.x;
#ifndef FIXED
    if (i >= count) return;
#endif
    if (i < count) values[i] = x[i];
    __syncthreads();
    if (i < count) out[i] = values[count - 1 - i];
}
