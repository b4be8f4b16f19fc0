"""Callers of the API and senders of messages: what they ask for, again where no answer came, cancel and delete."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.simulation.functions import FunctionFailed
from tests.simulation.queues import Message

if TYPE_CHECKING:
    from tests.simulation.world import World

VERSION = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
SENDERS = {"alice": "AROAALICE0000", "mallory": "AROAMALLORY00"}
"""Who sends messages for which owner: the environment's `QUEUE_SENDERS`."""


@dataclass
class Wanted:
    """One request of a caller's, and what became of it in his eyes.

    Attributes:
        also: Further fields of its body, such as a webhook.
        collection: `predictions` or `trainings`.
        deployment: What is to run it, where that is no model.
    """

    number: int
    door: str
    prompt: str
    key: str
    lifetime: str | None
    wait: str | None
    owner: str = "alice"
    collection: str = "predictions"
    deployment: str | None = None
    also: dict[str, Any] = field(default_factory=dict)
    accepted_id: str | None = None
    refused: bool = False
    canceled_at: float | None = None
    deleted: bool = False
    answers: Counter[int] = field(default_factory=Counter)


class Callers:
    """What callers do, each in a process of its own.

    Attributes:
        requests: All that they have asked for.
    """

    def __init__(self, world: "World") -> None:
        self.requests: list[Wanted] = []
        self._world = world

    def plan(self) -> list[Wanted]:
        """The ordinary requests of a schedule."""
        world, rng = self._world, self._world.rng
        doors = [rng.choice(("key", "key", "sdk", "plain", "queue", "queue")) for _ in range(rng.choice((1, 1, 1, 2)))]
        twins = rng.random() < 0.3
        requests = []
        for number, door in enumerate(doors):
            same = twins and door in ("key", "queue")
            lifetime = "10m" if world.faults.very_late else rng.choice((None, None, "10m", "30m"))
            if world.faults.long_runs and not world.faults.very_late:
                lifetime = None
            wait = rng.choice((None, None, None, "wait=3"))
            requests.append(
                Wanted(number, door, "the same" if same else f"number {number}", f"key-{number}", lifetime, wait)
            )
        return requests

    def wanted_of(self, prediction_id: str) -> Wanted | None:
        """The request that became this prediction."""
        return next((each for each in self.requests if each.accepted_id == prediction_id), None)

    # -- what they do -----------------------------------------------------------------------------------------

    def ask_for(self, wanted: Wanted) -> None:
        """Makes a request, a moment later."""
        rng, scheduler = self._world.rng, self._world.scheduler
        scheduler.sleep(rng.choice((0.0, 0.0, 0.05, 3.0)))
        if wanted.door == "queue":
            message = self.send(wanted)
            if rng.random() < 0.3:
                scheduler.sleep(rng.choice((0.0, 0.1, 5.0, 100.0, 400.0)))
                self.send(wanted, again=message)
        else:
            self.post(wanted)

    def post(self, wanted: Wanted) -> None:
        """Posts it, again where that helps."""
        world = self._world
        body: dict[str, Any] = {"input": {"prompt": wanted.prompt}, **wanted.also}
        path = (
            f"/deployments/{wanted.deployment}/predictions" if wanted.deployment else "/models/meta/llama/predictions"
        )
        if wanted.collection == "trainings":
            path = f"/models/meta/llama/versions/{VERSION}/trainings"
            body["destination"] = "alice/tuned"
        elif wanted.lifetime:
            body["lifetime"] = wanted.lifetime
        tries = {"key": 6, "sdk": 3, "plain": 1}[wanted.door]
        for attempt in range(tries):
            headers = {"Content-Type": "application/json"}
            if wanted.door == "key":
                headers["Idempotency-Key"] = wanted.key
            if wanted.door == "sdk":
                headers["x-stainless-retry-count"] = str(attempt)
            if wanted.wait:
                headers["Prefer"] = wanted.wait
            # Some hang up early, and ask again while the first one is still at work.
            patience = world.rng.choice((2.0, 10.0)) if tries > 1 and world.rng.random() < 0.2 else 29.0
            answer = self.call("start_prediction", "POST", path, headers, body, wanted.owner, patience)
            wanted.answers[answer["statusCode"]] += 1
            if answer["statusCode"] == 201:
                wanted.accepted_id = json.loads(answer["body"])["id"]
                return
            if answer["statusCode"] < 500 and answer["statusCode"] != 429:
                wanted.refused = True
                return
            world.scheduler.sleep(world.rng.choice((0.5, 2.0, 8.0)))

    def call(
        self,
        function: str,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        body: Any = "",
        owner: str = "alice",
        patience: float = 29.0,
    ) -> dict[str, Any]:
        """One call of the API; 502 where the function gave no answer."""
        world = self._world
        text = body if isinstance(body, str) else json.dumps(body)
        event = world.api_event(method, path, headers or {}, text, owner)
        try:
            answer: dict[str, Any] = world.functions.invoke(function, event, patience)
        except FunctionFailed:
            answer = {"statusCode": 502}
        world.note(f"answered {answer['statusCode']} {str(answer.get('body'))[:200]}")
        return answer

    def send(self, wanted: Wanted, *, again: Message | None = None) -> Message:
        """Sends a message, or lets one come again."""
        world = self._world
        target = {"deployment": wanted.deployment} if wanted.deployment else {"model": "meta/llama"}
        body = {**target, "input": {"prompt": wanted.prompt}, **wanted.also}
        if wanted.lifetime:
            body["lifetime"] = wanted.lifetime

        def told(taken: bool) -> None:
            if not taken:
                world.violations.append(f"the message of request {wanted.number} went to the dead-letter queue")
            elif wanted.accepted_id is None:
                wanted.accepted_id = self._id_of(wanted)
                if wanted.accepted_id is None and not self.gave_up(text):
                    wanted.accepted_id = "nothing"

        text = again.body if again else json.dumps(body)
        return world.queues["RequestsQueue"].send(
            text,
            message_id=again.id if again else None,
            sender=SENDERS[wanted.owner],
            told=told,
        )

    def gave_up(self, text: str) -> bool:
        """Whether a message is a dead letter: functions died over it at each try, and it is kept with that reason."""
        return any(letter.body == text for letter in self._world.queues["RequestsDeadLetterQueue"].messages.values())

    def _id_of(self, wanted: Wanted) -> str | None:
        """The id that a message's request has got, which no answer tells: that of its prompt."""
        taken = {each.accepted_id for each in self.requests}
        for prediction_id in self._world.ids_by_prompt.get(wanted.prompt, ()):
            if prediction_id not in taken and (f"prediction#{prediction_id}", "status") in self._world.table.items:
                return prediction_id
        return None

    def cancel_some_time(self, wanted: Wanted) -> None:
        """Cancels what was accepted."""
        world = self._world
        world.scheduler.sleep(world.rng.choice((0.0, 0.5, 5.0, 30.0, 100.0, 400.0)))
        for _ in range(4):
            if (prediction_id := wanted.accepted_id) is None:
                world.scheduler.sleep(world.rng.choice((0.3, 20.0)))
                continue
            was_over = prediction_id in world.terminal_at
            path = f"/{wanted.collection}/{prediction_id}/cancel"
            if self.call("cancel_prediction", "POST", path, owner=wanted.owner)["statusCode"] == 200:
                if not was_over:
                    wanted.canceled_at = world.scheduler.now
                return
            world.scheduler.sleep(2.0)

    def delete_some_time(self, wanted: Wanted, waits: tuple[float, ...] = (1.0, 20.0, 300.0), tries: int = 6) -> None:
        """Deletes what has ended."""
        world = self._world
        for _ in range(tries):
            world.scheduler.sleep(world.rng.choice(waits))
            prediction_id = wanted.accepted_id
            if prediction_id is None or prediction_id not in world.visible_at:
                continue
            path = f"/predictions/{prediction_id}"
            if self.call("cancel_prediction", "DELETE", path, owner=wanted.owner)["statusCode"] == 200:
                wanted.deleted = True
                return
