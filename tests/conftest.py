"""No process that runs tests may hold more than MOST_MIB: two of them must leave a small machine room."""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

import pytest

# Helpers of several rooms' tests lie in tests/support and are imported by name, although tests are no package.
sys.path.insert(0, str(Path(__file__).parent / "support"))

# A job in the background ignores Ctrl-C, under nohup SIGHUP too, and so would what it starts: several tests send them.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)

MOST_MIB = 1536
PEAKS = pytest.StashKey[dict[str, int]]()  # process -> MiB at most; with -n also those of the workers


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["peak_mib"] = peak
        return
    peaks = session.config.stash.setdefault(PEAKS, {})
    peaks["this process"] = peak
    if max(peaks.values()) > MOST_MIB and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """A worker of -n ended, with what it wrote above; one that crashed wrote nothing."""
    output = getattr(node, "workeroutput", {})
    config, name = node.config, node.gateway.id  # type: ignore[attr-defined]
    config.stash.setdefault(PEAKS, {})[name] = output.get("peak_mib", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    peaks = sorted(terminalreporter.config.stash.get(PEAKS, {}).items())
    told = ", ".join(f"{name} {peak} MiB" for name, peak in peaks)
    terminalreporter.write_line(f"memory at most: {told}")
    if any(peak > MOST_MIB for _, peak in peaks):
        advice = "look for sessions, graphs or programs that are kept"
        terminalreporter.write_line(f"FAILED: more than {MOST_MIB} MiB in one process; {advice}", red=True)
