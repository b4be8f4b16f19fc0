"""Task tokens of other state machines whose states wait for a prediction to finish."""

from collections.abc import Iterator
from typing import NamedTuple

from predictions.aws.dynamodb import Condition, Table
from predictions.store.keys import CALLER, caller_key, prediction_key

CALLERS_LIMIT = 1000
"""How many states may wait for one prediction: the consumer of the stream can notify them all in one run."""


class Caller(NamedTuple):
    """A state that waits for a prediction: its item's `sk`, its token, and whether it wants no more than the status."""

    sk: str
    task_token: str
    brief: bool = False


class WaitingCallers:
    """The states that wait for predictions."""

    def __init__(self, table: Table) -> None:
        self._table = table

    @classmethod
    def from_env(cls) -> "WaitingCallers":
        """Make them from `TABLE_NAME`."""
        return cls(Table.from_env())

    def add_caller(self, prediction_id: str, task_token: str, expires: int, *, brief: bool = False) -> None:
        """Record that a state waits with this token for a prediction, which may not exist yet or have finished.

        publish_changes reads this write from the table's stream, as it reads the end. Twice changes nothing.

        Args:
            prediction_id: The prediction.
            task_token: The state's token.
            expires: When the item expires.
            brief: Whether the state gets no more than the status, as a line of a batch does: Step Functions writes
                what a line gets to the bucket, where it would outlive a deleted prediction.
        """
        item = {"task_token": task_token, "expires_at": expires} | ({"brief": True} if brief else {})
        self._table.put_item(caller_key(prediction_id, task_token), item)

    def takes_caller(self, prediction_id: str, task_token: str) -> bool:
        """Check whether one more state may wait for a prediction: fewer than `CALLERS_LIMIT` do, or this one does.

        Writers that check at the same time may exceed the limit by their number.
        """
        if sum(self._table.count_items(_callers_of(prediction_id))) < CALLERS_LIMIT:
            return True
        return self._table.get_item(caller_key(prediction_id, task_token)) is not None

    def callers_of(self, prediction_id: str) -> Iterator[Caller]:
        """Read the states that wait for a prediction, consistently.

        No item is deleted: a token works once, and expires with its prediction.
        """
        for item in self._table.query(_callers_of(prediction_id)):
            yield Caller(str(item["sk"]), str(item["task_token"]), "brief" in item)


def _callers_of(prediction_id: str) -> Condition:
    pk = prediction_key(prediction_id).pk
    return Condition("pk = :pk AND begins_with(sk, :caller)", pk=pk, caller=CALLER)
