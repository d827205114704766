"""Which psigraph this is."""

from __future__ import annotations


def package_version() -> str:
    """The version that was installed, as `0.1.0`; `0+unknown` of a source tree that never was."""
    # Takes long to import, and a command on its way to the first token does not ask.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("psigraph")
    except PackageNotFoundError:
        return "0+unknown"
