"""The stand-in driver through cuda.bindings and cuda.core: memory, launches, capture, replay, errors."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from importlib import metadata
from typing import Any

import numpy as np
import pytest

from psigraph.diagnosis import satisfies
from psigraph.ir.errors import CompileError, DeviceError
from psigraph.runtime import host

SCALE = """
extern "C" __global__ void __launch_bounds__(64) scale(const float* x, float* out, int count, float by) {
    unsigned char* const shared_memory = host::dynamic_shared<unsigned char>();
    float* values = (float*)shared_memory;
    int i = blockIdx.x * 64 + threadIdx.x;
    values[threadIdx.x] = i < count ? x[i] : 0.0f;
    __syncthreads();
    if (i < count) out[i] = by * values[threadIdx.x];
}
"""
STUCK = """
extern "C" __global__ void stuck(int* out) {
    if (threadIdx.x < 16) __syncthreads();
    out[0] = 1;
}
"""
OVERRUN = """
extern "C" __global__ void overrun(int* out, int place) { out[place] = 7; }
"""
POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class Scale:
    """The scale kernel with its buffers and stream; `x` is 1000 numbers."""

    def __init__(self, api: Any) -> None:
        self.api = api
        self.x = np.arange(1000, dtype=np.float32)
        self.image = host.compile_kernel(SCALE, "scale")
        self.module = api.cuModuleLoadData(self.image)
        self.function = api.cuModuleGetFunction(self.module, b"scale")
        self.input, self.output = api.cuMemAlloc(self.x.nbytes), api.cuMemAlloc(self.x.nbytes)
        self.stream = api.cuStreamCreate(1)
        api.cuMemcpyHtoDAsync(self.input, self.x.ctypes.data, self.x.nbytes, self.stream)

    def config(self, programmatic: bool = False) -> Any:
        driver = self.api.driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = 16, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = 64, 1, 1
        config.sharedMemBytes, config.hStream = 256, self.stream
        if programmatic:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        return config

    def launch(self, by: float, source: Any = None, programmatic: bool = False) -> None:
        values = (int(source or self.input), int(self.output), 1000, by)
        self.api.cuLaunchKernelEx(self.config(programmatic), self.function, (values, (POINTER, POINTER, INT, FLOAT)), 0)

    def result(self) -> np.ndarray:
        out = np.zeros(1000, np.float32)
        self.api.cuStreamSynchronize(self.stream)
        self.api.cuMemcpyDtoH(out.ctypes.data, self.output, out.nbytes)
        return out

    def close(self) -> None:
        self.api.driver.cuStreamDestroy(self.stream)
        self.api.driver.cuMemFree(self.input)
        self.api.driver.cuMemFree(self.output)
        self.api.driver.cuModuleUnload(self.module)


@pytest.fixture
def scale(api: Any) -> Any:
    kernel = Scale(api)
    yield kernel
    kernel.close()


def test_the_device_says_what_it_is(api: Any) -> None:
    attribute = api.driver.CUdevice_attribute
    assert bytes(api.cuDeviceGetName(64, 0)).split(b"\0")[0] == b"psigraph host target"
    assert api.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 0) == 4
    assert api.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 0) == 9
    assert api.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 0) == 232448
    assert api.cuDriverGetVersion() == 13000
    assert host.is_active()


def test_layouts_are_those_of_cuda_bindings(api: Any) -> None:
    """The structs that libcuda.cpp reads; it asserts the same sizes."""
    scale = Scale(api)
    config = scale.config(programmatic=True)
    words = (ctypes.c_uint * 7).from_address(config.getPtr())
    assert list(words) == [16, 1, 1, 64, 1, 1, 256]
    assert ctypes.c_void_p.from_address(config.getPtr() + 32).value == int(scale.stream)
    assert ctypes.c_uint.from_address(config.getPtr() + 48).value == 1
    scale.close()


def test_launch_and_copy(scale: Scale) -> None:
    scale.launch(2.5)
    assert (scale.result() == 2.5 * scale.x).all()


@pytest.mark.parametrize("order", ["reverse", "shuffle"])
def test_orders_give_the_same(scale: Scale, order: str) -> None:
    host.set_order(order)
    scale.launch(3.0)
    assert (scale.result() == 3 * scale.x).all()


def test_capture_records_and_replay_runs(api: Any, scale: Scale) -> None:
    driver = api.driver
    scale.launch(1.0)
    api.cuStreamBeginCapture(scale.stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
    assert api.cuStreamGetCaptureInfo(scale.stream)[0] == 1
    scale.launch(2.0)
    scale.launch(3.0, source=scale.output, programmatic=True)
    graph = api.cuStreamEndCapture(scale.stream)
    assert (scale.result() == scale.x).all()  # nothing has run yet
    _, count = api.cuGraphGetNodes(graph)
    nodes, _ = api.cuGraphGetNodes(graph, count)
    assert [api.cuGraphNodeGetType(node) for node in nodes] == [0, 0]
    if satisfies(metadata.version("cuda-bindings"), ">=13.3.1"):  # before, they give memory that is freed already
        assert api.cuGraphGetEdges(graph, 1)[2][0].type == 1  # a programmatic edge
    executable = api.cuGraphInstantiate(graph, 0)
    api.cuGraphDestroy(graph)
    for _ in range(2):
        api.cuGraphLaunch(executable, scale.stream)
        # A programmatic launch whose kernel has no wait is refused: see the error.
        assert api.fails("cuStreamSynchronize", scale.stream) == "CUDA_ERROR_LAUNCH_FAILED"
        assert "missing wait" in host.message()
        host.forget()
    api.cuGraphExecDestroy(executable)
    assert host.violations() == []


def test_replay_reads_memory_as_it_is_then(api: Any, scale: Scale) -> None:
    mode = api.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    out = np.zeros(1000, np.float32)
    api.cuStreamBeginCapture(scale.stream, mode)
    scale.launch(2.0)
    api.cuMemcpyDtoHAsync(out.ctypes.data, scale.output, out.nbytes, scale.stream)
    graph = api.cuStreamEndCapture(scale.stream)
    executable = api.cuGraphInstantiate(graph, 0)
    for shift in (0, 5):
        moved = scale.x + shift
        api.cuMemcpyHtoD(scale.input, moved.ctypes.data, moved.nbytes)
        api.cuGraphLaunch(executable, scale.stream)
        api.cuStreamSynchronize(scale.stream)
        assert (out == 2 * moved).all()
    api.cuGraphExecDestroy(executable)
    api.cuGraphDestroy(graph)


def test_a_graph_destroyed_in_flight_is_noted(api: Any, scale: Scale) -> None:
    api.cuStreamBeginCapture(scale.stream, api.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
    scale.launch(2.0)
    graph = api.cuStreamEndCapture(scale.stream)
    executable = api.cuGraphInstantiate(graph, 0)
    api.cuGraphDestroy(graph)
    api.cuGraphLaunch(executable, scale.stream)
    api.cuGraphExecDestroy(executable)
    assert host.violations() == ["an executable graph was destroyed before its stream was synchronized"]


def test_waiting_while_capturing_loses_the_capture(api: Any, scale: Scale) -> None:
    api.cuStreamBeginCapture(scale.stream, api.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
    assert api.fails("cuStreamSynchronize", scale.stream) == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
    assert api.fails("cuStreamEndCapture", scale.stream) == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
    scale.launch(2.0)
    assert (scale.result() == 2 * scale.x).all()


def test_events_fork_a_capture_and_tell_time(api: Any, scale: Scale) -> None:
    driver = api.driver
    start, end = api.cuEventCreate(0), api.cuEventCreate(0)
    other = api.cuStreamCreate(1)
    api.cuStreamBeginCapture(scale.stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
    api.cuEventRecord(start, scale.stream)
    api.cuStreamWaitEvent(other, start, 0)
    api.cuMemsetD32Async(scale.output, 0, 1000, other)
    assert api.fails("cuEventSynchronize", start) == "CUDA_ERROR_CAPTURED_EVENT"
    api.cuEventRecord(end, other)
    api.cuStreamWaitEvent(scale.stream, end, 0)
    graph = api.cuStreamEndCapture(scale.stream)
    assert api.cuGraphGetNodes(graph)[1] == 1
    api.cuGraphDestroy(graph)
    api.cuEventRecord(start, scale.stream)
    scale.launch(2.0)
    api.cuEventRecord(end, scale.stream)
    api.cuEventSynchronize(end)
    assert api.cuEventElapsedTime(start, end) > 0
    for event in (start, end):
        api.cuEventDestroy(event)
    api.cuStreamDestroy(other)


def test_every_call_can_be_made_to_fail_once(api: Any, scale: Scale) -> None:
    def work() -> list[str]:
        driver = api.driver
        memory = driver.cuMemAlloc(64)
        results = [memory[0], driver.cuMemsetD8(memory[1] or 0, 1, 64 if memory[1] else 0)[0]]
        results += [driver.cuMemFree(memory[1] or 0)[0], driver.cuStreamSynchronize(scale.stream)[0]]
        return [result.name for result in results]

    host.inject(0, 0)
    work()
    names = host.calls()
    assert names == ["cuMemAlloc", "cuMemsetD8", "cuMemFree", "cuStreamSynchronize"]
    for nth in range(1, len(names) + 1):
        host.inject(nth, 999)
        assert work() == ["CUDA_ERROR_UNKNOWN" if n == nth else "CUDA_SUCCESS" for n in range(1, len(names) + 1)]
        assert work() == ["CUDA_SUCCESS"] * len(names)


def test_an_error_of_the_device_stays(api: Any, scale: Scale) -> None:
    host.inject(1, 700)
    assert api.fails("cuStreamSynchronize", scale.stream) == "CUDA_ERROR_ILLEGAL_ADDRESS"
    assert api.fails("cuMemAlloc", 64) == "CUDA_ERROR_ILLEGAL_ADDRESS"


def test_out_of_memory_and_what_is_free(api: Any) -> None:
    free, total = api.cuMemGetInfo()
    assert free == total == 1 << 30
    assert api.fails("cuMemAlloc", (1 << 30) + 1) == "CUDA_ERROR_OUT_OF_MEMORY"
    memory = api.cuMemAlloc(1 << 20)
    assert api.cuMemGetInfo()[0] == (1 << 30) - (1 << 20)
    api.cuMemFree(memory)


def test_new_memory_is_not_a_number(api: Any) -> None:
    memory, out = api.cuMemAlloc(256), np.zeros(64, np.float32)
    api.cuMemcpyDtoH(out.ctypes.data, memory, 256)
    assert np.isnan(out).all()
    api.cuMemFree(memory)


def test_copies_stay_within_an_allocation(api: Any) -> None:
    memory, out = api.cuMemAlloc(64), np.zeros(128, np.uint8)
    assert api.fails("cuMemcpyDtoH", out.ctypes.data, memory, 65) == "CUDA_ERROR_INVALID_VALUE"
    assert api.fails("cuMemsetD8", memory, 0, 65) == "CUDA_ERROR_INVALID_VALUE"
    api.cuMemFree(memory)
    assert api.fails("cuMemFree", memory) == "CUDA_ERROR_INVALID_VALUE"


def test_a_kernel_that_gets_stuck_fails_and_says_why(api: Any) -> None:
    module = api.cuModuleLoadData(host.compile_kernel(STUCK, "stuck"))
    function = api.cuModuleGetFunction(module, b"stuck")
    memory = api.cuMemAlloc(4)
    api.cuLaunchKernel(function, 1, 1, 1, 64, 1, 1, 0, 0, ((int(memory),), (POINTER,)), 0)
    assert api.fails("cuCtxSynchronize") == "CUDA_ERROR_LAUNCH_FAILED"
    assert host.message().startswith("stuck: divergent barrier: block 0")
    text = api.cuGetErrorString(api.driver.CUresult.CUDA_ERROR_LAUNCH_FAILED)
    assert b"divergent barrier" in text
    host.forget()
    api.cuMemFree(memory)
    api.cuModuleUnload(module)


def test_a_write_past_the_end_is_an_illegal_address(api: Any) -> None:
    module = api.cuModuleLoadData(host.compile_kernel(OVERRUN, "overrun"))
    function = api.cuModuleGetFunction(module, b"overrun")
    memory = api.cuMemAlloc(64)
    api.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, 0, ((int(memory), 16), (POINTER, INT)), 0)
    assert api.fails("cuCtxSynchronize") == "CUDA_ERROR_ILLEGAL_ADDRESS"
    assert host.violations() == ["a kernel wrote outside an allocation of 64 bytes"]
    api.driver.cuMemFree(memory)
    host.forget()
    api.cuModuleUnload(module)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"blockDimX": 1025}, "CUDA_ERROR_INVALID_VALUE"),
        ({"gridDimX": 0}, "CUDA_ERROR_INVALID_VALUE"),
        ({"sharedMemBytes": 50000}, "CUDA_ERROR_INVALID_VALUE"),
    ],
)
def test_launches_that_no_gpu_takes(api: Any, scale: Scale, change: dict[str, int], error: str) -> None:
    config = scale.config()
    for name, value in change.items():
        setattr(config, name, value)
    values = ((int(scale.input), int(scale.output), 1000, 1.0), (POINTER, POINTER, INT, FLOAT))
    assert api.fails("cuLaunchKernelEx", config, scale.function, values, 0) == error


def test_dynamic_shared_memory_is_allowed_up_to_what_was_set(api: Any, scale: Scale) -> None:
    limit = api.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    api.cuFuncSetAttribute(scale.function, limit, 100000)
    assert api.cuFuncGetAttribute(limit, scale.function) == 100000
    assert api.fails("cuFuncSetAttribute", scale.function, limit, 232449) == "CUDA_ERROR_INVALID_VALUE"


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (b"PTX" * 100, "CUDA_ERROR_INVALID_IMAGE"),
        (b"\x7fELF\x02\x01\x01" + b"\0" * 200, "CUDA_ERROR_NO_BINARY_FOR_GPU"),
    ],
)
def test_images_that_are_not_ours(api: Any, image: bytes, error: str) -> None:
    assert api.fails("cuModuleLoadData", image) == error


def test_unknown_entry_and_unloaded_module(api: Any, scale: Scale) -> None:
    assert api.fails("cuModuleGetFunction", scale.module, b"other") == "CUDA_ERROR_NOT_FOUND"
    api.cuModuleUnload(scale.module)
    values = ((int(scale.input), int(scale.output), 1000, 1.0), (POINTER, POINTER, INT, FLOAT))
    assert api.fails("cuLaunchKernelEx", scale.config(), scale.function, values, 0) == "CUDA_ERROR_INVALID_HANDLE"


def test_live_counts_what_is_left(api: Any) -> None:
    before = host.live()
    scale = Scale(api)
    assert host.live()["device memory"] == before["device memory"] + 2
    scale.close()
    assert host.live() == before


def test_cuda_core_runs_on_it(api: Any, scale: Scale) -> None:
    core = pytest.importorskip("cuda.core")
    device = core.Device()
    device.set_current()
    assert device.name == "psigraph host target"
    stream = device.create_stream()
    kernel = core.ObjectCode.from_cubin(scale.image).get_kernel("scale")
    config = core.LaunchConfig(grid=16, block=64, shmem_size=256)
    core.launch(stream, config, kernel, int(scale.input), int(scale.output), np.int32(1000), np.float32(4.0))
    stream.sync()
    assert (scale.result() == 4 * scale.x).all()
    stream.close()


def test_compile_errors_name_the_kernel_and_the_line() -> None:
    with pytest.raises(
        CompileError, match=r"^broken: g\+\+ refuses the text: .*\.cu:2:\d+: error: .*nothing"
    ) as caught:
        host.compile_kernel('extern "C" __global__ void broken(int* out) {\n    out[0] = nothing;\n}\n', "broken")
    assert "\n" not in str(caught.value)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


def test_without_a_compiler_one_line_says_what_to_install() -> None:
    code = "from psigraph.runtime import host\ntry: host.activate()\nexcept Exception as e: print(type(e).__name__, e)"
    done = run_python(code, PSIGRAPH_CXX="no-such-compiler")
    assert done.stdout.splitlines() == [
        "DeviceError the host target needs the C++ compiler no-such-compiler, which was not found: apt-get install g++"
    ]


def test_figures_and_failures_come_from_the_environment() -> None:
    code = (
        "from psigraph.runtime import host\nhost.activate()\nfrom cuda.bindings import driver as d\nd.cuInit(0)\n"
        "a = d.CUdevice_attribute\nprint(d.cuDeviceGetAttribute(a.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 0)[1],"
        " d.cuDeviceTotalMem(0)[1], d.cuDeviceGetCount()[0].name, d.cuDeviceGetCount()[0].name)"
    )
    done = run_python(code, PSIGRAPH_HOST_SMS="132", PSIGRAPH_HOST_MEMORY="1000000", PSIGRAPH_HOST_FAIL="4:100")
    assert done.stdout.split() == ["132", "1000000", "CUDA_ERROR_NO_DEVICE", "CUDA_SUCCESS"]


def test_the_bindings_come_second() -> None:
    """Tests ask for what only an active stand-in can answer; elsewhere that is one line."""
    done = run_python(
        "from psigraph.runtime import host\ntry: host.inject(1, 2)\nexcept Exception as e: print(type(e).__name__)"
    )
    assert done.stdout.strip() == DeviceError.__name__
