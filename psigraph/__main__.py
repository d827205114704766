"""Entry of the console script `psigraph` and of `python -m psigraph`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and leaves with its exit code."""
    # Imported here, so that Ctrl-C during the imports is answered like any other, and so is a missing click.
    try:
        from psigraph.cli import run
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        print(f"psigraph: the Python package {error.name!r} is missing; install psigraph with pip", file=sys.stderr)
        sys.exit(11)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
