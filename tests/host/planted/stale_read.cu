// Doubles what the kernel before wrote, but reads it through the non-coherent path.
extern "C" __global__ void __launch_bounds__(64) stale_read(const float* x, float* out) {
    int i = blockIdx.x * 64 + threadIdx.x;
    let_next_kernel_start();
    wait_for_previous_kernel();
#ifdef FIXED
    out[i] = 2.0f * fresh(x + i);
#else
    out[i] = 2.0f * __ldg(x + i);
#endif
}
