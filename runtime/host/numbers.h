// Numbers: the conversions of the device, to the bit.
#ifndef PSIGRAPH_HOST_NUMBERS_H
#define PSIGRAPH_HOST_NUMBERS_H
#include "language.h"

namespace host {

template <class TO, class FROM> static inline TO bit_cast(FROM from) {
    static_assert(sizeof(TO) == sizeof(FROM), "bits of the same size");
    TO to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline float half_to_float(uint16_t bits) { return (float)bit_cast<_Float16>(bits); }
static inline uint16_t float_to_half(float value) { return bit_cast<uint16_t>((_Float16)value); }
static inline float exp2(float x) { return ::exp2f(x); }
static inline float rsqrt(float x) { return 1.0f / ::sqrtf(x); }
// cvt.rni.s32.f32: to nearest even; out of range saturates, NaN gives 0.
static inline int round_to_int(float value) {
    if (!(value == value)) return 0;
    if (value >= 2147483648.0f) return 2147483647;
    if (value < -2147483648.0f) return -2147483647 - 1;
    return (int)::rintf(value);
}

}  // namespace host

#endif
