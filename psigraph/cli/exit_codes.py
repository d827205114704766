"""The exit codes, as `psigraph --help` documents them.

Codes 1 to 10 stand beside the exceptions in ir/errors.py; a test holds the two together.
"""

from __future__ import annotations

MISSING_PACKAGE = 11
DEFECT = 70  # EX_SOFTWARE of sysexits.h
SYSTEM = 74  # EX_IOERR of sysexits.h
HUNG_UP = 129  # 128 + SIGHUP
INTERRUPTED = 130  # 128 + SIGINT
CLOSED_PIPE = 141  # 128 + SIGPIPE
TERMINATED = 143  # 128 + SIGTERM

EXIT_CODES = {
    0: "done",
    1: "failed for a reason that has no code of its own",
    2: "options or arguments that cannot work as given",
    3: "the model file or compiled folder is absent, truncated, hostile or inconsistent",
    4: "the model file is sound, but psigraph has no spec or kernels for it",
    5: "a policy forbids this artifact or this request",
    6: "a model spec (YAML) or IR text is wrong",
    7: "no usable GPU or driver, or a driver call failed",
    8: "not enough memory",
    9: "a kernel did not compile",
    10: "a result cannot be written",
    MISSING_PACKAGE: "a Python package that the command needs is missing",
    DEFECT: "a defect of psigraph: PSIGRAPH_DEBUG=1 shows the traceback",
    SYSTEM: "the operating system refused to read or write",
    HUNG_UP: "stopped since its terminal went away (SIGHUP)",
    INTERRUPTED: "stopped by Ctrl-C",
    CLOSED_PIPE: "the reader of the output went away",
    TERMINATED: "stopped by SIGTERM",
}

# \b tells click to leave the line breaks of the paragraph that follows alone.
EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
EPILOG += "\n\n\b\nExample:\n  psigraph doctor"
