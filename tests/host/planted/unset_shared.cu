// Adds up 64 places of shared memory, of which it has set `count`.
extern "C" __global__ void __launch_bounds__(64) unset_shared(const float* x, float* out, int count) {
    DYNAMIC_SHARED(shared_memory);
    __shared__ float fixed[64];
    float* moving = (float*)shared_memory;
    int i = threadIdx.x;
#ifdef FIXED
    fixed[i] = moving[i] = i < count ? x[i] : 0.0f;
#else
    if (i < count) fixed[i] = moving[i] = x[i];
#endif
    __syncthreads();
    if (i < 2) {
        float sum = 0.0f;
        for (int j = 0; j < 64; j++) sum += i ? fixed[j] : moving[j];
        out[i] = sum;
    }
}
