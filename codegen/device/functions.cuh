// What takes one value of each operand. The struct of an op's name (`swiglu`: Swiglu) has the op's attributes as members,
// in the order of its row in ir/ops; kernels of their own (rows.cuh) and epilogues of products call them alike.
#ifndef PSIGRAPH_FUNCTIONS_CUH
#define PSIGRAPH_FUNCTIONS_CUH

#include "base.cuh"

struct Add {
    METHOD float operator()(float a, float b) const { return a + b; }
};
struct Mul {
    METHOD float operator()(float a, float b) const { return a * b; }
};
struct Swiglu {
    METHOD float operator()(float gate, float up) const { return silu(gate) * up; }
};
// The residual and a product.
struct MatvecAdd {
    METHOD float operator()(float residual, float product) const { return residual + product; }
};
// Rounding is what stores the result.
struct Quantize {
    METHOD float operator()(float x) const { return x; }
};

#endif
