// The step's matrix-vector products, y = epilogue(w @ x): every op whose result is a product and something after it.
//
// A matrix is cut into units: a tile of 16 rows, or a tile of gate and the same tile of up. Unit u belongs to block
// u mod BUSY_BLOCKS. In a block COLUMN_WARPS warps share the columns of a tile, a slice of whole superblocks each, and
// TILE_WARPS such teams take turns with the block's tiles. All kernels have the same four stages (`product`):
//   1. ring      weights, which depend on no other kernel, are asked for as soon as the kernel is resident;
//   2. wait      for the kernel before, then the activations;
//   3. tiles     each warp multiplies its superblocks of each tile, and sums go to shared memory, while an auxiliary warp
//                fetches what the epilogue needs, and a producer warp fills the ring again;
//   4. epilogue  one thread a row adds the slices up and does what comes after (epilogues.cuh).
#ifndef PSIGRAPH_PRODUCT_CUH
#define PSIGRAPH_PRODUCT_CUH

#include "epilogues.cuh"
#include "quant.cuh"
#include "ring.cuh"

// == The weights of one product.

template <class TYPE_, int ROWS_> struct Matrix {
    typedef TYPE_ Type;
    static constexpr int ROWS = ROWS_, TILES = (ROWS + 15) / 16;
    const u8* tiles;
};

template <class A, class B> constexpr bool SAME_TYPE = false;
template <class A> constexpr bool SAME_TYPE<A, A> = true;

// Matrices one below the other, each from a tile of its own on: a unit is a tile of one of them.
template <class FIRST, class... REST> struct Stacked;
template <class FIRST> struct Stacked<FIRST> {
    typedef typename FIRST::Type Type;
    static constexpr int ROWS = FIRST::ROWS, UNITS = FIRST::TILES, TILES_PER_UNIT = 1, WIDEST = Type::BYTES;
    static constexpr bool ONE_TYPE = true, MINIMA = Type::MINIMA;
    FIRST first;
    template <int BEFORE, class BODY> METHOD void of_unit(int unit, BODY&& body) const { body(first, unit - BEFORE); }
    template <int BEFORE, class X> METHOD static void dot(int, const u8* stage, int column_warp, const X& x, int lane, float& low, float& high) {
        Type::dot(stage + column_warp * Type::BYTES, x, lane, low, high);
    }
    template <int NUMBER, int BEFORE, class BODY> METHOD static void each(BODY&& body) { body(Index<NUMBER>(), Index<BEFORE * 16>(), Index<ROWS>()); }
    template <int BLOCKS, class BODY> METHOD void of_tile(int tile, BODY&& body) const { of_unit<0>(blockIdx.x + tile * BLOCKS, body); }
};
template <class FIRST, class SECOND, class... REST> struct Stacked<FIRST, SECOND, REST...> {
    typedef Stacked<SECOND, REST...> Rest;
    typedef typename FIRST::Type Type;
    static constexpr int UNITS = FIRST::TILES + Rest::UNITS, TILES_PER_UNIT = 1, WIDEST = Type::BYTES > Rest::WIDEST ? Type::BYTES : Rest::WIDEST;
    static constexpr bool SAME_AS_NEXT = SAME_TYPE<Type, typename Rest::Type>, ONE_TYPE = SAME_AS_NEXT && Rest::ONE_TYPE, MINIMA = Type::MINIMA || Rest::MINIMA;
    FIRST first;
    Rest rest;
    // body(matrix, its tile), of a unit. BEFORE: units of the matrices before these.
    template <int BEFORE, class BODY> METHOD void of_unit(int unit, BODY&& body) const {
        if (unit < BEFORE + FIRST::TILES) body(first, unit - BEFORE);
        else rest.template of_unit<BEFORE + FIRST::TILES>(unit, body);
    }
    // Adds a superblock's product to `low` and `high`: one call for neighbours of one type.
    template <int BEFORE, class X> METHOD static void dot(int unit, const u8* stage, int column_warp, const X& x, int lane, float& low, float& high) {
        if constexpr (SAME_AS_NEXT) Rest::template dot<BEFORE + FIRST::TILES>(unit, stage, column_warp, x, lane, low, high);
        else if (unit < BEFORE + FIRST::TILES) Type::dot(stage + column_warp * Type::BYTES, x, lane, low, high);
        else Rest::template dot<BEFORE + FIRST::TILES>(unit, stage, column_warp, x, lane, low, high);
    }
    // body(number of a matrix, its first row among all, its rows), as `Index`.
    template <int NUMBER, int BEFORE, class BODY> METHOD static void each(BODY&& body) {
        body(Index<NUMBER>(), Index<BEFORE * 16>(), Index<FIRST::ROWS>());
        Rest::template each<NUMBER + 1, BEFORE + FIRST::TILES>(body);
    }
    // The same for a tile of the block.
    template <int BLOCKS, class BODY> METHOD void of_tile(int tile, BODY&& body) const { of_unit<0>(blockIdx.x + tile * BLOCKS, body); }
};

// Two matrices of one shape, side by side: a unit is a tile of the first and the same tile of the second.
template <class FIRST, class SECOND> struct Paired {
    typedef typename FIRST::Type Type;
    typedef typename SECOND::Type SecondType;
    static_assert(FIRST::ROWS == SECOND::ROWS, "a pair's matrices have one shape");
    static constexpr int ROWS = FIRST::ROWS, UNITS = FIRST::TILES, TILES_PER_UNIT = 2;
    static constexpr bool ONE_TYPE = SAME_TYPE<Type, SecondType>;
    static constexpr int WIDEST = Type::BYTES > SecondType::BYTES ? Type::BYTES : SecondType::BYTES;
    static constexpr bool MINIMA = Type::MINIMA || SecondType::MINIMA;
    FIRST first;
    SECOND second;
    template <int BLOCKS, class BODY> METHOD void of_tile(int tile, BODY&& body) const {
        int unit = blockIdx.x + (tile >> 1) * BLOCKS;
        if ((tile & 1) == 0) body(first, unit);
        else body(second, unit);
    }
};

template <class... MATRICES> DEVICE Stacked<MATRICES...> stacked(MATRICES... matrices) { return {matrices...}; }
template <class FIRST, class SECOND> DEVICE Paired<FIRST, SECOND> paired(FIRST first, SECOND second) { return {first, second}; }

// == What a thread knows of its block. SHAPE has the numbers that the compiler chose (codegen/tiling.py), and as named
// facts, true or false, what follows from them: whatever code depends on is there for tests to see
// (tests/codegen/test_coverage.py).
//   COLUMNS            of the matrices.
//   BLOCKS             of the launch; BUSY_BLOCKS of them have rows, UNITS_PER_BLOCK units at most.
//   THREADS            of a block.
//   DEPTH              stages of a team's ring.
//   SHARED_BYTES       of dynamic shared memory that is in use.
//   LOADS_AHEAD        weights come by bulk copies (sm_90 and later); else each warp fetches its own.
//   IDLE               some blocks have no rows: they only hold their place on a multiprocessor.
//   REFILLED           a ring that loads ahead does not hold all that its team multiplies.
//   EVEN, EVEN_TEAMS   every block has the same number of units, every team the same number of tiles.
//   ONE_PASS           there is a thread for each row of the block's results.
//   EVEN_SLICES        every warp has the same number of superblocks.
//   MINIMA             some weights have minima.
//   TWO_HELD           a warp's slice of integer activations is two superblocks, which stay in registers;
//   MORE_THAN_HELD     or more: two are there, the next one on its way.

// Where things lie in the block's dynamic shared memory, bytes: the teams' rings, barriers of the rings, partial sums
// [column warp][row], what the epilogue fetches early [number][row], activations as float32.
template <class SHAPE, class WEIGHTS, int EARLY_NUMBERS> struct SharedLayout {
    static constexpr int RINGS = SHAPE::COLUMN_WARPS * SHAPE::TILE_WARPS * SHAPE::DEPTH * WEIGHTS::WIDEST;
    static constexpr int ROWS = SHAPE::UNITS_PER_BLOCK * WEIGHTS::TILES_PER_UNIT * 16;
    static constexpr int BARRIERS = (RINGS + 127) / 128 * 128;
    static constexpr int PARTIAL = BARRIERS + SHAPE::TILE_WARPS * SHAPE::DEPTH * 16;
    static constexpr int EARLY = PARTIAL + SHAPE::COLUMN_WARPS * ROWS * 4;
    static constexpr int ACTIVATIONS = EARLY + EARLY_NUMBERS * ROWS * 4;
    static constexpr int END = ACTIVATIONS + (SAME_TYPE<typename WEIGHTS::Type::Activations, ActivationBlock> ? 0 : (SHAPE::COLUMNS + 255) / 256 * 256 * 4);
};

template <class SHAPE, class WEIGHTS_, int EARLY_NUMBERS> struct ProductBlock {
    typedef WEIGHTS_ Weights;
    typedef SharedLayout<SHAPE, Weights, EARLY_NUMBERS> Layout;
    static constexpr int COLUMNS = SHAPE::COLUMNS, BLOCKS = SHAPE::BUSY_BLOCKS, THREADS = SHAPE::THREADS;
    static constexpr int COLUMN_WARPS = SHAPE::COLUMN_WARPS, TILE_WARPS = SHAPE::TILE_WARPS, DEPTH = SHAPE::DEPTH;
    static constexpr int WARPS = COLUMN_WARPS * TILE_WARPS;  // that multiply; the next one is auxiliary, the one after it produces
    static constexpr int SUPERBLOCKS = (COLUMNS + 255) / 256;                         // of a row
    static constexpr int STEPS = (SUPERBLOCKS + COLUMN_WARPS - 1) / COLUMN_WARPS;     // stages of a tile
    static constexpr int STAGE = COLUMN_WARPS * Weights::WIDEST;                      // bytes: a superblock for each warp of a team
    static constexpr int IN_FLIGHT = 32 * 1024;                                       // bytes of a block under way before the wait, about: enough to keep the memory busy
    static constexpr int AHEAD = (IN_FLIGHT + TILE_WARPS * STAGE - 1) / (TILE_WARPS * STAGE);  // the same in stages of every team
    static constexpr int UNITS = Weights::UNITS, TILES_PER_UNIT = Weights::TILES_PER_UNIT;
    static constexpr int RESULTS = SHAPE::UNITS_PER_BLOCK * 16, TILES = SHAPE::UNITS_PER_BLOCK * TILES_PER_UNIT, ROWS = Layout::ROWS;  // of a block, at most
    static constexpr bool LOADS_AHEAD = SHAPE::LOADS_AHEAD, IDLE = SHAPE::IDLE, REFILLED = SHAPE::REFILLED;
    static constexpr bool EVEN = SHAPE::EVEN, EVEN_TEAMS = SHAPE::EVEN_TEAMS, ONE_PASS = SHAPE::ONE_PASS;
    static constexpr bool INTEGER = SAME_TYPE<typename Weights::Type::Activations, ActivationBlock>;
    static constexpr bool EVEN_SLICES = SHAPE::EVEN_SLICES, MINIMA = SHAPE::MINIMA, TWO_HELD = SHAPE::TWO_HELD, MORE_THAN_HELD = SHAPE::MORE_THAN_HELD;
    static_assert(Layout::END == SHAPE::SHARED_BYTES, "the launch gives as much shared memory as there is in use");
    static_assert(THREADS >= 32 * (WARPS + (LOADS_AHEAD ? 2 : 1)), "helpers come beside the warps that multiply");
    static_assert(IDLE == (SHAPE::BLOCKS > BLOCKS), "IDLE");
    static_assert(EVEN == (UNITS == BLOCKS * SHAPE::UNITS_PER_BLOCK), "EVEN");
    static_assert(EVEN_TEAMS == (EVEN && TILES % TILE_WARPS == 0), "EVEN_TEAMS");
    static_assert(EVEN_SLICES == (SUPERBLOCKS % COLUMN_WARPS == 0), "EVEN_SLICES");
    static_assert(MINIMA == Weights::MINIMA, "MINIMA");
    static_assert(TWO_HELD == (INTEGER && STEPS == 2) && MORE_THAN_HELD == (INTEGER && STEPS > 2), "TWO_HELD, MORE_THAN_HELD");
    static_assert(REFILLED == (LOADS_AHEAD && (TILES + TILE_WARPS - 1) / TILE_WARPS * STEPS > DEPTH), "REFILLED");
    static_assert(ONE_PASS == ((RESULTS + 31) / 32 * 32 <= THREADS), "ONE_PASS");

    u8* shared_memory;
    int lane, warp, tiles;
    METHOD float* early(int number) const { return (float*)(shared_memory + Layout::EARLY) + number * ROWS; }
    // Rows of the block's results; of one of them its unit, and its index among all results.
    METHOD int rows() const { return tiles * (16 / TILES_PER_UNIT); }
    METHOD static int unit(int row) { return blockIdx.x + (row >> 4) * BLOCKS; }
    METHOD static int index(int row) { return (blockIdx.x + (row >> 4) * BLOCKS) * 16 + (row & 15); }

    // body(row) for every row of the results, and a few more, by whole warps, so that lanes may exchange values.
    template <class BODY> METHOD void each_row(BODY&& body) const {
        if constexpr (ONE_PASS) {
            if (threadIdx.x < (RESULTS + 31) / 32 * 32) body((int)threadIdx.x);
        } else {
#pragma unroll 1
            for (int row = threadIdx.x; row < (RESULTS + THREADS - 1) / THREADS * THREADS; row += THREADS) body(row);
        }
    }
};

// == The factor of an RMS norm before the product, which the sums are multiplied with: 1 / sqrt(mean of squares + eps).

struct NoFactor {
    METHOD void find(int) const {}
    METHOD float get() const { return 1.0f; }
};

DEVICE float& shared_factor() {
    __shared__ float factor;
    return factor;
}
// From partial sums of squares of SIZE values.
template <int PARTS, int SIZE> struct NormFactor {
    const float* square_sums;
    float eps;
    METHOD void find(int lane) const {  // by the auxiliary warp
        float factor = factor_from_parts<(PARTS + 31) / 32>(square_sums, PARTS, 1.0f / SIZE, eps, lane);
        if (lane == 0) shared_factor() = factor;
    }
    METHOD float get() const { return shared_factor(); }
};

// weights: `stacked` or `paired`; x: an activation block (integer weights) or float32[COLUMNS]; factor: `NormFactor` or
// `NoFactor`; epilogue: see epilogues.cuh.
template <class SHAPE, class WEIGHTS, class X, class FACTOR, class EPILOGUE>
DEVICE void product(const WEIGHTS& weights, const X* x, const FACTOR& factor, const EPILOGUE& epilogue, const Stamps& stamps) {
    typedef ProductBlock<SHAPE, WEIGHTS, EPILOGUE::EARLY> B;
    typedef Ring<B::DEPTH, B::COLUMN_WARPS> TeamRing;
    typedef typename WEIGHTS::Type Type;
    typedef typename Type::Activations Activations;
    constexpr bool INTEGER = B::INTEGER;
    DYNAMIC_SHARED(shared_memory);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int column_warp = warp % B::COLUMN_WARPS, tile_warp = warp / B::COLUMN_WARPS;
    u64* const barriers = (u64*)(shared_memory + B::Layout::BARRIERS);  // of the ring of each team
    float* partial = (float*)(shared_memory + B::Layout::PARTIAL);
    float* values = (float*)(shared_memory + B::Layout::ACTIVATIONS);
    // The units of a block are BLOCKS apart.
    const int block_tiles = B::EVEN ? B::TILES : ((B::UNITS - 1 - (int)blockIdx.x) / B::BLOCKS + 1) * B::TILES_PER_UNIT;
    auto tiles_of = [&](int team) {
        if constexpr (B::EVEN_TEAMS) return B::TILES / B::TILE_WARPS;
        else return block_tiles > team ? (block_tiles - 1 - team) / B::TILE_WARPS + 1 : 0;
    };

    // 1. Ring: weights depend on no other kernel.
    let_next_kernel_start();
    // Stage number n of this lane's team, by bulk copies.
    auto fill = [&](int n, int stage, int phase) {
        const int tile = n / B::STEPS * B::TILE_WARPS + lane, from = n % B::STEPS * B::COLUMN_WARPS;
        const int many = B::SUPERBLOCKS - from < B::COLUMN_WARPS ? B::SUPERBLOCKS - from : B::COLUMN_WARPS;
        u64* const my_barriers = barriers + lane * 2 * B::DEPTH;
        u8* target = shared_memory + (lane * B::DEPTH + stage) * B::STAGE;
        const u8* source;
        int bytes;
        weights.template of_tile<B::BLOCKS>(tile, [&](auto matrix, int unit) {
            constexpr int BYTES = decltype(matrix)::Type::BYTES;
            source = matrix.tiles + ((u64)unit * B::SUPERBLOCKS + from) * BYTES;
            bytes = many * BYTES;
        });
        if constexpr (B::REFILLED)
            if (n >= B::DEPTH) TeamRing::wait_until_read(my_barriers, stage, phase, target, B::STAGE);
        if constexpr (B::LOADS_AHEAD) TeamRing::fill(my_barriers, stage, target, source, bytes, many);
    };
    // Stage number n of this warp's team, as much of it as this warp multiplies, by its own copies.
    auto fetch = [&](int n) {
        u8* target = shared_memory + (tile_warp * B::DEPTH + n % B::DEPTH) * B::STAGE;
        const u8* source = weights.first.tiles;
        int bytes = 0;
        const int tile = n / B::STEPS * B::TILE_WARPS + tile_warp, from = n % B::STEPS * B::COLUMN_WARPS + column_warp;
        if (n < tiles_of(tile_warp) * B::STEPS && from < B::SUPERBLOCKS)
            weights.template of_tile<B::BLOCKS>(tile, [&](auto matrix, int unit) {
                constexpr int BYTES = decltype(matrix)::Type::BYTES;
                source = matrix.tiles + ((u64)unit * B::SUPERBLOCKS + from) * BYTES;
                bytes = BYTES;
            });
        if constexpr (!B::LOADS_AHEAD) TeamRing::fetch(target + column_warp * bytes, source, bytes, lane);
    };
    int stages = 0;  // that this lane fills
    if constexpr (B::LOADS_AHEAD) {
        if (warp < B::WARPS && lane == 0)
            for (int stage = column_warp; stage < B::DEPTH; stage += B::COLUMN_WARPS) TeamRing::open(barriers + tile_warp * 2 * B::DEPTH, stage);
        __syncthreads();
        const bool fills = warp == B::WARPS + 1 && lane < B::TILE_WARPS && (!B::IDLE || blockIdx.x < B::BLOCKS);
        stages = fills ? tiles_of(lane) * B::STEPS : 0;
#pragma unroll 1
        for (int n = 0; n < B::DEPTH && n < stages; n++) {
            if (n >= B::AHEAD) TeamRing::pace(barriers + lane * 2 * B::DEPTH, n - B::AHEAD);
            fill(n, n, 0);
        }
        __syncthreads();  // a warp that waits for the kernel before would hold up the one that paces
    } else if (warp < B::WARPS) {
#pragma unroll 1
        for (int n = 0; n < B::DEPTH; n++) fetch(n);
    }
    if constexpr (EPILOGUE::EARLY > 0) epilogue.before_wait(B{shared_memory, lane, warp, block_tiles});
    const uint4* my_words;
    const float4* my_factors;
    if constexpr (INTEGER) {
        const u8* const my_x = x + blockIdx.x % ACTIVATION_COPIES * (B::SUPERBLOCKS * ACTIVATION_BLOCK);
        my_words = ready(first_words(my_x, column_warp, lane));
        my_factors = ready(first_factors(my_x, column_warp, lane));
    }

    // 2. Wait: the activations depend on the kernel before.
    wait_for_previous_kernel(stamps);
    if constexpr (B::IDLE)
        if (blockIdx.x >= B::BLOCKS) return;
    if constexpr (!INTEGER) {
        constexpr int READERS = 32 * (B::WARPS + 1);  // not the producer warp: it may wait for the others
        for (int i = threadIdx.x; i < B::SUPERBLOCKS * 256; i += READERS)
            if (warp <= B::WARPS) values[i] = i < B::COLUMNS ? fresh(x + i) : 0.0f;
        if (warp <= B::WARPS) first_threads_barrier(READERS);
    }

    // 3. Tiles: rows g and g + 8 of each, this warp's columns.
    if (warp == B::WARPS) {
        factor.find(lane);
        if constexpr (EPILOGUE::EARLY > 0) epilogue.after_wait(B{shared_memory, lane, warp, block_tiles});
    } else if (!B::LOADS_AHEAD || warp < B::WARPS) {
        Activations slice[INTEGER && B::STEPS > 1 ? 2 : 1];
        if constexpr (INTEGER) {
            slice[0].load(my_words, my_factors);
            if constexpr (B::STEPS > 1) {
                const int second = (B::EVEN_SLICES ? B::COLUMN_WARPS : B::COLUMN_WARPS + column_warp < B::SUPERBLOCKS ? B::COLUMN_WARPS : 0) * ACTIVATION_STRIDE;
                slice[1].load(my_words + second, my_factors + second);
            }
            if constexpr (B::MINIMA && !B::MORE_THAN_HELD) for_each<B::STEPS>([&](auto s) { slice[s.index].find_minimum_bias(lane); });
        }
        const int tiles = tiles_of(tile_warp);
        u64* const my_barriers = barriers + tile_warp * 2 * B::DEPTH;
        const int steps = B::EVEN_SLICES ? B::STEPS : (B::SUPERBLOCKS - 1 - column_warp) / B::COLUMN_WARPS + 1;
        int coming = steps > 1 ? 1 : 0;  // the superblock that slice[1] holds
        int n = 0, stage = 0, phase = 0;  // stages so far, and where the next one lies in the ring
#pragma unroll 1
        for (int i = 0; i < tiles; i++) {
            const int tile = i * B::TILE_WARPS + tile_warp;
            float low = 0.0f, high = 0.0f;
#pragma unroll 1
            for (int s = 0; s < B::STEPS; s++, n++) {
                const u8* at = shared_memory + (tile_warp * B::DEPTH + stage) * B::STAGE;
                if constexpr (B::LOADS_AHEAD) TeamRing::wait(my_barriers, stage, phase);
                else TeamRing::wait_for_copies();
                if (B::EVEN_SLICES || s * B::COLUMN_WARPS + column_warp < B::SUPERBLOCKS) {
                    if constexpr (!INTEGER) slice[0].values = values + (s * B::COLUMN_WARPS + column_warp) * 256;
                    else if constexpr (B::MINIMA && B::MORE_THAN_HELD) slice[0].find_minimum_bias(lane);
                    if constexpr (WEIGHTS::ONE_TYPE) Type::dot(at + column_warp * Type::BYTES, slice[0], lane, low, high);
                    else if constexpr (B::TILES_PER_UNIT == 1) WEIGHTS::template dot<0>(blockIdx.x + tile * B::BLOCKS, at, column_warp, slice[0], lane, low, high);
                    else if ((tile & 1) == 0) Type::dot(at + column_warp * Type::BYTES, slice[0], lane, low, high);
                    else WEIGHTS::SecondType::dot(at + column_warp * WEIGHTS::SecondType::BYTES, slice[0], lane, low, high);
                    if constexpr (B::TWO_HELD) {
                        const Activations used = slice[0];
                        slice[0] = slice[1];
                        slice[1] = used;
                    }
                    if constexpr (B::MORE_THAN_HELD) {
                        slice[0] = slice[1];
                        coming = coming + 1 < steps ? coming + 1 : 0;
                        const int from = coming * B::COLUMN_WARPS * ACTIVATION_STRIDE;
                        // What nobody will use would hold up the warp's end.
                        if (n + 2 < tiles * B::STEPS) slice[1].load(my_words + from, my_factors + from);
                    }
                }
                if constexpr (!B::LOADS_AHEAD) {
                    __syncwarp();
                    fetch(n + B::DEPTH);
                } else if constexpr (B::REFILLED) {
                    TeamRing::give_back(my_barriers, stage, lane);
                }
                if (++stage == B::DEPTH) stage = 0, phase ^= 1;
            }
            low = lanes_sum(low, 4);
            high = lanes_sum(high, 4);
            if ((lane & 3) == 0) {
                partial[column_warp * B::ROWS + tile * 16 + (lane >> 2)] = low;
                partial[column_warp * B::ROWS + tile * 16 + 8 + (lane >> 2)] = high;
            }
        }
    } else if constexpr (B::REFILLED) {
#pragma unroll 1
        for (int n = B::DEPTH, stage = 0, phase = 0; n < stages; n++) {
            fill(n, stage, phase);
            if (++stage == B::DEPTH) stage = 0, phase ^= 1;
        }
    }
    __syncthreads();

    // 4. Epilogue: one thread a row.
    const float scale = factor.get();
    epilogue.write(B{shared_memory, lane, warp, block_tiles}, [&](int row) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < B::COLUMN_WARPS; w++) sum += partial[w * B::ROWS + row];
        return sum * scale;
    });
}

#endif
