// Sums over a ragged end: lanes beyond it do not come to the full-mask shuffle.
extern "C" __global__ void __launch_bounds__(32) partial_warp(const float* x, float* out, int count) {
#ifdef FIXED
    float sum = lanes_sum(threadIdx.x < count ? x[threadIdx.x] : 0.0f, 32);
    if (threadIdx.x == 0) out[0] = sum;
#else
    if (threadIdx.x < count) {
        float sum = lanes_sum(x[threadIdx.x], 32);
        if (threadIdx.x == 0) out[0] = sum;
    }
#endif
}
