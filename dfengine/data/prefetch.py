"""Items of a source made ready by threads, in order and no further ahead than asked."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_END = object()

PATIENCE = 0.5
"""Seconds that `Prefetch.close` waits for a thread that draws from the source."""


class Prefetch(Generic[Item, Result]):
    """`prepare(item)` for each item of `source`, made on `workers` threads (0: by `take` itself, nothing ahead).

    ahead: the most items that are drawn and not yet taken. alone: whether the next item may only be drawn when this one
    is prepared, because the source may use its memory again. within: makes the context that a thread works in.
    The source is drawn by one thread at a time, not always the same one. `take` and `close` are for one thread.
    """

    def __init__(
        self,
        source: Iterable[Item],
        prepare: Callable[[Item], Result],
        workers: int,
        ahead: int,
        alone: Callable[[Item], bool] = lambda item: True,
        within: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self._source = iter(source)
        self._prepare, self._alone, self._within = prepare, alone, within
        self._ahead = ahead
        # Garbage collection, and with it the end of an abandoned consumer, may run in a worker that holds it.
        lock = threading.RLock()
        self._room = threading.Condition(lock)  # for workers: there may be something to draw
        self._made = threading.Condition(lock)  # for `take`: what it waits for may be there
        self._results: dict[int, Result] = {}
        self._drawn = self._taken = self._wanted = 0
        self._end: float = math.inf  # the number of items before the source or an item failed, or the source ended
        self._failure: BaseException | None = None
        self._drawer: threading.Thread | None = None
        self._stopped = False
        self._threads = [threading.Thread(target=self._work, name="dfengine-prefetch", daemon=True)
                         for _ in range(workers)]  # fmt: skip
        for thread in self._threads:
            thread.start()

    def take(self, count: int) -> list[Result]:
        """The next `count` results (at most `ahead`), fewer only where the items end. Raises what the source or
        `prepare` raised, after everything before it was taken; without threads Ctrl-C at once."""
        if not self._threads:
            return self._take_here(count)
        with self._made:
            self._wanted = count
            self._made.wait_for(lambda: self._has(count))
            results = [self._results.pop(i) for i in range(self._taken, int(min(self._taken + count, self._end)))]
            self._taken += len(results)
            self._room.notify_all()
        if not results and self._failure is not None:
            raise self._failure
        return results

    def ready(self, count: int) -> bool:
        """Whether `take(count)` gives something without waiting; never without threads."""
        with self._made:
            return bool(self._threads) and self._taken < self._end and self._has(count)

    def close(self) -> None:
        """Ends the threads and drops what was not taken.

        Returns when they have ended. Only one that waits for the source is left behind after `PATIENCE`: it ends when
        the source gives its next item, or with the process.
        """
        with self._room:
            self._stopped = True
            self._room.notify_all()
        for thread in self._threads:
            if thread is threading.current_thread():
                continue
            while thread.is_alive() and thread is not self._drawer:
                thread.join(0.05)
            thread.join(PATIENCE)
        self._results.clear()

    def _has(self, count: int) -> bool:
        """Whether the next `count` results, or all that are left, are there."""
        return all(i in self._results for i in range(self._taken, int(min(self._taken + count, self._end))))

    def _take_here(self, count: int) -> list[Result]:
        results: list[Result] = []
        while len(results) < count and self._drawn < self._end:
            try:
                item = next(self._source, _END)
                if item is _END:
                    self._end = self._drawn
                    break
                results.append(self._prepare(item))
                self._drawn += 1
            except Exception as error:
                self._end, self._failure = self._drawn, error
        if not results and self._failure is not None:
            raise self._failure
        return results

    def _work(self) -> None:
        with self._within():
            while self._one():
                pass

    def _one(self) -> bool:
        """Draws and prepares one item; False where there is no more to do."""
        with self._room:
            self._room.wait_for(self._may_draw_or_ends)
            if self._stopped or self._end < math.inf:
                return False
            self._drawer = threading.current_thread()
            index = self._drawn
        try:
            item = next(self._source, _END)
            if item is _END:
                self._ends(index)
                return False
            with self._room:
                self._drawn += 1
                if not self._alone(item):
                    self._drawer = None
                    self._room.notify()
            result = self._prepare(item)
        except BaseException as error:
            self._ends(index, error)
            return False
        with self._room:
            if self._drawer is threading.current_thread():
                self._drawer = None
                self._room.notify()
            if not self._stopped:
                self._results[index] = result
            if self._has(self._wanted):
                self._made.notify()
        return True

    def _may_draw_or_ends(self) -> bool:
        free = self._drawer is None and self._drawn - self._taken < self._ahead
        return free or self._stopped or self._end < math.inf

    def _ends(self, index: int, failure: BaseException | None = None) -> None:
        with self._room:
            if index < self._end:
                self._end, self._failure = index, failure
            if self._drawer is threading.current_thread():
                self._drawer = None
            self._room.notify_all()
            self._made.notify()
