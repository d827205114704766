"""Many kernels in one image: most of what g++ does, and more so with a sanitizer, it does for what they share."""

from __future__ import annotations

import re
from collections.abc import Sequence

from psigraph.ir.program import Kernel

MOST_ARGUMENTS = 24
ENTRY = "many"

# Calls one of several kernels. Host only: a GPU's kernels are loaded one by one.
_DISPATCH = """
template <class... A, size_t... I> static void call(void (*kernel)(A...), const u64* args, std::index_sequence<I...>) {{
    kernel((A)args[I]...);
}}
template <class... A> static void call(void (*kernel)(A...), const u64* args) {{
    call(kernel, args, std::index_sequence_for<A...>());
}}
extern "C" __global__ void {entry}(int which, {parameters}) {{
    const u64 args[] = {{{names}}};
    switch (which) {{
{cases}
    }}
}}
"""


def one_image(kernels: Sequence[Kernel]) -> str:
    """The kernels' texts and the kernel `many`, whose first argument says which of them runs, with MOST_ARGUMENTS words
    behind it."""
    numbers = range(MOST_ARGUMENTS)
    dispatch = _DISPATCH.format(
        entry=ENTRY,
        parameters=", ".join(f"u64 a{i}" for i in numbers),
        names=", ".join(f"a{i}" for i in numbers),
        cases="\n".join(f"        case {i}: return call(&{k.name}, args);" for i, k in enumerate(kernels)),
    )
    return "\n".join([*(kernel.text for kernel in kernels), dispatch])


def renamed(text: str, old: str, new: str) -> str:
    """A kernel's text under another name."""
    found, count = re.subn(rf'(extern "C" __global__ void \w+\([\d, ]+\)) {old}\(', rf"\1 {new}(", text)
    assert count == 1, old
    return found
