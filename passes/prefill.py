"""The schedule of a prompt: a step's block over a sequence, fused for many tokens at once.

A product over 512 tokens has enough to do that a norm beside it costs little, so norms stay kernels of their own; what
is worth fusing is what saves a trip of a chunk's activations through memory: the three products of one norm, SwiGLU,
the residual, norm with rotation and the cache. A layer becomes eight nodes; of the last one only its part for the
caches stays.
"""

from __future__ import annotations

from ..ir.graph import Graph
from ..ir.verify import verify
from .drop_unused import drop_unused
from .fuse_residual import fuse_residual
from .fuse_rope_append import fuse_rope_append
from .fuse_swiglu import fuse_swiglu
from .halve_activations import halve_activations
from .merge_qkv import merge_qkv
from .over_sequence import over_sequence

PREFILL_PIPELINE = (merge_qkv, fuse_swiglu, fuse_residual, fuse_rope_append, drop_unused, halve_activations)


def prefill_graph(step: Graph, tokens: int) -> Graph:
    """The fused graph that takes up to `tokens` tokens in, of an unfused step (`ModelSpec.graph`, `use_sampler`).

    UnsupportedModelError if an op of the step has no form over a sequence.
    """
    graph = over_sequence(step, tokens)
    verify(graph)
    for function in PREFILL_PIPELINE:
        graph, _ = function(graph)
        verify(graph)
    return graph
