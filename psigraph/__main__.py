"""Entry of the console script `psigraph` and of `python -m psigraph`."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Runs the command line and leaves with its exit code."""
    # An import that an exception cuts short may swallow it or print a page: until there is a command that can answer
    # Ctrl-C, the process just ends. A job that was started with SIGINT ignored, in the background, goes on ignoring it.
    answered = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if answered:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    _occupy_closed_streams()
    try:
        from psigraph.cli import run
    except ModuleNotFoundError as error:
        print(f"psigraph: the Python package {error.name!r} is missing; install psigraph with pip", file=sys.stderr)
        sys.exit(11)
    try:
        if answered:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _occupy_closed_streams() -> None:
    """Where stdin, stdout or stderr was closed (`>&-`), no file that is opened later may take its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


if __name__ == "__main__":
    main()
