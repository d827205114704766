"""What commands say that measure kernels, where there is no GPU to run them on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..ir.errors import DeviceError


@contextmanager
def kernels_only() -> Iterator[None]:
    """Lets a missing GPU's message advise the host target alone: the backend cpu runs no kernels."""
    from ..runtime.cuda.driver import OTHER_BACKENDS

    try:
        yield
    except DeviceError as error:
        message = str(error)
        if OTHER_BACKENDS not in message:
            raise
        raise DeviceError(message.replace(OTHER_BACKENDS, "use --backend host to try the command out")) from None
