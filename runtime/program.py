"""A Program on the device: modules, memory, and its steps, captured once and replayed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

from ..ir.errors import DeviceError, UsageError
from ..ir.program import Launch, LibraryProduct, Program, Step
from .cuda.compiler import CompiledKernel
from .library import Library
from .memory import Memory
from .stream import Stream


class LoadedProgram:
    """Runs the steps of a Program on a stream, over one memory. graph: replay captured CUDA graphs."""

    def __init__(self, stream: Stream, graph: bool) -> None:
        self.stream, self.memory = stream, Memory(stream)
        self.program: Program | None = None
        self.compiled: dict[str, CompiledKernel] = {}
        self.library: Library | None = None
        self._graph = graph
        self._modules: dict[str, tuple[Any, Any, bytes]] = {}  # kernel -> module, function, image
        self._captured: dict[str, tuple[Any, Any]] = {}  # step -> graph, executable

    def load(self, program: Program, compiled: Mapping[str, CompiledKernel], what: str) -> None:
        """Place and load what is not there yet, and forget what no step needs; steps are captured by `capture`.

        what: for whom the memory is, if it is short. Whatever fails, what was there before stays as it was.
        """
        arena = None
        before = dict(self._modules)
        try:
            arena = self.memory.place(program.buffers, what)
            self._load_modules(program, compiled)
        except BaseException:
            for name in self._modules.keys() - before.keys():
                self.stream.driver.give_back("cuModuleUnload", self._modules[name][0])
            self._modules = before
            if arena is not None:
                self.memory.give_back(arena)
            raise
        for name in before:
            if name not in compiled or before[name] is not self._modules[name]:
                self.stream.driver.give_back("cuModuleUnload", before[name][0])  # all that was asked for is there
                if name not in compiled:
                    del self._modules[name]
        self.program, self.compiled = program, dict(compiled)

    def _load_modules(self, program: Program, compiled: Mapping[str, CompiledKernel]) -> None:
        needs: dict[str, tuple[int, int]] = {}
        for launch in (launch for step in program.steps for launch in step.kernels):
            shared, cluster = needs.get(launch.kernel, (0, 1))  # one kernel may be launched with more than elsewhere
            needs[launch.kernel] = (max(shared, launch.shared_bytes), max(cluster, launch.cluster))
        for name, kernel in compiled.items():
            if name in self._modules and self._modules[name][2] == kernel.image and not self._grown(program, name):
                continue
            loaded = self.stream.driver.load_kernel(kernel.image, name, *needs.get(name, (0, 1)))
            self._modules[name] = (*loaded, kernel.image)

    def _grown(self, program: Program, name: str) -> bool:
        """Whether a kernel is launched with another amount of shared memory than before."""

        def most(program: Program) -> int:
            launches = (launch for step in program.steps for launch in step.kernels if launch.kernel == name)
            return max((launch.shared_bytes for launch in launches), default=0)

        return self.program is not None and most(program) != most(self.program)

    def capture(self, name: str) -> None:
        """Capture a step anew, where graphs are replayed."""
        self.forget(name)
        if self._graph:
            step = self._step(name)
            self._captured[name] = captured(self.stream, lambda: self.launch_all(step))

    def forget(self, name: str) -> None:
        """Let a captured step go."""
        if name in self._captured:
            graph, executable = self._captured.pop(name)
            self.stream.driver.call("cuGraphExecDestroy", executable)
            self.stream.driver.call("cuGraphDestroy", graph)

    def function(self, name: str) -> Any:
        """A loaded kernel."""
        return self._modules[name][1]

    @property
    def functions(self) -> dict[str, Any]:
        return {name: function for name, (_, function, _) in self._modules.items()}

    def _step(self, name: str) -> Step:
        assert self.program is not None
        return self.program.step(name)

    def run(self, name: str) -> None:
        """Queue a step."""
        if name in self._captured:
            self.stream.call("cuGraphLaunch", self._captured[name][1], self.stream.handle)
        else:
            self.launch_all(self._step(name))

    def launch_all(self, step: Step) -> None:
        """Queue a step's launches, one after the other."""
        for launch in step.launches:
            self.launch(launch)

    def launch(self, launch: Launch | LibraryProduct) -> None:
        """Queue one launch."""
        self.stream.check()
        try:
            if isinstance(launch, LibraryProduct):
                self._multiply(launch)
            else:
                self._launch(launch)
        except DeviceError as error:  # out of memory too: half a step is no state to go on from
            self.stream.give_up(error)
            raise

    def _launch(self, launch: Launch) -> None:
        args = [
            (self.memory.address(arg), ctypes.c_void_p) if isinstance(arg, str) else (arg, ctypes.c_int)
            for arg in launch.args
        ]
        self.stream.driver.launch(
            self.function(launch.kernel),
            launch.grid,
            launch.block,
            launch.shared_bytes,
            self.stream.handle,
            args,
            launch.programmatic,
            launch.cluster,
        )

    def _multiply(self, launch: LibraryProduct) -> None:
        if self.library is None:
            raise UsageError("the program needs a library for its products")
        w, x, c, y = (self.memory.address(name) for name in (launch.w, launch.x, launch.c, launch.y))
        sizes = (launch.rows, launch.tokens, launch.columns)
        self.library.product(w, x, c, y, *sizes, launch.add, launch.up, self.stream.handle)

    def close(self) -> None:
        """Free everything; nothing may be running. A failure while freeing is not reported."""
        give_back = self.stream.driver.give_back
        for graph, executable in self._captured.values():
            give_back("cuGraphExecDestroy", executable)
            give_back("cuGraphDestroy", graph)
        self.memory.close()
        for module, _, _ in self._modules.values():
            give_back("cuModuleUnload", module)
        self.close_library()
        self._captured, self._modules = {}, {}

    def close_library(self) -> None:
        """Give the library back, if there is one; no step that needs it may be run."""
        if self.library is not None:
            self.library.close()
            self.library = None


def captured(stream: Stream, launch_all: Callable[[], None]) -> tuple[Any, Any]:
    """What the function queues on the stream as a graph, and that graph ready for replay."""
    driver = stream.driver
    mode = driver.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    driver.call("cuStreamBeginCapture", stream.handle, mode)
    try:
        launch_all()
    except BaseException:
        _, unfinished = driver.api.cuStreamEndCapture(stream.handle)
        if unfinished:
            driver.give_back("cuGraphDestroy", unfinished)
        raise
    graph = driver.call("cuStreamEndCapture", stream.handle)
    try:
        return graph, driver.call("cuGraphInstantiate", graph, 0)
    except BaseException:
        driver.give_back("cuGraphDestroy", graph)
        raise
