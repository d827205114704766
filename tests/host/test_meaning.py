"""What CUDA C means on the CPU: shuffles, votes, barriers, atomics, numbers, memory. One kernel a subject."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from psigraph.codegen.device import device_headers
from psigraph.runtime.host.check import HostCheckError, KernelCall, compare_orders, run_build

Text = Callable[[str], str]
LANES = np.arange(32)


def run(
    text: Text, body: str, args: list, block: int = 32, grid: int = 1, shared: int = 0, **rest: object
) -> dict[int, np.ndarray]:
    """Run `extern "C" __global__ void subject(...)` in the three orders."""
    return compare_orders(
        KernelCall(text(body), "subject", grid, block, shared, args, **rest, headers=device_headers())
    )


def test_shuffles_follow_cuda_also_in_narrow_segments(kernel_text: Text) -> None:
    body = """
    extern "C" __global__ void subject(const int* x, int* out) {
        int lane = threadIdx.x, v = x[lane];
        out[lane] = __shfl_sync(FULL_WARP, v, lane + 3);
        out[32 + lane] = __shfl_xor_sync(FULL_WARP, v, 5);
        out[64 + lane] = __shfl_down_sync(FULL_WARP, v, 3, 8);
        out[96 + lane] = __shfl_up_sync(FULL_WARP, v, 3, 8);
        out[128 + lane] = __shfl_sync(FULL_WARP, v, 2, 8);
    }
    """
    x = np.arange(100, 132, dtype=np.int32)
    out = run(kernel_text, body, [x, np.zeros(160, np.int32)])[1].reshape(5, 32)
    in_eight = LANES % 8
    assert (out[0] == x[(LANES + 3) % 32]).all()
    assert (out[1] == x[LANES ^ 5]).all()
    assert (out[2] == np.where(in_eight + 3 < 8, x[(LANES + 3) % 32], x)).all()
    assert (out[3] == np.where(in_eight >= 3, x[LANES - 3], x)).all()
    assert (out[4] == x[LANES // 8 * 8 + 2]).all()


def test_votes_and_half_warps(kernel_text: Text) -> None:
    body = """
    extern "C" __global__ void subject(u32* out, double* wide) {
        int lane = threadIdx.x;
        out[lane] = __ballot_sync(FULL_WARP, lane % 3 == 0);
        out[32 + lane] = __any_sync(FULL_WARP, lane == 7) * 2 + __all_sync(FULL_WARP, lane < 32);
        u32 mine = lane < 16 ? 0x0000ffffu : 0xffff0000u;
        if (lane < 16) out[64 + lane] = __shfl_xor_sync(mine, lane, 1);
        else out[64 + lane] = __shfl_xor_sync(mine, 1000 + lane, 2);
        wide[lane] = __shfl_sync(FULL_WARP, lane + 0.5, 31 - lane);
    }
    """
    found = run(kernel_text, body, [np.zeros(96, np.uint32), np.zeros(32)])
    out = found[0].reshape(3, 32)
    assert (out[0] == sum(1 << lane for lane in range(0, 32, 3))).all()
    assert (out[1] == 3).all()
    assert (out[2] == np.where(LANES < 16, LANES ^ 1, 1000 + (LANES ^ 2))).all()
    assert (found[1] == 31 - LANES + 0.5).all()


def test_dot_chunk_is_four_tensor_core_products(kernel_text: Text) -> None:
    body = """
    extern "C" __global__ void subject(const u32* w, const u32* x, int* out) {
        int lane = threadIdx.x & 31;
        int sums[4] = {1, 2, 3, 4};
        u32 weights[8];
        for (int j = 0; j < 8; j++) weights[j] = w[lane * 8 + j];
        dot_chunk(sums, weights, x[lane], lane);
        for (int j = 0; j < 4; j++) out[threadIdx.x * 4 + j] = sums[j];
    }
    """
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (16, 4, 16)).astype(np.uint8)  # row, group, column of the group
    vector = rng.integers(-128, 128, (4, 2, 16)).astype(np.int8)  # group, digit, column of the group
    rows[0], vector[:, 0] = 255, -128
    words = np.zeros((32, 8, 4), np.uint8)
    for lane in range(32):
        for j in range(8):
            words[lane, j] = rows[lane // 4 + 8 * (j % 2), j // 2, lane % 4 * 4 :][:4]
    digits = np.stack([vector[lane // 8, lane // 4 % 2, lane % 4 * 4 :][:4] for lane in range(32)])
    out = run(kernel_text, body, [words, digits, np.zeros((2, 32, 4), np.int32)], block=64, writes=(2,))[2]
    exact = np.einsum("rgc,gdc->rgd", rows.astype(int), vector.astype(int))
    for lane in range(32):
        g, t = lane // 4, lane % 4
        expected = [1 + exact[g, t, 0], 2 + exact[g, t, 1], 3 + exact[g + 8, t, 0], 4 + exact[g + 8, t, 1]]
        assert (out[:, lane] == expected).all()


def test_halves_are_exact_both_ways(kernel_text: Text) -> None:
    body = """
    extern "C" __global__ void subject(const u16* bits, float* floats, const float* x, u16* halves, int count) {
        for (int i = threadIdx.x; i < count; i += 32) {
            floats[i] = half_to_float(bits[i]);
            halves[i] = float_to_half(x[i]);
        }
    }
    """
    bits = np.arange(65536, dtype=np.uint16)
    rng = np.random.default_rng(1)
    x = np.concatenate(
        [
            rng.integers(0, 2**32, 60000, dtype=np.uint64).astype(np.uint32).view(np.float32),
            np.array([0.0, -0.0, 1e-8, 2**-25, 2**-24, 65519.0, 65520.0, np.inf, -np.inf, 1.00048828125], np.float32),
            np.geomspace(1e-9, 1e5, 5526).astype(np.float32),
        ]
    )
    found = run(
        kernel_text, body, [bits, np.zeros(65536, np.float32), x, np.zeros(65536, np.uint16), 65536], writes=(1, 3)
    )
    wide = bits.view(np.float16).astype(np.float32)
    numbers = ~np.isnan(wide)
    assert (found[1].view(np.uint32)[numbers] == wide.view(np.uint32)[numbers]).all()
    assert np.isnan(found[1][~numbers]).all()
    with np.errstate(over="ignore"):
        narrow = x.astype(np.float16)
    numbers = ~np.isnan(x)
    assert (found[3][numbers] == narrow.view(np.uint16)[numbers]).all()
    assert np.isnan(found[3].view(np.float16)[~numbers]).all()


def test_rounding_to_integers_is_to_nearest_even_and_saturates(kernel_text: Text) -> None:
    body = """
    extern "C" __global__ void subject(const float* x, int* out) { out[threadIdx.x] = round_to_int(x[threadIdx.x]); }
    """
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 1e20, -1e20, np.nan, 3.49], np.float32)
    out = run(kernel_text, body, [x, np.zeros(10, np.int32)], block=10)[1]
    assert out.tolist() == [0, 2, 2, 0, -2, 126, 2**31 - 1, -(2**31), 0, 3]


def test_atomics_and_block_indices(kernel_text: Text) -> None:
    body = """
    extern "C" __global__ void subject(u64* best, int* count, u32* ticket, u32* last) {
        u32 at = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        u32 thread = threadIdx.y * blockDim.x + threadIdx.x;
        int index = (int)(at * blockDim.x * blockDim.y + thread);
        atomicMax(best, choice_key((float)((at * 37 + thread * 11) % 97), index));
        atomicAdd(count, 1);
        __syncthreads();
        if (thread == 0) {
            __threadfence();
            u32 blocks = gridDim.x * gridDim.y * gridDim.z;
            if (atomicAdd(ticket, 1u) == blocks - 1) *last = (u32)choice_index(atomicExch(best, 5ull));
        }
    }
    """
    call = KernelCall(
        kernel_text(body),
        "subject",
        (3, 2, 2),
        (8, 4, 1),
        0,
        [np.zeros(1, np.uint64), *(np.zeros(1, np.int32) for _ in range(3))],
        headers=device_headers(),
    )
    found = compare_orders(call)
    block, thread = np.divmod(np.arange(12 * 32), 32)
    assert found[3][0] == np.argmax((block * 37 + thread * 11) % 97)
    assert (found[0][0], found[1][0], found[2][0]) == (5, 384, 12)


def test_named_barriers_and_blocks_that_run_together(kernel_text: Text) -> None:
    body = """
    extern "C" __global__ void subject(int* out) {
        DYNAMIC_SHARED(shared_memory);
        __shared__ int mine[64];
        int* moving = (int*)shared_memory;
        moving[threadIdx.x] = mine[threadIdx.x] = blockIdx.x * 64 + threadIdx.x;
        host::cluster_barrier();
        u32 next = (host::cluster_rank() + 1) % host::cluster_size();
        int other = host::map_shared(moving, next)[threadIdx.x];
        host::cluster_barrier();
        if (threadIdx.x >= 32) {  // the second warp gives, the first takes
            mine[threadIdx.x - 32] = other;
            host::named_barrier(3, 64, false);
        } else {
            host::named_barrier(3, 64);
            out[blockIdx.x * 32 + threadIdx.x] = mine[threadIdx.x];
        }
    }
    """
    call = KernelCall(
        kernel_text(body), "subject", 8, 64, 256, [np.zeros((8, 32), np.int32)], together=4, headers=device_headers()
    )
    out = compare_orders(call)[0]
    for block in range(8):
        neighbour = block // 4 * 4 + (block + 1) % 4
        assert (out[block] == neighbour * 64 + 32 + LANES).all()


def test_a_lane_outside_its_own_mask_is_reported(kernel_text: Text) -> None:
    body = """
    extern "C" __global__ void subject(int* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, (int)threadIdx.x, 0); }
    """
    with pytest.raises(HostCheckError, match="leaves it out") as caught:
        run_build(
            KernelCall(kernel_text(body), "subject", 1, 32, 0, [np.zeros(32, np.int32)], headers=device_headers()),
            "fast",
        )
    assert caught.value.kind == "partial warp"


def test_barriers_on_different_lines_do_not_meet(kernel_text: Text) -> None:
    body = """
    extern "C" __global__ void subject(int* out) {
        if (threadIdx.x < 32)
            __syncthreads();
        else
            __syncthreads();
        out[threadIdx.x] = 1;
    }
    """
    with pytest.raises(HostCheckError, match="while others wait in line") as caught:
        run_build(
            KernelCall(kernel_text(body), "subject", 1, 64, 0, [np.zeros(64, np.int32)], headers=device_headers()),
            "fast",
        )
    assert caught.value.kind == "divergent barrier"


def test_processors_without_a_switch_of_our_own_give_the_same(kernel_text: Text) -> None:
    body = """
    extern "C" __global__ void subject(const int* x, int* out) {
        __shared__ int turned[64];
        turned[63 - threadIdx.x] = lanes_sum(x[threadIdx.x], 8);
        __syncthreads();
        out[threadIdx.x] = turned[threadIdx.x];
    }
    """
    call = KernelCall(
        kernel_text(body),
        "subject",
        1,
        64,
        0,
        [np.arange(64, dtype=np.int32), np.zeros(64, np.int32)],
        headers=device_headers(),
    )
    expected = np.repeat(np.arange(64).reshape(8, 8).sum(1), 8)[::-1]
    for defines in ((), ("PSIGRAPH_HOST_UCONTEXT",)):
        assert (run_build(call, "fast", "shuffle", defines=defines)[1] == expected).all()
