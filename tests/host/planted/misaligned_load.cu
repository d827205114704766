// Reads four numbers at once from a place that is no multiple of 16 bytes.
extern "C" __global__ void __launch_bounds__(32) misaligned_load(const float* x, float* out) {
#ifdef FIXED
    float4 four = *(const float4*)(x + 4 * threadIdx.x);
#else
    float4 four = *(const float4*)(x + 4 * threadIdx.x + 1);
#endif
    out[threadIdx.x] = four.x + four.y + four.z + four.w;
}
