// Every block adds into one place; without an atomic the sum depends on chance.
extern "C" __global__ void __launch_bounds__(32) block_race(const int* x, int* out) {
    int sum = lanes_sum(x[blockIdx.x * 32 + threadIdx.x], 32);
#ifdef FIXED
    if (threadIdx.x == 0) atomicAdd(out, sum);
#else
    if (threadIdx.x == 0) *out += sum;
#endif
}
