"""How a model file asks to be sampled: its keys `general.sampling.*`, as llama.cpp names them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from ..ir.errors import UsageError
from ..runtime.gguf.cursor import quoted
from ..runtime.gguf.file import open_gguf
from .sampler import SamplerSettings

PREFIX = "general.sampling."
# Name behind the prefix -> field of SamplerSettings.
_FIELDS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
    "penalty_last_n": "penalty_window",
}
_WHOLE = ("top_k", "penalty_window")


def published_sampling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of SamplerSettings that the file gives; what cannot be taken is said and left out."""
    found: dict[str, Any] = {}
    for key, value in metadata.items():
        if not key.startswith(PREFIX):
            continue
        field = _FIELDS.get(key.removeprefix(PREFIX))
        if field is None:
            if not (isinstance(value, int | float) and value == 0):  # so samplers that are not used are written
                warnings.warn(f"{key} is not supported, and not used", UserWarning, stacklevel=2)
            continue
        try:
            found[field] = _checked(field, value)
        except UsageError as error:
            warnings.warn(f"{quoted(key)} is not used: {error}", UserWarning, stacklevel=2)
    return found


def file_sampling(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The same of a file, from its header; raises as `open_gguf`."""
    with open_gguf(path) as file:
        return published_sampling(file.metadata)


def _checked(field: str, value: Any) -> Any:
    """The value as the field takes it; UsageError where it is none. float32's digits end where the writer's did."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{quoted(str(value), 40)} is no number")
    number: Any = float(f"{value:.7g}")
    if field in _WHOLE and number.is_integer():
        number = int(number)
    if field == "top_k" and number == -1:  # llama.cpp's word for all
        number = 0
    SamplerSettings(**{field: number})
    return number
