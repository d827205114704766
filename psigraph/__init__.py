"""psigraph: YAML model block -> IR -> fused CUDA kernels -> one CUDA graph replayed per token."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("psigraph")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
