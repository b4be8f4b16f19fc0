"""SQS: the template's queues, and the event sources that hand their messages to functions.

At least once and in no order that is promised: a message comes again when it was not deleted in time, and sometimes all
the same. Of messages with a group (a fair queue), those come first of whose group fewest are being worked on.

https://docs.aws.amazon.com/lambda/latest/dg/with-sqs.html
https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-fair-queues.html
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from tests.simulation.functions import FunctionFailed
from tests.support.fixtures import ENVIRONMENT
from tests.support.template import folder_name, load_template, resources, variables

if TYPE_CHECKING:
    from tests.simulation.world import World

SENDER = "AROASTACK0000:function"


@dataclass(frozen=True)
class Settings:
    """A queue as the template has it: seconds, and counts."""

    visibility: float
    receives: int | None
    dead: str | None
    function: str | None
    batch: int = 1
    concurrency: int = 1000


@dataclass
class Message:
    """A message of a queue.

    Attributes:
        n: Its place in the order of sending.
        visible_at: From when on it can be received.
        receives: How often it was.
        done: Whether it was deleted, or moved to the dead-letter queue.
    """

    id: str
    body: str
    n: int
    sent_at: float
    visible_at: float
    sender: str = SENDER
    group: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    receives: int = 0
    done: bool = False
    told: Callable[[bool], None] | None = None

    def record(self, arn: str) -> dict[str, Any]:
        """As Lambda passes it on."""
        return {
            "messageId": self.id,
            "receiptHandle": str(self.n),
            "body": self.body,
            "attributes": {
                "SentTimestamp": str(int(self.sent_at * 1000)),
                "SenderId": self.sender,
                "ApproximateReceiveCount": str(self.receives),
                "ApproximateFirstReceiveTimestamp": str(int(self.sent_at * 1000)),
                **({"MessageGroupId": self.group} if self.group else {}),
            },
            "messageAttributes": {
                name: {"stringValue": value["StringValue"], "dataType": value["DataType"]}
                for name, value in self.attributes.items()
            },
            "eventSource": "aws:sqs",
            "eventSourceARN": arn,
            "awsRegion": "us-east-1",
        }


class Queue:
    """One queue.

    Attributes:
        messages: Those that are in it.
        lateness: How many seconds a new message is handed over later than it could be: no order is kept.
        worst: The longest time from a message's being sent to its being deleted.
    """

    def __init__(self, world: "World", name: str, settings: Settings, dead: "Queue | None") -> None:
        self.name = name
        self.settings = settings
        self.messages: dict[str, Message] = {}
        self.lateness: Callable[[], float] = lambda: 0.0
        self.deleted = 0
        self._world = world
        self._dead = dead
        self._n = 0
        self._running = 0

    def send(
        self,
        body: str,
        *,
        delay: float = 0.0,
        message_id: str | None = None,
        sender: str = SENDER,
        group: str | None = None,
        attributes: dict[str, Any] | None = None,
        told: Callable[[bool], None] | None = None,
    ) -> Message:
        """SendMessage; `told` learns whether it was taken in the end, or went to the dead-letter queue."""
        self._n += 1
        now = self._world.scheduler.now
        known = message_id or f"059f36b4-87a3-44ab-83d2-{_number(self.name, self._n):012d}"
        visible_at = now + delay + self.lateness()
        message = Message(known, body, self._n, now, visible_at, sender, group, attributes or {}, told=told)
        self.messages[str(self._n)] = message
        self._pump_at(message.visible_at)
        return message

    def change_visibility(self, receipt: str, seconds: float) -> None:
        """ChangeMessageVisibility."""
        if message := self.messages.get(receipt):
            message.visible_at = self._world.scheduler.now + seconds

    def delete(self, receipt: str) -> None:
        """DeleteMessage."""
        if (message := self.messages.pop(receipt, None)) is None:
            return
        message.done = True
        self.deleted += 1
        if message.told:
            message.told(True)

    def _pump_at(self, moment: float) -> None:
        # The pollers take a moment, in which more may come.
        if self.settings.function is not None:
            self._world.scheduler.at(moment + self._world.faults.poll_seconds, self._pump)

    def _pump(self) -> None:
        function = self.settings.function
        while function is not None and self._running < self.settings.concurrency:
            batch = self._receive()
            if not batch:
                return
            self._running += 1
            self._world.scheduler.spawn(f"poller of {self.name}", partial(self._hand_over, function, batch))

    def _receive(self) -> list[Message]:
        now, settings = self._world.scheduler.now, self.settings
        visible = [message for message in self.messages.values() if message.visible_at <= now]
        for message in visible:
            if settings.receives is not None and message.receives >= settings.receives:
                self._bury(message)
        hidden = Counter(m.group for m in self.messages.values() if m.receives and m.visible_at > now)
        ready = sorted(
            (message for message in visible if not message.done),
            key=lambda m: (hidden[m.group] if m.group else 0, m.visible_at, m.n),
        )
        batch = ready[: settings.batch]
        for message in batch:
            message.receives += 1
            message.visible_at = now + settings.visibility
        return batch

    def _bury(self, message: Message) -> None:
        message.done = True
        self.messages.pop(str(message.n), None)
        if self._dead is not None:
            self._dead.send(message.body, message_id=message.id, sender=message.sender, attributes=message.attributes)
        if message.told:
            message.told(False)

    def _hand_over(self, function: str, batch: list[Message]) -> None:
        world = self._world
        event = {"Records": [message.record(f"arn:aws:sqs:us-east-1:123456789012:{self.name}") for message in batch]}
        world.step(f"{len(batch)} of {self.name}", 0.02)
        failed = {message.id for message in batch}
        try:
            answer = world.functions.invoke(function, event)
            if not world.faults.of_source():
                failed = {each["itemIdentifier"] for each in answer["batchItemFailures"]}
        except FunctionFailed as failure:
            world.note(f"{function} failed: {failure.kind} {failure.message}")
        self._running -= 1
        for message in batch:
            if message.id in failed:
                self._pump_at(message.visible_at)
            else:
                self.delete(str(message.n))
        self._pump()


def _number(name: str, n: int) -> int:
    return {"RequestsQueue": 10**9, "DeliveriesQueue": 2 * 10**9}.get(name, 3 * 10**9) + n


@cache
def settings_of() -> dict[str, Settings]:
    """The template's queues by logical name."""
    found = {}
    for name, queue in resources("AWS::SQS::Queue").items():
        properties = queue["Properties"]
        redrive = properties.get("RedrivePolicy", {})
        source = next(
            (
                each["Properties"]
                for each in resources("AWS::Lambda::EventSourceMapping").values()
                if each["Properties"]["EventSourceArn"] == {"Fn::GetAtt": [name, "Arn"]}
            ),
            None,
        )
        found[name] = Settings(
            visibility=_value(properties.get("VisibilityTimeout", 30)),
            receives=_value(redrive["maxReceiveCount"]) if redrive else None,
            dead=redrive["deadLetterTargetArn"]["Fn::GetAtt"][0] if redrive else None,
            function=folder_name(source["FunctionName"]["Ref"]) if source else None,
            batch=_value(source.get("BatchSize", 10)) if source else 1,
            concurrency=_value(source.get("ScalingConfig", {}).get("MaximumConcurrency", 1000)) if source else 0,
        )
    return found


@cache
def names_by_url() -> dict[str, str]:
    """The queues' logical names by the URLs of the tests' environment."""
    found = {}
    for function in resources("AWS::Serverless::Function"):
        for name, value in variables(function).items():
            if isinstance(value, dict) and value.get("Ref") in settings_of() and name in ENVIRONMENT:
                found[ENVIRONMENT[name]] = value["Ref"]
    return found


def queues_of(world: "World") -> dict[str, Queue]:
    """The queues of a world by logical name."""
    queues: dict[str, Queue] = {}

    def make(name: str) -> Queue:
        if name not in queues:
            settings = settings_of()[name]
            dead = make(settings.dead) if settings.dead else None
            queues[name] = Queue(world, name, settings, dead)
        return queues[name]

    for name in settings_of():
        make(name)
    return queues


def _value(value: Any) -> Any:
    """A number of the template, or the default of the parameter that it names."""
    if isinstance(value, dict):
        return load_template()["Parameters"][value["Ref"]]["Default"]
    return value
