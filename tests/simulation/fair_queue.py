"""SQS's fair queues with long backlogs: which message comes next, as AWS describes it, and quickly.

A message group is a tenant, and so is each message without a group. Messages of quiet tenants come first, the oldest
first. A tenant is noisy while more than a tenth of the messages in flight, and at least 30, are its own, or more than a
tenth of the consumers' recent time was spent on its messages; of noisy tenants that one comes first of which fewest
messages are in flight. It is quiet again when its backlog is empty or nothing of it was in flight for five minutes.
How long AWS takes to notice is not documented: here, `DETECTION_SECONDS`.

https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-fair-queues-detailed.html
"""

import heapq
import math
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

from tests.simulation.queues import Message, Queue, Settings

if TYPE_CHECKING:
    from tests.simulation.world import World

DETECTION_SECONDS = 30.0
RECENT_SECONDS = 60.0
"""About how far back the consumers' time counts: not documented either."""
NOISY_SHARE = 0.1
NOISY_IN_FLIGHT = 30
QUIET_AFTER_SECONDS = 300.0
_NO_GROUP = ""


class FairQueue(Queue):
    """A queue that serves quiet tenants first.

    Attributes:
        waits: Of each group, the longest time from sending to the first delivery.
    """

    def __init__(self, world: "World", name: str, settings: Settings, dead: Queue | None) -> None:
        super().__init__(world, name, settings, dead)
        self.waits: dict[str, float] = {}
        self._ready: dict[str, deque[Message]] = {}
        self._later: list[tuple[float, int]] = []
        self._in_flight: dict[str, float] = {}
        self._flying: Counter[str] = Counter()
        self._flew_at: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._busy_at = self._judged_at = world.scheduler.now
        self._noisy: set[str] = set()

    def send(self, body: str, **how: Any) -> Message:
        """As of `Queue`."""
        message = super().send(body, **how)
        heapq.heappush(self._later, (message.visible_at, message.n))
        return message

    def change_visibility(self, receipt: str, seconds: float) -> None:
        """As of `Queue`."""
        super().change_visibility(receipt, seconds)
        if message := self.messages.get(receipt):
            heapq.heappush(self._later, (message.visible_at, message.n))

    def delete(self, receipt: str) -> None:
        """As of `Queue`."""
        if message := self.messages.get(receipt):
            self._land(message)
        super().delete(receipt)

    def clear(self) -> None:
        """PurgeQueue."""
        self.messages.clear()
        self._ready.clear()

    def _land(self, message: Message) -> None:
        """A message is not in flight any more: the consumer's time is its tenant's."""
        began = self._in_flight.pop(str(message.n), None)
        if began is None:
            return
        now, group = self._world.scheduler.now, message.group or _NO_GROUP
        self._flying[group] -= 1
        self._fade(now)
        self._busy[group] = self._busy.get(group, 0.0) + now - began
        self._flew_at[group] = now

    def _fade(self, now: float) -> None:
        """Lets what lies back count less."""
        factor = math.exp((self._busy_at - now) / RECENT_SECONDS)
        if factor < 0.99:
            self._busy = {group: seconds * factor for group, seconds in self._busy.items() if seconds * factor > 1e-3}
            self._busy_at = now

    def _judge(self, now: float) -> None:
        """Notices, now and then, who is noisy."""
        if now - self._judged_at < DETECTION_SECONDS:
            return
        self._judged_at = now
        self._fade(now)
        flying, busy = sum(self._flying.values()), sum(self._busy.values())
        for group in self._ready.keys() - {_NO_GROUP}:
            own = self._flying[group]
            if (own >= NOISY_IN_FLIGHT and own > NOISY_SHARE * flying) or self._busy.get(group, 0) > NOISY_SHARE * busy:
                self._noisy.add(group)
        for group in list(self._noisy):
            idle = not self._flying[group] and now - self._flew_at.get(group, 0) > QUIET_AFTER_SECONDS
            if idle or not self._ready.get(group):
                self._noisy.discard(group)

    def _receive(self) -> list[Message]:
        now, settings = self._world.scheduler.now, self.settings
        while self._later and self._later[0][0] <= now:
            _, n = heapq.heappop(self._later)
            message = self.messages.get(str(n))
            if message is not None and not message.done and message.visible_at <= now:
                self._land(message)
                # Its place until it is received: no later entry of the heap counts for it.
                message.visible_at = math.inf
                self._ready.setdefault(message.group or _NO_GROUP, deque()).append(message)
        self._judge(now)
        batch: list[Message] = []
        while len(batch) < settings.batch and (message := self._next()) is not None:
            if settings.receives is not None and message.receives >= settings.receives:
                self._bury(message)
                continue
            group = message.group or _NO_GROUP
            if not message.receives:
                self.waits[group] = max(self.waits.get(group, 0.0), now - message.sent_at)
            message.receives += 1
            message.visible_at = now + settings.visibility
            heapq.heappush(self._later, (message.visible_at, message.n))
            self._in_flight[str(message.n)] = now
            self._flying[group] += 1
            batch.append(message)
        return batch

    def _next(self) -> Message | None:
        """Takes the next message that is ready, or None."""
        quiet = [group for group in self._ready if group not in self._noisy]
        if quiet:
            group = min(quiet, key=lambda group: self._ready[group][0].n) if len(quiet) > 1 else quiet[0]
        elif self._ready:
            group = min(self._ready, key=lambda group: (self._flying[group], self._ready[group][0].n))
        else:
            return None
        waiting = self._ready[group]
        message = waiting.popleft()
        if not waiting:
            del self._ready[group]
        return message
