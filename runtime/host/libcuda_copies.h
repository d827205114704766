// The stand-in driver. Copies.
#ifndef PSIGRAPH_LIBCUDA_COPIES_H
#define PSIGRAPH_LIBCUDA_COPIES_H
#include "libcuda_streams.h"

enum Side { DEVICE_SIDE, HOST_SIDE, ANY_SIDE };
static bool side_holds(Side side, const void* at, size_t bytes) { return side != DEVICE_SIDE || !bytes || holder((CUdeviceptr)at, bytes); }
static CUresult copy(void* to, Side to_side, const void* from, Side from_side, size_t bytes, Stream* stream) {
    if (!side_holds(to_side, to, bytes) || !side_holds(from_side, from, bytes) || (bytes && (!to || !from))) return INVALID_VALUE;
    Work work;
    work.kind = Work::COPY;
    work.to = to;
    work.from = from;
    work.bytes = bytes;
    return submit(stream, std::move(work));
}
static CUresult copy_now(void* to, Side to_side, const void* from, Side from_side, size_t bytes) {
    if (breaks_any_capture()) return 906;  // a call that waits for the default stream, while another captures
    CUresult result = copy(to, to_side, from, from_side, bytes, nullptr);
    return result ? result : check_guards();
}
static CUresult cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t bytes) {
    GATE();
    return copy_now((void*)to, DEVICE_SIDE, from, HOST_SIDE, bytes);
}
static CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) {
    GATE();
    return copy_now(to, HOST_SIDE, (void*)from, DEVICE_SIDE, bytes);
}
static CUresult cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    GATE();
    return copy_now((void*)to, DEVICE_SIDE, (void*)from, DEVICE_SIDE, bytes);
}
static CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    GATE();
    return copy_now((void*)to, ANY_SIDE, (void*)from, ANY_SIDE, bytes);
}
static CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, Stream* stream) {
    GATE();
    return copy((void*)to, DEVICE_SIDE, from, HOST_SIDE, bytes, stream);
}
static CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, Stream* stream) {
    GATE();
    return copy(to, HOST_SIDE, (void*)from, DEVICE_SIDE, bytes, stream);
}
static CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, Stream* stream) {
    GATE();
    return copy((void*)to, DEVICE_SIDE, (void*)from, DEVICE_SIDE, bytes, stream);
}
static CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, Stream* stream) {
    GATE();
    return copy((void*)to, ANY_SIDE, (void*)from, ANY_SIDE, bytes, stream);
}
static CUresult fill(CUdeviceptr to, unsigned value, unsigned width, size_t count, Stream* stream) {
    if (to % width || (count && !holder(to, width * count))) return INVALID_VALUE;
    Work work;
    work.kind = Work::FILL;
    work.to = (void*)to;
    work.bytes = count;
    work.width = width;
    work.value = value;
    return submit(stream, std::move(work));
}
static CUresult cuMemsetD8(CUdeviceptr to, unsigned char value, size_t count) {
    GATE();
    return fill(to, value, 1, count, nullptr);
}
static CUresult cuMemsetD16(CUdeviceptr to, unsigned short value, size_t count) {
    GATE();
    return fill(to, value, 2, count, nullptr);
}
static CUresult cuMemsetD32(CUdeviceptr to, unsigned value, size_t count) {
    GATE();
    return fill(to, value, 4, count, nullptr);
}
static CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, Stream* stream) {
    GATE();
    return fill(to, value, 1, count, stream);
}
static CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, Stream* stream) {
    GATE();
    return fill(to, value, 2, count, stream);
}
static CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, Stream* stream) {
    GATE();
    return fill(to, value, 4, count, stream);
}

#endif
