// Reads what the kernel before writes, then waits for it.
extern "C" __global__ void __launch_bounds__(64) early_read(const float* x, float* out) {
    int i = blockIdx.x * 64 + threadIdx.x;
    let_next_kernel_start();
#ifdef FIXED
    wait_for_previous_kernel();
    float value = fresh(x + i);
#else
    float value = fresh(x + i);
    wait_for_previous_kernel();
#endif
    out[i] = 2.0f * value;
}
