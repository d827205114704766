"""Entry of the console script `psigraph` and of `python -m psigraph`."""

from __future__ import annotations

import os
import sys

from psigraph import ending


def main() -> None:
    """Runs the command line and leaves with its exit code."""
    _occupy_closed_streams()
    ending.listen()
    try:
        code = _run()
    finally:
        ending.leave_if_asked()  # whatever a signal's exception became on its way here
    sys.exit(code)


def _run() -> int:
    try:
        from psigraph.cli import run
    except ModuleNotFoundError as error:
        print(f"psigraph: the Python package {error.name!r} is missing; install psigraph with pip", file=sys.stderr)
        return 11
    return run(sys.argv[1:])


def _occupy_closed_streams() -> None:
    """Where stdin, stdout or stderr was closed (`>&-`), no file that is opened later may take its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


if __name__ == "__main__":
    main()
