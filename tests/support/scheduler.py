"""Virtual time: processes that take turns at their side effects, in an order that the seed decides.

A process (one run of a function, an execution, a caller, a prediction at Replicate) is a greenlet: a plain call that
can be left in its middle. It is left at `sleep` and `wait` only, which every side effect goes through; nothing else
runs until then. So any interleaving of side effects is possible, also A1 B1 A2 B2, which calls that are merely nested
cannot show; and the same seed gives the same order each time. There are no threads, and nobody waits: time is the next
entry's.
"""

import heapq
from collections.abc import Callable
from typing import Any

import greenlet

BEGIN = 1_750_000_000.0
"""When every schedule begins, in seconds since 1970."""


class Died(BaseException):
    """A function's process ends here, as at its timeout or with its host: no `except` of ours sees it."""


class Process:
    """Something that goes on by itself.

    Attributes:
        name: For the trace.
        result: What it returned, once it is over.
        error: What it ended with, `Died` included.
        over: Whether it is over.
        killed: Whether it must not go on: its next step raises `Died`.
        event: What a function was invoked with.
        ended_at: When it was over.
        unanswered: Its calls without an answer that wrote or read one item: operation and key (`pk`).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.result: Any = None
        self.error: BaseException | None = None
        self.over = False
        self.killed = False
        self.event: Any = None
        self.ended_at: float | None = None
        self.unanswered: set[tuple[str, str]] = set()
        self.waiters: list[Waiter] = []


class Waiter:
    """Somebody who waits for something: the first one of a value or the end of his patience lets him go on."""

    __slots__ = ("done", "greenlet", "value")

    def __init__(self) -> None:
        self.done = False
        self.greenlet: Any = None
        self.value: Any = None


class Scheduler:
    """The queue of who goes on when."""

    def __init__(self) -> None:
        self.now = BEGIN
        self.current: Process | None = None
        self._queue: list[tuple[float, int, Callable[[], None], Waiter | None]] = []
        self._entries = 0
        self._failed: BaseException | None = None
        self._hub = greenlet.getcurrent()

    def at(self, moment: float, act: Callable[[], None], waiter: Waiter | None = None) -> None:
        """Has something done at that moment, where that `waiter` still waits; it must not sleep."""
        self._entries += 1
        heapq.heappush(self._queue, (max(moment, self.now), self._entries, act, waiter))

    def spawn(self, name: str, call: Callable[[], Any], delay: float = 0.0, *, may_fail: bool = False) -> Process:
        """Starts a process; one that may not fail, and does, ends the whole schedule with its error."""
        process = Process(name)

        def run() -> None:
            try:
                process.result = call()
            except (Exception, Died) as error:  # noqa: BLE001  # who waits for it is told
                process.error = error
                if not may_fail:
                    self._failed = error
            process.over, process.ended_at = True, self.now
            for waiter in process.waiters:
                self.wake(waiter, None)

        started = greenlet.greenlet(run, self._hub)
        self.at(self.now + delay, lambda: self._go_on(started, process))
        return process

    def _go_on(self, process_greenlet: Any, process: Process | None) -> None:
        self.current = process
        process_greenlet.switch()
        self.current = None

    def sleep(self, seconds: float) -> None:
        """Lets that much time pass, and others run.

        Raises:
            Died: The process was killed meanwhile.
        """
        process, here = self.current, greenlet.getcurrent()
        assert process is not None
        self.at(self.now + seconds, lambda: self._go_on(here, process))
        self._hub.switch()
        if process.killed:
            raise Died

    def wait(self, waiter: Waiter, seconds: float) -> bool:
        """Waits until `wake`, at most that long; whether it was woken."""
        process, here = self.current, greenlet.getcurrent()
        assert process is not None
        waiter.greenlet = (here, process)
        woken = waiter.done
        if not woken:

            def give_up() -> None:
                if not waiter.done:
                    waiter.done = True
                    waiter.greenlet = None
                    self._go_on(here, process)

            self.at(self.now + seconds, give_up, waiter)
            self._hub.switch()
            woken = waiter.greenlet is not None
        if process.killed:
            raise Died
        return woken

    def wake(self, waiter: Waiter, value: Any) -> bool:
        """Lets who waits go on; whether he still waited."""
        if waiter.done:
            return False
        waiter.done = True
        waiter.value = value
        if waiter.greenlet is not None:
            here, process = waiter.greenlet
            self.at(self.now, lambda: self._go_on(here, process))
        return True

    def join(self, process: Process, seconds: float) -> bool:
        """Waits for the end of a process, at most that long; whether it is over."""
        if process.over:
            return True
        waiter = Waiter()
        process.waiters.append(waiter)
        return self.wait(waiter, seconds)

    def run(self, until: float) -> bool:
        """Runs until nothing is left to do, at most until that moment; whether nothing is left.

        Raises:
            BaseException: Of a process that may not fail.
        """
        while self._queue:
            moment, _, act, waiter = heapq.heappop(self._queue)
            if waiter is not None and waiter.done:
                continue
            if moment > until:
                return False
            self.now = moment
            act()
            if self._failed is not None:
                raise self._failed
        return True

    @property
    def next_at(self) -> float | None:
        """When somebody goes on next; None where nobody does."""
        while self._queue and self._queue[0][3] is not None and self._queue[0][3].done:
            heapq.heappop(self._queue)
        return self._queue[0][0] if self._queue else None

    def stop(self) -> None:
        """Forgets what is left."""
        self._queue.clear()
