"""Which emitter makes the kernels of an op for a regime: the tables of the files in `emit/`, together."""

from __future__ import annotations

from .emission import Emitters
from .emit import attention, many_rows_attention, many_rows_product, product, rows, sampling

EMITTERS: Emitters = {
    **rows.EMITTERS,
    **sampling.EMITTERS,
    **product.EMITTERS,
    **attention.EMITTERS,
    **many_rows_product.EMITTERS,
    **many_rows_attention.EMITTERS,
}
