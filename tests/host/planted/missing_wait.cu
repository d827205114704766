// Blocks without work leave before the wait: the order of the step stops being transitive.
extern "C" __global__ void __launch_bounds__(64) missing_wait(const float* x, float* out, int count) {
    int i = blockIdx.x * 64 + threadIdx.x;
    let_next_kernel_start();
#ifndef FIXED
    if (blockIdx.x * 64 >= count) return;
#endif
    wait_for_previous_kernel();
    if (i < count) out[i] = 2.0f * fresh(x + i);
}
