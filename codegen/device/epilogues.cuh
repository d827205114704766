// What a product does with the sums of its rows.
//
// What becomes of them is a function of functions.cuh, whatever the number of rows that a product multiplies at once. An
// *epilogue* is what a product of one row (product.cuh) does around it:
//   EARLY         numbers a row that it fetches ahead, into `block.early(number)`[row]; with any, it has
//   before_wait   reads of memory that no kernel writes, and
//   after_wait    reads of what earlier kernels wrote; both by the auxiliary warp, the second while the others multiply;
//   write         by all threads in the end; row_sum(row) gives the product of one row of the block's tiles.
#ifndef PSIGRAPH_EPILOGUES_CUH
#define PSIGRAPH_EPILOGUES_CUH

#include "functions.cuh"
#include "quant.cuh"

// == Epilogues

// A value of a vector of SIZE, as float32 or into an activation block; all 32 lanes call it.
template <int SIZE> DEVICE void store_value(float* vector, int index, float value, bool inside) {
    if (inside && index < SIZE) vector[index] = value;
}
template <int SIZE> DEVICE void store_value(u8* vector, int index, float value, bool inside) {
    store_activations<ACTIVATION_COPIES, (SIZE + 255) / 256 * ACTIVATION_BLOCK>(vector, index, value, inside);
}

// Results as they are: one vector for each of COUNT matrices.
template <int COUNT> struct Store {
    static constexpr int EARLY = 0;
    float* y[COUNT];
    template <class BLOCK, class SUM> METHOD void write(const BLOCK& block, SUM&& row_sum) const {
        block.each_row([&](int row) {
            const int at = block.index(row);
            const bool inside = row < block.rows();
            const float value = inside ? row_sum(row) : 0.0f;
            BLOCK::Weights::template each<0, 0>([&](auto number, auto first, auto rows) {
                if (inside && (first.index == 0 || at >= first.index) && at < first.index + rows.index) y[number.index][at - first.index] = value;
            });
        });
    }
};

// Of pairs of tiles. OUT: u8 for an activation block.
template <class OUT> struct GateAndUp {
    static constexpr int EARLY = 0;
    Swiglu function;
    OUT* y;
    template <class BLOCK, class SUM> METHOD void write(const BLOCK& block, SUM&& row_sum) const {
        constexpr int SIZE = BLOCK::Weights::ROWS;
        block.each_row([&](int row) {
            const int unit = row >> 4, at = (blockIdx.x + unit * BLOCK::BLOCKS) * 16 + (row & 15);
            const bool inside = row < block.rows();
            float result = 0.0f;
            if (inside && at < SIZE) {
                const float gate = row_sum(unit * 32 + (row & 15)), up = row_sum(unit * 32 + 16 + (row & 15));
                result = function(gate, up);
            }
            store_value<SIZE>(y, at, result, inside);
        });
    }
};

// residual + product.
struct AddResidual {
    static constexpr int EARLY = 1;
    MatvecAdd function;
    const float* residual;
    float* sum;
    template <class BLOCK> METHOD void before_wait(const BLOCK&) const {}
    template <class BLOCK> METHOD void after_wait(const BLOCK& block) const {
#pragma unroll 1
        for (int row = block.lane; row < block.rows(); row += 32) {
            const int at = block.index(row);
            block.early(0)[row] = at < BLOCK::Weights::ROWS ? fresh(residual + at) : 0.0f;
        }
    }
    // The sum of row `row`, which is number `at` of all, stored; zero where there is none.
    template <class BLOCK, class SUM> METHOD float add(const BLOCK& block, int row, int at, bool inside, SUM&& row_sum) const {
        float result = 0.0f;
        if (inside && at < BLOCK::Weights::ROWS) {
            const float old = block.early(0)[row];
            result = function(old, row_sum(row));
        }
        if (inside && at < BLOCK::Weights::ROWS) sum[at] = result;
        return result;
    }
    template <class BLOCK, class SUM> METHOD void write(const BLOCK& block, SUM&& row_sum) const {
        block.each_row([&](int row) {
            const int at = block.unit(row) * 16 + (row & 15);
            add(block, row, at, row < block.rows(), row_sum);
        });
    }
};

// And the two halves of the norm after it: the sum times the norm's weights, and a sum of squares a tile.
template <class OUT> struct AddNorm {
    static constexpr int EARLY = 2;
    AddResidual add;
    const float* norm_weight;
    OUT* scaled;
    float* squares;
    template <class BLOCK> METHOD void before_wait(const BLOCK& block) const {
        if (block.warp == BLOCK::WARPS) {
            for (int row = block.lane; row < block.rows(); row += 32) {
                const int at = block.index(row);
                block.early(1)[row] = at < BLOCK::Weights::ROWS ? norm_weight[at] : 0.0f;
            }
        }
    }
    template <class BLOCK> METHOD void after_wait(const BLOCK& block) const { add.after_wait(block); }
    template <class BLOCK, class SUM> METHOD void write(const BLOCK& block, SUM&& row_sum) const {
        block.each_row([&](int row) {
            const int unit = block.unit(row), at = unit * 16 + (row & 15);
            const bool inside = row < block.rows();
            const float sum = add.add(block, row, at, inside, row_sum);
            const float weighted = inside ? sum * block.early(1)[row] : 0.0f;
            const float square_sum = lanes_sum(sum * sum, 16);
            if (inside && (row & 15) == 0) squares[unit] = square_sum;
            store_value<BLOCK::Weights::ROWS>(scaled, at, weighted, inside);
        });
    }
};

// A key for each warp.
template <int WARPS> DEVICE u64* keys_of_warps() {
    __shared__ u64 keys[WARPS];
    return keys;
}

struct NoLogits {
    METHOD void keep(int, float) const {}
};
struct Logits {
    float* logits;
    METHOD void keep(int index, float logit) const { logits[index] = logit; }
};

// The largest logit of the block, then of all blocks; the last block to finish moves the state on.
// LOGITS: whether they are kept. best: the largest key so far, and how many blocks have put in theirs; both are zero before and after.
template <class LOGITS> struct Choose {
    static constexpr int EARLY = 0;
    LOGITS logits;
    u64* best;
    const int* end_tokens;
    int *log, *stop, *position, *token;
    template <class BLOCK, class SUM> METHOD void write(const BLOCK& block, SUM&& row_sum) const {
        u64 key = 0;
#pragma unroll 1
        for (int row = threadIdx.x; row < block.rows(); row += BLOCK::THREADS) {
            const int at = block.index(row);
            if (at < BLOCK::Weights::ROWS) {
                const float logit = row_sum(row);
                logits.keep(at, logit);
                const u64 candidate = choice_key(logit, at);
                key = candidate > key ? candidate : key;
            }
        }
        u64* const of_warps = keys_of_warps<BLOCK::THREADS / 32>();
        for (int d = 16; d; d >>= 1) {
            const u64 other = __shfl_xor_sync(FULL_WARP, key, d);
            key = other > key ? other : key;
        }
        if (block.lane == 0) of_warps[block.warp] = key;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int w = 1; w < BLOCK::THREADS / 32; w++) key = of_warps[w] > key ? of_warps[w] : key;
            atomicMax(best, key);
            __threadfence();
            const u32 finished = atomicAdd((u32*)(best + 1), 1u);
            if (finished == BLOCK::BLOCKS - 1) {
                __threadfence();
                const int chosen = chosen_token(atomicExch(best, 0ull));
                *(u32*)(best + 1) = 0u;
                move_on(chosen, token, log, end_tokens, stop, position);
            }
        }
    }
};

#endif
