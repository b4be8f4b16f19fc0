"""What goes wrong in a schedule, and how often: all of it drawn from the seed.

Each schedule has a character of its own (quiet, or one thing wrong all the time, or everything a little), since faults
of one kind at a time reach further than all of them at once. Whatever goes wrong has an end, after `CALM_SECONDS` or a
number of times, so that what is lost after that is lost by the code.
"""

import random
from typing import Any

from tests.support.scheduler import BEGIN, Scheduler

CALM_SECONDS = 600.0
"""When the last fault of AWS's strikes."""

_FOCI = (
    "dynamodb.PutItem", "dynamodb.UpdateItem", "dynamodb.UpdateItem", "s3.PutObject", "stepfunctions.StartExecution",
    "stepfunctions.StartExecution", "stepfunctions.SendTaskSuccess", "receive_webhook", "receive_webhook",
)  # fmt: skip
_OF_AWS = ("died before", "died after", "died after", "refused", "repeated", "answer lost")
_OF_CREATE = (
    "answer lost", "answer lost", "500 after", "unreadable", "late", "late and 500", "timeout", "500", "died before",
    "died after", "died after", "no connection", "429", "429", "422", "401", "402",
)  # fmt: skip
_AWS_BUDGET = 8
_KILLS_OF_A_MESSAGE = 3
_READ_BUDGET = 6
_FILE_BUDGET = 6
_INVOKE_BUDGET = 5


class Faults:
    """The faults of one schedule.

    Attributes:
        struck: What went wrong, by kind and how often.
    """

    def __init__(self, rng: random.Random, scheduler: Scheduler) -> None:
        self._rng = rng
        self._scheduler = scheduler
        self.struck: dict[str, int] = {}
        choice = rng.choice
        self._aws = choice((0.0, 0.0, 0.01, 0.04, 0.12))
        self._slowness = choice((0.0, 0.0, 0.0, 0.05, 0.3, 0.7))
        # All of them at one operation, or in the receiver of webhooks: where many in a row are needed to hurt.
        self._focus = choice((None, None, None, *_FOCI))
        self._at = 0.5 if self._focus else self._aws
        self._create = choice((0.0, 0.3, 0.7, 1.0))
        self._creates_failing = rng.randint(1, 3)
        self._read = choice((0.0, 0.0, 0.1, 0.4))
        self._reads_404 = self._kills = 0
        self._lost = choice((0.0, 0.0, 0.3, 0.6, 1.0))
        self._late_webhooks = choice((0.0, 0.0, 0.3))
        self._doubled = choice((0.0, 0.3))
        self._file = choice((0.0, 0.3, 0.6))
        self._invoke = choice((0.0, 0.0, 0.03, 0.15))
        self._list_lag = choice((0.0, 5.0, 25.0, 60.0))
        self.index_lag = choice((0.0, 0.0, 0.3, 2.0))
        self.very_late = rng.random() < 0.12
        if self.very_late:
            self._create, self._lost = 1.0, min(self._lost, 0.3)
        self.stops = rng.random() < 0.15
        self.doubled_sweeps = rng.random() < 0.2
        self.secret_is_unknown = rng.random() < 0.1
        self.long_runs = rng.random() < 0.1
        # Of what hands messages and changes to functions.
        self.poll_seconds = choice((0.02, 0.2, 1.0))
        self._stream_lag = choice((0.1, 0.5, 3.0, 30.0))
        self._source = choice((0.0, 0.0, 0.1))
        self._bus = choice((0.0, 0.0, 0.3))

    def aim_at(self, foci: list[str]) -> None:
        """Aims AWS's faults at one of these, in every third schedule: a function, or an operation."""
        if foci and self._rng.random() < 0.3:
            self._focus, self._at = self._rng.choice(foci), 0.5

    def calm(self) -> None:
        """Nothing goes wrong but what a world adds."""
        self._aws = self._at = self._slowness = self._create = self._read = self._lost = self._late_webhooks = 0.0
        self._file = self._invoke = self._source = self._bus = self._doubled = self._list_lag = 0.0
        self._focus, self._stream_lag, self.poll_seconds = None, 0.5, 0.2
        self.very_late = self.stops = self.doubled_sweeps = self.long_runs = False

    def invoke_twice(self) -> None:
        """Step Functions is often told that an invocation failed that did not, or makes two of one."""
        self._invoke = 0.6

    def trouble_the_bus(self) -> None:
        """The bus takes an event only at the third time, mostly."""
        self._bus = 0.6

    def lose_webhooks(self) -> None:
        """No webhook of Replicate's arrives."""
        self._lost = 1.0

    def _strike(self, kind: str, budget: int) -> bool:
        """Whether one more of this kind may strike."""
        if self.struck.get(kind, 0) >= budget or self._scheduler.now > BEGIN + CALM_SECONDS:
            return False
        self.struck[kind] = self.struck.get(kind, 0) + 1
        return True

    # -- AWS --------------------------------------------------------------------------------------------------

    def aws_seconds(self) -> float:
        if self._slowness and self._rng.random() < self._slowness:
            return self._rng.choice((0.2, 1.0, 3.0))
        return 0.01

    @property
    def slowest_answer(self) -> float:
        """The seconds that an answer of AWS's takes at most."""
        return 3.0 if self._slowness else 0.01

    def of_aws(self, service: str, operation: str) -> str | None:
        process = self._scheduler.current
        receives = process is not None and process.name == "receive_webhook"
        function = process.name if process is not None else None
        if self._focus not in (None, f"{service}.{operation}", function):
            return None
        kind = "receiver" if receives else "aws"
        if self._at and self._rng.random() < self._at and self._strike(kind, _AWS_BUDGET):
            found = self._rng.choice(_OF_AWS if not self._focus else (*_OF_AWS, "answer lost", "answer lost"))
            if function == "start_from_queue" and found.startswith("died"):
                self._kills += 1
                # A message is given up when its function was killed over it so often, besides the first time.
                return found if self._kills < _KILLS_OF_A_MESSAGE else "refused"
            return found
        return None

    def of_invoke(self) -> str | None:
        """Of the state machine's invoking a function."""
        if self._invoke and self._rng.random() < self._invoke and self._strike("invoke", _INVOKE_BUDGET):
            return self._rng.choice(("refused", "answer lost", "unknown", "twice", "twice"))
        return None

    def of_state(self) -> str | None:
        """Of the state machine's own write."""
        if not self._focus and self._aws and self._rng.random() < self._aws and self._strike("state", 2):
            return "refused"
        return None

    # -- what hands over --------------------------------------------------------------------------------------

    def stream_lag(self) -> float:
        return self._stream_lag * self._rng.random()

    def of_source(self) -> bool:
        """Whether what was done is handed over once more."""
        return bool(self._source and self._rng.random() < self._source and self._strike("handed over again", 3))

    def of_bus(self) -> bool:
        """Whether the bus does not take an event now."""
        return bool(self._bus and self._rng.random() < self._bus and self._strike("bus", 8))

    # -- Replicate --------------------------------------------------------------------------------------------

    def create_seconds(self) -> float:
        return self._rng.choice((0.1, 0.1, 0.5, 3.0, 15.0))

    def read_seconds(self) -> float:
        return self._rng.choice((0.1, 0.1, 0.1, 3.0))

    def late_seconds(self) -> float:
        return (
            self._rng.choice((300.0, 1100.0, 1500.0)) if self.very_late else self._rng.choice((0.5, 10.0, 21.0, 30.0))
        )

    def list_lag_seconds(self) -> float:
        return self._list_lag * self._rng.random()

    def of_create(self) -> str | None:
        if self._create and self._rng.random() < self._create and self._strike("create", self._creates_failing):
            if self.very_late:
                return "late"
            return self._rng.choice(_OF_CREATE)
        return None

    def of_read(self, path: str) -> str | None:
        if not (self._read and self._rng.random() < self._read and self._strike("read", _READ_BUDGET)):
            return None
        kind = self._rng.choice(("timeout", "no connection", "500", "404", "answer lost", "died before", "died after"))
        if kind == "404":
            self._reads_404 += 1
            # Models do not come and go, and five in a row are believed.
            if self._reads_404 > 3 or path.startswith("/models/"):
                return "500"
        return kind

    def plan_run(self) -> dict[str, Any]:
        """How a prediction will go at Replicate."""
        rng = self._rng
        long = self.long_runs or self.very_late
        return {
            "queued_seconds": rng.choice((0.0, 0.2, 5.0, 40.0, 200.0)),
            "output_seconds": rng.choice((None, None, 1.0, 30.0)),
            "run_seconds": rng.choice((1500.0, 1e9)) if long else rng.choice((0.1, 1.0, 5.0, 20.0, 70.0, 700.0)),
            "status": rng.choice(("succeeded",) * 6 + ("failed", "canceled", "aborted")),
            "unstarted": rng.choice(("aborted", "canceled")),
            "cancel_loses": rng.random() < 0.3,
            "files": rng.choice((0, 0, 1, 2)),
            "text": rng.random() < 0.5,
        }

    def of_webhook(self, event: str) -> list[float]:
        """When it comes; twice, if it is doubled."""
        rng = self._rng
        slow = (
            (10.0, 60.0, 200.0) if self._late_webhooks and rng.random() < self._late_webhooks else (0.0, 0.05, 0.3, 1.0)
        )
        delays = [rng.choice(slow)]
        if self._doubled and rng.random() < self._doubled:
            delays.append(rng.choice((0.0, 0.02, 1.0, 30.0)))
        return delays

    def webhook_is_lost(self) -> bool:
        if self._lost and self._rng.random() < self._lost:
            self.struck["webhook"] = self.struck.get("webhook", 0) + 1
            return True
        return False

    # -- files ------------------------------------------------------------------------------------------------

    def file_seconds(self) -> float:
        return self._rng.choice((0.1, 0.1, 1.0, 10.0))

    def of_file(self) -> str | None:
        if self._file and self._rng.random() < self._file and self._strike_file():
            return self._rng.choice(("500", "no connection", "cut", "cut", "no length", "slow", "slow", "died before"))
        return None

    def stops_copy(self) -> bool:
        """Whether its execution is stopped by hand meanwhile.

        Once: each time, the next execution waits for the lease to end (17 min) and up to ten minutes more, so that
        stopping one after the other outlasts the hour in which Replicate keeps the files.
        """
        return self.stops and self._rng.random() < 0.5 and self._strike("stopped while copying", 1)

    def _strike_file(self) -> bool:
        self.struck["file"] = self.struck.get("file", 0) + 1
        return self.struck["file"] <= _FILE_BUDGET
