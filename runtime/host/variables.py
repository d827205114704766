"""The environment variables of the host target, judged before its driver, in C++, takes them as they come."""

from __future__ import annotations

import os
import re

from ...ir.errors import UsageError

ORDERS = ("forward", "reverse", "shuffle")

# Name -> what it must look like, and that in words. An empty variable counts as none, but for the build.
_RULES = {
    "PSIGRAPH_HOST_SMS": (r"[1-9]\d{0,2}", "a number of multiprocessors, 1 to 999"),
    "PSIGRAPH_HOST_MEMORY": (r"[1-9]\d{0,14}", "a number of bytes"),
    "PSIGRAPH_HOST_THREADS": (r"[1-9]\d{0,2}", "a number of threads, 1 to 999 (16 are used at most)"),
    "PSIGRAPH_HOST_CAPABILITY": (r"80|86|87|89|90|100|103|120", "80, 86, 87, 89, 90, 100, 103 or 120"),
    "PSIGRAPH_HOST_ORDER": ("|".join(ORDERS), ", ".join(ORDERS[:-1]) + f" or {ORDERS[-1]}"),
    "PSIGRAPH_HOST_BUILD": ("fast|step", "fast or step"),
    "PSIGRAPH_HOST_FAIL": (r"[1-9]\d{0,8}:[1-9]\d{0,3}", "NTH:CODE, such as 7:2: the seventh call fails with 2"),
}


def check_variables() -> None:
    """UsageError that names a PSIGRAPH_HOST_ variable with a value that means nothing, and what it may be."""
    for name, (pattern, words) in _RULES.items():
        value = os.environ.get(name)
        if value == "" and name != "PSIGRAPH_HOST_BUILD":
            continue
        if value is not None and not re.fullmatch(pattern, value, re.ASCII):
            raise UsageError(f"{name}={value[:40]}: give {words}")
