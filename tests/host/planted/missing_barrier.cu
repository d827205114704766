// Sum of 256 numbers: the parts of eight warps meet in shared memory.
extern "C" __global__ void __launch_bounds__(256) missing_barrier(const float* x, float* out) {
    __shared__ float parts[8];
    int lane = threadIdx.x & 31;
    float sum = lanes_sum(x[blockIdx.x * 256 + threadIdx.x], 32);
    if (lane == 0) parts[threadIdx.x >> 5] = sum;
#ifdef FIXED
    __syncthreads();
#endif
    if (threadIdx.x < 32) {
        sum = lanes_sum(lane < 8 ? parts[lane] : 0.0f, 8);
        if (lane == 0) out[blockIdx.x] = sum;
    }
}
