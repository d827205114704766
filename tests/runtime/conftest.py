"""What the tests of runtime/ share: the stand-in driver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from psigraph.runtime import host
from psigraph.runtime.cuda.driver import Driver
from psigraph.runtime.stream import Stream


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    host.activate(sms=4)
    with Driver(0) as opened:
        yield opened
    assert host.violations() == []


@pytest.fixture
def stream(driver: Driver) -> Iterator[Stream]:
    """A stream that leaves nothing behind, and no error for the next test."""
    before = host.live()
    made = Stream(driver)
    yield made
    made.close()
    assert host.violations() == []
    host.forget()
    assert host.live() == before
