"""Who computes: on one model one text at a time is written, whichever threads ask for its pieces."""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from ..ir.errors import UsageError

T = TypeVar("T")


class Turns:
    """One thread at a time computes on a model, and a text that was begun is written before another begins.

    Nobody is cut short, and nobody waits for somebody's reader: who waits for another's text writes it, piece by piece,
    for that reader to find. So any number of threads, or of tasks in one thread, may have texts under way.

    UsageError, from all of it, for a request out of a function that the model itself calls (such as `cancelled`), and
    in a forked child, where another thread's turn would never end.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._thread: int | None = None  # that computes
        self._ending = 0  # who want to end a text or the model: before anybody's next piece
        self._begun: weakref.ref[Written[Any]] | None = None
        self._process = os.getpid()

    def check(self) -> None:
        """UsageError in another process than the model's."""
        if os.getpid() != self._process:
            raise UsageError(
                f"this model belongs to process {self._process}, from which this one was forked; load it here, "
                "or start processes by spawn"
            )

    def piece_of(self, text: Written[T]) -> T:
        """The next piece of a text, StopIteration behind the last; see `Written` for errors."""
        while True:
            mine = False  # said first, so that Ctrl-C at any place leaves the turn to others
            try:
                with self._changed:
                    self._wait(lambda: text.has_something)
                    if text.has_something:
                        return text.taken()
                    mine = True
                    begun = self._take(text)
                (begun or text).compute(mine=begun is None or begun is text)
                begun = None  # which may be dropped by its reader meanwhile
            finally:
                if mine:
                    self._leave()

    @contextmanager
    def alone(self, finish: bool = True) -> Iterator[Written[Any] | None]:
        """With the model for oneself. finish: once the text that was begun is written; else that text is given."""
        while True:
            mine = False
            try:
                with self._changed:
                    if finish:
                        self._wait()
                    else:
                        self._wait_to_end()
                    mine = True
                    begun = self._take(None)
                if begun is None or not finish:
                    yield begun
                    return
                begun.compute(mine=False)
                begun = None
            finally:
                if mine:
                    self._leave()

    def _wait(self, unless: Callable[[], bool] = lambda: False) -> None:
        """Until nobody computes."""
        self.check()
        if self._thread == threading.get_ident():
            raise UsageError("the model is asked from within its own work; ask once that is done")
        self._changed.wait_for(lambda: (self._thread is None and not self._ending) or unless())

    def _wait_to_end(self) -> None:
        """The same for who ends something: a reader that asks for piece after piece would never leave the turn."""
        self._ending += 1
        try:
            self._wait(lambda: self._thread is None)
        finally:
            self._ending -= 1
            self._changed.notify_all()

    def _take(self, asking: Written[Any] | None) -> Written[Any] | None:
        """The turn; the text that was begun and is not over, else the one that asks."""
        self._thread = threading.get_ident()
        begun = self._begun() if self._begun is not None else None
        if begun is None or begun.over:
            begun, self._begun = asking, weakref.ref(asking) if asking is not None else None
        return begun

    def _leave(self) -> None:
        with self._changed:
            self._thread = None
            self._changed.notify_all()


class Written(ABC, Iterator[T], Generic[T]):
    """A text as it is written: pieces, computed when they are asked for, or before where another request is due.

    Any thread may ask for the next piece, also each time another one. `close` it, or drop it, to end it early. An error
    is raised once, behind the pieces before it; after that the text is over.

    over    whether nothing more will be computed; pieces that nobody took yet may be left.
    pieces  computes them. Who makes it gives it a weak reference to this object, so that a text that is dropped is
            freed at once, with the steps that are queued for it.
    """

    pieces: Generator[T, None, None]

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.over = False
        self._ahead: deque[T] = deque()
        self._failed: BaseException | None = None

    def __next__(self) -> T:
        return self.turns.piece_of(self)

    def close(self) -> None:
        """End it here: nothing more is computed or given. A text that is over stays as it is."""
        with self.turns.alone(finish=False):
            self.end()

    @property
    def has_something(self) -> bool:
        """Whether the next piece, the error or the end is known."""
        return bool(self._ahead) or self.over

    def taken(self) -> T:
        """What is known first: a piece, or the error or StopIteration that follows the last."""
        if self._ahead:
            return self._ahead.popleft()
        failed, self._failed = self._failed, None
        try:
            raise failed or StopIteration
        finally:
            del failed  # its traceback holds this frame

    def compute(self, mine: bool = True) -> None:
        """One piece more, or the end; by whom has the turn. mine: whoever computes reads it, too."""
        try:
            self._ahead.append(next(self.pieces))
        except StopIteration:
            self.over = True
        except Exception as error:  # belongs to whom reads the text, not to whom waits for it
            self._failed, self.over = error, True  # in this order: a reader may look in between
        except BaseException:  # Ctrl-C: whoever computes hears it, and a text that it went through is torn
            self.end(None if mine else UsageError("it was interrupted while another request computed it; ask again"))
            raise

    def end(self, failed: Exception | None = None) -> None:
        """End it early, by whom has the turn. failed: what who reads on shall hear."""
        if not self.over:
            self._failed, self.over = failed, True
            self.pieces.close()
            self.was_ended()
        if failed is None:
            self._ahead.clear()

    @abstractmethod
    def was_ended(self) -> None:
        """Notes that it ended before it was over."""
