"""The GPU's driver, begun before a command's own imports."""

from __future__ import annotations

import click

from ..gpu_start import GPU_BACKENDS, GpuStart


def begin_gpu(backend: str, device: int, with_snapshot: bool = False) -> GpuStart | None:
    """A driver on its way for `open_session`, None for backends without one; given back when the command ends early.

    To be called when the options are sound. with_snapshot: ask nvidia-smi before it, for reports.
    """
    if backend not in GPU_BACKENDS:
        return None
    start = GpuStart(device, with_snapshot)
    click.get_current_context().call_on_close(start.close)
    return start
